"""Carries out what a slot machine decides: one per agent, with the agent's gateway and instances.

Actions are done in order by one task, since most of them wait (for the disk, for a process). A rollback doesn't queue:
what comes before its journal entry (the route, the rescue of requests, the start of what is permanent anyway) is done
at once, in the call that brought it, and whatever was queued to change the route is void from then on.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import trio

from interlock.agents.compare import Pair
from interlock.agents.figures import samples, slow_threshold
from interlock.agents.forwarding import forward, give_away
from interlock.agents.front import admit
from interlock.agents.gateway import Gateway
from interlock.agents.handing_over import hand_back, hand_over, resume
from interlock.agents.instance import HandlerContract
from interlock.agents.launch import Instance
from interlock.agents.making import make_instance
from interlock.agents.slot import Slot
from interlock.agents.slot_io import (
    Action,
    BeginCommit,
    BeginDrill,
    BeginHandBack,
    BeginHandOver,
    BeginPrepare,
    BeginShadow,
    BeginTrial,
    EndDrill,
    EndHandOver,
    EndShadow,
    Forward,
    Gone,
    Healthy,
    Input,
    Moment,
    Persist,
    Publish,
    Rescue,
    Restore,
    RestoreHost,
    Resume,
    Route,
    ShadowEnded,
    Start,
    State,
    Stop,
    Tick,
    Verified,
    Verify,
)
from interlock.agents.surroundings import Surroundings
from interlock.broker import commands, facts
from interlock.broker.config import AgentConfig
from interlock.broker.errors import InterlockError, LogError
from interlock.broker.fields import Evidence
from interlock.broker.samples import Labels, labels
from interlock.broker.wire import encode

if TYPE_CHECKING:  # no part of a start: a rollback may wait for it
    from interlock.agents.comparer import Comparer
    from interlock.agents.shadow import ShadowRun

log = logging.getLogger(__name__)

VERIFY_S = 2.0  # an old revision that was warm and has not answered by then is not warm
VERIFY_POLL_S = 0.002  # between probes of it: the promise is measured with this grain where no client asks
SHADOW_POLL_S = 0.05
AT_ONCE = (  # of a rollback
    Route, BeginHandBack, EndShadow, EndDrill, EndHandOver, Resume, Rescue, Verify, Start, Stop,
)  # fmt: skip
JOURNAL_RETRY_S = 1.0  # between attempts to write to a disk that is full


@dataclass
class FirstAnswer:
    """When, and by whom, an instance was first seen to answer. `at`: seconds since 1970."""

    came: trio.Event = field(default_factory=trio.Event)
    at: float = 0.0
    by: str = ""

    def note(self, by: str) -> None:
        if not self.came.is_set():
            self.at, self.by = time.time(), by
            self.came.set()


@dataclass
class SlotShell:
    """One agent on this host. `give` takes an input from any task, at any time."""

    slot: Slot
    config: AgentConfig
    gateway: Gateway
    around: Surroundings
    instances: dict[str, Instance] = field(default_factory=dict)
    baseline: dict[str, float] | None = None
    routed_at: float = 0.0
    first_news: trio.Event = field(default_factory=trio.Event)  # an instance became healthy, or did not
    trouble: str = "it is not healthy yet"  # why nothing serves, while nothing does
    _queue: deque[tuple[int, Action]] = field(default_factory=deque)
    _more: trio.Event = field(default_factory=trio.Event)
    _generation: int = 0
    _busy: bool = False
    _settled: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    _shadow: ShadowRun | None = None
    _drill: trio.CancelScope | None = None
    _handing: trio.CancelScope | None = None
    forwards: trio.CancelScope | None = None  # the way to the host that the agent moved to
    opened: trio.CancelScope | None = None  # of the gateway and of `run`, of an agent that arrived while the host ran
    _ended: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    _comparer: Comparer | None = None
    _reported: set[Labels] = field(default_factory=set)

    @property
    def agent(self) -> str:
        return self.slot.row.agent

    # --- in

    def give(self, given: Input) -> None:
        """Let the machine decide, do what is urgent now, queue the rest."""
        if isinstance(given, Healthy | Gone):
            self.first_news.set()
        if isinstance(given, Gone):
            self.trouble = given.reason
        self.carry_out(self.slot.handle(given, moment()))

    def begin(self) -> None:
        self.carry_out(self.slot.begin(moment()))

    def carry_out(self, actions: list[Action]) -> None:
        urgent = bool(actions) and isinstance(actions[0], Route) and actions[0].urgent
        if urgent:
            self._generation += 1
        for action in actions:
            if urgent and isinstance(action, AT_ONCE):
                self._do_now(action)
            else:
                urgent = False
                self._queue.append((self._generation, action))
        self._more.set()

    # --- doing

    async def run(self) -> None:
        """Carry out what is queued, and wake the machine at its deadlines. Runs until cancelled."""
        while True:
            while self._queue:
                generation, action = self._queue.popleft()
                if generation < self._generation and isinstance(action, Route | BeginShadow | BeginHandOver | Resume):
                    continue  # a rollback has overtaken it
                self._busy = True
                await self._do(action)
                self._busy = False
            self._settled.unpark_all()
            self._more = trio.Event()
            deadline = self.slot.next_deadline()
            with trio.move_on_at(deadline if deadline is not None else float("inf")) as scope:
                await self._more.wait()
            if scope.cancelled_caught:
                self.give(Tick())

    async def _do(self, action: Action) -> None:
        match action:
            case Persist():
                await self._persist(action)
            case Publish(fact):
                self.around.publish(fact)
            case BeginPrepare(command):
                self.around.nursery.start_soon(self._prepare, command)
            case BeginShadow(command, candidate):
                self._begin_shadow(command, candidate)
            case BeginDrill(command):
                self._drill = trio.CancelScope()
                self.around.nursery.start_soon(_recovering().rehearse, self, command, self._drill)
            case BeginHandOver():
                self._handing = trio.CancelScope()
                self.around.nursery.start_soon(hand_over, self, action, self._handing)
            case BeginCommit():
                self.around.nursery.start_soon(give_away, self, action)
            case Forward():
                await forward(self, action)
            case RestoreHost():
                self.around.nursery.start_soon(_recovering().restore_host, self, action)
            case Restore():
                self.around.nursery.start_soon(_recovering().restore_backup, self, action)
            case _:
                self._do_now(action)

    async def _persist(self, action: Persist) -> None:
        """Write, or wait until it can be written: nothing that follows is done before. Rollbacks don't wait for it."""
        done = None if action.done is None else (action.done[0], encode(action.done[1]))
        while True:
            try:
                await trio.to_thread.run_sync(
                    partial(self.around.journal.save_slot, action.row, action.entry, done=done)
                )
            except LogError as error:
                log.error("%s waits, nothing is changed meanwhile: %s", self.agent, error)
                await trio.sleep(JOURNAL_RETRY_S)
            else:
                return

    async def settled(self) -> None:
        """Returns when all that was given so far is written and begun."""
        while self._queue or self._busy:
            await self._settled.park()

    async def end(self) -> None:
        """The host ends: what is in flight is answered, then every instance is stopped."""
        self.gateway.route({})
        async with trio.open_nursery() as nursery:
            for name in list(self.instances):
                nursery.start_soon(self.stop, name)

    def _do_now(self, action: Action) -> None:
        match action:
            case Route(shares):
                self.gateway.route(dict(shares))
                self.routed_at = time.time()
            case BeginTrial(migration, warm_up_s):
                self.gateway.begin_trial(None)
                self.around.nursery.start_soon(self._begin_trial, migration, warm_up_s)
            case Start():
                self.around.nursery.start_soon(self._live, action)
            case Stop(instance):
                self.around.nursery.start_soon(self.stop, instance)
            case Rescue(instance):
                self.gateway.rescue(instance)
            case BeginHandBack():
                self._handing = trio.CancelScope()
                self.around.nursery.start_soon(hand_back, self, action, self._handing)
            case Resume(instance):
                self.around.nursery.start_soon(resume, self, instance)
            case EndShadow() | EndDrill() | EndHandOver():
                self._call_off(action)
            case Verify(migration, instance):
                answer = FirstAnswer()
                self.gateway.on_answer(instance, lambda _: answer.note("a client's request"))
                self.around.nursery.start_soon(self._verify, migration, instance, self.routed_at, answer)

    def _call_off(self, action: EndShadow | EndDrill | EndHandOver) -> None:
        if isinstance(action, EndShadow):
            self._end_shadow()
            return
        scope = self._drill if isinstance(action, EndDrill) else self._handing
        if scope is not None:
            scope.cancel()

    # --- preparing

    async def _prepare(self, command: commands.Prepare) -> None:
        from interlock.agents.prepare import Preparation, prepare

        around = self.around
        permanent = self.instances.get(self.slot.permanent or "")
        preparation = Preparation(
            host=around.host, command=command, row=self.slot.row, permanent=permanent,
            gateway=self.gateway, store=around.store, journal=around.journal, backups=around.backups,
            place=around.place, load=around.load, cards=around.cards, up=around.up, link_to=around.link_to,
        )  # fmt: skip
        ended = await prepare(preparation)
        self.baseline = preparation.baseline
        if ended.ok and preparation.config is not None:
            self.config = preparation.config
            self.slot.hand_back = self.config.hand_back
        self.give(ended)

    # --- instances

    async def _live(self, start: Start) -> None:
        """An instance from start to end."""
        await trio.sleep(start.delay_s)
        await self.gone(start.after)
        if start.instance not in (self.slot.permanent, self.slot.candidate):
            return  # nobody wants it any more
        around = self.around
        try:
            instance = await make_instance(self, start)
            await instance.start(around.nursery, around.next_number())
        except InterlockError as error:
            log.error("%s can't be started: %s", start.instance, error)
            self.give(Gone(start.instance, "start-failed", str(error), time.time()))
            return
        self.instances[start.instance] = instance
        assert instance.process is not None
        if instance.here:
            self.publish_started(instance)
        if start.instance not in (self.slot.permanent, self.slot.candidate):  # it was called off while it started
            await self.stop(start.instance)
            return
        around.nursery.start_soon(self._watch_end, instance)

        def report(given: Healthy | Gone) -> None:
            if isinstance(given, Healthy):
                admit(self.gateway, instance)
            elif not instance.stopping:
                log.warning("%s: %s", given.instance, given.reason)
            if not instance.stopping:
                self.give(given)

        await instance.watch(start, self._needed(start), report)
        if not instance.stopping and instance.process.returncode is not None:
            await self.stop(instance.name)

    def adopt(self, instance: Instance) -> None:
        """An instance that ran here for another host's slot is this one's own, as it is."""
        self.instances[instance.name] = instance
        instance.view.role = "permanent"
        admit(self.gateway, instance)
        self.around.nursery.start_soon(self._watch_end, instance)
        self.around.nursery.start_soon(self._watch_adopted, instance)

    async def _watch_adopted(self, instance: Instance) -> None:
        row = self.slot.row
        start = Start(instance.name, row.permanent, row.permanent_digest, "permanent")
        await instance.watch(start, {}, lambda given: None if instance.stopping else self.give(given))
        if not instance.stopping and instance.process is not None and instance.process.returncode is not None:
            await self.stop(instance.name)

    async def _watch_end(self, instance: Instance) -> None:
        """Whatever it still owed goes elsewhere at once, also if it ends while it is being stopped."""
        assert instance.process is not None
        await instance.process.exited()
        self.gateway.lost(instance.name)

    def _needed(self, start: Start) -> dict[str, HandlerContract]:
        """What a candidate must handle: all that the permanent instance does."""
        permanent = self.instances.get(self.slot.permanent or "")
        return permanent.handlers if permanent is not None and start.role == "candidate" else {}

    async def gone(self, names: tuple[str, ...]) -> None:
        """Returns once none of these instances is there."""
        while any(name in self.instances for name in names):
            await self._ended.park()

    async def stop(self, name: str) -> None:
        """Drain and end an instance, and forget it."""
        instance = self.instances.get(name)
        if instance is None or instance.stopping:
            return
        instance.stopping = True
        expected = instance.process is None or instance.process.returncode is None
        if expected:
            with trio.move_on_after(instance.revision.stop_timeout_s):
                await self.gateway.drained(name)
        code = await instance.end()
        self.gateway.detach(name)
        self.instances.pop(name, None)
        self._ended.unpark_all()
        view = instance.view
        if not instance.here:
            return
        self.around.publish(
            facts.InstanceStopped(
                host=self.around.host, agent=self.agent, instance=name, revision=view.revision,
                role=view.role, returncode=code if code is not None else 0, expected=expected,
            )
        )  # fmt: skip

    def publish_started(self, instance: Instance) -> None:
        """That it runs here: as a fact, for everybody."""
        assert instance.process is not None
        self.around.publish(
            facts.InstanceStarted(
                host=self.around.host, agent=self.agent, instance=instance.name, revision=instance.view.revision,
                role=instance.view.role, pid=instance.process.pid,
                started=instance.process.started,
            )
        )  # fmt: skip

    # --- shadow

    def _begin_shadow(self, command: commands.Shadow, candidate: str) -> None:
        if not self.gateway.can_mirror:
            reason = "there are no requests to mirror: this agent has connections of a protocol of its own, or no port"
            self.give(ShadowEnded(command.migration, False, reason, {"verdict": "error"}))
            return
        from interlock.agents.comparer import Bench, Comparer, functions_of
        from interlock.agents.shadow import ShadowRun

        run = ShadowRun(command, time.time(), self.config.compare.errors)
        self._shadow = run
        functions = functions_of(self.config.compare)
        instance = self.instances.get(candidate)
        if functions and instance is not None:
            place = instance.place
            bench = Bench(instance.recorded, place.base, place.marker, place.run_dir, place.log_dir, place.environment)
            timeout_s = self.config.compare.timeout_s
            self._comparer = Comparer(bench, functions, timeout_s=timeout_s, number=self.around.next_number())
            self.around.nursery.start_soon(self._comparer.run)
        self.gateway.mirror(
            candidate,
            compare=self.config.compare,
            on_pair=lambda pair: self._compared(run, pair),
            judge=self._comparer,
            action_field=self.config.action_field,
        )
        self.around.nursery.start_soon(self._time_shadow, run)

    def _end_shadow(self) -> None:
        self.gateway.mirror(None)
        self._shadow = None
        if self._comparer is not None:
            self._comparer.close()
            self._comparer = None

    def _compared(self, run: ShadowRun, pair: Pair) -> None:
        if self._shadow is run:
            run.add(pair, time.time())
            self._judge_shadow(run)

    async def _time_shadow(self, run: ShadowRun) -> None:
        while self._shadow is run:
            self._judge_shadow(run)
            await trio.sleep(SHADOW_POLL_S)

    def _judge_shadow(self, run: ShadowRun) -> None:
        verdict = run.verdict(time.time())
        if verdict is None:
            return
        self._end_shadow()
        evidence = run.evidence() | {"verdict": verdict}
        self.give(ShadowEnded(run.command.migration, verdict == "passed", run.reason(verdict), evidence))

    async def _begin_trial(self, migration: str, warm_up_s: float) -> None:
        await trio.sleep(warm_up_s)
        if self.slot.row.migration == migration and self.slot.row.state is State.LIVE:
            self.gateway.begin_trial(slow_threshold(self.baseline))

    # --- rolling back

    async def _verify(self, migration: str, name: str, routed: float, answer: FirstAnswer) -> None:
        """The first answer of the permanent instance after the route: a client's, or a probe's if none asks."""
        with trio.move_on_after(VERIFY_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._probe_until, name, answer)
                await answer.came.wait()
                nursery.cancel_scope.cancel()
        reason = f"revision {self.slot.row.permanent} did not answer within {VERIFY_S:g} s"
        evidence: Evidence = {"verified_by": answer.by}
        self.give(Verified(migration, answer.came.is_set(), answer.at, routed, reason, evidence, name))

    async def _probe_until(self, name: str, answer: FirstAnswer) -> None:
        while True:
            instance = self.instances.get(name)
            if instance is not None and self.gateway.serves(name) and (await instance.check()).ok:
                answer.note("a probe")
                return
            await trio.sleep(VERIFY_POLL_S)

    # --- telemetry

    def samples(self) -> tuple[dict[Labels, float], list[Labels]]:
        """(samples now, series that ended since the last call)."""
        if self.slot.permanent in self.instances:  # it was the candidate before the commit
            self.instances[self.slot.permanent].view.role = "permanent"
        baseline = self.baseline if self.slot.row.migration is not None else None
        views = {
            name: instance.view
            for name, instance in self.instances.items()
            if name in (self.slot.permanent, self.slot.candidate)
        }
        figures = self.gateway.snapshot(trio.current_time())
        trial = self.slot.row.state is State.LIVE
        found = samples(self.around.host, self.agent, views, figures, baseline, trial=trial)
        found[labels("agent_category", host=self.around.host, agent=self.agent, category=self.config.category)] = 1.0
        ended = [key for key in self._reported if key not in found]
        self._reported = set(found)
        return found, ended

    @property
    def on_trial(self) -> bool:
        return self.slot.row.state not in (State.SERVING, State.ARRIVING, State.FORWARDING)


def moment() -> Moment:
    return Moment(trio.current_time(), time.time())


def _recovering() -> ModuleType:
    from interlock.agents import recovering

    return recovering


def import_rest() -> None:
    """What a migration needs and a start does not. In a thread, once the host serves: then no request waits for it."""
    from interlock.agents import comparer, prepare, recovering, shadow  # noqa: F401
