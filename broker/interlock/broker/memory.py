"""The bus in memory, for tests whose clock jumps: the same `Bus`, nothing lost, nothing late, one process.

Everything is encoded and decoded as on the wire, so that what works here can be sent.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import msgspec
import trio

from interlock.broker import wire
from interlock.broker.backlog import Counts
from interlock.broker.bus import Bus, EventFeed, Receipts, SampleFeed, TelemetryPublisher, new_event
from interlock.broker.errors import ConfigError, Unreachable
from interlock.broker.lastvalues import LastValues
from interlock.broker.samples import Batch
from interlock.broker.sequence import Deliver, Moved, matches
from interlock.broker.sockets import Sockets
from interlock.broker.wire import Body, Event

SAMPLES_QUEUE = 10_000  # batches that wait for one consumer; as over ZeroMQ, the next are dropped


class MemoryBroker:
    """The log, and who listens. `up = False` makes it unreachable; posts then wait until it is set True again.

    clock gives the times in headers, seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.log: list[Event] = []
        self._ids: dict[tuple[str, str], int] = {}  # source and id -> number
        self._feeds: list[tuple[tuple[str, ...], EventFeed]] = []
        self._samples: list[tuple[tuple[str, ...], SampleFeed]] = []
        self._last = LastValues()
        self._direct: dict[str, Callable[[Event], None]] = {}
        self._waiting: list[Event] = []
        self._receipts: dict[str, dict[str, str]] = {}
        self._watching: dict[str, list[Receipts]] = {}
        self._up = True
        self._changed = trio.lowlevel.ParkingLot()

    def bus(self, source: str) -> Bus:
        return MemoryBus(self, source)

    @property
    def up(self) -> bool:
        return self._up

    @up.setter
    def up(self, up: bool) -> None:
        self._up = up
        for _, feed in self._feeds:
            feed.lost = not up
        while up and self._waiting:
            self._append(self._waiting.pop(0))
        self._changed.unpark_all()

    @contextmanager
    def serve_direct(self, endpoint: str, accept: Callable[[Event], None]) -> Iterator[None]:
        """As `direct.serve_direct`: `accept` gets what is sent to the endpoint, and raises Refused to say no."""
        self._direct[endpoint] = accept
        try:
            yield
        finally:
            del self._direct[endpoint]

    def _append(self, event: Event) -> int:
        known = self._ids.get((event.header.source, event.header.id))
        if known is not None:
            return known
        seq = len(self.log) + 1
        prev = next((e.header.seq for e in reversed(self.log) if e.topic == event.topic), 0)
        header = msgspec.structs.replace(event.header, seq=seq, prev=prev, logged=self.clock())
        logged = wire.decode_event(wire.encode_event(Event(event.topic, header, event.body, event.raw)))
        self.log.append(logged)
        self._ids[event.header.source, event.header.id] = seq
        for prefixes, feed in self._feeds:
            feed.put(Deliver(seq, logged) if matches(event.topic, prefixes) else Moved(seq))
        return seq


class MemoryBus:
    """The `Bus` in memory; made by `MemoryBroker.bus`."""

    def __init__(self, broker: MemoryBroker, source: str) -> None:
        self.source = source
        self._broker = broker

    @property
    def sockets(self) -> Sockets:
        raise ConfigError("the bus in memory has no sockets", where=self.source)

    async def publish(self, topic: str, body: Body, *, id: str | None = None, timeout: float = 5.0) -> int:
        event = new_event(topic, body, source=self.source, time=self._broker.clock(), id=id)
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(timeout):
            while not self._broker.up:
                await self._broker._changed.park()
        if not self._broker.up:
            raise Unreachable(f"the broker has not acknowledged the event within {timeout:g} s", where="memory")
        return self._broker._append(event)

    def post(self, topic: str, body: Body, *, id: str | None = None) -> str:
        event = new_event(topic, body, source=self.source, time=self._broker.clock(), id=id)
        if self._broker.up:
            self._broker._append(event)
        else:
            self._broker._waiting.append(event)
        return event.header.id

    async def flushed(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._broker._waiting:
            await self._broker._changed.park()

    async def taken(self) -> None:
        await self.flushed()

    @asynccontextmanager
    async def events(self, prefixes: Sequence[str], *, after: int | None = None) -> AsyncIterator[EventFeed]:
        log = self._broker.log
        feed = EventFeed(position=len(log) if after is None else after)
        for event in log[feed.position :]:
            if matches(event.topic, prefixes):
                feed.put(Deliver(event.header.seq, event))
        feed.put(Moved(len(log), caught_up=True))
        entry = (tuple(prefixes), feed)
        self._broker._feeds.append(entry)
        try:
            await trio.lowlevel.checkpoint()
            yield feed
        finally:
            self._broker._feeds.remove(entry)

    @asynccontextmanager
    async def samples(self, prefixes: Sequence[str]) -> AsyncIterator[SampleFeed]:
        feed = SampleFeed(name=f"{self.source} samples", limit=SAMPLES_QUEUE)
        for topic, batches in self._broker._last.snapshot(prefixes, self._broker.clock()):
            for batch in batches:
                feed.put_remembered([topic.encode(), wire.encode(batch)])
        entry = (tuple(prefixes), feed)
        self._broker._samples.append(entry)
        try:
            await trio.lowlevel.checkpoint()
            yield feed
        finally:
            self._broker._samples.remove(entry)

    async def mismatch(self) -> str:
        await trio.sleep_forever()
        raise AssertionError("it is of one version with itself")

    def receipt(self, event: Event, reason: str = "") -> None:
        id = event.header.id
        by = self._broker._receipts.setdefault(id, {})
        by.setdefault(self.source, reason)
        for watching in self._broker._watching.get(id, ()):
            watching.add(by)

    @asynccontextmanager
    async def receipts(self, command: str) -> AsyncIterator[Receipts]:
        receipts = Receipts()
        receipts.add(self._broker._receipts.get(command, {}))
        watching = self._broker._watching.setdefault(command, [])
        watching.append(receipts)
        try:
            await trio.lowlevel.checkpoint()
            yield receipts
        finally:
            watching.remove(receipts)

    def telemetry(self, host: str, publisher: str) -> TelemetryPublisher:
        def put(topic: bytes, batch: Batch, counts: Counts) -> None:
            if not self._broker.up:
                counts.dropped += 1
                return
            counts.sent += 1
            frames = [topic, wire.encode(batch)]
            self._broker._last.take(topic.decode(), batch, self._broker.clock())
            for prefixes, feed in self._broker._samples:
                if matches(topic.decode(), prefixes):
                    feed.put(frames)

        return TelemetryPublisher(host, publisher, put)

    async def direct(
        self, endpoint: str, topic: str, body: Body, *, id: str | None = None, timeout: float = 1.0
    ) -> None:
        event = new_event(topic, body, source=self.source, time=self._broker.clock(), id=id)
        await trio.lowlevel.checkpoint()
        accept = self._broker._direct.get(endpoint)
        if accept is None:
            await trio.sleep(timeout)
            raise Unreachable(f"no answer within {timeout:g} s", where=endpoint)
        accept(wire.decode_event(wire.encode_event(event)))
