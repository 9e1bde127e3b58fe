"""NVIDIA cards through NVML: the only module that imports pynvml. It runs in a process of its own, `nvml_sampler.py`.

Each call is noted before it is made (`call_notes.py`), so that the supervisor can tell which one does not come back.
What a card does not support is lacking, with the reason, and is tried again once a minute only. A call that fails for
once leaves a hole. An error of the card as a whole ends its sample, and one of the driver ends the process.
"""

from __future__ import annotations

import importlib
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

from interlock.monitors import gpu_metrics as gm
from interlock.monitors.call_notes import CallNotes, Seat
from interlock.monitors.nvml_frames import CALM, HOT, SLOW, Found

NOT_AVAILABLE = 0xFFFFFFFFFFFFFFFF

# NVML's errors, by what follows from them.
DRIVER_ERRORS = {1: "uninitialized", 9: "driver-not-loaded", 12: "library-missing", 18: "driver-mismatch"}
CARD_ERRORS = frozenset({11, 14, 15, 16, 17, 27, 28, 999})  # interrupt, infoROM, lost, reset, OS, not ready, unknown
LACKING = {
    2: "not-supported",  # an argument that this card does not know, such as a sensor
    3: "not-supported",
    4: "no-permission",
    13: "library-too-old",
    22: "not-supported",
    25: "library-too-old",
    29: "not-supported",
}
NOT_FOUND = 6

_FIELDS: tuple[tuple[str, int, int, float], ...] = (  # reading, field id, scope, factor
    (gm.MEMORY_TEMPERATURE, 82, 0, 1.0),
    (gm.POWER_AVERAGE, 185, 0, 1e-3),
    (gm.POWER_INSTANT, 186, 0, 1e-3),
    (gm.ENERGY, 83, 0, 1e-3),
    (gm.RECOVERY_ACTION, 230, 0, 1.0),
    (gm.PCIE_SENT, 197, 0, 1.0),
    (gm.PCIE_RECEIVED, 198, 0, 1.0),
    (gm.PCIE_REPLAYS, 94, 0, 1.0),
    (gm.NVLINK_SENT, 138, 0xFFFFFFFF, 1024.0),  # the scope: all links together
    (gm.NVLINK_RECEIVED, 139, 0xFFFFFFFF, 1024.0),
    (f"{gm.NVLINK_ERRORS} kind=crc", 38, 0, 1.0),
    (f"{gm.NVLINK_ERRORS} kind=replay", 52, 0, 1.0),
    (f"{gm.NVLINK_ERRORS} kind=recovery", 59, 0, 1.0),
)
# A field's value as it lies in memory (nvmlFieldValue_t): its type, NVML's error, and a union of these, by that type.
# Read as a whole, since the binding's own attributes cost ten times as much as the call.
_FIELD = struct.Struct("=24xIi8s")
_UNION = [struct.Struct(form) for form in ("=d", "=I4x", "=Q", "=Q", "=q", "=i4x", "=H6x")]
_CAUSES = (("power", 0x4 | 0x80), ("thermal", 0x20 | 0x40), ("hardware", 0x8))  # bits of the clocks' reasons
_CLOCKS = ("graphics", "sm", "memory", "video")  # by NVML's number of a clock

Values = dict[str, float]


def load() -> Any:
    """The binding. ImportError where it is not installed."""
    return importlib.import_module("pynvml")


class DriverError(Exception):
    """The driver, or the library as a whole, gave up. `code` is NVML's."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class CardError(Exception):
    """A card gave up; the others may be well."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Card:
    """One card as this process knows it."""

    def __init__(self, found: Found, handle: Any) -> None:
        self.found = found
        self.handle = handle
        self.lacking: dict[str, str] = {}
        self.tell_lacking = True
        self.fans = 0
        self.migs: list[tuple[str, Any]] = []  # (labels, handle)
        self.fields = list(_FIELDS)
        self.memory_version = True  # version 2 of the memory reading, until it turns out to be too new
        self.off: dict[int, float] = {}  # sources that are lacking -> when to try them again
        self.not_before: dict[str, float] = {}  # the same of readings that are asked for one by one
        self.slow_at = 0.0
        self.utilization_since = 0  # microseconds, NVML's clock


