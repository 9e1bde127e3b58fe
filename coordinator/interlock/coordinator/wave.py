"""A wave: many agents moved one after the other, and moved back in reverse when too many fail. Pure.

It is a fold over the log, as a migration is: what it asks for are ordinary requests in the log, with ids that say the
wave and the agent, so that a coordinator that was killed asks for nothing twice. Who is in which state follows from the
answers to these requests alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from interlock.broker import commands, facts, topics
from interlock.broker.commands import Breach
from interlock.broker.facts import MemberState, WaveMember, WaveOutcome, WaveResult
from interlock.broker.wire import Event
from interlock.coordinator.emit import Emit
from interlock.coordinator.migration import Migration
from interlock.coordinator.phases import Phase as MigrationPhase

ASK_S = 86_400.0  # for the answer to a request of ours: the coordinator itself answers it, at once when it is there
FROZEN_S = 60.0  # between looks whether a freeze is over: nobody is kept waiting for more than a minute


class Phase(StrEnum):
    MOVING = "moving"
    STOPPING = "stopping"  # no further one begins, what is in flight goes on
    ROLLING_BACK = "rolling-back"
    ENDED = "ended"


_MOVE, _STOP, _BACK, _END = Phase
_ROWS: dict[str, tuple[Phase | None, ...]] = {
    # the phase:     moving stopping rolling-back ended
    "stopping":     (_STOP, None,    None,        None),
    "rolling-back": (_BACK, _BACK,   None,        None),
    "ended":        (_END,  _END,    _END,        None),
}  # fmt: skip
TRANSITIONS: dict[tuple[Phase, str], Phase | None] = {
    (phase, event): to for event, row in _ROWS.items() for phase, to in zip(Phase, row, strict=True)
}

FAILED: tuple[MemberState, ...] = ("rolled-back", "refused", "failed")
UNDER_WAY: tuple[MemberState, ...] = ("moving", "going-back")
HELD = (MigrationPhase.HELD, MigrationPhase.PAUSED)  # of a member: somebody is looking, and no other one begins
Flying = Mapping[str, Migration]


@dataclass
class _Way:
    """One request of ours for a member, there or back, and what became of it."""

    asked: bool = False
    migration: str = ""
    outcome: str = ""
    reason: str = ""

    @property
    def open(self) -> bool:
        return self.asked and not self.outcome


class Wave:
    """Made from WaveStarted, alive until `closed` (WaveEnded is in the log)."""

    def __init__(self, started: facts.WaveStarted) -> None:
        self.started = started
        self.id = started.wave
        self.phase = Phase.MOVING
        self.changed: facts.WaveChanged | None = None
        self.ended: facts.WaveEnded | None = None
        self._there = {member.agent: _Way() for member in started.members}
        self._back = {member.agent: _Way() for member in started.members}
        self._of_request = {f"{self.id}/{agent}": way for agent, way in self._there.items()}
        self._of_request |= {f"{self.id}/{agent}/back": way for agent, way in self._back.items()}
        self._members = {member.agent: member for member in started.members}
        self._needs = _closed(started.members)
        self._dependents: dict[str, list[str]] = {agent: [] for agent in self._members}
        for agent, needs in self._needs.items():
            for needed in needs:
                self._dependents[needed].append(agent)
        self._said: set[str] = set()  # what was sent in this life; after a restart the log has it, by the same ids
        self._frozen = False
        self._changing = False  # an operator's word is on its way into the log

    @property
    def closed(self) -> bool:
        return self.phase is Phase.ENDED

    # --- folding

    def apply(self, event: Event) -> None:
        """Take in an event; what is not the wave's is passed over."""
        body = event.body
        match body:
            case commands.Migrate() if event.header.id in self._of_request:
                self._of_request[event.header.id].asked = True
            case facts.MigrationStarted() if body.request in self._of_request:
                way = self._of_request[body.request]
                way.asked, way.migration = True, body.migration
            case facts.MigrationRefused() if body.request in self._of_request:
                way = self._of_request[body.request]
                if not way.migration:
                    way.asked, way.outcome, way.reason = True, "refused", body.reason
            case facts.MigrationEnded():
                self._settle(body)
            case facts.WaveChanged() if body.wave == self.id:
                self._changing = False
                if self._turn(body.phase):
                    self.changed = body
            case facts.WaveEnded() if body.wave == self.id:
                if self._turn("ended"):
                    self.ended = body

    def _settle(self, body: facts.MigrationEnded) -> None:
        for way in (self._there.get(body.agent), self._back.get(body.agent)):
            if way is not None and way.migration == body.migration:
                way.outcome, way.reason = body.outcome, body.reason

    def _turn(self, what: str) -> bool:
        to = TRANSITIONS[self.phase, what]
        if to is None:
            return False
        self.phase = to
        return True

    # --- where it stands

    def state(self, agent: str) -> MemberState:
        there, back = self._there[agent], self._back[agent]
        if back.asked:
            return {"": "going-back", "committed": "gone-back"}.get(back.outcome, "stuck")  # type: ignore[return-value]
        if there.outcome == "committed":
            return "stuck" if self._blocked(agent) else "committed"
        if there.outcome:
            return there.outcome if there.outcome in ("rolled-back", "refused") else "failed"  # type: ignore[return-value]
        if there.asked:
            return "moving"
        return "left-out" if self._why_not(agent) else "waiting"

    def results(self) -> list[WaveResult]:
        """The table: each agent in order."""
        found = []
        for agent in self._members:
            there, back = self._there[agent], self._back[agent]
            reason = back.reason if back.outcome else there.reason or self._why_not(agent)
            state = self.state(agent)
            if state == "stuck" and not back.asked:
                reason = f"{', '.join(self._blocked(agent))} could not be moved back, and depends on it"
            found.append(
                WaveResult(agent=agent, state=state, migration=there.migration, back=back.migration, reason=reason)
            )
        return found

    @property
    def failures(self) -> list[str]:
        return [agent for agent in self._members if self.state(agent) in FAILED]

    def waits_for(self, flying: Flying) -> str:
        """What it waits for, in words."""
        if self.closed:
            return "nothing"
        held = self._held(flying)
        if held and self.phase is Phase.MOVING:
            return f"an operator: {', '.join(held)} held or paused"
        if self._frozen:
            return "the end of the freeze"
        moving = [agent for agent in self._members if self.state(agent) in UNDER_WAY]
        return f"{', '.join(moving)} to be moved" if moving else "the coordinator"

    def owns(self, request: str) -> bool:
        """The request is one of ours."""
        return request in self._of_request

    def undoes(self, request: str) -> bool:
        """The request moves a member back: what would refuse a step forward is no reason against that."""
        return self.owns(request) and request.endswith("/back")

    def next_deadline(self, now: float) -> float:
        return now + FROZEN_S if self._frozen and not self.closed else float("inf")

    def _why_not(self, agent: str) -> str:
        """Why a member that was not asked for never will be; "" if it may yet."""
        bad = [needed for needed in self._needs[agent] if self._is_lost(needed)]
        if bad:
            return f"{', '.join(bad)}, which it depends on, did not get there"
        if self.phase is Phase.STOPPING or (self.phase is Phase.ENDED and self.changed is not None):
            return "the wave was stopped before"
        return "the wave was rolled back before" if self.phase is Phase.ROLLING_BACK else ""

    def _is_lost(self, agent: str) -> bool:
        """It did not get there."""
        return self._there[agent].outcome not in ("", "committed")

    def _blocked(self, agent: str) -> list[str]:
        """Who depends on it and could not be moved back."""
        return [each for each in self._dependents[agent] if self._back[each].outcome not in ("", "committed")]

    def _held(self, flying: Flying) -> list[str]:
        ids = {way.migration: agent for agent, way in self._there.items() if way.open and way.migration}
        return [agent for number, agent in ids.items() if number in flying and flying[number].phase in HELD]

    # --- deciding

    def decide(self, now: float, flying: Flying, frozen: Callable[[], bool]) -> list[Emit]:
        """What to send now. flying: the migrations in flight; frozen: whether no migration may begin."""
        self._frozen = False
        if self._changing:
            return []
        if self.phase is Phase.MOVING:
            if len(self.failures) > self.started.budget:
                return self._give_up()
            wanted = self._begin(now, flying, frozen)
        elif self.phase is Phase.ROLLING_BACK:
            wanted = self._undo(now, flying)
        else:
            wanted = []
        if not wanted and not self.closed and self._is_settled():
            wanted = self._once(self._end())
        return wanted

    def change(self, body: commands.StopWave, request: str, by: str) -> Emit:
        """The answer to an operator who stops it."""
        self._changing = True
        phase = Phase.ROLLING_BACK if body.undo else Phase.STOPPING
        reason = body.reason or "an operator stopped it"
        changed = facts.WaveChanged(wave=self.id, phase=phase.value, by=by, reason=reason, request=request)  # type: ignore[arg-type]
        return Emit(topics.wave_fact(self.id), changed, f"{request}/changed")

    def refusal(self, body: commands.StopWave) -> str | None:
        """Why an operator can't have this now; None if he can."""
        if TRANSITIONS[self.phase, "rolling-back" if body.undo else "stopping"] is None:
            return f"wave {self.id} is {self.phase} already"
        if self._said & {f"{self.id}/budget", f"{self.id}/ended"} and self.phase is Phase.MOVING:
            return f"wave {self.id} has just failed or ended; see: interlock wave status {self.id}"
        return None

    def _give_up(self) -> list[Emit]:
        failures = self.failures
        what = f"{', '.join(failures)} failed, and the budget is {self.started.budget}"
        changed = facts.WaveChanged(wave=self.id, phase="rolling-back", by="failure budget", reason=what)
        return self._once(Emit(topics.wave_fact(self.id), changed, f"{self.id}/budget"))

    def _begin(self, now: float, flying: Flying, frozen: Callable[[], bool]) -> list[Emit]:
        if self._held(flying):
            return []
        room = self.started.parallel - sum(way.open for way in self._there.values())
        ready = [member for member in self.started.members if self._is_ready(member)][: max(0, room)]
        if ready and not self.started.because and frozen():
            self._frozen = True
            return []
        wanted = []
        for member in ready:
            asked = commands.Migrate(
                agent=member.agent, to=member.to, deadline=now + ASK_S, strategy=self.started.strategy,
                level=self.started.level, because=self.started.because, wave=self.id,
            )  # fmt: skip
            wanted += self._once(Emit(topics.COORDINATOR, asked, f"{self.id}/{member.agent}"))
        return wanted

    def _is_ready(self, member: WaveMember) -> bool:
        if self.state(member.agent) != "waiting":
            return False
        return all(self._there[needed].outcome == "committed" for needed in self._needs[member.agent])

    def _undo(self, now: float, flying: Flying) -> list[Emit]:
        """What is in flight first, all of it at once; then what was moved, in reverse."""
        assert self.changed is not None
        why, wanted = f"wave {self.id} is rolled back: {self.changed.reason}", []
        for way in self._there.values():
            migration = flying.get(way.migration) if way.open else None
            if migration is not None and f"undo {migration.id}" not in self._said:
                self._said.add(f"undo {migration.id}")
                wanted += migration.roll_back(Breach(by=f"wave {self.id}", reason=why, sample_time=now), now)
        room = self.started.parallel - sum(self.state(agent) in UNDER_WAY for agent in self._members)
        for member in reversed(self.started.members):
            if room > 0 and self._may_go_back(member.agent):
                asked = commands.Migrate(
                    agent=member.agent, to=member.previous, deadline=now + ASK_S, strategy="rapid", because=why,
                    wave=self.id,
                )  # fmt: skip
                wanted += self._once(Emit(topics.COORDINATOR, asked, f"{self.id}/{member.agent}/back"))
                room -= 1
        return wanted

    def _may_go_back(self, agent: str) -> bool:
        """Whoever depends on it has left the new revision, or never had it."""
        if self.state(agent) != "committed":
            return False
        still = ("committed", *UNDER_WAY)
        return all(self.state(dependent) not in still for dependent in self._dependents[agent])

    def _is_settled(self) -> bool:
        states = {self.state(agent) for agent in self._members}
        if states & set(UNDER_WAY):
            return False
        if self.phase is Phase.MOVING:
            return "waiting" not in states
        return self.phase is not Phase.ROLLING_BACK or "committed" not in states

    def _end(self) -> Emit:
        results = self.results()
        counts = {
            state: sum(each.state == state for each in results) for state in dict.fromkeys(r.state for r in results)
        }
        told = ", ".join(f"{count} {state}" for state, count in counts.items())
        outcome: WaveOutcome
        if self.phase is Phase.STOPPING:
            outcome = "stopped"
        elif self.phase is Phase.ROLLING_BACK:
            outcome = "failed" if counts.get("stuck") or counts.get("failed") else "rolled-back"
        else:
            outcome = "committed" if counts.get("committed") else "failed"
        why = f"{self.changed.by}: {self.changed.reason}; {told}" if self.changed is not None else told
        ended = facts.WaveEnded(wave=self.id, outcome=outcome, reason=why, members=results)
        return Emit(topics.wave_fact(self.id), ended, f"{self.id}/ended")

    def _once(self, emit: Emit) -> list[Emit]:
        if emit.id in self._said:
            return []
        self._said.add(emit.id)
        return [emit]


def _closed(members: list[WaveMember]) -> dict[str, list[str]]:
    """All that each depends on, directly or not, in the order of the wave."""
    found: dict[str, set[str]] = {}
    for member in members:  # whom it depends on stands before it
        found[member.agent] = set()
        for needed in member.after:
            found[member.agent] |= {needed, *found[needed]} if needed in found else set()
    return {agent: [name for name in found if name in needs] for agent, needs in found.items()}
