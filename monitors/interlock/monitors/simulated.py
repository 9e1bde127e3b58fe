"""Simulated cards as a source of GPU readings: memory only, as the agents of the machine really reserve it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from interlock.broker.config import SimulatedGpu as CardConfig
from interlock.broker.simgpu import NoSimulatedGpu, SimulatedGpu, create_cards
from interlock.monitors.gpu import Card, Hear, NoGpu, Part, Reading, memory
from interlock.monitors.sampler import Group


class SimulatedBackend:
    """The cards in a folder. Made by `open_simulated_backend`."""

    in_kernel_log = False

    def __init__(self, cards: Sequence[SimulatedGpu]) -> None:
        self._cards = list(cards)
        self._hear: Hear | None = None
        self.label = f"{len(self._cards)} simulated"
        self.cards = [Card(index, gpu.uuid, gpu.name) for index, gpu in enumerate(self._cards)]

    async def run(self, hear: Hear, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._hear = hear
        task_status.started()
        await trio.sleep_forever()

    async def sample(self, groups: frozenset[Group]) -> None:
        """The processes come from the same files as the memory, so that they cost nothing more: with every sample."""
        if self._hear is None or Group.HOT not in groups:
            return
        read = partial(self._read, groups)
        await self._hear(Part(await trio.to_thread.run_sync(read, abandon_on_cancel=True)))

    async def release(self) -> bool:
        await trio.lowlevel.checkpoint()
        return True  # there is no driver

    def resume(self) -> None:
        pass

    def _read(self, groups: frozenset[Group]) -> list[Reading]:
        return [self._read_card(index, groups) for index in range(len(self._cards))]

    def _read_card(self, index: int, groups: frozenset[Group]) -> Reading:
        gpu, card, now = self._cards[index], self.cards[index], time.time()
        try:
            held = gpu.by_pid()
        except (NoSimulatedGpu, OSError) as error:
            return Reading(card, now, groups=groups, kind="lost", error=str(error))
        used = sum(held.values())
        values = memory(used=used, free=max(0, gpu.total - used), total=gpu.total)
        return Reading(card, now, values, held, groups, seconds=time.time() - now)


async def open_simulated_backend(folder: Path, cards: Sequence[CardConfig]) -> SimulatedBackend:
    """The configured cards in `folder`, made if they are not there. NoGpu if none is configured or they can't be."""
    if not cards:
        raise NoGpu("no simulated card is configured", hint="add a [[monitor.simulated]] to the fleet file")
    try:
        return SimulatedBackend(await trio.to_thread.run_sync(create_cards, folder, cards))
    except (NoSimulatedGpu, OSError) as error:
        raise NoGpu(f"the simulated cards can't be made: {error}", where=str(folder)) from None
