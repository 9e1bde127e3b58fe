"""Samples through a real telemetry plane."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
import trio

from interlock.broker import backlog, client
from interlock.broker.bus import Bus, SampleFeed, TelemetryPublisher
from interlock.broker.config import BrokerConfig
from interlock.broker.samples import Batch, Labels, SeriesReader, labels
from interlock.broker.sockets import open_sockets

UP = labels("up", host="a")
LOAD = labels("load", host="a")
PULSES = 1e6  # the tests' own batches are of the first days of 1970


async def joined(bus: Bus, feed: SampleFeed) -> tuple[TelemetryPublisher, Batch]:
    """Send until something arrives: from then on nothing is lost for being early."""
    publisher = bus.telemetry("a", "monitor")
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                while True:
                    publisher.send({UP: 0.0}, time=1.0)
                    await trio.sleep(0.02)

            nursery.start_soon(send)
            async for batches in feed:
                found = [batch for batch in batches if batch.source == "a/monitor" and batch.time == 1.0]
                if found:
                    break
            nursery.cancel_scope.cancel()
    return publisher, found[-1]


async def until(feed: SampleFeed, time: float) -> list[Batch]:
    """What comes up to the batch of this time, without what roles say of themselves."""
    batches: list[Batch] = []
    with trio.fail_after(30):
        while not batches or batches[-1].time < time:
            batches += [batch for batch in await feed.__anext__() if batch.time < PULSES]
    return batches


async def test_samples_arrive_as_they_were_sent(planes: BrokerConfig) -> None:
    async with client.open_bus(planes, "host/a") as bus, bus.samples(["telemetry/a/"]) as feed:
        publisher, first = await joined(bus, feed)
        reader = SeriesReader()
        reader.read(first)
        for n in range(50):  # fewer than what may wait for the connection
            publisher.send({UP: float(n), LOAD: 0.5}, time=2.0 + n)
        seen = [sample for batch in await until(feed, 51.0) for sample in reader.read(batch)[0]]
        assert [value for key, value in seen if key == UP][-50:] == [float(n) for n in range(50)]
        assert (LOAD, 0.5) in seen
        assert feed.missed == 0
        assert publisher.dropped == 0


async def test_a_late_joiner_is_whole_with_the_next_announcements(planes: BrokerConfig) -> None:
    async with client.open_bus(planes, "host/a") as bus, bus.samples(["telemetry/"]) as early:
        publisher, _ = await joined(bus, early)
        for n in range(10):
            publisher.send({UP: 1.0, LOAD: 0.5}, time=2.0 + n / 100)
        async with client.open_bus(planes, "cli/1") as other, other.samples(["telemetry/"]) as late:
            reader = SeriesReader()
            seen: set[Labels] = set()
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:

                    async def send() -> None:
                        time = 3.0
                        while True:
                            time += 0.1
                            publisher.send({UP: 1.0, LOAD: 0.5}, time=time)
                            await trio.sleep(0.01)

                    nursery.start_soon(send)
                    while not seen >= {UP, LOAD}:
                        for batch in await late.__anext__():
                            seen |= {key for key, _ in reader.read(batch)[0]}
                    nursery.cancel_scope.cancel()


async def test_a_late_joiner_gets_the_newest_values_at_once_and_nothing_twice(planes: BrokerConfig) -> None:
    async with client.open_bus(planes, "host/a") as bus, bus.samples(["telemetry/"]) as early:
        publisher, _ = await joined(bus, early)
        publisher.send({UP: 1.0, LOAD: 0.5}, time=2.0)
        publisher.send({UP: 2.0}, time=3.0)
        await until(early, 3.0)
        async with client.open_bus(planes, "cli/1") as other, other.samples(["telemetry/a/"]) as late:
            reader = SeriesReader()
            values: dict[Labels, float] = {}
            times = set()
            for batch in (remembered := await late.__anext__()):
                assert batch.cached
                assert batch.delay < 30
                values |= reader.read(batch)[0]
                times.add(batch.time)
            assert (values[LOAD], values[UP]) == (0.5, 2.0)
            assert {2.0, 3.0} <= times
            assert reader.unresolved == 0
            publisher.send({UP: 3.0}, time=4.0)
            (live,) = await until(late, 4.0)
            assert (live.cached, live.seq > remembered[-1].seq) == (False, True)
            assert reader.read(live)[0] == [(UP, 3.0)]
            assert late.missed == 0


async def test_without_a_broker_sending_never_blocks_and_keeps_the_newest() -> None:
    nowhere = BrokerConfig(telemetry_in="ipc:///tmp/il-none/t", events="ipc:///tmp/il-none/e")
    async with client.open_bus(nowhere, "host/a") as bus:
        publisher = bus.telemetry("a", "monitor")
        for n in range(backlog.BACKLOG_BATCHES + 500):
            publisher.send({UP: float(n)}, time=float(n))
        assert publisher.sent == 0
        assert 500 <= publisher.dropped < 600  # and what it says of itself, twice a second


async def test_publishers_and_readers_ride_over_a_killed_broker_and_nothing_is_missing_untold(
    broker_role: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "BACKLOG_S", 600.0)  # a broker may start slowly where much else runs
    config = broker_role.fleet.broker
    with trio.fail_after(100):
        await broker_role.start()
        async with client.open_bus(config, "host/a") as bus, client.open_bus(config, "cli/1") as other:
            async with other.samples(["telemetry/a/"]) as feed:
                publisher, first = await joined(bus, feed)
                seqs = [first.seq]

                async def see(time: float) -> None:
                    while True:
                        for batch in await feed.__anext__():
                            if batch.seq != seqs[-1]:
                                seqs.append(batch.seq)
                            if batch.time == time:
                                return

                publisher.send({UP: 1.0}, time=10.0)
                await see(10.0)
                await broker_role.kill()
                while not feed.lost:
                    publisher.send({UP: 10.0}, time=20.0)
                    await trio.sleep(0.1)
                await broker_role.start()
                publisher.send({UP: 11.0}, time=21.0)
                await see(21.0)  # at the latest with what is remembered, if we are back later
                assert seqs == sorted(set(seqs))
                assert feed.missed == seqs[-1] - seqs[0] + 1 - len(seqs)
                assert publisher.dropped == 0
                while feed.lost:  # a batch may overtake the first beat, which is what ends it
                    await feed.__anext__()


async def test_a_subscriber_that_does_not_read_stops_nobody_and_sees_what_it_missed(
    planes: BrokerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SAMPLES_QUEUE", 10)
    async with client.open_bus(planes, "cli/1") as slow_bus, slow_bus.samples(["telemetry/"]) as slow:
        monkeypatch.undo()
        async with client.open_bus(planes, "host/a") as bus, bus.samples(["telemetry/"]) as feed:
            publisher, first = await joined(bus, feed)
            await joined(bus, slow)
            many = {labels(f"metric_{n}", host="a"): float(n) for n in range(2000)}
            time = 2.0
            with trio.fail_after(100):
                while not slow.missed:
                    for _ in range(12):  # 1,200 batches, 40 MB: more than the two queues and TCP's buffers hold
                        for _ in range(100):
                            time += 0.01
                            publisher.send(many, time=time)
                            await trio.lowlevel.checkpoint()
                        assert await feed.__anext__()
                    await slow.__anext__()
            assert first.source == "a/monitor"


async def test_only_batches_under_telemetry_pass(planes: BrokerConfig) -> None:
    good = msgpack.packb({"source": "a/x", "epoch": 1, "seq": 1, "time": 9.0})
    async with client.open_bus(planes, "host/a") as bus, bus.samples([""]) as feed:
        publisher, _ = await joined(bus, feed)
        async with open_sockets() as sockets:
            dealer = sockets.open("dealer", connect=planes.telemetry_in)
            await dealer.send([b"fact/host/a/", good])
            await dealer.send([b"telemetry/a", good])
            await dealer.send([b"telemetry/a/y/", good])
            await dealer.send([b"telemetry/a/x/", msgpack.packb({**msgpack.unpackb(good), "cached": True})])
            await dealer.send([b"telemetry/a/x/", good])
            batches = await until(feed, 9.0)
        assert [batch.source for batch in batches if batch.source.startswith("a/x")] == ["a/x"]
        assert publisher.dropped == 0
