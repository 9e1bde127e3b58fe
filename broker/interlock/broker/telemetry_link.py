"""The one connection of a role to the telemetry plane's ingress: batches go out, what the plane remembers comes back.

While there is no connection, batches wait in the backlog, and leave afterwards in their order, marked with how late
they are. What a connection took before it ended goes first: also if the next one was there before anything was sent.
Nobody ever waits for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import msgspec
import trio

from interlock.broker import wire
from interlock.broker.backlog import MARK_LATE_S, Backlog, Counts, Entry
from interlock.broker.connections import Happening
from interlock.broker.errors import WireError
from interlock.broker.link import Mismatch
from interlock.broker.rejects import Rejects
from interlock.broker.samples import Batch
from interlock.broker.sockets import Sockets
from interlock.broker.telemetry_protocol import AskFailed, AskLast, Page, decode_answer

# Batches that the connection itself may hold: 2 MB at most of a large host, for the 2 s that a half-open connection is
# believed in.
LINK_QUEUE = 256

_Answered = Callable[[list[list[bytes]], bool], None]  # batches as [topic, batch], and whether more follow


class _Asked:
    def __init__(self, answered: _Answered) -> None:
        self.answered = answered
        self.pages = 0


class TelemetryLink:
    """Owned by the bus of a role; `run` ends with it."""

    def __init__(self, sockets: Sockets, endpoint: str, mismatch: Mismatch, *, label: str) -> None:
        self.mismatch = mismatch
        self._socket = sockets.open(
            "dealer", connect=endpoint, send_limit=LINK_QUEUE, immediate=True, watched=True, label=f"{label} telemetry"
        )
        self._rejects = Rejects(f"{label} telemetry")
        self._backlog = Backlog()
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._stalled = trio.Event()
        self._joined = trio.Event()
        self._joined.set()  # until it ends for the first time, the socket knows

    @property
    def waiting(self) -> int:
        """Batches that wait for a connection."""
        return len(self._backlog)

    def put(self, topic: bytes, batch: Batch, counts: Counts) -> None:
        """Send it now or as soon as possible."""
        self._backlog.add(Entry(topic, batch, counts, trio.current_time()))
        if not self._stalled.is_set():
            self._send_waiting()

    def ask(self, prefixes: Sequence[str], answered: _Answered) -> int:
        """Ask what the plane remembers; `answered` gets page after page, and may never be called."""
        number = next(self._numbers)
        if self._socket.send_nowait([wire.encode(AskLast(number, list(prefixes)))]):
            self._asked[number] = _Asked(answered)
        return number

    def forget(self, number: int) -> None:
        self._asked.pop(number, None)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            nursery.start_soon(self._catch_up)
            nursery.start_soon(self._follow)

    async def _receive(self) -> None:
        while True:
            for frames in await self._socket.receive_batch():
                try:
                    self._take(*decode_answer(frames))
                except WireError as error:
                    self._rejects.count("what is no answer", error)

    async def _catch_up(self) -> None:
        """Once the connection takes no more: go on as soon as it does, or there is another."""
        while True:
            await self._stalled.wait()
            await self._joined.wait()
            await self._socket.until_writable()
            self._look()
            if self._joined.is_set():
                self._stalled = trio.Event()
                self._send_waiting()

    async def _follow(self) -> None:
        """Repeat what a connection that has ended may not have delivered, though nothing else is to be sent."""
        while True:
            self._look()
            await self._socket.until_happened()

    def _look(self) -> None:
        """Learn whether the connection has ended, and whether there is another."""
        for what, _ in self._socket.happened():
            if what is Happening.JOINED:
                self._joined.set()
            elif self._joined.is_set():
                self._backlog.broken(trio.current_time())
                self._joined = trio.Event()
                self._stalled.set()

    def _send_waiting(self) -> None:
        self._look()
        while not self._stalled.is_set():
            now = trio.current_time()
            entry = self._backlog.next(now)
            if entry is None:
                return
            batch, late = entry.batch, now - entry.taken
            if late >= MARK_LATE_S:
                batch = msgspec.structs.replace(batch, delay=batch.delay + late)
            if not self._socket.send_nowait([entry.topic, wire.encode(batch)]):
                self._stalled.set()
                return
            self._backlog.sent(now)

    def _take(self, page: Page | AskFailed, batches: list[list[bytes]]) -> None:
        if isinstance(page, AskFailed):  # whoever asked does so again
            if page.kind == "version":
                self.mismatch.say(page.reason)
            self._rejects.count("(for now) what the plane remembers: it refuses", page.reason)
            return
        asked = self._asked.get(page.request)
        if asked is None or page.page != asked.pages + 1:  # one was lost: whoever asked does so again
            return
        asked.pages += 1
        if not page.more:
            del self._asked[page.request]
        asked.answered(batches, page.more)
