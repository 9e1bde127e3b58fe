"""The slot machine: what a host does with one agent. Pure: inputs and the time go in, actions come out.

A slot has a *permanent* revision, which serves by right and is what a restart of the host comes back to, and during a
migration a *candidate*. Until `Commit`, whatever goes wrong leads back to the permanent revision: the candidate dies,
fails its health checks, its lease expires, a step fails, or somebody says so (`rolling_back.py`).

Order matters in what comes out. Everything but a rollback is written to the journal before it is done (`Persist` comes
first). A rollback routes first and writes afterwards: the row in the journal still names the old revision as permanent,
so a crash in between ends in the same place.
"""

from __future__ import annotations

from msgspec.structs import replace

from interlock.agents.ladder import Ascent, Rung, Sign
from interlock.agents.relocating import Relocating
from interlock.agents.rolling_back import AWAY
from interlock.agents.slot_base import Handed
from interlock.agents.slot_io import (
    Action,
    Arrived,
    Ask,
    AskHostLevel,
    AskRollBack,
    BeginDrill,
    BeginPrepare,
    BeginShadow,
    BeginTrial,
    DrillEnded,
    EndDrill,
    EndHandOver,
    EndShadow,
    Forward,
    Gone,
    HandedBack,
    HandedOver,
    Healthy,
    HostRestored,
    Input,
    Moment,
    Owned,
    Persist,
    PrepareEnded,
    Publish,
    Renew,
    Restored,
    Resume,
    Route,
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

STANDBY_LEASE_S = 60.0  # before the cut-over a candidate costs resources only; still nobody may forget it


# --- the table: (state, step) -> the state in which the step is done or under way

STEPS: dict[tuple[State, str], State] = {
    (State.SERVING, "prepare"): State.PREPARING,
    (State.SERVING, "drill"): State.DRILLING,
    (State.PREPARED, "drill"): State.DRILLING,
    (State.PREPARED, "start-candidate"): State.STARTING,
    (State.STANDBY, "shadow"): State.SHADOWING,
    (State.STANDBY, "hand-over"): State.HANDING_OVER,
    (State.STANDBY, "cut-over"): State.LIVE,
    (State.LIVE, "cut-over"): State.LIVE,
    (State.LIVE, "commit"): State.SERVING,
    (State.KEPT, "commit"): State.SERVING,
}
ON_TRIAL = {
    State.PREPARING, State.PREPARED, State.DRILLING, State.STARTING, State.STANDBY, State.SHADOWING,
    State.HANDING_OVER, State.LIVE,
}  # fmt: skip


class Slot(Relocating):
    """One agent's place on a host. `handle` is the only way in."""

    # --- start

    def begin(self, now: Moment) -> list[Action]:
        """What a host does first with the slot: undo what a crash left, and start the permanent revision."""
        actions: list[Action] = []
        if self.row.state is State.ARRIVING:
            return [self._changed()]
        if self.row.state is State.FORWARDING:
            return [Forward(self.row.place), self._changed()]
        if self.row.state is State.DRILLING and self.row.migration is None:
            self._set(State.SERVING)  # nothing was on trial
        if self.row.state is not State.SERVING:
            breach = Breach(
                by="host restarted",
                reason=f"the host restarted while revision {self.row.candidate or '?'} was {self.row.state}",
                sample_time=now.wall,
            )
            self.ascent = Ascent.begin(breach, Rung.CODE, now)
            self._set(State.ROLLING_BACK)
            actions.append(Persist(self.row, "roll back: the host restarted"))
        actions += self._start_permanent(now, restart=False)
        return [*actions, self._changed()]

    # --- inputs

    def handle(self, given: Input, now: Moment) -> list[Action]:
        match given:
            case Ask():
                return self._ask(given, now)
            case AskRollBack():
                return self._asked_back(given, now)
            case Renew(command):
                if self.lease_until is not None and self._is_current(command.migration, command.epoch):
                    self.lease_until = now.mono + command.lease_s
                return []
            case PrepareEnded():
                return self._prepare_ended(given)
            case Healthy() | Gone():
                return self._healthy(given, now) if isinstance(given, Healthy) else self._gone(given, now)
            case ShadowEnded() | DrillEnded():
                return self._shadow_over(given) if isinstance(given, ShadowEnded) else self._drill_over(given)
            case HandedOver() | HandedBack():
                return self._of_the_state(given, now)
            case Arrived() | Owned():
                return self._of_two_hosts(given, now)
            case Verified():
                return self._verified(given, now)
            case AskHostLevel() | HostRestored() | Restored():
                return self._of_the_host(given, now)
            case Tick():
                return self._tick(now)

    def next_deadline(self) -> float | None:
        """Monotonic time of the next Tick that may matter."""
        if self.row.state in AWAY:
            return None if self.ascent is None or self.ascent.until == float("inf") else self.ascent.until
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
            if self.row.state is State.FORWARDING:
                return f"it was moved to host {self.row.place}"
            if self.row.state is not State.SERVING:
                return f"migration {self.row.migration} is in flight ({self.row.state})"
            if not self.permanent_up and not command.sick_ok:
                return f"revision {self.row.permanent} is not healthy; there would be nothing to go back to"
        elif isinstance(command, commands.Drill) and not command.migration:
            if self.row.state is State.SERVING and not self.permanent_up:
                return f"revision {self.row.permanent} is not healthy; there is nothing to rehearse with"
        elif not self._is_current(command.migration, command.epoch):
            return f"migration {command.migration} is not in flight here"
        if (self.row.state, step) not in STEPS:
            return f"{step} is not possible while the slot is {self.row.state}"
        if step == "hand-over" and not (self.permanent_up and self.candidate_up):
            return "the old instance or the candidate is not up: there is nothing to hand over, or nobody to take it"
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
                    self.row, state=target, candidate=command.to, migration=command.migration, epoch=command.epoch,
                    place=command.host,
                )  # fmt: skip
                self.lease_until = now.mono + STANDBY_LEASE_S + command.baseline_s
                return [Persist(self.row, "prepare"), BeginPrepare(command), self._changed()]
            case commands.Drill():
                self._set(target)
                if self.lease_until is not None:
                    self.lease_until = now.mono + STANDBY_LEASE_S + max(0.0, command.deadline - now.wall)
                return [Persist(self.row, "drill"), BeginDrill(command), self._changed()]
            case commands.StartCandidate():
                return self._start_candidate(command, target, now)
            case commands.Shadow():
                self._set(target)
                assert self.candidate is not None
                self.lease_until = now.mono + max(STANDBY_LEASE_S, command.seconds * 2)
                return [Persist(self.row, "shadow"), BeginShadow(command, self.candidate), self._changed()]
            case commands.HandOver():
                return self._hand_over(command, target, STANDBY_LEASE_S, now)
            case commands.CutOver():
                return self._cut_over(command, given.id, target, now)
            case commands.Commit():
                return self._commit_elsewhere(command) if self.row.place else self._commit(command, given.id)
            case commands.Receive():
                raise AssertionError("it concerns no slot")

    def _start_candidate(self, command: commands.StartCandidate, target: State, now: Moment) -> list[Action]:
        """Beside the old one; or, cold, in its place: requests wait while one is stopped and the other starts."""
        self._set(target)
        self._counted = False
        self.lease_until = now.mono + STANDBY_LEASE_S
        self.candidate = self._name(self.row.candidate or "", epoch=self.row.epoch if self.row.place else 0)
        old = self.permanent if command.cold else None
        start = Start(
            self.candidate, self.row.candidate or "", self.row.candidate_digest or "", "candidate",
            after=() if old is None else (old,),
        )  # fmt: skip
        actions: list[Action] = [Persist(self.row, "start candidate, cold" if command.cold else "start candidate")]
        if command.cold:
            self.permanent, self.permanent_up, self.exclusive = None, False, True
            actions.append(Route(self.shares()))
        actions.append(start)
        return [*actions, *([] if old is None else [Stop(old)]), self._changed()]

    def _cut_over(self, command: commands.CutOver, asked: str, target: State, now: Moment) -> list[Action]:
        first, self._counted = not self._counted, True  # cold, and with its state, it may be live and not on trial yet
        fresh = self.row.state is not State.LIVE
        self._set(target)
        self._asked = ""
        self.share = min(max(command.share, 0.0), 1.0)
        self.lease_until = now.mono + command.lease_s
        done = self._done("cut-over", asked, {"share": self.share})
        return [
            Persist(self.row, f"cut over {self.share:.0%}", (asked, done)),
            *([BeginTrial(command.migration, command.warm_up_s)] if first else []),
            Route(self.shares()),
            *([Resume(self.candidate)] if fresh and self.candidate_keeps_state and self.candidate is not None else []),
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
            place="",
        )
        self.permanent, self.permanent_up, self.candidate = new, True, None
        self.candidate_up, self.exclusive = False, False
        self.keeps_state, self.handed = self.candidate_keeps_state, Handed()
        self.share = 0.0
        self.lease_until, self.ascent = None, None
        self._restarts = 0
        actions: list[Action] = [Persist(self.row, f"commit {self.row.permanent}", (asked, done))]
        actions += [Route(self.shares()), Publish(done), self._changed()]
        if old is not None:
            actions.append(Stop(old))
        return actions

    def _prepare_ended(self, given: PrepareEnded) -> list[Action]:
        if self.row.state is not State.PREPARING or given.migration != self.row.migration:
            return []
        asked, self._asked = self._asked, ""
        if given.ok:
            self.row = replace(self.row, state=State.PREPARED, candidate_digest=given.digest)
            self.exclusive = given.exclusive
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
            self.keeps_state = given.keeps_state
            if self.row.state in AWAY and self._may_hand_back():
                return [*self._begin_hand_back(now), self._changed()]
            actions: list[Action] = [Route(self.shares(), urgent=self.row.state in AWAY)]
            if self.row.state in AWAY:
                actions.append(Verify(self.row.migration or "", given.instance))
            return [*actions, self._changed()]
        if given.instance == self.candidate and self.row.state is State.STARTING:
            asked, self._asked = self._asked, ""
            self.candidate_up, self.candidate_keeps_state = True, given.keeps_state
            cold = self.permanent is None
            self._set(State.LIVE if cold else State.STANDBY)
            self.share = 1.0 if cold else 0.0
            done = self._done("start-candidate", asked, given.evidence | ({"cold": True} if cold else {}))
            written = Persist(self.row, "candidate healthy", (asked, done))
            live: list[Action] = [Route(self.shares()), Resume(given.instance)] if cold else []
            return [written, *live, Publish(done), self._changed()]
        return []

    def _gone(self, given: Gone, now: Moment) -> list[Action]:
        state = self.row.state
        if given.instance == self.candidate:
            breach = Breach(by=f"host {given.by}", reason=given.reason, sample_time=given.sample_time)
            if state in ON_TRIAL:
                self.candidate_up = False
                return self._roll_back(breach, now)
            return self._candidate_gone(given, now) if state in AWAY else []
        if given.instance != self.permanent:
            return []
        if state in AWAY:
            self.permanent_up = False
            return self._old_gone(given, now)
        again = self._start_permanent(now, restart=True)
        called_off: dict[State, Action] = {State.DRILLING: EndDrill(), State.HANDING_OVER: EndHandOver()}
        return [again[0], called_off[state], *again[1:]] if state in called_off else again

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

    # --- drill

    def _drill_over(self, given: DrillEnded) -> list[Action]:
        if self.row.state is not State.DRILLING:
            return []
        asked, self._asked = self._asked, ""
        told = facts.DrillDone(
            host=self.host, agent=self.row.agent, revision=self.row.permanent, seconds=given.seconds,
            problems=list(given.problems), skipped=given.skipped, migration=self.row.migration or "", command=asked,
            evidence=given.evidence,
        )  # fmt: skip
        evidence = given.evidence | {"seconds": given.seconds, "skipped": given.skipped, "problems": told.problems}
        done: Fact
        if given.ok:
            done = self._done("drill", asked, evidence)
        else:
            done = self._failed("drill", asked, "drill", given.reason, evidence)
        if given.ok and self.row.migration:
            self._set(State.PREPARED)
        else:
            self._forget_candidate()  # nothing was started of it
        return [Persist(self.row, "drill ended", (asked, done)), Publish(told), Publish(done), self._changed()]

    # --- rolling back

    def _asked_back(self, given: AskRollBack, now: Moment) -> list[Action]:
        command = given.command
        if not self._is_current(command.migration, command.epoch):
            return []  # done already, or never ours
        if self.row.state in ON_TRIAL:
            return self._roll_back(command.breach, now)
        again = self.ascent is not None and command.issued > self.ascent.kept_at
        asked = command.breach.by.startswith("operator")
        if (
            self.row.state is State.KEPT and asked and again
        ):  # a rule that goes on firing must not end the one that serves
            return self._heard(Sign.ASKED, command.breach.reason, now)
        return []

    def _of_the_host(self, given: AskHostLevel | HostRestored | Restored, now: Moment) -> list[Action]:
        match given:
            case HostRestored():
                return self._host_restored(given, now)
            case Restored():
                return self._restored(given, now)
        if self.row.state in ON_TRIAL and self.row.migration is not None:
            reason = f"the roll back of {given.agent} needs all of this host: {given.reason}"
            return self._roll_back(Breach(by="host level-3", reason=reason, sample_time=now.wall), now)
        return [EndDrill()] if self.row.state is State.DRILLING else []  # who is healthy and untouched stays so

    def _tick(self, now: Moment) -> list[Action]:
        if self.row.state in AWAY:
            return self._level_time(now)
        if self.lease_until is None or now.mono < self.lease_until or self.row.state not in ON_TRIAL:
            return []
        reason = "the coordinator did not renew the lease of the candidate"
        return self._roll_back(Breach(by="host lease-expired", reason=reason, sample_time=now.wall), now)


_STEPS: dict[type[HostCommand], commands.Step] = {
    commands.Receive: "receive", commands.Prepare: "prepare", commands.Drill: "drill",
    commands.StartCandidate: "start-candidate", commands.Shadow: "shadow", commands.HandOver: "hand-over",
    commands.CutOver: "cut-over", commands.Commit: "commit",
}  # fmt: skip


def step_of(command: HostCommand) -> commands.Step:
    return _STEPS[type(command)]
