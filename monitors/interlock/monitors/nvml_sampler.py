"""The process that asks the driver, so that the monitor itself never does. Started by `nvidia.py`, for it alone.

One thread polls when it is told to, one waits for events; the main thread only waits for the pipe to close, and then
ends the process, whatever the others are stuck in. No event loop: everything in here blocks, that is its purpose.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from typing import Any, NoReturn

import msgspec

from interlock.monitors import gpu_metrics as gm
from interlock.monitors import nvml
from interlock.monitors.call_notes import WAIT_S, CallNotes, Seat
from interlock.monitors.nvml_frames import (
    CALM,
    LENGTH,
    SLOW,
    CardRead,
    Failed,
    Found,
    FromSampler,
    Happened,
    Lacking,
    Opened,
    Poll,
    Read,
    Table,
    pack,
)

RETRY_LACKING_S = 60.0  # a permission may be given, a mode be changed
PATIENCE_S = 0.02  # what the readings of other cards may wait for those of a slow one
LIBRARY_NOT_FOUND = 12  # NVML's code
# XID, double-bit ECC, MIG changes, an ECC storm, DRAM retirements, poison, a card that is gone, a recovery that is due
EVENT_TYPES = 0x8 | 0x2 | 0x100 | 0x200 | 0x400 | 0x800 | 0x1000 | 0x2000 | 0x4000 | 0x8000
TIMEOUT = 10  # NVML's code
PAUSE_S = 1.0  # between attempts to wait, where waiting fails at once


class Order(msgspec.Struct, frozen=True):
    """What a sampler is to do. No `known` cards: all there are. `without`: indices of cards it must not touch."""

    notes: int
    known: list[Found] = []
    without: list[int] = []
    lacking_s: float = RETRY_LACKING_S
    events: bool = True


class Sampler:
    def __init__(self, order: Order, library: Any) -> None:
        self._order = order
        self._library = library
        self._notes = CallNotes(order.notes)
        self._session = nvml.Session(library, self._notes, order.lacking_s)
        self._out = threading.Lock()
        self._tables: dict[tuple[int, tuple[str, ...]], int] = {}
        self._last_seconds: dict[int, float] = {}
        self._slow_at = 0.0
        self._cards: list[nvml.Card] = []

    def say(self, frame: FromSampler) -> None:
        raw = pack(frame)
        with self._out:
            while raw:
                raw = raw[os.write(1, raw) :]

    def poll_forever(self) -> None:
        """The polling thread."""
        try:
            driver = self._session.start()
            self._cards = self._session.cards(self._order.known, self._order.without)
            self._notes.rest(Seat.POLL)
            self.say(Opened(driver, [card.found for card in self._cards]))
            if self._order.events:
                threading.Thread(target=_or_die(self.events_forever), daemon=True).start()
            while True:
                self._poll(_receive())
        except nvml.DriverError as error:
            self.say(Failed(error.code, error.text))
            os._exit(0)

    def _poll(self, poll: Poll) -> None:
        scope = poll.scope
        now = time.monotonic()
        if scope & CALM and now >= self._slow_at:
            scope |= SLOW
            self._slow_at = now + gm.SLOW_S - 0.5  # half a beat early, so that a beat of 1 s meets it
        self._cards.sort(key=lambda card: self._last_seconds.get(card.found.index, 0.0) > PATIENCE_S)  # slow ones last
        read: list[CardRead] = []
        since = now
        for card in self._cards:
            slow = self._last_seconds.get(card.found.index, 0.0) > PATIENCE_S
            if read and (slow or time.monotonic() - since > PATIENCE_S):
                self.say(Read(poll.tick, False, read))
                read, since = [], time.monotonic()
            read.append(self._read(card, scope))
        self.say(Read(poll.tick, True, read))

    def _read(self, card: nvml.Card, scope: int) -> CardRead:
        index, began, asked = card.found.index, time.monotonic(), time.time()
        try:
            values, missing = self._session.read(card, scope)
            processes = self._session.processes(card) if scope & CALM else None
        except nvml.CardError as error:
            self._notes.rest(Seat.POLL)
            return CardRead(index, asked, time.monotonic() - began, scope, 0, [], code=error.code, text=error.text)
        if card.tell_lacking:
            self.say(Lacking(index, dict(card.lacking)))
            card.tell_lacking = False
        self._last_seconds[index] = seconds = time.monotonic() - began
        table = self._table(index, tuple(values))
        return CardRead(index, asked, seconds, scope, table, list(values.values()), processes, missing)

    def _table(self, index: int, keys: tuple[str, ...]) -> int:
        found = self._tables.get((index, keys))
        if found is None:
            found = self._tables[index, keys] = len(self._tables) + 1
            self.say(Table(found, list(keys)))
        return found

    # --- events

    def events_forever(self) -> None:
        """The events thread."""
        library, ask = self._library, self._session.ask
        try:
            waiting = ask("nvmlEventSetCreate", -1, seat=Seat.EVENTS)
        except library.NVMLError:
            waiting = None
        places: dict[str, int] = {}
        for card in self._cards:
            if card.handle is None:
                continue
            try:
                self._register(card, waiting)
            except library.NVMLError as error:
                card.lacking[gm.EVENTS] = nvml.LACKING.get(error.value, "not-available")
                card.not_before[gm.EVENTS] = float("inf")
                card.tell_lacking = True
            else:
                places[card.found.bus] = card.found.index
        if not places:
            self._notes.rest(Seat.EVENTS)
            return
        while True:
            self._wait(waiting, places)

    def _register(self, card: nvml.Card, waiting: Any) -> None:
        if waiting is None:
            raise self._library.NVMLError(3)
        self._notes.call(Seat.EVENTS, "nvmlDeviceRegisterEvents", card.found.index)
        wanted = self._library.nvmlDeviceGetSupportedEventTypes(card.handle) & EVENT_TYPES
        self._library.nvmlDeviceRegisterEvents(card.handle, wanted, waiting)

    def _wait(self, waiting: Any, places: dict[str, int]) -> None:
        library = self._library
        try:
            found = self._session.ask("nvmlEventSetWait_v2", -1, waiting, round(WAIT_S * 1000), seat=Seat.EVENTS)
        except library.NVMLError as error:
            self._notes.rest(Seat.EVENTS)
            if error.value != TIMEOUT:
                time.sleep(PAUSE_S)  # the polling thread meets the same error, and says so
            return
        happened = time.time()
        self._notes.call(Seat.EVENTS, "identity")
        try:
            bus = nvml.text(library.nvmlDeviceGetPciInfo(found.device).busId)
        except library.NVMLError:
            bus = ""  # the card is gone; if it is the only one, it was that
        index = places.get(bus, next(iter(places.values())) if len(places) == 1 else -1)
        self.say(Happened(index, found.eventType, found.eventData, happened))


def _receive() -> Poll:
    """The next order. Ends the process where the pipe has."""
    raw = _exactly(LENGTH.size)
    return msgspec.msgpack.decode(_exactly(LENGTH.unpack(raw)[0]), type=Poll)


def _exactly(count: int) -> bytes:
    raw = b""
    while len(raw) < count:
        piece = os.read(0, count - len(raw))
        if not piece:
            os._exit(0)
        raw += piece
    return raw


def _or_die(target: Any) -> Any:
    """A defect in a thread ends the process: silence would look like a driver that hangs."""

    def run() -> None:
        try:
            target()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)

    return run


def main() -> NoReturn:
    order = msgspec.json.decode(sys.argv[1], type=Order)
    try:
        library = nvml.load()
    except ImportError as error:
        raw = pack(Failed(LIBRARY_NOT_FOUND, f"the NVML binding can't be imported: {error}; install nvidia-ml-py"))
        os.write(1, raw)
        os._exit(0)
    sampler = Sampler(order, library)
    threading.Thread(target=_or_die(sampler.poll_forever), daemon=True).start()
    closed = select.poll()
    closed.register(0, 0)  # no event but the end of the other side
    closed.poll()
    os._exit(0)


if __name__ == "__main__":
    main()
