"""`ping`: who takes a command, over the bus in memory; the clock jumps."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from interlock.broker import topics
from interlock.broker.config import FleetConfig, HostConfig
from interlock.broker.errors import ConfigError, Unreachable
from interlock.broker.memory import MemoryBroker
from interlock.coordinator.ping import ping

FLEET = FleetConfig(hosts={name: HostConfig(control="tcp://127.0.0.1:1") for name in ("alpha", "beta", "gamma")})
Clock = trio.testing.MockClock


async def host(
    broker: MemoryBroker, name: str, after_s: float, reason: str = "", *, task_status: trio.TaskStatus[None]
) -> None:
    bus = broker.bus(f"host/{name}")
    async with bus.events([topics.command(name), topics.ALL_HOSTS]) as feed:
        task_status.started()
        async for event in feed:
            await trio.sleep(after_s)
            bus.receipt(event, reason)


async def test_all_hosts_are_asked_at_once_and_the_silent_ones_named(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker()
    await nursery.start(host, broker, "alpha", 0.25)
    await nursery.start(host, broker, "beta", 0.5, "its deadline passed")
    roll = await ping(broker.bus("operator/o"), FLEET, [], timeout=5.0)
    assert [(a.host, a.refused, round(a.ms)) for a in roll.answers] == [
        ("alpha", "", 250),
        ("beta", "its deadline passed", 500),
    ]
    assert roll.silent == ["gamma"]
    assert roll.exit_code == 3
    assert [event.topic for event in broker.log] == [topics.ALL_HOSTS]
    nursery.cancel_scope.cancel()


async def test_only_the_named_are_asked(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    broker = MemoryBroker()
    await nursery.start(host, broker, "alpha", 0.1)
    await nursery.start(host, broker, "beta", 0.1, "no")
    bus = broker.bus("operator/o")
    assert (await ping(bus, FLEET, ["alpha", "alpha"], timeout=5.0)).exit_code == 0
    assert (await ping(bus, FLEET, ["alpha", "beta"], timeout=5.0)).exit_code == 12
    assert {event.topic for event in broker.log} == {topics.command("alpha"), topics.command("beta")}
    nursery.cancel_scope.cancel()


async def test_an_unknown_host_and_a_silent_broker_are_errors(autojump_clock: Clock) -> None:
    broker = MemoryBroker()
    with pytest.raises(ConfigError, match="unknown host 'delta'"):
        await ping(broker.bus("operator/o"), FLEET, ["delta"], timeout=5.0)
    assert broker.log == []
    broker.up = False
    with pytest.raises(BaseExceptionGroup) as group:
        await ping(broker.bus("operator/o"), FLEET, [], timeout=5.0)
    assert group.group_contains(Unreachable)
