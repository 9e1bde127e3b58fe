"""The monitor's shell: follows what lives on its host, samples it to the beat, and publishes.

Each source (each GPU, the agents' processes, the machine) has a task and a beat of its own, so that one that hangs or
is slow holds up no other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from interlock.broker import topics
from interlock.broker.bus import Bus
from interlock.broker.config import MonitorConfig
from interlock.monitors import series
from interlock.monitors.gpu import GpuBackend, NoGpu
from interlock.monitors.nvml import open_nvidia_backend
from interlock.monitors.processes import Machine, TreeReading, Trees
from interlock.monitors.roster import Roster
from interlock.monitors.sampler import Group, Schedule
from interlock.monitors.series import ALL_GROUPS, Live
from interlock.monitors.simulated import open_simulated_backend

log = logging.getLogger("interlock.monitors")

MIGRATIONS = f"{topics.FACTS}migration/"
GPU_RETRY_S = 10.0  # a configured GPU that is not there may come back with its driver

OpenGpu = Callable[[MonitorConfig, Path], Awaitable[GpuBackend]]


async def open_gpu(config: MonitorConfig, state: Path) -> GpuBackend:
    """The GPUs that are configured. NoGpu where there are none."""
    if config.gpu == "none":
        raise NoGpu("turned off", where="monitor.gpu")
    if config.gpu == "simulated":
        return await open_simulated_backend(state / "simgpu", config.simulated)
    return await open_nvidia_backend()


class Monitor:
    """One host's monitor. `state` is the fleet's state folder, whose disk is watched too."""

    def __init__(
        self, bus: Bus, config: MonitorConfig, host: str, state: Path, *, open_gpu: OpenGpu = open_gpu
    ) -> None:
        self.host = host
        self.roster = Roster(host)
        self._bus = bus
        self._config = config
        self._state = state
        self._open_gpu = open_gpu
        self._telemetry = bus.telemetry(host, "monitor")
        self._trees = Trees()
        self._machine = Machine(state)
        self._changed = trio.lowlevel.ParkingLot()
        self._schedules: list[Schedule] = []
        self._live: list[Live] = []
        self._driver_up: bool | None = None  # None: no GPU is expected here

    async def run(self, ready: Callable[[], None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                caught_up = trio.Event()
                nursery.start_soon(self._follow, caught_up)
                nursery.start_soon(self._beat, self._sampler_of_machine())
                nursery.start_soon(self._sample_gpus)
                ready()
                await caught_up.wait()  # half a history would name instances and roles that are no more
                nursery.start_soon(self._beat, self._sampler_of_trees())
        finally:
            gone = [key for live in self._live for key in live.keys]
            self._telemetry.send({}, time=time.time(), ended=gone)  # a goodbye, so that silence means a failure

    # --- following

    async def _follow(self, caught_up: trio.Event) -> None:
        async with trio.open_nursery() as nursery:
            async with self._bus.events([topics.host_fact(self.host), MIGRATIONS], after=0) as feed:

                async def tell() -> None:
                    await feed.caught_up.wait()
                    caught_up.set()

                nursery.start_soon(tell)
                async for event in feed:
                    before = self.roster.migrating
                    self.roster.apply(event.body)
                    if self.roster.migrating != before:
                        self._changed.unpark_all()

    async def _beat(self, sample: Callable[[frozenset[Group]], Awaitable[None]]) -> None:
        """Sample whenever due; a change of the cadence counts at once."""
        schedule = Schedule(trio.current_time(), idle_s=self._config.idle_s, migrating_s=self._config.migrating_s)
        self._schedules.append(schedule)
        while True:
            schedule.migrating(self.roster.migrating, trio.current_time())
            wait = schedule.next - trio.current_time()
            if wait > 0:
                with trio.move_on_after(wait):
                    await self._changed.park()
                continue
            await sample(schedule.due(trio.current_time()))

    # --- sampling

    def _new_live(self) -> Live:
        live = Live()
        self._live.append(live)
        return live

    def _sampler_of_machine(self) -> Callable[[frozenset[Group]], Awaitable[None]]:
        live = self._new_live()
        path = str(self._state)

        def read(due: frozenset[Group]) -> tuple[float, dict[str, float], float | None]:
            asked = time.time()
            if Group.CALM not in due:
                return asked, self._machine.memory(), None
            return asked, self._machine.memory() | self._machine.load(), self._machine.disk_free()

        async def sample(due: frozenset[Group]) -> None:
            asked, values, free = await trio.to_thread.run_sync(read, due, abandon_on_cancel=True)
            if Group.CALM in due:
                values["monitor_missed_samples_total"] = sum(schedule.missed for schedule in self._schedules)
                if self._driver_up is not None:
                    values["gpu_driver_up"] = float(self._driver_up)
            samples = series.of_machine(self.host, values, (path, free))
            ended = live.update(samples, due=due, complete=due)
            self._telemetry.send(samples, time=asked, ended=ended)

        return sample

    def _sampler_of_trees(self) -> Callable[[frozenset[Group]], Awaitable[None]]:
        live = self._new_live()

        def read() -> tuple[float, list[TreeReading]]:
            return time.time(), self._trees.sample(self.roster.instances)

        async def sample(due: frozenset[Group]) -> None:
            asked, readings = await trio.to_thread.run_sync(read, abandon_on_cancel=True)
            samples = series.of_trees(self.host, readings)
            ended = live.update(samples, due=due, complete=ALL_GROUPS)
            if samples or ended:
                self._telemetry.send(samples, time=asked, ended=ended)

        return sample

    async def _sample_gpus(self) -> None:
        backend = await self._find_gpu()
        if backend is None:
            return
        log.info("GPUs: %s: %s", backend.label, ", ".join(f"{card.index} {card.name}" for card in backend.cards))
        try:
            async with trio.open_nursery() as nursery:
                for card in backend.cards:
                    nursery.start_soon(self._beat, self._sampler_of_card(backend, card.index))
        finally:
            with trio.CancelScope(shield=True):
                await backend.close()

    async def _find_gpu(self) -> GpuBackend | None:
        """The back-end, or None where there is none; one that is asked for by name is looked for until it is there."""
        wanted = self._config.gpu == "nvidia"
        said = False
        while True:
            try:
                backend = await self._open_gpu(self._config, self._state)
            except NoGpu as error:
                if not said:
                    log.log(logging.INFO if self._config.gpu in ("auto", "none") else logging.ERROR, "GPUs: %s", error)
                    said = True
                if not wanted:
                    return None
                self._driver_up = False
                await trio.sleep(GPU_RETRY_S)
            else:
                self._driver_up = True
                return backend

    def _sampler_of_card(self, backend: GpuBackend, index: int) -> Callable[[frozenset[Group]], Awaitable[None]]:
        live = self._new_live()
        error = ""

        async def sample(due: frozenset[Group]) -> None:
            nonlocal error
            reading = await backend.sample(index, due)
            if bool(reading.error) != bool(error):  # once, not at every sample
                if reading.error:
                    log.error("GPU %d %s failed: %s", index, reading.card.name, reading.error)
                else:
                    log.warning("GPU %d %s reports again", index, reading.card.name)
            error = reading.error
            owners = await trio.to_thread.run_sync(self._trees.owners, list(reading.processes), abandon_on_cancel=True)
            samples = series.of_card(self.host, reading, owners)
            ended = live.update(samples, due=due | {Group.HOT}, complete=ALL_GROUPS if error else due)
            self._telemetry.send(samples, time=reading.time, ended=ended)

        return sample
