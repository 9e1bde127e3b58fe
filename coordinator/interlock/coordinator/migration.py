"""The migration machine. Pure: events of the log are folded in, and `decide(now)` says what to do next.

Nothing is remembered that is not in the log. A coordinator that was killed folds the log and asks `decide` again; what
it sends a second time carries the same id, so it is logged and done once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from interlock.broker import commands, facts, topics
from interlock.broker.commands import Breach, Evidence, Step
from interlock.broker.config import CoordinatorConfig, StrategyConfig
from interlock.broker.facts import Outcome
from interlock.broker.wire import Body, Event

ROLLBACK_ANSWER_S = 90.0  # a host that reports no rollback for so long has failed it: the slowest level takes 60 s
DRILL_S = 120.0  # for a rehearsal: a start, a copy of the data folder and a start from a backup
BACKUP_LEVELS = ["configuration", "code"]  # of a strategy that names none
PROMISE_S = 5.0  # of a strategy that promises nothing else
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
    steps = [PlannedStep(Stage.PREPARE, "prepare", strategy.baseline_s + 60.0)]
    if getattr(strategy, "drill", False):
        steps.append(PlannedStep(Stage.PREPARE, "drill", DRILL_S + 2 * start_timeout_s))
    steps.append(PlannedStep(Stage.INFRASTRUCTURE, "start-candidate", start_timeout_s))
    if strategy.shadow_requests:
        steps.append(PlannedStep(Stage.CORE_LOGIC, "shadow", strategy.shadow_s))
    for canary in strategy.canary:
        if canary.share < 1:
            steps.append(PlannedStep(Stage.INTEGRATION, "cut-over", 0.0, canary.share, canary.seconds))
    steps.append(PlannedStep(Stage.OBSERVATION, "cut-over", 0.0, 1.0, strategy.observation_s))
    steps.append(PlannedStep(Stage.COMMIT, "commit", 0.0))
    return steps


def cold(steps: list[PlannedStep]) -> list[PlannedStep]:
    """The same where old and new don't fit together: there is nothing to compare with, and no share to give."""
    return [step for step in steps if step.step != "shadow" and (step.step != "cut-over" or step.share >= 1)]


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
    (Phase.RUNNING, "refused"): Phase.ROLLING_BACK,
    (Phase.RUNNING, "held"): Phase.HELD,
    (Phase.RUNNING, "roll-back"): Phase.ROLLING_BACK,
    (Phase.RUNNING, "rolled-back"): Phase.ENDED,
    (Phase.HELD, "roll-back"): Phase.ROLLING_BACK,
    (Phase.HELD, "rolled-back"): Phase.ENDED,
    (Phase.HELD, "step-failed"): Phase.ROLLING_BACK,
    (Phase.ROLLING_BACK, "rolled-back"): Phase.ENDED,
    (Phase.ROLLING_BACK, "committed"): Phase.ENDED,
    (Phase.ROLLING_BACK, "roll-back-failed"): Phase.ROLLING_BACK,
    (Phase.RUNNING, "roll-back-failed"): Phase.ROLLING_BACK,
    (Phase.HELD, "roll-back-failed"): Phase.ROLLING_BACK,
    (Phase.RUNNING, "kept"): Phase.HELD,
    (Phase.HELD, "kept"): Phase.HELD,
    (Phase.ROLLING_BACK, "kept"): Phase.HELD,
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
        strategy: StrategyConfig, accept: str = "", sick_ok: bool = False,
    ) -> None:  # fmt: skip
        self.started = started
        self._accept, self._sick_ok = accept, sick_ok
        self._cold = False  # the old one is stopped before the candidate starts
        self._failures = 0  # rollbacks that the host could not do
        self._kept: Breach | None = None  # the candidate serves on, and nobody was told yet
        self.id = started.migration
        self.steps = steps
        self.phase = Phase.RUNNING
        self.index = 0
        self.outcome: Outcome | None = None
        self.closed = False
        self._strategy = strategy
        self._config = config
        self._since = at  # seconds since 1970: when the step before this one was done
        self._sent_at: float | None = None  # when this step was asked for
        self._breach: Breach | None = None
        self._breached_at = at
        self._asked_rollback = False
        self._said_end = False
        self._renewed = float("-inf")
        self._evidence: Evidence = {}

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
            case commands.RollBack():
                self._turn("roll-back", body.breach, at)
                self._asked_rollback = True
            case facts.RolledBack():
                self._rolled_back(body, at)
            case facts.RollBackFailed():
                self._roll_back_failed(body, at)
            case facts.MigrationHeld():
                self._kept = None
                self._turn("held", body.breach, at)
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
        if body.step == "prepare" and body.evidence.get("rollback_class") == "cold":
            self._cold, self.steps = True, cold(self.steps)
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
        if body.step in ("prepare", "drill"):  # nothing was started, nothing is to be undone
            if self._turn("not-prepared", breach, at):
                self.outcome = "refused"
        else:
            self._turn("step-failed", breach, at)

    def _refused(self, breach: Breach, at: float) -> None:
        if self.steps[self.index].step != "prepare":
            self._turn("refused", breach, at)
        elif self._turn("not-prepared", breach, at):  # the host knows nothing of it, and would report no rollback
            self.outcome = "refused"

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

    def _roll_back_failed(self, body: facts.RollBackFailed, at: float) -> None:
        """Where the candidate is kept, it is for an operator to say what becomes of it."""
        self._evidence["roll_back_failed"] = {"reason": body.reason, "level": body.level, "kept": body.kept}
        self._failures += 1
        if not body.kept:
            self._turn("roll-back-failed", body.breach, at)
        elif self._turn("kept", body.breach, at):
            reason = f"{body.kept} is kept, since the old revision can't be brought back: {body.reason}"
            self._kept = Breach(by=f"host {body.host}", reason=reason, sample_time=body.breach.sample_time)

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
            case Phase.HELD if self._kept is not None:
                held = facts.MigrationHeld(migration=self.id, agent=self.started.agent, breach=self._kept)
                wanted.append(Emit(topics.migration_fact(self.started.agent), held, f"{self.id}/kept/{self._failures}"))
                self._kept = None
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
            times.append(self._due() if self._sent_at is None else self._sent_at + self._limit_s())
        elif self.phase is Phase.ROLLING_BACK:
            times.append(self._breached_at + ROLLBACK_ANSWER_S)
        elif self.phase is Phase.ENDED:
            times.append(now)
        return max(min(times, default=float("inf")), now)

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
        again = f"/{self._failures}" if self._failures else ""  # the one before was heard, and is not done twice
        return [Emit(topics.rollback(self.started.host), body, f"{self.id}/roll-back{again}", also_direct=True)]

    # --- inside

    def _command_id(self) -> str:
        return f"{self.id}/{self.index}"

    def _lease_s(self) -> float:
        return self._config.lease_s

    def _due(self) -> float:
        """When the next step may be asked for: the dwell of the one before is over."""
        return self._since + (self.steps[self.index - 1].dwell_s if self.index else 0.0)

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
        if not self.index or self.steps[self.index - 1].stage is not step.stage:
            entered = facts.StageEntered(migration=self.id, agent=self.started.agent, stage=step.stage)
            wanted.append(Emit(topics.migration_fact(self.started.agent), entered, f"{self.id}/stage/{step.stage}"))
        wanted.append(Emit(topics.command(self.started.host), self._command(step, now), self._command_id()))
        self._sent_at = now
        return wanted

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
            decided, reason = "observation", "every stage passed and no rule fired"
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
                    to=self.started.to, baseline_s=self._strategy.baseline_s, accept=self._accept,
                    sick_ok=self._sick_ok, levels=getattr(self._strategy, "backup", BACKUP_LEVELS),
                )  # fmt: skip
            case "drill":
                return commands.Drill(
                    migration=migration, agent=agent, epoch=epoch, deadline=deadline, accept=self._accept,
                    cold=self._cold, promise_s=getattr(self._strategy, "promise_s", PROMISE_S),
                )  # fmt: skip
            case "start-candidate":
                return commands.StartCandidate(
                    migration=migration, agent=agent, epoch=epoch, deadline=deadline, cold=self._cold
                )
            case "shadow":
                return commands.Shadow(
                    migration=migration, agent=agent, epoch=epoch, deadline=deadline,
                    requests=self._strategy.shadow_requests, seconds=self._strategy.shadow_s,
                    min_requests=self._strategy.shadow_min_requests,
                    max_mismatches=self._strategy.shadow_max_mismatches,
                )  # fmt: skip
            case "cut-over":
                return commands.CutOver(
                    migration=migration, agent=agent, epoch=epoch, deadline=deadline,
                    share=step.share, lease_s=self._lease_s(),
                )  # fmt: skip
            case "commit":
                return commands.Commit(migration=migration, agent=agent, epoch=epoch, deadline=deadline)
