"""The network is cut and healed while events and telemetry flow: broker and host in network namespaces of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from net_parts import ip, why_not

NEAR, FAR = "10.213.77.1", "10.213.77.2"  # the broker's and the host's address; in namespaces they meet no others
CUT_S = 4.0  # longer than both sides take to know it: 1.5 s without beats, 3 s without an answer to a heartbeat
HEALED_S = 3.0  # between cuts at least


WHY_NOT = why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.serial]

BROKER = """
import sys, trio
from pathlib import Path
from interlock.broker.config import BrokerConfig
from interlock.broker.planes import serve_planes

async def main():
    at = sys.argv[1]
    config = BrokerConfig(events=f"tcp://{at}:7171", feed=f"tcp://{at}:7172",
                          telemetry_in=f"tcp://{at}:7173", telemetry_out=f"tcp://{at}:7174")
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_planes, config, Path(sys.argv[2]))
        print("ready", flush=True)

trio.run(main)
"""

# It publishes and follows both planes at once, until its standard input ends; then it says what it saw.
HOST = """
import json, sys, time, trio
from interlock.broker import client, topics
from interlock.broker.config import BrokerConfig
from interlock.broker.facts import HostDown
from interlock.broker.samples import SeriesReader, labels

async def main():
    at = sys.argv[1]
    config = BrokerConfig(events=f"tcp://{at}:7171", feed=f"tcp://{at}:7172",
                          telemetry_in=f"tcp://{at}:7173", telemetry_out=f"tcp://{at}:7174")
    topic, key = topics.host_fact("a"), labels("number", host="a")
    posted, events, values, silences, seqs, late = 0, [], [], [], [], 0
    stop, got_last, got_value = trio.Event(), trio.Event(), trio.Event()

    async def publish(bus):
        nonlocal posted
        publisher, sent = bus.telemetry("a", "host"), 0
        while not stop.is_set():
            bus.post(topic, HostDown(host=str(posted)))
            posted += 1
            if posted % 5 == 0:
                publisher.send({key: float(sent)}, time=time.time())
                sent += 1
            await trio.sleep(0.01)
        await bus.publish(topic, HostDown(host="last"), timeout=30)
        while not got_value.is_set():
            publisher.send({key: -1.0}, time=time.time())
            await trio.sleep(0.1)

    async def follow(feed):
        async for event in feed:
            events.append(event.body.host)
            if event.body.host == "last":
                got_last.set()
                return

    async def watch(feed):
        nonlocal late
        reader = SeriesReader()
        async for batches in feed:
            for batch in batches:
                if batch.source == "a/host" and not batch.cached:
                    seqs.append(batch.seq)
                    late += batch.delay >= 1.0
                for found, value in reader.read(batch)[0]:
                    if found == key and value == -1.0:
                        got_value.set()

    async def look(feed):
        since = None
        while True:
            if feed.lost and since is None:
                since = time.time()
                silences.append(since)
            elif not feed.lost:
                since = None
            await trio.sleep(0.02)

    async def listen():
        async with trio.lowlevel.FdStream(0) as stdin:
            while await stdin.receive_some():
                pass
        stop.set()

    async with client.open_bus(config, "host/a") as bus, bus.events(["fact/"], after=0) as feed:
        async with bus.samples(["telemetry/a/"]) as samples, trio.open_nursery() as nursery:
            for task in (watch, look):
                nursery.start_soon(task, samples)
            nursery.start_soon(follow, feed)
            nursery.start_soon(publish, bus)
            nursery.start_soon(listen)
            print("ready", flush=True)
            await got_last.wait()
            await got_value.wait()
            nursery.cancel_scope.cancel()
        print(json.dumps({"posted": posted, "events": events, "seqs": seqs, "missed": samples.missed,
                          "late": late, "silences": silences}), flush=True)

trio.run(main)
"""


class Net:
    """Two namespaces with one cable between them."""

    def __init__(self) -> None:
        self.near, self.far = f"il-near-{os.getpid()}", f"il-far-{os.getpid()}"

    def build(self) -> None:
        for name in (self.near, self.far):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", self.far)
        for name, address in ((self.near, NEAR), (self.far, FAR)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")

    def remove(self) -> None:
        for name in (self.near, self.far):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=10)

    def cable(self, state: str) -> None:
        ip("-n", self.near, "link", "set", "cable", state)

    def deaf(self, verb: str) -> None:
        """What the host sends does not arrive; what the broker sends leaves."""
        ip("-n", self.far, "route", verb, "blackhole", f"{NEAR}/32")

    def mute(self, verb: str) -> None:
        """The other way round."""
        ip("-n", self.near, "route", verb, "blackhole", f"{FAR}/32")


async def start(namespace: str, program: str, *arguments: str) -> trio.Process:
    process = await trio.lowlevel.open_process(
        ["ip", "netns", "exec", namespace, sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    said = b""
    while b"\n" not in said and (chunk := await process.stdout.receive_some()):
        said += chunk
    if said != b"ready\n":
        process.kill()
        await process.wait()
        raise AssertionError(said)
    return process


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    made = Net()
    try:
        made.build()
        yield made
    finally:
        made.remove()


async def run(net: Net, folder: Path, cuts: list[tuple[Callable[[], None], Callable[[], None]]]) -> dict[str, Any]:
    """Publish during all cuts; what the host saw."""
    processes = [await start(net.near, BROKER, NEAR, str(folder / "log"))]
    try:
        host = await start(net.far, HOST, NEAR)
        processes.append(host)
        for cut, heal in cuts:
            await trio.sleep(0.2)
            cut()
            with trio.move_on_after(CUT_S):
                await host.wait()
            heal()
            with trio.move_on_after(HEALED_S):
                await host.wait()
        assert host.stdin is not None
        await host.stdin.aclose()
        assert host.stdout is not None
        said = b""
        async for chunk in host.stdout:
            said += chunk
        await host.wait()
        return dict(json.loads(said))
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def test_no_event_is_lost_repeated_or_reordered_by_a_cut_network_and_the_gap_in_telemetry_is_told(
    net: Net, folder: Path
) -> None:
    with trio.fail_after(110):
        seen = await run(
            net,
            folder,
            [
                (lambda: net.cable("down"), lambda: net.cable("up")),
                (lambda: net.deaf("add"), lambda: net.deaf("delete")),
                (lambda: net.mute("add"), lambda: net.mute("delete")),
            ],
        )
    print({key: value for key, value in seen.items() if key not in ("events", "seqs")}, len(seen["seqs"]))
    assert seen["events"] == [*map(str, range(seen["posted"])), "last"]
    # the host hears nothing while the cable is cut, or the broker is mute: it knows each time
    assert len(seen["silences"]) >= 2
    # each batch came, in order, or is counted as missing
    seqs = seen["seqs"]
    assert seqs == sorted(set(seqs))
    assert seen["missed"] >= seqs[-1] - seqs[0] + 1 - len(seqs) - 3 * 2  # some of a gap may have come as remembered
    assert seen["late"] > 0
