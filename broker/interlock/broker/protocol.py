"""What travels between a client and the event plane besides events: requests, answers, beats. `docs/wire-format.md`
tells it to programs in other languages.

A request is `[request]`, or `[request, topic, header, body]` to publish; an answer is `[answer]` or,
for events of a replay, `[answer, events]` or `[answer, topic, header, body]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from interlock.broker import wire

PAGE_EVENTS = 500  # events in one answer to a replay; with the ROUTER's limit of 4000 messages a peer: 8 pages
PACK_BYTES = 64 << 10  # of small events that travel as one frame: a frame costs as much as encoding ten of them
PAGE_BYTES = 4 << 20  # bytes of bodies in one answer, so that 10,000 hosts asking at once can't take all memory
MAX_PREFIXES = 64  # of one replay
BEAT_TOPIC = "beat/"
BEAT_S = 0.5  # seconds between beats; more while nothing happens, where there are thousands of subscribers (`pace.py`)
BEAT_MEMORY = 6  # a beat tells what changed in so many beats: 5 lost in a row need no replay
LINK_LOST_S = 2.0  # seconds without a beat: 4 beats, and as long as ZeroMQ takes to find a dead peer
TRAIL_EVENTS = 64  # an event tells the topics of so many events before it

# Why an event was not taken. invalid: it is none, and asking again won't help. refused: the sender may not. order: an
# earlier one of this connection is missing, repeat from the oldest unacknowledged. log: it can't be written now, repeat
# later.
Why = Literal["invalid", "refused", "order", "log"]


class Publish(msgspec.Struct, frozen=True, tag_field="op", tag="publish"):
    """`n` numbers the events of one publisher, `oldest` is its first unacknowledged one. 0: no order is asked for.

    With them an event is never logged before one that its publisher sent earlier, whatever was lost in between.
    """

    n: int = 0
    oldest: int = 0


class Replay(msgspec.Struct, frozen=True, tag_field="op", tag="replay"):
    """Send what was logged after sequence number `after` under any of the prefixes; `request` marks the answers."""

    request: int
    after: int
    prefixes: list[str]
    limit: int = PAGE_EVENTS


class Ping(msgspec.Struct, frozen=True, tag_field="op", tag="ping"):
    request: int = 0


class Receipt(msgspec.Struct, frozen=True, tag_field="op", tag="receipt"):
    """`source` has taken the command with this id; with a reason it has refused it. Not logged, and not answered."""

    source: str
    command: str
    reason: str = ""


class Watch(msgspec.Struct, frozen=True, tag_field="op", tag="watch"):
    """Tell me who has taken the command with this id. Asked again, all is told again."""

    command: str


class Ack(msgspec.Struct, frozen=True, tag_field="op", tag="ack"):
    """The event is on disk under this sequence number, now or since an earlier attempt."""

    id: str
    seq: int


class Nack(msgspec.Struct, frozen=True, tag_field="op", tag="nack"):
    """The event is not in the log. `id` is empty where the header could not be read."""

    kind: Why
    reason: str
    id: str = ""


class Replayed(msgspec.Struct, frozen=True, tag_field="op", tag="replayed"):
    """End of an answer of `count` events: up to `through` nothing else matches. `more`: the log goes on after it.

    start: what was asked for begins only after this number, because the log has dropped what is before, or because a
    snapshot stands for it. snapshot: the first of the events is that snapshot, whatever its number.
    """

    request: int
    through: int
    more: bool
    count: int
    log: str
    start: int = 0
    snapshot: bool = False


class ReplayEvent(msgspec.Struct, frozen=True, tag_field="op", tag="event"):
    """One large event, in the three frames that follow."""

    request: int


class ReplayEvents(msgspec.Struct, frozen=True, tag_field="op", tag="events"):
    """Small events, in the frame that follows: an array of arrays `[topic, header, body]`, each as bytes."""

    request: int


class ReplayFailed(msgspec.Struct, frozen=True, tag_field="op", tag="failed"):
    request: int
    reason: str


class Pong(msgspec.Struct, frozen=True, tag_field="op", tag="pong"):
    request: int
    seq: int
    log: str


class Received(msgspec.Struct, frozen=True, tag_field="op", tag="received"):
    """Who has taken the command, each with an empty reason or why not. `seq` 0: the broker does not know the command,
    which is not logged yet, or was before the broker's start.
    """

    command: str
    seq: int = 0
    by: dict[str, str] = {}


Request = Publish | Replay | Ping | Receipt | Watch
Answer = Ack | Nack | Replayed | ReplayEvent | ReplayEvents | ReplayFailed | Pong | Received


class Trail(msgspec.Struct, frozen=True):
    """Further keys in the header of a live event: every topic with an event after `since` and before this one, each
    with its last number. A subscriber that has everything up to `since` sees in it what it missed, on any topic.
    """

    since: int | None = None  # None: an event of a replay, which needs no trail
    recent: dict[str, int] = {}


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """The pulse of the feed. `topics`: every topic with an event after `since`, with its last number.

    epoch: the broker's start, nanoseconds since 1970. seq: the newest event's number. log: the identity of the log.
    next: the next beat comes within so many seconds.
    """

    beat: int
    epoch: int
    seq: int
    since: int
    topics: dict[str, int]
    log: str
    next: float = BEAT_S


_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_trails = msgspec.msgpack.Decoder(Trail)
_packs = msgspec.msgpack.Decoder(list[tuple[bytes, bytes, bytes]])
_beats = msgspec.msgpack.Decoder(Beat)


def decode_request(frame: bytes) -> Request:
    return wire.decode(frame, _requests, what="request")


def decode_answer(frame: bytes) -> Answer:
    return wire.decode(frame, _answers, what="answer")


def decode_events(frame: bytes) -> list[tuple[bytes, bytes, bytes]]:
    return wire.decode(frame, _packs, what="array of events")


def answers(request: int, events: Iterable[tuple[bytes, bytes, bytes]]) -> Iterator[list[bytes]]:
    """The messages that carry these events, in their order, as few as possible."""
    pack: list[tuple[bytes, bytes, bytes]] = []
    size = 0
    for event in events:
        more = sum(map(len, event))
        if pack and size + more > PACK_BYTES:
            yield [wire.encode(ReplayEvents(request)), wire.encode(pack)]
            pack, size = [], 0
        if more > PACK_BYTES:
            yield [wire.encode(ReplayEvent(request)), *event]
        else:
            pack.append(event)
            size += more
    if pack:
        yield [wire.encode(ReplayEvents(request)), wire.encode(pack)]


def decode_trail(header: bytes) -> Trail:
    return wire.decode(header, _trails, what="event header")


def decode_beat(frame: bytes) -> Beat:
    return wire.decode(frame, _beats, what="beat")


class LiveHeader(wire.Header, frozen=True, kw_only=True):
    """A header as the feed sends it: the logged one, and the trail beside it."""

    since: int
    recent: dict[str, int]
