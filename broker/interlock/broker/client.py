"""A role's end of the bus over ZeroMQ: one connection to the event plane, one feed per subscription."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, nullcontext
from pathlib import Path

import trio

from interlock.broker import signing, wire
from interlock.broker.bus import Bus, EventFeed, Receipts, SampleFeed, TelemetryPublisher, new_event
from interlock.broker.config import BrokerConfig
from interlock.broker.direct import DirectLine
from interlock.broker.errors import Refused, Unreachable
from interlock.broker.feed import FeedReader
from interlock.broker.link import Link, Mismatch
from interlock.broker.outbox import Entry
from interlock.broker.outbox_file import OutboxFile
from interlock.broker.pulse import Pulse
from interlock.broker.sample_reader import SampleReader
from interlock.broker.security import Security
from interlock.broker.shielding import start_shielded
from interlock.broker.sockets import Sockets, open_sockets
from interlock.broker.telemetry_link import TelemetryLink
from interlock.broker.unwrapped import unwrapped
from interlock.broker.wire import Body, Event

__all__ = ["Bus", "EventFeed", "SampleFeed", "TelemetryPublisher", "ZmqBus", "open_bus"]

FAREWELL_S = 1.0  # at the end, posts that are under way may still arrive
SAMPLES_QUEUE = 10_000  # batches that wait for a slow consumer of telemetry: what it costs is memory, 20 MB

_log = logging.getLogger(__name__)


@asynccontextmanager
async def open_bus(
    config: BrokerConfig, source: str, *, outbox: Path | None = None, security: Security | None = None
) -> AsyncIterator[Bus]:
    """A connection to the bus, whether the broker is there yet or not. `source` names the role: "host/alpha".

    outbox: a file that keeps posts until they are in the log, also over the end of this process; what it holds from an
    earlier one is sent first. LogError if it can't be opened.
    With `security` the source is the identity of its keys. Without, only an insecure broker understands it.
    """
    source = source if security is None else security.identity
    with unwrapped():
        async with trio.open_nursery() as nursery:
            bus: ZmqBus
            bus, service = await nursery.start(_serve, config, source, outbox, security)
            try:
                yield bus
            finally:
                # The service is shielded, so that the last rollback still leaves when this is being cancelled.
                with trio.move_on_after(FAREWELL_S, shield=True):
                    await bus.taken()
                    await bus.flushed()
                bus.say_goodbye()
                if bus.unsent and outbox is None:
                    _log.warning("%s: %d events never reached the log", source, bus.unsent)
                elif bus.unsent:
                    _log.warning("%s: %d events wait in %s for the next start", source, bus.unsent, outbox)
                service.cancel()


async def _serve(
    config: BrokerConfig,
    source: str,
    outbox: Path | None,
    security: Security | None,
    *,
    task_status: trio.TaskStatus[tuple[ZmqBus, trio.CancelScope]],
) -> None:
    file = None if outbox is None else await trio.to_thread.run_sync(OutboxFile, outbox)
    with closing(file) if file else nullcontext(), trio.CancelScope() as scope:
        curve = None if security is None else security.curve()
        async with open_sockets(curve, heartbeat_s=config.heartbeat_s) as sockets:
            async with trio.open_nursery() as nursery:
                if security is not None:
                    nursery.start_soon(security.watch)
                link = Link(sockets, config.events, Mismatch(), file)
                bus = ZmqBus(config, source, sockets, link, nursery, security=security)
                nursery.start_soon(link.run)
                await start_shielded(scope, task_status, (bus, scope))


class ZmqBus:
    """The `Bus` over ZeroMQ; made by `open_bus`."""

    def __init__(
        self,
        config: BrokerConfig,
        source: str,
        sockets: Sockets,
        link: Link,
        nursery: trio.Nursery,
        *,
        security: Security | None = None,
    ) -> None:
        self._security = security
        self.source = source
        self.sockets = sockets
        self._config = config
        self._link = link
        self._nursery = nursery
        self._telemetry: TelemetryLink | None = None
        self._pulse = Pulse(source)
        self._lines: dict[tuple[str, bytes], DirectLine] = {}  # by endpoint and its host's key

    @property
    def unsent(self) -> int:
        """Posts that are not acknowledged."""
        return len(self._link.outbox)

    def say_goodbye(self) -> None:
        """Our own series end, so that silence means a failure."""
        self._pulse.end()

    async def publish(self, topic: str, body: Body, *, id: str | None = None, timeout: float = 5.0) -> int:
        entry = self._entry(topic, body, id)
        with trio.move_on_after(timeout):
            outcome = await self._link.publish(entry)
            if isinstance(outcome, int):
                return outcome
            raise Refused(outcome, where=topic)
        raise Unreachable(
            f"the broker has not acknowledged the event within {timeout:g} s",
            where=self._config.events,
            hint="is the broker running?",
        )

    def post(self, topic: str, body: Body, *, id: str | None = None) -> str:
        entry = self._entry(topic, body, id)
        self._link.post(entry)
        return entry.id

    async def flushed(self) -> None:
        await self._link.flushed()

    async def taken(self) -> None:
        await self._link.taken()

    @asynccontextmanager
    async def events(self, prefixes: Sequence[str], *, after: int | None = None) -> AsyncIterator[EventFeed]:
        reader = FeedReader(self.sockets, self._link, self._config.feed, prefixes, after=after)
        try:
            with unwrapped():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(reader.run)
                    await reader.placed.wait()
                    yield reader.feed
                    nursery.cancel_scope.cancel()
        finally:
            reader.close()  # after its tasks have ended: none of them meets a closed socket

    @asynccontextmanager
    async def samples(self, prefixes: Sequence[str]) -> AsyncIterator[SampleFeed]:
        reader = SampleReader(
            self.sockets,
            self._telemetry_link(),
            self._config.telemetry_out,
            prefixes,
            label=f"{self.source} samples",
            limit=SAMPLES_QUEUE,
        )
        self._nursery.start_soon(reader.run)
        self._pulse.feeds.append(reader.feed)
        try:
            yield reader.feed
        finally:
            self._pulse.feeds.remove(reader.feed)
            reader.close()

    async def mismatch(self) -> str:
        return await self._link.mismatch.said()

    def receipt(self, event: Event, reason: str = "") -> None:
        self._link.receipt(self.source, event.header.id, reason)

    def receipts(self, command: str) -> AbstractAsyncContextManager[Receipts]:
        return self._link.watching(command)

    def telemetry(self, host: str, publisher: str) -> TelemetryPublisher:
        made = TelemetryPublisher(host, publisher, self._telemetry_link().put)
        self._pulse.publishers.append(made)
        return made

    def _telemetry_link(self) -> TelemetryLink:
        if self._telemetry is None:
            self._telemetry = TelemetryLink(
                self.sockets, self._config.telemetry_in, self._link.mismatch, label=self.source
            )
            self._nursery.start_soon(self._telemetry.run)
            self._nursery.start_soon(self._pulse.run)
        return self._telemetry

    async def direct(
        self, endpoint: str, topic: str, body: Body, *, id: str | None = None, timeout: float = 1.0
    ) -> None:
        event = self._event(topic, body, id)
        server = b"" if self._security is None else self._security.key_of(f"host/{topic.split('/')[1]}")
        line = self._lines.get((endpoint, server))
        if line is None:
            line = self._lines[(endpoint, server)] = DirectLine(self.sockets, endpoint, server)
            self._nursery.start_soon(line.run)
        await line.ask(event, timeout)

    def _event(self, topic: str, body: Body, id: str | None) -> Event:
        event = new_event(topic, body, source=self.source, time=time.time(), id=id)
        if self._security is not None and self._security.own.sign and signing.is_signed(topic):
            return signing.sign(event, self._security.own)
        return event

    def _entry(self, topic: str, body: Body, id: str | None) -> Entry:
        event = self._event(topic, body, id)
        return Entry(event.header.id, wire.encode_event(event))
