"""What a source of GPU readings is, and what it says. `nvidia.py` and `simulated.py` are two."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from interlock.broker.errors import InterlockError
from interlock.monitors.gpu_metrics import MEMORY_FREE, MEMORY_RATIO, MEMORY_TOTAL, MEMORY_USED
from interlock.monitors.sampler import Group


class NoGpu(InterlockError):
    """There is no GPU, or no library or driver to ask about it. Nothing else of the monitor depends on one."""


@dataclass(frozen=True)
class Card:
    """`index` as the driver counts; `uuid` is empty until the driver has told it. `bus`: where it sits, as PCI says."""

    index: int
    uuid: str = ""
    name: str = ""
    bus: str = ""


@dataclass(frozen=True)
class Reading:
    """What a card said. A reading that it does not support is absent from `values`, never 0.

    time: when it was asked, in seconds since 1970. values: by the reading's key. processes: bytes by pid, None where
    they were not asked for; shares: of the time, by pid. lacking: reading -> why the card does not give it; None: as
    before. missing: readings that it has and that failed this time. seconds: what the sample cost.
    kind, error: why there are no readings at all, as a kind of fault and in words; empty if there are some.
    """

    card: Card
    time: float
    values: Mapping[str, float] = field(default_factory=dict)
    processes: Mapping[int, int] | None = None
    groups: frozenset[Group] = frozenset(Group)
    slow: bool = False
    shares: Mapping[int, float] = field(default_factory=dict)
    lacking: Mapping[str, str] | None = None
    missing: int = 0
    seconds: float = 0.0
    kind: str = ""
    error: str = ""


@dataclass(frozen=True)
class Part:
    """A sample of the cards: all of them, but where one is slow, which then follows in a part of its own."""

    readings: Sequence[Reading]


@dataclass(frozen=True)
class DriverState:
    """How the driver is from now on. `kind` of fault: empty where it answers."""

    kind: str = ""
    detail: str = ""
    restarts: int = 0  # of the process that asks it


@dataclass(frozen=True)
class CardEvent:
    """What a card said by itself: NVML's type of event, and its data (of an XID, the number). index -1: some card."""

    index: int
    type: int
    data: int
    time: float


Heard = Part | DriverState | CardEvent
Hear = Callable[[Heard], Awaitable[None]]


class GpuBackend(Protocol):
    """Readings of the cards of one machine. A sick card delays no other."""

    @property
    def label(self) -> str:
        """What is read, and through which version of what."""
        ...

    @property
    def in_kernel_log(self) -> bool:
        """Its driver writes XIDs there."""
        ...

    @property
    def cards(self) -> Sequence[Card]: ...

    async def run(self, hear: Hear, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own what the back-end needs until cancelled; started once the cards are known. NoGpu if there are none."""
        ...

    async def sample(self, groups: frozenset[Group]) -> None:
        """Ask all cards for these groups; what they say is heard, also that one does not answer. Never raises."""
        ...

    async def release(self) -> bool:
        """Let go of the driver until `resume`. False: something still holds it, and will not let go."""
        ...

    def resume(self) -> None: ...


def memory(*, used: int, free: int, total: int) -> dict[str, float]:
    """The readings of a card's memory, in bytes."""
    values: dict[str, float] = {MEMORY_USED: used, MEMORY_FREE: free, MEMORY_TOTAL: total}
    if total > 0:
        values[MEMORY_RATIO] = 1 - free / total
    return values
