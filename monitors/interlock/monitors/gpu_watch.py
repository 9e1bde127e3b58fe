"""GPUs in the monitor: what a back-end and the kernel log say becomes telemetry and facts.

All that a sample has of all cards leaves in one batch. A fault leaves at once, twice: as a series for rules, and as a
fact, which is in the log for good. While there is nothing to be read, that is what is published: silence is no health.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import trio

from interlock.broker import facts
from interlock.broker.bus import TelemetryPublisher
from interlock.broker.samples import Labels, labels
from interlock.broker.wire import Body
from interlock.monitors import gpu_metrics as gm
from interlock.monitors import kernel_log
from interlock.monitors.gpu import Card, CardEvent, DriverState, GpuBackend, Heard, NoGpu, Part, Reading
from interlock.monitors.gpu_faults import CARD_STATES, DRIVER, DRIVER_STATES, KINDS, Cleared, Edge, FaultBook, Raised
from interlock.monitors.gpu_series import CardSeries, Samples
from interlock.monitors.kernel_log import KernelXid, place
from interlock.monitors.roster import Instance
from interlock.monitors.sampler import Group

log = logging.getLogger("interlock.monitors")

GPU_RETRY_S = 10.0  # a configured GPU that is not there may come back with its driver
RECOVERY_EVENT = 0x8000  # NVML's event: a recovery action is due

Owners = Callable[[Iterable[int]], Awaitable[Mapping[int, Instance]]]
Open = Callable[[], Awaitable[GpuBackend]]
Sample = Callable[[frozenset[Group]], Awaitable[None]]
Beat = Callable[[Sample], Awaitable[None]]


class GpuWatch:
    """The GPUs of one host. `post` sends a fact; `owners` says whose processes are."""

    def __init__(
        self, host: str, telemetry: TelemetryPublisher, post: Callable[[Body], None], owners: Owners, *, kmsg: Path
    ) -> None:
        self.host = host
        self.book = FaultBook()
        self._telemetry = telemetry
        self._post = post
        self._owners = owners
        self._kmsg = kmsg
        self._backend: GpuBackend | None = None
        self._wanted = False
        self._driver = DriverState()
        self._released = False
        self._kernel: bool | None = None
        self._cards: dict[int, CardSeries] = {}
        self._recovery: dict[int, bool] = {}  # a recovery action is due
        self._ending: list[Labels] = []  # series that have said their last word, and end with the next batch
        self._host_live: set[Labels] = set()
        self._faults: set[Labels] = set()

    @property
    def live(self) -> list[Labels]:
        """The series that report."""
        found = [key for card in self._cards.values() for key in card.live]
        return [*found, *self._host_live, *self._faults, *self._ending]

    async def run(self, open_backend: Open, beat: Beat, *, wanted: bool, quiet: bool) -> None:
        """Until cancelled; returns where there is no GPU. wanted: one must be there, and is looked for until it is."""
        self._wanted = wanted
        async with trio.open_nursery() as nursery:
            if wanted:
                nursery.start_soon(beat, self.sample)
            backend = await self._find(open_backend, nursery, quiet=quiet)
            if backend is None:
                return
            listed = ", ".join(f"{card.index} {card.name}" for card in backend.cards)
            log.info("GPUs: %s: %s", backend.label, listed)
            if not wanted:
                nursery.start_soon(beat, self.sample)
            if backend.in_kernel_log:
                nursery.start_soon(kernel_log.follow, self._kmsg, self.hear_kernel, self._kernel_readable)
            await trio.sleep_forever()

    async def _find(self, open_backend: Open, nursery: trio.Nursery, *, quiet: bool) -> GpuBackend | None:
        said = False
        while True:
            try:
                self._backend = await open_backend()
                await nursery.start(self._backend.run, self.hear)
            except NoGpu as error:
                self._backend = None
                if not said:
                    log.log(logging.INFO if quiet else logging.ERROR, "GPUs: %s", error)
                    said = True
                if not self._wanted:
                    return None
                await trio.sleep(GPU_RETRY_S)
            else:
                return self._backend

    # --- samples

    async def sample(self, due: frozenset[Group]) -> None:
        """One sample of all cards; where they can't be asked, that."""
        if self._backend is not None and not self._released and not self._driver.kind:
            await self._backend.sample(due)
            return
        now = time.time()
        samples: Samples = {}
        ended = self._take_ending()
        if not self._released:
            for card in self._cards.values():
                ended += card.fail(samples)
        self._calm(due, samples, now)
        self._send(samples, ended, now)
        await trio.lowlevel.checkpoint()

    def _calm(self, due: frozenset[Group], samples: Samples, now: float) -> list[Edge]:
        """What is of the host as a whole, and what ends by quiet."""
        if Group.CALM not in due:
            return []
        host: dict[str, float] = {gm.RELEASED: float(self._released)}
        if self._wanted or self._backend is not None:
            host[gm.DRIVER_UP] = float(self._backend is not None and not self._driver.kind and not self._released)
            host[gm.RESTARTS] = self._driver.restarts
        if self._kernel is not None:
            host[gm.KERNEL_LOG] = float(self._kernel)
        for name, value in host.items():
            key = labels(name, host=self.host)
            samples[key] = value
            self._host_live.add(key)
        well = frozenset(index for index, card in self._cards.items() if card.up)
        edges = self.book.quiet(well, now)
        if not self._driver.kind:
            edges += self.book.state(DRIVER, "", "", now, of=DRIVER_STATES)
        return edges

    async def hear(self, heard: Heard) -> None:
        match heard:
            case Part():
                await self._part(heard)
            case DriverState():
                await self._driver_is(heard)
            case CardEvent():
                await self._event(heard)

    async def _part(self, part: Part) -> None:
        if self._released:
            return
        pids = {pid for reading in part.readings for pid in reading.processes or ()}
        owners = await self._owners(pids) if pids else {}
        samples: Samples = {}
        ended = self._take_ending()
        edges: list[Edge] = []
        now = min((reading.time for reading in part.readings), default=time.time())
        for reading in part.readings:
            card = self._series(reading.card)
            edges += self._faults_of(reading, card)
            if reading.kind:
                ended += card.fail(samples)
            else:
                ended += card.take(reading, owners, samples)
            if Group.CALM in reading.groups:
                card.count_xids(self.book.xids, samples)
        if part.readings:
            edges += self._calm(part.readings[0].groups, samples, now)
        await self._tell(edges, samples)
        self._faults_stand(samples)
        self._send(samples, ended, now)

    def _faults_of(self, reading: Reading, card: CardSeries) -> list[Edge]:
        index, kind, error = reading.card.index, reading.kind, reading.error
        action = reading.values.get(gm.RECOVERY_ACTION)
        if action is not None:
            self._recovery[index] = bool(action)
        elif Group.CALM in reading.groups and not kind:
            self._recovery.pop(index, None)  # this card does not tell
        if not kind and self._recovery.get(index):
            kind, error = "reset-required", "the card asks for a recovery action"
        edges = self.book.state(index, kind, error, reading.time, of=CARD_STATES)
        if reading.lacking is not None and card.news_of(reading.lacking):
            edges += self.book.lacking(index, reading.lacking, reading.time)
        return edges

    # --- faults

    async def _driver_is(self, state: DriverState) -> None:
        self._driver = state
        now = time.time()
        samples: Samples = {}
        ended = self._take_ending()
        edges = self.book.state(DRIVER, state.kind, state.detail, now, of=DRIVER_STATES)
        if state.kind and not self._released:
            for card in self._cards.values():
                ended += card.fail(samples)
        self._calm(frozenset({Group.CALM}), samples, now)
        await self._tell(edges, samples)
        self._send(samples, ended, now)

    async def _event(self, event: CardEvent) -> None:
        if event.type == RECOVERY_EVENT:
            self._recovery[event.index] = True  # until a reading says otherwise
        await self._at_once(self.book.event(event.index, event.type, event.data, event.time), event.index, event.time)

    async def hear_kernel(self, xid: KernelXid) -> None:
        """What the kernel log tells."""
        index = next((i for i, card in self._cards.items() if place(card.card.bus) == xid.bus), DRIVER)
        now = time.time()
        edges = self.book.xid(index, xid.number, "kernel", now, pid=xid.pid, text=xid.words)
        await self._at_once(edges, index, now)

    async def _at_once(self, edges: list[Edge], index: int, now: float) -> None:
        samples: Samples = {}
        if index in self._cards:
            self._cards[index].count_xids(self.book.xids, samples)
        await self._tell(edges, samples)
        self._send(samples, [], now)

    def _kernel_readable(self, why_not: str) -> None:
        self._kernel = not why_not
        if why_not:
            log.warning("GPUs: the kernel log can't be read, so XIDs come from NVML only: %s", why_not)

    async def _tell(self, edges: list[Edge], samples: Samples) -> None:
        """Each edge as a fact, and as a sample: 1 where it stands, once 0 where it has cleared."""
        for edge in edges:
            key = self._fault_key(edge)
            if KINDS[edge.kind].cause != "limit":
                stands = isinstance(edge, Raised) or self.book.stands(edge.card, edge.kind)
                samples[key] = float(stands)
                if stands:
                    self._faults.add(key)
                else:
                    self._faults.discard(key)
                    self._ending.append(key)
            self._log(edge)
            self._post(await self._fact(edge))

    def _faults_stand(self, samples: Samples) -> None:
        for key in self._faults:
            samples.setdefault(key, 1.0)

    def _fault_key(self, edge: Edge) -> Labels:
        card = self._cards[edge.card].card if edge.card in self._cards else None
        number = "driver" if edge.card == DRIVER else str(edge.card)
        return labels(gm.FAULT, host=self.host, gpu=number, uuid=card.uuid if card else "", kind=edge.kind)

    async def _fact(self, edge: Edge) -> Body:
        uuid = self._cards[edge.card].card.uuid if edge.card in self._cards else ""
        if isinstance(edge, Cleared):
            return facts.GpuFaultCleared(
                host=self.host, gpu=edge.card, uuid=uuid, kind=edge.kind, detail=edge.detail, since=edge.since,
                until=edge.until, xid=edge.xid,
            )  # fmt: skip
        owner = (await self._owners([edge.pid])).get(edge.pid) if edge.pid else None
        kind = KINDS[edge.kind]
        return facts.GpuFault(
            host=self.host, gpu=edge.card, uuid=uuid, kind=edge.kind, cause=kind.cause, detail=edge.detail,
            recovery=kind.recovery, since=edge.since, xid=edge.xid, pid=edge.pid, agent=owner.agent if owner else "",
        )  # fmt: skip

    def _log(self, edge: Edge) -> None:
        name = self._cards[edge.card].card.name if edge.card in self._cards else ""
        if KINDS[edge.kind].cause == "limit":
            log.debug("GPU %d %s: %s: %s", edge.card, name, edge.kind, edge.detail)
        elif edge.kind in DRIVER_STATES and isinstance(edge, Raised):
            log.error("the GPUs' driver failed: %s: %s", edge.kind, edge.detail)
        elif edge.kind in DRIVER_STATES:
            if not any(raised.kind in DRIVER_STATES for raised in self.book.standing):
                log.warning("the GPUs' driver answers again")
        elif edge.kind in CARD_STATES and isinstance(edge, Raised):
            log.error("GPU %d %s failed: %s", edge.card, name, edge.detail)
        elif edge.kind in CARD_STATES:
            if not any(raised.kind in CARD_STATES and raised.card == edge.card for raised in self.book.standing):
                log.warning("GPU %d %s reports again", edge.card, name)
        elif isinstance(edge, Raised):
            log.error("GPU %d %s: %s", edge.card, name, edge.detail)

    # --- letting go

    async def release(self) -> str:
        """Let go of the driver until `resume`; why not, or nothing."""
        if self._backend is None:
            return "no GPU is monitored here"
        self._released = True
        ended = [key for card in self._cards.values() for key in card.end()]
        samples: Samples = {}
        self._calm(frozenset({Group.CALM}), samples, time.time())
        self._send(samples, ended, time.time())
        if not await self._backend.release():
            return "a process that is stuck in the driver still holds it, though it was killed"
        return ""

    def resume(self) -> None:
        """Take it up again."""
        if self._backend is not None and self._released:
            self._released = False
            self._backend.resume()

    # --- inside

    def _series(self, card: Card) -> CardSeries:
        known = self._cards.get(card.index)
        if known is None or (known.card is not card and known.card != card and card.uuid):
            if known is not None:
                self._ending += known.end()
            known = self._cards[card.index] = CardSeries(self.host, card)
        return known

    def _take_ending(self) -> list[Labels]:
        ending, self._ending = self._ending, []
        return ending

    def _send(self, samples: Samples, ended: list[Labels], now: float) -> None:
        ended = [key for key in ended if key not in samples]  # one that has come back in this very moment
        if samples or ended:
            self._telemetry.send(samples, time=now, ended=ended)
