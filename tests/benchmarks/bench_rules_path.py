"""From a publisher's send to the rollback at the host, through broker and rule engine, each in a process; prints JSON.

100,000 series, six rules over each ten of them. Some hosts send 100 samples ten times a second each, as monitors do,
the others say once what they have. Every tenth of a second one sample breaches a rule that rolls back. With --rival,
Prometheus and Alertmanager at 1 s/1 s over as many series, where they are installed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import trio
import zmq
from rig import cpu_s, machine, quantiles
from rivals import prometheus

from interlock.broker import topics
from interlock.broker.client import open_bus
from interlock.broker.commands import RollBack
from interlock.broker.config import BrokerConfig, FleetConfig, RulesConfig, SecurityConfig
from interlock.broker.direct import serve_direct
from interlock.broker.facts import HostUp, MigrationStarted
from interlock.broker.planes import serve_planes
from interlock.broker.samples import SeriesTable, labels
from interlock.broker.wire import Event
from interlock.coordinator.rules.service import run_rules

HOSTS = 1000  # with 100 series each
AGENTS, METRICS = 10, 10  # of a host; a batch has all of them
HZ = 10
BREACH_S = 0.1
WARM_S = 30.0  # 100,000 series are announced and bound, and what had queued meanwhile is taken in
PATIENCE_S = 120.0
ANY = "tcp://127.0.0.1:*"
RULES = """
groups:
- name: bench
  rules:
  - {alert: r0, expr: m0 > 0.95, x_action: rollback}
  - {alert: r1, expr: m1 / m2 > 3}
  - {alert: r2, expr: m3 > 0.97 and m4 > 0.97}
  - {alert: r3, expr: m5 - m6 > 0.6}
  - {alert: r4, expr: "increase(m7[10s]) > 1000"}
  - {alert: r5, expr: "m8 > on(host, agent) group_left() m9 * 3"}
"""


def broker(folder: str, said: Connection) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            config = BrokerConfig(events=ANY, feed=ANY, telemetry_in=ANY, telemetry_out=ANY)
            said.send(await nursery.start(serve_planes, config, Path(folder) / "broker"))

    trio.run(main)


def rules(fleet: FleetConfig, said: Connection) -> None:
    async def main() -> None:
        await run_rules(fleet, lambda: said.send(os.getpid()))

    trio.run(main)


class Source:
    """One host's monitor."""

    def __init__(self, number: int) -> None:
        self.topic = topics.telemetry(f"h{number}", "monitor").encode()
        self.table = SeriesTable(f"h{number}/monitor", 1)
        self.samples = {
            labels(f"m{metric}", host=f"h{number}", agent=f"a{number * AGENTS + agent}"): 0.5
            for agent in range(AGENTS)
            for metric in range(METRICS)
        }
        self.first = next(iter(self.samples))

    def send(self, socket: zmq.Socket[bytes], *, bad: bool) -> float:
        self.samples[self.first] = 0.99 if bad else 0.5
        body = msgspec.msgpack.encode(self.table.batch(self.samples, time=time.time()))
        sent = time.monotonic()
        socket.send_multipart([self.topic, body])
        return sent


