"""GPUs from the driver's library to a subscriber: the stand-in, a sampler process, a monitor, and a real bus."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

import nvml_parts
from interlock.broker import facts, policy, topics
from interlock.broker.client import Bus, open_bus
from interlock.broker.commands import RollBack
from interlock.broker.config import BrokerConfig, FleetConfig, HostConfig, MonitorConfig, RulesConfig, SecurityConfig
from interlock.broker.errors import Refused
from interlock.broker.keys import Grant
from interlock.broker.planes import serve_planes
from interlock.broker.samples import NAME, Labels, SeriesReader
from interlock.broker.wire import Event, Header, encode
from interlock.coordinator.demo.fleet import SOURCES
from interlock.coordinator.rules.service import run_rules
from interlock.monitors import control
from interlock.monitors.gpu import GpuBackend
from interlock.monitors.monitor import Monitor
from interlock.monitors.nvidia import NvidiaBackend, Patience
from interlock.monitors.roster import Instance
from nvml_parts import GIB, NOT_AVAILABLE, FakeNvml

PATIENCE = Patience(retry_s=0.2, probe_s=0.2, probe_most_s=0.4, lacking_s=0.2)
WITHIN_S = 20  # of each wait: for a machine that is busy with other things; the benchmark says what it takes
ANY = BrokerConfig(
    events="tcp://127.0.0.1:*",
    feed="tcp://127.0.0.1:*",
    telemetry_in="tcp://127.0.0.1:*",
    telemetry_out="tcp://127.0.0.1:*",
)


class Watched:
    """What a subscriber knows of the host `alpha`: the newest value of each series, and the facts of its GPUs."""

    def __init__(self, bus: Bus, monitor: Monitor, fleet: FleetConfig, nursery: trio.Nursery) -> None:
        self.bus = bus
        self.monitor = monitor
        self.fleet = fleet
        self.nursery = nursery
        self.values: dict[Labels, float] = {}
        self.batches = 0
        self.told: list[Any] = []
        self._news = trio.lowlevel.ParkingLot()

    async def follow_samples(self, *, task_status: trio.TaskStatus[None]) -> None:
        reader = SeriesReader()
        async with self.bus.samples([topics.telemetry("alpha", "monitor")]) as feed:
            task_status.started()
            async for batches in feed:
                for batch in batches:
                    samples, ended = reader.read(batch)
                    for key in ended:
                        self.values.pop(key, None)
                    self.values.update(samples)
                    self.batches += 1
                self._news.unpark_all()

    async def follow_facts(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with self.bus.events(["fact/gpu/alpha/", "fact/alert/", "rollback/"]) as feed:
            task_status.started()
            async for event in feed:
                self.told.append(event.body)
                self._news.unpark_all()

    def find(self, name: str, **rest: str) -> list[float]:
        wanted = {NAME: name, **rest}.items()
        return [value for key, value in self.values.items() if wanted <= dict(key).items()]

    def raised(self, kind: str, gpu: int = 0) -> list[facts.GpuFault]:
        return [b for b in self.told if isinstance(b, facts.GpuFault) and (b.kind, b.gpu) == (kind, gpu)]

    def cleared(self, kind: str, gpu: int = 0) -> list[facts.GpuFaultCleared]:
        return [b for b in self.told if isinstance(b, facts.GpuFaultCleared) and (b.kind, b.gpu) == (kind, gpu)]

    async def until(self, condition: Callable[[], Any]) -> None:
        with trio.fail_after(WITHIN_S):
            while not condition():
                await self._news.park()

    async def until_well(self) -> None:
        await self.until(lambda: self.find("gpu_up") == [1, 1] and self.find("gpu_temperature_celsius"))


@asynccontextmanager
async def watched(fake: FakeNvml, kmsg: Path = Path("/nowhere"), **patience: float) -> AsyncIterator[Watched]:
    async def opened(config: MonitorConfig, state: Path) -> GpuBackend:
        await trio.lowlevel.checkpoint()
        return NvidiaBackend(patience=PATIENCE)

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        for variable, value in fake.environment.items():
            patch.setenv(variable, value)
        folder = Path(name)
        async with trio.open_nursery() as planes:
            config = await planes.start(serve_planes, ANY, folder / "broker")
            fleet = FleetConfig(
                broker=config,
                rules=RulesConfig(files=[str(SOURCES / "rules.yaml")]),
                hosts={"alpha": HostConfig(control="tcp://127.0.0.1:*")},
                path=str(folder / "fleet.toml"),
                security=SecurityConfig(mode="insecure"),
            )
            async with open_bus(config, "test") as bus, open_bus(config, "monitor/alpha") as own:
                async with trio.open_nursery() as nursery:
                    beats = MonitorConfig(gpu="nvidia", idle_s=0.1, migrating_s=0.05)
                    monitor = Monitor(own, beats, "alpha", folder, open_gpu=opened, kmsg=kmsg)
                    seen = Watched(bus, monitor, fleet, nursery)
                    await nursery.start(seen.follow_samples)
                    await nursery.start(seen.follow_facts)
                    async with trio.open_nursery() as monitoring:
                        monitoring.start_soon(monitor.run, lambda: None)
                        yield seen
                        monitoring.cancel_scope.cancel()
                    await seen.until(lambda: not [key for key in seen.values if dict(key)[NAME].startswith("gpu_")])
                    nursery.cancel_scope.cancel()
            planes.cancel_scope.cancel()


async def test_readings_of_all_cards_come_in_one_batch_and_with_units_in_their_names(fake: FakeNvml) -> None:
    async with watched(fake) as seen:
        await seen.until_well()
        of = {"host": "alpha", "gpu": "1", "uuid": fake.gpu(1).uuid.decode()}
        assert seen.find("gpu_memory_used_ratio", **of) == [0.25]
        assert seen.find("gpu_clock_hertz", clock="memory", **of) == [10_501e6]
        assert seen.find("gpu_sample_quality_ratio", **of) == [1]
        assert seen.find("gpu_driver_up") == [1]
        assert seen.find("gpu_xid_errors_total", **of) == [0, 0]
        await seen.until(lambda: min(seen.find("gpu_samples_total")) >= 5)
        fake.gpu(1).memory_used = 23 * GIB
        await seen.until(lambda: seen.find("gpu_memory_used_ratio", **of)[0] > 0.95)


# --- the fault table


@dataclass(frozen=True)
class Row:
    """kind: of the fact. gpu: of which card; -1: of the driver. shown: by telemetry while it stands."""

    kind: str
    harm: Callable[[FakeNvml], Any]
    mend: Callable[[FakeNvml], Any]
    shown: Callable[[Watched], Any]
    gpu: int = 0
    cause: str = "device"


def lost_shown(seen: Watched) -> bool:
    """The card's readings have ended, and the other's have not."""
    up = [seen.find("gpu_up", gpu=gpu) for gpu in ("0", "1")]
    return up == [[0], [1]] and not seen.find("gpu_memory_used_bytes", gpu="0")


def driver_shown(seen: Watched) -> bool:
    return (
        seen.find("gpu_driver_up") == [0] and seen.find("gpu_up") == [0, 0] and not seen.find("gpu_memory_used_bytes")
    )


def set_error(function: str, error: int) -> Callable[[FakeNvml], None]:
    return lambda fake: setattr(fake.call(function, 0), "error", error)


def lacks(reading: str, reason: str) -> Callable[[Watched], bool]:
    def shown(seen: Watched) -> bool:
        told = seen.find("gpu_reading_lacking", gpu="0", reading=reading, reason=reason)
        return told == [1] and not seen.find(reading, gpu="0") and seen.find("gpu_up", gpu="0") == [1]

    return shown


def revoke(fake: FakeNvml) -> None:
    """A container loses its devices: whoever has them open goes on, until it starts anew."""
    fake.call("nvmlInitWithFlags").error = nvml_parts.UNKNOWN
    fake.call("nvmlDeviceGetMemoryInfo_v2").error = nvml_parts.UNINITIALIZED


ROWS = [
    Row(
        "lost",
        lambda fake: setattr(fake.gpu(0), "error", nvml_parts.LOST),
        lambda fake: setattr(fake.gpu(0), "error", 0),
        lambda seen: lost_shown(seen) and seen.find("gpu_fault", gpu="0", kind="lost") == [1],
    ),
    Row(
        "hang",
        lambda fake: setattr(fake.call("nvmlDeviceGetMemoryInfo_v2", 0), "hang", 1),
        lambda fake: setattr(fake.call("nvmlDeviceGetMemoryInfo_v2", 0), "hang", 0),
        lambda seen: lost_shown(seen) and seen.find("gpu_fault", gpu="0", kind="hang") == [1],
    ),
    Row(
        "driver-mismatch",
        lambda fake: fake.fail(nvml_parts.VERSION_MISMATCH),
        lambda fake: fake.fail(0),
        driver_shown,
        gpu=-1,
        cause="driver",
    ),
    Row(
        "driver-not-loaded",
        lambda fake: fake.fail(nvml_parts.DRIVER_NOT_LOADED),
        lambda fake: fake.fail(0),
        driver_shown,
        gpu=-1,
        cause="driver",
    ),
    Row("device-revoked", revoke, lambda fake: fake.fail(0), driver_shown, gpu=-1, cause="driver"),
    Row(
        "reset-required",
        lambda fake: setattr(fake.gpu(0), "error", nvml_parts.RESET_REQUIRED),
        lambda fake: setattr(fake.gpu(0), "error", 0),
        lost_shown,
    ),
    Row(
        "reset-required",
        lambda fake: setattr(fake.gpu(0), "recovery_action", 1),
        lambda fake: setattr(fake.gpu(0), "recovery_action", 0),
        lambda seen: (
            seen.find("gpu_recovery_action", gpu="0") == [1]
            and seen.find("gpu_fault", gpu="0", kind="reset-required") == [1]
            and seen.find("gpu_up", gpu="0") == [1]
        ),
    ),
    Row(
        "not-supported",
        set_error("nvmlDeviceGetPowerUsage", nvml_parts.NOT_SUPPORTED),
        set_error("nvmlDeviceGetPowerUsage", 0),
        lacks("gpu_power_watts", "not-supported"),
        cause="limit",
    ),
    Row(
        "no-permission",
        set_error("nvmlDeviceGetCurrentClocksEventReasons", nvml_parts.NO_PERMISSION),
        set_error("nvmlDeviceGetCurrentClocksEventReasons", 0),
        lacks("gpu_clock_event_reasons", "no-permission"),
        cause="limit",
    ),
    Row(
        "not-available",
        lambda fake: fake.hold(0, (os.getpid(), NOT_AVAILABLE)),
        lambda fake: fake.hold(0, (os.getpid(), GIB)),
        lacks("gpu_process_memory_bytes", "not-available"),
        cause="limit",
    ),
]


@pytest.mark.parametrize("cause", ["device", "driver", "limit"])
async def test_the_fault_table(fake: FakeNvml, cause: str) -> None:
    """Each row: told with its time, shown by telemetry while it stands, and over by itself when it is mended."""
    fake.gpu(0).mig_supported = fake.gpu(1).mig_supported = 1  # so that nothing is lacking at first
    async with watched(fake) as seen:
        for row in [row for row in ROWS if row.cause == cause]:
            await seen.until_well()
            seen.told.clear()
            began = time.time()
            row.harm(fake)
            await seen.until(lambda row=row: seen.raised(row.kind, row.gpu))
            [told] = seen.raised(row.kind, row.gpu)
            assert (told.cause, bool(told.recovery)) == (row.cause, True)
            assert began <= told.since <= time.time()
            await seen.until(lambda row=row: row.shown(seen))
            row.mend(fake)
            await seen.until(lambda row=row: seen.cleared(row.kind, row.gpu))
            [over] = seen.cleared(row.kind, row.gpu)
            assert (over.since, over.until > over.since) == (told.since, True)
            await seen.until(lambda: not seen.find("gpu_fault") and seen.find("gpu_up") == [1, 1])
            await seen.until(lambda: len(seen.find("gpu_power_watts")) == 2)


# --- events


async def test_an_xid_of_nvml_is_a_fact_and_a_counter_and_those_of_programs_are_told_apart(fake: FakeNvml) -> None:
    async with watched(fake) as seen:
        await seen.until_well()
        await seen.until(lambda: fake.call("nvmlEventSetWait_v2").count)
        fake.xid(1, 79)
        await seen.until(lambda: seen.raised("xid", 1))
        [told] = seen.raised("xid", 1)
        assert (told.xid, told.cause, told.uuid) == (79, "device", fake.gpu(1).uuid.decode())
        await seen.until(lambda: seen.find("gpu_xid_errors_total", gpu="1", cause="device") == [1])
        fake.xid(1, 31)
        await seen.until(lambda: seen.raised("agent-xid", 1))
        await seen.until(lambda: seen.find("gpu_xid_errors_total", gpu="1", cause="agent") == [1])
        assert seen.find("gpu_xid_errors_total", gpu="1", cause="device") == [1]
        fake.event(0, nvml_parts.DOUBLE_BIT_ECC)
        await seen.until(lambda: seen.raised("ecc"))
        fake.event(1, nvml_parts.GPU_UNAVAILABLE)
        await seen.until(lambda: seen.raised("lost", 1))
        await seen.until(lambda: seen.cleared("lost", 1))  # the readings show that it is there


async def test_the_kernel_log_names_the_agent_and_what_it_tells_is_merged(
    fake: FakeNvml, tmp_path: Path, start: Callable[..., Any]
) -> None:
    log = tmp_path / "kmsg"
    os.mkfifo(log)
    writer = os.open(log, os.O_RDWR)
    try:
        process, instance = start("import sys; print('ready', flush=True); sys.stdin.read()", agent="tutor")
        async with watched(fake, log) as seen:
            began = _started(instance)
            await seen.bus.publish(topics.host_fact("alpha"), began)
            await seen.until(lambda: seen.find("agent_process_count", agent="tutor"))
            await seen.until(lambda: seen.find("gpu_kernel_log_readable") == [1])
            fake.xid(0, 31)
            await seen.until(lambda: seen.raised("agent-xid"))
            line = f"4,1,2,-;NVRM: Xid (PCI:0000:41:00): 31, pid={process.pid}, name=python, MMU Fault\n"
            os.write(writer, line.encode())
            await seen.until(lambda: len(seen.raised("agent-xid")) == 2)
            named = seen.raised("agent-xid")[-1]
            assert (named.agent, named.pid, named.since) == ("tutor", process.pid, seen.raised("agent-xid")[0].since)
            os.write(writer, b"4,1,2,-;NVRM: Xid (PCI:0000:42:00): 79, pid='<unknown>', GPU has fallen off the bus.\n")
            await seen.until(lambda: seen.raised("xid", 1))
            await seen.until(lambda: seen.find("gpu_xid_errors_total", gpu="0", cause="agent") == [1])
    finally:
        os.close(writer)


def _started(instance: Instance) -> facts.InstanceStarted:
    return facts.InstanceStarted(
        host="alpha",
        agent=instance.agent,
        instance=instance.id,
        revision=instance.revision,
        role="permanent",
        pid=instance.pid,
        started=instance.started,
    )


async def test_a_kernel_log_that_may_not_be_read_is_said(fake: FakeNvml, tmp_path: Path) -> None:
    async with watched(fake, tmp_path / "none") as seen:
        await seen.until(lambda: seen.find("gpu_kernel_log_readable") == [0])


async def test_an_agents_memory_and_share_of_a_card_are_its_own(fake: FakeNvml, start: Callable[..., Any]) -> None:
    process, instance = start("import sys; print('ready', flush=True); sys.stdin.read()", agent="tutor")
    async with watched(fake) as seen:
        await seen.bus.publish(topics.host_fact("alpha"), _started(instance))
        await seen.until(lambda: seen.find("agent_process_count", agent="tutor"))
        fake.hold(0, (process.pid, 3 * GIB), (999_999, GIB), sm=70)
        await seen.until(lambda: seen.find("gpu_process_memory_bytes", agent="tutor", gpu="0") == [3 * GIB])
        await seen.until(lambda: not seen.find("gpu_process_memory_bytes", gpu="1"))
        fake.hold(0)
        await seen.until(lambda: not seen.find("gpu_process_memory_bytes"))


# --- what the rules make of it


async def test_the_demos_rule_rolls_back_on_what_the_driver_says_as_on_a_simulated_card(fake: FakeNvml) -> None:
    async with watched(fake) as seen:
        await seen.until_well()
        up = trio.Event()
        seen.nursery.start_soon(run_rules, seen.fleet, up.set)
        await up.wait()
        began = facts.MigrationStarted(
            migration="m1", epoch=7, agent="tutor", host="alpha", previous="r2", to="r3", strategy="staged", request="r"
        )
        await seen.bus.publish(topics.migration_fact("tutor"), began)
        fake.gpu(0).memory_used = fake.gpu(0).memory_total - fake.gpu(0).memory_reserved - GIB
        await seen.until(lambda: alerts(seen, "gpu-memory"))
        [alert] = alerts(seen, "gpu-memory")
        assert (alert.action, alert.labels["gpu"], alert.value) == ("rollback", "0", pytest.approx(1 - 1 / 24))
        await seen.until(lambda: [body for body in seen.told if isinstance(body, RollBack)])
        [order] = [body for body in seen.told if isinstance(body, RollBack)]
        assert (order.agent, order.migration, order.breach.by) == ("tutor", "m1", "rule gpu-memory")


def alerts(seen: Watched, rule: str) -> list[facts.AlertFiring]:
    return [body for body in seen.told if isinstance(body, facts.AlertFiring) and body.rule == rule]


# --- letting go


async def test_released_the_driver_is_free_and_nothing_is_claimed_of_the_cards(fake: FakeNvml, tmp_path: Path) -> None:
    async with watched(fake) as seen:
        await seen.until_well()
        seen.nursery.start_soon(control.serve, tmp_path, seen.monitor.gpus)
        while not (tmp_path / control.SOCKET).exists():  # noqa: ASYNC110 - a file tells nobody that it is there
            await trio.sleep(0.01)
        assert (tmp_path / control.SOCKET).stat().st_mode & 0o777 == 0o600
        assert await control.ask(tmp_path, control.Request("release", 600)) == control.Answer()
        await seen.until(lambda: seen.find("gpu_driver_released") == [1])
        await seen.until(lambda: not seen.find("gpu_up") and seen.find("gpu_driver_up") == [0])
        fake.clear_counts()
        before = seen.batches
        await seen.until(lambda: seen.batches > before + 3)
        assert fake.counts() == {}, "nobody asks the driver"
        assert await control.ask(tmp_path, control.Request("resume")) == control.Answer()
        await seen.until_well()
        assert seen.find("gpu_driver_released") == [0]
        assert seen.find("gpu_driver_up") == [1]

        assert await control.ask(tmp_path, control.Request("release", 0.2)) == control.Answer()
        await seen.until(lambda: seen.find("gpu_driver_released") == [1])
        await seen.until_well()  # by itself, when its time is over
        assert "above 0" in (await control.ask(tmp_path, control.Request("release", -1))).reason


def test_a_monitor_tells_of_its_own_hosts_gpus_only() -> None:
    def event(host: str, topic: str) -> Event:
        body = facts.GpuFault(
            host=host, gpu=0, uuid="u", kind="lost", cause="device", detail="", recovery="", since=1.0
        )
        return Event(topic, Header(id="1", source="monitor/alpha", time=1.0), body, encode(body))

    grant = Grant(identity="monitor/alpha", curve="")
    policy.publish(grant, event("alpha", "fact/gpu/alpha/"))
    for wrong in (
        event("beta", "fact/gpu/beta/"),
        event("beta", "fact/gpu/alpha/"),
        event("alpha", "fact/host/alpha/"),
    ):
        with pytest.raises(Refused):
            policy.publish(grant, wrong)
    with pytest.raises(Refused):
        policy.publish(Grant(identity="host/alpha", curve=""), event("alpha", "fact/gpu/alpha/"))
