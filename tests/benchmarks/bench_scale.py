"""Many hosts on one event plane: commands to one and to all of them, their return after a restart, and what they cost.

Run: python tests/benchmarks/bench_scale.py [--connections N] [--quick]; prints one JSON object. The broker is
`interlock broker`, both planes, with CURVE. A host is simulated by the two connections that a real one has to the event
plane, each with the host's own key and the options of our own sockets: a SUB on its topics and the beats, and a DEALER
for its receipts. Many of them share a process; they answer each command at once and do not verify its signature (0.1
ms, which 10,000 real hosts would spend beside each other). All of it runs on one machine, broker and hosts.

A command's time is from the call of the operator's `publish` to the last receipt that the operator has in hand.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import trio
from rig import OPERATOR, BrokerProcess, Stand, aim, cpu_s, descriptor_limit, machine, median, quantiles, stand
from scale_hosts import PER_HOST, Order, Orders, simulate, telemetry_load

from interlock.broker import commands, topics
from interlock.broker.client import open_bus
from interlock.broker.config import BrokerConfig

SPARE = 100  # descriptors of a process for everything else
STAGES = (1_000, 5_000, 10_000)
ALL_MS = {1_000: 60.0, 5_000: 250.0, 10_000: 500.0}  # aims
ROUNDS = 7  # commands to all; the median counts, the best is told
SINGLES = 2_000  # commands to one, one after another
PUBLISHERS = 100  # of telemetry, each sends the same share of
TELEMETRY_PER_S = 10_000
IDLE_S = 20.0
SETTLE_S = 8.0  # after so long without news the broker is at rest
PATIENCE_S = 240.0
BACKLOG, ROOM = Path("/proc/sys/net/core/netdev_max_backlog"), 20_000
PER_PROCESS = 2_000  # hosts at most: what they send and receive is one thread's work


class Unfinished(Exception):
    """Not all hosts were there in time."""


class Crowd:
    """The processes that the hosts live in."""

    def __init__(self, config: BrokerConfig, processes: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(processes):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=simulate, args=(config, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        self.size = 0

    async def add(self, hosts: list[tuple[str, tuple[bytes, bytes, bytes]]]) -> float:
        """Connect more; seconds until the last of them is there."""
        began = time.monotonic()
        orders = [Order("connect", hosts[n :: len(self._pipes)]) for n in range(len(self._pipes))]
        await self._all(orders)
        self.size += len(hosts)
        return time.monotonic() - began

    async def back(self) -> dict[str, float]:
        """Wait until all are back after a restart: when (monotonic) the last feed and the last DEALER was."""
        said = await self._all([Order("back")] * len(self._pipes))
        return {key: max(one[key] for one in said) for key in ("feed", "events")}

    async def forget(self) -> None:
        """From now on nobody counts as connected."""
        await self._all([Order("forget")] * len(self._pipes))

    async def _all(self, orders: list[Order]) -> list[Any]:
        said: list[Any] = [None] * len(orders)

        async def one(n: int, pipe: Connection, order: Order) -> None:
            pipe.send(order)
            ready = await trio.to_thread.run_sync(partial(pipe.poll, PATIENCE_S), abandon_on_cancel=True)
            if not ready:
                pipe.send(Order("count"))
                missing = await trio.to_thread.run_sync(pipe.recv)
                raise Unfinished(f"{order.what}: after {PATIENCE_S:g} s one process still misses {missing}")
            said[n] = pipe.recv()

        async with trio.open_nursery() as nursery:
            for n, (pipe, order) in enumerate(zip(self._pipes, orders, strict=True)):
                nursery.start_soon(one, n, pipe, order)
        return said

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(5)


async def ask(bus: Any, host: str, wanted: list[str]) -> float:
    """Milliseconds from the command to the last receipt. host: empty for all."""
    id, topic = uuid.uuid4().hex, topics.command(host) if host else topics.ALL_HOSTS
    body = commands.RollCall(deadline=time.time() + PATIENCE_S)
    async with bus.receipts(id) as receipts:
        began = time.monotonic()
        await bus.publish(topic, body, id=id, timeout=PATIENCE_S)
        with trio.fail_after(PATIENCE_S):
            while len(receipts.by) < len(wanted):
                await receipts.more()
        took = (time.monotonic() - began) * 1e3
        assert receipts.by.keys() == set(wanted)
    return took


async def to_all(bus: Any, wanted: list[str], rounds: int) -> list[float]:
    took = []
    for _ in range(rounds + 1):
        took.append(await ask(bus, "", wanted))
        await trio.sleep(0.5)
    return took[1:]


async def to_one(bus: Any, wanted: list[str], count: int) -> list[float]:
    took = []
    for n in range(count + 20):
        identity = wanted[n * 7919 % len(wanted)]
        took.append(await ask(bus, identity.split("/")[1], [identity]))
    return took[20:]


@contextmanager
def telemetry(on: Stand, names: list[str], per_s: int) -> Any:
    """So many messages a second through the telemetry plane, from these monitors to one subscriber."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    config = on.fleet.broker
    publishers = [(name, on.curve(f"monitor/{name}")) for name in names]
    arguments = (config, publishers, on.curve("rules"), per_s, theirs)
    process = spawn.Process(target=telemetry_load, args=arguments, daemon=True)
    process.start()
    try:
        assert ours.recv() == "up"
        found: dict[str, float] = {}
        yield found
        ours.send(Orders.STOP)
        found |= ours.recv()
    finally:
        process.kill()
        process.join(5)


