"""NVIDIA cards as a source of GPU readings: the supervisor of the process that asks the driver. It never asks itself.

A call that is overdue is a fault at once. Its sampler is killed and replaced by one that leaves the card alone; whether
and when the old one really ends is watched, never waited for. A card that was given up is tried by a process of its
own, after 10 s and then ever more rarely, and not while an old one is still stuck in it. When it answers, a new sampler
with all cards takes over, in place before the old one ends. If the driver as a whole fails, a new process tries every
10 s.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import trio

from interlock.monitors.call_notes import CALL_DEADLINE_S, NO_CARD, START_DEADLINE_S, Note, Seat
from interlock.monitors.gpu import Card, CardEvent, DriverState, Hear, NoGpu, Part, Reading
from interlock.monitors.gpu_faults import CARD_KINDS, DRIVER_KINDS
from interlock.monitors.nvml_frames import (
    CALM,
    HOT,
    SLOW,
    CardRead,
    Failed,
    Found,
    FromSampler,
    Happened,
    Lacking,
    Opened,
    Read,
    Table,
)
from interlock.monitors.nvml_sampler import RETRY_LACKING_S, Order
from interlock.monitors.sampler import Group
from interlock.monitors.sampler_process import SamplerProcess

log = logging.getLogger("interlock.monitors")

NOBODY = ("driver-not-loaded", "library-missing")  # where no GPU is expected, these are no fault
RESTART_S = 1.0  # before the next sampler, where one ended for no reason that anybody knows
CLOSING_S = 2.0  # for the children's end when the monitor ends; one that is stuck is left behind, killed


@dataclass(frozen=True)
class Patience:
    """Seconds. call, start: of the driver. retry: of a driver that fails. probe, probe_most: of a card given up."""

    call_s: float = CALL_DEADLINE_S
    start_s: float = START_DEADLINE_S
    retry_s: float = 10.0
    probe_s: float = 10.0
    probe_most_s: float = 300.0
    lacking_s: float = RETRY_LACKING_S  # until a reading that a card does not give is tried again


class NvidiaBackend:
    """The NVIDIA cards of this machine. expected: they must be there; otherwise `run` may end with NoGpu."""

    in_kernel_log = True

    def __init__(self, *, expected: bool = True, patience: Patience = Patience()) -> None:
        self.label = "NVIDIA"
        self.cards: list[Card] = []
        self.restarts = -1  # samplers that were started after the first one
        self._expected = expected
        self._patience = patience
        self._by_index: dict[int, Card] = {}
        self._known: dict[int, Found] = {}
        self._without: dict[int, tuple[str, str]] = {}  # cards given up -> kind and words of the fault
        self._probing: set[int] = set()
        self._stuck: dict[int, int] = {}  # card -> killed samplers that have not ended yet
        self._lacking: dict[int, dict[str, str]] = {}
        self._driver = DriverState()
        self._worker: SamplerProcess | None = None
        self._next: SamplerProcess | None = None
        self._released = False
        self._crashed = False
        self._at_once = False  # it worked until now: a new process may find the driver as it is after a reload
        self._resumed = trio.Event()
        self._all: set[SamplerProcess] = set()
        self._hear: Hear
        self._nursery: trio.Nursery

    async def run(self, hear: Hear, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._hear = hear
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                first = True
                while True:
                    if self._released:
                        await self._resumed.wait()
                    worker, self._next = self._next or await self._start(), None
                    self._worker = worker
                    works = await self._opens(worker)
                    if first and not self._expected and self._none_here(works):
                        nursery.cancel_scope.cancel()
                        break
                    if works:
                        await self._tell_driver("", "")
                    if first:
                        task_status.started()
                        first = False
                    if works:
                        await worker.over.wait()
                    if self._worker is worker:
                        self._worker = None
                    await self._pause()
        finally:
            await self._close()
        raise NoGpu(self._driver.detail or "the driver knows no card", hint="nvidia-smi should list the cards")

    def _none_here(self, works: bool) -> bool:
        return not works and self._driver.kind in NOBODY

    async def _pause(self) -> None:
        """Before the next sampler: not at all, unless the driver fails, or one ended and nobody knows why."""
        pause = self._patience.retry_s if self._driver.kind else RESTART_S if self._crashed else 0.0
        at_once, self._at_once, self._crashed = self._at_once, False, False
        if pause and not self._released and not at_once:
            with trio.move_on_after(pause):
                await self._resumed.wait()

    # --- the life of samplers

    async def _start(self, alone: Found | None = None) -> SamplerProcess:
        known, without = list(self._known.values()), list(self._without)
        lacking_s = self._patience.lacking_s
        order = Order(-1, known, without, lacking_s) if alone is None else Order(-1, [alone], events=False)
        worker = await SamplerProcess.start(order, self._patience.call_s, self._patience.start_s)
        worker.alone = alone is not None
        self._all.add(worker)
        self.restarts += alone is None
        self._nursery.start_soon(self._follow, worker)
        return worker

    async def _opens(self, worker: SamplerProcess) -> bool:
        """It works. If not, what is wrong has been told."""
        late = await worker.until(worker.opened)
        if late is not None and late.card == NO_CARD:
            await self._hung(worker, late)
        elif late is not None:
            await self._give_up(worker, late.card, "hang", _overdue(late))
        return late is None and not worker.over.is_set()

    async def _hung(self, worker: SamplerProcess, late: Note) -> None:
        """A call of the library as a whole."""
        worker.kill()
        await self._tell_driver("driver-hang", _overdue(late))
        worker.end()

    async def _follow(self, worker: SamplerProcess) -> None:
        """Until its end, and what has to be done then."""
        try:
            await worker.follow(self._take)
        except ValueError as error:
            log.error("GPUs: the sampler %d said what can't be read: %s", worker.process.pid, error)
            worker.kill()
        if not worker.dismissed and not worker.alone:
            await self._died(worker)
        worker.end()
        await worker.bury()
        self._all.discard(worker)

    async def _died(self, worker: SamplerProcess) -> None:
        """It ended, and nobody had asked it to: the card that it was at is to blame."""
        note = worker.notes.read(Seat.POLL)
        where = f" in {note.function}" if note else ""
        log.error("GPUs: the sampler %d ended%s", worker.process.pid, where)
        self._crashed = True
        if note is not None and note.card != NO_CARD:
            await self._give_up(worker, note.card, "sampler-died", f"the process that asked it ended{where}")

    async def _close(self) -> None:
        with trio.CancelScope(shield=True):
            for worker in list(self._all):
                worker.kill()
            with trio.move_on_after(CLOSING_S):
                for worker in list(self._all):
                    await worker.bury(CLOSING_S)

    # --- faults

    async def _tell_driver(self, kind: str, detail: str) -> None:
        self._driver = DriverState(kind, detail, max(self.restarts, 0))
        if self._expected or self.cards or kind not in ("", *NOBODY):
            await self._hear(self._driver)

    async def _give_up(self, worker: SamplerProcess, index: int, kind: str, words: str) -> None:
        """Tell the fault, end the sampler without waiting for it, and go on without the card."""
        worker.kill()
        self._without[index] = (kind, words)
        self._stuck[index] = self._stuck.get(index, 0) + 1
        self._nursery.start_soon(self._unstick, worker, index)
        await self._hear(Part([self._without_reading(index, frozenset(Group))]))
        self._look_after(index)
        worker.end()

    async def _unstick(self, worker: SamplerProcess, index: int) -> None:
        await worker.process.wait()
        self._stuck[index] -= 1

    def _look_after(self, index: int) -> None:
        if index not in self._probing:
            self._probing.add(index)
            self._nursery.start_soon(self._probe, index)

    async def _probe(self, index: int) -> None:
        """Try a card in a process of its own until it answers there; then all cards get a new sampler."""
        pause = self._patience.probe_s
        while index in self._probing:  # no longer once it answers again where it is
            await trio.sleep(pause)
            pause = min(2 * pause, self._patience.probe_most_s)
            if self._released or self._driver.kind or self._stuck.get(index) or index not in self._probing:
                continue
            if await self._answers_alone(index):
                self._probing.discard(index)
                self._without.pop(index, None)
                await self._swap()

    async def _answers_alone(self, index: int) -> bool:
        alone = await self._start(self._known.get(index) or Found(index, "", "", ""))
        late = await alone.until(alone.opened)
        if late is None:
            await alone.poll(HOT | CALM)
            late = await alone.until(alone.done)
        if late is not None:
            alone.kill()
            self._stuck[index] = self._stuck.get(index, 0) + 1
            self._nursery.start_soon(self._unstick, alone, index)
            return False
        await alone.retire()
        return alone.well

    async def _swap(self) -> None:
        """A new sampler with all cards, in place before the old one ends, so that nothing is missed."""
        new = await self._start()
        late = await new.until(new.opened)
        if late is not None and late.card != NO_CARD:
            await self._give_up(new, late.card, "hang", _overdue(late))
        if late is not None or new.over.is_set() or self._released:
            new.kill()
            return
        old, self._worker, self._next = self._worker, new, new
        if old is None:
            self._resumed.set()  # nobody is to wait for a while before this one is taken
            self._resumed = trio.Event()
        else:
            old.over.set()
            await old.retire()

    # --- what is heard

    async def _take(self, worker: SamplerProcess, frame: FromSampler) -> None:
        match frame:
            case Read():
                await self._take_read(worker, frame)
            case Table():
                worker.tables[frame.number] = tuple(frame.keys)
            case Lacking():
                self._lacking[frame.index] = frame.readings
            case Opened() if frame.cards or worker.alone:
                self._take_opened(frame)
                worker.opened.set()
            case Opened():
                await self._tell_driver("driver-not-loaded", f"the NVIDIA driver {frame.driver} knows no card")
                worker.kill()
                worker.end()
            case Happened():
                if worker is self._worker:
                    await self._hear(CardEvent(frame.index, frame.type, frame.data, frame.time))
            case Failed():
                worker.dismissed = True
                self._at_once = worker.opened.is_set()
                if not worker.alone:
                    await self._tell_driver(DRIVER_KINDS.get(frame.code, "driver-error"), frame.text)
                worker.end()

    def _take_opened(self, opened: Opened) -> None:
        self.label = f"NVIDIA driver {opened.driver}"
        for found in opened.cards:
            if found.code == 0 or found.index not in self._known:
                self._known[found.index] = found
        self.cards = [Card(f.index, f.uuid, f.name, f.bus) for _, f in sorted(self._known.items())]
        self._by_index = {card.index: card for card in self.cards}

    async def _take_read(self, worker: SamplerProcess, read: Read) -> None:
        if worker.alone:
            worker.well = all(card.code == 0 for card in read.cards)
            worker.done.set()
            return
        if worker is not self._worker:
            return
        readings = [self._reading(worker, card) for card in read.cards]
        if read.last:
            scope = read.cards[0].scope if read.cards else HOT | CALM
            readings += [self._without_reading(index, _groups(scope)) for index in sorted(self._without)]
            readings.sort(key=lambda reading: reading.card.index)
        await self._hear(Part(readings))
        if read.last and read.tick == worker.tick:
            worker.done.set()

    def _reading(self, worker: SamplerProcess, read: CardRead) -> Reading:
        card, groups = self._card(read.index), _groups(read.scope)
        if read.code:
            self._look_after(read.index)
            kind = CARD_KINDS.get(read.code, "card-error")
            return Reading(card, read.time, groups=groups, seconds=read.seconds, kind=kind, error=read.text)
        self._probing.discard(read.index)
        held = None if read.processes is None else {pid: held for pid, (held, _) in read.processes.items() if held >= 0}
        return Reading(
            card,
            read.time,
            dict(zip(worker.tables.get(read.table, ()), read.values, strict=True)),
            held,
            groups,
            bool(read.scope & SLOW),
            {pid: share for pid, (_, share) in (read.processes or {}).items() if share},
            self._lacking.get(read.index),
            read.missing,
            read.seconds,
        )

    def _without_reading(self, index: int, groups: frozenset[Group]) -> Reading:
        kind, words = self._without[index]
        return Reading(self._card(index), time.time(), groups=groups, kind=kind, error=words)

    def _card(self, index: int) -> Card:
        return self._by_index.get(index) or Card(index)

    # --- what others ask of it

    async def sample(self, groups: frozenset[Group]) -> None:
        worker = self._worker
        if worker is None or not worker.opened.is_set():
            await trio.lowlevel.checkpoint()
            return
        stuck = worker.overdue(Seat.EVENTS, time.monotonic())
        if stuck is not None:
            log.error("GPUs: the wait for events has not come back: %s", stuck.function)
            if stuck.card == NO_CARD:
                await self._hung(worker, stuck)
            else:
                await self._give_up(worker, stuck.card, "hang", _overdue(stuck))
            return
        await worker.poll((HOT if Group.HOT in groups else 0) | (CALM if Group.CALM in groups else 0))
        late = await worker.until(worker.done)
        if late is None or worker.over.is_set():
            return
        if late.card == NO_CARD:
            await self._hung(worker, late)
        else:
            await self._give_up(worker, late.card, "hang", _overdue(late))

    async def release(self) -> bool:
        self._released = True
        ended = True
        for worker in list(self._all):
            if worker is self._worker:
                self._worker = None
            await worker.retire()
            with trio.move_on_after(CLOSING_S) as waited:
                await worker.process.wait()
            ended = ended and not waited.cancelled_caught
        return ended

    def resume(self) -> None:
        if self._released:
            self._released = False
            self._resumed.set()
            self._resumed = trio.Event()


_GROUPS = {
    0: frozenset[Group](),
    HOT: frozenset({Group.HOT}),
    CALM: frozenset({Group.CALM}),
    HOT | CALM: frozenset({Group.HOT, Group.CALM}),
}


def _groups(scope: int) -> frozenset[Group]:
    return _GROUPS[scope & (HOT | CALM)]


def _overdue(note: Note) -> str:
    if not note.function:
        return "the process that asks the driver does not get on"
    return f"{note.function} has not come back for {time.monotonic() - note.since:.2f} s"
