"""NVIDIA cards through NVML: the only module that imports pynvml.

NVML calls block, and a sick driver may block them for minutes. So each card has one thread seat: a call has a deadline,
after which the monitor goes on; as long as the abandoned call has not come back, the card counts as failed and is not
asked again. A card that fails is looked up anew at the next sample, and the library started again if it has to be.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import trio

from interlock.monitors import gpu
from interlock.monitors.gpu import Card, NoGpu, Reading
from interlock.monitors.sampler import Group

CALL_DEADLINE_S = 1.0  # all readings of a card; they take milliseconds where the driver is well
START_DEADLINE_S = 10.0  # starting the library may wake cards up that sleep (no persistence mode), which takes seconds

T = TypeVar("T")


class _Hung(Exception):
    pass


class _Seat:
    """A thread for blocking calls, one at a time."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)

    async def call(self, function: Callable[[], T], deadline_s: float) -> T:
        """What the function returns or raises; _Hung after the deadline, and while an earlier call still hangs."""
        if self._limiter.borrowed_tokens:
            raise _Hung("an earlier call has still not come back")
        with trio.move_on_after(deadline_s):
            return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=self._limiter)
        raise _Hung(f"no answer within {deadline_s:g} s")


@dataclass(frozen=True)
class _Source:
    """One or more readings that one call gives."""

    group: Group
    names: tuple[str, ...]
    read: Callable[[Any, Any], dict[str, float]]  # (library, handle)


def _memory(library: Any, handle: Any) -> dict[str, float]:
    found = library.nvmlDeviceGetMemoryInfo(handle)
    return gpu.memory(used=found.used, free=found.free, total=found.total)


def _single(name: str, function: str, scale: float, *constants: str) -> Callable[[Any, Any], dict[str, float]]:
    def read(library: Any, handle: Any) -> dict[str, float]:
        arguments = [getattr(library, constant) for constant in constants]
        return {name: getattr(library, function)(handle, *arguments) * scale}

    return read


def _utilization(library: Any, handle: Any) -> dict[str, float]:
    return {gpu.UTILIZATION: library.nvmlDeviceGetUtilizationRates(handle).gpu / 100}


SOURCES = (
    _Source(Group.HOT, (gpu.MEMORY_USED, gpu.MEMORY_FREE, gpu.MEMORY_TOTAL, gpu.MEMORY_RATIO), _memory),
    _Source(Group.HOT, (gpu.UTILIZATION,), _utilization),
    _Source(
        Group.CALM,
        (gpu.TEMPERATURE,),
        _single(gpu.TEMPERATURE, "nvmlDeviceGetTemperature", 1, "NVML_TEMPERATURE_GPU"),
    ),
    _Source(Group.CALM, (gpu.POWER,), _single(gpu.POWER, "nvmlDeviceGetPowerUsage", 1e-3)),  # milliwatts
    _Source(Group.CALM, (gpu.POWER_LIMIT,), _single(gpu.POWER_LIMIT, "nvmlDeviceGetEnforcedPowerLimit", 1e-3)),
    _Source(
        Group.CALM,
        (gpu.ECC_ERRORS,),
        _single(
            gpu.ECC_ERRORS,
            "nvmlDeviceGetTotalEccErrors",
            1,
            "NVML_MEMORY_ERROR_TYPE_UNCORRECTED",
            "NVML_VOLATILE_ECC",
        ),
    ),
)
PROCESS_LISTS = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")


class NvidiaBackend:
    """The cards of this machine. Made by `open_nvidia_backend`; `library` is pynvml or what looks like it."""

    def __init__(self, library: Any, driver: str, cards: Sequence[tuple[Card, Any]], deadline_s: float) -> None:
        self.label = f"NVIDIA driver {driver}"
        self.driver = driver
        self.cards = [card for card, _ in cards]
        self._library = library
        self._handles: list[Any] = [handle for _, handle in cards]  # None: to be looked up
        self._seats = [_Seat() for _ in cards]
        self._deadline_s = deadline_s

    async def sample(self, index: int, groups: frozenset[Group]) -> Reading:
        return (await self.timed(index, groups))[0]

    async def timed(self, index: int, groups: frozenset[Group]) -> tuple[Reading, dict[str, float]]:
        """The same with the seconds that each reading took."""
        asked = time.time()
        spent: dict[str, float] = {}
        read = partial(self._read, self.cards[index], self._handles[index], groups, spent)
        try:
            handle, reading = await self._seats[index].call(read, self._deadline_s)
        except _Hung as hung:
            return Reading(self.cards[index], asked, error=f"the driver does not answer: {hung}"), spent
        self._handles[index] = handle
        self.cards[index] = reading.card
        return reading, spent

    async def close(self) -> None:
        """End the library's session, unless the driver hangs."""
        try:
            await _Seat().call(self._library.nvmlShutdown, self._deadline_s)
        except (_Hung, self._library.NVMLError):
            return  # the end of the process does the same

    # --- inside; these run in threads, and change nothing of this object

    def _read(self, card: Card, handle: Any, groups: frozenset[Group], spent: dict[str, float]) -> tuple[Any, Reading]:
        """(handle, reading); the handle is None after an error, so that the card is looked up anew."""
        library = self._library
        asked = time.time()
        try:
            if handle is None:
                card, handle = _look_up(library, card)
            values, unsupported = _read_sources(library, handle, groups, spent)
            processes: dict[int, int] = {}
            if Group.HOT in groups:
                processes, known = _read_processes(library, handle, spent)
                unsupported += () if known else (gpu.PROCESS_MEMORY,)
        except library.NVMLError as error:
            return None, Reading(card, asked, error=_say(error))
        return handle, Reading(card, asked, values, processes, unsupported)


