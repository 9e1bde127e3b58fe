"""Ten thousand connections that don't belong, and what an honest host notices of them.

The broker runs in a process of its own, with keys. An honest host publishes durable events one after another, and its
round trips are measured alone, and while each of these goes on: half-open connections that say nothing or half a
greeting, opened again as they are ended; strangers with unknown keys that handshake again and again; and one valid key
that wants more connections than it may. Prints JSON; exits 1 if a round trip failed.
Run: python tests/benchmarks/bench_intruders.py [--connections 10000] [--seconds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from interlock.agents.latency import quantile
from interlock.broker import client, crypto, topics
from interlock.broker.config import PLACES, BrokerConfig, FleetConfig
from interlock.broker.errors import InterlockError
from interlock.broker.facts import HostDown
from interlock.broker.keyring import Keyring
from interlock.broker.planes import serve_planes
from interlock.broker.protocol import BEAT_TOPIC
from interlock.broker.security import load_security
from interlock.broker.sockets import open_sockets
from interlock.broker.tuning import Curve

ANY = BrokerConfig(**dict.fromkeys(PLACES, "tcp://127.0.0.1:*"))
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE"  # half of one
OPENERS = 50  # tasks that open half-open connections: as fast as the broker accepts
SPARE_FILES = 300
MAX_DEALERS = 2_000  # ZeroMQ sockets of one process: each comes back up to 20 times a second
ATTACKS = ("half-open", "strangers", "one-key")


def fleet_of(folder: Path) -> FleetConfig:
    return FleetConfig(path=str(folder / "fleet.toml"), broker=ANY)


def serve(folder: Path) -> None:
    """The broker's process."""
    os.environ["INTERLOCK_LOG"] = "ERROR"
    _more_files()

    async def run() -> None:
        security = load_security(fleet_of(folder), "broker")
        async with trio.open_nursery() as nursery:
            config = await nursery.start(partial(serve_planes, security=security), ANY, folder / "log")
            print(json.dumps({name: getattr(config, name) for name in PLACES}), flush=True)

    trio.run(run)


def _more_files() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class Honest:
    """A host that publishes one event after another on a connection that stays."""

    def __init__(self) -> None:
        self.took: list[float] = []
        self.failed = 0

    async def run(self, config: BrokerConfig, fleet: FleetConfig) -> None:
        async with client.open_bus(config, "", security=load_security(fleet, "host/alpha")) as bus:
            while True:
                began = time.perf_counter()
                try:
                    await bus.publish(topics.host_fact("alpha"), HostDown(host="alpha"), timeout=10)
                    self.took.append(time.perf_counter() - began)
                except InterlockError:
                    self.failed += 1
                await trio.sleep(0.005)

    async def measure(self, seconds: float) -> dict[str, Any]:
        self.took, self.failed = [], 0
        await trio.sleep(seconds)
        took = sorted(self.took)
        if not took:
            return {"round_trips": 0, "failed": self.failed}
        return {
            "round_trips": len(took),
            "p50_ms": round(quantile(took, 0.5) * 1000, 2),
            "p99_ms": round(quantile(took, 0.99) * 1000, 2),
            "max_ms": round(took[-1] * 1000, 2),
            "failed": self.failed,
        }


class HalfOpen:
    """Raw connections, so many at once; each that the broker ends is opened again."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.open = self.opened = 0

    async def run(self, address: tuple[str, int]) -> None:
        gate = trio.CapacityLimiter(OPENERS)
        async with trio.open_nursery() as nursery:
            for number in range(self.count):
                nursery.start_soon(self._keep, address, number, gate)

    async def _keep(self, address: tuple[str, int], number: int, gate: trio.CapacityLimiter) -> None:
        while True:
            with suppress(OSError, trio.BrokenResourceError):
                async with gate:
                    stream = await trio.open_tcp_stream(*address)
                self.open += 1
                self.opened += 1
                try:
                    await stream.send_all((b"", GREETING)[number % 2])
                    while await stream.receive_some(1024):
                        pass
                finally:
                    self.open -= 1
                    await trio.aclose_forcefully(stream)
            await trio.sleep(0.1)


# --- attacks, each in a process of its own


async def attack(kind: str, folder: Path, config: BrokerConfig, connections: int) -> None:
    """Until it is killed; prints a line once it is in full swing."""
    if kind == "half-open":
        host, port = config.events.removeprefix("tcp://").split(":")
        half = HalfOpen(connections)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(half.run, (host, int(port)))
            while half.opened < connections:  # noqa: ASYNC110
                await trio.sleep(0.05)
            print(connections, flush=True)
    known = load_security(fleet_of(folder), "host/beta")
    assert known is not None
    curve = known.curve() if kind == "one-key" else Curve(*crypto.new_curve_pair(), known.key_of("broker"))
    count = min(connections, MAX_DEALERS)
    async with open_sockets(curve) as sockets:
        for _ in range(count):
            sockets.open("sub", connect=config.feed, subscribe=[BEAT_TOPIC])
            await trio.lowlevel.checkpoint()
        print(count, flush=True)
        await trio.sleep_forever()


async def bench(folder: Path, config: BrokerConfig, pid: int, connections: int, seconds: float) -> list[dict[str, Any]]:
    honest = Honest()
    results: list[dict[str, Any]] = []

    async def row(name: str, **more: Any) -> None:
        results.append({"while": name, **await honest.measure(seconds), "broker_rss_mb": _rss(pid), **more})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(honest.run, config, fleet_of(folder))
        await trio.sleep(1.0)
        await row("alone")
        for kind in ATTACKS:
            options = ["--attack", kind, "--folder", str(folder), "--connections", str(connections)]
            endpoints = json.dumps({name: getattr(config, name) for name in PLACES})
            command = [sys.executable, __file__, *options, "--endpoints", endpoints]
            process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            try:
                assert process.stdout is not None
                with trio.fail_after(60):
                    started = await process.stdout.receive_some()
                await row(kind, connections=int(started or b"0"))
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
            await trio.sleep(4.0)  # until the broker has ended them
        await row("alone again")
        nursery.cancel_scope.cancel()
    return results


def _rss(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / (1 << 20), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--attack", choices=ATTACKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--endpoints", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return 0
    files = _more_files()
    if arguments.attack is not None:
        config = BrokerConfig(**arguments.endpoints)
        trio.run(attack, arguments.attack, arguments.folder, config, arguments.connections)
    connections = min(arguments.connections, files - SPARE_FILES)
    if connections < arguments.connections:
        print(f"only {connections} connections: ulimit -n is {files}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="il-") as name:
        folder = Path(name)
        Keyring(fleet_of(folder).keys_dir, "bench").ensure(["broker", "host/alpha", "host/beta"], now=time.time())
        command = [sys.executable, __file__, "--serve", str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stdout is not None
                config = BrokerConfig(**json.loads(process.stdout.readline()))
                results = trio.run(bench, folder, config, process.pid, connections, arguments.seconds)
            finally:
                process.kill()
    print(
        json.dumps(
            {"bench": "intruders", "python": platform.python_version(), "cores": os.cpu_count(), "results": results},
            indent=2,
        )
    )
    return 1 if any(result["failed"] or not result["round_trips"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
