"""The bus as a role sees it, whatever carries it: `client.open_bus` over ZeroMQ, `memory.MemoryBroker` for tests."""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec
import trio

from interlock.broker import topics, wire
from interlock.broker.backlog import Counts
from interlock.broker.errors import UnknownVersion, WireError
from interlock.broker.rejects import Rejects
from interlock.broker.samples import Batch, Labels, SeriesTable
from interlock.broker.sequence import Deliver, Moved
from interlock.broker.sockets import Sockets
from interlock.broker.wire import Body, Event

FEED_TURN = 16  # events that a consumer may take in one turn before other tasks have theirs
FEED_QUEUE = 2000  # events that wait for a slow consumer; beyond it the feed stops reading, and replays later
MAX_SOURCES = 20_000  # of telemetry that one feed tells apart: two roles on each of 10,000 hosts
MAX_LOSING = 1_000  # of these, whose losses are counted one by one


class EventFeed:
    """The events of some topics, in the order of the log: an async iterator of `wire.Event`, for one task.

    caught_up: set once everything that was in the log at subscription has been delivered and the consumer has come
    back for more. position: the number up to which everything is delivered. lost: the broker has been silent for 1.5 s.
    undecodable: events left out because they are of no type or version known here.
    """

    def __init__(self, *, position: int) -> None:
        self.caught_up = trio.Event()
        self.position = position
        self.lost = False
        self.undecodable = 0
        self._queue: deque[Deliver[Event | None] | Moved] = deque()
        self._arrived = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._busy = False  # the consumer is at work on the last event
        self._taken = 0  # in this turn

    def __aiter__(self) -> EventFeed:
        return self

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._busy = False
        while True:
            while self._queue:
                event = self._take(self._queue.popleft())
                if self._room and self.has_room:
                    self._room.unpark_all()
                if event is not None:
                    self._busy = True
                    self._taken += 1
                    if self._taken >= FEED_TURN:
                        self._taken = 0
                        await trio.lowlevel.cancel_shielded_checkpoint()
                    return event
            self._taken = 0
            await self._arrived.park()

    def put(self, step: Deliver[Event | None] | Moved) -> None:
        """For the transport: the next thing that happened."""
        if not self._queue and not self._busy and isinstance(step, Moved):
            self._take(step)
            return
        self._queue.append(step)
        if self._arrived:
            self._arrived.unpark_all()

    @property
    def has_room(self) -> bool:
        return len(self._queue) < FEED_QUEUE

    async def room(self) -> None:
        """For the transport: wait until the consumer has taken enough."""
        while not self.has_room:
            await self._room.park()

    def _take(self, step: Deliver[Event | None] | Moved) -> Event | None:
        if isinstance(step, Moved):
            self.position = step.position
            if step.caught_up:
                self.caught_up.set()
            return None
        self.position = step.seq
        if step.payload is None:
            self.undecodable += 1
        return step.payload


class SampleFeed:
    """Telemetry of some topics: an async iterator of lists of batches, all that has come since the last one.

    First comes what the broker remembers (batches marked `cached`), then what comes, each source in order and without
    repetition. A batch that has waited on its way says so (`delay`). It never waits for its consumer: beyond its limit
    the oldest batches are dropped.

    lost: the broker has been silent for 1.5 s. missed: batches that never came or were dropped here, and `losses` the
    same by source. dropped: of these, here. repeated: batches left out since they came twice. undecodable: messages
    that were no batch.
    """

    def __init__(self, *, name: str, limit: int, joining: bool = False) -> None:
        self.name = name
        self.lost = False
        self.lag = 0.0  # for the transport: seconds that what comes now has waited
        self.missed = 0
        self.dropped = 0
        self.repeated = 0
        self.losses: Counter[str] = Counter()
        self._limit = limit
        self._rejects = Rejects(name)
        self._newest: dict[str, tuple[int, int, bool]] = {}  # source -> epoch, seq, whether it was remembered
        self._queue: deque[tuple[list[bytes], float]] = deque()
        self._held: deque[tuple[list[bytes], float]] | None = deque() if joining else None
        self._arrived = trio.lowlevel.ParkingLot()

    @property
    def undecodable(self) -> int:
        return self._rejects.total

    def __aiter__(self) -> SampleFeed:
        return self

    async def __anext__(self) -> list[Batch]:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            taken, self._queue = self._queue, deque()
            batches = [batch for frames, lag in taken if (batch := self._decode(frames, lag)) is not None]
            if batches:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return batches
            await self._arrived.park()

    def put(self, frames: list[bytes]) -> None:
        """For the transport: what came."""
        queue = self._queue if self._held is None else self._held
        queue.append((frames, self.lag))
        if len(queue) > self._limit:
            queue.popleft()
            self.dropped += 1
        if self._held is None:
            self._arrived.unpark_all()

    def put_remembered(self, frames: list[bytes]) -> None:
        """For the transport: what the broker remembers; while joining, before all that came."""
        self._queue.append((frames, 0.0))
        self._arrived.unpark_all()

    def joined(self) -> None:
        """For the transport: all that the broker remembers was put."""
        if self._held is not None:
            self._queue += self._held
            self._held = None
            self._arrived.unpark_all()

    def _decode(self, frames: list[bytes], lag: float) -> Batch | None:
        try:
            batch = wire.decode_batch(frames)
        except UnknownVersion as error:
            self._rejects.count("a batch of an unknown version", error)
            return None
        except WireError as error:
            self._rejects.count("what is not a telemetry batch", error)
            return None
        if not self._is_new(batch):
            self.repeated += 1
            return None
        return msgspec.structs.replace(batch, delay=batch.delay + lag) if lag else batch

    def _is_new(self, batch: Batch) -> bool:
        source, place = batch.source, (batch.epoch, batch.seq)
        known = self._newest.get(source)
        if known is not None:
            # several batches may tell one remembered state
            if place < known[:2] or (place == known[:2] and not (batch.cached and known[2])):
                return False
            gap = batch.seq - known[1] - 1
            if batch.epoch == known[0] and gap > 0:
                self.missed += gap
                if source in self.losses or len(self.losses) < MAX_LOSING:
                    self.losses[source] += gap
        elif len(self._newest) >= MAX_SOURCES:
            self._newest.pop(next(iter(self._newest)))
        self._newest[source] = (*place, batch.cached)
        return True