def _read_sources(
    library: Any, handle: Any, groups: frozenset[Group], spent: dict[str, float]
) -> tuple[dict[str, float], tuple[str, ...]]:
    values: dict[str, float] = {}
    unsupported: tuple[str, ...] = ()
    for source in SOURCES:
        if source.group not in groups:
            continue
        began = time.perf_counter()
        try:
            values |= source.read(library, handle)
        except _not_there(library):
            unsupported += source.names
        spent[source.names[0]] = time.perf_counter() - began
    return values, unsupported


def _read_processes(library: Any, handle: Any, spent: dict[str, float]) -> tuple[dict[int, int], bool]:
    """Bytes by pid, and whether the card tells them at all. A process that computes and draws is in both lists."""
    held: dict[int, int] = {}
    known = False
    began = time.perf_counter()
    for function in PROCESS_LISTS:
        try:
            listed = getattr(library, function)(handle)
        except _not_there(library):
            continue
        known = known or not listed or any(process.usedGpuMemory is not None for process in listed)
        for process in listed:
            if process.usedGpuMemory is not None:  # None: this driver does not tell (WSL, some MIG set-ups)
                held[process.pid] = max(held.get(process.pid, 0), process.usedGpuMemory)
    spent[gpu.PROCESS_MEMORY] = time.perf_counter() - began
    return held, known


def _look_up(library: Any, card: Card) -> tuple[Card, Any]:
    """The card with its identity, and its handle; starts the library again if it has lost its session."""

    def handle() -> Any:
        if card.uuid:
            return library.nvmlDeviceGetHandleByUUID(card.uuid)
        return library.nvmlDeviceGetHandleByIndex(card.index)

    try:
        found = handle()
    except library.NVMLError_Uninitialized:
        library.nvmlInit()
        found = handle()
    uuid, name = _text(library.nvmlDeviceGetUUID(found)), _text(library.nvmlDeviceGetName(found))
    return replace(card, uuid=uuid, name=name), found


def _not_there(library: Any) -> tuple[type[Exception], ...]:
    """The errors that mean: this reading is not to be had from this card, though the card is well."""
    return (
        library.NVMLError_NotSupported,
        library.NVMLError_NoPermission,
        library.NVMLError_FunctionNotFound,
        library.NVMLError_InsufficientSize,  # the list of processes grew while it was read
    )


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value  # older libraries give bytes


def _say(error: Exception) -> str:
    return str(error) or type(error).__name__


def _start(library: Any) -> tuple[str, list[tuple[Card, Any]]]:
    library.nvmlInit()
    driver = _text(library.nvmlSystemGetDriverVersion())
    cards: list[tuple[Card, Any]] = []
    for index in range(library.nvmlDeviceGetCount()):
        try:
            cards.append(_look_up(library, Card(index)))
        except library.NVMLError:
            cards.append((Card(index), None))  # it says why when it is sampled
    return driver, cards


async def open_nvidia_backend(
    library: Any = None, *, deadline_s: float = CALL_DEADLINE_S, start_deadline_s: float = START_DEADLINE_S
) -> NvidiaBackend:
    """The NVIDIA cards of this machine. NoGpu where there is no card, library or driver, or the driver hangs."""
    if library is None:
        try:
            library = importlib.import_module("pynvml")  # a machine without it still has its other readings
        except ImportError as error:
            raise NoGpu(f"the NVML binding can't be imported: {error}", hint="install nvidia-ml-py") from None
    try:
        driver, cards = await _Seat().call(partial(_start, library), start_deadline_s)
    except _Hung as hung:
        raise NoGpu(f"the NVIDIA driver does not answer: {hung}", hint="dmesg may say why") from None
    except library.NVMLError as error:
        raise NoGpu(f"no NVIDIA GPU: {_say(error)}", hint="nvidia-smi should list the cards") from None
    backend = NvidiaBackend(library, driver, cards, deadline_s)
    if not cards:
        await backend.close()
        raise NoGpu(f"the NVIDIA driver {driver} knows no card")
    return backend
