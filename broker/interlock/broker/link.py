"""The one connection of a role to the event plane: publications go out in order, acknowledgements and replays come."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import trio

from interlock.broker import wire
from interlock.broker.bus import Receipts
from interlock.broker.errors import UnknownVersion, WireError
from interlock.broker.outbox import Entry, Outbox
from interlock.broker.outbox_file import Keeper, OutboxFile
from interlock.broker.protocol import (
    Ack,
    Nack,
    Ping,
    Pong,
    Receipt,
    Received,
    Replay,
    Replayed,
    ReplayEvent,
    ReplayEvents,
    ReplayFailed,
    Watch,
    decode_answer,
    decode_events,
    decode_trail,
)
from interlock.broker.rejects import Rejects
from interlock.broker.sequence import Arrival, Page
from interlock.broker.sockets import Sockets
from interlock.broker.version import check, check_meets
from interlock.broker.wire import Event

WATCH_FIRST_S = 0.05  # a command that is just being logged is known after some milliseconds,
WATCH_S = 1.0  # and what was lost is told again after this

_log = logging.getLogger(__name__)

Arrived = Arrival[Event | None]  # None: an event whose body is of no type known here
Answered = Callable[[Page[Event | None] | None], None]  # None: the broker can't read its log


class Mismatch:
    """Whether the broker speaks no version of the wire format that this program does; what it says of it itself.

    All connections of a role tell it here. Nothing ends by it: the broker, or this program, may be updated.
    """

    def __init__(self) -> None:
        self.why = ""
        self._said = trio.Event()

    def say(self, why: str) -> None:
        if why != self.why:
            _log.error("the broker and this program don't understand each other: %s", why)
        self.why = why
        self._said.set()

    def over(self) -> None:
        """It has understood something."""
        if self.why:
            _log.warning("the broker and this program understand each other again")
            self.why, self._said = "", trio.Event()

    async def said(self) -> str:
        """Wait until there is one, and return what it is."""
        await self._said.wait()
        return self.why


class _Asked:
    def __init__(self, after: int | None, answered: Answered) -> None:
        self.after = after
        self.answered = answered
        self.events: list[Arrived] = []


class Link:
    """A DEALER to the event plane's ingress, what waits to be sent there, and who waits for answers."""

    def __init__(self, sockets: Sockets, endpoint: str, mismatch: Mismatch, file: OutboxFile | None = None) -> None:
        self.mismatch = mismatch
        self._socket = sockets.open("dealer", connect=endpoint, receive_limit=0, label=f"events {endpoint}")
        self._rejects = Rejects(f"events {endpoint}")
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count(1)
        self._outcomes: dict[str, list[Callable[[int | str], None]]] = {}
        self._settled = trio.lowlevel.ParkingLot()
        self._watched: dict[str, Receipts] = {}
        self._changed = trio.Event()
        self.outbox = Outbox()
        self._keeper = Keeper(file) if file is not None else None
        for entry in file.entries if file is not None else ():
            self.outbox.add(entry)

    # --- publishing

    def post(self, entry: Entry) -> None:
        if self._keeper is not None:
            self._keeper.keep(entry)
        self._add(entry)

    def _add(self, entry: Entry) -> None:
        self.outbox.add(entry)
        self._send_due()
        self._changed.set()

    async def publish(self, entry: Entry) -> int | str:
        """Its number once it is logged, or why it was refused. A cancelled one is not sent (again)."""
        outcome: list[int | str] = []
        done = trio.Event()

        def settle(result: int | str) -> None:
            outcome.append(result)
            done.set()

        waiting = self._outcomes.setdefault(entry.id, [])
        waiting.append(settle)
        mine = entry.id not in self.outbox
        self._add(entry)
        try:
            await done.wait()
        finally:
            waiting.remove(settle)
            if not waiting:
                self._outcomes.pop(entry.id, None)
            if mine and not outcome and self.outbox.withdraw(entry.id, trio.current_time()):
                self._settled.unpark_all()
        return outcome[0]

    async def flushed(self) -> None:
        waiting = self.outbox.ids()
        while any(id in self.outbox for id in waiting):
            await self._settled.park()

    async def taken(self) -> None:
        """Every post so far outlives this process."""
        if self._keeper is None:
            await self.flushed()
        else:
            await self._keeper.kept()

    def _send_due(self) -> None:
        now = trio.current_time()
        for request, entry in self.outbox.due(now):
            if not self._socket.send_nowait([wire.encode(request), *entry.frames]):
                return
            self.outbox.sent(entry.id, now)

    # --- receipts

    def receipt(self, source: str, command: str, reason: str) -> None:
        """Say once that a command was taken or refused."""
        self._socket.send_nowait([wire.encode(Receipt(source, command, reason))])

    @asynccontextmanager
    async def watching(self, command: str) -> AsyncIterator[Receipts]:
        """Ask who has taken a command, again and again: an answer may be lost, and the broker restarted."""
        if command in self._watched:
            raise RuntimeError(f"{command} is watched already")
        receipts = self._watched[command] = Receipts()

        async def ask() -> None:
            pause = WATCH_FIRST_S
            while True:
                self._socket.send_nowait([wire.encode(Watch(command))])
                await trio.sleep(pause)
                pause = min(2 * pause, WATCH_S)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                yield receipts
                nursery.cancel_scope.cancel()
        finally:
            del self._watched[command]

    # --- replays

    def ask(self, after: int | None, prefixes: Sequence[str], answered: Answered) -> int:
        """Ask for what the log has after a number (None: only where it ends). `answered` may never be called."""
        number = next(self._numbers)
        request = Ping(request=number) if after is None else Replay(number, after, list(prefixes))
        if self._socket.send_nowait([wire.encode(request)]):
            self._asked[number] = _Asked(after, answered)
        return number

    def forget(self, number: int) -> None:
        self._asked.pop(number, None)

    # --- the two tasks

    async def run(self) -> None:
        self._send_due()  # what an earlier process left
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            nursery.start_soon(self._keep_time)
            if self._keeper is not None:
                nursery.start_soon(self._keeper.run)

    async def _receive(self) -> None:
        while True:
            for frames in await self._socket.receive_batch():
                try:
                    self._take(frames)
                except WireError as error:
                    self._rejects.count("what is not an answer", error)
            self._send_due()
            self._changed.set()

    async def _keep_time(self) -> None:
        while True:
            self._changed = trio.Event()
            with trio.move_on_at(self.outbox.deadline()):
                await self._changed.wait()
                continue
            if self.outbox.tick(trio.current_time()):
                self._socket.send_nowait([wire.encode(Ping())])
            self._send_due()

    def _take(self, frames: list[bytes]) -> None:
        answer = decode_answer(frames[0])
        now = trio.current_time()
        self.outbox.heard()
        match answer:
            case Ack():
                self.mismatch.over()
                if self.outbox.acked(answer.id, now):
                    self._settle(answer.id, answer.seq)
            case Nack():
                doubt = self.outbox.in_doubt(answer)  # then who waits for a number learns nothing yet
                if self.outbox.nacked(answer, now):
                    self._settle(answer.id, answer.reason, silent=doubt)
                elif answer.kind in ("log", "version"):
                    self._refuse_publications(answer, silent=doubt)
                if answer.kind == "version":
                    self.mismatch.say(answer.reason)
            case ReplayEvent():
                self._collect(answer.request, [frames[1:]])
            case ReplayEvents():
                self._collect(answer.request, decode_events(frames[1] if len(frames) == 2 else b""))
            case Received():
                if (receipts := self._watched.get(answer.command)) is not None:
                    receipts.add(answer.by)
            case Replayed() | Pong() | ReplayFailed():
                self._close_page(answer)

    def _settle(self, id: str, outcome: int | str, *, silent: bool = False) -> None:
        if self._keeper is not None:
            self._keeper.settled(id)
        waiting = self._outcomes.get(id)
        if waiting is None and isinstance(outcome, str):
            _log.error("the broker refused a posted event for good: %s", outcome)
        for settle in () if silent else waiting or ():
            settle(outcome)
        self._settled.unpark_all()

    def _refuse_publications(self, nack: Nack, *, silent: bool) -> None:
        """Who waits for a number learns at once that the log can't be written; what was posted is repeated, and what
        may be there all the same.
        """
        refused = nack.id in self._outcomes and not silent
        for settle in self._outcomes.get(nack.id, ()) if refused else ():
            settle(nack.reason)
        if refused:
            self.outbox.withdraw(nack.id, trio.current_time())
            self._settled.unpark_all()
        else:
            self._rejects.count("(for now) a post that the broker can't write", nack.reason)

    def _collect(self, request: int, events: Iterable[Sequence[bytes]]) -> None:
        asked = self._asked.get(request)
        if asked is not None:
            asked.events += [read_arrival(frames, self._rejects, live=False) for frames in events]

    def _close_page(self, answer: Replayed | Pong | ReplayFailed) -> None:
        asked = self._asked.pop(answer.request, None)
        if asked is None:
            return
        match answer:
            case Replayed():
                self.mismatch.over()
                if answer.count == len(asked.events):
                    asked.answered(_page(asked, answer))
            case Pong():
                try:
                    check_meets(answer.speaks, "the broker")
                except UnknownVersion as error:
                    self.mismatch.say(str(error))
                    asked.answered(None)
                    return
                self.mismatch.over()
                asked.answered(Page(None, [], answer.seq, False, answer.log))
            case ReplayFailed():
                if answer.kind == "version":
                    self.mismatch.say(answer.reason)
                self._rejects.count("(for now) a replay that the broker can't read", answer.reason)
                asked.answered(None)


def _page(asked: _Asked, answer: Replayed) -> Page[Event | None]:
    events, snapshot = asked.events, None
    if answer.snapshot and events:
        snapshot, *events = events
    return Page(asked.after, events, answer.through, answer.more, answer.log, answer.start, snapshot)


def read_arrival(frames: Sequence[bytes], rejects: Rejects, *, live: bool = True) -> Arrived:
    """The frames of an event, if it is a live one with its trail. One of a type or version unknown here keeps its
    place.
    """
    if len(frames) != 3:
        raise WireError(f"an event has 3 frames, this has {len(frames)}")
    topic, header = wire.decode_topic(frames[0]), wire.decode_header(frames[1])
    payload = None
    try:
        check(header.v, "event")
        payload = Event(topic, header, wire.decode_body(frames[2]), frames[2])
    except UnknownVersion as error:
        rejects.count("an event of an unknown version", error)
    except WireError as error:
        rejects.count("an event body", error)
    if not live:
        return Arrival(topic, header.seq, payload)
    trail = decode_trail(frames[1])
    return Arrival(topic, header.seq, payload, trail.since, trail.recent)
