"""How a slot hands over the state that its agent keeps in memory, and gets it back in a rollback. Pure.

The old instance has the state until the candidate says that it took it over; then all requests go to the candidate: of
two that both changed it, one would have to be wrong. While it is on its way requests wait. Whatever goes wrong, the old
one resumes at once, with what it has.

A rollback to an old process that still runs brings the newer state back first, within the time that is promised, unless
the candidate is ill. Where that fails the old one goes on with its own, and the report says what was lost.
"""

from __future__ import annotations

from typing import Any

from interlock.agents.ladder import LEAST_S, Rung, is_hungry
from interlock.agents.slot_base import Handed, SlotBase
from interlock.agents.slot_io import (
    Action,
    BeginHandBack,
    BeginHandOver,
    EndHandOver,
    HandedBack,
    HandedOver,
    Moment,
    Persist,
    Publish,
    Rescue,
    Resume,
    Route,
    State,
    Verify,
)
from interlock.broker import commands
from interlock.broker.facts import Fact


class Handing(SlotBase):
    """The part of a slot that moves state."""

    def _hand_over(
        self, command: commands.HandOver, target: State, standby_lease_s: float, now: Moment
    ) -> list[Action]:
        old, new = self.permanent or "", self.candidate or ""  # both are up, or it was refused
        self._set(target)
        self._hand_over_asked = command
        self.lease_until = now.mono + max(standby_lease_s, command.deadline - now.wall)
        begin = BeginHandOver(command, old, new)
        return [Persist(self.row, "hand over"), Route(self.shares()), begin, self._changed()]

    def _handed_over(self, given: HandedOver, now: Moment) -> list[Action]:
        command = self._hand_over_asked
        if self.row.state is not State.HANDING_OVER or given.migration != self.row.migration or command is None:
            return []
        asked, self._asked = self._asked, ""
        self._set(State.STANDBY)
        done: Fact
        if not given.ok:
            done = self._failed("hand-over", asked, "hand-over", given.reason, given.evidence)
            entry = Persist(self.row, f"not handed over: {given.reason}", (asked, done))
            return [*self._old_goes_on(urgent=True), entry, Publish(done), self._changed()]
        done = self._done("hand-over", asked, given.evidence)
        if not command.route:
            return [Persist(self.row, "copied the state", (asked, done)), *self._old_goes_on(), Publish(done)]
        self._set(State.LIVE)
        self.share = 1.0
        self.lease_until = now.mono + command.lease_s
        back_s = given.limit_s if command.accept == "hand-over" else min(given.limit_s, command.promise_s)
        self.handed = Handed(at=now.wall, back_s=back_s)
        assert self.candidate is not None
        written = Persist(self.row, "handed over", (asked, done))
        return [written, Route(self.shares()), Resume(self.candidate), Publish(done), self._changed()]

    def _old_goes_on(self, *, urgent: bool = False) -> list[Action]:
        """Requests go to the old one again, and it works."""
        resume = [] if self.permanent is None else [Resume(self.permanent)]
        return [Route(self.shares(), urgent=urgent), *resume]

    def _of_the_state(self, given: HandedOver | HandedBack, now: Moment) -> list[Action]:
        return self._handed_over(given, now) if isinstance(given, HandedOver) else self._handed_back(given, now)

    # --- back

    def _may_hand_back(self) -> bool:
        """The candidate has the newer state, can give it, and there is somebody to take it."""
        handed, ascent = self.handed, self.ascent
        if not handed.at or handed.tried or ascent is None or not self.permanent_up:
            return False
        return self.hand_back and self.candidate_up and self.candidate is not None and not is_hungry(ascent.breach)

    def _begin_hand_back(self, now: Moment) -> list[Action]:
        """Requests wait for it; the level of the rollback has so much longer."""
        handed, ascent = self.handed, self.ascent
        assert ascent is not None
        handed.returning = handed.tried = True
        ascent.until = max(ascent.until, now.mono + handed.back_s + LEAST_S[Rung.ROUTE])
        ascent.note(now, "the newer state is handed back")
        begin = BeginHandBack(self.row.migration or "", self.candidate or "", self.permanent or "", handed.back_s)
        return [Route(self.shares(), urgent=True), begin]

    def _handed_back(self, given: HandedBack, now: Moment) -> list[Action]:
        if not self.handed.returning or given.migration != (self.row.migration or ""):
            return []
        return self._hand_back_over(given.ok, given.reason, given.evidence, now)

    def _hand_back_over(self, ok: bool, reason: str, evidence: dict[str, Any], now: Moment) -> list[Action]:
        """The requests go to the old one, with the newer state or without."""
        self.handed.returning = False
        if ok:
            self.handed.told = {"handed_back": True, **evidence}
        else:
            self._note_lost(reason, now)
        if self.ascent is not None:
            self.ascent.note(now, "handed back" if ok else f"not handed back: {reason}")
        if self.permanent is None or not self.permanent_up:
            return [EndHandOver()]
        verify = Verify(self.row.migration or "", self.permanent)
        rescue = [] if self.candidate is None else [Rescue(self.candidate)]
        entry = Persist(self.row, "state handed back" if ok else f"state not handed back: {reason}")
        return [Route(self.shares(), urgent=True), EndHandOver(), Resume(self.permanent), verify, *rescue, entry]

    def _note_lost(self, why: str, now: Moment) -> None:
        """What the candidate did to the state since it had it is lost: how much time that is."""
        if self.handed.at and "handed_back" not in self.handed.told:
            lost_s = round(max(0.0, now.wall - self.handed.at), 3)
            self.handed.told = {"handed_back": False, "why": why, "lost_s": lost_s}
