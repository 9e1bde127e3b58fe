"""AMD's and Intel's cards as a source of GPU readings. Each card has a thread seat: a driver may hang on any file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import trio

from interlock.monitors import drm, gpu
from interlock.monitors.drm import Client, DrmCard, Engines
from interlock.monitors.gpu import Card, NoGpu, Reading
from interlock.monitors.sampler import Group

DEADLINE_S = 1.0  # for all files of a card; they take less than a millisecond where the driver is well
START_DEADLINE_S = 10.0  # to find the cards: one that sleeps may have to wake up
CLIENTS_FRESH_S = 0.9  # what processes hold is looked up for all cards at once, not once for each of them


class DrmBackend:
    """Made by `open_drm_backend`."""

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
        if seat.borrowed_tokens:
            return Reading(card, asked, error="the driver does not answer: an earlier look has still not come back")
        with trio.move_on_after(self._deadline_s):
            read = partial(self._read, index, groups)
            return await trio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=seat)
        return Reading(card, asked, error=f"the driver does not answer: nothing within {self._deadline_s:g} s")

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()

    def _read(self, index: int, groups: frozenset[Group]) -> Reading:
        asked, card, found = time.time(), self.cards[index], self._drm[index]
        if not (found.folder / "device").exists():
            return Reading(card, asked, error="the card is gone: the kernel lists it no more")
        clients = [one for one in self._look(Group.CALM in groups) if one.pci == found.pci]
        values: dict[str, float] = {}
        if Group.HOT in groups:
            values |= drm.read_memory(found, clients)
            busy = drm.read_busy(found)
            if busy is None and Group.CALM in groups:
                busy = self._engines[index].add(clients, time.monotonic())
            if busy is not None:
                values[gpu.UTILIZATION] = busy
        if Group.CALM in groups:
            values |= drm.read_sensors(found)
        held: dict[int, int] = {}
        for client in clients:
            held[client.pid] = held.get(client.pid, 0) + client.held
        wanted = [gpu.MEMORY_USED, gpu.MEMORY_FREE, gpu.MEMORY_TOTAL, gpu.MEMORY_RATIO] if Group.HOT in groups else []
        wanted += [gpu.TEMPERATURE, gpu.POWER, gpu.POWER_LIMIT] if Group.CALM in groups else []
        return Reading(card, asked, values, held, tuple(name for name in wanted if name not in values))

    def _look(self, now: bool) -> list[Client]:
        """What processes hold, looked up with the calm readings only; in between, as it was."""
        if now and time.monotonic() - self._clients[0] > CLIENTS_FRESH_S:
            self._clients = time.monotonic(), drm.read_clients(self._proc)
        return self._clients[1]


async def open_drm_backend(sys: str = drm.SYS, proc: str = drm.PROC, *, deadline_s: float = DEADLINE_S) -> DrmBackend:
    """AMD's and Intel's cards of this machine. NoGpu where there is none, or the kernel does not answer."""
    cards: list[DrmCard] | None = None
    with trio.move_on_after(START_DEADLINE_S):
        cards = await trio.to_thread.run_sync(drm.find_cards, sys, abandon_on_cancel=True)
    if cards is None:
        raise NoGpu("the kernel does not list its cards", where=f"{sys}/class/drm", hint="dmesg may say why")
    if not cards:
        raise NoGpu("the kernel knows no card of AMD or Intel", where=f"{sys}/class/drm")
    return DrmBackend(cards, proc, deadline_s)
