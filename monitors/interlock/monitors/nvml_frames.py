"""What supervisor and sampler say to each other through two pipes: MessagePack arrays, each behind its length."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

LENGTH = struct.Struct("=I")
MAX_FRAME = 1 << 20  # bytes: 16 cards with 100 processes each are 40 kB

HOT, CALM, SLOW = 1, 2, 4  # bits of `scope`


class _Frame(msgspec.Struct, array_like=True, frozen=True, tag=True, tag_field="frame", gc=False):
    pass


# --- to the sampler


class Poll(_Frame, frozen=True):
    """Read these tiers of every card."""

    tick: int
    scope: int


# --- from the sampler


class Found(msgspec.Struct, array_like=True, frozen=True):
    """A card at the start. `code`: NVML's error where it can't be had (0: it can)."""

    index: int
    uuid: str
    name: str
    bus: str
    code: int = 0
    text: str = ""


class Opened(_Frame, frozen=True):
    """The library answers."""

    driver: str
    cards: list[Found]


class Failed(_Frame, frozen=True):
    """The library does not answer, or no longer; the sampler ends. `code`: NVML's error."""

    code: int
    text: str


class Table(_Frame, frozen=True):
    """The keys of the values of one card in one scope, from now on under this number. `lacking`: reading -> reason."""

    number: int
    keys: list[str]


class Lacking(_Frame, frozen=True):
    """The readings that a card does not give: all of them, by why."""

    index: int
    readings: dict[str, str]


class CardRead(msgspec.Struct, array_like=True, frozen=True):
    """`processes`: pid -> (bytes, or -1 where it is not told; share of time), where they were asked for.

    missing: readings that failed this time only. code, text: NVML's error, if the card as a whole failed.
    """

    index: int
    time: float
    seconds: float
    scope: int
    table: int
    values: list[float]
    processes: dict[int, tuple[int, float]] | None = None
    missing: int = 0
    code: int = 0
    text: str = ""


class Read(_Frame, frozen=True):
    """What was read for a poll: all that is left of it if `last`."""

    tick: int
    last: bool
    cards: list[CardRead]


class Happened(_Frame, frozen=True):
    """A card's own event: NVML's type and data (of an XID its number), taken at `time` (seconds since 1970)."""

    index: int
    type: int
    data: int
    time: float


ToSampler = Poll
FromSampler = Opened | Failed | Table | Lacking | Read | Happened

_encoder = msgspec.msgpack.Encoder()


def pack(frame: ToSampler | FromSampler) -> bytes:
    raw = _encoder.encode(frame)
    return LENGTH.pack(len(raw)) + raw


class Unpacker:
    """Frames out of the bytes of a pipe, in whatever pieces they come. ValueError for what is no frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._decoder = msgspec.msgpack.Decoder(FromSampler)

    def feed(self, piece: bytes) -> Iterator[FromSampler]:
        self._buffer += piece
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes")
            end = LENGTH.size + length
            if len(self._buffer) < end:
                return
            raw = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            try:
                yield self._decoder.decode(raw)
            except msgspec.DecodeError as error:
                raise ValueError(str(error)) from None
