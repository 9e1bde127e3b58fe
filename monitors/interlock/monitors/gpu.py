"""What a source of GPU readings is. `nvml.py` and `simulated.py` are two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from interlock.broker.errors import InterlockError
from interlock.monitors.sampler import Group

MEMORY_USED = "gpu_memory_used_bytes"
MEMORY_TOTAL = "gpu_memory_total_bytes"
MEMORY_FREE = "gpu_memory_free_bytes"
MEMORY_RATIO = "gpu_memory_used_ratio"
UTILIZATION = "gpu_utilization_ratio"
TEMPERATURE = "gpu_temperature_celsius"
POWER = "gpu_power_watts"
POWER_LIMIT = "gpu_power_limit_watts"
ECC_ERRORS = "gpu_ecc_uncorrected_errors_total"
UP = "gpu_up"
PROCESS_MEMORY = "gpu_process_memory_bytes"


class NoGpu(InterlockError):
    """There is no GPU, or no library or driver to ask about it. Nothing else of the monitor depends on one."""


@dataclass(frozen=True)
class Card:
    """`index` as the driver counts; `uuid` is empty until the driver has told it."""

    index: int
    uuid: str = ""
    name: str = ""


@dataclass(frozen=True)
class Reading:
    """What a card said. A reading that it does not support is absent from `values`, never 0.

    time: when it was asked, in seconds since 1970. values: by metric name. processes: bytes by pid. error: why there
    are no readings at all (a lost card, a driver that does not answer); empty if there are some.
    """

    card: Card
    time: float
    values: Mapping[str, float] = field(default_factory=dict)
    processes: Mapping[int, int] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    error: str = ""


class GpuBackend(Protocol):
    """Readings of the cards of one machine. Cards are asked independently, so that a sick one delays no other."""

    @property
    def label(self) -> str:
        """What is read, and through which version of what."""
        ...

    @property
    def cards(self) -> Sequence[Card]: ...

    async def sample(self, index: int, groups: frozenset[Group]) -> Reading:
        """The readings of these groups of the card; returns within the back-end's deadline, and never raises."""
        ...

    async def close(self) -> None: ...


def memory(*, used: int, free: int, total: int) -> dict[str, float]:
    """The readings of a card's memory, in bytes; the ratio counts what the driver keeps for itself as used."""
    values: dict[str, float] = {MEMORY_USED: used, MEMORY_FREE: free, MEMORY_TOTAL: total}
    if total > 0:
        values[MEMORY_RATIO] = 1 - free / total
    return values
