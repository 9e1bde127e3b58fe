"""The migration machine. Pure: events of the log are folded in, and `decide(now)` says what to do next.

Nothing is remembered that is not in the log. A coordinator that was killed folds the log and asks `decide` again; what
it sends a second time carries the same id, so it is logged and done once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import msgspec

from interlock.broker import commands, facts, topics
from interlock.broker.commands import Breach, Step
from interlock.broker.config import CoordinatorConfig, StrategyConfig
from interlock.broker.facts import Outcome
from interlock.broker.fields import Evidence
from interlock.broker.wire import Body, Event
from interlock.coordinator.observation import CHECKPOINTS, Baseline, Measurement, Watched, is_due

ROLLBACK_ANSWER_S = 60.0  # a host that reports no rollback for so long has failed it: the slowest level takes as long
JUDGED_S = 15.0  # after an observation's time, for its last measurement; then nobody can judge, and it is held
LEASE_RENEWALS = 3  # per lease: two may be lost


class Stage(StrEnum):
    PREPARE = "prepare"
    INFRASTRUCTURE = "infrastructure"
    CORE_LOGIC = "core-logic"
    INTEGRATION = "integration"
    OBSERVATION = "observation"
    COMMIT = "commit"


@dataclass(frozen=True)
class PlannedStep:
    """One command to the host, and what it may take. `dwell_s`: seconds to wait and watch after it is done."""

    stage: Stage
    step: Step
    time_s: float
    share: float = 0.0
    dwell_s: float = 0.0


def plan(strategy: StrategyConfig, *, start_timeout_s: float) -> list[PlannedStep]:
    """The steps of a strategy in order; the first stage a strategy leaves out is simply not there."""
    steps = [
        PlannedStep(Stage.PREPARE, "prepare", strategy.baseline_s + 60.0),
        PlannedStep(Stage.INFRASTRUCTURE, "start-candidate", start_timeout_s),
    ]
    if strategy.shadow_requests:
        steps.append(PlannedStep(Stage.CORE_LOGIC, "shadow", strategy.shadow_s))
    for canary in strategy.canary:
        if canary.share < 1:
            steps.append(PlannedStep(Stage.INTEGRATION, "cut-over", 0.0, canary.share, canary.seconds))
    steps.append(PlannedStep(Stage.OBSERVATION, "cut-over", 0.0, 1.0, strategy.observation_s))
    steps.append(PlannedStep(Stage.COMMIT, "commit", 0.0))
    return steps


def _why(measured: Measurement, watched: Watched, final: bool) -> str:
    """The words of the record: what was seen, and why it ended when it did."""
    if not final or measured.verdict != "passed":
        return measured.reason
    early = watched.share < 1
    end = f"after {watched.elapsed_s:.0f} s: the evidence is enough" if early else "after its full time"
    return f"observed {end}; every stage passed and no rule fired ({measured.reason})"


class Phase(StrEnum):
    RUNNING = "running"
    HELD = "held"
    ROLLING_BACK = "rolling-back"
    ENDED = "ended"


# what a fact about the migration makes of it; a fact that has no row in a phase says nothing new there
TRANSITIONS: dict[tuple[Phase, str], Phase] = {
    (Phase.RUNNING, "step-done"): Phase.RUNNING,
    (Phase.RUNNING, "committed"): Phase.ENDED,
    (Phase.RUNNING, "not-prepared"): Phase.ENDED,
    (Phase.RUNNING, "step-failed"): Phase.ROLLING_BACK,
    (Phase.RUNNING, "checks-failed"): Phase.ROLLING_BACK,
    (Phase.RUNNING, "refused"): Phase.ROLLING_BACK,
    (Phase.RUNNING, "held"): Phase.HELD,
    (Phase.RUNNING, "roll-back"): Phase.ROLLING_BACK,
    (Phase.RUNNING, "rolled-back"): Phase.ENDED,
    (Phase.HELD, "roll-back"): Phase.ROLLING_BACK,
    (Phase.HELD, "rolled-back"): Phase.ENDED,
    (Phase.HELD, "step-failed"): Phase.ROLLING_BACK,
    (Phase.HELD, "checks-failed"): Phase.ROLLING_BACK,
    (Phase.ROLLING_BACK, "rolled-back"): Phase.ENDED,
    (Phase.ROLLING_BACK, "committed"): Phase.ENDED,
    (Phase.ROLLING_BACK, "roll-back-failed"): Phase.ROLLING_BACK,
    (Phase.RUNNING, "roll-back-failed"): Phase.ROLLING_BACK,
    (Phase.HELD, "roll-back-failed"): Phase.ROLLING_BACK,
}


@dataclass(frozen=True)
class Emit:
    """Publish `body` under `id`. `direct`: only to the host's control endpoint, not through the log."""

    topic: str
    body: Body
    id: str
    direct: bool = False
    also_direct: bool = False


