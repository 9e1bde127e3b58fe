"""Looks at a server's connections from time to time: who is silent, dead, or sends what nobody can take is cut."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import trio

from interlock.broker import streams
from interlock.broker.connections import Connections
from interlock.broker.lines import Line

PATROL_S = 0.25  # between looks: milliseconds of CPU for 10,000 connections
SILENT_S = 10.0  # within which a connection says something: only then it is known whose it is, and can be cut
SPARE = 32  # descriptors to be kept free: the oldest connections that said nothing make room
SCARCE, SCARCE_S = 256, 0.02  # so few may be free: then it looks this often, and a flood of strangers finds some free
SILENCE = 1.6  # times between pings without a byte and a connection is dead: at one ping a second known within 2 s
WATCHED = 3  # times between pings after its last message; then one has come, and libzmq itself looks for the next
UNREAD = 32 << 20  # bytes that one key has sent and nobody has taken: 30 of the largest events
GROWN = 16 << 20  # bytes of memory: only after so much growth it is worth asking the kernel who sent them
UNCOUNTED, UNCOUNTED_PER_S = 4096, 128  # bytes of a connection that are no messages: its handshake, its pings

_log = logging.getLogger(__name__)


class Warden(Protocol):
    """For whom it looks."""

    where: str

    def connections(self) -> Iterator[Connections[Any]]: ...
    def cut_off(self, user: str, why: str) -> None: ...
    def note(self, who: str, why: str) -> None: ...
    def name_of(self, key: str) -> str: ...


class Patrol:
    """One server's. `run` looks until cancelled."""

    def __init__(self, warden: Warden) -> None:
        self._warden = warden
        self._watched: dict[Line, Connections[Any]] = {}
        self._memory = streams.memory()

    async def run(self) -> None:
        looked = trio.current_time()
        while True:
            await trio.sleep(SCARCE_S if self._spare_descriptors() else PATROL_S)
            if (now := trio.current_time()) >= looked + PATROL_S:
                looked = now
                self.look(now)

    def look(self, now: float) -> None:
        for found in self._warden.connections():
            found.look()
            self._cut_silent(found, now)
            talked, found.talked = found.talked, set()
            if not found.kernel_watches:  # else a look at 10,000 of them would stop everything for 0.2 s
                self._watched |= dict.fromkeys(talked, found)
        self._cut_dead(now)
        memory = streams.memory()
        if memory > self._memory + GROWN:
            for found in self._warden.connections():
                self._cut_unread(found, now)
                self._cut_unread_strangers(found)
        if not self._memory <= memory <= self._memory + GROWN:
            self._memory = memory

    def _cut_silent(self, found: Connections[Any], now: float) -> None:
        since = now - found.handshake_s - SILENT_S
        for stranger in found.lines.strangers(since):
            self._cut_stranger(found, *stranger, f"connected and said nothing for {SILENT_S:g} s")
        found.lines.forget_unheard(since)

    def _cut_stranger(self, found: Connections[Any], descriptor: int, since: float, why: str) -> None:
        if (address := found.cut_stranger(descriptor, since)) is not None:
            self._warden.note(f"somebody at {address or 'this machine'}", why)

    def _cut_dead(self, now: float) -> None:
        """libzmq gives up who stops pinging, unless something else came after the last ping: this is for those."""
        for line, found in list(self._watched.items()):
            dead_s = line.pings_s * SILENCE
            if line.ended or line.condemned or now > line.heard + WATCHED * line.pings_s:
                del self._watched[line]
            elif now > line.heard + dead_s:
                seen = streams.look(line.descriptor)
                if seen is not None and seen[1] > dead_s:
                    _log.info("%s: a connection of %s is dead", self._warden.where, self._warden.name_of(line.user))
                    found.cut_line(line)

    def _spare_descriptors(self) -> bool:
        """Whether they are scarce. At none, libzmq would try to accept the next connection without a pause."""
        everybody = list(self._warden.connections())
        limit = streams.descriptor_limit()
        if sum(found.lines.open for found in everybody) + SCARCE < limit:
            return False
        for found in everybody:
            found.look()
        excess = streams.descriptors() + SPARE - limit
        strangers = [(since, at, found) for found in everybody for at, since in found.lines.strangers()]
        for since, descriptor, found in sorted(strangers, key=lambda stranger: stranger[0])[: max(0, excess)]:
            self._cut_stranger(found, descriptor, since, "said nothing, and others need the descriptor")
        return excess > -SCARCE

    def _cut_unread(self, found: Connections[Any], now: float) -> None:
        """Whose bytes wait below us: libzmq counts messages, not bytes, and no message that has not ended."""
        unread: Counter[str] = Counter()
        for line in found.lines.bound():
            if (seen := streams.look(line.descriptor)) is not None:
                other = UNCOUNTED + UNCOUNTED_PER_S * (now - line.let_in)
                unread[line.user] += max(0, int(seen[0] - line.taken - other))
        for user, size in unread.items():
            if size > UNREAD:
                self._warden.cut_off(user, f"sent {UNREAD >> 20} MiB that nobody has taken")

    def _cut_unread_strangers(self, found: Connections[Any]) -> None:
        sent = [((streams.look(at) or (0, 0.0))[0], at, since) for at, since in found.lines.strangers()]
        excess = sum(size for size, _, _ in sent) - UNREAD
        for size, descriptor, since in sorted(sent, reverse=True):
            if excess <= 0:
                break
            self._cut_stranger(found, descriptor, since, f"sent {size >> 20} MiB before the end of its first message")
            excess -= size
