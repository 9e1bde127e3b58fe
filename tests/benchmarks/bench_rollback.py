"""Time to roll back, from the breaching sample to the old revision answering: old process warm, and cold.

    python tests/benchmarks/bench_rollback.py [--rollbacks 200] [--cold 200] [--agents 1000 --samples 100000]

A real fleet (`interlock up`), clients that ask all the time, and a candidate that is live. The benchmark publishes the
sample that breaches a rule, as a monitor would, so that the sampling period is not in the figures: they are our time
(bus, rule, order, route). The period is stated beside it. Cold: the old process is killed together with the candidate,
and has to be started again; the figures are from the kill, and what the same program took to start is taken off.

With --agents and --samples so many samples a second of so many agents pass through the bus and the rule engine
meanwhile, each under a rule. Beside it, from the same run: what a restart of the old revision takes; and, where they
are installed, the same breach through Prometheus and Alertmanager, and Erlang's heart (--rivals rounds; 0: not).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from rivals import heart, prometheus, spread

from interlock.broker import commands, facts, topics
from interlock.broker.client import Bus, open_bus
from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.samples import SeriesReader, labels
from interlock.broker.security import load_operator, load_security
from interlock.broker.sockets import open_sockets
from interlock.coordinator.demo.fleet import free_ports

CLIENTS, PERIOD_S = 4, 0.005
SOURCES, RATE_HZ = 20, 10.0  # of the load: hosts that send at the rate of a migration
ROUND_S = 60.0  # for one rollback

FLEET = """
name = "bench"
state = "state"
broker = {{ events = "tcp://127.0.0.1:{0}", feed = "tcp://127.0.0.1:{1}", \
telemetry_in = "tcp://127.0.0.1:{2}", telemetry_out = "tcp://127.0.0.1:{3}" }}
rules = {{ files = ["rules.yaml"] }}
monitor = {{ gpu = "none" }}
hosts.alpha = {{ control = "tcp://127.0.0.1:{4}", monitor = false }}

[strategies.rapid]
baseline_s = 0.1
observation_s = 600.0

[agents.echo]
host = "alpha"
endpoint = "tcp://127.0.0.1:{5}"
serve = "r1"
level = "low"
compare = {{ ignore = ["revision"] }}
revisions.r1 = {{ source = "echo", entry = "echo:Echo" }}
revisions.r2 = {{ source = "echo", entry = "echo:Echo", config = {{ new = true }} }}
"""

RULES = """
groups:
  - name: bench
    rules:
      - alert: bench-breach
        expr: bench_badness > 0.5
        x_action: rollback
      - alert: bench-load
        expr: bench_load > 0.9
        for: 10s
        x_action: rollback
"""

AGENT = """
from interlock.agents.agent import Agent, handler


class Echo(Agent):
    @handler("ask", idempotent=True)
    async def ask(self, number: int) -> dict:
        return {"number": number, "revision": self.revision}
