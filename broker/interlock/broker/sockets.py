"""ZeroMQ sockets for trio: the only module that imports zmq.

A ZeroMQ socket signals through a descriptor that is edge-triggered: it may stay silent although messages wait, as soon
as any operation on the socket has looked. So every operation here looks at EVENTS afterwards and wakes whoever waits
for the other direction, and one pump task per socket waits for the descriptor. The pump always runs, also when nobody
uses the socket: a socket that nobody touches would not renew its subscriptions after the peer restarted.

A message once taken from ZeroMQ is never dropped by a cancellation: nothing is awaited between taking and returning.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from socket import SHUT_RDWR
from socket import socket as StreamSocket

import trio
import zmq

from interlock.broker.errors import ConfigError, InUse

DRAIN = 256  # messages taken per wake-up at most, so that one busy socket doesn't starve the others
HEARTBEAT_MS = 1000  # clients ping an idle link this often,
HEARTBEAT_TIMEOUT_MS = 2000  # and know within this time that it is dead; servers don't (it costs them too much)
HANDSHAKE_MS = 3000  # a connection that does not finish its greeting within this time is closed
MAX_MESSAGE = 1 << 21  # bytes per frame; a peer that sends more is disconnected
LINGER_MS = 200  # what a closing socket may still deliver: the last rollback still leaves
MAX_SOCKETS = 8192  # per process: a gateway has a few per agent
MAX_MET = 256  # connections of one user that are remembered before those that ended are forgotten
ZAP = "inproc://zeromq.zap.01"  # where libzmq asks who may connect (RFC 27)
ZAP_DOMAIN = b"interlock"
# As plain numbers: arithmetic with the enumerations of pyzmq costs some 10 us a message.
POLLIN, POLLOUT, NOBLOCK, MORE = int(zmq.POLLIN), int(zmq.POLLOUT), int(zmq.NOBLOCK), int(zmq.SNDMORE)
EVENTS = int(zmq.EVENTS)
_numbers = itertools.count(1)

KINDS = {
    "router": zmq.ROUTER,
    "dealer": zmq.DEALER,
    "req": zmq.REQ,
    "rep": zmq.REP,
    "pub": zmq.PUB,
    "sub": zmq.SUB,
    "xpub": zmq.XPUB,
    "xsub": zmq.XSUB,
    "push": zmq.PUSH,
    "pull": zmq.PULL,
    "pair": zmq.PAIR,
}


@dataclass(frozen=True)
class Curve:
    """Our CURVE key pair, and the public key of the server that we connect to where none is named (32 bytes each)."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes


