"""Whatever arrives at a socket that is no message of ours is counted, logged once a kind, and changes nothing."""

from __future__ import annotations

import logging
import random

import msgpack
import pytest
import trio

from interlock.broker import client, topics
from interlock.broker.config import BrokerConfig
from interlock.broker.direct import serve_direct
from interlock.broker.facts import HostDown
from interlock.broker.sockets import open_sockets

BOMB = b"\x91" * 100_000


def rubbish(seed: int) -> list[list[bytes]]:
    rng = random.Random(seed)
    frames = [
        [b""],
        [BOMB],
        [b"", b""],
        [b"telemetry/a/b/", BOMB],
        [b"telemetry/a/b/", msgpack.packb({"source": "a", "epoch": 1, "seq": 1, "time": 1.0, "ids": [1]})],
        [msgpack.packb({"op": "publish"}), b"fact/", BOMB, BOMB],
        [msgpack.packb({"op": "publish", "n": "x"}), b"fact/", b"", b""],
        [msgpack.packb({"op": "replay"})],
        [msgpack.packb({"op": "replay", "request": 1, "after": -5, "prefixes": ["\x00' OR 1"], "limit": -1})],
        [msgpack.packb({"op": "replay", "request": 1, "after": 1 << 63, "prefixes": [""], "limit": 1 << 40})],
        [msgpack.packb({"op": "nonsense"})],
        [msgpack.packb({"op": "ping", "request": 1 << 63})],
    ]
    frames += [[rng.randbytes(rng.randint(0, 60)) for _ in range(rng.randint(1, 6))] for _ in range(200)]
    return frames


async def test_the_planes_and_a_direct_endpoint_survive_rubbish(
    planes: BrokerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with (
        open_sockets() as sockets,
        client.open_bus(planes, "host/a") as bus,
        trio.open_nursery() as nursery,
    ):
        direct = await nursery.start(serve_direct, sockets, "tcp://127.0.0.1:*", lambda event: None)
        for endpoint in (planes.events, planes.telemetry_in, direct):
            dealer = sockets.open("dealer", connect=endpoint)
            for frames in rubbish(1):
                await dealer.send(frames)
        for endpoint in (planes.feed, planes.telemetry_out):
            # an XSUB sends whatever it likes up to the XPUB
            xsub = sockets.open("xsub", connect=endpoint)
            for frames in rubbish(2):
                await xsub.send(frames)
        with trio.fail_after(30):
            assert await bus.publish(topics.host_fact("a"), HostDown(host="a")) == 1
            await bus.direct(direct, topics.host_fact("a"), HostDown(host="a"), timeout=10)
            async with bus.events(["fact/"], after=0) as feed:
                assert (await feed.__anext__()).header.seq == 1
            async with bus.samples(["telemetry/"]) as samples:
                telemetry = bus.telemetry("a", "host")
                got = trio.Event()

                async def listen() -> None:
                    await samples.__anext__()
                    got.set()

                nursery.start_soon(listen)
                while not got.is_set():
                    telemetry.send({}, time=1.0)
                    await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    lines = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    kinds = [line.split(": ")[:2] for line in lines]  # where it came, and "dropped" what
    assert len(kinds) == len({tuple(kind) for kind in kinds}) >= 5
    assert all(len(line) < 500 for line in lines)


async def test_a_client_survives_rubbish_from_what_claims_to_be_a_broker() -> None:
    async with open_sockets() as sockets:
        kinds = {"events": "router", "feed": "xpub", "telemetry_in": "router", "telemetry_out": "xpub"}
        opened = {name: sockets.open(kind, bind="tcp://127.0.0.1:*") for name, kind in kinds.items()}
        config = BrokerConfig(**{name: socket.endpoint for name, socket in opened.items()})
        async with client.open_bus(config, "host/a") as bus:
            bus.post(topics.host_fact("a"), HostDown(host="a"))
            with trio.fail_after(30):
                peer = (await opened["events"].receive())[0]
                async with bus.events([""], after=5) as feed, bus.samples([""]) as samples:
                    for name in ("feed", "telemetry_out"):
                        while (await opened[name].receive()) != [b"\x01"]:
                            pass
                    for frames in rubbish(3):
                        await opened["events"].send([peer, *frames])
                        await opened["feed"].send(frames)
                        await opened["telemetry_out"].send(frames)
                    await opened["feed"].send([b"beat/", BOMB])
                    await opened["feed"].send([b"beat/"])
                    good = msgpack.packb({"source": "a", "epoch": 1, "seq": 1, "time": 1.0})
                    await opened["telemetry_out"].send([b"telemetry/a/b/", good])
                    batches = await samples.__anext__()
                    while batches[-1].source != "a":
                        batches = await samples.__anext__()
                    assert samples.undecodable > 0
                    assert feed.position == 5
            await opened["events"].send(
                [peer, msgpack.packb({"op": "nack", "kind": "invalid", "reason": "?", "id": ""})]
            )
            for waiting in list(bus._link.outbox.ids()):  # type: ignore[attr-defined]
                await opened["events"].send([peer, msgpack.packb({"op": "ack", "id": waiting, "seq": 1})])
            with trio.fail_after(20):
                await bus.flushed()
