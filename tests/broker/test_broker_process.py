"""The broker as it really runs: two processes, killed without warning, while others go on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from interlock.broker import client, topics
from interlock.broker.bus import Bus, EventFeed
from interlock.broker.errors import Unreachable
from interlock.broker.facts import HostDown
from interlock.broker.log import EventLog
from interlock.broker.role import EXIT_WRONG

A = topics.host_fact("a")
EVENTS = 600
KILLS = 3


async def collect(feed: EventFeed, into: list[tuple[int, str]], until: str) -> None:
    async for event in feed:
        assert isinstance(event.body, HostDown)
        into.append((event.header.seq, event.body.host))
        if event.body.host == until:
            return


async def test_kill_9_while_publishing_loses_repeats_and_reorders_nothing(broker_role: Any, folder: Path) -> None:
    await broker_role.start()
    config = broker_role.fleet.broker
    live: list[tuple[int, str]] = []
    late: list[tuple[int, str]] = []
    acked: list[tuple[int, str]] = []

    async def publish(bus: Bus) -> None:
        for n in range(EVENTS // 3):
            try:
                seq = await bus.publish(topics.host_fact("b"), HostDown(host=f"p{n}"), timeout=0.5)
            except Unreachable:
                continue  # the outcome is unknown
            acked.append((seq, f"p{n}"))

    async def post(bus: Bus) -> None:
        for n in range(EVENTS):
            bus.post(A, HostDown(host=str(n)))
            await trio.sleep(0.001)
            if n % (EVENTS // KILLS) == EVENTS // KILLS // 2:
                await broker_role.kill()
                await broker_role.start()
        await bus.flushed()

    with trio.fail_after(90):
        async with client.open_bus(config, "host/a") as bus, client.open_bus(config, "host/b") as other:
            async with bus.events(["fact/"], after=0) as feed, trio.open_nursery() as nursery:
                nursery.start_soon(collect, feed, live, "last")
                async with trio.open_nursery() as publishers:
                    publishers.start_soon(publish, other)
                    publishers.start_soon(post, other)
                await other.publish(A, HostDown(host="last"), timeout=20)
                async with other.events(["fact/"], after=0) as again:
                    await collect(again, late, "last")
    await broker_role.end()
    log = EventLog(folder / "state" / "broker" / "events.sqlite")
    count = log.last
    log.close()
    assert live == late
    assert [seq for seq, _ in live] == list(range(1, count + 1))
    assert [host for _, host in live if host.isdigit()] == [str(n) for n in range(EVENTS)]
    assert len({host for _, host in live}) == count
    assert set(acked) <= set(live)
    assert acked


async def test_a_second_broker_on_the_same_state_says_who_holds_it(broker_role: Any) -> None:
    await broker_role.start()
    second = await trio.run_process(
        [sys.executable, "-m", "interlock.broker", "--fleet", str(broker_role.path)],
        capture_stderr=True,
        check=False,
    )
    assert second.returncode == EXIT_WRONG
    message = second.stderr.decode().splitlines()
    assert len(message) == 1
    assert f"held by broker, process {broker_role.pid}" in message[0]


@pytest.mark.parametrize("name", ["events", "telemetry_out"])
async def test_a_port_in_use_ends_the_role_with_a_clear_line(broker_role: Any, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = broker_role.path.read_text()
        old = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        broker_role.path.write_text(text.replace(old, f'{name} = "tcp://127.0.0.1:{port}"'))
        ended = await trio.run_process(
            [sys.executable, "-m", "interlock.broker", "--fleet", str(broker_role.path)],
            capture_stderr=True,
            check=False,
        )
    assert ended.returncode == EXIT_WRONG
    assert f"tcp://127.0.0.1:{port}: the address is in use" in ended.stderr.decode()
    assert "Traceback" not in ended.stderr.decode()


def telemetry_of(pid: int) -> psutil.Process | None:
    for child in psutil.Process(pid).children():
        with suppress(psutil.Error):  # it has just ended
            if "telemetry" in child.cmdline():
                return child
    return None


async def receive_one_batch(bus: Bus) -> None:
    async with bus.samples(["telemetry/a/"]) as samples, trio.open_nursery() as nursery:

        async def send() -> None:
            publisher = bus.telemetry("a", "monitor")
            while True:
                publisher.send({}, time=1.0)
                await trio.sleep(0.02)

        nursery.start_soon(send)
        await samples.__anext__()
        nursery.cancel_scope.cancel()


async def test_a_killed_telemetry_process_is_started_again_and_clients_ride_over_it(broker_role: Any) -> None:
    await broker_role.start()
    with trio.fail_after(60):
        async with client.open_bus(broker_role.fleet.broker, "host/a") as bus:
            await receive_one_batch(bus)
            first = telemetry_of(broker_role.pid)
            assert first is not None
            first.kill()
            while (second := telemetry_of(broker_role.pid)) is None or second.pid == first.pid:  # noqa: ASYNC110
                await trio.sleep(0.05)
            await receive_one_batch(bus)
            await bus.publish(A, HostDown(host="events go on"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_the_telemetry_process_ends_with_the_broker_however_it_ends(broker_role: Any, number: int) -> None:
    await broker_role.start()
    child = telemetry_of(broker_role.pid)
    assert child is not None
    with trio.fail_after(30):
        code = await broker_role.end(number)
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
            await trio.sleep(0.02)
        assert code == (-number if number == signal.SIGKILL else 0)
        await broker_role.start()  # nothing of the old one is in the way


async def test_a_wrong_fleet_file_is_one_line_and_exit_code_2(folder: Path) -> None:
    ended = await trio.run_process(
        [sys.executable, "-m", "interlock.broker"],
        env={**os.environ, "INTERLOCK_FLEET": str(folder / "none.toml")},
        capture_stderr=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert ended.returncode == EXIT_WRONG
    assert ended.stderr.decode().startswith("interlock broker: ")
    assert "there is no such file" in ended.stderr.decode()
