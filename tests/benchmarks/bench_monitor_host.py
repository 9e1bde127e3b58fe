"""What a monitor costs that watches the machine and 20 agents, without GPUs, and how fast it tells.

Run: python tests/benchmarks/bench_monitor_host.py [--agents N] [--seconds S] [--quick]; one JSON object. A broker
and a monitor are processes of their own, with keys; the benchmark is the host that starts the agents, the coordinator
that moves one, and a subscriber. Each agent is a Python process with four threads and a child. CPU is the monitor's, of
one core, and `bus_alone` what its links cost if nothing is measured. Beside it, in one process and over the same trees:
what one sample costs by our reader and by psutil.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import trio
from rig import STOP_S, BrokerProcess, Stand, aim, cpu_s, machine, median, quantiles, stand

from interlock.agents.cgroup import Cgroups
from interlock.broker import cadence, facts, keys, topics
from interlock.broker.bus import Bus
from interlock.broker.client import open_bus
from interlock.broker.config import load_fleet
from interlock.broker.role import READY_FD
from interlock.broker.samples import NAME, Labels, SeriesReader
from interlock.broker.security import load_security
from interlock.monitors import procfs
from interlock.monitors.processes import Trees
from interlock.monitors.roster import Instance
from interlock.monitors.sampler import Group
from interlock.monitors.templates import templates

HOST = "alpha"
AGENT = """
import subprocess, sys, threading, time
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
child = subprocess.Popen(["sleep", "100000"])
print("ready", flush=True)
held = b""
for line in sys.stdin:
    if line == "grow\\n":
        held = b"x" * (64 << 20)
    else:
        held = b""
    print(time.time(), flush=True)
child.kill()
"""
GROWN = 48 << 20  # bytes more than before: then the subscriber has seen it
REPEATED = 40  # samples by each reader in one process
WAIT_S = 30.0


class Agents:
    """Processes as a host starts them, in cgroups of their own if `home` is given."""

    def __init__(self, count: int, home: Cgroups | None) -> None:
        self.instances: list[Instance] = []
        self.processes: list[subprocess.Popen[str]] = []
        for number in range(count):
            began = time.time()
            process = subprocess.Popen(
                [sys.executable, "-c", AGENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
            )
            self.processes.append(process)
            name = f"agent-{number}"
            if home is not None:
                home.enter(name, process.pid)
            self.instances.append(Instance(name, name, "v1", "permanent", process.pid, began))
        for process in self.processes:
            assert process.stdout is not None
            process.stdout.readline()

    def say(self, number: int, word: str) -> float:
        """When the agent had done it, seconds since 1970."""
        process = self.processes[number]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    def end(self) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.processes:
            process.communicate()


@contextmanager
def monitor(given: Stand) -> Iterator[int]:
    """A monitor as a process of its own; its pid."""
    reading, writing = os.pipe()
    with (given.folder / "monitor.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "interlock.monitors", "--host", HOST],
            pass_fds=[writing], stderr=log,
            env={**os.environ, READY_FD: str(writing), "INTERLOCK_FLEET": str(given.folder / "fleet.toml")},
        )  # fmt: skip
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        if said.readline() != b"ready\n":
            raise SystemExit((given.folder / "monitor.log").read_text())
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)


class Subscriber:
    """What has come: batches, samples, and the newest value of each series."""

    def __init__(self) -> None:
        self.batches = self.samples = 0
        self.values: dict[Labels, float] = {}
        self._news = trio.lowlevel.ParkingLot()

    async def listen(self, bus: Bus, *, task_status: trio.TaskStatus[None]) -> None:
        reader = SeriesReader()
        async with bus.samples([topics.telemetry(HOST, "monitor")]) as feed:
            task_status.started()
            async for batches in feed:
                for batch in batches:
                    samples, ended = reader.read(batch)
                    self.batches += 1
                    self.samples += len(samples)
                    for key in ended:
                        self.values.pop(key, None)
                    self.values |= dict(samples)
                self._news.unpark_all()

    def of(self, name: str, agent: str) -> float | None:
        wanted = {(NAME, name), ("agent", agent)}
        return next((value for key, value in self.values.items() if wanted <= set(key)), None)

    async def until(self, condition: Callable[[], bool]) -> float:
        """When it came true, seconds since 1970."""
        with trio.fail_after(WAIT_S):
            while not condition():
                await self._news.park()
        return time.time()


async def idle_bus(folder: Path) -> None:
    """A monitor's links to the bus and its pulse, and nothing else."""
    fleet = load_fleet(folder / "fleet.toml")
    async with open_bus(fleet.broker, f"monitor/{HOST}", security=load_security(fleet, f"monitor/{HOST}")) as bus:
        bus.telemetry(HOST, "monitor")
        async with bus.events([topics.FACTS], after=0) as feed, bus.samples([cadence.TOPIC]):
            print("ready", flush=True)
            async for _ in feed:
                pass


