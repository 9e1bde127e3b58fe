"""Links of the telemetry plane that break, fall silent or stand still: who is harmed, who knows it, and how soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from interlock.broker import client
from interlock.broker.backlog import MARK_LATE_S
from interlock.broker.bus import Bus, SampleFeed, TelemetryPublisher
from interlock.broker.config import BrokerConfig
from interlock.broker.samples import LATE_S, NAME, Batch, Labels, SeriesReader, labels

UP = labels("up", host="a")
KNOWN_WITHIN_S = 2.0  # what is promised of a half-open link


class Wire:
    """A TCP proxy before an endpoint. `silent`: it swallows everything and closes nothing, as a lost route does."""

    def __init__(self, target: str, nursery: trio.Nursery) -> None:
        self._target = int(target.rpartition(":")[2])
        self._nursery = nursery
        self._scopes: list[trio.CancelScope] = []
        self.silent = False
        self.refuses = False
        self.endpoint = ""

    async def open(self) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"
        self._nursery.start_soon(trio.serve_listeners, self._carry, [listener])

    def cut(self) -> None:
        """Close all connections, and accept none until `refuses` is False."""
        self.refuses = True
        for scope in self._scopes:
            scope.cancel()
        self._scopes.clear()

    async def _carry(self, near: trio.SocketStream) -> None:
        if self.refuses:
            await near.aclose()
            return
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            far = await trio.open_tcp_stream("127.0.0.1", self._target)
            async with near, far, trio.open_nursery() as nursery:

                async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                    try:
                        async for chunk in source:
                            if not self.silent:
                                await sink.send_all(chunk)
                    except trio.BrokenResourceError:
                        pass
                    nursery.cancel_scope.cancel()

                nursery.start_soon(pump, near, far)
                nursery.start_soon(pump, far, near)
                await trio.sleep_forever()


@asynccontextmanager
async def wired(planes: BrokerConfig, name: str) -> AsyncIterator[tuple[Wire, BrokerConfig]]:
    """A proxy before the endpoint `name`, and the configuration that goes through it."""
    async with trio.open_nursery() as nursery:
        wire = Wire(getattr(planes, name), nursery)
        await wire.open()
        yield wire, msgspec.structs.replace(planes, **{name: wire.endpoint})
        nursery.cancel_scope.cancel()


async def steadily(publisher: TelemetryPublisher, value: float = 0.0) -> None:
    """A sample each 50 ms, with its number."""
    number = value
    while True:
        publisher.send({UP: number}, time=time.time())
        number += 1
        await trio.sleep(0.05)


def numbers(batches: list[Batch], reader: SeriesReader) -> list[float]:
    return [value for batch in batches for key, value in reader.read(batch)[0] if key == UP]


async def some(feed: SampleFeed, reader: SeriesReader, count: int) -> list[Batch]:
    batches: list[Batch] = []
    while len(numbers(batches, SeriesReader())) < count:
        batches += await feed.__anext__()
    return batches


async def figures(bus: Bus, wanted: str, **having: str) -> tuple[Labels, float]:
    """The first positive sample of a metric with these labels, of whoever reports it."""
    reader = SeriesReader()
    async with bus.samples(["telemetry/"]) as feed:
        async for batches in feed:
            for batch in batches:
                for key, value in reader.read(batch)[0]:
                    tags = dict(key)
                    if tags[NAME] == wanted and having.items() <= tags.items() and value > 0:
                        return key, value
    raise AssertionError


async def test_what_was_measured_while_the_link_was_cut_arrives_afterwards_in_order_and_says_how_late(
    planes: BrokerConfig,
) -> None:
    with trio.fail_after(60):
        async with wired(planes, "telemetry_in") as (wire, config):
            async with (
                client.open_bus(planes, "cli/1") as other,
                other.samples(["telemetry/a/"]) as feed,
                client.open_bus(config, "host/a") as bus,
                trio.open_nursery() as nursery,
            ):
                publisher, reader = bus.telemetry("a", "host"), SeriesReader()
                nursery.start_soon(steadily, publisher)
                batches = await some(feed, reader, 5)
                wire.cut()
                cut_at = trio.current_time()
                while trio.current_time() < cut_at + 3 * MARK_LATE_S:  # noqa: ASYNC110
                    await trio.sleep(0.1)
                wire.refuses = False
                while not any(batch.delay >= MARK_LATE_S for batch in batches):
                    batches += await feed.__anext__()
                while batches[-1].delay:
                    batches += await feed.__anext__()
                seen = numbers(batches, reader)
                assert seen == [float(n) for n in range(int(seen[0]), int(seen[-1]) + 1)]
                assert [batch.time for batch in batches] == sorted(batch.time for batch in batches)
                assert (feed.missed, publisher.dropped) == (0, 0)
                nursery.cancel_scope.cancel()


async def test_what_was_lost_with_a_link_that_was_back_before_anything_else_was_sent_arrives_all_the_same(
    planes: BrokerConfig,
) -> None:
    with trio.fail_after(60):
        async with wired(planes, "telemetry_in") as (wire, config):
            async with (
                client.open_bus(config, "host/a") as bus,
                client.open_bus(planes, "cli/1") as other,
                other.samples(["telemetry/a/host/"]) as feed,
            ):
                publisher, reader = bus.telemetry("a", "host"), SeriesReader()
                while True:  # until there is a link
                    publisher.send({UP: 0.0}, time=time.time())
                    with trio.move_on_after(0.5):
                        assert set(numbers(await some(feed, reader, 1), reader)) == {0.0}
                        break
                wire.silent = True
                for n in (1.0, 2.0):
                    publisher.send({UP: n}, time=time.time())
                await trio.sleep(0.1)  # they are swallowed
                wire.cut()
                wire.silent = wire.refuses = False
                seen: list[float] = []
                while len(seen) < 2:
                    seen += [value for value in numbers(await feed.__anext__(), reader) if value]
                assert seen == [1.0, 2.0]
                assert feed.missed == 0


async def test_a_half_open_link_is_known_within_two_seconds_and_its_gap_is_told(planes: BrokerConfig) -> None:
    with trio.fail_after(90):
        async with wired(planes, "telemetry_out") as (wire, config):
            async with (
                client.open_bus(planes, "host/a") as bus,
                client.open_bus(config, "rules") as other,
                other.samples(["telemetry/a/"]) as feed,
                trio.open_nursery() as nursery,
            ):
                other.telemetry("fleet", "rules")  # so that it tells how its links are
                nursery.start_soon(steadily, bus.telemetry("a", "host"))
                reader = SeriesReader()
                before = numbers(await some(feed, reader, 5), reader)
                wire.silent = True
                cut_at = trio.current_time()
                while not feed.lost:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                took = trio.current_time() - cut_at
                print(f"a half-open link was known after {took:.2f} s")
                assert took <= KNOWN_WITHIN_S + 0.5  # the machine may be busy
                wire.silent = False
                after: list[float] = []
                while feed.lost or not after:
                    after += numbers(await feed.__anext__(), reader)
                assert after[-1] > before[-1]
                assert feed.missed > 0
                assert feed.losses["a/host"] == feed.missed
                key, value = await figures(bus, "bus_lost_total", source="a/host")
                assert dict(key)["link"] == "rules samples"
                assert value >= feed.missed
                nursery.cancel_scope.cancel()


SUBSCRIBER = """
import sys, time, msgspec, trio
from interlock.broker import client
from interlock.broker.config import BrokerConfig

