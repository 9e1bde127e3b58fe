"""The event log through its broker: durable events a second, how long an ack takes, and replays.

Run: python tests/benchmarks/bench_events.py [--events N] [--quick]; prints one JSON object. The broker is
`interlock broker` with CURVE, its log on the disk that /tmp is on; that disk's bare fsync rate stands beside the
figures (a commit is one fsync). Publishers and the reader are our own clients (`open_bus`), each with its own key.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import trio
from rig import OPERATOR, BrokerProcess, Stand, aim, cpu_s, machine, median, quantiles, stand

from interlock.broker import commands, facts, topics
from interlock.broker.bus import Bus
from interlock.broker.client import open_bus
from interlock.broker.config import BrokerConfig
from interlock.broker.security import Security

PUBLISHERS = 4  # hosts that post at once, in a process; an outbox has 64 events under way
EVENTS = 20_000  # for the throughput; as many are replayed, and more with --events
SINGLES = 1_000  # publications one after another
RATE = 1_000  # events a second while the latency under load is taken
LATENCY_S = 5.0
FSYNC_S = 2.0
PAGE = 4096  # bytes written before each fsync: a page of the log's file
PATIENCE_S = 120.0


def fact(host: str, n: int) -> facts.Fact:
    """What hosts say most often: some 150 bytes."""
    agent = f"agent-{n % 100}"
    return facts.StepDone(
        host=host, agent=agent, migration=f"{agent}-{n}", epoch=1, step="start-candidate", command=f"{n:032x}"
    )


def fsyncs(folder: Path) -> dict[str, Any]:
    """How often a second this disk makes an appended page durable."""
    took = []
    descriptor = os.open(folder / "fsync", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + FSYNC_S
        while time.monotonic() < end:
            began = time.monotonic()
            os.write(descriptor, bytes(PAGE))
            os.fsync(descriptor)
            took.append((time.monotonic() - began) * 1e3)
    finally:
        os.close(descriptor)
    return {"per_s": round(len(took) / sum(took) * 1e3), **quantiles(took)}


# --- publishers, in a process of their own


def publish(config: BrokerConfig, who: list[Security], orders: Connection) -> None:
    """Obey (events in all, per second or None): post them, spread over all publishers, and say when all are in."""
    trio.run(_publish, config, who, orders)


async def _publish(config: BrokerConfig, who: list[Security], orders: Connection) -> None:
    async with trio.open_nursery() as nursery:
        buses = [await nursery.start(_hold, config, security) for security in who]
        for bus in buses:
            await _one(bus, 0)
        orders.send("up")
        while (order := await trio.to_thread.run_sync(orders.recv)) is not None:
            count, rate = order
            orders.send(await (_flood(buses, count) if rate is None else _pace(buses, count, rate)))
        nursery.cancel_scope.cancel()


async def _hold(config: BrokerConfig, security: Security, *, task_status: trio.TaskStatus[Bus]) -> None:
    async with open_bus(config, "", security=security) as bus:
        task_status.started(bus)
        await trio.sleep_forever()


def _host(bus: Bus) -> str:
    return bus.source.split("/")[1]


async def _one(bus: Bus, n: int) -> float:
    began = time.monotonic()
    await bus.publish(topics.host_fact(_host(bus)), fact(_host(bus), n), timeout=PATIENCE_S)
    return (time.monotonic() - began) * 1e3


async def _flood(buses: list[Bus], count: int) -> float:
    """Seconds from the first post to the last ack."""

    async def one(bus: Bus) -> None:
        host = _host(bus)
        for n in range(count // len(buses)):
            bus.post(topics.host_fact(host), fact(host, n))
            if n % 64 == 63:
                await trio.lowlevel.checkpoint()
        await bus.flushed()

    began = time.monotonic()
    async with trio.open_nursery() as nursery:
        for bus in buses:
            nursery.start_soon(one, bus)
    return time.monotonic() - began


async def _pace(buses: list[Bus], count: int, rate: float) -> list[float]:
    """Each ack's milliseconds, at this many events a second."""
    took: list[float] = []

    async def one(bus: Bus, n: int) -> None:
        took.append(await _one(bus, n))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for n in range(count):
            await trio.sleep_until(began + n / rate)
            nursery.start_soon(one, buses[n % len(buses)], n)
    return took


