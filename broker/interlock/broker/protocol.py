"""What travels between a client and the event plane besides events: requests, answers, beats. `docs/wire.md`
tells it to programs in other languages.

A request is `[request]`, or `[request, topic, header, body]` to publish; an answer is `[answer]` or,
for events of a replay, `[answer, events]` or `[answer, topic, header, body]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

import msgspec

from interlock.broker import wire
from interlock.broker.errors import UnknownVersion
from interlock.broker.fields import EventId, Identity, Number, Prefixes, Reason, Seq, says
from interlock.broker.version import SPEAKS, WIRE_VERSION, Speaks, V, check, check_meets

PAGE_EVENTS = 500  # events in one answer to a replay; with the ROUTER's limit of 4000 messages a peer: 8 pages
PACK_BYTES = 64 << 10  # of small events that travel as one frame: a frame costs as much as encoding ten of them
PAGE_BYTES = 4 << 20  # bytes of bodies in one answer, so that 10,000 hosts asking at once can't take all memory
MAX_PREFIXES = 64  # of one replay
BEAT_TOPIC = "beat/"
BEAT_S = 0.5  # seconds between beats; more while nothing happens, where there are thousands of subscribers (`pace.py`)
BEAT_MEMORY = 6  # a beat tells what changed in so many beats: 5 lost in a row need no replay
LINK_LOST_S = 1.5  # seconds without a beat: 3 of them, so that a dead or half-open link is known within 2 s
TRAIL_EVENTS = 64  # an event tells the topics of so many events before it

Why = Literal["invalid", "refused", "version", "order", "log"]
REFUSALS: dict[Why, str] = {  # why something was not done -> what it means, and what to do
    "invalid": "it is not what it claims to be, or too large; repeating won't help: mend the sender",
    "refused": "this key may not; repeating won't help: ask whoever keeps the keys",
    "version": "its version of the wire format is not understood here; send one that a pong names, or update",
    "order": "an earlier event of this connection has not arrived: repeat from the oldest unacknowledged one on",
    "log": "the log can't be written or read now (full disk, too much at once, damage): repeat later",
}
SEE_REFUSALS = "why not: see the table of refusals"
Kind = Annotated[Why, says(SEE_REFUSALS)]


LogIdentity = Annotated[str, says("the identity of the log; another one: it is gone, and numbers began anew")]


class Publish(msgspec.Struct, frozen=True, tag_field="op", tag="publish"):
    """Log the event that follows. With `n`, never before one that its publisher sent earlier, whatever was lost."""

    n: Annotated[int, says("counts the publisher's events on this connection; 0: no order is asked for")] = 0
    oldest: Annotated[int, says("the `n` of its first event that has not been acknowledged")] = 0
    v: V = WIRE_VERSION


class Replay(msgspec.Struct, frozen=True, tag_field="op", tag="replay"):
    """Send what was logged after number `after` under any of the prefixes."""

    request: Number
    after: Seq
    prefixes: Prefixes
    limit: Annotated[int, says("events in the answer at most")] = PAGE_EVENTS
    v: V = WIRE_VERSION


class Ping(msgspec.Struct, frozen=True, tag_field="op", tag="ping"):
    """Are you there, which versions do you speak, and where does the log end? Answered whatever its version."""

    request: Number = 0
    v: V = WIRE_VERSION


class Receipt(msgspec.Struct, frozen=True, tag_field="op", tag="receipt"):
    """`source` has taken the command with this id; with a reason it has refused it. Not logged, and not answered."""

    source: Identity
    command: EventId
    reason: Annotated[str, says("why it won't do it, in one line for people")] = ""
    v: V = WIRE_VERSION


class Watch(msgspec.Struct, frozen=True, tag_field="op", tag="watch"):
    """Tell me who has taken the command with this id. Asked again, all is told again."""

    command: EventId
    v: V = WIRE_VERSION


class Ack(msgspec.Struct, frozen=True, tag_field="op", tag="ack"):
    """The event is on disk under this sequence number, now or since an earlier attempt."""

    id: EventId
    seq: Seq


class Nack(msgspec.Struct, frozen=True, tag_field="op", tag="nack"):
    """This attempt did not put the event into the log; an earlier one that was never answered may have. Or another
    request, without an id, was not understood.
    """

    kind: Kind
    reason: Reason
    id: Annotated[str, says("the event's, where its header could be read")] = ""
    unsure: Annotated[bool, says("this attempt may have, too: repeat it to find out")] = False


class Replayed(msgspec.Struct, frozen=True, tag_field="op", tag="replayed"):
    """End of an answer: up to `through` nothing else matches."""

    request: Number
    through: Seq
    more: Annotated[bool, says("the log goes on after it")]
    count: Annotated[int, says("events that were sent for it")]
    log: LogIdentity
    start: Annotated[
        int, says("the answer begins only after this number: before it is nothing any more, or the snapshot")
    ] = 0
    snapshot: Annotated[bool, says("the first of the events is a snapshot, whatever its number")] = False


class ReplayEvent(msgspec.Struct, frozen=True, tag_field="op", tag="event"):
    """One large event of an answer; its topic, header and body follow."""

    request: Number


class ReplayEvents(msgspec.Struct, frozen=True, tag_field="op", tag="events"):
    """Small events of an answer; one frame follows, a list of lists `[topic, header, body]`, each of the three as the
    bytes that it would be in a frame of its own.
    """

    request: Number


class ReplayFailed(msgspec.Struct, frozen=True, tag_field="op", tag="failed"):
    """A replay that can't be answered."""

    request: Number
    reason: Reason
    kind: Annotated[Literal["invalid", "refused", "version", "log"], says(SEE_REFUSALS)] = "log"


