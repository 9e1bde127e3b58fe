"""Who is at a server's socket: which connection each message came on, whose it is, and how to end one.

`lines` keeps the account; here it meets what libzmq says, and the streams of the kernel.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Generic, NamedTuple, Protocol, TypeVar

import trio

from interlock.broker import streams
from interlock.broker.lines import UNKNOWN, Line, Lines

LINE = "Line"  # the number that the guard gave to a connection: ZAP hands it on to each message
PINGS = "X-Interlock-Pings"  # what our connecting sockets say (ZMTP metadata): how often they ping, in milliseconds
MAX_PINGS_MS = 60_000  # who pings less often is not watched
USER, DESCRIPTOR = "User-Id", "__fd"  # what libzmq says of each message, beside these two
MAX_FRAMES = 8  # of a message to a server; ours have up to 5. What comes beyond is dropped unread
SHORT = 255 - 33  # bytes of the longest frame that CURVE and ZMTP send with 35 bytes around it; a longer one has 42

Message = TypeVar("Message")


class Happening(enum.Enum):
    """What libzmq tells of a socket's streams, each with a descriptor."""

    ACCEPTED = enum.auto()
    JOINED = enum.auto()  # its handshake is done
    ENDED = enum.auto()


class Judge(Protocol):
    """Who decides about connections."""

    def abused(self, line: Line, why: str) -> None:
        """It did what no client of anybody's does."""


class Ask(NamedTuple):
    """May a line have this subscription, or end it (`may`), and how to do so (`apply`)."""

    may: Callable[[Line, bytes], bool]
    apply: Callable[[bytes], None]


def _seconds(said: str) -> float:
    """Between pings; 0 where nothing that can be followed is said."""
    if not (said.isascii() and said.isdigit() and len(said) <= len(str(MAX_PINGS_MS))):
        return 0.0
    return min(int(said), MAX_PINGS_MS) / 1000


class Connections(Generic[Message]):
    """Those of one socket. `told`: what happened since it was last asked; `of`: a property of a message ("": none).

    kernel_watches: TCP itself finds out who is dead.
    """

    def __init__(
        self,
        name: bytes,
        told: Callable[[], Iterable[tuple[Happening, int]]],
        of: Callable[[Message, str], str],
        handshake_s: float,
        *,
        kernel_watches: bool = False,
    ) -> None:
        self.name = name  # what ZAP calls the socket
        self.handshake_s = handshake_s  # within which one ends
        self.kernel_watches = kernel_watches
        self.lines = Lines()
        self.talked: set[Line] = set()  # lines that something came from, since somebody emptied it
        self.judge: Judge | None = None
        self._told = told
        self._of = of

    def look(self) -> None:
        """Learn which connections have begun and ended."""
        for what, value in self._told():
            match what:
                case Happening.ACCEPTED:
                    self.lines.accepted(value, trio.current_time())
                case Happening.ENDED:
                    self.lines.end(value)
                case Happening.JOINED:  # what it says first tells more
                    pass

    # --- messages

    def sender(self, message: Message, frames: list[bytes], now: float) -> str | None:
        """Whose message it is, the first of `frames` being its route. None if it is to be left alone."""
        line = self.lines.find(self._of(message, LINE))
        if line is None:  # it has ended
            return self._of(message, USER)
        if line.descriptor == UNKNOWN:
            known = self._hear(line, message)
            if line.condemned or frames[1:] == [b""]:  # so our clients say that they are there
                return None
            if not known:
                return line.user
        line.heard = now
        for frame in frames:
            size = len(frame)
            line.taken += size + (35 if size <= SHORT else 42)
        self.talked.add(line)
        if len(frames) > MAX_FRAMES and self.judge is not None:
            self.judge.abused(line, f"sends a message of more than {MAX_FRAMES} frames")
        return None if line.condemned else line.user

    def _hear(self, line: Line, message: Message) -> bool:
        """The first message of a line, which says which stream it is. False if that has ended."""
        self.look()
        if not self.lines.bind(line, int(self._of(message, DESCRIPTOR))):
            return False
        line.pings_s = _seconds(self._of(message, PINGS))
        self.talked.add(line)
        if line.condemned:
            self.cut_line(line)
        return True

    def subscription(self, message: Message, frames: list[bytes], now: float, ask: Ask, *, in_step: bool) -> bool:
        """Take one message of an XPUB. False: its queues are out of step now.

        libzmq queues what it reads and, of subscriptions only, whose they are; each receive takes one of both. So a
        message of another kind makes it grant the subscriptions behind it to others, until both queues are empty.
        Nothing is granted or ended meanwhile, and who asked for it is cut: it will come back and ask again.
        """
        fits = len(frames) == 1 and frames[0][:1] in (b"\0", b"\1")
        line = self.lines.find(self._of(message, LINE))
        if line is not None and line.descriptor == UNKNOWN:
            self._hear(line, message)
        # Who has ended gets nothing: what libzmq would grant it to may be another's pipe by now, at the same address.
        self.look()
        if line is None or line.ended:  # or it is what an XPUB makes up itself when a connection has ended
            return in_step and fits
        line.heard = now
        line.taken += 42 + len(frames[0])
        self.talked.add(line)
        if not fits and self.judge is not None:
            self.judge.abused(line, "sends what is not a subscription")
        if not fits or not in_step:
            self.cut_line(line)
            return False
        granted = not line.condemned and ask.may(line, frames[0])
        if granted or frames[0][:1] == b"\0":
            ask.apply(frames[0])
        return True

    # --- ends

    def cut(self, user: str) -> int:
        """Break all connections of the user; returns how many. Others notice nothing.

        One that has said nothing is sent nothing, and is broken as soon as it says something.
        """
        return sum(map(self.cut_line, self.lines.of(user)))

    def cut_line(self, line: Line) -> bool:
        """Break one connection: nothing that comes from it counts from now on."""
        line.condemned = True
        with suppress(OSError), streams.copied(line.descriptor) as stream:
            self.look()  # unless it ended before there was a copy, the copy is of it
            if not line.ended:
                streams.end(stream)
                return True
        return False

    def cut_stranger(self, descriptor: int, since: float) -> str | None:
        """Break a connection that has said nothing since it was opened; returns where it came from. None: it has."""
        with suppress(OSError), streams.copied(descriptor) as stream:
            self.look()
            if self.lines.is_stranger(descriptor, since):
                address = streams.address(stream)
                streams.end(stream)
                return address
        return None
