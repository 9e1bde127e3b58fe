"""Messages <-> MessagePack. Everything from the network passes through here once, and comes out typed or as WireError.

An event travels as three frames, `[topic, header, body]`; telemetry as two, `[topic, batch]`. Each frame but the topic
is one MessagePack map. The body's bytes are kept as they were sent, from the publisher through the log to every
subscriber, so that they can be hashed and signed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_args

import msgspec

from interlock.broker.commands import Command
from interlock.broker.errors import WireError
from interlock.broker.facts import Fact
from interlock.broker.fields import says
from interlock.broker.samples import Batch
from interlock.broker.version import WIRE_VERSION, V, check, check_frame

MAX_FRAME = 1 << 20  # bytes: the largest frame anyone of ours sends is a report of some 10 kB
MAX_TOPIC = 256  # bytes
MAX_WHY = 200  # characters of what is wrong with a frame: msgspec quotes it
MAX_NESTING = 16  # maps and lists inside each other in evidence; ours has 4, and what copies or prints it recurses

Body = Command | Fact


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Who said it and when, and where it stands in the log: seq, prev and logged are filled in by the broker."""

    v: V = WIRE_VERSION
    id: Annotated[str, says("chosen by the publisher, unique for ever: what repeats are recognised by")]
    source: Annotated[str, says("the publisher's identity, such as host/alpha")]
    time: Annotated[float, says("seconds since 1970 by the publisher's clock")]
    seq: Annotated[int, says("the number in the log: 1, 2, 3, ...")] = 0
    prev: Annotated[int, says("the number of the previous event of the same topic, 0 for none")] = 0
    logged: Annotated[float, says("when it was on disk, seconds since 1970")] = 0.0
    expires: Annotated[float, says("commands and rollbacks: seconds since 1970 after which nobody acts on it")] = 0.0
    sig: Annotated[bytes, says("commands and rollbacks: the Ed25519 signature")] = b""


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


def _is_open(kind: Any) -> bool:
    """A field in which a sender may say anything: a plain map, whatever is annotated to it."""
    while hasattr(kind, "__metadata__"):
        kind = kind.__origin__
    return bool(kind == dict[str, Any])


_OPEN = {
    kind: [field.name for field in msgspec.structs.fields(kind) if _is_open(field.type)] for kind in get_args(Body)
}

_PLAIN = (str, int, float, type(None))  # bool is an int

T = TypeVar("T")


def encode(message: Any) -> bytes:
    """One MessagePack map (structs become maps of their field names)."""
    return _encoder.encode(message)


def decode(frame: bytes, decoder: msgspec.msgpack.Decoder[T], *, what: str) -> T:
    """The frame as what the decoder is for; WireError for anything else, whatever it is.

    UnknownVersion if it can't be read and is of a version unknown here. What can be read is the caller's to judge.
    """
    if len(frame) > MAX_FRAME:
        raise WireError(f"{what} of {len(frame)} bytes", hint=f"at most {MAX_FRAME}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        check_frame(frame, what)
        raise WireError(f"not a {what}: {_line(str(error)) or type(error).__name__}") from error


def _line(text: str) -> str:
    """What a peer's bytes may say in a log or at a terminal: one line, and no control characters."""
    return "".join(each if each.isprintable() else "?" for each in text[:MAX_WHY])


def decode_body(frame: bytes) -> Body:
    body = decode(frame, _body_decoder, what="event body")
    for name in _OPEN[type(body)]:
        _check_plain(getattr(body, name), name)
    return body


def _check_plain(value: Any, name: str) -> None:
    """What JSON can say too, and not nested without end: evidence is folded, copied and printed wherever it comes."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise WireError(f"{name} is nested too deeply", hint=f"at most {MAX_NESTING} maps and lists")
        below: list[Any] = []
        for found in level:
            if isinstance(found, dict):
                if not all(type(key) is str for key in found):
                    raise WireError(f"a key in {name} is no text")
                below += found.values()
            elif isinstance(found, list):
                below += found
            elif not isinstance(found, _PLAIN):
                raise WireError(f"{name} has a {type(found).__name__}, which JSON can't say")
        level = below


def decode_header(frame: bytes) -> Header:
    return decode(frame, _header_decoder, what="event header")


def decode_topic(frame: bytes) -> str:
    try:
        if len(frame) > MAX_TOPIC:
            raise WireError(f"topic of {len(frame)} bytes", hint=f"at most {MAX_TOPIC}")
        topic = frame.decode("ascii")
    except UnicodeDecodeError as error:
        raise WireError("topic is not ASCII") from error
    if not topic.isprintable():
        raise WireError(f"{topic!r} is not a topic", hint="it has control characters")
    return topic


def decode_event(frames: Sequence[bytes]) -> Event:
    """An event from its three frames; WireError if they are anything else, UnknownVersion for one of those."""
    if len(frames) != 3:
        raise WireError(f"an event has 3 frames, this has {len(frames)}")
    topic, header = decode_topic(frames[0]), decode_header(frames[1])
    check(header.v, "an event")
    return Event(topic, header, decode_body(frames[2]), frames[2])


def encode_event(event: Event) -> list[bytes]:
    return [event.topic.encode(), encode(event.header), event.raw]


def decode_batch(frames: Sequence[bytes]) -> Batch:
    """A telemetry batch from its two frames; WireError if they are anything else, UnknownVersion for one of those."""
    if len(frames) != 2:
        raise WireError(f"telemetry has 2 frames, this has {len(frames)}")
    decode_topic(frames[0])
    batch = decode(frames[1], _batch_decoder, what="telemetry batch")
    check(batch.v, "a batch")
    if len(batch.ids) != len(batch.values):
        raise WireError(f"{len(batch.ids)} ids but {len(batch.values)} values")
    return batch