# --- measuring


async def replay(on: Stand, broker: BrokerProcess) -> dict[str, float]:
    """A reader that has nothing gets the whole log: how many events, how many a second, and what each cost."""
    count = 0
    async with open_bus(on.fleet.broker, "", security=on.security(OPERATOR)) as bus:
        nobody = commands.RollCall(deadline=time.time())
        await bus.publish(topics.command("nobody"), nobody)  # the link is up
        began, cpu, theirs = time.monotonic(), time.process_time(), cpu_s(broker.pid)
        async with bus.events([topics.FACTS], after=0) as feed:
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:

                    async def read() -> None:
                        nonlocal count
                        async for _ in feed:
                            count += 1

                    nursery.start_soon(read)
                    await feed.caught_up.wait()
                    took = time.monotonic() - began
                    nursery.cancel_scope.cancel()
                    own = time.process_time() - cpu
    return {
        "events": count,
        "per_s": count / took,
        "reader_us": own / count * 1e6,
        "broker_us": (cpu_s(broker.pid) - theirs) / count * 1e6,
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    hosts = [f"host/p{n}" for n in range(PUBLISHERS)]
    report: dict[str, Any] = {}
    with stand(hosts) as on:
        report["fsync"] = await trio.to_thread.run_sync(fsyncs, on.folder)
        broker = await trio.to_thread.run_sync(BrokerProcess, on.folder)
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        who = [on.security(identity) for identity in hosts]
        process = spawn.Process(target=publish, args=(on.fleet.broker, who, theirs), daemon=True)
        process.start()

        async def order(*what: Any) -> Any:
            ours.send(what)
            return await trio.to_thread.run_sync(ours.recv)

        try:
            assert await trio.to_thread.run_sync(ours.recv) == "up"
            await order(1000, None)
            rates = []
            cpu = cpu_s(broker.pid)
            for _ in range(options.rounds):
                rates.append(options.events / await order(options.events, None))
            each = (cpu_s(broker.pid) - cpu) / options.events / options.rounds
            report["durable_events_per_s"] = {
                **aim(median(rates), 5_000, at_most=False),
                "best": round(max(rates)),
                "publishers": PUBLISHERS,
                "broker_cpu_us_per_event": round(each * 1e6),
            }
            report["ack_alone"] = await _alone(on, options.singles)
            found = await order(int(RATE * options.seconds), float(RATE))
            report["ack_at_1000_per_s"] = quantiles(found)
            tries = [await replay(on, broker) for _ in range(options.rounds)]
            speeds = [one["per_s"] for one in tries]
            report["replayed_events_per_s"] = {
                **aim(median(speeds), 50_000, at_most=False),
                "best": round(max(speeds)),
                "events": tries[0]["events"],
                "broker_cpu_us_per_event": round(median([one["broker_us"] for one in tries]), 1),
                "reader_cpu_us_per_event": round(median([one["reader_us"] for one in tries]), 1),
            }
            report["broker_resident_mb"] = round(broker.resident_kb() / 1024)
        finally:
            process.kill()
            process.join(5)
            await trio.to_thread.run_sync(broker.stop)
    return report


async def _alone(on: Stand, count: int) -> dict[str, float]:
    async with open_bus(on.fleet.broker, "", security=on.security("host/p0")) as bus:
        took = [await _one(bus, n) for n in range(count + 20)]
    return quantiles(took[20:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=EVENTS, help="published in one round")
    parser.add_argument("--rounds", type=int, default=5, help="of publishing and of replaying all; the median counts")
    parser.add_argument("--singles", type=int, default=SINGLES, help="publications one after another")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    options = parser.parse_args()
    options.seconds = LATENCY_S
    if options.quick:
        options.events, options.rounds, options.singles, options.seconds = options.events // 10, 2, 100, 1.0
    report = {"benchmark": Path(__file__).stem, **machine(), **trio.run(partial(measure, options))}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