class Socket:
    """One ZeroMQ socket. One task receives; any task may send."""

    def __init__(self, raw: zmq.Socket[bytes], label: str, *, mandatory: bool = False) -> None:
        self._raw = raw
        self._fd = int(raw.getsockopt(zmq.FD))
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()
        self._receiver = trio._util.ConflictDetector(f"{label}: two tasks receive")
        self._scope = trio.CancelScope()
        self._mandatory = mandatory
        self.label = label
        self.endpoint = ""
        self._file: tuple[str, os.stat_result] | None = None
        self._breaks: Socket | None = None
        self._routes = raw.getsockopt(zmq.TYPE) == zmq.ROUTER
        self._met: dict[str, dict[bytes, tuple[int, int]]] = {}  # user -> route -> descriptor, inode
        self.proves_users = False  # each message comes with the user that the connection's key belongs to

    # --- wiring

    def bind(self, endpoint: str) -> str:
        """Bind and return the endpoint with its real port. InUse if it is taken, ConfigError if it can't be."""
        try:
            self._raw.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE:
                raise InUse("the address is in use", where=endpoint, hint="who listens there? try: ss -ltnp") from None
            raise ConfigError(f"can't bind: {error.strerror}", where=endpoint) from None
        last = self._raw.getsockopt(zmq.LAST_ENDPOINT)
        self.endpoint = last.rstrip(b"\0").decode() if isinstance(last, bytes) else endpoint
        if self.endpoint.startswith("ipc://"):
            with suppress(OSError):  # an abstract one ("ipc://@name") has no file
                self._file = (self.endpoint.removeprefix("ipc://"), os.stat(self.endpoint.removeprefix("ipc://")))
        return self.endpoint

    def connect(self, endpoint: str) -> None:
        try:
            self._raw.connect(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"can't connect: {error.strerror}", where=endpoint) from None
        self.endpoint = endpoint

    def disconnect(self, endpoint: str) -> None:
        self._raw.disconnect(endpoint)

    def subscribe(self, prefix: bytes) -> None:
        """Of a SUB socket, or with XPUB_MANUAL: grant the subscription being read right now."""
        self._raw.setsockopt(zmq.SUBSCRIBE, prefix)

    def unsubscribe(self, prefix: bytes) -> None:
        self._raw.setsockopt(zmq.UNSUBSCRIBE, prefix)

    def close(self, linger_ms: int = LINGER_MS) -> None:
        if self._raw.closed:
            return
        self._scope.cancel()
        if self._breaks is not None:
            self._raw.disable_monitor()  # or its end would take so long that what it holds may still be delivered
        self._raw.close(linger=linger_ms)
        if self._breaks is not None:
            self._breaks.close(linger_ms=0)
        self._remove_file()
        # whoever still waits on it learns that it is gone
        self._readable.unpark_all()
        self._writable.unpark_all()

    def _remove_file(self) -> None:
        """libzmq leaves the file of an ipc:// endpoint behind. One that another bound in its place is left alone."""
        if self._file is None:
            return
        path, bound = self._file
        with suppress(OSError):
            if os.path.samestat(os.stat(path), bound):
                os.unlink(path)

    @property
    def closed(self) -> bool:
        return bool(self._raw.closed)

    # --- sending

    def send_nowait(self, frames: Sequence[bytes]) -> bool:
        """True if ZeroMQ took the message; False at the high-water mark or where no peer is (nothing was sent).

        A ROUTER that was not opened as `mandatory` drops what it can't deliver, and says True.
        """
        try:
            return self._put(frames)
        finally:
            self._wake()

    def send_burst(self, messages: Iterable[Sequence[bytes]]) -> int:
        """`send_nowait` of each, at the cost of one look at EVENTS for all; returns how many ZeroMQ took."""
        try:
            return sum(map(self._put, messages))
        finally:
            self._wake()

    def _put(self, frames: Sequence[bytes]) -> bool:
        """Only the first frame can be refused: what follows belongs to the same message. EVENTS must be looked at."""
        send, last = self._raw.send, len(frames) - 1
        try:
            for at, frame in enumerate(frames):
                send(frame, NOBLOCK | MORE if at < last else NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EFSM):
                return False
            raise
        return True

    async def send(self, frames: Sequence[bytes]) -> None:
        """Send, waiting while the high-water mark is reached. A mandatory ROUTER uses `send_nowait`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.send_nowait(frames):
            if self._mandatory:
                raise ConfigError("a mandatory ROUTER can't wait for a peer", where=self.label)
            if not self._wake() & POLLOUT:  # it may have become writable between the attempt and this look
                await self._writable.park()
                self._check_open()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def until_writable(self) -> None:
        """Wait until ZeroMQ would take a message."""
        await trio.lowlevel.checkpoint()
        self._check_open()
        while not self._wake() & POLLOUT:
            await self._writable.park()
            self._check_open()

    # --- receiving

    def receive_nowait(self) -> list[bytes] | None:
        try:
            return self._take()[1]
        except zmq.Again:
            return None
        finally:
            self._wake()

    async def receive(self) -> list[bytes]:
        return (await self.receive_batch(1))[0]

    async def receive_batch(self, limit: int = DRAIN) -> list[list[bytes]]:
        """At least one message, and up to `limit` of what waits already."""
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._receiver:
            batch: list[list[bytes]] = []
            while True:
                while len(batch) < limit:
                    try:
                        batch.append(self._take()[1])
                    except zmq.Again:
                        break
                events = self._wake()
                if batch:
                    break
                if not events & POLLIN:  # a message may have come between the attempt and this look
                    await self._readable.park()
                    self._check_open()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return batch

    async def receive_known(self, limit: int = DRAIN) -> list[tuple[str, list[bytes]]]:
        """As `receive_batch`, each message with its user: what ZAP called the connection's key ("" without CURVE)."""
        if not self.proves_users:
            return [("", frames) for frames in await self.receive_batch(limit)]
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._receiver:
            batch: list[tuple[str, list[bytes]]] = []
            while True:
                while len(batch) < limit:
                    try:
                        batch.append(self._receive_proved())
                    except zmq.Again:
                        break
                events = self._wake()
                if batch:
                    break
                if not events & POLLIN:
                    await self._readable.park()
                    self._check_open()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return batch

    def _receive_proved(self) -> tuple[str, list[bytes]]:
        first, frames = self._take()
        try:
            user = str(first.get("User-Id"))
        except zmq.ZMQError:  # what an XPUB makes up itself when a connection has ended
            return "", frames
        if not self._routes:  # subscriptions: seldom, and nothing but the descriptor tells connections apart
            descriptor = int(first.get(zmq.SRCFD))
            self._meet(user, b"%d" % descriptor, descriptor)
        elif frames[0] not in self._met.get(user, ()):
            self._meet(user, frames[0], int(first.get(zmq.SRCFD)))
        return user, frames

    async def grant_subscriptions(self, may: Callable[[str, list[bytes]], bool]) -> None:
        """Of an XPUB opened with `manual`: grant each subscription of which `may(user, frames)`; until cancelled.

        `may` is told of the ends too; one that comes without a user says that nobody has this prefix any more.

        Read and granted in one go: at the next look at EVENTS libzmq may forget whose it was.
        """
        with self._receiver:
            while True:
                for _ in range(DRAIN):
                    try:
                        user, frames = self._receive_proved()
                    except zmq.Again:
                        break
                    granted = may(user, frames)
                    if frames[0][:1] == b"\0":
                        self.unsubscribe(frames[0][1:])
                    elif granted:
                        self.subscribe(frames[0][1:])
                if self._wake() & POLLIN:
                    await trio.lowlevel.checkpoint()
                else:
                    await self._readable.park()
                    self._check_open()

    def _take(self) -> tuple[zmq.Frame, list[bytes]]:
        """A message, and its first frame as libzmq has it. zmq.Again if none waits.

        Uncopied frames tell whether more follow: a third of what asking the socket for that costs.
        """
        receive = self._raw.recv
        first = frame = receive(NOBLOCK, copy=False)
        frames = [first.bytes]
        while frame.more:
            frame = receive(NOBLOCK, copy=False)
            frames.append(frame.bytes)
        return first, frames

    # --- cutting off

    def _meet(self, user: str, route: bytes, descriptor: int) -> None:
        """Remember which connection it is. The inode tells it from a later one with the same descriptor."""
        mine = self._met.setdefault(user, {})
        if len(mine) >= MAX_MET:
            self.lines(user)  # forgets those that have ended
            mine = self._met.setdefault(user, {})
        with suppress(OSError):  # it is gone already
            mine[route] = (descriptor, os.fstat(descriptor).st_ino)

    def lines(self, user: str) -> int:
        """How many connections of this user, that have said something, are open."""
        living = {route: line for route, line in self._met.pop(user, {}).items() if _is_line(*line)}
        if living:
            self._met[user] = living
        return len(set(living.values()))

    def cut(self, user: str) -> int:
        """Break all connections of the user that have said something; returns how many. Others notice nothing.

        libzmq has no call for it, so the stream below is shut down. Whoever has not said anything is sent nothing.
        """
        return sum(_shut(*line) for line in set(self._met.pop(user, {}).values()))

    # --- inside

    def _check_open(self) -> None:
        if self._raw.closed:
            raise trio.ClosedResourceError(self.label)

    def _wake(self) -> int:
        """Look at EVENTS, which consumes the descriptor's edge, wake whom it concerns, and return what it says."""
        if self._raw.closed:
            return 0
        events = int(zmq.backend.Socket.get(self._raw, EVENTS))  # `getsockopt` would make an enumeration of it: 1 us
        if events & POLLIN:
            self._readable.unpark_all()
        if events & POLLOUT:
            self._writable.unpark_all()
        return events

    async def _pump(self) -> None:
        with self._scope:
            while not self._raw.closed:
                await trio.lowlevel.wait_readable(self._fd)
                self._wake()


