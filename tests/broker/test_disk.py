"""A full disk, a log that can not be written or is damaged: no event is taken that is not kept, the rest goes on."""

from __future__ import annotations

import os
import resource
import sqlite3
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from interlock.broker import client, topics
from interlock.broker.bus import Bus
from interlock.broker.config import BrokerConfig
from interlock.broker.errors import LogError, Refused
from interlock.broker.facts import HostDown
from interlock.broker.log import Draft, EventLog
from interlock.broker.planes import serve_planes
from interlock.broker.wire import Event, Header

A = topics.host_fact("a")
ENDPOINTS = ("events", "feed", "telemetry_in", "telemetry_out")


async def read(bus: Bus, count: int) -> list[Event]:
    async with bus.events(["fact/"], after=0) as feed:
        with trio.fail_after(20):
            return [await anext(feed) for _ in range(count)]


async def telemetry_flows(bus: Bus) -> None:
    async with bus.samples(["telemetry/"]) as samples, trio.open_nursery() as nursery:

        async def send() -> None:
            publisher = bus.telemetry("a", "monitor")
            while True:
                publisher.send({}, time=1.0)
                await trio.sleep(0.02)

        nursery.start_soon(send)
        with trio.fail_after(20):
            await anext(samples)
        nursery.cancel_scope.cancel()


async def test_a_disk_that_fills_up_under_a_running_broker_costs_nothing_that_was_acknowledged(
    broker_role: Any, folder: Path
) -> None:
    await broker_role.start()
    process = psutil.Process(broker_role.pid)
    acked = []
    with trio.fail_after(60):
        async with client.open_bus(broker_role.fleet.broker, "host/a") as bus:
            acked.append(await bus.publish(A, HostDown(host="before"), timeout=20))
            process.rlimit(resource.RLIMIT_FSIZE, (100_000, -1))  # no file of it grows beyond
            with pytest.raises(Refused, match="disk full"):  # noqa: PT012  (one of them)
                for n in range(60):
                    acked.append(await bus.publish(A, HostDown(host=f"{n}" * 3000), timeout=20))
            with pytest.raises(Refused, match="disk full"):
                await bus.publish(A, HostDown(host="x" * 150_000), timeout=20)
            assert len(await read(bus, len(acked))) == len(acked)
            await telemetry_flows(bus)
            process.rlimit(resource.RLIMIT_FSIZE, (-1, -1))
            acked.append(await bus.publish(A, HostDown(host="after"), timeout=20))
    await broker_role.end()
    log = EventLog(folder / "state" / "broker" / "events.sqlite")
    assert acked == list(range(1, len(acked) + 1))
    assert log.last == len(acked)
    assert log.verify().findings == []
    log.close()


@pytest.mark.parametrize("damage", ["garbage", "middle", "empty-note"])
async def test_a_broker_on_a_damaged_log_refuses_events_and_serves_what_there_is(
    damage: str, folder: Path, nursery: trio.Nursery
) -> None:
    path = folder / "log" / "events.sqlite"
    log = EventLog(path)
    log.append([Draft(A, Header(id=str(n), source="s", time=1.0), HOST_DOWN) for n in range(3)], now=1.0)
    log.close()
    if damage == "garbage":
        path.write_bytes(os.urandom(8192))
    else:
        statement = {
            "middle": "UPDATE events SET hash = x'00' WHERE seq = 2",
            "empty-note": "DELETE FROM about WHERE key = 'head'",
        }[damage]
        with sqlite3.connect(path) as connection:
            connection.execute(statement)
        connection.close()
    kept = path.read_bytes()
    config = BrokerConfig(**{name: f"ipc://{folder}/{name}" for name in ENDPOINTS})
    await nursery.start(serve_planes, config, folder / "log")
    async with client.open_bus(config, "host/a") as bus:
        with pytest.raises(Refused, match=r"damaged|can't be"):
            await bus.publish(A, HostDown(host="new"), timeout=20)
        await telemetry_flows(bus)
        if damage == "middle":
            assert [event.header.seq for event in await read(bus, 3)] == [1, 2, 3]
    assert path.read_bytes() == kept


HOST_DOWN = b"\x82\xa4type\xa9host-down\xa4host\xa1x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to files that are read-only")
def test_a_log_file_that_is_read_only_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    log = EventLog(path)
    log.append([Draft(A, Header(id="1", source="s", time=1.0), b"\x80")], now=1.0)
    log.close()
    path.chmod(0o400)
    check_read_only(EventLog(path))


def test_a_log_that_became_read_only_is_read(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.sqlite")
    log.append([Draft(A, Header(id="1", source="s", time=1.0), b"\x80")], now=1.0)
    log._writer.execute("PRAGMA query_only = 1")
    check_read_only(log)


def check_read_only(log: EventLog) -> None:
    with pytest.raises(LogError, match="readonly"):
        log.append([Draft(A, Header(id="2", source="s", time=1.0), b"\x80")], now=1.0)
    assert [record.header.id for record in log.read(0, [""], limit=10, max_bytes=1 << 20).records] == ["1"]
    log.close()