class Session:
    """The library, started. All calls of the polling thread go through it."""

    def __init__(self, library: Any, notes: CallNotes, lacking_s: float = 60.0) -> None:
        self._lacking_s = lacking_s
        self.spent: dict[tuple[str, ...], list[float]] | None = None  # seconds of each source, where somebody asks
        self._library = library
        self._notes = notes
        self._sources: tuple[tuple[int, tuple[str, ...], Callable[[Card], Values]], ...] = (
            (HOT, (gm.MEMORY_USED, gm.MEMORY_FREE, gm.MEMORY_TOTAL, gm.MEMORY_RATIO, gm.MEMORY_RESERVED), self._memory),
            (HOT, (gm.UTILIZATION, gm.MEMORY_UTILIZATION), self._utilization),
            (CALM, (gm.TEMPERATURE,), self._temperature),
            (CALM, (gm.POWER,), self._power),
            (CALM, tuple(f"{gm.CLOCK} clock={name}" for name in _CLOCKS), self._clocks),
            (CALM, (gm.CLOCK_REASONS, *(f"{gm.THROTTLED} cause={name}" for name, _ in _CAUSES)), self._reasons),
            (CALM, (gm.ECC_ERRORS, gm.ECC_CORRECTED), self._ecc),
            (CALM, tuple(reading for reading, _, _, _ in _FIELDS), self._field_values),
            (SLOW, (gm.POWER_LIMIT,), self._power_limit),
            (
                SLOW,
                tuple(f"{gm.ECC_LIFETIME} kind={kind}" for kind in ("corrected", "uncorrected")),
                self._ecc_lifetime,
            ),
            (SLOW, (*_ROWS, gm.REMAP_PENDING, gm.REMAP_FAILED), self._rows),
            (SLOW, (gm.PCIE_GENERATION,), self._generation),
            (SLOW, (gm.PCIE_WIDTH,), self._width),
            (SLOW, (gm.FAN,), self._fan_speeds),
        )

    def ask(self, function: str, card: int, *arguments: Any, seat: Seat = Seat.POLL) -> Any:
        """The one way to call the library: noted before."""
        self._notes.call(seat, function, card)
        return getattr(self._library, function)(*arguments)

    # --- the start

    def start(self) -> str:
        """The driver's version. DriverError where there is none."""
        try:
            self.ask("nvmlInit", -1)
            return text(self.ask("nvmlSystemGetDriverVersion", -1))
        except self._library.NVMLError as error:
            raise driver_error(error) from None

    def cards(self, known: Iterable[Found], without: Iterable[int]) -> list[Card]:
        """Those that are known, by their place on the bus; all there are, where none is. `without` are left alone."""
        given = list(known)
        left_out = set(without)
        if given:
            return [self._look_up(found) for found in given if found.index not in left_out]
        try:
            count = self.ask("nvmlDeviceGetCount", -1)
        except self._library.NVMLError as error:
            raise driver_error(error) from None
        return [self._look_up(Found(index, "", "", "")) for index in range(count) if index not in left_out]

    def _look_up(self, found: Found) -> Card:
        """By its place on the bus where that is known: a look-up by UUID would wake the cards before it as well."""
        index = found.index
        try:
            if found.bus:
                handle = self.ask("nvmlDeviceGetHandleByPciBusId", index, found.bus)
            else:
                handle = self.ask("nvmlDeviceGetHandleByIndex", index, index)
            self._notes.call(Seat.POLL, "identity", index)
            bus = text(self._library.nvmlDeviceGetPciInfo(handle).busId)
            uuid, name = text(self._library.nvmlDeviceGetUUID(handle)), text(self._library.nvmlDeviceGetName(handle))
        except self._library.NVMLError as error:
            if error.value in DRIVER_ERRORS:
                raise driver_error(error) from None
            return Card(Found(index, found.uuid, found.name, found.bus, error.value, str(error)), None)
        return Card(Found(index, uuid, name, bus), handle)

    # --- samples

    def read(self, card: Card, scope: int) -> tuple[Values, int]:
        """(readings, how many were missing this time). CardError, DriverError."""
        values: Values = {}
        missing = 0
        if card.handle is None:
            raise CardError(card.found.code, card.found.text)
        if scope & SLOW:
            self._refresh(card)
        for number, (tier, readings, source) in enumerate(self._sources):
            if not tier & scope or (card.off and card.off.get(number, 0.0) > time.monotonic()):
                continue
            began = time.perf_counter() if self.spent is not None else 0.0
            try:
                values |= source(card)
            except self._library.NVMLError as error:
                missing += self._off(card, number, readings, error)
            else:
                if card.off.pop(number, None) is not None:
                    for reading in readings:
                        self._has(card, reading)
            if self.spent is not None:
                self.spent.setdefault(readings, []).append(time.perf_counter() - began)
        for labels, handle in card.migs if scope & HOT else ():
            try:
                values |= _mig(labels, self._memory_of(card, handle))
            except self._library.NVMLError as error:
                missing += self._failed(card, (gm.MIG_USED,), error)
        self._notes.rest(Seat.POLL)
        return values, missing

    def processes(self, card: Card) -> dict[int, tuple[int, float]]:
        """pid -> (bytes, or -1 where it is not told; share of time). One that computes and draws counts once."""
        library, index = self._library, card.found.index
        held: dict[int, tuple[int, float]] = {}
        asked = told = False
        for function in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
            for handle in [handle for _, handle in card.migs] or [card.handle]:
                try:
                    listed = self.ask(function, index, handle)
                except library.NVMLError as error:
                    reason = self._reason(error)
                    if reason:
                        self._lack(card, gm.PROCESS_MEMORY, reason)
                    continue
                asked = True
                for process in listed:
                    size = process.usedGpuMemory
                    known = size is not None and size != NOT_AVAILABLE
                    told = told or known
                    before = held.get(process.pid, (-1, 0.0))[0]
                    held[process.pid] = (max(before, size if known else -1), 0.0)
        if asked and (told or not held):
            self._has(card, gm.PROCESS_MEMORY)
        elif asked:
            self._lack(card, gm.PROCESS_MEMORY, "not-available")  # WSL, some MIG set-ups
        self._process_shares(card, held)
        self._notes.rest(Seat.POLL)
        return held

    def _process_shares(self, card: Card, held: dict[int, tuple[int, float]]) -> None:
        if self._is_lacking(card, gm.PROCESS_UTILIZATION):
            return
        try:
            found = self.ask("nvmlDeviceGetProcessUtilization", card.found.index, card.handle, card.utilization_since)
        except self._library.NVMLError as error:
            if error.value != NOT_FOUND:  # nothing ran since
                self._failed(card, (gm.PROCESS_UTILIZATION,), error)
            return
        for sample in found:
            if sample.pid in held:
                held[sample.pid] = (held[sample.pid][0], sample.smUtil / 100)
            card.utilization_since = max(card.utilization_since, sample.timeStamp)

    # --- what is lacking

    def _off(self, card: Card, number: int, readings: tuple[str, ...], error: Any) -> int:
        """A source failed. Where it is lacking it is not asked for a while."""
        missing = self._failed(card, readings, error)
        if not missing:
            card.off[number] = time.monotonic() + self._lacking_s
        return missing

    def _failed(self, card: Card, readings: tuple[str, ...], error: Any) -> int:
        """The readings that are missing this time: none where they are lacking for good."""
        if error.value in DRIVER_ERRORS:
            raise driver_error(error)
        if error.value in CARD_ERRORS:
            raise CardError(error.value, str(error))
        reason = self._reason(error)
        if not reason:
            return len(readings)
        for reading in readings:
            self._lack(card, reading, reason)
        return 0

    def _reason(self, error: Any) -> str:
        return LACKING.get(error.value, "")

    def _lack(self, card: Card, reading: str, reason: str) -> None:
        card.not_before[reading] = time.monotonic() + self._lacking_s
        if card.lacking.get(reading) != reason:
            card.lacking[reading] = reason
            card.tell_lacking = True

    def _has(self, card: Card, reading: str) -> None:
        if card.lacking.pop(reading, None) is not None:
            card.tell_lacking = True

    def _is_lacking(self, card: Card, reading: str) -> bool:
        if not card.lacking or reading not in card.lacking:
            return False
        if time.monotonic() < card.not_before[reading]:
            return True
        self._has(card, reading)
        return False

    # --- sources

    def _memory_of(self, card: Card, handle: Any) -> tuple[int, int, int, int]:
        """(used, free, total, reserved; -1 where the library is too old to tell it)."""
        library, index = self._library, card.found.index
        if card.memory_version:
            try:
                found = self.ask("nvmlDeviceGetMemoryInfo", index, handle, library.nvmlMemory_v2)
                return found.used, found.free, found.total, found.reserved
            except library.NVMLError as error:
                if LACKING.get(error.value) != "library-too-old":
                    raise
                card.memory_version = False
                self._lack(card, gm.MEMORY_RESERVED, "library-too-old")
        found = self.ask("nvmlDeviceGetMemoryInfo", index, handle)
        return found.used, found.free, found.total, -1

    def _memory(self, card: Card) -> Values:
        used, free, total, reserved = self._memory_of(card, card.handle)
        values: Values = {gm.MEMORY_USED: used, gm.MEMORY_FREE: free, gm.MEMORY_TOTAL: total}
        if reserved >= 0:
            values[gm.MEMORY_RESERVED] = reserved
        if total > 0:
            values[gm.MEMORY_RATIO] = 1 - free / total
        return values

    def _utilization(self, card: Card) -> Values:
        rates = self.ask("nvmlDeviceGetUtilizationRates", card.found.index, card.handle)
        return {gm.UTILIZATION: rates.gpu / 100, gm.MEMORY_UTILIZATION: rates.memory / 100}

    def _temperature(self, card: Card) -> Values:
        return {gm.TEMPERATURE: self.ask("nvmlDeviceGetTemperature", card.found.index, card.handle, 0)}

    def _power(self, card: Card) -> Values:
        return {gm.POWER: self.ask("nvmlDeviceGetPowerUsage", card.found.index, card.handle) / 1000}

    def _power_limit(self, card: Card) -> Values:
        return {gm.POWER_LIMIT: self.ask("nvmlDeviceGetEnforcedPowerLimit", card.found.index, card.handle) / 1000}

    def _clocks(self, card: Card) -> Values:
        index, handle = card.found.index, card.handle
        return {
            f"{gm.CLOCK} clock={name}": self.ask("nvmlDeviceGetClockInfo", index, handle, number) * 1e6
            for number, name in enumerate(_CLOCKS)
        }

    def _reasons(self, card: Card) -> Values:
        bits = self.ask("nvmlDeviceGetCurrentClocksEventReasons", card.found.index, card.handle)
        return {gm.CLOCK_REASONS: bits} | {f"{gm.THROTTLED} cause={n}": float(bool(bits & m)) for n, m in _CAUSES}

    def _ecc(self, card: Card) -> Values:
        index, handle = card.found.index, card.handle
        errors = [self.ask("nvmlDeviceGetTotalEccErrors", index, handle, kind, 0) for kind in (1, 0)]
        return {gm.ECC_ERRORS: errors[0], gm.ECC_CORRECTED: errors[1]}

    def _ecc_lifetime(self, card: Card) -> Values:
        index, handle = card.found.index, card.handle
        return {
            f"{gm.ECC_LIFETIME} kind={name}": self.ask("nvmlDeviceGetTotalEccErrors", index, handle, kind, 1)
            for kind, name in enumerate(("corrected", "uncorrected"))
        }

    def _rows(self, card: Card) -> Values:
        found = self.ask("nvmlDeviceGetRemappedRows", card.found.index, card.handle)
        return dict(zip((*_ROWS, gm.REMAP_PENDING, gm.REMAP_FAILED), found, strict=True))

    def _generation(self, card: Card) -> Values:
        return {gm.PCIE_GENERATION: self.ask("nvmlDeviceGetCurrPcieLinkGeneration", card.found.index, card.handle)}

    def _width(self, card: Card) -> Values:
        return {gm.PCIE_WIDTH: self.ask("nvmlDeviceGetCurrPcieLinkWidth", card.found.index, card.handle)}

    def _fan_speeds(self, card: Card) -> Values:
        index, handle = card.found.index, card.handle
        if not card.fans:
            card.fans = self.ask("nvmlDeviceGetNumFans", index, handle)
        return {
            f"{gm.FAN} fan={fan}": self.ask("nvmlDeviceGetFanSpeed_v2", index, handle, fan) / 100
            for fan in range(card.fans)
        }

    def _field_values(self, card: Card) -> Values:
        """Many readings in one call. A field that this card lacks is not asked for again before the next minute."""
        asked = [(field, scope) for _, field, scope, _ in card.fields]
        if not asked:
            return {}
        values: Values = {}
        left = []
        found = self.ask("nvmlDeviceGetFieldValues", card.found.index, card.handle, asked)
        for wanted, (kind, code, raw) in zip(card.fields, _FIELD.iter_unpack(found), strict=True):
            reading, _, _, factor = wanted
            if code == 0 and kind < len(_UNION):
                values[reading] = _UNION[kind].unpack(raw)[0] * factor
            elif (reason := "unknown-type" if code == 0 else LACKING.get(code)) is not None:
                self._lack(card, reading, reason)
                continue
            left.append(wanted)
        card.fields = left
        return values

    def _refresh(self, card: Card) -> None:
        """What may have changed in some seconds: fields that were lacking, the MIG instances."""
        now = time.monotonic()
        for wanted in _FIELDS:
            if wanted not in card.fields and card.not_before.get(wanted[0], 0.0) <= now:
                self._has(card, wanted[0])
                card.fields.append(wanted)
        library, index = self._library, card.found.index
        card.migs = []
        if self._is_lacking(card, gm.MIG_USED):
            return
        try:
            mode, _ = self.ask("nvmlDeviceGetMigMode", index, card.handle)
            for number in range(library.nvmlDeviceGetMaxMigDeviceCount(card.handle) if mode else 0):
                handle = self.ask("nvmlDeviceGetMigDeviceHandleByIndex", index, card.handle, number)
                instance = (
                    f"{library.nvmlDeviceGetGpuInstanceId(handle)}/{library.nvmlDeviceGetComputeInstanceId(handle)}"
                )
                card.migs.append((f"mig={text(library.nvmlDeviceGetUUID(handle))} instance={instance}", handle))
        except library.NVMLError as error:
            if error.value != NOT_FOUND:  # the instances there are come first
                self._failed(card, (gm.MIG_USED,), error)


_ROWS = tuple(f"{gm.REMAPPED_ROWS} cause={cause}" for cause in ("correctable", "uncorrectable"))


def _mig(labels: str, memory: tuple[int, int, int, int]) -> Values:
    used, free, total, _ = memory
    values: Values = {
        f"{gm.MIG_USED} {labels}": used,
        f"{gm.MIG_FREE} {labels}": free,
        f"{gm.MIG_TOTAL} {labels}": total,
    }
    if total > 0:
        values[f"{gm.MIG_RATIO} {labels}"] = 1 - free / total
    return values


def driver_error(error: Any) -> DriverError:
    return DriverError(error.value, str(error))


def text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value  # older bindings give bytes