class Sockets:
    """All sockets of one component, with their context. Made by `open_sockets`, closed with it."""

    def __init__(self, nursery: trio.Nursery, curve: Curve | None = None) -> None:
        self.curve = curve
        self._guarded = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._nursery = nursery
        self._open: list[Socket] = []

    def open(
        self,
        kind: str,
        *,
        bind: str | None = None,
        connect: str | None = None,
        subscribe: Sequence[str] = (),
        receive_limit: int = 1000,
        send_limit: int = 1000,
        label: str = "",
        heartbeat: bool | None = None,
        manual: bool = False,
        mandatory: bool = False,
        relaxed: bool = False,
        immediate: bool = False,
        identity: bytes | None = None,
        max_message: int = MAX_MESSAGE,
        server: bytes = b"",
    ) -> Socket:
        """A socket, bound or connected. Limits are messages per peer (0: none).

        With CURVE keys every one encrypts, and one that binds needs `open_guard` first. server: the public key of
        whom it connects to, where that is not the broker.

        heartbeat: ping the peer; by default on connecting sockets only. manual: XPUB that grants each subscription by
        hand. mandatory: a ROUTER that says so when it can't deliver. relaxed: a REQ that may give up on an answer and
        ask again. immediate: take messages only while there is a connection.
        """
        raw = self._context.socket(KINDS[kind])
        raw.setsockopt(zmq.LINGER, LINGER_MS)
        raw.setsockopt(zmq.RCVHWM, receive_limit)
        raw.setsockopt(zmq.SNDHWM, send_limit)
        raw.setsockopt(zmq.MAXMSGSIZE, max_message)
        raw.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        raw.setsockopt(zmq.IPV6, 1 if "[" in (bind or connect or "") else 0)
        raw.setsockopt(zmq.RECONNECT_IVL, 50)
        raw.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if heartbeat if heartbeat is not None else connect is not None:
            raw.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            raw.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        if immediate:
            raw.setsockopt(zmq.IMMEDIATE, 1)
        if identity is not None:
            raw.setsockopt(zmq.IDENTITY, identity)
        if self.curve is not None:
            self._secure(raw, self.curve, server, binds=bind is not None)
        if kind == "xpub":
            raw.setsockopt(zmq.XPUB_VERBOSE, 1)
            if manual:
                raw.setsockopt(zmq.XPUB_MANUAL, 1)
        if kind == "router" and mandatory:
            raw.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if kind == "req" and relaxed:
            raw.setsockopt(zmq.REQ_RELAXED, 1)
            raw.setsockopt(zmq.REQ_CORRELATE, 1)
        socket = Socket(raw, label or f"{kind} {bind or connect or ''}", mandatory=mandatory)
        socket.proves_users = self.curve is not None and bind is not None
        try:
            for prefix in subscribe:
                socket.subscribe(prefix.encode())
            if bind is not None:
                socket.bind(bind)
            if connect is not None:
                socket.connect(connect)
        except BaseException:
            raw.close(linger=0)
            raise
        return self._keep(socket)

    def watch_breaks(self, socket: Socket) -> Socket:
        """Receives a message whenever a connection of `socket` has broken. It is closed with that one."""
        place = f"inproc://breaks-{next(_numbers)}"
        socket._raw.monitor(place, int(zmq.EVENT_DISCONNECTED))
        socket._breaks = self.open("pair", connect=place, receive_limit=0, label=f"breaks of {socket.label}")
        return socket._breaks

    def open_guard(self) -> Socket:
        """The socket on which libzmq asks, for each connection, whether it may. Must be answered from then on."""
        raw = self._context.socket(zmq.REP)
        raw.setsockopt(zmq.LINGER, 0)
        guard = Socket(raw, "guard")
        try:
            guard.bind(ZAP)
        except BaseException:
            raw.close(linger=0)
            raise
        self._guarded = True
        return self._keep(guard)

    def _secure(self, raw: zmq.Socket[bytes], curve: Curve, server: bytes, *, binds: bool) -> None:
        if binds and not self._guarded:  # without it libzmq would let every key in
            raw.close(linger=0)
            raise ConfigError("nobody guards this context", where="CURVE", hint="open_guard comes first")
        raw.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
        raw.setsockopt(zmq.CURVE_PUBLICKEY, curve.public)
        if binds:
            raw.setsockopt(zmq.CURVE_SERVER, 1)
            raw.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
            raw.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no connection where nobody answers for it
        else:
            raw.setsockopt(zmq.CURVE_SERVERKEY, server or curve.server)

    def _keep(self, socket: Socket) -> Socket:
        self._open = [other for other in self._open if not other.closed]
        self._open.append(socket)
        self._nursery.start_soon(socket._pump)
        return socket

    async def close(self) -> None:
        for socket in self._open:
            socket.close()
        await trio.to_thread.run_sync(self._context.term)  # it waits for what lingers


def _is_line(descriptor: int, inode: int) -> bool:
    try:
        return os.fstat(descriptor).st_ino == inode
    except OSError:
        return False


def _shut(descriptor: int, inode: int) -> bool:
    """Shut the stream down if it is still the one that was met. Looked at through a copy of its descriptor: nobody can
    close and reuse that in between."""
    try:
        copy = StreamSocket(fileno=os.dup(descriptor))
    except OSError:
        return False
    with copy:
        if not _is_line(copy.fileno(), inode):
            return False
        with suppress(OSError):  # it ended by itself
            copy.shutdown(SHUT_RDWR)
    return True


@asynccontextmanager
async def open_sockets(curve: Curve | None = None) -> AsyncIterator[Sockets]:
    """A place to open sockets in; on leaving, all are closed (each may still deliver for `LINGER_MS`).

    curve: every socket encrypts and proves itself with these keys.
    """
    async with trio.open_nursery() as nursery:
        sockets = Sockets(nursery, curve)
        try:
            yield sockets
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await sockets.close()
