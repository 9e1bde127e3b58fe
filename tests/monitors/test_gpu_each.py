"""Cards that are asked one by one, as one back-end."""

from __future__ import annotations

import trio

from interlock.monitors.gpu import Card, Heard, Part, Reading
from interlock.monitors.gpu_each import EachCard
from interlock.monitors.sampler import Group

HOT = frozenset({Group.HOT})


class Source:
    """Three cards; the one that is `held` answers when it is let go."""

    label = "three"

    def __init__(self) -> None:
        self.cards = [Card(index, f"GPU-{index}") for index in range(3)]
        self.held: dict[int, trio.Event] = {}

    async def sample(self, index: int, groups: frozenset[Group]) -> Reading:
        await trio.lowlevel.checkpoint()
        if index in self.held:
            await self.held[index].wait()
        return Reading(self.cards[index], 1.0, {"x": float(index)}, groups=groups)


async def test_all_leave_in_one_piece_and_a_slow_one_follows() -> None:
    source = Source()
    backend = EachCard(source)
    told: list[list[int]] = []

    async def hear(heard: Heard) -> None:
        await trio.lowlevel.checkpoint()
        assert isinstance(heard, Part)
        told.append([reading.card.index for reading in heard.readings])
        for event in source.held.values():
            event.set()  # the slow one answers as soon as the others are heard

    async with trio.open_nursery() as nursery:
        await nursery.start(backend.run, hear)
        await backend.sample(HOT)
        assert told == [[0, 1, 2]]
        told.clear()
        source.held[1] = trio.Event()
        with trio.fail_after(20):
            await backend.sample(HOT)
        assert told == [[0, 2], [1]]
        told.clear()
        assert await backend.release()
        await backend.sample(HOT)
        assert told == []
        backend.resume()
        await backend.sample(HOT)
        assert told == [[0, 1, 2]]
        nursery.cancel_scope.cancel()
