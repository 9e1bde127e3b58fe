"""Connections that stay with their instance: what both ends send passes until both have said all, or it is ended.

One is two streams and two tasks that each read from one and write to the other, so that who reads slowly slows down who
writes (nothing is kept but what is just being passed on), and an end of one direction is passed on by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

READ = 1 << 16  # bytes per read: also the most that is in our hands per direction
LOST_S = 1.0  # for what a dead instance said last to reach its client

BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


@dataclass(eq=False)
class Connection:
    """One client at one instance. `end` from any task; `run` returns when it is over."""

    instance: str
    number: int  # in the order they were opened
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    received: int = 0  # bytes of the client
    sent: int = 0  # bytes to the client
    broke: bool = False  # the instance reset it, or died with it
    on_first: Callable[[Connection], None] | None = None  # called once, at the first bytes of the instance

    async def run(
        self, client: trio.SocketStream, instance: trio.SocketStream, *, up: bytes = b"", down: bytes = b""
    ) -> None:
        """Pass everything both ways, `up` to the instance and `down` to the client first. Closes both."""
        keep_alive(client)
        keep_alive(instance)
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._up, client, instance, up, nursery.cancel_scope)
                    nursery.start_soon(self._down, instance, client, down, nursery.cancel_scope)
        finally:
            await trio.aclose_forcefully(instance)
            await trio.aclose_forcefully(client)

    def end(self) -> None:
        self.scope.cancel()

    async def _up(
        self, client: trio.SocketStream, instance: trio.SocketStream, data: bytes, both: trio.CancelScope
    ) -> None:
        while True:
            try:
                data = data or bytes(await client.receive_some(READ))
            except BROKEN:
                both.cancel()
                return
            try:
                if not data:
                    await instance.send_eof()
                    return
                self.received += len(data)
                await instance.send_all(data)
                data = b""
            except BROKEN:  # it takes no more; what it still says is read by `_down`
                return

    async def _down(
        self, instance: trio.SocketStream, client: trio.SocketStream, data: bytes, both: trio.CancelScope
    ) -> None:
        while True:
            try:
                data = data or bytes(await instance.receive_some(READ))
            except BROKEN:
                self.broke = True
                both.cancel()
                return
            try:
                if not data:
                    await client.send_eof()
                    return
                if self.on_first is not None:
                    first, self.on_first = self.on_first, None
                    first(self)
                await client.send_all(data)
                self.sent += len(data)
                data = b""
            except BROKEN:  # nobody is there to read it
                both.cancel()
                return


def keep_alive(stream: trio.SocketStream) -> None:
    """Peers that vanished without a word are found by the kernel, in some minutes."""
    stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_KEEPALIVE, 1)
    for option, value in (
        (trio.socket.TCP_KEEPIDLE, 60),
        (trio.socket.TCP_KEEPINTVL, 20),
        (trio.socket.TCP_KEEPCNT, 3),
    ):
        stream.setsockopt(trio.socket.IPPROTO_TCP, option, value)


@dataclass
class _Counts:
    total: int = 0
    errors: int = 0
    received: int = 0  # of connections that are over
    sent: int = 0
    watches: list[tuple[int, Any]] = field(default_factory=list)


class Figures(msgspec.Struct, frozen=True):
    """Of one instance: open connections; how many there were, and how many it failed; bytes from and to clients."""

    open: int
    total: int
    errors: int
    received: int
    sent: int


class Connections:
    """The open connections of all instances, and what was counted of them."""

    def __init__(self) -> None:
        self._next = 0
        self._open: dict[str, set[Connection]] = {}
        self._counts: dict[str, _Counts] = {}
        self._lost: set[str] = set()

    def begin(self, instance: str, tell: Callable[[Any, float], None]) -> Connection:
        """A new connection at the instance; `tell(callback, time)` is called for whoever waits for its first answer."""
        self._next += 1
        connection = Connection(instance, self._next)
        counts = self._counts.setdefault(instance, _Counts())
        counts.total += 1

        def first(connection: Connection) -> None:
            due = [watch for watch in counts.watches if connection.number > watch[0]]
            counts.watches = [watch for watch in counts.watches if watch not in due]
            for _, callback in due:
                tell(callback, trio.current_time())

        connection.on_first = first
        self._open.setdefault(instance, set()).add(connection)
        return connection

    def over(self, connection: Connection) -> None:
        self._open[connection.instance].discard(connection)
        counts = self._counts.get(connection.instance)
        if counts is not None:
            counts.received += connection.received
            counts.sent += connection.sent
            counts.errors += connection.broke or connection.instance in self._lost

    def failed(self, instance: str) -> None:
        """The instance did not take a connection."""
        counts = self._counts.setdefault(instance, _Counts())
        counts.total += 1
        counts.errors += 1

    def watch(self, instance: str, callback: Any) -> None:
        """Told once, at the first bytes of the instance on a connection that is opened after this."""
        self._counts.setdefault(instance, _Counts()).watches.append((self._next, callback))

    def end(self, instance: str) -> None:
        """End all of its connections now."""
        for connection in list(self._open.get(instance, ())):
            connection.end()

    def lost(self, instance: str, now: float) -> None:
        """Its process died: what is still on its way to clients has a moment, then its connections are ended."""
        self._lost.add(instance)
        for connection in self._open.get(instance, ()):
            connection.scope.deadline = min(connection.scope.deadline, now + LOST_S)

    def forget(self, instance: str) -> None:
        self.end(instance)
        self._counts.pop(instance, None)
        self._lost.discard(instance)

    def count(self, instance: str | None = None) -> int:
        """How many are open, at one instance or in all."""
        if instance is not None:
            return len(self._open.get(instance, ()))
        return sum(map(len, self._open.values()))

    def figures(self, instance: str) -> Figures:
        current = self._open.get(instance, set())
        counts = self._counts.get(instance, _Counts())
        return Figures(
            open=len(current),
            total=counts.total,
            errors=counts.errors,
            received=counts.received + sum(each.received for each in current),
            sent=counts.sent + sum(each.sent for each in current),
        )
