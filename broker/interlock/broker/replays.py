"""Answers to replays: those who ask take turns, and who does not read its answers gets no further ones."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Literal

import msgspec
import trio

from interlock.broker import wire
from interlock.broker.errors import LogError
from interlock.broker.fair import Fair, Unread
from interlock.broker.log import EventLog, Excerpt
from interlock.broker.protocol import (
    MAX_PREFIXES,
    PAGE_BYTES,
    PAGE_EVENTS,
    Answer,
    Replay,
    Replayed,
    ReplayFailed,
    answers,
)
from interlock.broker.rejects import Rejects
from interlock.broker.sockets import Socket

REPLAYS = 4096  # requests that wait; one that finds no room is asked again by its client after 2 s
KEY_REPLAYS = 64  # the same of one key: one for each of its connections, and a role has three feeds or so
KEY_UNREAD = 16 << 20  # bytes of answers that one key has not read: 4 pages
ALL_UNREAD = 1 << 30  # bytes of answers that nobody has read yet: 250 pages
MARK_BYTES = 64 << 10  # of an answer, between looks at how far it has been read: each costs 10 us


class _Wanted(msgspec.Struct, frozen=True):
    key: Hashable
    peer: bytes
    request: Replay


class Replays:
    """Takes requests, and answers them one after another. `run` serves until cancelled."""

    def __init__(self, ingress: Socket, log: EventLog, rejects: Rejects) -> None:
        self._ingress = ingress
        self._log = log
        self._rejects = rejects
        self._waiting: Fair[_Wanted] = Fair(items=REPLAYS, cost=2 * REPLAYS, quantum=1, own=KEY_REPLAYS)
        self._asked = trio.lowlevel.ParkingLot()
        self._unread = Unread(own=KEY_UNREAD, total=ALL_UNREAD)

    def ask(self, key: Hashable, peer: bytes, request: Replay) -> None:
        """Somebody asks. `key`: who shares the limits with it."""
        if len(request.prefixes) > MAX_PREFIXES or any(not prefix.isascii() for prefix in request.prefixes):
            self._fail(peer, request, f"more than {MAX_PREFIXES} prefixes, or not ASCII", "invalid")
        elif not self._waiting.put(key, _Wanted(key, peer, request)):
            self._rejects.count("(for now) a replay request: too many at once")
            self._fail(peer, request, f"too many replays wait, at most {KEY_REPLAYS} of one key: ask again later")
        else:
            self._asked.unpark()

    async def run(self) -> None:
        while True:
            while not self._waiting:
                await self._asked.park()
            for wanted in self._waiting.take(1, 1):
                if self._unread.may(wanted.key):
                    await self._answer(wanted)
                else:
                    await trio.lowlevel.checkpoint()
                    self._rejects.count("(for now) a replay request: earlier answers wait to be read")
                    why = f"{KEY_UNREAD >> 20} MiB of earlier answers wait to be read"
                    self._fail(wanted.peer, wanted.request, why)

    async def _answer(self, wanted: _Wanted) -> None:
        request = wanted.request
        limit = max(1, min(request.limit, PAGE_EVENTS))
        read = partial(self._log.read, request.after, request.prefixes, limit=limit, max_bytes=PAGE_BYTES)
        try:
            excerpt = await trio.to_thread.run_sync(read)
        except LogError as error:
            self._rejects.count("a replay that the log refused", error)
            self._fail(wanted.peer, request, str(error))
            return
        if not self._send(wanted, excerpt):
            self._rejects.count("an answer whose asker is gone or does not read")  # it asks again when it is back

    def _send(self, wanted: _Wanted, excerpt: Excerpt) -> bool:
        """Whether all of it was taken."""
        request = wanted.request
        records = excerpt.records if excerpt.snapshot is None else [excerpt.snapshot, *excerpt.records]
        events = ((record.topic.encode(), wire.encode(record.header), record.body) for record in records)
        whole: list[list[bytes]] = []
        size = 0
        for answer in answers(request.request, events):
            frames = [wanted.peer, *answer]
            whole.append(frames)
            size += sum(map(len, frames))
            if size >= MARK_BYTES:
                if not self._send_marked(wanted.key, whole, size):
                    return False
                whole, size = [], 0
        end = Replayed(
            request.request,
            excerpt.through,
            excerpt.more,
            len(records),
            self._log.identity,
            excerpt.start,
            excerpt.snapshot is not None,
        )
        whole.append([wanted.peer, wire.encode(end)])
        return self._send_marked(wanted.key, whole, size)

    def _send_marked(self, key: Hashable, messages: list[list[bytes]], size: int) -> bool:
        *before, last = messages
        if self._ingress.send_burst(before) < len(before):
            return False
        was_read = self._ingress.send_tracked(last)
        if was_read is not None and size:
            self._unread.add(key, size, was_read)
        return was_read is not None

    def _fail(self, peer: bytes, request: Replay, reason: str, kind: Literal["invalid", "log"] = "log") -> None:
        answer: Answer = ReplayFailed(request.request, reason, kind)
        if not self._ingress.send_nowait([peer, wire.encode(answer)]):
            self._rejects.count("an answer whose asker is gone or does not read")
