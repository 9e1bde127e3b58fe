"""The gate of a server: who may connect, and who it is that has sent a message. Fails closed.

libzmq asks here for each connection (ZAP, RFC 27); the answer names the connection's public key. Whose it is, and
whether it is still valid, is looked up again for each message, so that a revocation holds for open connections too.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from interlock.broker import policy
from interlock.broker.connections import LINE, Connections
from interlock.broker.errors import Refused
from interlock.broker.keys import Grant
from interlock.broker.lines import Line
from interlock.broker.patrol import Patrol
from interlock.broker.security import Security
from interlock.broker.sockets import Socket, Sockets, open_sockets
from interlock.broker.wire import MAX_TOPIC

REMEMBERED = 1000  # (who, why) pairs whose refusals are counted; strangers can't make the table grow
QUIET_S = 60.0  # the same refusal of the same peer is logged once in so many seconds, with its count
MAX_WHY = 200  # characters of a reason in the log

# Limits of one key, at each server. A frame's is `tuning.MAX_MESSAGE`: libzmq cuts off who sends a larger one.
MAX_LINES = 64  # connections at once; a role has up to 4 to each, an operator as many as commands that run at once
NEW_LINES_PER_S, NEW_LINES = 20.0, 200.0  # handshakes, and how many at once: each costs 1 ms of CPU
EVENTS_PER_S, EVENTS = 20_000.0, 40_000.0  # requests to the event plane: more than a disk takes, less than fills memory
EVENT_BYTES_PER_S, EVENT_BYTES = 32.0 * (1 << 20), 64.0 * (1 << 20)  # the same in bytes: no disk takes more
LARGE_BATCH = 16 << 10  # bytes of telemetry: a batch of 1,000 values; what is larger counts with its bytes,
ANNOUNCED = 64  # and each announcement as so many more: to decode one takes 1 us, however short it is
TELEMETRY_PER_S, TELEMETRY = 4.0 * (1 << 20), 16.0 * (1 << 20)  # 5,000 series announced each second are 1 MB
MAX_SUBSCRIPTIONS = 1000  # prefixes, those of all connections together; ours have 10, and 300,000 take 0.5 GB
SUBSCRIBES_PER_S, SUBSCRIBES = 1000.0, 4000.0  # subscriptions and their ends, granted or not; a restart brings them all
MAX_REFUSED, REFUSED_S = 500.0, 10.0  # refusals in so many seconds: then it is cut off,
CUT_OFF_S = 10.0  # and stays so for this long

_log = logging.getLogger(__name__)


class Allowance:
    """A bucket of tokens: `rate` a second, `burst` at once. Pure: the time is an argument."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._then = burst, now

    def take(self, now: float, amount: float = 1.0) -> bool:
        self._left = min(self._burst, self._left + (now - self._then) * self._rate)
        self._then = now
        if self._left < amount or self._left <= 0:
            return False
        self._left -= amount
        return True

    def charge(self, amount: float) -> None:
        """Take what is known only afterwards; nothing more is given until it has come in again."""
        self._left -= amount


class _Account:
    """What one key has used of its limits."""

    def __init__(self, now: float) -> None:
        self.handshakes = Allowance(NEW_LINES_PER_S, NEW_LINES, now)
        self.requests = Allowance(EVENTS_PER_S, EVENTS, now)
        self.telemetry = Allowance(TELEMETRY_PER_S, TELEMETRY, now)
        self.event_bytes = Allowance(EVENT_BYTES_PER_S, EVENT_BYTES, now)
        self.subscribes = Allowance(SUBSCRIBES_PER_S, SUBSCRIBES, now)
        self.refusals = Allowance(MAX_REFUSED / REFUSED_S, MAX_REFUSED, now)
        self.cut_off_until = float("-inf")


