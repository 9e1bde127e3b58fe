"""The monitor over the bus in memory, with real processes, simulated cards and the real clock."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from interlock.broker import cadence, facts, topics
from interlock.broker.config import MonitorConfig, SimulatedGpu
from interlock.broker.memory import MemoryBroker
from interlock.broker.samples import NAME, Labels, SeriesReader
from interlock.broker.simgpu import SimulatedGpu as Card
from interlock.monitors.gpu import Card as CardLabel
from interlock.monitors.gpu import GpuBackend, Hear, NoGpu, Part, Reading, memory
from interlock.monitors.monitor import Monitor, OpenGpu, open_gpu
from interlock.monitors.roster import Instance
from interlock.monitors.sampler import Group

Start = Callable[..., tuple[subprocess.Popen[str], Instance]]

GIB = 1024**3
CONFIG = MonitorConfig(
    idle_s=0.2, migrating_s=0.05, gpu="simulated", simulated=[SimulatedGpu(name="card", memory_bytes=24 * GIB)]
)
SLEEPER = "import sys; print('ready', flush=True); sys.stdin.read()"
RESERVER = """
import sys
from pathlib import Path
from interlock.broker.simgpu import SimulatedGpu
held = SimulatedGpu(Path(sys.argv[1])).reserve(int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.read()
"""


class Seen:
    """What a subscriber knows: the newest value of each series, what ended, and when samples were taken."""

    def __init__(self) -> None:
        self.values: dict[Labels, float] = {}
        self.ended: list[Labels] = []
        self.times: dict[Labels, list[float]] = {}
        self._news = trio.lowlevel.ParkingLot()

    def take(self, when: float, samples: list[tuple[Labels, float]], ended: list[Labels]) -> None:
        for key in ended:
            self.values.pop(key, None)
            self.ended.append(key)
        for key, value in samples:
            self.values[key] = value
            self.times.setdefault(key, []).append(when)
        self._news.unpark_all()

    def find(self, name: str, **rest: str) -> list[float]:
        wanted = {NAME: name, **rest}.items()
        return [value for key, value in self.values.items() if wanted <= dict(key).items()]

    async def until(self, condition: Callable[[], Any]) -> None:
        with trio.fail_after(30):
            while not condition():
                await self._news.park()


@asynccontextmanager
async def monitoring(
    broker: MemoryBroker, state: Path, config: MonitorConfig = CONFIG, open_gpu: OpenGpu = open_gpu
) -> AsyncIterator[Seen]:
    seen = Seen()
    reader = SeriesReader()

    async def watch(*, task_status: trio.TaskStatus[None]) -> None:
        async with broker.bus("watcher").samples([topics.TELEMETRY]) as feed:
            task_status.started()
            async for batches in feed:
                for batch in batches:
                    seen.take(batch.time, *reader.read(batch))

    async def monitor() -> None:
        await Monitor(broker.bus("monitor/alpha"), config, "alpha", state, open_gpu=open_gpu).run(lambda: None)

    async with trio.open_nursery() as watching:
        await watching.start(watch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(monitor)
            yield seen
            nursery.cancel_scope.cancel()
        await seen.until(lambda: not seen.values)  # its goodbye ends all that it reported
        watching.cancel_scope.cancel()


def report(broker: MemoryBroker, *bodies: Any) -> None:
    for body in bodies:
        migration = isinstance(body, facts.MigrationStarted | facts.MigrationEnded)
        broker.bus("test").post(topics.migration_fact("echo") if migration else topics.host_fact("alpha"), body)


def started(instance: Instance) -> facts.InstanceStarted:
    return facts.InstanceStarted(
        host="alpha",
        agent=instance.agent,
        instance=instance.id,
        revision=instance.revision,
        role=instance.role,
        pid=instance.pid,
        started=instance.started,
    )


def begun() -> facts.MigrationStarted:
    return facts.MigrationStarted(
        migration="m1", epoch=1, agent="echo", host="alpha", previous="v1", to="v2", strategy="rapid", request="r"
    )


def over() -> facts.MigrationEnded:
    return facts.MigrationEnded(
        migration="m1", agent="echo", epoch=1, outcome="committed", decided_by="coordinator", reason="ok"
    )


async def test_the_machine_and_its_cards_report_without_any_agent(tmp_path: Path) -> None:
    async with monitoring(MemoryBroker(), tmp_path) as seen:
        await seen.until(lambda: seen.find("host_cpu_ratio", host="alpha") and seen.find("gpu_up"))
        assert seen.find("gpu_up", host="alpha", gpu="0") == [1]
        assert seen.find("gpu_driver_up", host="alpha") == [1]
        assert seen.find("gpu_memory_total_bytes") == [24 * GIB]
        assert seen.find("gpu_memory_used_ratio") == [0]
        assert seen.find("gpu_temperature_celsius") == [], "a simulated card has no temperature"
        assert seen.find("host_disk_free_bytes", path=str(tmp_path))
        assert seen.find("monitor_missed_samples_total") != []


async def test_an_agent_that_started_before_the_monitor_is_found_in_the_log(tmp_path: Path, start: Start) -> None:
    _, instance = start(SLEEPER)
    broker = MemoryBroker()
    report(broker, started(instance))
    async with monitoring(broker, tmp_path) as seen:
        of = {"host": "alpha", "agent": "echo", "revision": "v1", "role": "permanent"}
        await seen.until(lambda: seen.find("agent_process_memory_rss_bytes", **of))
        await seen.until(lambda: seen.find("agent_process_count", **of) == [1])
        await seen.until(lambda: seen.find("agent_process_cpu_ratio", **of))


async def test_the_series_of_an_agent_killed_with_9_end_though_nobody_reports_it(tmp_path: Path, start: Start) -> None:
    process, instance = start(SLEEPER)
    broker = MemoryBroker()
    report(broker, started(instance))
    async with monitoring(broker, tmp_path) as seen:
        await seen.until(lambda: seen.find("agent_process_count", agent="echo"))
        process.kill()
        process.wait()
        await seen.until(lambda: not seen.find("agent_process_count", agent="echo"))
        assert not seen.find("agent_process_memory_rss_bytes", agent="echo")


async def test_after_a_commit_the_candidates_series_end_and_go_on_as_permanent(tmp_path: Path, start: Start) -> None:
    _, instance = start(SLEEPER, revision="v2", role="candidate")
    broker = MemoryBroker()
    report(broker, started(instance))
    async with monitoring(broker, tmp_path) as seen:
        await seen.until(lambda: seen.find("agent_process_count", revision="v2", role="candidate"))
        report(broker, facts.SlotChanged(host="alpha", agent="echo", state="serving", permanent="v2"))
        await seen.until(lambda: seen.find("agent_process_count", revision="v2", role="permanent"))
        await seen.until(lambda: not seen.find("agent_process_count", revision="v2", role="candidate"))


async def test_memory_that_an_agent_really_reserves_shows_on_the_card_and_at_the_agent_until_it_dies(
    tmp_path: Path, start: Start
) -> None:
    broker = MemoryBroker()
    async with monitoring(broker, tmp_path) as seen:
        await seen.until(lambda: seen.find("gpu_memory_used_ratio") == [0])
        process, instance = start(RESERVER, tmp_path / "simgpu" / "0", 18 * GIB)
        report(broker, started(instance))
        await seen.until(lambda: seen.find("gpu_memory_used_ratio") == [0.75])
        await seen.until(lambda: seen.find("gpu_process_memory_bytes", agent="echo", gpu="0") == [18 * GIB])
        process.kill()
        process.wait()
        await seen.until(lambda: seen.find("gpu_memory_used_ratio") == [0])
        await seen.until(lambda: not seen.find("gpu_process_memory_bytes"))


async def test_hot_readings_come_at_the_fast_beat_while_a_migration_touches_the_host(tmp_path: Path) -> None:
    broker = MemoryBroker()
    config = MonitorConfig(idle_s=3600.0, migrating_s=0.05, gpu="simulated", simulated=CONFIG.simulated)
    async with monitoring(broker, tmp_path, config) as seen:

        def hot() -> int:
            return max((len(times) for key, times in seen.times.items() if ("__name__", "gpu_up") in key), default=0)

        await seen.until(hot)
        assert hot() == 1
        report(broker, begun())
        await seen.until(lambda: hot() >= 5)
        [calm] = [times for key, times in seen.times.items() if ("__name__", "host_cpus") in key]
        assert len(calm) == 1, "the rest stays at the idle beat"
        report(broker, over())
        before = hot()
        for _ in range(4):
            await trio.sleep(0.1)  # of an hour; a sample under way may still come
        assert hot() <= before + 2


async def test_a_coordinator_that_lends_keeps_the_host_fast_and_one_that_is_dead_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.broker.cadence.FIRST_S", 0.0)  # no event is good for anything by itself
    monkeypatch.setattr("interlock.monitors.cadence.FIRST_S", 0.0)
    broker = MemoryBroker()
    config = MonitorConfig(idle_s=3600.0, migrating_s=0.02, slow_s=3600.0, gpu="none")
    async with monitoring(broker, tmp_path, config) as seen:

        def hot() -> int:
            found = [times for key, times in seen.times.items() if dict(key)[NAME] == "host_memory_available_bytes"]
            return sum(map(len, found))

        await seen.until(hot)
        report(broker, begun())
        coordinator = broker.bus("coordinator").telemetry(cadence.HOST, cadence.PUBLISHER)
        while hot() < 5:  # until the monitor has heard of the migration, which it must before it takes a lease for it
            coordinator.send({cadence.lease("alpha", "m1"): 0.5, cadence.lease("beta", "m2"): 1e6}, time=time.time())
            with trio.move_on_after(0.05):
                await seen.until(lambda: hot() >= 5)
        with trio.fail_after(30):
            before = -1
            while hot() != before:  # nobody renews it: the samples stop
                before = hot()
                await trio.sleep(0.7)
        leases = [cadence.lease("alpha", "m1"), cadence.lease("beta", "m2")]
        coordinator.send({}, time=time.time(), ended=leases)


async def test_samples_are_marked_with_the_time_they_were_taken(tmp_path: Path) -> None:
    began = time.time()
    async with monitoring(MemoryBroker(), tmp_path) as seen:
        await seen.until(lambda: seen.find("gpu_up") and seen.find("host_cpus"))
    assert all(began <= when <= time.time() for times in seen.times.values() for when in times)


async def test_a_broker_that_is_down_at_first_delays_only_what_needs_it(tmp_path: Path, start: Start) -> None:
    _, instance = start(SLEEPER)
    broker = MemoryBroker()
    broker.up = False
    report(broker, started(instance))  # waits, as its host would
    async with monitoring(broker, tmp_path) as seen:
        await trio.sleep(0.1)
        assert seen.values == {}
        broker.up = True
        await seen.until(lambda: seen.find("agent_process_count", agent="echo"))


class SickCard:
    """Two cards, of which the first fails while `sick`."""

    label = "two"
    in_kernel_log = False

    def __init__(self) -> None:
        self.cards = [CardLabel(0, "GPU-0", "first"), CardLabel(1, "GPU-1", "second")]
        self.sick = True
        self.hear: Hear

    async def run(self, hear: Hear, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self.hear = hear
        task_status.started()
        await trio.sleep_forever()

    async def sample(self, groups: frozenset[Group]) -> None:
        await self.hear(Part([self.read(card, groups) for card in self.cards]))

    def read(self, card: CardLabel, groups: frozenset[Group]) -> Reading:
        if card.index == 0 and self.sick:
            return Reading(card, time.time(), groups=groups, kind="lost", error="GPU is lost")
        return Reading(card, time.time(), memory(used=1, free=3, total=4), groups=groups)

    async def release(self) -> bool:
        raise NotImplementedError

    def resume(self) -> None:
        raise NotImplementedError


async def test_a_card_that_fails_is_reported_once_and_the_other_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cards = SickCard()

    async def opened(config: MonitorConfig, state: Path) -> GpuBackend:
        await trio.lowlevel.checkpoint()
        return cards

    async with monitoring(MemoryBroker(), tmp_path, open_gpu=opened) as seen:
        first = ("gpu", "0"), ("__name__", "gpu_up")
        await seen.until(lambda: any(set(first) <= set(key) and len(t) >= 3 for key, t in seen.times.items()))
        assert seen.find("gpu_up", gpu="0") == [0]
        assert seen.find("gpu_memory_used_ratio", gpu="0") == []
        await seen.until(lambda: seen.find("gpu_memory_used_ratio", gpu="1") == [0.25])
        cards.sick = False
        await seen.until(lambda: seen.find("gpu_up", gpu="0") == [1] and seen.find("gpu_memory_used_ratio", gpu="0"))
        await seen.until(lambda: not seen.find("gpu_fault"))
        cards.sick = True
        await seen.until(lambda: seen.find("gpu_up", gpu="0") == [0])
        assert seen.find("gpu_memory_used_ratio", gpu="0") == [], "its last readings are no longer true"
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [
        "GPU 0 first failed: GPU is lost",
        "GPU 0 first reports again",
        "GPU 0 first failed: GPU is lost",
    ]


async def test_a_machine_without_a_gpu_is_said_once_and_everything_else_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def none(config: MonitorConfig, state: Path) -> GpuBackend:
        await trio.lowlevel.checkpoint()
        raise NoGpu("no NVIDIA GPU: Driver Not Loaded")

    caplog.set_level(logging.INFO)
    auto = MonitorConfig(idle_s=0.1, gpu="auto")
    async with monitoring(MemoryBroker(), tmp_path, auto, none) as seen:
        await seen.until(lambda: any(len(times) >= 3 for times in seen.times.values()))
        assert seen.find("gpu_up") == []
        assert seen.find("gpu_driver_up") == [], "none is expected"
    assert [r.getMessage() for r in caplog.records if r.name == "interlock.monitors"] == [
        "GPUs: no NVIDIA GPU: Driver Not Loaded"
    ]


async def test_a_gpu_that_was_asked_for_and_is_not_there_is_a_series_of_its_own(tmp_path: Path) -> None:
    async def none(config: MonitorConfig, state: Path) -> GpuBackend:
        await trio.lowlevel.checkpoint()
        raise NoGpu("no NVIDIA GPU: Driver Not Loaded")

    async with monitoring(MemoryBroker(), tmp_path, MonitorConfig(idle_s=0.1, gpu="nvidia"), none) as seen:
        await seen.until(lambda: seen.find("gpu_driver_up", host="alpha") == [0])


async def test_a_simulated_card_whose_folder_vanishes_fails_and_comes_back(tmp_path: Path) -> None:
    async with monitoring(MemoryBroker(), tmp_path) as seen:
        await seen.until(lambda: seen.find("gpu_up") == [1])
        folder = tmp_path / "simgpu" / "0"
        folder.rename(tmp_path / "away")
        await seen.until(lambda: seen.find("gpu_up") == [0])
        (tmp_path / "away").rename(folder)
        await seen.until(lambda: seen.find("gpu_up") == [1])
        assert Card(folder).used() == 0


def test_the_self_test_needs_no_fleet_and_says_where_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "interlock.monitors", "--self-test"], capture_output=True, text=True, check=True
    )
    assert '"gpu":' in done.stdout
