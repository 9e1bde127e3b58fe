"""Many streams of bytes in one session between two hosts: one side of it. Pure: messages in, messages out.

Each direction of a stream has a credit, and nothing is sent beyond it: who takes slowly slows down who sends, and
nobody else. An end of one direction is passed on by itself. What breaks the rules breaks the session (`TunnelBroken`),
and with it all streams: an end that lost its bytes is never taken for an orderly one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from interlock.agents.link_protocol import MAX_STREAMS, WINDOW, Bytes, Credit, Open, Reset, Shut, StreamMessage
from interlock.broker.errors import InterlockError


class TunnelBroken(InterlockError):
    """The other side broke the rules of the session: nothing of it is to be relied on."""


class Phase(StrEnum):
    OPEN = "open"
    SHUT_HERE = "shut-here"  # we send no more
    SHUT_THERE = "shut-there"  # the other side sends no more
    CLOSED = "closed"


class Sign(StrEnum):
    SHUT = "shut"  # we say that we send no more
    ENDED = "ended"  # the other side says so
    RESET = "reset"  # either says that it is over


TRANSITIONS: dict[tuple[Phase, Sign], Phase] = {
    (Phase.OPEN, Sign.SHUT): Phase.SHUT_HERE,
    (Phase.OPEN, Sign.ENDED): Phase.SHUT_THERE,
    (Phase.SHUT_HERE, Sign.ENDED): Phase.CLOSED,
    (Phase.SHUT_THERE, Sign.SHUT): Phase.CLOSED,
    (Phase.OPEN, Sign.RESET): Phase.CLOSED,
    (Phase.SHUT_HERE, Sign.RESET): Phase.CLOSED,
    (Phase.SHUT_THERE, Sign.RESET): Phase.CLOSED,
}


@dataclass
class _Stream:
    phase: Phase = Phase.OPEN
    credit: int = WINDOW  # bytes that may still be sent
    allowed: int = WINDOW  # bytes that may still come
    taken: int = 0  # of what came: not credited yet


class Tunnel:
    """The streams of a session. Who dials gives even numbers, the other odd ones."""

    def __init__(self, *, dials: bool) -> None:
        self._dials = dials
        self._next = 0 if dials else 1
        self._newest = -1  # of the other side's
        self._streams: dict[int, _Stream] = {}

    def has(self, number: int) -> bool:
        """Whether the stream is open, one way at least."""
        return number in self._streams

    # --- what we do

    def open(self, whom: str, port: str) -> Open:
        """TunnelBroken if there are too many already."""
        if len(self._streams) >= MAX_STREAMS:
            raise TunnelBroken(f"{MAX_STREAMS} streams are open already")
        number, self._next = self._next, self._next + 2
        self._streams[number] = _Stream()
        return Open(number, whom, port)

    def room(self, number: int) -> int:
        """Bytes that may be sent now; 0 also of a stream that is over."""
        stream = self._streams.get(number)
        return stream.credit if stream is not None and stream.phase in (Phase.OPEN, Phase.SHUT_THERE) else 0

    def send(self, number: int, data: bytes) -> Bytes:
        """No more than `room`."""
        stream = self._streams[number]
        if not 0 < len(data) <= self.room(number):
            raise ValueError(f"{len(data)} bytes, there is room for {self.room(number)}")
        stream.credit -= len(data)
        return Bytes(number, data)

    def took(self, number: int, count: int) -> list[StreamMessage]:
        """So many bytes that came are passed on; they are credited by halves of the window."""
        stream = self._streams.get(number)
        if stream is None:
            return []
        stream.taken += count
        if stream.taken < WINDOW // 2 or stream.phase is Phase.SHUT_THERE:
            return []
        granted, stream.taken = stream.taken, 0
        stream.allowed += granted
        return [Credit(number, granted)]

    def shut(self, number: int) -> list[StreamMessage]:
        """We send no more."""
        return [Shut(number)] if self._turn(number, Sign.SHUT) else []

    def reset(self, number: int) -> list[StreamMessage]:
        return [Reset(number)] if self._turn(number, Sign.RESET) else []

    # --- what comes

    def take(self, message: StreamMessage) -> bool:
        """Whether it concerns a stream that is there: what is still on its way to one that is over does not.

        TunnelBroken.
        """
        if isinstance(message, Open):
            return self._opened(message)
        stream = self._streams.get(message.stream)
        if stream is None:
            if not self._was_there(message.stream):
                raise TunnelBroken(f"stream {message.stream} was never opened")
            return False
        match message:
            case Bytes(_, data):
                if stream.phase is Phase.SHUT_THERE or len(data) > stream.allowed:
                    raise TunnelBroken(f"stream {message.stream} has more bytes than it may")
                stream.allowed -= len(data)
            case Credit(_, count):
                stream.credit += count
                if stream.credit > WINDOW:
                    raise TunnelBroken(f"stream {message.stream} is credited what was never sent")
            case Shut():
                if not self._turn(message.stream, Sign.ENDED):
                    raise TunnelBroken(f"stream {message.stream} ends twice")
            case Reset():
                self._turn(message.stream, Sign.RESET)
        return True

    # --- inside

    def _opened(self, message: Open) -> bool:
        theirs = message.stream % 2 == (1 if self._dials else 0)
        if not theirs or message.stream <= self._newest:
            raise TunnelBroken(f"stream {message.stream} is not the other side's to open")
        self._newest = message.stream
        if len(self._streams) >= MAX_STREAMS:
            raise TunnelBroken(f"more than {MAX_STREAMS} streams")
        self._streams[message.stream] = _Stream()
        return True

    def _was_there(self, number: int) -> bool:
        ours = number % 2 == (0 if self._dials else 1)
        return 0 <= number < self._next if ours else 0 <= number <= self._newest

    def _turn(self, number: int, sign: Sign) -> bool:
        stream = self._streams.get(number)
        to = None if stream is None else TRANSITIONS.get((stream.phase, sign))
        if stream is None or to is None:
            return False
        stream.phase = to
        if to is Phase.CLOSED:
            del self._streams[number]
        return True
