"""The connections of a server's socket: whose each is, and which stream of the kernel. Pure: the time is an argument.

libzmq tells three things, each without the others: it accepted a stream (a descriptor), a key asks to connect (ZAP),
a connection says something. A line gets its number when its key is let in; ZAP hands that on to each of its messages,
and the first of them names the descriptor. Ends name a descriptor only, and descriptors are used again at once. What is
exact all the same: whoever says something was open when it was let in, so that an end of its descriptor after that is
its own end, and one before is not. Hence `let_in` and `bind` must come after all accepts and ends that have happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

UNKNOWN = -1  # the descriptor of a line that has not said anything


class Line:
    """One connection of a proved key."""

    __slots__ = (
        "condemned", "descriptor", "ended", "heard", "let_in", "mark", "number", "pings_s", "prefixes", "taken", "user",
    )  # fmt: skip

    def __init__(self, number: int, user: str, mark: int, now: float) -> None:
        self.number = str(number)
        self.user = user
        self.let_in = now
        self.mark = mark  # how many accepts and ends came before
        self.descriptor = UNKNOWN
        self.heard = now  # when its last message was taken
        self.taken = 0  # bytes of it that were taken, as they came over the wire
        self.pings_s = 0.0  # it pings so often, and may be given up when it does not; 0: nobody knows
        self.prefixes: set[bytes] = set()
        self.condemned = False  # nothing of it counts any more
        self.ended = False


class Lines:
    """What is known of one socket's connections."""

    def __init__(self) -> None:
        self._events = 0
        self._numbers = 0
        self._ends: dict[int, int] = {}  # descriptor -> the number of its last end among all events
        self._strangers: dict[int, float] = {}  # streams that have said nothing -> since when, the oldest first
        self._numbered: dict[str, Line] = {}
        self._unheard: dict[str, Line] = {}  # of these, who has said nothing, the oldest first
        self._bound: dict[int, Line] = {}
        self._users: dict[str, dict[str, Line]] = {}

    # --- what libzmq says

    def accepted(self, descriptor: int, now: float) -> None:
        """A stream was opened: whoever had this descriptor before has ended."""
        self.end(descriptor)
        self._strangers[descriptor] = now

    def end(self, descriptor: int) -> None:
        """The stream with this descriptor was closed."""
        self._events += 1
        self._ends[descriptor] = self._events
        self._strangers.pop(descriptor, None)
        line = self._bound.get(descriptor)
        if line is not None:
            self._forget(line)

    def let_in(self, user: str, now: float) -> Line:
        """A connection of this key may go on."""
        self._numbers += 1
        line = Line(self._numbers, user, self._events, now)
        self._numbered[line.number] = self._unheard[line.number] = line
        self._users.setdefault(user, {})[line.number] = line
        return line

    def bind(self, line: Line, descriptor: int) -> bool:
        """Its first message came on this descriptor. False if it has ended since."""
        if self._ends.get(descriptor, 0) > line.mark:
            self._forget(line)
            return False
        line.descriptor = descriptor
        self._unheard.pop(line.number, None)
        self._strangers.pop(descriptor, None)
        self._bound[descriptor] = line
        return True

    def _forget(self, line: Line) -> None:
        line.ended = True
        self._numbered.pop(line.number, None)
        self._unheard.pop(line.number, None)
        if self._bound.get(line.descriptor) is line:
            del self._bound[line.descriptor]
        mine = self._users.get(line.user, {})
        mine.pop(line.number, None)
        if not mine:
            self._users.pop(line.user, None)

    # --- what is known

    def find(self, number: str) -> Line | None:
        return self._numbered.get(number)

    def of(self, user: str) -> list[Line]:
        """The lines of one key, with those that have not said anything."""
        return list(self._users.get(user, {}).values())

    def bound(self) -> list[Line]:
        """The lines that have said something, of everybody."""
        return list(self._bound.values())

    @property
    def heard(self) -> int:
        """How many lines have said something."""
        return len(self._bound)

    @property
    def open(self) -> int:
        """Streams that are open."""
        return len(self._bound) + len(self._strangers)

    def is_stranger(self, descriptor: int, since: float) -> bool:
        return self._strangers.get(descriptor) == since

    def strangers(self, before: float = float("inf")) -> Iterator[tuple[int, float]]:
        """Streams that opened before this time and have said nothing: descriptor and since when, the oldest first."""
        return takewhile(lambda found: found[1] < before, list(self._strangers.items()))

    def forget_unheard(self, before: float) -> None:
        """Forget lines that were let in before this time and said nothing: their streams are gone, or strangers."""
        for line in list(takewhile(lambda line: line.let_in < before, self._unheard.values())):
            self._forget(line)
