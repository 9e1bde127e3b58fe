"""GPUs of whichever maker there are: the first back-end that finds some."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from interlock.monitors.gpu import Card, GpuBackend, Hear, NoGpu
from interlock.monitors.sampler import Group


class EitherBackend:
    """`first`, or else what `second` opens; which one is known once it is started. Its cards stay those."""

    def __init__(self, first: GpuBackend, second: Callable[[], Awaitable[GpuBackend]]) -> None:
        self._found = first
        self._second = second

    @property
    def label(self) -> str:
        return self._found.label

    @property
    def in_kernel_log(self) -> bool:
        return self._found.in_kernel_log

    @property
    def cards(self) -> Sequence[Card]:
        return self._found.cards

    async def run(self, hear: Hear, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """NoGpu, with the reasons of both, if neither finds a card."""
        reasons: list[str] = []
        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(self._found.run, hear)
            except NoGpu as error:
                reasons.append(str(error))
            if reasons:
                try:
                    self._found = await self._second()
                    await nursery.start(self._found.run, hear)
                except NoGpu as error:
                    reasons.append(str(error))
            if len(reasons) < 2:
                task_status.started()
        if len(reasons) > 1:
            raise NoGpu("; ".join(reasons))

    async def sample(self, groups: frozenset[Group]) -> None:
        await self._found.sample(groups)

    async def release(self) -> bool:
        return await self._found.release()

    def resume(self) -> None:
        self._found.resume()
