"""The programs in docs/wire.md run as they stand there, each in a process that knows nothing of Interlock."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from interlock.broker import client, topics
from interlock.broker.config import BrokerConfig
from interlock.broker.direct import serve_direct
from interlock.broker.facts import HostDown
from interlock.broker.samples import labels
from interlock.broker.sockets import open_sockets
from interlock.broker.wire import Event

DOC = Path(__file__).parents[2] / "docs" / "wire.md"
FOLLOW, MEASURE = re.findall(r"```python\n(.*?)```", DOC.read_text("utf-8"), re.DOTALL)


class Program:
    """A process and the lines it has printed."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self.said = b""

    async def until(self, done: Callable[[list[str]], bool]) -> list[str]:
        assert self._process.stdout is not None
        while not done(lines := self.said.decode().splitlines()):
            chunk = await self._process.stdout.receive_some()
            assert chunk, f"it has ended: {lines}"
            self.said += chunk
        return lines


@asynccontextmanager
async def running(program: str, *arguments: str) -> AsyncIterator[Program]:
    process = await trio.lowlevel.open_process([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield Program(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def lossy(source: str, *, task_status: trio.TaskStatus[str]) -> None:
    """Passes a feed on, and loses two of three events of it."""
    async with open_sockets() as sockets:
        sub = sockets.open("sub", connect=source, subscribe=[""])
        xpub = sockets.open("xpub", bind="tcp://127.0.0.1:*")
        task_status.started(xpub.endpoint)
        events = 0
        while True:
            frames = await sub.receive()
            events += frames[0] != b"beat/"
            if frames[0] == b"beat/" or events % 3 == 0:
                xpub.send_nowait(frames)


async def test_the_first_program_publishes_and_follows_the_log_without_hole_or_repetition_on_a_feed_that_loses_most(
    planes: BrokerConfig, nursery: trio.Nursery
) -> None:
    feed = await nursery.start(lossy, planes.feed)
    with trio.fail_after(90):
        async with client.open_bus(planes, "host/beta") as bus:
            await bus.publish(topics.host_fact("beta"), HostDown(host="before"))
            async with running(FOLLOW, planes.events, feed) as program:
                await program.until(lambda lines: any("fact/host/alpha/ 2" in line for line in lines))
                for n in range(3, 63):
                    topic = topics.host_fact("beta") if n % 2 else topics.rollback("beta")  # half is not its own
                    await bus.publish(topic, HostDown(host=str(n)))
                    await trio.lowlevel.checkpoint()
                lines = await program.until(lambda lines: any("fact/host/beta/ 61" in line for line in lines))
    assert "'op': 'ack'" in lines[0]
    assert "'seq': 2" in lines[0]
    expected = [
        "fact/host/beta/ 1 {'type': 'host-down', 'host': 'before'}",
        "fact/host/alpha/ 2 {'type': 'host-down', 'host': 'alpha'}",
        *(f"fact/host/beta/ {n} {{'type': 'host-down', 'host': '{n}'}}" for n in range(3, 63, 2)),
    ]
    assert [line for line in lines[1:] if line.startswith("fact/")] == expected
    assert "a gap: asking the log" in lines
    nursery.cancel_scope.cancel()


async def test_the_second_program_asks_a_host_measures_and_hears_newest_values_and_what_comes(
    planes: BrokerConfig,
) -> None:
    taken: list[Event] = []
    warm = labels("fan_speed", host="beta")
    with trio.fail_after(90):
        async with (
            open_sockets() as sockets,
            client.open_bus(planes, "host/beta") as bus,
            trio.open_nursery() as nursery,
        ):
            control = await nursery.start(serve_direct, sockets, "tcp://127.0.0.1:*", taken.append)
            async with client.open_bus(planes, "rules") as rules, rules.samples(["telemetry/beta/"]) as known:
                publisher = bus.telemetry("beta", "fan")
                publisher.send({warm: 1200.0}, time=1.0)
                while not any(batch.source == "beta/fan" and batch.ids for batch in await anext(known)):
                    pass
                async with running(MEASURE, planes.telemetry_in, planes.telemetry_out, control) as program:
                    lines = await program.until(lambda lines: "now what comes" in lines)
                    assert lines[0] == "True "
                    assert "beta/fan fan_speed 1200.0" in lines
                    publisher.send({warm: 1300.0}, time=2.0)
                    lines = await program.until(lambda lines: "beta/fan fan_speed 1300.0" in lines)
                    await program.until(lambda lines: "alpha/thermometer room_temperature_celsius 21.5" in lines)
            nursery.cancel_scope.cancel()
    assert [(event.topic, event.header.source) for event in taken] == [("rollback/alpha/", "my program")]
    assert not any("lost" in line for line in lines)