class Pong(msgspec.Struct, frozen=True, tag_field="op", tag="pong"):
    """Where the log ends, and which versions are spoken."""

    request: Number
    seq: Seq
    log: LogIdentity
    speaks: Speaks = SPEAKS


class Received(msgspec.Struct, frozen=True, tag_field="op", tag="received"):
    """Who has taken the command, as far as it is new to who asked."""

    command: EventId
    seq: Annotated[int, says("of the command; 0: the broker does not know it (yet, or since its start)")] = 0
    by: Annotated[dict[str, str], says("identity: empty, or why it won't do it")] = {}


Request = Publish | Replay | Ping | Receipt | Watch
Answer = Ack | Nack | Replayed | ReplayEvent | ReplayEvents | ReplayFailed | Pong | Received


class Trail(msgspec.Struct, frozen=True):
    """Further keys in the header of a live event. Who has everything up to `since` sees in it what it missed."""

    since: Annotated[int | None, says("a number of the log (none: an event of a replay, which needs no trail)")] = None
    recent: Annotated[
        dict[str, int], says("every topic with an event after `since` and before this one, with its last number")
    ] = {}


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """The pulse of the feed."""

    beat: Annotated[int, says("1, 2, 3, ...")]
    epoch: Annotated[int, says("the broker's start, nanoseconds since 1970")]
    seq: Annotated[int, says("the newest event's number")]
    since: Annotated[int, says("`topics` tells of what is after this number")]
    topics: Annotated[dict[str, int], says("every topic with an event after `since`, with its last number")]
    log: LogIdentity
    speaks: Speaks = SPEAKS
    next: Annotated[float, says("the next beat comes within so many seconds")] = BEAT_S


class _Asking(msgspec.Struct, frozen=True):
    """What every version has of a request."""

    op: str = ""
    request: int = 0


_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_askings = msgspec.msgpack.Decoder(_Asking)
_trails = msgspec.msgpack.Decoder(Trail)
_packs = msgspec.msgpack.Decoder(list[tuple[bytes, bytes, bytes]])
_beats = msgspec.msgpack.Decoder(Beat)


def decode_request(frame: bytes) -> Request:
    """WireError if it is none; UnknownVersion for one of those, but a ping, which is answered in any version."""
    request = wire.decode(frame, _requests, what="request")
    if not isinstance(request, Ping):
        check(request.v, "request")
    return request


def refusal(frame: bytes, error: UnknownVersion, id: str) -> Answer:
    """What to answer to a request of an unknown version. `id`: of the event in it, if it is one."""
    try:
        asked = _askings.decode(frame)
    except (msgspec.DecodeError, RecursionError, ValueError):
        asked = _Asking()
    if asked.op == "replay":
        return ReplayFailed(asked.request, str(error), "version")
    return Nack("version", str(error), id)


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
    """UnknownVersion if the broker speaks none of ours."""
    beat = wire.decode(frame, _beats, what="beat")
    check_meets(beat.speaks, "the broker")
    return beat


class LiveHeader(wire.Header, frozen=True, kw_only=True):
    """A header as the feed sends it: the logged one, and the trail beside it."""

    since: Annotated[int, says("on the feed only: `recent` tells of what is after this number")]
    recent: Annotated[
        dict[str, int],
        says("on the feed only: every topic with an event after `since` and before this one, with its last number"),
    ]
