"""State on its way from one process to another, in numbered pieces. Pure: the time is an argument.

The receiver asks for pieces by number, a few ahead (`Incoming.asks`): what it has not asked for is not sent, so that
neither side ever holds more than `WINDOW` of them. A piece that does not come is asked for again; one that comes twice,
or before its turn, does no harm. Each piece carries its sha256, and the end that of everything: what differs is an
error, never passed on. The sender keeps the last `WINDOW` pieces, which may be asked for again, and no others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

from interlock.broker.errors import InterlockError

PIECE = 256 << 10  # bytes: a quarter of what a control socket takes at once
WINDOW = 4  # pieces asked for ahead: 1 MiB is under way, which fills 100 MB/s at 10 ms
AGAIN_S = 1.0  # a piece that was asked for and has not come is asked for again; a busy process answers within that
MAX_BYTES = 1 << 40  # of one state: a count beyond is a mistake


class TransferError(InterlockError):
    """State did not arrive as it was sent: a wrong checksum, a number out of turn, a sender that gave up."""


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    data: bytes
    sha256: bytes
    whole: bool = False  # as of End


class End(msgspec.Struct, frozen=True, kw_only=True):
    """After the last piece. whole: it was one value, not a stream of parts, and is to be handed on as one."""

    pieces: int
    size: int  # bytes
    sha256: bytes
    whole: bool = False


class Outgoing:
    """The sender's side: `add` what there is, in pieces of at most PIECE bytes; `get` answers who asks."""

    def __init__(self) -> None:
        self.next = 0  # number of the piece that is added next
        self.end: End | None = None
        self._kept: dict[int, Piece] = {}
        self._digest = hashlib.sha256()
        self._bytes = 0

    def add(self, data: bytes) -> None:
        self._digest.update(data)
        self._bytes += len(data)
        self._kept[self.next] = Piece(number=self.next, data=data, sha256=hashlib.sha256(data).digest())
        self._kept.pop(self.next - WINDOW, None)
        self.next += 1

    def finish(self, *, whole: bool = False) -> None:
        self.end = End(pieces=self.next, size=self._bytes, sha256=self._digest.digest(), whole=whole)

    def wants(self, number: int) -> bool:
        """More must be added, or the end said, before this number can be answered."""
        return self.end is None and number >= self.next

    def get(self, number: int) -> Piece | End:
        """Piece `number`, or the end if there is none. TransferError if it is not kept any more, or not there yet."""
        if self.end is not None and number >= self.end.pieces:
            return self.end
        found = self._kept.get(number)
        if found is None:
            raise TransferError(f"piece {number} is not at hand: the next one is {self.next}")
        return found


class Incoming:
    """The receiver's side: `asks` says what to ask for now, `take` gives back what can be passed on, in order."""

    def __init__(self) -> None:
        self.next = 0  # number of the piece that is passed on next
        self.bytes = 0
        self.end: End | None = None
        self._early: dict[int, bytes] = {}
        self._asked: dict[int, float] = {}  # number -> when
        self._digest = hashlib.sha256()

    @property
    def complete(self) -> bool:
        """All of it was passed on, and is what was sent."""
        return self.end is not None and self.next == self.end.pieces

    @property
    def sha256(self) -> bytes:
        """Of all that was passed on."""
        return self._digest.digest()

    def asks(self, now: float) -> list[int]:
        """Numbers to ask for at this moment (seconds, any monotone clock); it counts as done."""
        if self.complete:
            return []
        last = self.next + WINDOW if self.end is None else min(self.next + WINDOW, self.end.pieces)
        due = [
            number for number in range(self.next, last)
            if number not in self._early and now - self._asked.get(number, float("-inf")) >= AGAIN_S
        ]  # fmt: skip
        self._asked.update(dict.fromkeys(due, now))
        return due

    def deadline(self) -> float:
        """When `asks` should be asked again if nothing comes."""
        waited = [at for number, at in self._asked.items() if number >= self.next and number not in self._early]
        return min(waited, default=float("inf")) + AGAIN_S

    def take(self, came: Piece | End) -> list[bytes]:
        """What can be passed on now. TransferError if it is not what was sent; then nothing of it may be used."""
        if isinstance(came, End):
            return self._take_end(came)
        if came.number < self.next or came.number in self._early:
            return []  # a second time
        if came.number >= self.next + WINDOW:
            raise TransferError(f"piece {came.number} was not asked for: the next one is {self.next}")
        if self.end is not None and came.number >= self.end.pieces:
            raise TransferError(f"piece {came.number} comes after the end, of {self.end.pieces} pieces")
        if len(came.data) > PIECE or not came.data:
            raise TransferError(f"piece {came.number} has {len(came.data)} bytes, it must have 1 to {PIECE}")
        if hashlib.sha256(came.data).digest() != came.sha256:
            raise TransferError(f"the checksum of piece {came.number} is wrong")
        self._early[came.number] = came.data
        return list(self._in_order())

    def _in_order(self) -> Iterator[bytes]:
        while (data := self._early.pop(self.next, None)) is not None:
            self._asked.pop(self.next, None)
            self.next += 1
            self.bytes += len(data)
            if self.bytes > MAX_BYTES:
                raise TransferError(f"it has more than {MAX_BYTES} bytes")
            self._digest.update(data)
            yield data
        self._check_whole()

    def _take_end(self, came: End) -> list[bytes]:
        if self.end is not None and self.end != came:
            raise TransferError("it ended twice, in different ways")
        if came.pieces < self.next + len(self._early) or came.pieces < 0:
            raise TransferError(f"it ends after {came.pieces} pieces, and more have come")
        self.end = came
        self._check_whole()
        return []

    def _check_whole(self) -> None:
        if self.end is None or self.next < self.end.pieces:
            return
        if (self.bytes, self.sha256) != (self.end.size, self.end.sha256):
            raise TransferError("the checksum of the whole is wrong")


def parts(data: bytes) -> Iterator[bytes]:
    """Bytes of any length, cut to pieces."""
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]