def publish(ingress: str, rate: int, seconds: float, orders: Connection) -> None:
    """`rate` samples a second; then tell when each breach was sent, by agent."""
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(ingress)
    sources = [Source(number) for number in range(HOSTS)]
    for source in sources:
        source.send(socket, bad=False)
        time.sleep(0.002)
    orders.send("announced")
    orders.recv()
    hot = sources[: rate // (AGENTS * METRICS * HZ)]
    breaches: dict[str, float] = {}
    began = time.monotonic()
    number, next_breach = 0, began + WARM_S
    while (now := time.monotonic()) < began + WARM_S + seconds:
        due = began + number * BREACH_S / len(hot)
        if due > now:
            time.sleep(due - now)
        source = hot[number % len(hot)]
        agent = dict(source.first)["agent"]
        bad = now >= next_breach and agent not in breaches
        sent = source.send(socket, bad=bad)
        if bad:
            breaches[agent] = sent
            next_breach += BREACH_S
        number += 1
    orders.send((breaches, number, time.monotonic() - began))
    orders.recv()


async def _until(found: Callable[[], bool]) -> None:
    for _ in range(100):
        if found():
            break
        await trio.sleep(0.05)


async def host(
    config: BrokerConfig, ingress_orders: Connection, hot: int, rules_pid: int, seconds: float
) -> dict[str, Any]:
    arrived: dict[str, float] = {}

    def accept(event: Event) -> None:
        if isinstance(event.body, RollBack):
            arrived.setdefault(event.body.agent, time.monotonic())

    async with open_bus(config, "test") as bus, trio.open_nursery() as nursery:
        control = await nursery.start(serve_direct, bus.sockets, ANY, accept)
        for number in range(hot):
            name = f"h{number}"
            await bus.publish(topics.host_fact(name), HostUp(host=name, control=control, pid=1, boot="b"))
            begun = MigrationStarted(
                migration=f"m{number}", epoch=number + 1, agent=f"a{number * AGENTS}", host=name, previous="v1",
                to="v2", strategy="rapid", request="r",
            )  # fmt: skip
            await bus.publish(topics.migration_fact(begun.agent), begun)
        await trio.to_thread.run_sync(ingress_orders.recv)
        ingress_orders.send("go")
        await trio.sleep(WARM_S)
        used, at = cpu_s(rules_pid), time.monotonic()
        await trio.sleep(seconds - 1.0)
        share = (cpu_s(rules_pid) - used) / (time.monotonic() - at)
        breaches, batches, took = await trio.to_thread.run_sync(ingress_orders.recv)
        with trio.move_on_after(5.0):
            await _until(lambda: set(breaches) <= set(arrived))
        ingress_orders.send("done")
        nursery.cancel_scope.cancel()
    found = [(arrived[agent] - sent) * 1e3 for agent, sent in breaches.items() if agent in arrived]
    return {
        "samples_per_second": round(batches * AGENTS * METRICS / took),
        "breaches": len(breaches),
        "rolled_back": quantiles(found) if found else {},
        "rules_cpu_of_a_core": round(share, 2),
    }


def measure(rate: int, seconds: float) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="il-") as name:
        folder = Path(name)
        (folder / "rules.yml").write_text(RULES)
        up, said = spawn.Pipe()
        processes = [spawn.Process(target=broker, args=(name, said))]
        processes[0].start()
        try:
            config = up.recv()
            fleet = FleetConfig(
                broker=config, rules=RulesConfig(files=["rules.yml"]), path=str(folder / "fleet.toml"),
                security=SecurityConfig(mode="insecure"),
            )  # fmt: skip
            processes.append(spawn.Process(target=rules, args=(fleet, said)))
            processes[1].start()
            pid = up.recv()
            orders, taken = spawn.Pipe()
            processes.append(spawn.Process(target=publish, args=(config.telemetry_in, rate, seconds, taken)))
            processes[2].start()
            hot = rate // (AGENTS * METRICS * HZ)

            async def main() -> dict[str, Any]:
                with trio.fail_after(PATIENCE_S):
                    return await host(config, orders, hot, pid, seconds)

            return trio.run(main)
        finally:
            for process in reversed(processes):
                process.kill()
                process.join()


def rival(folder: Path) -> dict[str, Any]:
    series = (
        f'm{metric}{{host="h{number}",agent="a{number * AGENTS + agent}"}} 0.5'
        for number in range(HOSTS)
        for agent in range(AGENTS)
        for metric in range(METRICS)
    )
    written = RULES.replace("x_action: rollback", "labels: {x: y}") + "  - {alert: breach, expr: bench_badness > 0.5}\n"
    return prometheus(3, folder, "\n".join(series) + "\n", written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=9.0)
    parser.add_argument("--rates", type=int, nargs="*", default=[100_000, 200_000], metavar="N")
    parser.add_argument("--rival", action="store_true", help="Prometheus and Alertmanager too")
    options = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "rules path", "series": HOSTS * AGENTS * METRICS, **machine()}
    for rate in options.rates:
        report[str(rate)] = measure(rate, options.seconds)
    if options.rival:
        with tempfile.TemporaryDirectory() as name:
            report["prometheus"] = rival(Path(name) / "rival")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
