"""Requests that end whoever takes them: after the second instance an equal one is refused for a while. Part of the
routing core. Pure.

To blame is what an instance had alone in hand when it died; where there were several nobody knows which it was. A
client that sends different such requests is refused after a few more. An answer clears both: it has harmed nobody.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic

from interlock.agents.routing_types import BodyT, Copy, Instance, Request

DEATHS = 2  # instances that died over equal requests: once may be chance
DEATHS_OF_PEER = 4  # the same over any requests of one client, which may be the only one there is
REFUSED_S = 30.0  # and so long is refused from the last death on: an instance restarts in a fraction of it
MAX_BLAMED = 1000  # requests and clients that are remembered, the newest

_Who = tuple[str, Hashable]


class Quarantine(Generic[BodyT]):
    """`key_of`: equal for equal bodies; None for one that can't be told."""

    def __init__(self, key_of: Callable[[BodyT], Hashable]) -> None:
        self._key_of = key_of
        self._blamed: OrderedDict[_Who, tuple[int, float]] = OrderedDict()  # deaths, and when the last was; in order

    def refusal(self, request: Request[Any, BodyT], now: float) -> str:
        """Why the request is given to nobody; empty if it may be."""
        if not self._blamed:
            return ""
        for who in self._who(request):
            deaths, last = self._blamed.get(who, (0, now))
            left = last + REFUSED_S - now
            if deaths >= _limit(who) and left > 0:
                whose = "equal requests" if who[0] == "body" else "requests of this client"
                return f"{deaths} instances died over {whose}: refused for another {left:.0f} s"
        return ""

    def died(self, instance: Instance[BodyT], now: float) -> bool:
        """The instance is dead; True if something is refused from now on because of it."""
        owed = [copy for copy in instance.copies.values() if not copy.mirrored]
        suspect = owed[0].request if len(owed) == 1 else instance.suspect if not owed else None
        if suspect is None:
            return False
        reached = False
        for who in self._who(suspect):
            deaths, last = self._blamed.pop(who, (0, now))
            deaths = deaths + 1 if now - last <= REFUSED_S else 1
            self._blamed[who] = (deaths, now)
            reached |= deaths >= _limit(who)
        while len(self._blamed) > MAX_BLAMED:
            self._blamed.popitem(last=False)
        return reached

    def broke(self, copy: Copy) -> None:
        """The way to the instance broke while it had the copy in hand: it may be about to be found dead."""
        alone = not copy.mirrored and all(other.mirrored or other is copy for other in copy.instance.copies.values())
        copy.instance.suspect = copy.request if alone else None

    def answered(self, copy: Copy) -> None:
        copy.instance.suspect = None
        if self._blamed and not copy.mirrored:
            for who in self._who(copy.request):
                self._blamed.pop(who, None)

    def _who(self, request: Request[Any, BodyT]) -> list[_Who]:
        key = self._key_of(request.body)
        return [("peer", request.peer)] if key is None else [("body", key), ("peer", request.peer)]


def _limit(who: _Who) -> int:
    return DEATHS if who[0] == "body" else DEATHS_OF_PEER
