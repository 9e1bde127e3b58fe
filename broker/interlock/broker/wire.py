"""Messages <-> MessagePack. Everything from the network passes through here once, and comes out typed or as WireError.

An event travels as three frames, `[topic, header, body]`; telemetry as two, `[topic, batch]`. Each frame but the topic
is one MessagePack map. The body's bytes are kept as they were sent, from the publisher through the log to every
subscriber, so that they can be hashed and signed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from interlock.broker.commands import Command
from interlock.broker.errors import WireError
from interlock.broker.facts import Fact
from interlock.broker.samples import Batch

MAX_FRAME = 1 << 20  # bytes: the largest frame anyone of ours sends is a report of some 10 kB
MAX_TOPIC = 256  # bytes
MAX_HEADER = 4096  # bytes, of an event as its publisher sends it: id and source of 256 characters take half of it
MAX_SIGNATURE = 64  # bytes: an Ed25519 signature

Body = Command | Fact


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Who said it and when, and where it stands in the log.

    id: chosen by the publisher, and what repeats are recognised by. time: seconds since 1970 by the publisher's clock.
    seq, prev and logged are the broker's: the number in the log, the number of the previous event *of the same topic*
    (so that a subscriber of any set of topics sees a hole), and when it was on disk. Of commands and rollbacks,
    expires: seconds since 1970 after which nobody acts on it; sig: the Ed25519 signature (see `signing.py`).
    """

    id: str
    source: str
    time: float
    seq: int = 0
    prev: int = 0
    logged: float = 0.0
    expires: float = 0.0
    sig: bytes = b""


class Event(msgspec.Struct, frozen=True):
    """A decoded event: `body` is one of the types of `commands.py` and `facts.py`; `raw` its bytes as sent."""

    topic: str
    header: Header
    body: Body
    raw: bytes


_encoder = msgspec.msgpack.Encoder()
_body_decoder: msgspec.msgpack.Decoder[Body] = msgspec.msgpack.Decoder(Body)
_header_decoder = msgspec.msgpack.Decoder(Header)
_batch_decoder = msgspec.msgpack.Decoder(Batch)

T = TypeVar("T")


def encode(message: Any) -> bytes:
    """One MessagePack map (structs become maps of their field names)."""
    return _encoder.encode(message)


def decode(frame: bytes, decoder: msgspec.msgpack.Decoder[T], *, what: str) -> T:
    """The frame as what the decoder is for; WireError for anything else, whatever it is."""
    if len(frame) > MAX_FRAME:
        raise WireError(f"{what} of {len(frame)} bytes", hint=f"at most {MAX_FRAME}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise WireError(f"not a {what}: {error or type(error).__name__}") from error


def decode_body(frame: bytes) -> Body:
    return decode(frame, _body_decoder, what="event body")


def decode_header(frame: bytes) -> Header:
    return decode(frame, _header_decoder, what="event header")


def decode_topic(frame: bytes) -> str:
    try:
        if len(frame) > MAX_TOPIC:
            raise WireError(f"topic of {len(frame)} bytes", hint=f"at most {MAX_TOPIC}")
        return frame.decode("ascii")
    except UnicodeDecodeError as error:
        raise WireError("topic is not ASCII") from error


def decode_event(frames: Sequence[bytes]) -> Event:
    """An event from its three frames; WireError if they are anything else."""
    if len(frames) != 3:
        raise WireError(f"an event has 3 frames, this has {len(frames)}")
    topic = decode_topic(frames[0])
    if len(frames[1]) > MAX_HEADER:
        raise WireError(f"event header of {len(frames[1])} bytes", hint=f"at most {MAX_HEADER}")
    header = decode_header(frames[1])
    if len(header.sig) > MAX_SIGNATURE:
        raise WireError(f"signature of {len(header.sig)} bytes", hint=f"at most {MAX_SIGNATURE}")
    return Event(topic, header, decode_body(frames[2]), frames[2])


def encode_event(event: Event) -> list[bytes]:
    return [event.topic.encode(), encode(event.header), event.raw]


def decode_batch(frames: Sequence[bytes]) -> Batch:
    """A telemetry batch from its two frames; WireError if they are anything else."""
    if len(frames) != 2:
        raise WireError(f"telemetry has 2 frames, this has {len(frames)}")
    decode_topic(frames[0])
    batch = decode(frames[1], _batch_decoder, what="telemetry batch")
    if len(batch.ids) != len(batch.values):
        raise WireError(f"{len(batch.ids)} ids but {len(batch.values)} values")
    return batch
