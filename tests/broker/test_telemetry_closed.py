"""What the telemetry plane remembers is told only to those who may hear it live, and never to a revoked key."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest
import trio

from interlock.broker import client, wire
from interlock.broker.config import BrokerConfig, FleetConfig
from interlock.broker.keyring import Keyring
from interlock.broker.planes import serve_planes
from interlock.broker.samples import SeriesReader, labels
from interlock.broker.security import Security, load_security
from interlock.broker.sockets import open_sockets
from interlock.broker.telemetry_protocol import AskFailed, AskLast, decode_answer

ANY = BrokerConfig(
    events="tcp://127.0.0.1:*",
    feed="tcp://127.0.0.1:*",
    telemetry_in="tcp://127.0.0.1:*",
    telemetry_out="tcp://127.0.0.1:*",
)
UP = labels("up", host="alpha")
EYE = "subscriber/eye"


class Fleet:
    """A closed broker, and keys for whoever asks."""

    def __init__(self, folder: Path) -> None:
        self.fleet = FleetConfig(path=str(folder / "fleet.toml"), broker=ANY)
        self.ring = Keyring(self.fleet.keys_dir, "test")
        self.ring.ensure(["broker", "host/alpha", "host/beta", "rules"], now=time.time())
        self.ring.issue(EYE, now=time.time(), topics=["telemetry/alpha/"])

    def keys(self, identity: str) -> Security:
        found = load_security(self.fleet, identity)
        assert found is not None
        return found


@pytest.fixture
def closed(folder: Path) -> Fleet:
    return Fleet(folder)


async def test_who_may_hear_a_topic_gets_its_newest_values_and_who_may_not_is_told_so(
    closed: Fleet, folder: Path, nursery: trio.Nursery
) -> None:
    config = await nursery.start(partial(serve_planes, security=closed.keys("broker")), ANY, folder / "log")
    with trio.fail_after(60):
        async with client.open_bus(config, "", security=closed.keys("host/alpha")) as bus:
            publisher = bus.telemetry("alpha", "host")
            async with client.open_bus(config, "", security=closed.keys("rules")) as rules:
                async with rules.samples(["telemetry/"]) as live:
                    publisher.send({UP: 7.0}, time=5.0)
                    while not any(batch.time == 5.0 for batch in await live.__anext__()):
                        pass
            async with client.open_bus(config, "", security=closed.keys(EYE)) as eye:
                async with eye.samples(["telemetry/alpha/"]) as feed:
                    reader = SeriesReader()
                    first = await feed.__anext__()
                    assert all(batch.cached for batch in first)
                    assert (UP, 7.0) in [sample for batch in first for sample in reader.read(batch)[0]]
            async with open_sockets(closed.keys(EYE).curve()) as sockets:
                dealer = sockets.open("dealer", connect=config.telemetry_in)
                for number, prefix in enumerate(["", "telemetry/", "telemetry/beta/"]):
                    await dealer.send([wire.encode(AskLast(number, [prefix]))])
                    failed, batches = decode_answer(await dealer.receive())
                    assert isinstance(failed, AskFailed)
                    assert (failed.request, failed.kind, batches) == (number, "refused", [])
                await dealer.send([wire.encode(AskLast(3, ["telemetry/alpha/"]))])
                page, batches = decode_answer(await dealer.receive())
                assert page.request == 3
                assert {topic for topic, _ in batches} == {b"telemetry/alpha/host/"}
            async with client.open_bus(config, "", security=closed.keys("host/beta")) as beta:
                forged = beta.telemetry("alpha", "host")
                async with client.open_bus(config, "", security=closed.keys("rules")) as rules:
                    async with rules.samples(["telemetry/alpha/"]) as live:
                        forged.send({UP: 0.0}, time=6.0)
                        publisher.send({UP: 8.0}, time=7.0)
                        times: list[float] = []
                        while 7.0 not in times:
                            times += [batch.time for batch in await live.__anext__()]
                        assert 6.0 not in times
    nursery.cancel_scope.cancel()


async def test_a_revoked_key_is_told_nothing_any_more_on_a_connection_that_is_open(
    closed: Fleet, folder: Path, nursery: trio.Nursery
) -> None:
    config = await nursery.start(partial(serve_planes, security=closed.keys("broker")), ANY, folder / "log")
    with trio.fail_after(60):
        async with (
            client.open_bus(config, "", security=closed.keys("host/alpha")) as bus,
            client.open_bus(config, "", security=closed.keys(EYE)) as eye,
            eye.samples(["telemetry/alpha/"]) as feed,
        ):
            bus.telemetry("alpha", "host").send({UP: 1.0}, time=5.0)
            await feed.__anext__()
            closed.ring.revoke(EYE)
            while not feed.lost:  # noqa: ASYNC110
                await trio.sleep(0.05)
    nursery.cancel_scope.cancel()
