"""The record of one migration: all that the log says about it, in one object that needs nothing else. Pure.

It is folded from the log's events in their order, and is the same wherever it is folded. A log that was cut gives a
record with gaps, and says so.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from interlock.broker import commands, facts
from interlock.broker.facts import Check, Track
from interlock.broker.fields import Evidence
from interlock.broker.samples import NAME
from interlock.broker.wire import Event
from interlock.coordinator.state_words import handed_back, handed_over
from interlock.coordinator.wording import Tone, concerns, sentence, tone

FORMAT = 1  # of the file
CHARTS = 8  # at most: what decided comes first
MOMENTS = 2000  # of the timeline: a migration has some 30, and a record stays readable

# What each check of the observation is measured by (see observation.py); those of the host itself are above.
CHECKED = {
    "health": ("agent_up", "agent_health_failures"),
    "process-died": ("agent_up",),
    "errors": ("agent_trial_errors_total", "agent_errors_total"),
    "latency": ("agent_response_seconds",),
    "slow-answers": ("agent_trial_slow_total", "agent_response_seconds"),
    "requests": ("agent_trial_requests_total",),
    "memory": ("agent_process_memory_rss_bytes",),
    "gpu-memory": ("gpu_process_memory_bytes", "gpu_memory_used_ratio"),
    "shadow": ("agent_shadow_mismatches_total", "agent_shadow_compared_total"),
}
ALWAYS = ("agent_response_seconds", "agent_requests_total", "agent_errors_total", "agent_process_memory_rss_bytes")

Role = Literal["old", "new", "shared"]


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Moment(_Part, frozen=True, kw_only=True):
    """One event: its number in the log, when it was logged, who said it, what it says."""

    seq: int
    time: float
    source: str
    type: str
    text: str
    tone: Tone = "plain"


class Span(_Part, frozen=True, kw_only=True):
    """A stage. `end` is None where nothing ended it."""

    stage: str
    begin: float
    end: float | None
    steps: list[str] = []


class Measured(_Part, frozen=True, kw_only=True):
    """One measurement of all checks."""

    seq: int
    time: float
    verdict: str
    reason: str
    checkpoint: float
    final: bool
    checks: list[Check]


class Fired(_Part, frozen=True, kw_only=True):
    """A rule that fired about the migration. `decided`: it rolled it back or held it."""

    seq: int
    time: float
    rule: str
    expr: str
    labels: dict[str, str]
    value: float
    action: str
    summary: str
    sample_time: float
    dry_run: bool
    blame: str = ""
    decided: bool = False


class Led(_Part, frozen=True, kw_only=True):
    """What an operator asked for, or let pass (a deviation)."""

    seq: int
    time: float
    what: str
    by: str
    because: str


class Decision(_Part, frozen=True, kw_only=True):
    """What rolled it back or held it."""

    seq: int
    time: float
    by: str
    reason: str
    sample_time: float | None = None
    value: float | None = None
    labels: dict[str, str] = {}


class Restored(_Part, frozen=True, kw_only=True):
    """The times of a rollback, seconds since 1970; `first_sample` showed the breach, `asked` is when it was decided."""

    revision: str
    level: int
    first_sample: float | None
    asked: float | None
    received: float
    routed: float
    restored: float
    verified: bool
    state: str = ""  # what became of the agent's state in memory, where the candidate had it

    @property
    def routed_ms(self) -> float | None:
        """From the first sample that showed it until requests went to the old revision."""
        return None if self.first_sample is None else (self.routed - self.first_sample) * 1000

    @property
    def restored_ms(self) -> float | None:
        return None if self.first_sample is None else (self.restored - self.first_sample) * 1000


class Record(_Part, frozen=True, kw_only=True):
    """One migration from its request to its end. `gaps`: what is missing, and why."""

    format: int = FORMAT
    migration: str
    agent: str
    host: str = ""
    target: str = ""  # the host that it was to move to
    previous: str = ""
    to: str = ""
    strategy: str = ""
    wave: str = ""
    asked_by: str = ""
    because: str = ""
    started: float | None = None
    ended: float | None = None
    outcome: str = ""  # empty: it is in flight
    decided_by: str = ""
    reason: str = ""
    stages: list[Span] = []
    timeline: list[Moment] = []
    checks: list[Measured] = []
    rules: list[Fired] = []
    led: list[Led] = []
    deviations: list[Led] = []
    decision: Decision | None = None
    rollback: Restored | None = None
    requests: dict[str, dict[str, float]] = {}  # by revision: "asked", "errors" while it was recorded; "shadow"
    evidence: Evidence = {}
    series: list[Track] = []
    deciding: list[str] = []  # names of the series that decided
    gaps: list[str] = []

    @property
    def place(self) -> str:
        """Where the agent was, and where it was to go if that was elsewhere."""
        return f"from {self.host} to {self.target}" if self.target else f"on {self.host or '?'}"

    @property
    def seconds(self) -> float | None:
        return None if self.started is None or self.ended is None else self.ended - self.started

    def to_json(self) -> Any:
        return msgspec.to_builtins(self)


class Folding:
    """Events in, in the order of the log; `record()` at any time."""

    def __init__(self, migration: str) -> None:
        self._id = migration
        self._began: facts.MigrationStarted | None = None
        self._asked: dict[str, Event] = {}  # what operators asked for, by event id
        self._found: dict[str, Any] = {"migration": migration, "agent": ""}
        self._moments: list[Moment] = []
        self._spans: list[Span] = []
        self._checks: list[Measured] = []
        self._fired: list[Fired] = []
        self._led: list[Led] = []
        self._deviations: list[Led] = []
        self._rolled: commands.RollBack | None = None
        self._dropped = 0
        self._series: facts.SeriesRecorded | None = None
        self.ended = False

    def apply(self, event: Event) -> None:
        """Take in an event; what does not concern the migration is passed over."""
        body = event.body
        if self._began is None and isinstance(body, commands.Migrate):
            self._asked[event.header.id] = event
            return
        if isinstance(body, facts.SeriesRecorded):
            if body.migration == self._id:
                self._series = body
            return
        if not self._concerns(event):
            return
        if len(self._moments) < MOMENTS:
            self._moments.append(_moment(event))
        else:
            self._dropped += 1
        self._take(event)

    @property
    def began(self) -> bool:
        """Its beginning has come."""
        return self._began is not None

    def record(self) -> Record:
        """As far as the events have come."""
        found = dict(self._found)
        decision: Decision | None = found.get("decision")
        rules = [_settled(fired, found) for fired in self._fired]
        series = list(self._series.series) if self._series is not None else []
        end = found.get("ended")
        spans = [msgspec.structs.replace(span, end=span.end or end) for span in self._spans]
        deciding = _deciding(decision, rules, self._checks, series)
        return Record(
            **found, stages=spans, timeline=self._moments, checks=self._checks, rules=rules, led=self._led,
            deviations=self._deviations, series=series, deciding=deciding,
            requests=_requests(series, found.get("evidence", {})), gaps=self._gaps(),
        )  # fmt: skip

    # --- inside

    def _take(self, event: Event) -> None:
        body, at = event.body, _at(event)
        match body:
            case facts.MigrationStarted():
                self._begin(body, event)
            case facts.StageEntered():
                self._enter(body.stage, at)
            case facts.StepDone():
                more = handed_over(body.evidence) if body.step == "hand-over" else ""
                self._step(f"{body.step} done" + (f" ({more})" if more else ""), at)
            case facts.StepFailed():
                self._step(f"{body.step} failed: check {body.check}", at)
            case facts.ChecksMeasured():
                measured = Measured(
                    seq=event.header.seq, time=at, verdict=body.verdict, reason=body.reason,
                    checkpoint=body.checkpoint, final=body.final, checks=body.checks,
                )  # fmt: skip
                self._checks.append(measured)
            case facts.AlertFiring():
                self._fire(body, event)
            case _:
                self._decided(event)

    def _concerns(self, event: Event) -> bool:
        body = event.body
        if isinstance(body, commands.RenewLease):
            return False
        if concerns(event, self._id):
            return True
        if self._began is None:
            return False
        about = getattr(body, "agent", None) == self._began.agent
        if isinstance(body, facts.AlertFiring):
            return self._id in body.blamed
        return about and isinstance(
            body, facts.InstanceStarted | facts.InstanceStopped | facts.MigrationRefused | commands.Steer
            | commands.RollBackAgent,
        )  # fmt: skip

    def _begin(self, body: facts.MigrationStarted, event: Event) -> None:
        self._began = body
        asked = self._asked.get(body.request)
        self._asked.clear()
        if asked is not None:
            assert isinstance(asked.body, commands.Migrate)
            self._moments.insert(0, _moment(asked))
            self._found |= {"asked_by": asked.header.source, "because": asked.body.because, "wave": asked.body.wave}
        self._found |= {
            "agent": body.agent, "host": body.host, "target": body.target, "previous": body.previous, "to": body.to,
            "strategy": body.strategy, "started": _at(event),
        }  # fmt: skip

    def _enter(self, stage: str, at: float) -> None:
        self._close(at)
        self._spans.append(Span(stage=stage, begin=at, end=None))

    def _close(self, at: float) -> None:
        if self._spans and self._spans[-1].end is None:
            self._spans[-1] = msgspec.structs.replace(self._spans[-1], end=at)

    def _step(self, text: str, at: float) -> None:
        if self._spans:
            last = self._spans[-1]
            self._spans[-1] = msgspec.structs.replace(
                last, steps=[*last.steps, f"{text} after {at - last.begin:.2f} s"]
            )

    def _fire(self, body: facts.AlertFiring, event: Event) -> None:
        blame = body.blamed.get(self._id)
        self._fired.append(
            Fired(
                seq=event.header.seq, time=_at(event), rule=body.rule, expr=body.expr, labels=body.labels,
                value=body.value, action=body.action, summary=body.summary, sample_time=body.sample_time,
                dry_run=body.dry_run, blame=f"{blame.who}: {blame.why}" if blame else "",
            )
        )  # fmt: skip

    def _decided(self, event: Event) -> None:
        body, at, seq = event.body, _at(event), event.header.seq
        match body:
            case facts.Steered():
                self._led.append(Led(seq=seq, time=at, what=body.action, by=body.by, because=body.reason))
            case commands.RollBackAgent():
                led = Led(seq=seq, time=at, what="rollback", by=event.header.source, because=body.reason)
                self._led.append(led)
            case facts.Deviation():
                deviation = Led(seq=seq, time=at, what=body.what, by=body.by, because=body.because)
                self._deviations.append(deviation)
            case facts.MigrationHeld():
                self._found["decision"] = _decision(body.breach, event)
            case commands.RollBack():
                if self._rolled is None:
                    self._rolled = body
                    self._found["decision"] = _decision(body.breach, event)
            case facts.RolledBack():
                self._back(body, event)
            case facts.RollBackFailed():
                self._found["decision"] = _decision(body.breach, event)
            case facts.MigrationEnded():
                self._close(at)
                self.ended = True
                self._found |= {
                    "agent": body.agent, "ended": at, "outcome": body.outcome, "decided_by": body.decided_by,
                    "reason": body.reason, "evidence": body.evidence,
                }  # fmt: skip

    def _back(self, body: facts.RolledBack, event: Event) -> None:
        asked = self._rolled.issued if self._rolled is not None else None
        self._found["rollback"] = Restored(
            revision=body.revision, level=body.level, first_sample=body.breach.sample_time, asked=asked,
            received=body.received, routed=body.routed, restored=body.restored, verified=body.verified,
            state=handed_back(body.evidence),
        )  # fmt: skip
        self._found["decision"] = _decision(body.breach, event)

    def _gaps(self) -> list[str]:
        gaps = []
        if self._began is None:
            gaps.append("the log does not hold its beginning any more")
        elif not self._found.get("asked_by"):
            gaps.append("the log does not hold the request any more")
        if self._dropped:
            gaps.append(f"{self._dropped} more events concern it")
        if self._series is None:
            gaps.append("no series were recorded" if self.ended else "series are recorded at its end")
        elif self._series.left_out:
            gaps.append(f"there was no room for {self._series.left_out} more series")
        if self._series is not None and self._series.series and self._found.get("started"):
            first = min(track.times[0] for track in self._series.series if track.times)
            late = first - self._found["started"]
            if late > 5.0:  # the coordinator was started again, and what it had recorded was in its memory
                gaps.append(f"series begin {late:.0f} s after the migration")
        return gaps


def _at(event: Event) -> float:
    return event.header.logged or event.header.time


def _moment(event: Event) -> Moment:
    return Moment(
        seq=event.header.seq, time=_at(event), source=event.header.source,
        type=str(type(event.body).__struct_config__.tag), text=sentence(event.body), tone=tone(event.body),
    )  # fmt: skip


def _decision(breach: commands.Breach, event: Event) -> Decision:
    return Decision(
        seq=event.header.seq, time=_at(event), by=breach.by, reason=breach.reason, sample_time=breach.sample_time,
        value=breach.value, labels=breach.labels,
    )  # fmt: skip


def _settled(fired: Fired, found: dict[str, Any]) -> Fired:
    by = found.get("decided_by") or getattr(found.get("decision"), "by", "")
    return msgspec.structs.replace(fired, decided=not fired.dry_run and by == f"rule {fired.rule}")


def _deciding(decision: Decision | None, rules: list[Fired], checks: list[Measured], series: list[Track]) -> list[str]:
    """Names of the recorded series that decided: those of the rule's text, or of the checks that made the verdict."""
    names: dict[str, None] = {}
    for fired in rules:
        if fired.decided:
            names |= dict.fromkeys(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", fired.expr))
    by = decision.by if decision is not None else ""
    kind, _, rest = by.partition(" ")
    guilty = rest.split(", ") if kind in ("check", "host") else []
    if decision is None:
        guilty = [check.check for measured in checks if measured.final for check in measured.checks]
    for check in guilty:
        names |= dict.fromkeys(CHECKED.get(check, ()))
        if check.startswith("dependency "):
            names["agent_dependency_up"] = None
    there = {track.labels.get(NAME, "") for track in series}
    return [name for name in names if name in there]


def charted(record: Record) -> list[str]:
    """Names of the series that are drawn: what decided, then what always matters; CHARTS at most."""
    there = {track.labels.get(NAME, "") for track in record.series}
    names = dict.fromkeys([*record.deciding, *(name for name in ALWAYS if name in there)])
    return list(names)[:CHARTS]


def role_of(record: Record, track: Track) -> Role:
    """Which of the two revisions a series is of. A committed candidate goes on as the permanent one."""
    revision = track.labels.get("revision", "")
    if not revision:
        return "shared"
    return "new" if revision == record.to else "old"


def _requests(series: list[Track], evidence: Evidence) -> dict[str, dict[str, float]]:
    """How many live requests each revision had while it was recorded, and how many of them went wrong."""
    found: dict[str, dict[str, float]] = {}
    for track in series:
        what = {"agent_requests_total": "asked", "agent_errors_total": "errors"}.get(track.labels.get(NAME, ""))
        revision = track.labels.get("revision", "")
        if what and track.values:
            counts = found.setdefault(revision, {})
            first = 0.0 if track.labels.get("role") == "candidate" else track.values[0]
            counts[what] = counts.get(what, 0.0) + max(0.0, track.values[-1] - first)
    for name, step in evidence.items():
        if name.endswith("-shadow") and isinstance(step, dict):
            figures = {key: step.get(key) for key in ("compared", "mismatches")}
            found["shadow"] = {
                key: float(value) for key, value in figures.items() if isinstance(value, int | float)
            }  # fmt: skip
    return found
