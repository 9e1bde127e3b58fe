"""What travels on the telemetry plane besides batches: beats, and the request for what the plane remembers.

A request is one frame, sent on the connection that takes batches. Its answer is messages of `[page, topic, batch,
topic, batch, ...]`, or one of `[failed]`. A beat is `[BEAT_TOPIC, beat]` on the feed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from interlock.broker import wire
from interlock.broker.errors import WireError
from interlock.broker.fields import Number, Prefixes, Reason, says
from interlock.broker.protocol import SEE_REFUSALS
from interlock.broker.version import SPEAKS, WIRE_VERSION, Speaks, V, check, check_meets

BEAT_TOPIC = "beat/"
BEAT_S = 0.5  # seconds between beats
LINK_LOST_S = 1.5  # without a beat: 3 of them, so that a dead or half-open link is known within 2 s
BEAT_GAP_S = 0.01  # a beat comes at once for a new subscriber, but not more often than so for all of them
PAGE_BATCHES = 250  # of one page of an answer; building it takes some 10 ms
PAGE_BYTES = 4 << 20  # of one page: 10,000 readers that ask at once can't take all memory
MAX_PREFIXES = 64  # of one request


Why = Literal["invalid", "refused", "version"]
Unanswered = Annotated[Why, says(SEE_REFUSALS)]


class AskLast(msgspec.Struct, frozen=True, tag_field="op", tag="last"):
    """Send what is remembered of all topics that start with one of the prefixes."""

    request: Number
    prefixes: Prefixes
    v: V = WIRE_VERSION


class Page(msgspec.Struct, frozen=True, tag_field="op", tag="page"):
    """A part of the answer; topics and batches follow, by turns."""

    request: Number
    page: Annotated[int, says("1, 2, ...")]
    more: Annotated[bool, says("another page follows")]


class AskFailed(msgspec.Struct, frozen=True, tag_field="op", tag="failed"):
    """A request that is not answered."""

    request: Number
    reason: Reason
    kind: Unanswered


class Beat(msgspec.Struct, frozen=True):
    """The pulse of the plane.

    The smallest difference of its clock to the reader's own is how the two stand; what a later beat has more is how
    long everything before it waited on its way.
    """

    beat: Annotated[int, says("1, 2, 3, ... since the plane started")]
    epoch: Annotated[int, says("the plane's start, nanoseconds since 1970")]
    clock: Annotated[float, says("seconds by a clock of the plane's that never jumps")]
    speaks: Speaks = SPEAKS


class _Asking(msgspec.Struct, frozen=True):
    """What every version has of a request."""

    request: int | None = None


_ask = msgspec.msgpack.Decoder(AskLast)
_asking = msgspec.msgpack.Decoder(_Asking)
_answer: msgspec.msgpack.Decoder[Page | AskFailed] = msgspec.msgpack.Decoder(Page | AskFailed)
_beat = msgspec.msgpack.Decoder(Beat)


def decode_ask(frame: bytes) -> AskLast:
    """WireError if it is none that can be answered, UnknownVersion for one of those."""
    ask = wire.decode(frame, _ask, what="request for last values")
    check(ask.v, "request for last values")
    if len(ask.prefixes) > MAX_PREFIXES:
        raise WireError(f"{len(ask.prefixes)} prefixes", hint=f"at most {MAX_PREFIXES}")
    return ask


def number_of(frame: bytes) -> int | None:
    """The number of a request that can't be read otherwise, if it has one."""
    try:
        return _asking.decode(frame).request
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None


def decode_answer(frames: Sequence[bytes]) -> tuple[Page | AskFailed, list[list[bytes]]]:
    """A page and its batches as `[topic, batch]` each, or why there is none."""
    if len(frames) % 2 == 0:
        raise WireError(f"a page has an odd number of frames, this has {len(frames)}")
    pairs = [list(pair) for pair in zip(frames[1::2], frames[2::2], strict=True)]
    return wire.decode(frames[0], _answer, what="page of last values"), pairs


def decode_beat(frames: Sequence[bytes]) -> Beat:
    """UnknownVersion if the broker speaks none of ours."""
    if len(frames) != 2:
        raise WireError(f"a beat has 2 frames, this has {len(frames)}")
    beat = wire.decode(frames[1], _beat, what="beat")
    check_meets(beat.speaks, "the broker")
    return beat
