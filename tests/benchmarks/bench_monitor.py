"""What a monitor of eight GPUs costs, beside gpustat and nvitop, and how soon a subscriber knows what happens on them.

Run: python tests/benchmarks/bench_monitor.py [--quick]; prints one JSON object. NVIDIA's library is the stand-in of the
tests, for everybody: its calls take microseconds, so that what is measured is what each program does around them. The
broker runs in a process of its own, without keys; the monitor is `interlock monitor` with its sampler.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).parents[1]))

from rig import _free_ports, cpu_s, machine

import nvml_parts
from interlock.broker import facts, topics
from interlock.broker.client import Bus, open_bus
from interlock.broker.config import load_fleet
from interlock.broker.role import READY_FD
from interlock.broker.samples import NAME, SeriesReader
from nvml_parts import GIB, FakeNvml

GPUS = 8
AIMS = {
    "cpu_idle_percent": 0.3,
    "cpu_fast_percent": 1.5,
    "pss_mb": 40,
    "memory_crossing_p50_ms": 60,
    "xid_p99_ms": 20,
    "hang_max_s": 0.7,
}
SPAWN_S = 5.0  # between two runs of a rival that is started each time
WAIT_S = 20.0

SNAPSHOTS = """
import json, sys, time
from nvitop import Device
devices = Device.all()
for device in devices: device.as_snapshot()
began, spent = time.perf_counter(), time.process_time()
rounds = int(sys.argv[1])
for _ in range(rounds):
    for device in devices: device.as_snapshot()
    time.sleep(0.1)
print(json.dumps({"cpu_ms": (time.process_time() - spent) / rounds * 1e3}))
"""


class Roles:
    """A broker and a monitor as processes, over a fleet file of their own."""

    def __init__(self, folder: Path, fake: FakeNvml) -> None:
        self.fake = fake
        self.path = folder / "fleet.toml"
        self.ports = _free_ports(4)
        self.running: list[subprocess.Popen[bytes]] = []
        self.write("nvidia")

    def write(self, gpu: str) -> None:
        names = ("events", "feed", "telemetry_in", "telemetry_out")
        broker = "\n".join(f'{n} = "tcp://127.0.0.1:{p}"' for n, p in zip(names, self.ports, strict=True))
        self.path.write_text(
            f'state = "state"\nsecurity = {{ mode = "insecure" }}\n[broker]\n{broker}\n'
            f'[monitor]\ngpu = "{gpu}"\n[hosts.alpha]\ncontrol = "tcp://127.0.0.1:{self.ports[0] + 9}"\n'
        )

    def start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        reading, writing = os.pipe()
        with (self.path.parent / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, "--fleet", str(self.path), *arguments],
                pass_fds=[writing],
                env={**os.environ, **self.fake.environment, READY_FD: str(writing)},
                stderr=log,
            )
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            if said.readline() != b"ready\n":
                raise SystemExit(f"{module} did not start: {(self.path.parent / f'{module}.log').read_text()}")
        self.running.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        process.wait(WAIT_S)
        self.running.remove(process)


@contextmanager
def roles() -> Iterator[Roles]:
    with tempfile.TemporaryDirectory(prefix="il-") as name:
        folder = Path(name)
        with nvml_parts.fake_nvml(nvml_parts.build(folder), folder, GPUS) as fake:
            held = Roles(folder, fake)
            try:
                yield held
            finally:
                for process in reversed(list(held.running)):
                    held.stop(process)


def family(pid: int) -> list[int]:
    """The process and its children."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def cost(pid: int, seconds: float) -> dict[str, float]:
    """Percent of a core, by process, and resident memory in MB."""
    pids = family(pid)
    before = [cpu_s(each) for each in pids]
    began = time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    spent = [cpu_s(each) - then for each, then in zip(pids, before, strict=True)]
    shares = [round(100 * each / took, 3) for each in spent]
    found = {"percent": round(sum(shares), 3), "monitor_percent": shares[0]} | memory_mb(pids)
    if len(pids) > 1:
        found["sampler_percent"] = round(sum(shares[1:]), 3)
    return found