"""


async def clients(endpoint: str, seen: dict[str, int]) -> None:
    """Plain REQ sockets that ask all the time and count wrong or missing answers."""
    async with open_sockets() as sockets, trio.open_nursery() as nursery:

        async def ask() -> None:
            socket = sockets.open("req", connect=endpoint)
            while True:
                seen["requests"] += 1
                await socket.send([json.dumps({"action": "ask", "number": seen["requests"]}).encode()])
                answer = json.loads((await socket.receive())[0])
                seen["failed"] += answer.get("status") != "ok"
                await trio.sleep(PERIOD_S)

        for _ in range(CLIENTS):
            nursery.start_soon(ask)


@dataclass
class Rollback:
    """Of one: what was said, and when. Times are seconds since 1970."""

    done: facts.RolledBack
    start_s: float  # what the candidate took to start
    asked: commands.RollBack | None = None  # by the rule engine
    killed: float = 0.0  # when both were, in a cold one


@dataclass
class Bench:
    """The bus as an operator, as the monitor of alpha, and as somebody who hears what the rule engine hears."""

    bus: Bus
    publisher: Any
    pids: dict[str, int] = field(default_factory=dict)  # of the newest instance of each revision
    heard: dict[float, float] = field(default_factory=dict)  # time of a sample -> when it came
    number: int = 0

    def send(self, value: float) -> None:
        self.publisher.send({labels("bench_badness", host="alpha", agent="echo"): value}, time=time.time())

    async def follow(self) -> None:
        async with self.bus.events(["fact/host/"], after=0) as feed:
            async for event in feed:
                if isinstance(event.body, facts.InstanceStarted):
                    self.pids[event.body.revision] = event.body.pid

    async def listen(self) -> None:
        reader = SeriesReader()
        async with self.bus.samples(["telemetry/alpha/monitor"]) as feed:
            async for batches in feed:
                now = time.time()
                for batch in batches:
                    if any(value == 1.0 for _, value in reader.read(batch)[0]):
                        self.heard.setdefault(batch.time, now)

    async def one(self, *, cold: bool) -> Rollback:
        """Move to r2, and as soon as it serves breach the rule, or kill both; until it is rolled back."""
        self.number += 1
        start_s, killed, asked, done = 0.0, 0.0, None, None
        async with self.bus.events(["fact/", "rollback/"]) as feed:
            body = commands.Migrate(agent="echo", to="r2", deadline=time.time() + 10)
            await self.bus.publish(topics.COORDINATOR, body, id=f"bench-{self.number}")
            async for event in feed:
                match event.body:
                    case facts.StepDone(step="start-candidate", evidence=evidence):
                        start_s = float(evidence["start_s"])
                    case facts.StepDone(step="cut-over"):
                        if cold:
                            killed = self.kill_both()
                        else:
                            self.send(1.0)
                    case commands.RollBack():
                        asked = event.body
                    case facts.RolledBack():
                        done = event.body
                    case facts.MigrationEnded():
                        wanted = "host process-died" if cold else "rule bench-breach"
                        if done is None or event.body.decided_by != wanted:
                            raise SystemExit(f"not rolled back by {wanted}: {event.body}")
                        return Rollback(done, start_s, asked, killed)
                    case facts.MigrationRefused():
                        raise SystemExit(f"refused: {event.body.reason}")
        raise SystemExit("the feed ended")

    def kill_both(self) -> float:
        for revision in ("r1", "r2"):
            os.kill(self.pids[revision], signal.SIGKILL)
        return time.time()

    async def calm(self) -> None:
        """End the breach, and wait until the rule engine says so."""
        async with self.bus.events(["fact/alert/"]) as feed:
            self.send(0.0)
            async for event in feed:
                if isinstance(event.body, facts.AlertResolved) and event.body.rule == "bench-breach":
                    return


async def run(fleet: FleetConfig, warm: int, cold: int) -> dict[str, Any]:
    seen = {"requests": 0, "failed": 0}
    found: dict[bool, list[Rollback]] = {False: [], True: []}
    async with (
        open_bus(fleet.broker, "cli/bench", security=load_operator(fleet)) as bus,
        open_bus(fleet.broker, "monitor/alpha", security=load_security(fleet, "monitor/alpha")) as monitor,
        trio.open_nursery() as nursery,
    ):
        bench = Bench(bus, monitor.telemetry("alpha", "monitor"))
        for task in (bench.follow, bench.listen):
            nursery.start_soon(task)
        nursery.start_soon(clients, fleet.agents["echo"].endpoint, seen)
        bench.send(0.0)
        for is_cold, count in ((False, warm), (True, cold)):
            for _ in range(count):
                with trio.fail_after(ROUND_S):
                    found[is_cold].append(await bench.one(cold=is_cold))
                    if not is_cold:
                        await bench.calm()
        nursery.cancel_scope.cancel()
    return {
        "warm": warm_figures(found[False], bench.heard),
        "cold": cold_figures(found[True]),
        "sampling_period_ms_of_a_monitor": fleet.monitor.migrating_s * 1000,
        "client_requests": seen["requests"],
        "client_failures": seen["failed"],
    }


def warm_figures(found: list[Rollback], heard: dict[float, float]) -> dict[str, Any]:
    if not found:
        return {}
    restored = [one.done.restored - sampled(one) for one in found]
    restart = statistics.median(one.start_s for one in found)
    return {
        "rollbacks": len(found),
        "levels": sorted({one.done.level for one in found}),
        "verified": all(one.done.verified for one in found),
        "breach_to_route_restored_ms": spread([one.done.routed - sampled(one) for one in found]),
        "breach_to_old_revision_verified_ms": spread(restored),
        "of_it_ms": {
            "bus": spread([heard[sampled(one)] - sampled(one) for one in found if sampled(one) in heard]),
            "bus_and_rule": spread([one.asked.issued - sampled(one) for one in found if one.asked is not None]),
            "order": spread([one.done.received - one.asked.issued for one in found if one.asked is not None]),
            "host_route": spread([one.done.routed - one.done.received for one in found]),
            "host_first_answer": spread([one.done.restored - one.done.routed for one in found]),
        },
        "restart_instead_ms": round(restart * 1000, 2),
        "restart_to_warm_rollback_ratio": round(restart / statistics.median(restored), 1),
    }


def sampled(one: Rollback) -> float:
    return one.done.breach.sample_time or 0.0


def cold_figures(found: list[Rollback]) -> dict[str, Any]:
    if not found:
        return {}
    return {
        "rollbacks": len(found),
        "levels": sorted({one.done.level for one in found}),
        "verified": all(one.done.verified for one in found),
        "killed_to_old_revision_verified_ms": spread([one.done.restored - one.killed for one in found]),
        "agents_own_start_ms": spread([one.start_s for one in found]),
        "without_its_start_ms": spread([one.done.restored - one.killed - one.start_s for one in found]),
    }


# --- the load: a process of its own


async def publish(fleet: FleetConfig, agents: int, rate: float) -> None:
    """`rate` samples a second of `agents` agents on SOURCES hosts; says once a second how many it has sent."""
    each = max(1, round(rate / RATE_HZ / agents))  # series of an agent
    groups = [
        {
            labels("bench_load", host=f"load-{host}", agent=f"agent-{agent}", part=str(part)): 0.5
            for agent in range(host, agents, SOURCES)
            for part in range(each)
        }
        for host in range(SOURCES)
    ]
    sent = 0
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:

        async def send(host: int) -> None:
            nonlocal sent
            name = f"monitor/load-{host}"
            bus = await stack.enter_async_context(open_bus(fleet.broker, name, security=load_security(fleet, name)))
            publisher, due = bus.telemetry(f"load-{host}", "monitor"), trio.current_time() + host / SOURCES / RATE_HZ
            while True:
                await trio.sleep_until(due)
                due = max(due + 1 / RATE_HZ, trio.current_time() - 1)  # who is late for a second leaves some out
                publisher.send(groups[host], time=time.time())
                sent += len(groups[host])

        for host in range(SOURCES):
            nursery.start_soon(send, host)
        began = trio.current_time()
        while True:
            await trio.sleep(1.0)
            print(sent, trio.current_time() - began, flush=True)


@contextmanager
def loaded(fleet: FleetConfig, agents: int, samples: int, folder: Path, report: dict[str, Any]) -> Iterator[None]:
    if not agents or not samples:
        report["load"] = "none"
        yield
        return
    for host in range(SOURCES):
        issue(fleet, f"load-{host}")
    said = folder / "load"
    argv = [sys.executable, __file__, "--publish", fleet.path, "--agents", str(agents), "--samples", str(samples)]
    with said.open("wb") as out, subprocess.Popen(argv, stdout=out) as process:
        try:
            time.sleep(3.0)
            yield
            if process.poll() is not None:
                raise SystemExit("the load ended")
        finally:
            process.kill()
    sent, seconds = said.read_text().splitlines()[-1].split()
    report["load"] = {"agents": agents, "samples_per_s_asked": samples, "sent": round(int(sent) / float(seconds))}


# --- all of it


def issue(fleet: FleetConfig, host: str) -> None:
    argv = [sys.executable, "-m", "interlock.coordinator", "keys", "issue", "monitor", host, "--fleet", fleet.path]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def up(folder: Path) -> Iterator[FleetConfig]:
    (folder / "echo").mkdir()
    (folder / "echo" / "echo.py").write_text(AGENT)
    (folder / "rules.yaml").write_text(RULES)
    (folder / "fleet.toml").write_text(FLEET.format(*free_ports(6)))
    fleet = load_fleet(folder / "fleet.toml")
    ready = folder / "ready"
    argv = [sys.executable, "-m", "interlock.coordinator", "up", fleet.path, "--ready-file", str(ready)]
    with open(folder / "log", "wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit((folder / "log").read_text())
                time.sleep(0.05)
            issue(fleet, "alpha")
            yield fleet
        finally:
            process.terminate()
            process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rollbacks", type=int, default=200, help="of a warm old process")
    parser.add_argument("--cold", type=int, default=200, help="of one that has to be started again")
    parser.add_argument("--agents", type=int, default=0, help="whose samples pass meanwhile")
    parser.add_argument("--samples", type=int, default=0, help="so many a second, of all of them together")
    parser.add_argument("--rivals", type=int, default=10, help="rounds through Prometheus and heart")
    parser.add_argument("--publish", metavar="FLEET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.publish:
        trio.run(publish, load_fleet(options.publish), options.agents, options.samples)
        return
    report: dict[str, Any] = {"benchmark": "rollback", "cpus": os.cpu_count(), "load1": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="interlock-bench-") as name:
        folder = Path(name)
        with up(folder) as fleet, loaded(fleet, options.agents, options.samples, folder, report):
            report |= trio.run(run, fleet, options.rollbacks, options.cold)
        if options.rivals:
            report["prometheus_and_alertmanager"] = prometheus(options.rivals, folder / "prometheus")
            report["erlang_heart"] = heart(options.rivals, folder / "heart")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # its folder goes, and its fleet
    code = 0
    try:
        main()
    except* KeyboardInterrupt:
        code = 130
    sys.exit(code)