def bus_alone(given: Stand, settle: float, seconds: float) -> float:
    """CPU of that, in percent of a core."""
    command = [sys.executable, __file__, "--idle-bus", str(given.folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(settle)
        spent, began = cpu_s(process.pid), time.monotonic()
        time.sleep(seconds)
        return round((cpu_s(process.pid) - spent) / (time.monotonic() - began) * 100, 2)
    finally:
        process.kill()
        process.communicate()


async def spend(pid: int, subscriber: Subscriber, seconds: float) -> dict[str, Any]:
    """What the monitor takes while nobody disturbs it."""
    spent, batches, samples, began = cpu_s(pid), subscriber.batches, subscriber.samples, time.monotonic()
    await trio.sleep(seconds)
    lasted = time.monotonic() - began
    return {
        "cpu_percent": round((cpu_s(pid) - spent) / lasted * 100, 2),
        "batches_per_s": round((subscriber.batches - batches) / lasted, 1),
        "samples_per_s": round((subscriber.samples - samples) / lasted, 1),
        **size(pid),
    }


def size(pid: int) -> dict[str, Any]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return {"rss_mb": round(resident / 1024, 1), "descriptors": len(os.listdir(f"/proc/{pid}/fd"))}


async def measure(given: Stand, agents: Agents, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    subscriber = Subscriber()
    async with open_bus(given.fleet.broker, "rules", security=given.security("rules")) as listening:
        async with open_bus(given.fleet.broker, f"host/{HOST}", security=given.security(f"host/{HOST}")) as host:
            async with open_bus(given.fleet.broker, "coordinator", security=given.security("coordinator")) as leading:
                async with trio.open_nursery() as nursery:
                    await nursery.start(subscriber.listen, listening)
                    with monitor(given) as pid:
                        await trio.sleep(options.settle)
                        found["nobody_at_1_hz"] = await spend(pid, subscriber, options.seconds)
                        report(host, agents)
                        await subscriber.until(lambda: all_seen(subscriber, agents))
                        await trio.sleep(options.settle)
                        found["at_1_hz"] = await spend(pid, subscriber, options.seconds)
                        nursery.start_soon(move, leading)
                        await trio.sleep(options.settle)
                        found["at_10_hz"] = await spend(pid, subscriber, options.seconds)
                        found["memory_to_subscriber_at_10_hz"] = await growth(subscriber, agents, options.rounds)
                        found["end_of_process_to_subscriber"] = await ends(subscriber, agents)
                    nursery.cancel_scope.cancel()
    return found


def report(host: Bus, agents: Agents) -> None:
    for one in agents.instances:
        fact = facts.InstanceStarted(
            host=HOST, agent=one.agent, instance=one.id, revision="v1", role="permanent", pid=one.pid,
            started=one.started,
        )  # fmt: skip
        host.post(topics.host_fact(HOST), fact)


def all_seen(subscriber: Subscriber, agents: Agents) -> bool:
    return all(subscriber.of("agent_process_count", one.agent) == 2 for one in agents.instances)


async def move(leading: Bus) -> None:
    """A migration that goes on for as long as the benchmark does, and its lease."""
    started = facts.MigrationStarted(
        migration="m1", epoch=1, agent="agent-0", host=HOST, previous="v1", to="v2", strategy="rapid", request="r"
    )
    leading.post(topics.migration_fact("agent-0"), started)
    leading.telemetry("fleet", "coordinator")
    publisher = leading.telemetry(cadence.HOST, cadence.PUBLISHER)
    while True:
        publisher.send({cadence.lease(HOST, "m1"): 10.0}, time=time.time())
        await trio.sleep(cadence.RENEW_S)


async def growth(subscriber: Subscriber, agents: Agents, rounds: int) -> dict[str, float]:
    """From an agent's memory being there to a subscriber that knows."""
    took = []
    for number in range(rounds):
        at = number % len(agents.instances)
        name = agents.instances[at].agent

        def resident(name: str = name) -> float:
            return subscriber.of("agent_process_memory_rss_bytes", name) or 0.0

        before = resident()
        there = await trio.to_thread.run_sync(agents.say, at, "grow")
        seen = await subscriber.until(lambda: resident() > before + GROWN)  # noqa: B023  (awaited in this round)
        took.append((seen - there) * 1000)
        await trio.to_thread.run_sync(agents.say, at, "shrink")
        await subscriber.until(lambda: resident() < before + GROWN)  # noqa: B023
        await trio.sleep(0.037)  # so that rounds don't begin at the same place of the beat
    return quantiles(took)


async def ends(subscriber: Subscriber, agents: Agents) -> dict[str, float]:
    """From kill -9 of an agent to a subscriber that knows that its series have ended."""
    took = []
    for one, process in zip(agents.instances, agents.processes, strict=True):
        began = time.time()
        process.kill()
        seen = await subscriber.until(lambda: subscriber.of("agent_process_count", one.agent) is None)  # noqa: B023
        took.append((seen - began) * 1000)
        await trio.sleep(0.037)
    return quantiles(took)


def readers(agents: Agents) -> dict[str, Any]:
    """CPU milliseconds of one sample of all agents, in this process: ours, hot and calm, and psutil's."""
    trees, template = Trees(), templates({})["service"]
    hot, calm = template.due(frozenset({Group.HOT})), template.due(frozenset({Group.HOT, Group.CALM}))
    trees.sample(agents.instances)

    def ours_hot() -> None:
        trees.sample(agents.instances, lambda _: hot, look=False)

    def ours_calm() -> None:
        trees.sample(agents.instances, lambda _: calm)

    def by_psutil() -> None:
        for one in agents.instances:
            root = psutil.Process(one.pid)
            for process in [root, *root.children(recursive=True)]:
                with process.oneshot():
                    process.cpu_times(), process.memory_info(), process.num_threads(), process.num_fds()

    found: dict[str, Any] = {"processes_of_the_machine": len(procfs.pids())}
    for name, read in (("ours_hot", ours_hot), ("ours_calm", ours_calm), ("psutil", by_psutil)):
        took = []
        for _ in range(REPEATED):
            began = time.process_time()
            read()
            took.append((time.process_time() - began) * 1000)
        found[f"{name}_ms"] = round(median(took), 3)
    found["psutil_over_ours_calm"] = aim(found["psutil_ms"] / found["ours_calm_ms"], 10, at_most=False)
    trees.close()
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    home = Cgroups.here("benchmonitor")
    for name, cgroups in (("process_trees", None), ("cgroups", home)):
        if cgroups is not None and cgroups.reason:
            found[name] = {"skipped": cgroups.reason}
            continue
        identities = ["rules", "coordinator", f"host/{HOST}", f"monitor/{HOST}"]
        with stand(identities) as given:
            with (given.folder / "fleet.toml").open("a") as file:
                file.write(f'[monitor]\ngpu = "none"\n[hosts.{HOST}]\ncontrol = "tcp://127.0.0.1:1"\n')
            keys.write_private(given.fleet.keys_dir, given.private[f"monitor/{HOST}"])
            broker, agents = BrokerProcess(given.folder), Agents(options.agents, cgroups)
            try:
                alone: dict[str, Any] = {"bus_alone_cpu_percent": bus_alone(given, options.settle, options.seconds)}
                alone["one_sample"] = readers(agents)
                found[name] = alone | trio.run(partial(measure, given, agents, options))
            finally:
                agents.end()
                broker.stop()
        measured = found[name]
        measured["aims"] = {
            "cpu_percent_at_1_hz": aim(measured["at_1_hz"]["cpu_percent"], 0.3),
            "cpu_percent_at_10_hz": aim(measured["at_10_hz"]["cpu_percent"], 1.5),
            "rss_mb": aim(measured["at_10_hz"]["rss_mb"], 40),
            "memory_p50_ms": aim(measured["memory_to_subscriber_at_10_hz"]["p50_ms"], 60),
        }
    home.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--agents", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each figure of CPU")
    parser.add_argument("--rounds", type=int, default=40, help="memory crossings")
    parser.add_argument("--quick", action="store_true", help="all of it small: whether it works, not what it costs")
    parser.add_argument("--idle-bus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.idle_bus is not None:
        trio.run(idle_bus, options.idle_bus)
        return
    options.settle = 3.0
    if options.quick:
        options.agents, options.seconds, options.rounds, options.settle = 3, 2.0, 5, 1.5
    report = {"benchmark": Path(__file__).stem, **machine(), "agents": options.agents, "seconds": options.seconds}
    print(json.dumps(report | run(options), indent=1))


if __name__ == "__main__":
    main()
