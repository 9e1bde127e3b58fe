"""A back-end made of a source that is asked card by card, each with its own deadline.

What all cards say leaves in one piece; a card that takes longer than some milliseconds follows in a piece of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from interlock.monitors.gpu import Card, Hear, Part, Reading
from interlock.monitors.sampler import Group

PATIENCE_S = 0.02  # what the readings of other cards wait for those of a slow one


class CardSource(Protocol):
    @property
    def label(self) -> str: ...

    @property
    def cards(self) -> Sequence[Card]: ...

    async def sample(self, index: int, groups: frozenset[Group]) -> Reading:
        """The readings of these groups of the card; returns within the source's deadline, and never raises."""
        ...


class EachCard:
    """The `GpuBackend` of a `CardSource`."""

    in_kernel_log = False

    def __init__(self, source: CardSource) -> None:
        self._source = source
        self._hear: Hear | None = None
        self._released = False

    @property
    def label(self) -> str:
        return self._source.label

    @property
    def cards(self) -> Sequence[Card]:
        return self._source.cards

    async def run(self, hear: Hear, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._hear = hear
        task_status.started()
        await trio.sleep_forever()

    async def sample(self, groups: frozenset[Group]) -> None:
        await trio.lowlevel.checkpoint()
        if self._hear is None or self._released:
            return
        read: list[Reading] = []
        left = len(self.cards)
        all_read = trio.Event()

        async def ask(index: int) -> None:
            nonlocal left
            reading = await self._source.sample(index, groups)
            read.append(reading)
            left -= 1
            if not left:
                all_read.set()

        async with trio.open_nursery() as nursery:
            for card in self.cards:
                nursery.start_soon(ask, card.index)
            with trio.move_on_after(PATIENCE_S):
                await all_read.wait()
            early, read[:] = sorted(read, key=_place), []
            if early:
                await self._hear(Part(early))
        if read:
            await self._hear(Part(sorted(read, key=_place)))

    async def release(self) -> bool:
        """Files are opened for each look only, so that nothing is held between two."""
        await trio.lowlevel.checkpoint()
        self._released = True
        return True

    def resume(self) -> None:
        self._released = False


def _place(reading: Reading) -> int:
    return reading.card.index
