"""AMD's and Intel's cards as a source of GPU readings. Each card has a thread seat: a driver may hang on any file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import trio

from interlock.monitors import drm
from interlock.monitors import gpu_metrics as gm
from interlock.monitors.drm import Client, DrmCard, Engines
from interlock.monitors.gpu import Card, NoGpu, Reading
from interlock.monitors.gpu_each import EachCard
from interlock.monitors.sampler import Group

DEADLINE_S = 1.0  # for all files of a card; they take less than a millisecond where the driver is well
START_DEADLINE_S = 10.0  # to find the cards: one that sleeps may have to wake up
READINGS = (gm.MEMORY_USED, gm.MEMORY_FREE, gm.MEMORY_TOTAL, gm.MEMORY_RATIO, gm.TEMPERATURE, gm.POWER, gm.POWER_LIMIT)
CLIENTS_FRESH_S = 0.9  # what processes hold is looked up for all cards at once, not once for each of them


class DrmCards:
    """As `EachCard` asks them. Made by `open_drm_backend`."""

    def __init__(self, cards: Sequence[DrmCard], proc: str, deadline_s: float) -> None:
        self.label = f"{len(cards)} by DRM"
        self.cards = [Card(index, card.uuid, card.name) for index, card in enumerate(cards)]
        self._drm = list(cards)
        self._proc = proc
        self._deadline_s = deadline_s
        self._seats = [trio.CapacityLimiter(1) for _ in cards]
        self._engines = [Engines() for _ in cards]
        self._clients: tuple[float, list[Client]] = float("-inf"), []

    async def sample(self, index: int, groups: frozenset[Group]) -> Reading:
        """The readings of these groups; of a card that hangs, that it does."""
        card, asked, seat = self.cards[index], time.time(), self._seats[index]
        hung = partial(Reading, card, asked, groups=groups, kind="hang")
        if seat.borrowed_tokens:
            return hung(error="the driver does not answer: an earlier look has still not come back")
        with trio.move_on_after(self._deadline_s):
            read = partial(self._read, index, groups)
            return await trio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=seat)
        return hung(error=f"the driver does not answer: nothing within {self._deadline_s:g} s")

    def _read(self, index: int, groups: frozenset[Group]) -> Reading:
        asked, card, found = time.time(), self.cards[index], self._drm[index]
        if not (found.folder / "device").exists():
            why = "the card is gone: the kernel lists it no more"
            return Reading(card, asked, groups=groups, kind="lost", error=why)
        clients = [one for one in self._look(Group.CALM in groups) if one.pci == found.pci]
        values: dict[str, float] = {}
        if Group.HOT in groups:
            values |= drm.read_memory(found, clients)
            busy = drm.read_busy(found)
            if busy is None and Group.CALM in groups:
                busy = self._engines[index].add(clients, time.monotonic())
            if busy is not None:
                values[gm.UTILIZATION] = busy
        if Group.CALM in groups:
            values |= drm.read_sensors(found)
        held: dict[int, int] | None = None
        lacking: dict[str, str] | None = None
        if Group.CALM in groups:
            held = {}
            for client in clients:
                held[client.pid] = held.get(client.pid, 0) + client.held
        if Group.HOT in groups and Group.CALM in groups:
            lacking = {name: "the driver does not tell it" for name in READINGS if name not in values}
        return Reading(
            card, asked, values, held, groups, slow=Group.SLOW in groups, lacking=lacking, seconds=time.time() - asked
        )

    def _look(self, now: bool) -> list[Client]:
        """What processes hold, looked up with the calm readings only; in between, as it was."""
        if now and time.monotonic() - self._clients[0] > CLIENTS_FRESH_S:
            self._clients = time.monotonic(), drm.read_clients(self._proc)
        return self._clients[1]


async def open_drm_backend(sys: str = drm.SYS, proc: str = drm.PROC, *, deadline_s: float = DEADLINE_S) -> EachCard:
    """AMD's and Intel's cards of this machine. NoGpu where there is none, or the kernel does not answer."""
    cards: list[DrmCard] | None = None
    with trio.move_on_after(START_DEADLINE_S):
        cards = await trio.to_thread.run_sync(drm.find_cards, sys, abandon_on_cancel=True)
    if cards is None:
        raise NoGpu("the kernel does not list its cards", where=f"{sys}/class/drm", hint="dmesg may say why")
    if not cards:
        raise NoGpu("the kernel knows no card of AMD or Intel", where=f"{sys}/class/drm")
    return EachCard(DrmCards(cards, proc, deadline_s))
