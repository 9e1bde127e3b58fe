"""The judgement of a candidate that has live requests: is it as good as what it replaces? Pure.

What the host and the monitor publish of the two instances goes in, sample by sample; `measure` says what it amounts to.
Requests are judged by bounds that hold at every moment (`sequential.py`), so that looking often costs nothing: a
candidate that is no worse is condemned by them with a chance of `alpha` at most, however long it is watched.

Each check has one of four verdicts. *passed* and *failed* say something about the candidate; *inconclusive*: what was
seen allows both; *error*: it could not be measured. No data is never a pass, unless the strategy asks for none.
While there is time left, inconclusive only means: go on. At the end the estimates themselves are held against the
limits, once: what is above by more than chance explains, and not worse for sure, stays inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from interlock.broker.facts import Check, Verdict
from interlock.broker.samples import NAME, Labels
from interlock.broker.strategies import ObserveConfig
from interlock.coordinator.sequential import (
    EVERYTHING,
    Bounds,
    Moments,
    is_chance,
    mean_bounds,
    share_bounds,
    share_is_chance,
)

NOTHING = Moments()
CHECKPOINTS = (0.25, 0.5, 0.75, 1.0)  # of the planned time: what was measured there is kept as evidence
FEW = 20  # requests: of fewer nothing is said about shares, as in the rules that ship
FRESH_S = 5.0  # an instance whose newest sample is older than this has no data; a host speaks at least once a second
SHARE_UP = 0.99  # of the samples, of health and of each dependency

_REQUESTS, _ERRORS, _SLOW = "agent_trial_requests_total", "agent_trial_errors_total", "agent_trial_slow_total"
_LOG, _SQUARES = "agent_trial_log_seconds_sum", "agent_trial_log_seconds_squares_sum"
_COUNTERS = {_REQUESTS, _ERRORS, _SLOW, _LOG, _SQUARES}
_UP, _DEPENDENCY = "agent_up", "agent_dependency_up"
_MEMORY = {"agent_process_memory_rss_bytes": "memory", "gpu_process_memory_bytes": "gpu-memory"}


@dataclass(frozen=True)
class Baseline:
    """What the host measured of the old revision before anything started. Logarithms of seconds."""

    log: Moments = NOTHING
    slow_s: float | None = None  # 19 of 20 answers were at most as slow

    @classmethod
    def from_evidence(cls, evidence: Mapping[str, Any]) -> Baseline:
        """Of the evidence of a `prepare` step; of one that has none, or of another version, nothing is known."""
        found = evidence.get("baseline")
        try:
            log = Moments(float(found["requests"]), float(found["log_sum"]), float(found["log_squares_sum"]))  # type: ignore[index]
            slow = found["slow_s"]  # type: ignore[index]
        except (TypeError, KeyError, ValueError):
            return cls()
        return cls(log, None if slow is None else float(slow))


@dataclass
class _Ratio:
    """How many of the samples of a 0-or-1 series were 1, and when the newest was taken."""

    ones: float = 0.0
    count: int = 0
    newest: float = -math.inf

    def add(self, value: float, time: float) -> None:
        self.count += 1
        self.ones += value >= 1
        self.newest = max(self.newest, time)

    @property
    def share(self) -> float:
        return self.ones / self.count if self.count else math.nan


@dataclass
class _Side:
    """One of the two revisions, as telemetry tells it."""

    totals: dict[str, float] = field(default_factory=dict)
    up: _Ratio = field(default_factory=_Ratio)
    dependencies: dict[str, _Ratio] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)  # kind -> card ("" for RAM) -> bytes

    @property
    def requests(self) -> float:
        return self.totals.get(_REQUESTS, 0.0)

    @property
    def errors(self) -> float:
        return self.totals.get(_ERRORS, 0.0)

    @property
    def log(self) -> Moments:
        return Moments(self.requests, self.totals.get(_LOG, 0.0), self.totals.get(_SQUARES, 0.0))

    def used(self, kind: str) -> float | None:
        found = self.memory.get(kind)
        return sum(found.values()) if found else None


@dataclass(frozen=True)
class Measurement:
    """All checks at one moment, and what follows from them. `checkpoint`: the share of the time that is over."""

    verdict: Verdict
    reason: str
    checks: list[Check]
    checkpoint: float


class Observation:
    """One candidate's time on trial. `take` samples as they come; `measure` whenever it pleases."""

    def __init__(self, agent: str, old: str, new: str, settings: ObserveConfig, baseline: Baseline) -> None:
        self._agent = agent
        self._settings = settings
        self._baseline = baseline
        self._old, self._new = _Side(), _Side()
        self._of = {("permanent", old): self._old, ("candidate", new): self._new}

    def take(self, labels: Labels, value: float, time: float) -> None:
        """A sample, taken at `time` (seconds since 1970). What is not about the two revisions is passed over."""
        known = dict(labels)
        if known.get("agent") != self._agent:
            return
        side = self._of.get((known.get("role", ""), known.get("revision", "")))
        name = known.get(NAME, "")
        if side is None or not math.isfinite(value):
            return
        if name in _COUNTERS:
            side.totals[name] = value
        elif name == _UP:
            if value >= 1 or side.up.count:  # what is remembered may be older than its first answer
                side.up.add(value, time)
        elif name == _DEPENDENCY:
            side.dependencies.setdefault(known.get("dependency", "?"), _Ratio()).add(value, time)
        elif name in _MEMORY:
            side.memory.setdefault(_MEMORY[name], {})[known.get("uuid", "")] = value

    def measure(self, now: float, *, checkpoint: float) -> Measurement:
        """What the checks say at `now`; `checkpoint` 1 and more: the time is over, and the estimates decide."""
        final = checkpoint >= 1
        checks = [self._health(now), *self._dependencies(), *self._requests(final)]
        checks += [check for kind in ("memory", "gpu-memory") if (check := self._resource(kind)) is not None]
        verdict, decisive = together(checks)
        reason = "; ".join(f"{check.check}: {check.reason}" for check in decisive)
        return Measurement(verdict, reason, checks, min(checkpoint, 1.0))

    # --- the checks

    def _health(self, now: float) -> Check:
        up = self._new.up
        if now - up.newest > FRESH_S:
            silent = f"for {now - up.newest:.0f} s" if up.count else "at all"
            return _check("health", "error", None, SHARE_UP, f"no telemetry of the candidate {silent}")
        verdict: Verdict = "passed" if up.share >= SHARE_UP else "failed"
        return _check("health", verdict, up.share, SHARE_UP, f"up in {up.share:.1%} of {up.count} samples")

    def _dependencies(self) -> list[Check]:
        checks = []
        for name, seen in sorted(self._new.dependencies.items()):
            before = self._old.dependencies.get(name)
            verdict: Verdict = "passed" if seen.share > SHARE_UP else "failed"
            reason = f"reached in {seen.share:.1%} of {seen.count} samples"
            if verdict == "failed" and before is not None and before.share <= SHARE_UP:
                verdict, reason = "inconclusive", f"{reason}, by the old revision in {before.share:.1%}: not its fault"
            checks.append(_check(f"dependency {name}", verdict, seen.share, SHARE_UP, reason))
        return checks

    def _requests(self, final: bool) -> list[Check]:
        wanted, count = self._settings.requests, self._new.requests
        if count < max(wanted, FEW):
            if not wanted:
                reason = f"not judged: {count:.0f} requests, and this strategy asks for none"
                return [_check("requests", "passed", count, 0, reason)]
            return [_check("requests", "inconclusive", count, wanted, f"{count:.0f} of {wanted} requests needed")]
        return [self._judge_errors(final), self._judge_latency(final), self._judge_slow(final)]

    def _judge_errors(self, final: bool) -> Check:
        new, old, settings = self._new, self._old, self._settings
        text = f"{new.errors:.0f} errors in {new.requests:.0f} requests"
        before = f"the old revision has {old.errors:.0f} in {old.requests:.0f}"
        limits = (settings.errors_passed, settings.errors_failed)
        return self._judge_share("errors", new.errors, old.errors, limits, final=final, text=text, before=before)

    def _judge_slow(self, final: bool) -> Check:
        """The share of answers slower than 19 of 20 were before."""
        settings = self._settings
        if self._baseline.slow_s is None:
            return self._unknown("slow-answers", settings.slow_passed, "the old revision was not measured")
        slow, old = self._new.totals.get(_SLOW, 0.0), self._old.totals.get(_SLOW, 0.0)
        text = f"{slow:.0f} of {self._new.requests:.0f} answers took longer than {self._baseline.slow_s * 1000:.2f} ms"
        limits = (settings.slow_passed, settings.slow_failed)
        before = f"of the old revision {old:.0f} of {self._old.requests:.0f}"
        return self._judge_share("slow-answers", slow, old, limits, final=final, text=text, before=before)

    def _judge_share(
        self, name: str, hits: float, old: float, limits: tuple[float, float], *, final: bool, text: str, before: str
    ) -> Check:
        count, alpha = self._new.requests, self._settings.alpha / 4
        passed, failed = limits
        bounds = share_bounds(hits, count, alpha=alpha)
        if bounds.lower > failed:
            if share_bounds(old, self._old.requests, alpha=alpha).lower > failed:
                blame = f"{text}; {before}: not the candidate's fault"
                return _check(name, "inconclusive", hits / count, failed, blame)
            return _check(name, "failed", hits / count, failed, text)
        good = bounds.upper < passed or (final and share_is_chance(hits, count, passed))
        return _judged(name, hits / count, bounds, passed, good=good, text=text)

    def _judge_latency(self, final: bool) -> Check:
        """The ratio of typical latencies: how many times as long an answer takes, in the geometric mean."""
        settings, old = self._settings, self._baseline.log + self._old.log
        if old.count < FEW:
            what = f"{old.count:.0f} answers of the old revision"
            return self._unknown("latency", 1 + settings.latency_passed, what)
        slack = settings.latency_slack_s / math.exp(old.mean)
        passed, failed = 1 + max(settings.latency_passed, slack), 1 + max(settings.latency_failed, slack)
        alpha = settings.alpha / 4  # of each side: together half
        new = self._new.log
        mine, others = mean_bounds(new, alpha=alpha), mean_bounds(old, alpha=alpha)
        bounds = Bounds(math.exp(mine.lower - others.upper), _exp(mine.upper - others.lower))
        ratio = math.exp(new.mean - old.mean)
        text = f"{math.exp(new.mean) * 1000:.2f} ms, the old revision {math.exp(old.mean) * 1000:.2f} ms (typical)"
        if bounds.lower > failed:
            return _check("latency", "failed", ratio, failed, text)
        spread = math.sqrt(new.variance / new.count + old.variance / old.count)
        good = bounds.upper < passed or (final and is_chance(math.log(ratio), math.log(passed), spread))
        return _judged("latency", ratio, bounds, passed, good=good, text=text)

    def _unknown(self, name: str, limit: float, what: str) -> Check:
        """There is nothing to compare with: no pass where the strategy asks for requests, but not a fault either."""
        if self._settings.requests:
            return _check(name, "inconclusive", None, limit, f"nothing to compare with: {what}")
        return _check(name, "passed", None, limit, f"not judged: {what}")

    def _resource(self, kind: str) -> Check | None:
        new, old = self._new.used(kind), self._old.used(kind)
        if new is None or not old:
            return None
        limit = 1 + self._settings.memory_passed
        text = f"{new / 2**20:.0f} MiB, the old revision {old / 2**20:.0f} MiB"
        within = new <= old * limit
        return _check(kind, "passed" if within else "inconclusive", new / old, limit, text)


def together(checks: list[Check]) -> tuple[Verdict, list[Check]]:
    """The verdict of all checks, and those that made it: the worst counts."""
    order: tuple[Verdict, ...] = ("failed", "error", "inconclusive")
    for verdict in order:
        found = [check for check in checks if check.verdict == verdict]
        if found:
            return verdict, found
    return ("passed", checks) if checks else ("error", [])


def _judged(name: str, value: float, bounds: Bounds, limit: float, *, good: bool, text: str) -> Check:
    sure = "" if bounds == EVERYTHING else f" ({_number(bounds.lower)} to {_number(bounds.upper)} for sure)"
    return _check(name, "passed" if good else "inconclusive", value, limit, f"{text}{sure}")


def _check(name: str, verdict: Verdict, value: float | None, limit: float, reason: str) -> Check:
    return Check(check=name, verdict=verdict, value=value, limit=limit, reason=reason)


def _exp(power: float) -> float:
    return math.exp(power) if power < 700 else math.inf


def _number(value: float) -> str:
    return f"{value:.3g}"
