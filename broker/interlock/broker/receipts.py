"""Who has taken which command: the broker's memory of it. Pure: the time is an argument.

A command is delivered by the log, so nothing here is durable: after a restart of the broker receipts of older commands
are not known, and what was done with a command is a fact in the log as ever.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from interlock.broker import policy
from interlock.broker.errors import Refused
from interlock.broker.keys import Grant
from interlock.broker.protocol import Receipt, Received, Watch

MAX_COMMANDS = 1000  # a fleet's whole day of migrations, or one wave over 200 hosts
MAX_RECEIPTS = 200_000  # of all commands: 20 to each of 10,000 hosts, some 100 bytes each
MAX_WATCHERS = 100  # of one command: who published it, a few operators, and connections that are gone
MAX_EARLY = 1000  # commands that are watched before they are logged: who is forgotten asks again, as it would anyway
KEEP_S = 600.0  # a command's deadline is seconds or minutes away
PART = 5_000  # receipts in one answer: 0.5 MB with the longest names and no reasons
MAX_REASON = 100  # characters of a reason, so that an answer keeps below `wire.MAX_FRAME`


@dataclass
class _Command:
    topic: str
    source: str
    seq: int
    since: float
    by: dict[str, str] = field(default_factory=dict)
    watchers: set[bytes] = field(default_factory=set)
    fresh: dict[str, str] = field(default_factory=dict)  # what the watchers have not been told


class Receipts:
    """Commands in, receipts in, and for who watches a command what is new about it."""

    def __init__(self) -> None:
        self._commands: OrderedDict[str, _Command] = OrderedDict()
        self._count = 0
        self._changed: dict[str, None] = {}
        self._early: OrderedDict[str, dict[bytes, Grant | None]] = OrderedDict()  # command -> who will watch it

    def logged(self, id: str, *, topic: str, source: str, seq: int, now: float) -> None:
        """A command or rollback is in the log from now on."""
        if id in self._commands:
            return
        command = self._commands[id] = _Command(topic, source, seq, now)
        for peer, grant in self._early.pop(id, {}).items():
            with suppress(Refused):  # it hears so when it asks again
                self._add_watcher(command, grant, peer)
        while self._commands:
            oldest, command = next(iter(self._commands.items()))
            if len(self._commands) <= MAX_COMMANDS and now - command.since < KEEP_S:
                break
            self._forget(oldest)

    def take(self, grant: Grant | None, receipt: Receipt) -> None:
        """Somebody has taken a command, or refused it; the first word counts. Refused if it was not asked to."""
        command = self._commands.get(receipt.command)
        if command is None:
            return
        if grant is not None:
            policy.receipt(grant, receipt.source, command.topic)
        if receipt.source in command.by:
            return
        reason = receipt.reason[:MAX_REASON]
        command.by[receipt.source] = reason
        self._count += 1
        if command.watchers:
            command.fresh[receipt.source] = reason
            self._changed[receipt.command] = None
        while self._count > MAX_RECEIPTS:
            self._forget(next(iter(self._commands)))

    def watch(self, grant: Grant | None, peer: bytes, request: Watch) -> list[Received]:
        """All that is known, and from now on this peer is told what is new. Refused if it is not its business.

        Of a command that is not logged yet it is told from then on: whoever publishes one watches it first.
        """
        command = self._commands.get(request.command)
        if command is None:
            waiting = self._early.setdefault(request.command, {})
            if len(waiting) < MAX_WATCHERS:
                waiting[peer] = grant
            while len(self._early) > MAX_EARLY:
                self._early.popitem(last=False)
            return [Received(request.command)]
        self._add_watcher(command, grant, peer)
        return list(_parts(request.command, command.seq, command.by)) or [Received(request.command, command.seq)]

    def _add_watcher(self, command: _Command, grant: Grant | None, peer: bytes) -> None:
        if grant is not None:
            policy.watch(grant, command.source, command.topic)
        if len(command.watchers) < MAX_WATCHERS:
            command.watchers.add(peer)

    def gone(self, id: str, peer: bytes) -> None:
        """This peer can't be told any more."""
        if (command := self._commands.get(id)) is not None:
            command.watchers.discard(peer)

    def due(self) -> list[tuple[bytes, Received]]:
        """What watchers must be told now."""
        changed, self._changed = self._changed, {}
        told = []
        for id in changed:
            if (command := self._commands.get(id)) is not None:
                fresh, command.fresh = command.fresh, {}
                told += [(peer, part) for part in _parts(id, command.seq, fresh) for peer in command.watchers]
        return told

    def _forget(self, id: str) -> None:
        self._count -= len(self._commands.pop(id).by)


def _parts(id: str, seq: int, by: dict[str, str]) -> Iterator[Received]:
    items = list(by.items())
    for start in range(0, len(items), PART):
        yield Received(id, seq, dict(items[start : start + PART]))
