"""Which call each thread of a sampler is in, written into shared memory before the call, and judged by another process.

A call into a sick driver may never come back, and then nobody in that process can tell. So each of the sampler's two
threads has a seat of 16 bytes: what it calls, of which card, and since when (CLOCK_MONOTONIC, the same in both
processes). The one who looks needs nothing of the one who is stuck. The start is written first: who reads a note that
is half written takes a call for younger than it is, never for older.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum

_SEAT = struct.Struct("=dhhi")  # since, function, card, (unused)
SIZE = mmap.PAGESIZE
IDLE = -1  # as a function: between calls
NO_CARD = -1  # of the library as a whole

CALL_DEADLINE_S = 0.4  # of one reading: they take microseconds to 100 ms, also of a card under load
START_DEADLINE_S = 10.0  # to wake a card that sleeps (no persistence mode) takes seconds
WAIT_S = 2.0  # for events at a time: a wait that is over by itself shows that the driver still answers


class Seat(IntEnum):
    POLL = 0
    EVENTS = 1


@dataclass(frozen=True)
class Note:
    """`since`: seconds of CLOCK_MONOTONIC. `card`: its index, or NO_CARD."""

    function: str
    card: int
    since: float


# What is noted, by number. The ones that may wake a card up stand first.
STARTING = (
    "nvmlInit",
    "nvmlDeviceGetCount",
    "nvmlSystemGetDriverVersion",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetHandleByPciBusId",
    "nvmlDeviceRegisterEvents",
    "nvmlEventSetCreate",
    "nvmlShutdown",
)
WAITING = "nvmlEventSetWait_v2"
FUNCTIONS = (
    *STARTING,
    WAITING,
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetTotalEccErrors",
    "nvmlDeviceGetRemappedRows",
    "nvmlDeviceGetFieldValues",
    "nvmlDeviceGetCurrPcieLinkGeneration",
    "nvmlDeviceGetCurrPcieLinkWidth",
    "nvmlDeviceGetNumFans",
    "nvmlDeviceGetFanSpeed_v2",
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetProcessUtilization",
    "nvmlDeviceGetMigMode",
    "nvmlDeviceGetMigDeviceHandleByIndex",
    "identity",
)
NUMBER = {name: number for number, name in enumerate(FUNCTIONS)}


class CallNotes:
    """The notes of one sampler. The descriptor is inherited by the sampler, which opens it by number."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("interlock-notes", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, SIZE)
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, SIZE)
        for seat in Seat:
            self.rest(seat)

    def call(self, seat: Seat, function: str, card: int = NO_CARD) -> None:
        """Before a call."""
        _SEAT.pack_into(self._map, seat * _SEAT.size, time.monotonic(), NUMBER[function], card, 0)

    def rest(self, seat: Seat) -> None:
        """After the last of some calls."""
        _SEAT.pack_into(self._map, seat * _SEAT.size, time.monotonic(), IDLE, NO_CARD, 0)

    def read(self, seat: Seat) -> Note | None:
        """The call that the thread is in; None between calls."""
        since, function, card, _ = _SEAT.unpack_from(self._map, seat * _SEAT.size)
        return None if not 0 <= function < len(FUNCTIONS) else Note(FUNCTIONS[function], card, since)

    def since(self, seat: Seat) -> float:
        """When the thread noted anything last."""
        since: float = _SEAT.unpack_from(self._map, seat * _SEAT.size)[0]
        return since

    def close(self) -> None:
        self._map.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def deadline(note: Note, call_s: float = CALL_DEADLINE_S, start_s: float = START_DEADLINE_S) -> float:
    """When this call is overdue, in seconds of CLOCK_MONOTONIC."""
    if note.function in STARTING:
        return note.since + start_s
    return note.since + call_s + (WAIT_S if note.function == WAITING else 0.0)