class TelemetryPublisher:
    """One publisher of telemetry. It never waits; what can't leave for too long is dropped, the oldest first."""

    def __init__(self, host: str, publisher: str, put: Callable[[bytes, Batch, Counts], None]) -> None:
        self.host = host
        self.publisher = publisher
        self._topic = topics.telemetry(host, publisher).encode()
        self._table = SeriesTable(f"{host}/{publisher}", time.time_ns())
        self._put = put
        self._counts = Counts()

    @property
    def sent(self) -> int:
        """Batches handed to the connection."""
        return self._counts.sent

    @property
    def dropped(self) -> int:
        """Batches that were too many, or too old, before there was a connection."""
        return self._counts.dropped

    def send(self, samples: dict[Labels, float], *, time: float, ended: list[Labels] | None = None) -> None:
        """One batch, taken at `time` (seconds since 1970); `ended` names series that report no more. Never blocks."""
        self._put(self._topic, self._table.batch(samples, time=time, ended=ended), self._counts)


class Receipts:
    """Who has taken a command so far: identity -> why not (empty: it has taken it)."""

    def __init__(self) -> None:
        self.by: dict[str, str] = {}
        self._changed = trio.lowlevel.ParkingLot()

    def add(self, by: dict[str, str]) -> None:
        """For the transport: these have answered."""
        self.by |= by
        self._changed.unpark_all()

    async def complete(self, identities: Iterable[str]) -> None:
        """Wait until all of these have answered."""
        wanted = set(identities)
        await trio.lowlevel.checkpoint()
        while not wanted <= self.by.keys():
            await self._changed.park()

    async def more(self) -> None:
        """Wait until somebody else has answered."""
        await self._changed.park()


class Bus(Protocol):
    """What every role has of the bus. `source` names the role: "host/alpha", "rules", "cli/1234"."""

    @property
    def source(self) -> str: ...

    @property
    def sockets(self) -> Sockets:
        """The sockets of this component, for those that serve requests themselves."""

    async def publish(self, topic: str, body: Body, *, id: str | None = None, timeout: float = 5.0) -> int:
        """Its number in the log, once it is on disk there.

        Refused: it is not in the log. Unreachable after `timeout` seconds: it may be, also where the broker has told of
        trouble with its disk meanwhile; the same id is logged once.
        """

    def post(self, topic: str, body: Body, *, id: str | None = None) -> str:
        """Send it in order with all other posts, and repeat it until it is in the log; returns the event's id.

        On a bus with an outbox it also outlives this process, from some milliseconds later on: see `taken`.
        """

    async def flushed(self) -> None:
        """Wait until every post so far is in the log (or was refused as invalid, which is logged)."""

    async def taken(self) -> None:
        """Wait until every post so far is on this machine's disk or in the log: nothing that happens loses it then.

        Without an outbox that means: in the log.
        """

    def events(self, prefixes: Sequence[str], *, after: int | None = None) -> AbstractAsyncContextManager[EventFeed]:
        """The events whose topic starts with one of `prefixes`, without hole or repetition.

        after=N: everything in the log after number N (0: all), then what comes. None: only what comes from the moment
        on that this was entered; entering waits until the broker has answered.
        """

    def samples(self, prefixes: Sequence[str]) -> AbstractAsyncContextManager[SampleFeed]:
        """Telemetry whose topic starts with one of `prefixes`, and first the newest values that the broker remembers.

        What comes too fast is dropped, the oldest first, and counted.
        """

    def telemetry(self, host: str, publisher: str) -> TelemetryPublisher: ...

    def receipt(self, event: Event, reason: str = "") -> None:
        """Tell whoever watches the command that we have taken it; with a reason, that we won't. Sent once, not logged:
        what was done with a command is a fact."""

    def receipts(self, command: str) -> AbstractAsyncContextManager[Receipts]:
        """Who takes the command with this id, of ours or, for operators and the coordinator, of anyone."""

    async def mismatch(self) -> str:
        """Wait until the broker and this program turn out to speak no version of the wire format in common; how."""

    async def direct(
        self, endpoint: str, topic: str, body: Body, *, id: str | None = None, timeout: float = 1.0
    ) -> None:
        """To a host's control endpoint, past the broker. Refused with its reason; Unreachable without an answer."""


def new_event(topic: str, body: Body, *, source: str, time: float, id: str | None = None) -> Event:
    """An event as a publisher makes it; WireError if it would be too large to send."""
    raw = wire.encode(body)
    if len(raw) > wire.MAX_FRAME:
        raise WireError(f"an event of {len(raw)} bytes", where=topic, hint=f"at most {wire.MAX_FRAME}")
    return Event(topic, wire.Header(id=id or uuid.uuid4().hex, source=source, time=time), body, raw)