async def main():
    config = msgspec.json.decode(sys.argv[1], type=BrokerConfig)
    async with client.open_bus(config, "cli/slow") as bus, bus.samples(["telemetry/a/"]) as feed:
        async for batches in feed:
            for batch in batches:
                if batch.source == "a/host":
                    print(time.time() - batch.time, batch.delay, batch.time, flush=True)

trio.run(main)
"""


async def test_a_stopped_subscriber_harms_only_itself_and_takes_nothing_old_for_new(planes: BrokerConfig) -> None:
    with trio.fail_after(90):
        async with (
            client.open_bus(planes, "host/a") as bus,
            client.open_bus(planes, "cli/1") as other,
            other.samples(["telemetry/a/"]) as feed,
            trio.open_nursery() as nursery,
        ):
            reader = SeriesReader()
            nursery.start_soon(steadily, bus.telemetry("a", "host"))
            process = await trio.lowlevel.open_process(
                [sys.executable, "-c", SUBSCRIBER, msgspec.json.encode(planes).decode()], stdout=subprocess.PIPE
            )
            assert process.stdout is not None
            try:
                lines = Lines(process.stdout)
                await lines.next()
                os.kill(process.pid, signal.SIGSTOP)
                stopped, stopped_at = trio.current_time(), time.time()
                seen: list[float] = []
                while trio.current_time() < stopped + 2 * LATE_S:
                    seen += numbers(await feed.__anext__(), reader)
                assert seen == [float(n) for n in range(int(seen[0]), int(seen[-1]) + 1)]
                assert feed.missed == 0
                os.kill(process.pid, signal.SIGCONT)
                late, delay = 0, 1.0
                while not late or delay:
                    line = await lines.next()
                    age, delay, taken = map(float, line.split())
                    # what it had in its hands when it was stopped had been judged already
                    assert abs(age - delay) < LATE_S or taken <= stopped_at, line
                    late += delay > LATE_S
            finally:
                process.kill()
                await process.wait()
            nursery.cancel_scope.cancel()


class Lines:
    """What a process prints, line by line."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._rest = b""

    async def next(self) -> bytes:
        while b"\n" not in self._rest:
            self._rest += await self._stream.receive_some()
        line, _, self._rest = self._rest.partition(b"\n")
        return line


async def test_every_role_that_publishes_says_twice_a_second_that_it_is_up_and_then_goodbye(
    planes: BrokerConfig,
) -> None:
    with trio.fail_after(60):
        async with client.open_bus(planes, "cli/1") as other:
            async with other.samples(["telemetry/"]) as feed:
                reader = SeriesReader()
                up: list[float] = []
                ended: list[Labels] = []
                key = labels("role_up", host="a", role="monitor", name="b")
                async with client.open_bus(planes, "monitor/b") as bus:
                    bus.telemetry("a", "monitor")
                    while len(up) < 3:
                        for batch in await feed.__anext__():
                            up += [batch.time for found, value in reader.read(batch)[0] if (found, value) == (key, 1.0)]
                assert up[-1] - up[-2] < KNOWN_WITHIN_S
                while key not in ended:
                    for batch in await feed.__anext__():
                        ended += reader.read(batch)[1]
            await figures(other, "role_up", role="broker", name="telemetry")