class Migration:
    """One agent's move. Made from MigrationStarted, alive until `closed` (MigrationEnded is in the log)."""

    def __init__(
        self, started: facts.MigrationStarted, *, at: float, steps: list[PlannedStep], config: CoordinatorConfig,
        strategy: StrategyConfig,
    ) -> None:  # fmt: skip
        self.started = started
        self.id = started.migration
        self.steps = steps
        self.phase = Phase.RUNNING
        self.index = 0
        self.outcome: Outcome | None = None
        self.closed = False
        self.strategy = strategy
        self._config = config
        self._since = at  # seconds since 1970: when the step before this one was done
        self._sent_at: float | None = None  # when this step was asked for
        self._breach: Breach | None = None
        self._breached_at = at
        self._asked_rollback = False
        self._said_end = False
        self._renewed = float("-inf")
        self._evidence: Evidence = {}
        self._told = 0.0  # the newest checkpoint of the observation that was measured
        self._judged: facts.ChecksMeasured | None = None  # the last word about the candidate
        self._said_held = False
        self.baseline = Baseline()

    # --- folding

    def apply(self, event: Event) -> None:
        """Take in an event of the log that concerns this migration."""
        body, at = event.body, event.header.logged or event.header.time
        if isinstance(body, facts.SlotChanged):
            self._slot_changed(body, at)
        if getattr(body, "migration", None) != self.id:
            return
        match body:
            case facts.StepDone():
                self._step_done(body, at)
            case facts.StepFailed():
                self._step_failed(body, at)
            case facts.CommandRefused():
                if body.command == self._command_id():
                    self._refused(Breach(by=f"host {self.started.host}", reason=body.reason), at)
            case commands.RollBack() | facts.RolledBack() | facts.RollBackFailed():
                self._undone(body, at)
            case facts.MigrationHeld():
                self._turn("held", body.breach, at)
            case facts.ChecksMeasured():
                self._measured(body, at)
            case facts.MigrationEnded():
                self.phase, self.outcome, self.closed = Phase.ENDED, body.outcome, True
            case _ if event.header.id == self._command_id():
                self._sent_at = at  # a coordinator before this one asked for it

    def _turn(self, what: str, breach: Breach | None, at: float) -> bool:
        to = TRANSITIONS.get((self.phase, what))
        if to is None:
            return False
        if to is Phase.ROLLING_BACK and self.phase is not to:
            self._breached_at = at
        if breach is not None and self.phase is not Phase.ROLLING_BACK:
            self._breach = breach
        self.phase = to
        return True

    def _step_done(self, body: facts.StepDone, at: float) -> None:
        if body.command != self._command_id():
            return
        if body.evidence:
            self._evidence[f"{self.index}-{body.step}"] = body.evidence
        if body.step == "prepare":
            self.baseline = Baseline.from_evidence(body.evidence)
        if body.step == "commit":
            if self._turn("committed", None, at):
                self.outcome = "committed"
        elif self._turn("step-done", None, at):
            self.index += 1
            self._since, self._sent_at = at, None

    def _step_failed(self, body: facts.StepFailed, at: float) -> None:
        if body.command != self._command_id():
            return
        self._evidence[f"{self.index}-{body.step}"] = body.evidence
        breach = Breach(
            by=f"check {body.check}", reason=body.reason, sample_time=body.evidence.get("first_breach_time", at)
        )
        if body.step == "prepare":  # nothing was started, nothing is to be undone
            if self._turn("not-prepared", breach, at):
                self.outcome = "refused"
        else:
            self._turn("step-failed", breach, at)

    def _measured(self, body: facts.ChecksMeasured, at: float) -> None:
        self._told = max(self._told, body.checkpoint)
        self._evidence[f"checks-{body.checkpoint:.2f}"] = msgspec.to_builtins(body.checks)
        if body.final:
            self._judged = body
            if body.verdict == "failed":
                self._turn("checks-failed", self._condemned(body, at), at)

    def _condemned(self, body: facts.ChecksMeasured, at: float) -> Breach:
        guilty = [check.check for check in body.checks if check.verdict == body.verdict]
        return Breach(by=f"check {', '.join(guilty) or 'observation'}", reason=body.reason, sample_time=at)

    def _refused(self, breach: Breach, at: float) -> None:
        if self.steps[self.index].step != "prepare":
            self._turn("refused", breach, at)
        elif self._turn("not-prepared", breach, at):  # the host knows nothing of it, and would report no rollback
            self.outcome = "refused"

    def _undone(self, body: commands.RollBack | facts.RolledBack | facts.RollBackFailed, at: float) -> None:
        match body:
            case commands.RollBack():
                self._turn("roll-back", body.breach, at)
                self._asked_rollback = True
            case facts.RolledBack():
                self._rolled_back(body, at)
            case facts.RollBackFailed():
                self._turn("roll-back-failed", body.breach, at)
                self._evidence["roll_back_failed"] = body.reason

    def _rolled_back(self, body: facts.RolledBack, at: float) -> None:
        if self._turn("rolled-back", None, at):
            self._breach = body.breach
            self.outcome = "rolled-back"
            first = body.breach.sample_time
            self._evidence["rollback"] = {
                "level": body.level,
                "revision": body.revision,
                "received": body.received,
                "routed": body.routed,
                "restored": body.restored,
                "breach_to_routed_ms": None if first is None else (body.routed - first) * 1000,
                "breach_to_restored_ms": None if first is None else (body.restored - first) * 1000,
                **body.evidence,
            }

    def _slot_changed(self, body: facts.SlotChanged, at: float) -> None:
        """A slot that has no candidate, and has seen this epoch, has settled it, whatever else was lost on the way."""
        mine = body.agent == self.started.agent and body.epoch == self.started.epoch
        if not mine or body.candidate is not None or body.migration is not None:
            return
        if body.permanent == self.started.to:
            if self._turn("committed", None, at):
                self.outcome = "committed"
        elif self._turn("rolled-back", None, at):
            self.outcome = "rolled-back"
            self._breach = self._breach or Breach(by="host restarted", reason="the host restarted", sample_time=at)

    # --- deciding

    @property
    def live(self) -> bool:
        """The candidate is there, on trial: its lease must be renewed."""
        return self.phase in (Phase.RUNNING, Phase.HELD) and self.index >= 1

    def decide(self, now: float) -> list[Emit]:
        """What to send at this moment, in seconds since 1970. Sending the same again does no harm."""
        if self.closed:
            return []
        wanted: list[Emit] = []
        if self.live and now - self._renewed >= self._lease_s() / LEASE_RENEWALS:
            self._renewed = now
            renew = commands.RenewLease(
                migration=self.id, agent=self.started.agent, epoch=self.started.epoch, lease_s=self._lease_s()
            )
            wanted.append(Emit(topics.command(self.started.host), renew, f"{self.id}/lease/{now}", direct=True))
        match self.phase:
            case Phase.RUNNING:
                wanted += self._advance(now)
            case Phase.ROLLING_BACK:
                wanted += self._undo(now)
            case Phase.ENDED if not self._said_end:
                wanted.append(self._end())
            case _:
                pass
        return wanted

    def next_deadline(self, now: float) -> float:
        """When `decide` should be asked again if nothing happens, in seconds since 1970."""
        if self.closed or self._said_end:
            return float("inf")
        times = [self._renewed + self._lease_s() / LEASE_RENEWALS] if self.live else []
        if self.phase is Phase.RUNNING:
            times.append(self._ready_at(now) if self._sent_at is None else self._sent_at + self._limit_s())
        elif self.phase is Phase.ROLLING_BACK:
            times.append(self._breached_at + ROLLBACK_ANSWER_S)
        elif self.phase is Phase.ENDED:
            times.append(now)
        return max(min(times, default=float("inf")), now)

    def watched(self, now: float) -> Watched | None:
        """How far the candidate's trial with live requests is; None while it has none, or nothing is to be judged."""
        before = self.steps[self.index - 1] if self.index else None
        judged = self._judged is not None or self._sent_at is not None
        if self.phase is not Phase.RUNNING or before is None or before.step != "cut-over" or judged:
            return None
        elapsed = max(0.0, now - self._since)
        share = elapsed / before.dwell_s if before.dwell_s > 0 else 1.0
        return Watched(share, elapsed, max(0.0, elapsed - before.dwell_s), before.stage is Stage.OBSERVATION)

    def observe(self, measured: Measurement, now: float) -> list[Emit]:
        """What follows from a measurement: nothing, a checkpoint for the record, or the last word."""
        watched = self.watched(now)
        if watched is None:
            return []
        told, final = is_due(watched, measured, self.strategy.observe, told=self._told)
        if not told:
            return []
        body = facts.ChecksMeasured(
            migration=self.id, agent=self.started.agent, epoch=self.started.epoch, verdict=measured.verdict,
            reason=_why(measured, watched, final), checkpoint=measured.checkpoint, final=final, checks=measured.checks,
        )  # fmt: skip
        point = max((one for one in CHECKPOINTS if one <= watched.share), default=0.0)
        name = "final" if final else f"{point:g}"
        return [Emit(topics.migration_fact(self.started.agent), body, f"{self.id}/checks/{name}")]

    def hold(self, breach: Breach) -> list[Emit]:
        """Stop where it is and leave it to an operator."""
        if self.phase is not Phase.RUNNING:
            return []
        held = facts.MigrationHeld(migration=self.id, agent=self.started.agent, breach=breach)
        return [Emit(topics.migration_fact(self.started.agent), held, f"{self.id}/held")]

    def roll_back(self, breach: Breach, now: float) -> list[Emit]:
        """Ask the host, both ways, to put the old revision back."""
        if self.phase is Phase.ENDED:
            return []
        body = commands.RollBack(
            migration=self.id, agent=self.started.agent, epoch=self.started.epoch, breach=breach, issued=now
        )
        return [Emit(topics.rollback(self.started.host), body, f"{self.id}/roll-back", also_direct=True)]

    # --- inside

    def _command_id(self) -> str:
        return f"{self.id}/{self.index}"

    def _lease_s(self) -> float:
        return self._config.lease_s

    def _due(self) -> float:
        """When the next step may be asked for: the dwell of the one before is over, or evidence has ended it."""
        return self._since + (self.steps[self.index - 1].dwell_s if self.index and not self._approved else 0.0)

    def _ready_at(self, now: float) -> float:
        """When there is something to do without an event: a commit also waits for the last word of the observation."""
        due = self._due()
        if self.steps[self.index].step != "commit" or self._approved or now < due:
            return due
        return float("inf") if self._said_held else due + (JUDGED_S if self._judged is None else 0.0)

    @property
    def _approved(self) -> bool:
        return self._judged is not None and self._judged.verdict == "passed"

    def _limit_s(self) -> float:
        return self.steps[self.index].time_s + self._config.step_margin_s

    def _advance(self, now: float) -> list[Emit]:
        wanted = []
        step = self.steps[self.index]
        if self._sent_at is not None:
            if now < self._sent_at + self._limit_s():
                return []
            reason = f"{step.step} was not done within {self._limit_s():.0f} s"
            return self.roll_back(Breach(by="coordinator step-overdue", reason=reason, sample_time=now), now)
        if now < self._due():
            return []
        if step.step == "commit" and not self._approved:
            return self._unapproved(now)
        if not self.index or self.steps[self.index - 1].stage is not step.stage:
            entered = facts.StageEntered(migration=self.id, agent=self.started.agent, stage=step.stage)
            wanted.append(Emit(topics.migration_fact(self.started.agent), entered, f"{self.id}/stage/{step.stage}"))
        wanted.append(Emit(topics.command(self.started.host), self._command(step, now), self._command_id()))
        self._sent_at = now
        return wanted

    def _unapproved(self, now: float) -> list[Emit]:
        """The observation's time is over, and it has not been passed: it is left to an operator."""
        if self._said_held or (self._judged is None and now < self._due() + JUDGED_S):
            return []
        self._said_held = True
        if self._judged is not None:
            return self.hold(self._condemned(self._judged, now))
        reason = f"nobody has judged the candidate {JUDGED_S:.0f} s after the end of its time"
        return self.hold(Breach(by="check observation", reason=reason, sample_time=now))

    def _undo(self, now: float) -> list[Emit]:
        breach = self._breach or Breach(by="coordinator", reason="unknown")
        if not self._asked_rollback:
            self._asked_rollback = True
            return self.roll_back(breach, now)
        if now >= self._breached_at + ROLLBACK_ANSWER_S:
            self.phase, self.outcome = Phase.ENDED, "failed"
            reason = (
                f"{breach.reason}; host {self.started.host} did not report the rollback in {ROLLBACK_ANSWER_S:.0f} s"
            )
            self._breach = Breach(by=breach.by, reason=reason, sample_time=breach.sample_time)
            return [self._end()]
        return []

    def _end(self) -> Emit:
        self._said_end = True
        breach = self._breach
        if self.outcome == "committed":
            decided = "observation"
            reason = self._judged.reason if self._judged is not None else "every stage passed and no rule fired"
        elif breach is not None:
            decided, reason = breach.by, breach.reason
        else:
            decided, reason = "coordinator", "unknown"
        ended = facts.MigrationEnded(
            migration=self.id,
            agent=self.started.agent,
            epoch=self.started.epoch,
            outcome=self.outcome or "failed",
            decided_by=decided,
            reason=reason,
            evidence=self._evidence,
        )
        return Emit(topics.migration_fact(self.started.agent), ended, f"{self.id}/ended")

    def _command(self, step: PlannedStep, now: float) -> commands.HostCommand:
        deadline = now + self._limit_s()
        migration, agent, epoch = self.id, self.started.agent, self.started.epoch
        match step.step:
            case "prepare":
                return commands.Prepare(
                    migration=migration, agent=agent, epoch=epoch, deadline=deadline,
                    to=self.started.to, baseline_s=self.strategy.baseline_s,
                )  # fmt: skip
            case "start-candidate":
                return commands.StartCandidate(migration=migration, agent=agent, epoch=epoch, deadline=deadline)
            case "shadow":
                return commands.Shadow(
                    migration=migration, agent=agent, epoch=epoch, deadline=deadline,
                    requests=self.strategy.shadow_requests, seconds=self.strategy.shadow_s,
                    min_requests=self.strategy.shadow_min_requests,
                    max_mismatches=self.strategy.shadow_max_mismatches,
                )  # fmt: skip
            case "cut-over":
                return commands.CutOver(
                    migration=migration, agent=agent, epoch=epoch, deadline=deadline,
                    share=step.share, lease_s=self._lease_s(),
                    warm_up_s=min(self.strategy.observe.warm_up_s, step.dwell_s / 4),
                )  # fmt: skip
            case "commit":
                return commands.Commit(migration=migration, agent=agent, epoch=epoch, deadline=deadline)
