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

from interlock.broker import cadence, topics
from interlock.broker.bus import Bus
from interlock.broker.config import MonitorConfig
from interlock.broker.facts import Role
from interlock.broker.samples import NAME, SeriesReader
from interlock.broker.wire import Body
from interlock.monitors import series
from interlock.monitors.alarms import Alarms
from interlock.monitors.cadence import Cadence
from interlock.monitors.drm_backend import open_drm_backend
from interlock.monitors.either import EitherBackend
from interlock.monitors.events import Events
from interlock.monitors.gpu import GpuBackend, NoGpu
from interlock.monitors.gpu_watch import GpuWatch
from interlock.monitors.kernel_log import KMSG
from interlock.monitors.machine import Machine, Values
from interlock.monitors.nvidia import NvidiaBackend, Patience
from interlock.monitors.processes import TreeReading, Trees, due_by
from interlock.monitors.roster import Instance, Roster
from interlock.monitors.sampler import Group, Schedule
from interlock.monitors.series import Live
from interlock.monitors.simulated import open_simulated_backend
from interlock.monitors.templates import DEFAULT, Template, templates

MIGRATIONS = f"{topics.FACTS}migration/"

OpenGpu = Callable[[MonitorConfig, Path], Awaitable[GpuBackend]]


async def open_gpu(config: MonitorConfig, state: Path) -> GpuBackend:
    """The GPUs that are configured. NoGpu where there are none."""
    if config.gpu == "none":
        raise NoGpu("turned off", where="monitor.gpu")
    if config.gpu == "simulated":
        return await open_simulated_backend(state / "simgpu", config.simulated)
    if config.gpu == "drm":
        return await open_drm_backend()
    nvidia = NvidiaBackend(expected=config.gpu == "nvidia", patience=Patience(call_s=config.gpu_call_s))
    return nvidia if config.gpu == "nvidia" else EitherBackend(nvidia, open_drm_backend)