async def idle_cpu(broker: BrokerProcess, seconds: float) -> dict[str, Any]:
    await trio.sleep(SETTLE_S)
    pids = {"event_plane": broker.pid, "telemetry_plane": broker.telemetry_pid}
    before, began = {name: cpu_s(pid) for name, pid in pids.items()}, time.monotonic()
    await trio.sleep(seconds)
    took = time.monotonic() - began
    shares = {name: (cpu_s(pid) - before[name]) / took * 100 for name, pid in pids.items()}
    return {"percent_of_a_core": aim(sum(shares.values()), 5.0), **{k: round(v, 2) for k, v in shares.items()}}


async def restart(on: Stand, broker: BrokerProcess, crowd: Crowd) -> tuple[BrokerProcess, dict[str, Any]]:
    await crowd.forget()
    began = time.monotonic()
    await trio.to_thread.run_sync(broker.kill)
    again = await trio.to_thread.run_sync(BrokerProcess, on.folder)
    served = time.monotonic() - began
    back = await crowd.back()
    feed, events = back["feed"] - began, back["events"] - began
    return again, {
        "hosts": crowd.size,
        "connections": 2 * crowd.size,
        "broker_serves_again_s": round(served, 2),
        "all_feeds_back_s": round(feed, 2),
        "all_receipt_lines_back_s": round(events, 2),
        "all_back_s": aim(max(feed, events), 20.0),
        "broker_cpu_s": round(cpu_s(again.pid), 1),
    }


async def measure(options: argparse.Namespace, limit: int) -> dict[str, Any]:
    room = (limit - SPARE) // 2
    size = min(options.connections, room)
    hosts = [f"h{n:05d}" for n in range(size)]
    monitors = [f"t{n:03d}" for n in range(PUBLISHERS)]
    report: dict[str, Any] = {"hosts": size, "descriptor_limit": limit}
    if size < options.connections:
        report["fewer_because"] = f"the broker has 2 descriptors for each host, and {limit} are the limit here"
    identities = [*(f"host/{name}" for name in hosts), *(f"monitor/{name}" for name in monitors), "rules"]
    with stand(identities, hosts=size) as on:
        broker = BrokerProcess(on.folder)
        crowd = Crowd(on.fleet.broker, max(-(-size // PER_PROCESS), -(-size * PER_HOST // (limit - SPARE))))
        try:
            async with open_bus(on.fleet.broker, "", security=on.security(OPERATOR)) as bus:
                empty_kb = broker.resident_kb()
                report["to_all"] = {}
                await stages(report["to_all"], on, broker, crowd, bus=bus, hosts=hosts, rounds=options.rounds)
                report["memory_kb_per_connection"] = aim((broker.resident_kb() - empty_kb) / (2 * size), 45.0)
                report["descriptors_of_the_broker"] = broker.descriptors()
                report["idle"] = await idle_cpu(broker, options.idle)
                names = [f"host/{name}" for name in hosts]
                report["to_one"] = {"without_telemetry": quantiles(await to_one(bus, names, options.singles))}
                with telemetry(on, monitors, options.telemetry) as load:
                    found = quantiles(await to_one(bus, names, options.singles))
                report["to_one"]["with_telemetry"] = {**found, "p99": aim(found["p99_ms"], 10.0), **load}
                broker, report["restart"] = await restart(on, broker, crowd)
        except* (Unfinished, trio.TooSlowError) as group:  # what was measured by then is told
            report["unfinished"] = str(group.exceptions[0])
        finally:
            crowd.end()
            broker.stop()
    return report


async def stages(
    report: dict[str, Any], on: Stand, broker: BrokerProcess, crowd: Crowd, *, bus: Any, hosts: list[str], rounds: int
) -> None:
    """Grow to each size, and ask all."""
    for stage in STAGES:
        wanted = hosts[: min(stage, len(hosts))]
        if len(wanted) <= crowd.size:
            break
        fresh = [(f"host/{name}", on.curve(f"host/{name}")) for name in wanted[crowd.size :]]
        cpu = cpu_s(broker.pid)
        joined = await crowd.add(fresh)
        cpu = cpu_s(broker.pid) - cpu
        took = await to_all(bus, [f"host/{name}" for name in wanted], rounds)
        report[str(len(wanted))] = {
            "last_receipt_ms": aim(median(took), ALL_MS[stage]),
            "best_ms": round(min(took), 1),
            "worst_ms": round(max(took), 1),
            "joined_s": round(joined, 1),
            "broker_cpu_ms_per_connection_joining": round(cpu / len(fresh) / 2 * 1e3, 2),
        }


@contextmanager
def loopback_queue() -> Iterator[int]:
    """Packets that may wait on the loopback, raised if we may: kernels ask after thousands of links at one moment."""
    before = int(BACKLOG.read_text())
    with suppress(OSError):
        BACKLOG.write_text(str(max(before, ROOM)))
    try:
        yield int(BACKLOG.read_text())
    finally:
        with suppress(OSError):
            BACKLOG.write_text(str(before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=STAGES[-1], help="hosts; each has 2 connections")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="commands to all")
    parser.add_argument("--singles", type=int, default=SINGLES, help="commands to one")
    parser.add_argument("--telemetry", type=int, default=TELEMETRY_PER_S, help="messages a second beside them")
    parser.add_argument("--idle", type=float, default=IDLE_S, help="seconds in which the broker's CPU is measured")
    parser.add_argument("--quick", action="store_true", help="a small one: 300 hosts, few rounds")
    options = parser.parse_args()
    if options.quick:
        options.connections, options.rounds, options.singles, options.idle = 300, 3, 100, 3.0
    limit = descriptor_limit()
    report = {"benchmark": Path(__file__).stem, **machine()}
    with loopback_queue() as room:
        report |= {"loopback_queue": room, **trio.run(measure, options, limit)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