class Gate:
    """One component's gate. Open it on its sockets before the first of them binds."""

    def __init__(self, security: Security, where: str) -> None:
        self.security = security
        self.where = where
        self.refused = 0
        self._refusals: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        self._sockets: list[Socket] = []
        self._accounts: dict[str, _Account] = {}  # of keys that belong, or did: as many as the authority knows
        security.on_gone(self._cut_all)

    async def serve(self, sockets: Sockets, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer libzmq until cancelled; started once it is safe to bind."""
        guard = sockets.open_guard()
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Patrol(self).run)
            while True:
                guard.send_nowait(self.answer(await guard.receive()))

    def answer(self, request: list[bytes]) -> list[bytes]:
        """ZAP's reply to ZAP's request. Pure but for the log."""
        number = request[1] if len(request) > 1 else b""
        if len(request) != 7 or request[0] != b"1.0" or request[5] != b"CURVE" or len(request[6]) != 32:
            self.note("a stranger", "connects without CURVE")
            return [b"1.0", number, b"400", b"CURVE only", b"", b""]
        key, address = request[6].hex(), request[3].decode("ascii", "replace")
        try:
            line = self.enter(key, address, request[2])
        except Refused as refused:
            # at 400 libzmq's clients give up for good; at 300 they come back, and may have been let in meanwhile
            status = b"400" if self.security.roll.former(key) else b"300"
            return [b"1.0", number, status, str(refused.what).encode(), b"", b""]
        named = len(LINE).to_bytes(1, "big") + LINE.encode() + len(line).to_bytes(4, "big") + line.encode()
        return [b"1.0", number, b"200", b"OK", key.encode(), named]

    def enter(self, key: str, address: str, name: bytes) -> str:
        """The number of its line at the socket of this name, if this key may connect. Refused says why not."""
        if self.security.roll.by_key(key) is None:
            former = self.security.roll.former(key)
            self.note(former or f"a stranger at {address}", "its key was revoked" if former else "its key is unknown")
            raise Refused("key revoked" if former else "key unknown")
        account, now = self._account(key), trio.current_time()
        there = next((found for found in self.connections() if found.name == name), None)
        if there is not None:
            there.look()
        why = ""
        if now < account.cut_off_until:
            why = "it is cut off for now"
        elif not account.handshakes.take(now):
            why = f"connects more than {NEW_LINES_PER_S:g} times a second"
        elif there is not None and len(there.lines.of(key)) >= MAX_LINES:
            why = f"has {MAX_LINES} connections already"
        if why:
            self.note(self.name_of(key), why)
            raise Refused(why)
        return there.lines.let_in(key, now).number if there is not None else "0"

    def _account(self, key: str) -> _Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = _Account(trio.current_time())
        return account

    def name_of(self, key: str) -> str:
        """Whose key it is, or was."""
        grant = self.security.roll.by_key(key)
        return grant.identity if grant is not None else self.security.roll.former(key) or "a stranger"

    def request(self, user: str, size: int = 0) -> None:
        """Count a request of this user, of so many bytes. Refused if there are too many."""
        account, now, what = self._account(user), trio.current_time(), ""
        if not account.requests.take(now):
            what = f"asks more than {EVENTS_PER_S:g} times a second"
        elif not account.event_bytes.take(now, size):
            what = f"sends more than {EVENT_BYTES_PER_S / (1 << 20):g} MiB a second"
        if what:
            raise self._refusal(user, Refused(what, where=self.name_of(user)))

    def garbage(self, user: str) -> None:
        """Count what is no message of ours: whoever sends much of it is cut off too."""
        self._refusal(user, Refused("sends what is no message", where=self.name_of(user)))

    def abused(self, line: Line, why: str) -> None:
        """Cut off who does what nobody does by mistake."""
        self.cut_off(line.user, why)

    def cut_off(self, user: str, why: str) -> None:
        """Break its connections, and let it make none for some seconds."""
        account, now = self._account(user), trio.current_time()
        if now >= account.cut_off_until:
            self.note(self.name_of(user), f"cut off for {CUT_OFF_S:g} s: {why}")
            account.cut_off_until = now + CUT_OFF_S
        self.cut(user)

    def batch(self, user: str, size: int) -> None:
        """Count a telemetry batch of so many bytes, before anything is done with it. Refused if there are too many."""
        counted = size if size > LARGE_BATCH else 0
        if not self._account(user).telemetry.take(trio.current_time(), counted):
            what = f"sends more than {TELEMETRY_PER_S / (1 << 20):g} MiB a second in large batches and announcements"
            raise self._refusal(user, Refused(what, where=self.name_of(user)))

    def announced(self, user: str, count: int) -> None:
        """Count so many announcements of a batch that was decoded."""
        self._account(user).telemetry.charge(count * ANNOUNCED)

    def _refusal(self, user: str, refused: Refused) -> Refused:
        """Note it, and cut off who is refused too often."""
        account, now = self._account(user), trio.current_time()
        if now < account.cut_off_until:  # what was still under way
            return refused
        self.note(refused.where.split(" ", 1)[0], str(refused))
        if not account.refusals.take(now):
            self.cut_off(user, f"more than {MAX_REFUSED:g} refusals")
        return refused

    def admit(self, user: str, check: Callable[[Grant], None]) -> Grant:
        """Whose key it is, if `check` lets that one pass. Refused otherwise, which is logged."""
        grant = self.security.roll.by_key(user)
        try:
            if grant is None:
                former = self.security.roll.former(user)
                raise Refused("this key is not valid (any more)", where=former or "a stranger")
            check(grant)
        except Refused as refused:
            raise self._refusal(user, refused) from None
        return grant

    # --- connections

    def guard(self, *sockets: Socket) -> None:
        """Decide about the connections of these sockets too."""
        self._sockets = [other for other in self._sockets if not other.closed]
        self._sockets += sockets
        for found in self.connections():
            found.judge = self

    def connections(self) -> Iterator[Connections[Any]]:
        """Those of each guarded socket."""
        for socket in self._sockets:
            if not socket.closed and socket.connections is not None:
                yield socket.connections

    def cut(self, key: str) -> None:
        """Break every connection of a key on the guarded sockets."""
        for found in self.connections():
            found.cut(key)

    async def grant_subscriptions(self, feed: Socket, granting: Callable[[], None] = lambda: None) -> None:
        """Grant each subscription that its user may have, of an XPUB opened with `manual`; until cancelled."""

        def may(line: Line, frame: bytes) -> bool:
            try:
                self.admit(line.user, lambda grant: self._subscribe(grant, line, frame, feed))
            except Refused:  # noted; what an XPUB receives can't be answered
                return False
            if frame[:1] == b"\1":
                granting()
            return True

        await feed.grant_subscriptions(may)

    def _subscribe(self, grant: Grant, line: Line, frame: bytes, feed: Socket) -> None:
        """A subscription, or the end of one, as an XPUB receives it. Refused if it may not be."""
        asked = frame[1:]
        if not self._account(line.user).subscribes.take(trio.current_time()):
            raise Refused(f"subscribes more than {SUBSCRIBES_PER_S:g} times a second", where=grant.identity)
        if frame[:1] == b"\0":
            line.prefixes.discard(asked)
            return
        mine = feed.connections.lines.of(line.user) if feed.connections is not None else []
        many = asked not in line.prefixes and sum(len(other.prefixes) for other in mine) >= MAX_SUBSCRIPTIONS
        if many or len(asked) > MAX_TOPIC:
            what = f"more than {MAX_SUBSCRIPTIONS} subscriptions, or longer than {MAX_TOPIC} bytes"
            raise Refused(what, where=grant.identity)
        policy.subscribe(grant, [asked.decode("ascii", "replace")])
        line.prefixes.add(asked)

    def note(self, who: str, why: str) -> None:
        """Count and log a refusal: who and why."""
        self.refused += 1
        now = trio.current_time()
        key = (who, why[:MAX_WHY])
        last, count = self._refusals.pop(key, (-QUIET_S, 0))
        if now - last >= QUIET_S:
            again = f" ({count} times since it was last said)" if count else ""
            _log.warning("%s: refused %s: %s%s", self.where, who, key[1], again)
            last, count = now, -1
        self._refusals[key] = (last, count + 1)
        while len(self._refusals) > REMEMBERED:
            self._refusals.popitem(last=False)

    def _cut_all(self, gone: set[str]) -> None:
        for key in gone:
            self.cut(key)


@asynccontextmanager
async def open_gated(
    security: Security | None, where: str, *, heartbeat_s: float
) -> AsyncIterator[tuple[Sockets, Gate | None]]:
    """Sockets of a server behind its gate; without security plain ones, and no gate."""
    if security is None:
        async with open_sockets(heartbeat_s=heartbeat_s) as sockets:
            yield sockets, None
        return
    async with (
        open_sockets(security.curve(), heartbeat_s=heartbeat_s) as sockets,
        trio.open_nursery() as nursery,
    ):
        gate = Gate(security, where)
        await nursery.start(gate.serve, sockets)
        try:
            yield sockets, gate
        finally:
            nursery.cancel_scope.cancel()
