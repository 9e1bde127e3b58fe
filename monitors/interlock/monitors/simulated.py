"""Simulated cards as a source of GPU readings: memory only, as the agents of the machine really reserve it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from interlock.broker.config import SimulatedGpu as CardConfig
from interlock.broker.simgpu import NoSimulatedGpu, SimulatedGpu, create_cards
from interlock.monitors.gpu import Card, NoGpu, Reading, memory
from interlock.monitors.gpu_each import EachCard
from interlock.monitors.sampler import Group


class SimulatedCards:
    """The cards in a folder, as `EachCard` asks them. Made by `open_simulated_backend`."""

    def __init__(self, cards: Sequence[SimulatedGpu]) -> None:
        self._cards = list(cards)
        self.label = f"{len(self._cards)} simulated"
        self.cards = [Card(index, gpu.uuid, gpu.name) for index, gpu in enumerate(self._cards)]

    async def sample(self, index: int, groups: frozenset[Group]) -> Reading:
        return await trio.to_thread.run_sync(partial(self._read, index, groups), abandon_on_cancel=True)

    def _read(self, index: int, groups: frozenset[Group]) -> Reading:
        """The processes come from the same files as the memory, so that they cost nothing more."""
        gpu, card, now = self._cards[index], self.cards[index], time.time()
        try:
            held = gpu.by_pid()
        except (NoSimulatedGpu, OSError) as error:
            return Reading(card, now, groups=groups, kind="lost", error=str(error))
        used = sum(held.values())
        values = memory(used=used, free=max(0, gpu.total - used), total=gpu.total)
        return Reading(card, now, values, held, groups, seconds=time.time() - now)


async def open_simulated_backend(folder: Path, cards: Sequence[CardConfig]) -> EachCard:
    """The configured cards in `folder`, made if they are not there. NoGpu if none is configured or they can't be."""
    if not cards:
        raise NoGpu("no simulated card is configured", hint="add a [[monitor.simulated]] to the fleet file")
    try:
        return EachCard(SimulatedCards(await trio.to_thread.run_sync(create_cards, folder, cards)))
    except (NoSimulatedGpu, OSError) as error:
        raise NoGpu(f"the simulated cards can't be made: {error}", where=str(folder)) from None
