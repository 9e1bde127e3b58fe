"""What travels on the telemetry plane besides batches: beats, and the request for what the plane remembers.

A request is one frame, sent on the connection that takes batches. Its answer is messages of `[page, topic, batch,
topic, batch, ...]`. A beat is `[BEAT_TOPIC, beat]` on the feed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from interlock.broker import wire
from interlock.broker.errors import WireError

BEAT_TOPIC = "beat/"
BEAT_S = 0.5  # seconds between beats
LINK_LOST_S = 1.5  # without a beat: 3 of them, so that a dead or half-open link is known within 2 s
BEAT_GAP_S = 0.01  # a beat comes at once for a new subscriber, but not more often than so for all of them
PAGE_BATCHES = 250  # of one page of an answer; building it takes some 10 ms
PAGE_BYTES = 4 << 20  # of one page: 10,000 readers that ask at once can't take all memory
MAX_PREFIXES = 64  # of one request


class AskLast(msgspec.Struct, frozen=True, tag_field="op", tag="last"):
    """Send what is remembered of all topics that start with one of the prefixes."""

    request: int
    prefixes: list[str]


class Page(msgspec.Struct, frozen=True, tag_field="op", tag="page"):
    """Page number 1, 2, ... of the answer to `request`; with `more`, another follows."""

    request: int
    page: int
    more: bool


class Beat(msgspec.Struct, frozen=True):
    """Beat number `beat` since the plane started at `epoch` (nanoseconds since 1970).

    clock: seconds by a clock of the plane's that never jumps. The smallest difference to the reader's own is how the
    clocks stand; what a later beat has more is how long everything before it waited on its way.
    """

    beat: int
    epoch: int
    clock: float


_ask = msgspec.msgpack.Decoder(AskLast)
_page = msgspec.msgpack.Decoder(Page)
_beat = msgspec.msgpack.Decoder(Beat)


def decode_ask(frame: bytes) -> AskLast:
    ask = wire.decode(frame, _ask, what="request for last values")
    if len(ask.prefixes) > MAX_PREFIXES:
        raise WireError(f"{len(ask.prefixes)} prefixes", hint=f"at most {MAX_PREFIXES}")
    return ask


def decode_page(frames: Sequence[bytes]) -> tuple[Page, list[list[bytes]]]:
    """A page, and its batches as `[topic, batch]` each."""
    if len(frames) % 2 == 0:
        raise WireError(f"a page has an odd number of frames, this has {len(frames)}")
    pairs = [list(pair) for pair in zip(frames[1::2], frames[2::2], strict=True)]
    return wire.decode(frames[0], _page, what="page of last values"), pairs


def decode_beat(frames: Sequence[bytes]) -> Beat:
    if len(frames) != 2:
        raise WireError(f"a beat has 2 frames, this has {len(frames)}")
    return wire.decode(frames[1], _beat, what="beat")
