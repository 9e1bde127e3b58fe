"""The monitor's shell: follows what lives on its host, samples it to the beat, and publishes.

Each source (the GPUs, the agents' processes, the machine) has a task and a beat of its own, so that one that hangs or
is slow holds up no other.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import trio

from interlock.broker import topics
from interlock.broker.bus import Bus
from interlock.broker.config import MonitorConfig
from interlock.broker.wire import Body
from interlock.monitors import series
from interlock.monitors.gpu import GpuBackend, NoGpu
from interlock.monitors.gpu_watch import GpuWatch
from interlock.monitors.kernel_log import KMSG
from interlock.monitors.nvidia import NvidiaBackend, Patience
from interlock.monitors.processes import Machine, TreeReading, Trees
from interlock.monitors.roster import Instance, Roster
from interlock.monitors.sampler import Group, Schedule
from interlock.monitors.series import ALL_GROUPS, Live
from interlock.monitors.simulated import open_simulated_backend

MIGRATIONS = f"{topics.FACTS}migration/"

OpenGpu = Callable[[MonitorConfig, Path], Awaitable[GpuBackend]]


async def open_gpu(config: MonitorConfig, state: Path) -> GpuBackend:
    """The GPUs that are configured. NoGpu where there are none."""
    if config.gpu == "none":
        raise NoGpu("turned off", where="monitor.gpu")
    if config.gpu == "simulated":
        return await open_simulated_backend(state / "simgpu", config.simulated)
    return NvidiaBackend(expected=config.gpu == "nvidia", patience=Patience(call_s=config.gpu_call_s))


class Monitor:
    """One host's monitor. `state` is the fleet's state folder, whose disk is watched too."""

    def __init__(
        self,
        bus: Bus,
        config: MonitorConfig,
        host: str,
        state: Path,
        *,
        open_gpu: OpenGpu = open_gpu,
        kmsg: Path = KMSG,
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
        self.gpus = GpuWatch(host, self._telemetry, self._post_of_gpu, self._owners, kmsg=kmsg)

    async def run(self, ready: Callable[[], None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                caught_up = trio.Event()
                nursery.start_soon(self._follow, caught_up)
                nursery.start_soon(self._beat, self._sampler_of_machine())
                nursery.start_soon(self._watch_gpus)
                ready()
                await caught_up.wait()  # half a history would name instances and roles that are no more
                nursery.start_soon(self._beat, self._sampler_of_trees())
        finally:
            gone = [*(key for live in self._live for key in live.keys), *self.gpus.live]
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

    def _post_of_gpu(self, body: Body) -> None:
        self._bus.post(topics.gpu_fact(self.host), body)

    async def _owners(self, pids: Iterable[int]) -> Mapping[int, Instance]:
        return await trio.to_thread.run_sync(self._trees.owners, list(pids), abandon_on_cancel=True)

    async def _watch_gpus(self) -> None:
        gpu = self._config.gpu
        opened = partial(self._open_gpu, self._config, self._state)
        await self.gpus.run(opened, self._beat, wanted=gpu == "nvidia", quiet=gpu in ("auto", "none"))
