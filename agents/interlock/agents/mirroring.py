"""Shadow requests: which are mirrored, and the pairing of both answers. Part of the routing core. Pure.

Mirroring never costs a client anything: what the candidate can't take in time is dropped and counted.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Generic

from interlock.agents.routing_types import AnswerT, BodyT, ClientT, Compare, Copy, Instance, MirrorPair, Request

MIRROR_WAITING = 64  # requests that wait to be mirrored; beyond, they are dropped: each is kept in memory meanwhile
MAX_MIRRORED_BYTES = 1 << 20  # a larger request isn't mirrored: it is kept until both have answered


class Mirror(Generic[ClientT, BodyT]):
    """Gives requests to `target` a second time."""

    def __init__(self) -> None:
        self.target: Instance[BodyT] | None = None
        self._line: deque[Request[ClientT, BodyT]] = deque()

    def aim(self, target: Instance[BodyT] | None) -> list[Request[ClientT, BodyT]]:
        """Mirror to `target` (None: to nobody); returns the requests that waited for the former one."""
        waited = [request for request in self._line if request.pair is not None]
        for request in waited:
            request.pair = None
        self._line.clear()
        self.target = target
        return waited

    def offer(self, request: Request[ClientT, BodyT], serving: Instance[BodyT]) -> None:
        """A client's request is being given to `serving`: let it wait for its copy, if it may be asked twice."""
        target = self.target
        if target is None or target is serving or request.size > MAX_MIRRORED_BYTES:
            return
        if not (serving.mirrorable(request.body) and target.mirrorable(request.body)):
            return
        if len(self._line) >= MIRROR_WAITING:
            target.tally.dropped += 1
            return
        request.pair = MirrorPair(target)
        self._line.append(request)

    def take(self) -> Request[ClientT, BodyT] | None:
        """The next request to be copied to the target."""
        while self._line:
            request = self._line.popleft()
            if request.pair is not None:
                request.pair.waits = False
                return request
        return None

    @property
    def waiting(self) -> int:
        return len(self._line)


def answered(copy: Copy, answer: AnswerT | None, latency: float, out: list[Any]) -> None:
    """One side of the pair of this copy's request, if it has one. None: an answer that can't be compared."""
    pair = copy.request.pair
    if pair is None or not (copy.mirrored or copy.wins):
        return
    if answer is None:
        copy.request.pair = None
        pair.instance.tally.dropped += 1
        return
    if copy.mirrored:
        pair.has_new, pair.new, pair.new_latency = True, answer, latency
    else:
        pair.has_old, pair.old, pair.old_latency = True, answer, latency
    _complete(copy.request, pair, out)


def unanswered(request: Request[Any, Any], out: list[Any]) -> None:
    """The candidate will not answer its copy of this request."""
    pair = request.pair
    if pair is None:
        return
    if pair.waits:
        request.pair = None
        pair.instance.tally.dropped += 1
        return
    pair.has_new = True
    _complete(request, pair, out)


def _complete(request: Request[Any, Any], pair: MirrorPair[Any], out: list[Any]) -> None:
    if pair.has_old and pair.has_new:
        request.pair = None
        out.append(Compare(pair.instance.name, request.body, pair.old, pair.new, pair.old_latency, pair.new_latency))
