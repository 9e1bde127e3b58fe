"""Events on their way to the log: in order, repeated until acknowledged. Pure: the time is an argument.

This one lives in memory. One on disk needs the same methods, and `add` that returns once the event is on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import msgspec

from interlock.broker.protocol import Nack, Publish

WINDOW = 64  # events sent and not acknowledged: one commit of the log takes as many, more would only queue there
ACK_TIMEOUT_S = 1.0  # without an ack, ask whether the broker lives: a commit takes 10 ms, on a slow disk 100
ORDER_PAUSE_S = 0.05  # before repeating after a hole: what was under way then is refused meanwhile
LOG_PAUSE_S = 1.0  # before repeating after the broker could not write: it needs an operator anyway


class Entry(msgspec.Struct, frozen=True):
    id: str
    frames: list[bytes]  # topic, header, body


class Outbox:
    """Entries in the order they were added. What is sent stays until its ack."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._numbers: dict[str, int] = {}
        self._last = 0
        self._sent: set[str] = set()
        self._open: dict[str, int] = {}  # how often each was sent without being told that it is not in the log
        self._waiting_since = float("inf")  # the oldest unanswered sending
        self._hold_until: float | None = None
        self._doubtful = False

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: str) -> bool:
        return id in self._entries

    def ids(self) -> list[str]:
        return list(self._entries)

    def add(self, entry: Entry) -> None:
        if entry.id not in self._entries:
            self._last += 1
            self._entries[entry.id] = entry
            self._numbers[entry.id] = self._last

    def due(self, now: float) -> Iterator[tuple[Publish, Entry]]:
        """What to send now; tell `sent` of each that was."""
        if self._doubtful or (self._hold_until is not None and now < self._hold_until):
            return
        self._hold_until = None
        oldest = 0
        for entry in list(islice(self._entries.values(), WINDOW)):
            number = self._numbers[entry.id]
            oldest = oldest or number
            if entry.id not in self._sent:
                yield Publish(n=number, oldest=oldest), entry

    def sent(self, id: str, now: float) -> None:
        if not self._sent:
            self._waiting_since = now
        self._sent.add(id)
        self._open[id] = self._open.get(id, 0) + 1

    def acked(self, id: str, now: float) -> bool:
        """The event is in the log. False if it is none of ours (any more)."""
        return self.withdraw(id, now)

    def in_doubt(self, nack: Nack) -> bool:
        """Whether the event may be in the log although it was refused: an earlier attempt was not answered, or this
        one failed late. To be asked before `nacked`.
        """
        return self._open.get(nack.id, 0) + nack.unsure > 1

    def nacked(self, nack: Nack, now: float) -> bool:
        """True if the event is given up: asking again would not help."""
        if nack.id in self._open and not nack.unsure:
            self._open[nack.id] -= 1
        if nack.kind in ("order", "log", "version"):  # another version understands it once somebody has updated
            if nack.id in self._entries:
                pause = ORDER_PAUSE_S if nack.kind == "order" else LOG_PAUSE_S
                self._hold_until = max(self._hold_until or 0.0, now + pause)
                self._sent.clear()
                self._waiting_since = float("inf")
            return False
        return self.withdraw(nack.id, now)

    def withdraw(self, id: str, now: float) -> bool:
        if self._entries.pop(id, None) is None:
            return False
        del self._numbers[id]
        self._sent.discard(id)
        self._open.pop(id, None)
        self._waiting_since = now if self._sent else float("inf")
        return True

    def heard(self) -> None:
        """The broker said something after a silence: repeat all that it has not acknowledged."""
        if self._doubtful:
            self._doubtful = False
            self._sent.clear()
            self._waiting_since = float("inf")

    def tick(self, now: float) -> bool:
        """True if the broker should be asked for a sign of life: nothing was acknowledged for ACK_TIMEOUT_S."""
        if now - self._waiting_since < ACK_TIMEOUT_S:
            return False
        self._doubtful = True
        self._waiting_since = now
        return True

    def deadline(self) -> float:
        return min(self._waiting_since + ACK_TIMEOUT_S, float("inf") if self._hold_until is None else self._hold_until)
