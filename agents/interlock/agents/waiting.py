"""Who is next: requests that wait, fair among peers, and instances by share. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping
from typing import Generic, Protocol, TypeVar

MAX_WAITING = 10_000  # requests in one gateway's queue: some seconds of a busy agent; beyond, the clients must know
MAX_WAITING_BYTES = 256 << 20  # of their bodies, so that large ones can't take the host's memory
MAX_WAITING_PER_PEER = 1_000  # requests of one client: it can't fill the queue for the others
SHARE_UNIT = 1_000_000  # shares are counted in millionths, so that no rounding adds up


class Waiter(Protocol):
    @property
    def peer(self) -> Hashable: ...
    @property
    def size(self) -> int: ...


W = TypeVar("W", bound=Waiter)


class WaitingLine(Generic[W]):
    """First come, first served per peer; peers take turns, so that one with many requests delays no other."""

    def __init__(self) -> None:
        self._peers: OrderedDict[Hashable, deque[W]] = OrderedDict()
        self.count = 0
        self.bytes = 0

    def add(self, waiter: W) -> bool:
        """False if there is no room for it."""
        if self.count >= MAX_WAITING or self.bytes + waiter.size > MAX_WAITING_BYTES:
            return False
        line = self._peers.get(waiter.peer)
        if line is None:
            line = self._peers[waiter.peer] = deque()
        elif len(line) >= MAX_WAITING_PER_PEER:
            return False
        line.append(waiter)
        self.count += 1
        self.bytes += waiter.size
        return True

    def put_back(self, waiter: W) -> None:
        """To the very front: it was taken before, and has waited already. Never refused."""
        line = self._peers.setdefault(waiter.peer, deque())
        line.appendleft(waiter)
        self._peers.move_to_end(waiter.peer, last=False)
        self.count += 1
        self.bytes += waiter.size

    def take(self) -> W:
        """The next one. KeyError if nobody waits."""
        peer, line = self._peers.popitem(last=False)
        waiter = line.popleft()
        if line:
            self._peers[peer] = line
        self.count -= 1
        self.bytes -= waiter.size
        return waiter

    def remove(self, waiter: W) -> None:
        """Take it out of the line; ValueError or KeyError if it isn't in it. Cheap for the one that came first."""
        line = self._peers[waiter.peer]
        line.remove(waiter)
        if not line:
            del self._peers[waiter.peer]
        self.count -= 1
        self.bytes -= waiter.size


class Shares:
    """Smooth weighted round-robin: of any ten picks at a share of 0.1, exactly one, and never two in a row.

    `most` is the instance with the largest share (the first of equals): what another one can't take goes there.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._weights = {name: max(1, round(share * SHARE_UNIT)) for name, share in shares.items() if share > 0}
        self._total = sum(self._weights.values())
        self._credit = dict.fromkeys(self._weights, 0)
        self.most = max(self._weights, key=self._weights.__getitem__, default="")

    def pick(self) -> str:
        """Whose turn it is; it counts as taken. ValueError without any share."""
        credit = self._credit
        for name, weight in self._weights.items():
            credit[name] += weight
        chosen = max(credit, key=credit.__getitem__)
        credit[chosen] -= self._total
        return chosen