def memory_mb(pids: list[int]) -> dict[str, float]:
    """rss: of each process, resident, what it shares with others (the interpreter's own code) in full; pss: in part."""
    found: dict[str, float] = {}
    for name, key in (("rss_mb", "Rss:"), ("pss_mb", "Pss:")):
        each = []
        for pid in pids:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            each.append(next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key)))
        found[name] = round(sum(each), 1)
        found[f"sampler_{name}"] = round(sum(each[1:]), 1)
    return found


class Subscriber:
    """What comes, and when, by the subscriber's clock."""

    def __init__(self, bus: Bus, fake: FakeNvml) -> None:
        self.bus = bus
        self.fake = fake
        self.values: dict[tuple[str, str], float] = {}
        self.facts: list[Any] = []
        self._news = trio.lowlevel.ParkingLot()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._samples)
            await nursery.start(self._facts)
            task_status.started()

    async def _samples(self, *, task_status: trio.TaskStatus[None]) -> None:
        reader = SeriesReader()
        async with self.bus.samples(["telemetry/alpha/monitor/"]) as feed:
            task_status.started()
            async for batches in feed:
                for batch in batches:
                    for key, value in reader.read(batch)[0]:
                        of = dict(key)
                        if of.get("cause") != "agent":
                            self.values[of[NAME], of.get("gpu", "")] = value
                self._news.unpark_all()

    async def _facts(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with self.bus.events(["fact/gpu/"]) as feed:
            task_status.started()
            async for event in feed:
                self.facts.append(event.body)
                self._news.unpark_all()

    async def until(self, condition: Callable[[], Any]) -> float:
        """Seconds that it took."""
        began = time.perf_counter()
        with trio.fail_after(WAIT_S):
            while not condition():
                await self._news.park()
        return time.perf_counter() - began


async def crossings(seen: Subscriber, rounds: int) -> list[float]:
    """From a card's memory being full to a sample of it with the subscriber."""
    taken = []
    for number in range(rounds):
        card, gpu = seen.fake.gpu(number % GPUS), str(number % GPUS)
        await trio.sleep(0.05 + 0.013 * (number % 8))  # at every phase of the beat
        card.memory_used = 23 * GIB
        taken.append(await seen.until(lambda gpu=gpu: seen.values["gpu_memory_used_ratio", gpu] > 0.95))
        card.memory_used = 5 * GIB
        await seen.until(lambda gpu=gpu: seen.values["gpu_memory_used_ratio", gpu] < 0.5)
    return taken


async def xids(seen: Subscriber, rounds: int) -> dict[str, list[float]]:
    """From an event in the driver to the subscriber: as a counter, and as a fact, which is on disk by then."""
    taken: dict[str, list[float]] = {"telemetry": [], "fact": []}
    for number in range(rounds):
        gpu, xid = number % GPUS, 1000 + number
        await trio.sleep(0.03)
        before = seen.values["gpu_xid_errors_total", str(gpu)]
        began = time.perf_counter()
        seen.fake.xid(gpu, xid)
        await seen.until(lambda gpu=gpu, before=before: seen.values["gpu_xid_errors_total", str(gpu)] > before)
        taken["telemetry"].append(time.perf_counter() - began)
        await seen.until(lambda xid=xid: any(getattr(body, "xid", 0) == xid for body in seen.facts))
        taken["fact"].append(time.perf_counter() - began)
    return taken


async def hangs(seen: Subscriber, rounds: int) -> list[float]:
    """From a call that does not come back to the fault with the subscriber; one card after another."""
    taken = []
    for gpu in range(rounds):
        await trio.sleep(0.3)
        seen.fake.call("nvmlDeviceGetMemoryInfo_v2", gpu).hang = 1
        taken.append(await seen.until(lambda gpu=gpu: seen.values["gpu_up", str(gpu)] == 0))
        seen.fake.gpu(GPUS - 1).memory_used += 1 << 20  # the last card is read again
        count = seen.values["gpu_samples_total", str(GPUS - 1)]
        await seen.until(lambda count=count: seen.values["gpu_samples_total", str(GPUS - 1)] > count + 2)
    return taken


def begun() -> facts.MigrationStarted:
    return facts.MigrationStarted(
        migration="m", epoch=1, agent="a", host="alpha", previous="v1", to="v2", strategy="rapid", request="r"
    )


async def measure(held: Roles, quick: bool) -> dict[str, Any]:
    seconds = 8.0 if quick else 30.0
    start = held.start
    await trio.to_thread.run_sync(start, "interlock.broker")
    report: dict[str, Any] = {}
    async with open_bus(load_fleet(str(held.path)).broker, "operator/bench") as bus, trio.open_nursery() as nursery:
        for label, gpu in (("without_gpus", "none"), ("", "nvidia")):
            held.write(gpu)
            monitor = await trio.to_thread.run_sync(lambda: start("interlock.monitors", "--host", "alpha"))
            await trio.sleep(3.0)
            ended = facts.MigrationEnded(
                migration="m", agent="a", epoch=1, outcome="committed", decided_by="coordinator", reason=""
            )
            await bus.publish(topics.migration_fact("a"), ended)
            idle = await trio.to_thread.run_sync(cost, monitor.pid, seconds)
            await bus.publish(topics.migration_fact("a"), begun())
            await trio.sleep(1.0)
            fast = await trio.to_thread.run_sync(cost, monitor.pid, seconds)
            report[f"monitor_{label}" if label else "monitor"] = {"idle_1_hz": idle, "migrating_10_hz": fast}
            if label:
                await trio.to_thread.run_sync(held.stop, monitor)
        for name in ("idle_1_hz", "migrating_10_hz"):
            whole, rest = report["monitor"][name], report["monitor_without_gpus"][name]
            whole["of_gpus_percent"] = round(whole["percent"] - rest["percent"], 3)
        seen = Subscriber(bus, held.fake)
        await nursery.start(seen.run)
        await seen.until(lambda: ("gpu_memory_used_ratio", "7") in seen.values)
        await seen.until(lambda: ("gpu_xid_errors_total", "7") in seen.values)
        rounds = 16 if quick else 80
        report["memory_crossing_to_subscriber_ms"] = spread(await crossings(seen, rounds))
        report["xid_to_subscriber_ms"] = {k: spread(v) for k, v in (await xids(seen, 3 * rounds)).items()}
        report["hang_to_fault_ms"] = spread(await hangs(seen, 4 if quick else 7))
        nursery.cancel_scope.cancel()
    return report


def rivals(fake: FakeNvml, quick: bool) -> dict[str, Any]:
    """CPU of one look at all cards by others, in ms, and in percent of a core where it is taken every 5 s."""
    environment = {**os.environ, **fake.environment, "PYTHONWARNINGS": "ignore"}
    rounds = 2 if quick else 5
    found: dict[str, Any] = {}
    for name, words in (("gpustat", ["gpustat", "--json"]), ("nvitop", ["nvitop", "-1"])):
        if find_spec(name) is None:
            found[name] = "not installed"
            continue
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(rounds):
            command = [sys.executable, "-m", *words]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / rounds
        found[name] = {"cpu_ms_per_run": round(spent * 1e3, 1), "percent_every_5_s": round(100 * spent / SPAWN_S, 2)}
    if find_spec("nvitop") is not None:
        command = [sys.executable, "-c", SNAPSHOTS, "10" if quick else "50"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        spent_ms = json.loads(done.stdout)["cpu_ms"]
        found["nvitop_snapshots"] = {"cpu_ms_per_round": round(spent_ms, 2), "percent_at_10_hz": round(spent_ms, 2)}
    return found


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "p50": round(statistics.median(ordered) * 1e3, 1),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3, 1),
        "max": round(ordered[-1] * 1e3, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a minute in all, and rougher figures")
    options = parser.parse_args()
    if reason := nvml_parts.why_not():
        print(json.dumps({"benchmark": "monitor", "left_out": reason}))
        return 0
    report: dict[str, Any] = {"benchmark": "monitor", "gpus": GPUS, **machine(), "aims": AIMS}
    with roles() as held:
        report |= trio.run(measure, held, options.quick)
        held.fake.close()
        report["rivals"] = rivals(held.fake, options.quick)
    per_sample = report["monitor"]["migrating_10_hz"]["of_gpus_percent"] / 100 / 10 * 1e3
    report["our_cpu_ms_per_sample"] = round(per_sample, 3)
    if isinstance(report["rivals"]["gpustat"], dict):
        report["gpustat_times_ours"] = round(report["rivals"]["gpustat"]["cpu_ms_per_run"] / max(per_sample, 1e-3), 1)
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
