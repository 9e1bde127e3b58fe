"""Events straight to a host, past the broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from interlock.broker import client, topics
from interlock.broker.config import BrokerConfig
from interlock.broker.direct import serve_direct
from interlock.broker.errors import InUse, Refused, Unreachable
from interlock.broker.facts import HostDown
from interlock.broker.sockets import open_sockets
from interlock.broker.wire import Event

NOWHERE = BrokerConfig(  # nobody listens there: direct needs no broker
    events="ipc:///tmp/il-none/e", feed="ipc:///tmp/il-none/f", telemetry_in="ipc:///tmp/il-none/i"
)
TOPIC = topics.rollback("a")


@asynccontextmanager
async def serving(accept: Callable[[Event], None], endpoint: str = "tcp://127.0.0.1:*") -> AsyncIterator[str]:
    async with open_sockets() as sockets, trio.open_nursery() as nursery:
        yield await nursery.start(serve_direct, sockets, endpoint, accept)
        nursery.cancel_scope.cancel()


async def test_an_accepted_event_arrives_once_however_often_it_is_sent() -> None:
    accepted: list[Event] = []
    async with serving(accepted.append) as endpoint, client.open_bus(NOWHERE, "rules") as bus:
        for _ in range(3):
            await bus.direct(endpoint, TOPIC, HostDown(host="a"), id="once", timeout=20)
        await bus.direct(endpoint, TOPIC, HostDown(host="a"), timeout=20)
    assert [(event.header.id == "once", event.topic, event.header.source) for event in accepted] == [
        (True, TOPIC, "rules"),
        (False, TOPIC, "rules"),
    ]


async def test_one_can_not_use_up_the_ids_of_another() -> None:
    accepted: list[Event] = []
    async with (
        serving(accepted.append) as endpoint,
        client.open_bus(NOWHERE, "operator/x") as other,
        client.open_bus(NOWHERE, "rules") as bus,
    ):
        await other.direct(endpoint, TOPIC, HostDown(host="a"), id="m/1/rules", timeout=20)
        await bus.direct(endpoint, TOPIC, HostDown(host="a"), id="m/1/rules", timeout=20)
    assert [event.header.source for event in accepted] == ["operator/x", "rules"]


async def test_a_refusal_comes_back_with_its_reason() -> None:
    def refuse(event: Event) -> None:
        raise Refused("stale epoch 3", where="tutor")

    async with serving(refuse) as endpoint, client.open_bus(NOWHERE, "rules") as bus:
        with pytest.raises(Refused, match="tutor: stale epoch 3"):
            await bus.direct(endpoint, TOPIC, HostDown(host="a"), timeout=20)


async def test_a_host_that_comes_back_gets_nothing_that_was_given_up() -> None:
    accepted: list[Event] = []
    async with client.open_bus(NOWHERE, "rules") as bus:
        async with serving(accepted.append) as endpoint:
            await bus.direct(endpoint, TOPIC, HostDown(host="first"), timeout=20)
        with pytest.raises(Unreachable, match="is that host running"):
            await bus.direct(endpoint, TOPIC, HostDown(host="late"), timeout=0.1)
        async with serving(accepted.append, endpoint):
            await bus.direct(endpoint, TOPIC, HostDown(host="now"), timeout=20)
    assert [event.body for event in accepted] == [HostDown(host="first"), HostDown(host="now")]


async def test_a_taken_endpoint_is_in_use() -> None:
    async with serving(lambda event: None) as endpoint, open_sockets() as sockets:
        with pytest.raises(InUse):
            await serve_direct(sockets, endpoint, lambda event: None)