class Monitor:
    """One host's monitor. `state` is the fleet's state folder, whose disk is watched too; `categories` by agent."""

    def __init__(
        self,
        bus: Bus,
        config: MonitorConfig,
        host: str,
        state: Path,
        *,
        open_gpu: OpenGpu = open_gpu,
        categories: Mapping[str, str] | None = None,
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
        self._cadence = Cadence()
        self._templates = templates(config.templates)
        self._categories = dict(categories or {})
        self._events = Events(host, self._telemetry)
        self._alarms = Alarms(ended=self._process_ended, stalled=self._events.stalled, populated=self._events.populated)
        self._ended = False  # a process did, and nobody has looked since
        self._changed = trio.lowlevel.ParkingLot()
        self._schedules: list[Schedule] = []
        self._live: list[Live] = []
        self.gpus = GpuWatch(host, self._telemetry, self._post_of_gpu, self._owners, kmsg=kmsg)

    async def run(self, ready: Callable[[], None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                caught_up = trio.Event()
                nursery.start_soon(self._follow, caught_up)
                nursery.start_soon(self._follow_leases)
                nursery.start_soon(self._alarms.run)
                nursery.start_soon(partial(self._beat, self._sampler_of_machine(), fast=False))
                nursery.start_soon(self._watch_gpus)
                ready()
                await caught_up.wait()  # half a history would name instances and roles that are no more
                nursery.start_soon(self._sample_trees)
        finally:
            gone = [*(key for live in self._live for key in live.keys), *self._events.live(), *self.gpus.live]
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
                    self.roster.apply(event.body)
                    now = trio.current_time()
                    before = self._cadence.hot(now)
                    self._cadence.follow(self.roster.migrations, now)
                    self._cadence.renew(getattr(event.body, "migration", None) or "", cadence.FIRST_S, now)
                    if self._cadence.hot(now) != before:
                        self._changed.unpark_all()

    async def _follow_leases(self) -> None:
        """Stay fast for as long as the coordinator says so."""
        reader = SeriesReader()
        async with self._bus.samples([cadence.TOPIC]) as feed:
            async for batches in feed:
                now = trio.current_time()
                before = self._cadence.hot(now)
                for batch in batches:
                    for key, seconds in reader.read(batch)[0]:
                        of = dict(key)
                        if of.get(NAME) == cadence.METRIC and of.get("touched") == self.host:
                            self._cadence.renew(of.get("migration", ""), seconds - batch.delay, now)
                if self._cadence.hot(now) != before:
                    self._changed.unpark_all()

    def _template_of(self, agent: str) -> Template:
        return self._templates[self._categories.get(agent, DEFAULT)]

    def _process_ended(self, instance: str) -> None:
        """By its pidfd: its series are to end now, not with the next sample."""
        for one in self.roster.instances:
            if one.id == instance:
                self._events.exited(one.agent)
        self._ended = True
        self._changed.unpark_all()

    async def _beat(
        self,
        sample: Callable[[frozenset[Group]], Awaitable[None]],
        at_once: Callable[[], Awaitable[None]] | None = None,
        *,
        fast: bool = True,
    ) -> None:
        """Sample whenever due; a change of the cadence counts at once. `at_once` is called at each other change.

        fast: also while migrating; else at the idle beat.
        """
        config = self._config
        hot_s = config.migrating_s if fast else config.idle_s
        schedule = Schedule(trio.current_time(), idle_s=config.idle_s, migrating_s=hot_s, slow_s=config.slow_s)
        self._schedules.append(schedule)
        while True:
            now = trio.current_time()
            schedule.migrating(self._cadence.hot(now), now)
            wait = schedule.next - now
            if wait > 0:
                with trio.move_on_after(wait):
                    await self._changed.park()
                if at_once is not None:
                    await at_once()
                continue
            await sample(schedule.due(trio.current_time()))

    # --- sampling

    def _new_live(self, live: Live | None = None) -> Live:
        live = live or Live()
        self._live.append(live)
        return live

    def _sampler_of_machine(self) -> Callable[[frozenset[Group]], Awaitable[None]]:
        live = self._new_live()

        def read(due: frozenset[Group]) -> tuple[float, Values]:
            asked = time.time()
            values = self._machine.memory()
            if Group.CALM in due:
                values |= self._machine.load()
            if Group.SLOW in due:
                values |= self._machine.disks()
            return asked, values

        async def sample(due: frozenset[Group]) -> None:
            if Group.SLOW not in due:  # these files answer at once, and a thread costs more than they do
                asked, values = read(due)
            else:
                asked, values = await trio.to_thread.run_sync(read, due, abandon_on_cancel=True)
            if Group.CALM in due:
                values["monitor_missed_samples_total", ()] = sum(schedule.missed for schedule in self._schedules)
            samples = series.of_machine(self.host, values)
            ended = live.update(samples, due=due, complete=due)
            if Group.CALM in due:
                samples |= self._events.repeated(self._alarms.permitted)
            self._telemetry.send(samples, time=asked, ended=ended)

        return sample

    async def _sample_trees(self) -> None:
        """Read the agents' processes to the beat; lists of processes are made with the calm readings only."""
        live = self._new_live(Live(series.group_by(self._template_of)))
        keys = series.TreeKeys(self.host)
        lock = trio.Lock()  # the files of a process are read by one thread at a time

        def read(due: frozenset[Group]) -> tuple[float, list[TreeReading]]:
            asked = time.time()
            wanted = due_by(self._template_of, due)
            return asked, self._trees.sample(self.roster.instances, wanted, look=Group.CALM in due)

        known: set[tuple[str, str, Role]] = set()

        async def sample(due: frozenset[Group]) -> None:
            nonlocal known
            async with lock:
                if due == series.ONLY_HOT:  # these files answer at once, and a thread costs more than they do
                    asked, readings = read(due)
                else:
                    asked, readings = await trio.to_thread.run_sync(read, due)
            self._ended = False
            samples = series.of_trees(keys, readings)
            here = {(one.instance.agent, one.instance.revision, one.instance.role) for one in readings}
            ended = live.update(samples, due=due, complete=due)
            if here != known:  # an instance is gone, or has another role: none of its series will come again
                ended += live.end(lambda key: series.instance_of(key) not in here)
                keys.keep(one.instance for one in readings)
                known = here
            if due == series.ONLY_HOT:  # the machine's hot readings go along: one batch for both
                samples |= series.of_machine(self.host, self._machine.memory())
            if samples or ended:
                self._telemetry.send(samples, time=asked, ended=ended)
            if ended or Group.CALM in due:
                cgroups = {id: one.events for id, one in self._trees.own_cgroups().items() if one.events is not None}
                self._events.follow(self.roster.instances, cgroups.keys())
                self._alarms.follow(self._trees.processes(), cgroups)

        async def if_ended() -> None:
            if self._ended:
                await sample(frozenset({Group.HOT}))

        try:
            await self._beat(sample, if_ended)
        finally:
            self._trees.close()

    def _post_of_gpu(self, body: Body) -> None:
        self._bus.post(topics.gpu_fact(self.host), body)

    async def _owners(self, pids: Iterable[int]) -> Mapping[int, Instance]:
        return await trio.to_thread.run_sync(self._trees.owners, list(pids), abandon_on_cancel=True)

    async def _watch_gpus(self) -> None:
        gpu = self._config.gpu
        opened = partial(self._open_gpu, self._config, self._state)
        await self.gpus.run(opened, self._beat, wanted=gpu in ("nvidia", "drm"), quiet=gpu in ("auto", "none"))
