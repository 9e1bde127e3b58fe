"""How a slot gives its agent to another host, and takes one over: its part of `ownership.py`. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from interlock.agents.rolling_back import RollingBack
from interlock.agents.slot_base import Handed
from interlock.agents.slot_io import (
    Action,
    Arrived,
    BeginCommit,
    Forward,
    Moment,
    Owned,
    Persist,
    Publish,
    Route,
    State,
    Stop,
)
from interlock.broker import commands


class Relocating(RollingBack):
    """The part of a slot that changes hosts."""

    def _commit_elsewhere(self, command: commands.Commit) -> list[Action]:
        """The other host writes first; until then the candidate goes on serving, and all of it can roll back."""
        return [BeginCommit(command, self.candidate or "")]

    def _of_two_hosts(self, given: Arrived | Owned, now: Moment) -> list[Action]:
        return self._arrived(given, now) if isinstance(given, Arrived) else self._owned(given, now)

    def _arrived(self, given: Arrived, now: Moment) -> list[Action]:
        row = self.row
        if row.state is not State.LIVE or given.migration != row.migration or not row.place or not self._asked:
            return []
        asked, self._asked = self._asked, ""
        if not given.ok:
            done = self._failed("commit", asked, "arrival", given.reason, {})
            return [Persist(row, f"not moved: {given.reason}", (asked, done)), Publish(done)]
        old, candidate, place = self.permanent, self.candidate or "", row.place
        moved = self._done("commit", asked, {"previous": row.permanent, "host": place, "endpoint": given.endpoint})
        self.row = replace(row, candidate=None, candidate_digest=None, state=State.FORWARDING)
        self.permanent, self.permanent_up, self.candidate, self.candidate_up = None, False, None, False
        self.share, self.lease_until, self.ascent, self.exclusive, self.handed = 0.0, None, None, False, Handed()
        written = Persist(self.row, f"moved to {place}", (asked, moved))  # the commit point
        stop = [] if old is None else [Stop(old)]
        return [written, Publish(moved), Forward(place, candidate), self._changed(), *stop]

    def _owned(self, given: Owned, now: Moment) -> list[Action]:
        """The source has written that it moved."""
        if self.row.state is not State.ARRIVING:
            return []
        self.row = replace(self.row, state=State.SERVING, migration=None, place="")
        written = Persist(self.row, "it has arrived, and serves")
        if given.instance:
            self.permanent, self.permanent_up, self.permanent_since = given.instance, True, now.mono
            return [written, Route(self.shares()), self._changed()]
        return [written, *self._start_permanent(now, restart=False), self._changed()]
