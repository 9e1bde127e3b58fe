"""The migration machine. Pure: events of the log are folded in, and `decide(now)` says what to do next.

Nothing is remembered that is not in the log. A coordinator that was killed folds the log and asks `decide` again; what
it sends a second time carries the same id, so it is logged and done once.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from interlock.broker import commands, facts, topics
from interlock.broker.commands import Breach, SteerAction
from interlock.broker.config import CoordinatorConfig
from interlock.broker.facts import Outcome
from interlock.broker.fields import Evidence
from interlock.broker.strategies import StrategyConfig
from interlock.broker.wire import Event
from interlock.coordinator.emit import Emit
from interlock.coordinator.judgement import LAST_WORD_S, Judgement, Watched
from interlock.coordinator.observation import Baseline, Measurement
from interlock.coordinator.outcomes import is_committed, rollback_evidence
from interlock.coordinator.phases import ON_TRIAL, STANDING, TRANSITIONS, Phase
from interlock.coordinator.steps import PlannedStep, Stage, Terms, cold, command_of, handing_over

ROLLBACK_ANSWER_S = 90.0  # a host that reports no rollback for so long has failed it: the slowest level takes 60 s
LEASE_RENEWALS = 3  # per lease: two may be lost


class Migration:
    """One agent's move. Made from MigrationStarted, alive until `closed` (MigrationEnded is in the log)."""

    def __init__(
        self, started: facts.MigrationStarted, *, at: float, steps: list[PlannedStep], config: CoordinatorConfig,
        strategy: StrategyConfig, terms: Terms,
    ) -> None:  # fmt: skip
        self.started = started
        self.id = started.migration
        self.steps = steps
        self.phase = Phase.RUNNING
        self.index = 0
        self.outcome: Outcome | None = None
        self.closed = False
        self.steering = ""  # the request whose answer is not in the log yet
        self.strategy = strategy
        self.judgement = Judgement(strategy.observe)
        self.baseline = Baseline()  # of the old revision, once prepare has measured it
        self._terms = terms
        self._config = config
        self._since = at  # seconds since 1970: when the step before this one was done
        self._sent_at: float | None = None  # when this step was asked for
        self._stood_at: float | None = None  # since when no time counts
        self._until = float("inf")  # of a phase that waits for an operator
        self._blame = ""  # whose fault a hold is
        self._stops = 0  # how often it was stopped, or asked to go on: no event has the id of an earlier one
        self._approved = -1  # the step whose stage an operator let begin
        self._committed: facts.Steered | None = None
        self._breach: Breach | None = None
        self._breached_at = at
        self._asked_rollback = False
        self._failures = 0  # rollbacks that the host could not do
        self._kept: Breach | None = None  # the candidate serves on, since the old revision can't
        self._gave_up = False
        self._asked_stop = -1  # the stop that was asked for and is not in the log yet
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
            case facts.CommandRefused() if self._is_answer(body):
                self._refused(Breach(by=f"host {body.host}", reason=body.reason), at)
            case commands.RollBack() | facts.RolledBack() | facts.RollBackFailed():
                self._going_back(body, at)
            case facts.ChecksMeasured():
                self._measured(body, at)
            case facts.MigrationWaiting() | facts.MigrationHeld():
                self._stopped(body, at)
            case facts.Steered() | facts.Deviation():
                self._led(body, at)
            case facts.MigrationEnded():
                self._turn("closed", None, at)
                self.outcome, self.closed = body.outcome, True
            case _ if event.header.id == self._command_id():
                self._sent_at = at  # a coordinator before this one asked for it

    def _turn(self, what: str, breach: Breach | None, at: float) -> bool:
        to = TRANSITIONS[self.phase, what]
        if to is None:
            return False
        if to is Phase.ROLLING_BACK and self.phase is not to:
            self._breached_at = at
        if breach is not None and self.phase is not Phase.ROLLING_BACK:
            self._breach = breach
        self.phase = to
        return True

    def _stopped(self, body: facts.MigrationWaiting | facts.MigrationHeld, at: float) -> None:
        what, breach, blame = "waiting", None, ""
        if isinstance(body, facts.MigrationHeld):
            what, breach, blame = "held", body.breach, body.blame
        if self._turn(what, breach, at):
            self._stops += 1
            self._blame = blame
            self._until = body.until or float("inf")
            self._stood_at = at if self._stood_at is None else self._stood_at

    def _led(self, body: facts.Steered | facts.Deviation, at: float) -> None:
        if isinstance(body, facts.Deviation):
            told = {"what": body.what, "because": body.because, "by": body.by, "time": at}
            self._evidence.setdefault("deviations", []).append(told)
            return
        self.steering = ""
        breach = Breach(by=f"operator {body.action}", reason=body.reason, sample_time=at)
        if not self._turn(body.action, breach if body.action in ("hold", "abort") else None, at):
            return
        self._stops += 1
        told = {"action": body.action, "by": body.by, "reason": body.reason, "time": at}
        self._evidence.setdefault("steered", []).append(told)
        if body.action in ("pause", "hold"):
            self._until, self._blame = body.until or float("inf"), ""
            self._stood_at = at if self._stood_at is None else self._stood_at
            return
        if body.action == "approve":
            self._approved = self.index
        elif body.action == "resume":
            self.judgement.again()
        elif body.action == "commit":
            self._committed = body
        self._go_on(at)

    def _go_on(self, at: float) -> None:
        """The time that it stood does not count: neither as watched, nor against the step under way."""
        if self._stood_at is not None:
            self._since = at - max(0.0, self._stood_at - self._since)
            if self._sent_at is not None:
                self._sent_at = at - max(0.0, self._stood_at - self._sent_at)
        self._stood_at, self._until, self._blame, self._breach = None, float("inf"), "", None

    def _step_done(self, body: facts.StepDone, at: float) -> None:
        if not self._is_answer(body):
            return
        if body.evidence:
            self._evidence[f"{self.index}-{body.step}"] = body.evidence
        if body.step == "prepare":
            self.baseline = Baseline.from_evidence(body.evidence)
            if body.evidence.get("rollback_class") == "cold":
                self._terms, self.steps = replace(self._terms, cold=True), cold(self.steps)
            if body.evidence.get("hands_over") is True:
                self.steps = handing_over(self.steps, self._terms.hand_over_s)
        if body.step == "commit":
            if self._turn("committed", None, at):
                self.outcome = "committed"
        elif self._turn("step-done", None, at):
            self.index += 1
            self._since, self._sent_at = at, None

    def _step_failed(self, body: facts.StepFailed, at: float) -> None:
        if not self._is_answer(body):
            return
        self._evidence[f"{self.index}-{body.step}"] = body.evidence
        breach = Breach(
            by=f"check {body.check}", reason=body.reason, sample_time=body.evidence.get("first_breach_time", at)
        )
        if body.step in ("receive", "prepare", "drill"):  # nothing was started, nothing is to be undone
            if self._turn("not-prepared", breach, at):
                self.outcome = "refused"
        else:
            self._turn("step-failed", breach, at)

    def _measured(self, body: facts.ChecksMeasured, at: float) -> None:
        self._evidence[f"checks-{body.checkpoint:.2f}"] = msgspec.to_builtins(body.checks)
        self.judgement.apply(body, at)
        if body.final and body.verdict == "failed":
            self._turn("checks-failed", self.judgement.breach(at), at)

    def _refused(self, breach: Breach, at: float) -> None:
        kept = self._kept is not None
        if not kept and self.steps[self.index].step not in ("receive", "prepare"):
            self._turn("refused", breach, at)
        elif self._turn("not-committed" if kept else "not-prepared", breach, at):  # the host will report no rollback
            self.outcome = "failed" if kept else "refused"

    def _going_back(self, body: commands.RollBack | facts.RolledBack | facts.RollBackFailed, at: float) -> None:
        match body:
            case commands.RollBack():
                if self._kept is not None and self.phase is Phase.HELD and not body.breach.by.startswith("operator"):
                    return  # a host that keeps a candidate listens to nobody else
                self._turn("roll-back", body.breach, at)
                self._asked_rollback = True
            case facts.RolledBack():
                self._rolled_back(body, at)
            case facts.RollBackFailed():
                self._roll_back_failed(body, at)

    def _rolled_back(self, body: facts.RolledBack, at: float) -> None:
        if self._turn("rolled-back", None, at):
            self._breach = body.breach
            self.outcome = self._undone()
            self._evidence["rollback"] = rollback_evidence(body)

    def _roll_back_failed(self, body: facts.RollBackFailed, at: float) -> None:
        """Where the candidate is kept it has all requests: what is left is to commit it, or to try again."""
        self._evidence["roll_back_failed"] = {"reason": body.reason, "level": body.level, "kept": body.kept}
        self._failures += 1
        if not body.kept:
            self._turn("roll-back-failed", body.breach, at)
        elif self._turn("kept", body.breach, at):
            reason = f"{body.kept} is kept, since the old revision can't be brought back: {body.reason}"
            self._kept = Breach(by=f"host {body.host}", reason=reason, sample_time=body.breach.sample_time)
            self._stops += 1
            self._until, self._asked_rollback, self._gave_up = 0.0, False, False
            self.index, self._sent_at = len(self.steps) - 1, None
            self._breach, self._blame = self._kept, "permanent"

    def _slot_changed(self, body: facts.SlotChanged, at: float) -> None:
        """A slot that has no candidate, and has seen this epoch, has settled it, whatever else was lost on the way."""
        mine = (body.host, body.agent, body.epoch) == (self.started.host, self.started.agent, self.started.epoch)
        if not mine or body.candidate is not None or body.migration is not None:
            return
        if is_committed(self.started, body):
            if self._turn("committed", None, at):
                self.outcome = "committed"
        elif self._turn("rolled-back", None, at):
            self.outcome = self._undone()
            self._breach = self._breach or Breach(by="host restarted", reason="the host restarted", sample_time=at)

    # --- deciding

    @property
    def live(self) -> bool:
        """The candidate is there, on trial: its lease must be renewed."""
        return self.phase in ON_TRIAL and self.index >= 1

    def decide(self, now: float) -> list[Emit]:
        """What to send at this moment, in seconds since 1970. Sending the same again does no harm."""
        if self.closed:
            return []
        wanted: list[Emit] = []
        if self.live and now - self._renewed >= self._config.lease_s / LEASE_RENEWALS:
            self._renewed = now
            renew = commands.RenewLease(
                migration=self.id, agent=self.started.agent, epoch=self.started.epoch, lease_s=self._config.lease_s
            )
            wanted.append(Emit(topics.command(self.started.host), renew, f"{self.id}/lease/{now}", direct=True))
        if self._unsettled:
            pass  # what was said is not in the log yet
        elif self.phase is Phase.RUNNING:
            wanted += self._advance(now)
        elif self.phase in STANDING:
            wanted += self._stand(now)
        if self.phase is Phase.ROLLING_BACK:
            wanted += self._undo(now)
        elif self.phase is Phase.ENDED and not self._said_end:
            wanted.append(self._end())
        return wanted

    def next_deadline(self, now: float) -> float:
        """When `decide` should be asked again if nothing happens, in seconds since 1970."""
        if self.closed or self._said_end:
            return float("inf")
        times = [self._renewed + self._config.lease_s / LEASE_RENEWALS] if self.live else []
        if self.phase is Phase.ENDED:
            times.append(now)
        elif self.phase is Phase.ROLLING_BACK or not self._unsettled:
            times.append(self.due)
        return max(min(times, default=float("inf")), now)

    def hold(self, breach: Breach, now: float, blame: str = "") -> list[Emit]:
        """Stop where it is and leave it to an operator. `blame`: whose fault it is, if not the candidate's."""
        if self.phase not in (Phase.RUNNING, Phase.PAUSED, Phase.WAITING):
            return []
        return [self._hold(breach, now, blame)]

    def roll_back(self, breach: Breach, now: float) -> list[Emit]:
        """Ask the host, both ways, to put the old revision back."""
        if self.phase is Phase.ENDED:
            return []
        body = commands.RollBack(
            migration=self.id, agent=self.started.agent, epoch=self.started.epoch, breach=breach, issued=now
        )
        emit = Emit(topics.rollback(self.started.host), body, f"{self.id}/roll-back{self._again}", also_direct=True)
        return [emit]

    # --- what is measured

    def watched(self, now: float) -> Watched | None:
        """How far the candidate's trial with live requests is; None while it has none, or nothing is to be judged."""
        before = self.steps[self.index - 1] if self.index else None
        over = self.judgement.last is not None or self._sent_at is not None or self._committed is not None
        if self.phase is not Phase.RUNNING or before is None or before.step != "cut-over" or over:
            return None
        elapsed, planned = max(0.0, now - self._since), before.dwell_s * self.judgement.time
        return Watched(elapsed / planned if planned > 0 else 1.0, elapsed, before.stage is Stage.OBSERVATION)

    def observe(self, measured: Measurement, now: float) -> list[Emit]:
        """What follows from a measurement: nothing, a checkpoint for the record, or the last word."""
        watched = self.watched(now)
        if watched is None:
            return []
        told, final = self.judgement.due(watched, measured, now)
        if not told:
            return []
        body = facts.ChecksMeasured(
            migration=self.id, agent=self.started.agent, epoch=self.started.epoch, verdict=measured.verdict,
            reason=Judgement.words(measured, watched, final=final), checkpoint=measured.checkpoint, final=final,
            checks=measured.checks,
        )  # fmt: skip
        return [Emit(topics.migration_fact(self.started.agent), body, self.judgement.next_id(self.id))]

    # --- what an operator's request is held against; see steering.py

    @property
    def observing(self) -> bool:
        """All requests go to the candidate, and the commit is all that is left."""
        return self.phase in ON_TRIAL and self.steps[self.index].step == "commit" and self._sent_at is None

    def passed(self, now: float) -> bool:
        """The observation has seen all that it was to see, and nothing stands against a commit."""
        return self.observing and self.phase in (Phase.RUNNING, Phase.WAITING) and self.judgement.passed

    def watched_s(self, now: float) -> float:
        """Seconds since the last step was done; what it stood does not count."""
        return max(0.0, (now if self._stood_at is None else self._stood_at) - self._since)

    @property
    def breach(self) -> Breach | None:
        return self._breach

    @property
    def kept(self) -> bool:
        """The host could not bring the old revision back: the candidate serves, until an operator decides."""
        return self._kept is not None

    @property
    def blame(self) -> str:
        """Whose fault a hold is, if it is not the candidate's: "host" or "permanent"."""
        return self._blame

    @property
    def under_way(self) -> bool:
        """The host was asked for a step and has not answered."""
        return self._sent_at is not None

    @property
    def said_end(self) -> bool:
        """Its end was said, and may not be in the log yet."""
        return self._said_end

    @property
    def due(self) -> float:
        """When something happens by itself in this phase, in seconds since 1970; infinity: never."""
        if self.phase is Phase.ROLLING_BACK:
            return self._breached_at + ROLLBACK_ANSWER_S
        if self.phase is not Phase.RUNNING:
            return self._until
        if self._sent_at is not None:
            return self._sent_at + self._limit_s()
        judged = self.observing and self._committed is None and self.judgement.last is None
        return self._due() + (LAST_WORD_S if judged else 0.0)

    # --- inside

    @property
    def _unsettled(self) -> bool:
        """What was said last is not in the log yet: nothing else is decided before."""
        return bool(self.steering) or self._gave_up or self._asked_stop == self._stops

    def _command_id(self) -> str:
        return f"{self.id}/{self.index}{self._again}"

    def _is_answer(self, body: facts.StepDone | facts.StepFailed | facts.CommandRefused) -> bool:
        """To what was asked last, by whom it was asked."""
        step = self.steps[self.index].step
        asked = (self._command_id(), self._asked_of)
        return (body.command, body.host) == asked and getattr(body, "step", step) == step

    @property
    def _asked_of(self) -> str:
        return self.started.target if self.steps[self.index].step == "receive" else self.started.host

    @property
    def _again(self) -> str:
        """What was heard before a rollback failed is not done twice: after it, ids are others."""
        return f"/{self._failures}" if self._failures else ""

    def _due(self) -> float:
        """When the next step may be asked for: the dwell of the one before is over, or it was ended before."""
        if not self.index or self._committed is not None or (self.observing and self.judgement.passed):
            return self._since
        prolonged = self.judgement.time if self.observing else 1.0
        return self._since + self.steps[self.index - 1].dwell_s * prolonged

    def _limit_s(self) -> float:
        return self.steps[self.index].time_s + self._config.step_margin_s

    def _undone(self) -> Outcome:
        """What fails in prepare was never begun."""
        failed = self._breach is not None and self._breach.by.startswith("check ")
        return "refused" if failed and self.steps[self.index].stage is Stage.PREPARE else "rolled-back"

    def _hold(self, breach: Breach, now: float, blame: str) -> Emit:
        held = facts.MigrationHeld(
            migration=self.id, agent=self.started.agent, breach=breach, blame=blame, until=now + self._config.hold_s
        )
        return Emit(topics.migration_fact(self.started.agent), held, f"{self.id}/held/{self._stops}")

    def limit_of(self, action: SteerAction, now: float) -> float:
        """Until when an operator may leave it as this makes it, in seconds since 1970; 0: it does not stand."""
        limits = {"pause": self._config.pause_s, "hold": self._config.hold_s}
        return now + limits[action] if action in limits else 0.0

    def _give_up(self, by: str, reason: str, now: float) -> list[Emit]:
        self._gave_up = True
        return self.roll_back(Breach(by=f"coordinator {by}", reason=reason, sample_time=now), now)

    def _stand(self, now: float) -> list[Emit]:
        """Nothing, until the time of whoever should have decided is up."""
        if now < self._until:
            return []
        if self.phase is Phase.WAITING:
            stage, limit = self.steps[self.index].stage, self._config.approval_s
            return self._give_up("approval-overdue", f"nobody approved {stage} within {limit:.0f} s", now)
        if self.phase is Phase.PAUSED:
            return self._give_up("pause-overdue", f"it was paused for over {self._config.pause_s:.0f} s", now)
        if self._blame and self._breach is not None:  # the old one is no better: somebody must look
            self._until = now + self._config.hold_s
            return [self._hold(self._breach, now, self._blame)]
        return self._give_up("hold-overdue", f"it was held for over {self._config.hold_s:.0f} s", now)

    def _advance(self, now: float) -> list[Emit]:
        wanted = []
        step, topic = self.steps[self.index], topics.migration_fact(self.started.agent)
        if self._sent_at is not None:
            if now < self._sent_at + self._limit_s():
                return []
            late = f"{step.step} was not done within {self._limit_s():.0f} s"
            return self._not_received(late) if step.step == "receive" else self._give_up("step-overdue", late, now)
        if now < self._due():
            return []
        if self.observing and self._committed is None and not self.judgement.passed:
            return self._unjudged(now)
        if step.gate and self._approved != self.index and self._committed is None:
            waiting = facts.MigrationWaiting(
                migration=self.id, agent=self.started.agent, stage=step.stage, until=now + self._config.approval_s
            )
            self._asked_stop = self._stops
            return [Emit(topic, waiting, f"{self.id}/waiting/{self._stops}")]
        if not self.index or self.steps[self.index - 1].stage is not step.stage:
            entered = facts.StageEntered(migration=self.id, agent=self.started.agent, stage=step.stage)
            wanted.append(Emit(topic, entered, f"{self.id}/stage/{step.stage}"))
        wanted.append(Emit(topics.command(self._asked_of), self._command(step, now), self._command_id()))
        self._sent_at = now
        return wanted

    def _not_received(self, reason: str) -> list[Emit]:
        """Nothing was begun at the agent's own host."""
        self.phase, self.outcome = Phase.ENDED, "refused"
        self._breach = self._breach or Breach(by="coordinator", reason=reason)
        return [self._end()]

    def _unjudged(self, now: float) -> list[Emit]:
        """The observation's time is over, and the candidate has not passed: an operator decides."""
        if self.judgement.last is None and now < self._due() + LAST_WORD_S:
            return []
        self._asked_stop = self._stops
        return [self._hold(self.judgement.breach(now), now, "")]

    def _undo(self, now: float) -> list[Emit]:
        breach = self._breach or Breach(by="coordinator", reason="unknown")
        if self.steps[self.index].step == "receive":  # its own host knows nothing of it yet
            return self._not_received(breach.reason)
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
        if self.outcome == "committed" and self._committed is not None:
            decided, reason = "operator commit", self._committed.reason
        elif self.outcome == "committed":
            decided = "observation"
            reason = self.judgement.last.reason if self.judgement.last is not None else "the host has committed it"
        elif breach is not None:
            decided, reason = breach.by, breach.reason
        else:
            decided, reason = "coordinator", "unknown"
        ended = facts.MigrationEnded(
            migration=self.id, agent=self.started.agent, epoch=self.started.epoch, outcome=self.outcome or "failed",
            decided_by=decided, reason=reason, evidence=self._evidence,
        )  # fmt: skip
        return Emit(topics.migration_fact(self.started.agent), ended, f"{self.id}/ended")

    def _command(self, step: PlannedStep, now: float) -> commands.HostCommand:
        deadline = now + self._limit_s()
        lease_s = self._config.lease_s
        return command_of(step, self.started, self.strategy, self._terms, deadline=deadline, lease_s=lease_s)
