"""The bus in memory behaves as the real one, under a clock that jumps."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from interlock.broker import topics
from interlock.broker.errors import ConfigError, Refused, Unreachable
from interlock.broker.facts import HostDown
from interlock.broker.memory import MemoryBroker
from interlock.broker.samples import labels
from interlock.broker.wire import Event

A, B = topics.host_fact("a"), topics.host_fact("b")


async def test_events_are_numbered_de_duplicated_and_delivered(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(clock=trio.current_time)
    bus, other = broker.bus("host/a"), broker.bus("rules")
    assert await bus.publish(A, HostDown(host="1"), id="x") == 1
    assert await bus.publish(A, HostDown(host="1"), id="x") == 1
    async with other.events([A], after=0) as feed, other.events([A]) as live:
        assert live.caught_up.is_set()
        bus.post(B, HostDown(host="2"))
        bus.post(A, HostDown(host="3"))
        await bus.flushed()
        seen = [await feed.__anext__(), await feed.__anext__()]
        assert [(e.header.seq, e.header.prev, e.header.source) for e in seen] == [(1, 0, "host/a"), (3, 1, "host/a")]
        assert (await live.__anext__()).header.seq == 3
        assert live.position == 3


async def test_without_a_broker_publishing_times_out_and_posts_wait(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(clock=trio.current_time)
    broker.up = False
    bus = broker.bus("host/a")
    bus.post(A, HostDown(host="1"))
    with pytest.raises(Unreachable):
        await bus.publish(A, HostDown(host="2"))
    assert trio.current_time() >= 5.0
    assert broker.log == []
    broker.up = True
    await bus.flushed()
    assert [event.body for event in broker.log] == [HostDown(host="1")]


async def test_samples_reach_who_listens(autojump_clock: trio.testing.MockClock) -> None:
    bus = MemoryBroker().bus("host/a")
    async with bus.samples(["telemetry/a/"]) as feed:
        bus.telemetry("b", "monitor").send({labels("up", host="b"): 1.0}, time=1.0)
        bus.telemetry("a", "monitor").send({labels("up", host="a"): 1.0}, time=1.0)
        batches = await feed.__anext__()
        assert [batch.source for batch in batches] == ["a/monitor"]


async def test_direct_events_are_accepted_refused_or_unreachable(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker()
    bus = broker.bus("rules")
    accepted: list[Event] = []

    def refuse(event: Event) -> None:
        raise Refused("no")

    with broker.serve_direct("tcp://a:1", accepted.append), broker.serve_direct("tcp://b:1", refuse):
        await bus.direct("tcp://a:1", A, HostDown(host="a"))
        with pytest.raises(Refused):
            await bus.direct("tcp://b:1", A, HostDown(host="a"))
    with pytest.raises(Unreachable):
        await bus.direct("tcp://a:1", A, HostDown(host="a"))
    assert [event.body for event in accepted] == [HostDown(host="a")]
    with pytest.raises(ConfigError):
        _ = bus.sockets
