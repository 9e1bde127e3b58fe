"""What two hosts say to each other about an agent that moves between them. Each message is one frame of MessagePack.

A link is one DEALER of the host that asks, and the ROUTER of the other one. It has sessions: one begins with `Hello`,
and ends when a message is missing, or nothing comes. Within a session nothing is lost and nothing is out of order; with
it end all its streams and questions.
"""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.broker import wire
from interlock.broker.errors import WireError
from interlock.broker.version import WIRE_VERSION

CHUNK = 64 << 10  # bytes of a stream in one message
WINDOW = 256 << 10  # bytes of a stream that may be under way: 25 MB/s at 10 ms, and no more than that is ever kept
MAX_STREAMS = 2048  # at once in a session: connections of clients of all guests
MAX_ASKS = 256  # questions at once


class _Part(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class Hello(_Part, frozen=True):
    """The first of a session, by who dials; the other answers with the same."""

    session: str
    host: str
    v: int = WIRE_VERSION


class Ping(_Part, frozen=True):
    pass


class Question(_Part, frozen=True):
    """`what` stands in `guest_protocol.py`."""

    number: int
    what: str
    about: dict[str, Any]


class Answer(_Part, frozen=True):
    number: int
    ok: bool
    reason: str
    about: dict[str, Any]


class Open(_Part, frozen=True):
    """A stream to `port` of `whom`: an instance, or an agent."""

    stream: int
    whom: str
    port: str


class Bytes(_Part, frozen=True):
    stream: int
    data: bytes


class Credit(_Part, frozen=True):
    """So many bytes of the stream were taken: so many more may come."""

    stream: int
    count: int


class Shut(_Part, frozen=True):
    """No more bytes come from here."""

    stream: int


class Reset(_Part, frozen=True):
    """The stream is over, both ways, whatever is under way."""

    stream: int


Message = Hello | Ping | Question | Answer | Open | Bytes | Credit | Shut | Reset
StreamMessage = Open | Bytes | Credit | Shut | Reset


class Numbered(msgspec.Struct, frozen=True, array_like=True):
    """A message with its number in the session, counted from 0 in each direction."""

    session: str
    number: int
    message: Message


_decoder = msgspec.msgpack.Decoder(Numbered)


def encode(session: str, number: int, message: Message) -> bytes:
    return wire.encode(Numbered(session, number, message))


def decode(frames: list[bytes]) -> Numbered:
    """WireError for what is no such message."""
    if len(frames) != 1:
        raise WireError(f"a message between hosts is one frame, this has {len(frames)}")
    found = wire.decode(frames[0], _decoder, what="message between hosts")
    data = found.message
    if isinstance(data, Bytes) and not 0 < len(data.data) <= CHUNK:
        raise WireError(f"{len(data.data)} bytes of a stream in one message", hint=f"1 to {CHUNK}")
    if isinstance(data, Credit) and not 0 < data.count <= WINDOW:
        raise WireError(f"a credit of {data.count} bytes", hint=f"1 to {WINDOW}")
    return found
