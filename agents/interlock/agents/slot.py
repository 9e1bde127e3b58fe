"""The slot machine: what a host does with one agent. Pure: inputs and the time go in, actions come out.

A slot has a *permanent* revision, which serves by right and is what a restart of the host comes back to, and during a
migration a *candidate*. Until `Commit`, whatever goes wrong leads back to the permanent revision: the candidate dies,
fails its health checks, its lease expires, a step fails, or somebody says so.

Order matters in what comes out. Everything but a rollback is written to the journal before it is done (`Persist` comes
first). A rollback routes first and writes afterwards: the row in the journal still names the old revision as permanent,
so a crash in between ends in the same place.
"""

from __future__ import annotations

from dataclasses import replace

from interlock.agents.slot_io import (
    Action,
    Ask,
    AskRollBack,
    BeginPrepare,
    BeginShadow,
    BeginTrial,
    EndShadow,
    Gone,
    Healthy,
    Input,
    Moment,
    Persist,
    PrepareEnded,
    Publish,
    Renew,
    Rescue,
    Route,
    Row,
    ShadowEnded,
    Start,
    State,
    Stop,
    Tick,
    Verified,
    Verify,
)
from interlock.broker import commands, facts
from interlock.broker.commands import Breach, HostCommand
from interlock.broker.facts import Fact
from interlock.broker.fields import Evidence

STANDBY_LEASE_S = 60.0  # before the cut-over a candidate costs resources only; still nobody may forget it
RESTART_DELAYS_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)  # before the n-th restart in a row of a permanent instance
STEADY_S = 30.0  # a permanent instance that ran for so long begins a new row


# --- the table: (state, step) -> the state in which the step is done or under way

STEPS: dict[tuple[State, str], State] = {
    (State.SERVING, "prepare"): State.PREPARING,
    (State.PREPARED, "start-candidate"): State.STARTING,
    (State.STANDBY, "shadow"): State.SHADOWING,
    (State.STANDBY, "cut-over"): State.LIVE,
    (State.LIVE, "cut-over"): State.LIVE,
    (State.LIVE, "commit"): State.SERVING,
}
ON_TRIAL = {State.PREPARING, State.PREPARED, State.STARTING, State.STANDBY, State.SHADOWING, State.LIVE}


