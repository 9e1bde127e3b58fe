"""Which call each thread of a sampler is in, written into shared memory before the call, and judged by another process.

A call into a sick driver may never come back, and then nobody in that process can tell. So each of the sampler's two
threads has a seat of 16 bytes: what it calls, of which card, and since when (CLOCK_MONOTONIC, the same in both
processes). The one who looks needs nothing of the one who is stuck. A note that is being written says so until it
is whole, which takes a microsecond; one that stays so counts as none.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from enum import IntEnum

SIZE = mmap.PAGESIZE
WRITING, IDLE = 0, -1  # in place of a function's number: the note is not whole; between calls
NO_CARD = -1  # of the library as a whole

CALL_DEADLINE_S = 0.4  # of one reading: they take microseconds to 100 ms, also of a card under load
START_DEADLINE_S = 10.0  # to wake a card that sleeps (no persistence mode) takes seconds
WAIT_S = 2.0  # for events at a time: a wait that is over by itself shows that the driver still answers


ATTEMPTS = 100  # to read a note while it is written


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
NUMBER = {name: number for number, name in enumerate(FUNCTIONS, 1)}


class CallNotes:
    """The notes of one sampler. The descriptor is inherited by the sampler, which opens it by number."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("interlock-notes", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, SIZE)
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, SIZE)
        self._since = memoryview(self._map).cast("d")  # by seat: 0, 2; each store is one of the processor's
        self._words = memoryview(self._map).cast("i")  # by seat: function 2, 6; card 3, 7
        for seat in Seat:
            self.rest(seat)

    def call(self, seat: Seat, function: str, card: int = NO_CARD) -> None:
        """Before a call."""
        self._write(seat, NUMBER[function], card)

    def rest(self, seat: Seat) -> None:
        """After the last of some calls."""
        self._write(seat, IDLE, NO_CARD)

    def read(self, seat: Seat) -> Note | None:
        """The call that the thread is in; None between calls."""
        for _ in range(ATTEMPTS):
            function = self._words[4 * seat + 2]
            card, since = self._words[4 * seat + 3], self._since[2 * seat]
            if function == self._words[4 * seat + 2] and 0 < function <= len(FUNCTIONS):
                return Note(FUNCTIONS[function - 1], card, since)
            if function == IDLE:
                break
        return None

    def since(self, seat: Seat) -> float:
        """When the thread noted anything last."""
        return self._since[2 * seat]

    def close(self) -> None:
        if self.descriptor >= 0:
            self._since.release()
            self._words.release()
            self._map.close()
            os.close(self.descriptor)
            self.descriptor = -1

    def _write(self, seat: Seat, function: int, card: int) -> None:
        words = self._words
        words[4 * seat + 2] = WRITING
        words[4 * seat + 3] = card
        self._since[2 * seat] = time.monotonic()
        words[4 * seat + 2] = function


def deadline(note: Note, call_s: float = CALL_DEADLINE_S, start_s: float = START_DEADLINE_S) -> float:
    """When this call is overdue, in seconds of CLOCK_MONOTONIC."""
    if note.function in STARTING:
        return note.since + start_s
    if note.function == WAITING:  # nothing is measured there: what hangs shows at the polls first
        return note.since + WAIT_S + start_s
    return note.since + call_s
