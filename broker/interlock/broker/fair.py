"""What waits for something that all share: whoever asks for much waits for itself, not the others for it. Pure.

`Fair` is deficit round robin (Shreedhar and Varghese, 1995) over keys; within a key the order stays. Both classes bound
what a key may hold by what is left: never more than is free for all others. So one key alone gets half of the room, two
a third each, ten an eleventh, and there is room for one who comes later.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Lane(Generic[T]):
    def __init__(self) -> None:
        self.items: deque[tuple[T, int]] = deque()
        self.cost = 0
        self.credit = 0
        self.has_turn = False


class Fair(Generic[T]):
    """Items with their cost, by key. `items`, `cost`: of all that waits. `own`: items of one key, whatever is free.

    A key whose turn it is gives items until their cost has used up its credit, which grows by `quantum` each turn.
    """

    def __init__(self, *, items: int, cost: int, quantum: int, own: int | None = None) -> None:
        self._max_items, self._max_cost = items, cost
        self._quantum = quantum
        self._own = items if own is None else own
        self._lanes: OrderedDict[Hashable, _Lane[T]] = OrderedDict()  # those with items; the first one has its turn
        self._items = self._cost = 0

    def __len__(self) -> int:
        return self._items

    def put(self, key: Hashable, item: T, cost: int = 1) -> bool:
        """Whether there was room for it. `cost` is at least 1."""
        lane = self._lanes.get(key)
        held, spent = (len(lane.items), lane.cost) if lane is not None else (0, 0)
        if held >= min(self._own, self._max_items - self._items) or spent >= self._max_cost - self._cost:
            return False
        if lane is None:
            lane = self._lanes[key] = _Lane()
        lane.items.append((item, cost))
        lane.cost += cost
        self._items += 1
        self._cost += cost
        return True

    def take(self, items: int, cost: int, each: int | None = None) -> list[T]:
        """What is next: at most so many, of one key `each`, and no more once they cost so much; one if any waits."""
        taken: list[T] = []
        given: dict[Hashable, int] = {}
        served: set[Hashable] = set()  # those that have given `each`
        while len(served) < len(self._lanes) and len(taken) < items and cost > 0:
            key, lane = next(iter(self._lanes.items()))
            if given.get(key, 0) == each:
                served.add(key)
                lane.has_turn, lane.credit = False, min(lane.credit, self._quantum)
                self._lanes.move_to_end(key)
                continue
            if not lane.has_turn:
                lane.has_turn = True
                lane.credit += self._quantum
            item, price = lane.items[0]
            if price > lane.credit and len(self._lanes) > 1:
                lane.has_turn = False
                self._lanes.move_to_end(key)
                continue
            lane.credit = max(0, lane.credit - price)
            taken.append(item)
            given[key] = given.get(key, 0) + 1
            cost -= price
            lane.items.popleft()
            self._gone(key, lane, price)
        return taken

    def withdraw(self, key: Hashable, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out of a key's items those that are unwanted, in their order."""
        lane = self._lanes.get(key)
        if lane is None:
            return []
        waiting, lane.items = lane.items, deque()
        out: list[tuple[T, int]] = []
        for item, price in waiting:
            (out if unwanted(item) else lane.items).append((item, price))
        for _, price in out:
            self._gone(key, lane, price)
        return [item for item, _ in out]

    def _gone(self, key: Hashable, lane: _Lane[T], price: int) -> None:
        lane.cost -= price
        self._items -= 1
        self._cost -= price
        if not lane.items:
            self._lanes.pop(key, None)


class Unread:
    """Bytes that were sent and not read yet, by key. `own`: of one key, `total`: of all; the last page may pass both.

    Whether something was read is found out by asking: `add` takes a function that says so.
    """

    def __init__(self, *, own: int, total: int) -> None:
        self._own, self._total = own, total
        self._sum = 0
        self._keys: dict[Hashable, tuple[int, deque[tuple[int, Callable[[], bool]]]]] = {}

    def may(self, key: Hashable) -> bool:
        """Whether more may be sent to this key."""
        held = self._look(key)
        if held < min(self._own, self._total - self._sum):
            return True
        for other in list(self._keys):  # those who have read without asking for more
            self._look(other)
        return self._look(key) < min(self._own, self._total - self._sum)

    def add(self, key: Hashable, size: int, was_read: Callable[[], bool]) -> None:
        """So much was sent to it."""
        held, sent = self._keys.get(key, (0, deque()))
        sent.append((size, was_read))
        self._keys[key] = held + size, sent
        self._sum += size

    def _look(self, key: Hashable) -> int:
        held, sent = self._keys.get(key, (0, deque()))
        still = deque((size, was_read) for size, was_read in sent if not was_read())
        left = sum(size for size, _ in still)
        self._sum -= held - left
        if still:
            self._keys[key] = left, still
        else:
            self._keys.pop(key, None)
        return left