class Slot:
    """One agent's place on a host. `handle` is the only way in."""

    def __init__(self, host: str, row: Row, *, endpoint: str = "") -> None:
        self.host = host
        self.row = row
        self.endpoint = endpoint
        self.permanent: str | None = None  # instance
        self.permanent_up = False
        self.permanent_since = 0.0
        self.candidate: str | None = None  # instance
        self.candidate_up = False
        self.share = 0.0
        self.lease_until: float | None = None  # monotonic
        self._asked = ""  # id of the command under way
        self._restarts = 0
        self._born = 0
        self._breach: Breach | None = None
        self._received = 0.0
        self._cold = False  # the rollback had to start the old revision again
        self._shadow_ended = False

    # --- start

    def begin(self, now: Moment) -> list[Action]:
        """What a host does first with the slot: undo what a crash left, and start the permanent revision."""
        actions: list[Action] = []
        if self.row.state is not State.SERVING:
            self._breach = Breach(
                by="host restarted",
                reason=f"the host restarted while revision {self.row.candidate or '?'} was {self.row.state}",
                sample_time=now.wall,
            )
            self._received = now.wall
            self._cold = True
            self._set(State.ROLLING_BACK)
            actions.append(Persist(self.row, "roll back: the host restarted"))
        actions += self._start_permanent(now, restart=False)
        return [*actions, self._changed()]

    # --- inputs

    def handle(self, given: Input, now: Moment) -> list[Action]:
        match given:
            case Ask():
                return self._ask(given, now)
            case AskRollBack(command):
                if command.migration != self.row.migration or self.row.state not in ON_TRIAL:
                    return []  # done already, or never ours
                return self._roll_back(command.breach, now)
            case Renew(command):
                if self.lease_until is not None and self._is_current(command.migration, command.epoch):
                    self.lease_until = now.mono + command.lease_s
                return []
            case PrepareEnded():
                return self._prepare_ended(given)
            case Healthy():
                return self._healthy(given, now)
            case Gone():
                return self._gone(given, now)
            case ShadowEnded():
                return self._shadow_over(given)
            case Verified():
                return self._verified(given, now)
            case Tick():
                return self._tick(now)

    def next_deadline(self) -> float | None:
        """Monotonic time of the next Tick that may matter."""
        return self.lease_until if self.row.state in ON_TRIAL else None

    # --- commands

    def refusal(self, command: HostCommand, now: Moment) -> str | None:
        """Why the slot does not take this command now; None if it does."""
        if now.wall > command.deadline:
            return "its deadline has passed"
        if command.epoch < self.row.epoch:
            return f"its epoch {command.epoch} is older than {self.row.epoch}"
        step = step_of(command)
        if isinstance(command, commands.Prepare):
            if self.row.state is not State.SERVING:
                return f"migration {self.row.migration} is in flight ({self.row.state})"
            if not self.permanent_up:
                return f"revision {self.row.permanent} is not healthy; there would be nothing to go back to"
        elif not self._is_current(command.migration, command.epoch):
            return f"migration {command.migration} is not in flight here"
        if (self.row.state, step) not in STEPS:
            return f"{step} is not possible while the slot is {self.row.state}"
        if self._asked:
            return f"the slot is busy with {self._asked}"
        return None

    def _ask(self, given: Ask, now: Moment) -> list[Action]:
        command = given.command
        reason = self.refusal(command, now)
        if reason is not None:
            return [
                Publish(
                    facts.CommandRefused(
                        host=self.host,
                        agent=self.row.agent,
                        migration=command.migration,
                        command=given.id,
                        reason=reason,
                    )
                )
            ]
        self._asked = given.id
        target = STEPS[self.row.state, step_of(command)]
        match command:
            case commands.Prepare():
                self.row = replace(
                    self.row, state=target, candidate=command.to, migration=command.migration, epoch=command.epoch
                )
                self.lease_until = now.mono + STANDBY_LEASE_S + command.baseline_s
                return [Persist(self.row, "prepare"), BeginPrepare(command), self._changed()]
            case commands.Drill():
                return []  # no state takes it yet
            case commands.StartCandidate():
                self._set(target)
                self.lease_until = now.mono + STANDBY_LEASE_S
                self.candidate = self._name(self.row.candidate or "")
                start = Start(self.candidate, self.row.candidate or "", self.row.candidate_digest or "", "candidate")
                return [Persist(self.row, "start candidate"), start, self._changed()]
            case commands.Shadow():
                self._set(target)
                assert self.candidate is not None
                self.lease_until = now.mono + max(STANDBY_LEASE_S, command.seconds * 2)
                return [Persist(self.row, "shadow"), BeginShadow(command, self.candidate), self._changed()]
            case commands.CutOver():
                return self._cut_over(command, given.id, target, now)
            case commands.Commit():
                return self._commit(command, given.id)

    def _cut_over(self, command: commands.CutOver, asked: str, target: State, now: Moment) -> list[Action]:
        first = self.row.state is not State.LIVE
        self._set(target)
        self._asked = ""
        self.share = min(max(command.share, 0.0), 1.0)
        self.lease_until = now.mono + command.lease_s
        done = self._done("cut-over", asked, {"share": self.share})
        return [
            Persist(self.row, f"cut over {self.share:.0%}", (asked, done)),
            *([BeginTrial(command.migration, command.warm_up_s)] if first else []),
            Route(self._shares()),
            Publish(done),
            self._changed(),
        ]

    def _commit(self, command: commands.Commit, asked: str) -> list[Action]:
        """One write makes it permanent; what follows can be done again after any crash."""
        old, new = self.permanent, self.candidate
        self._asked = ""
        done = self._done("commit", asked, {"previous": self.row.permanent})
        self.row = replace(
            self.row,
            permanent=self.row.candidate or "",
            permanent_digest=self.row.candidate_digest or "",
            candidate=None,
            candidate_digest=None,
            state=State.SERVING,
            migration=None,
        )
        self.permanent, self.permanent_up, self.candidate = new, True, None
        self.candidate_up = False
        self.share = 0.0
        self.lease_until = None
        self._restarts = 0
        actions: list[Action] = [Persist(self.row, f"commit {self.row.permanent}", (asked, done))]
        actions += [Route(self._shares()), Publish(done), self._changed()]
        if old is not None:
            actions.append(Stop(old))
        return actions

    def _prepare_ended(self, given: PrepareEnded) -> list[Action]:
        if self.row.state is not State.PREPARING or given.migration != self.row.migration:
            return []
        asked, self._asked = self._asked, ""
        if given.ok:
            self.row = replace(self.row, state=State.PREPARED, candidate_digest=given.digest)
            done: Fact = self._done("prepare", asked, given.evidence)
        else:
            done = self._failed("prepare", asked, given.check, given.reason, given.evidence)
            self._forget_candidate()
        return [
            Persist(self.row, "prepared" if given.ok else "not prepared", (asked, done)),
            Publish(done),
            self._changed(),
        ]

    # --- instances

    def _healthy(self, given: Healthy, now: Moment) -> list[Action]:
        if given.instance == self.permanent:
            self.permanent_up = True
            self.permanent_since = now.mono
            actions: list[Action] = [Route(self._shares())]
            if self.row.state is State.ROLLING_BACK:
                actions.append(Verify(self.row.migration or "", given.instance))
            return [*actions, self._changed()]
        if given.instance == self.candidate and self.row.state is State.STARTING:
            asked, self._asked = self._asked, ""
            self.candidate_up = True
            self._set(State.STANDBY)
            done = self._done("start-candidate", asked, given.evidence)
            return [Persist(self.row, "candidate healthy", (asked, done)), Publish(done), self._changed()]
        return []

    def _gone(self, given: Gone, now: Moment) -> list[Action]:
        if given.instance == self.candidate:
            breach = Breach(by=f"host {given.by}", reason=given.reason, sample_time=given.sample_time)
            if self.row.state in ON_TRIAL:
                return self._roll_back(breach, now)
            return []
        if given.instance == self.permanent:
            self._cold = self._cold or self.row.state is State.ROLLING_BACK
            return self._start_permanent(now, restart=True)
        return []

    def _start_permanent(self, now: Moment, *, restart: bool) -> list[Action]:
        old = self.permanent
        if self.permanent_up and now.mono - self.permanent_since > STEADY_S:
            self._restarts = 0
        delay = RESTART_DELAYS_S[min(self._restarts, len(RESTART_DELAYS_S) - 1)]
        self._restarts += 1
        self.permanent_up = False
        self.permanent = self._name(self.row.permanent)
        start = Start(self.permanent, self.row.permanent, self.row.permanent_digest, "permanent", delay)
        actions: list[Action] = [Route(self._shares(), urgent=True)]
        if restart and old is not None:
            actions += [Rescue(old), Stop(old)]  # it may hang: what it owes is not left to its end
        return [*actions, start]

    # --- shadow

    def _shadow_over(self, given: ShadowEnded) -> list[Action]:
        if self.row.state is not State.SHADOWING or given.migration != self.row.migration:
            return []
        asked, self._asked = self._asked, ""
        self._set(State.STANDBY)
        done: Fact
        if given.ok:
            done = self._done("shadow", asked, given.evidence)
        else:
            done = self._failed("shadow", asked, "shadow", given.reason, given.evidence)
        return [EndShadow(), Persist(self.row, "shadow ended", (asked, done)), Publish(done), self._changed()]

    # --- rolling back

    def _roll_back(self, breach: Breach, now: Moment) -> list[Action]:
        migration = self.row.migration or ""
        candidate, was = self.candidate, self.row.state
        self._breach, self._received, self._cold = breach, now.wall, not self.permanent_up
        self._asked = ""
        self.share = 0.0
        self.lease_until = None
        self.candidate, self.candidate_up = None, False
        self._set(State.ROLLING_BACK)
        actions: list[Action] = [Route(self._shares(), urgent=True)]
        if was is State.SHADOWING:
            actions.append(EndShadow())
        if self.permanent_up and self.permanent is not None:
            actions.append(Verify(migration, self.permanent))
        if candidate is not None:
            actions.append(Rescue(candidate))
        actions.append(Persist(self.row, f"roll back: {breach.by}: {breach.reason}"))
        if candidate is not None:
            actions.append(Stop(candidate))
        return [*actions, self._changed()]

    def _verified(self, given: Verified, now: Moment) -> list[Action]:
        if self.row.state is not State.ROLLING_BACK or given.migration != (self.row.migration or ""):
            return []
        if given.instance not in ("", self.permanent):
            return []  # it has died since: the one that takes its place is asked when it is healthy
        breach = self._breach or Breach(by="host", reason="unknown")
        if not given.ok:
            failed = facts.RollBackFailed(
                host=self.host,
                agent=self.row.agent,
                migration=given.migration,
                epoch=self.row.epoch,
                breach=breach,
                reason=given.reason,
            )
            self._cold = True  # the warm way failed: start the old revision again, and verify when it is healthy
            return [Publish(failed), *self._start_permanent(now, restart=True)]
        done = facts.RolledBack(
            host=self.host,
            agent=self.row.agent,
            migration=given.migration,
            epoch=self.row.epoch,
            revision=self.row.permanent,
            level=2 if self._cold else 1,
            breach=breach,
            received=self._received,
            routed=max(given.routed, self._received),
            restored=given.restored,
            verified=True,
            evidence=given.evidence,
        )
        self._forget_candidate()
        return [Persist(self.row, "rolled back"), Publish(done), self._changed()]

    def _tick(self, now: Moment) -> list[Action]:
        if self.lease_until is None or now.mono < self.lease_until or self.row.state not in ON_TRIAL:
            return []
        reason = "the coordinator did not renew the lease of the candidate"
        return self._roll_back(Breach(by="host lease-expired", reason=reason, sample_time=now.wall), now)

    # --- inside

    def _is_current(self, migration: str, epoch: int) -> bool:
        return migration == self.row.migration and epoch == self.row.epoch

    def _set(self, state: State) -> None:
        self.row = replace(self.row, state=state)

    def _forget_candidate(self) -> None:
        self.row = replace(
            self.row, state=State.SERVING, candidate=None, candidate_digest=None, migration=None
        )  # the epoch stays: older ones are refused for good
        self.candidate, self.candidate_up = None, False
        self.lease_until, self.share, self._breach, self._cold = None, 0.0, None, False

    def _name(self, revision: str) -> str:
        self._born += 1
        return f"{self.row.agent}-{revision}-{self._born}"

    def _shares(self) -> tuple[tuple[str, float], ...]:
        """Whoever is up gets what the other can't take; nobody up: the requests wait."""
        share = self.share if self.candidate is not None and self.row.state is State.LIVE else 0.0
        shares = []
        if self.permanent_up and self.permanent is not None and share < 1:
            shares.append((self.permanent, 1 - share))
        if share > 0 and self.candidate is not None:
            shares.append((self.candidate, share if shares else 1.0))
        return tuple(shares)

    def _changed(self) -> Publish:
        return Publish(
            facts.SlotChanged(
                host=self.host,
                agent=self.row.agent,
                state=str(self.row.state) if self.permanent_up or self.row.state is not State.SERVING else "starting",
                permanent=self.row.permanent,
                candidate=self.row.candidate,
                share=self.share,
                migration=self.row.migration,
                epoch=self.row.epoch,
                endpoint=self.endpoint,
            )
        )

    def _done(self, step: commands.Step, asked: str, evidence: Evidence) -> facts.StepDone:
        return facts.StepDone(
            host=self.host,
            agent=self.row.agent,
            migration=self.row.migration or "",
            epoch=self.row.epoch,
            step=step,
            command=asked,
            evidence=evidence,
        )

    def _failed(self, step: commands.Step, asked: str, check: str, reason: str, evidence: Evidence) -> facts.StepFailed:
        return facts.StepFailed(
            host=self.host,
            agent=self.row.agent,
            migration=self.row.migration or "",
            epoch=self.row.epoch,
            step=step,
            command=asked,
            check=check,
            reason=reason,
            evidence=evidence,
        )


def step_of(command: HostCommand) -> commands.Step:
    match command:
        case commands.Prepare():
            return "prepare"
        case commands.Drill():
            return "drill"
        case commands.StartCandidate():
            return "start-candidate"
        case commands.Shadow():
            return "shadow"
        case commands.CutOver():
            return "cut-over"
        case commands.Commit():
            return "commit"
