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
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio
import zmq

from interlock.broker import tuning
from interlock.broker.connections import MAX_FRAMES, Ask, Connections, Happening
from interlock.broker.errors import ConfigError, InUse
from interlock.broker.lines import Line
from interlock.broker.tuning import LINGER_MS, MAX_MESSAGE, ZAP_DOMAIN, Curve, Options

DRAIN = 256  # messages taken per wake-up at most, so that one busy socket doesn't starve the others
MAX_SOCKETS = 8192  # per process: a gateway has a few per agent
ZAP = "inproc://zeromq.zap.01"  # where libzmq asks who may connect (RFC 27)
# As plain numbers: arithmetic with the enumerations of pyzmq costs some 10 us a message.
POLLIN, POLLOUT, NOBLOCK, MORE = int(zmq.POLLIN), int(zmq.POLLOUT), int(zmq.NOBLOCK), int(zmq.SNDMORE)
EVENTS = int(zmq.EVENTS)
OPTIONS = {tuning.METADATA: 95}  # those that pyzmq has no name for
HAPPENINGS = {
    int(zmq.EVENT_ACCEPTED): Happening.ACCEPTED,
    int(zmq.EVENT_HANDSHAKE_SUCCEEDED): Happening.JOINED,
    int(zmq.EVENT_DISCONNECTED): Happening.ENDED,
}

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
        self._max_frames = 1 << 30
        self._monitor: zmq.Socket[bytes] | None = None
        self.connections: Connections[zmq.Frame] | None = None  # of a server that knows its users

    # --- wiring

    def know_users(self, context: zmq.Context[zmq.Socket[bytes]], name: str) -> None:
        """Before it binds, with CURVE: have ZAP ask under this name, and know each connection."""
        self._raw.setsockopt(zmq.ZAP_DOMAIN, name.encode())
        self.watch(context, name, (Happening.ACCEPTED, Happening.ENDED))
        handshake_s = int(self._raw.getsockopt(zmq.HANDSHAKE_IVL)) / 1000
        watches = self._raw.getsockopt(zmq.TCP_KEEPALIVE) == 1
        self.connections = Connections(name.encode(), self.happened, _property, handshake_s, kernel_watches=watches)
        self._max_frames = MAX_FRAMES

    def watch(self, context: zmq.Context[zmq.Socket[bytes]], name: str, whats: Sequence[Happening]) -> None:
        """Before it binds or connects: have `happened` tell these."""
        self._raw.monitor(
            f"inproc://happenings-of-{name}", sum(code for code, what in HAPPENINGS.items() if what in whats)
        )
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._monitor.setsockopt(zmq.RCVHWM, 0)  # at a limit libzmq's I/O thread would wait for us
        self._monitor.connect(f"inproc://happenings-of-{name}")

    def happened(self) -> Iterator[tuple[Happening, int]]:
        """What has happened to its streams since this was last asked, each with a descriptor."""
        while self._monitor is not None and int(zmq.backend.Socket.get(self._monitor, EVENTS)) & POLLIN:
            told = self._monitor.recv_multipart(NOBLOCK)[0]
            yield HAPPENINGS[int.from_bytes(told[:2], sys.byteorder)], int.from_bytes(told[2:6], sys.byteorder)

    async def until_happened(self) -> None:
        """Wait until `happened` has something to tell. It must have been asked before. trio.ClosedResourceError."""
        if self._monitor is not None:
            await trio.lowlevel.wait_readable(int(self._monitor.getsockopt(zmq.FD)))

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
        if self._monitor is not None:
            self._raw.disable_monitor()  # or its end would take so long that what it holds may still be delivered
            trio.lowlevel.notify_closing(int(self._monitor.getsockopt(zmq.FD)))
            self._monitor.close(linger=0)
            self._monitor = None
        self._raw.close(linger=linger_ms)
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

    def send_tracked(self, frames: Sequence[bytes]) -> Callable[[], bool] | None:
        """As `send_nowait`; who calls what it returns learns whether the message has left libzmq's queue, or was
        dropped with the connection. None: nothing was sent. It costs some 10 us.
        """
        *first, last = frames
        tracked = zmq.Frame(last, track=True, copy=False)
        tracker = tracked.tracker
        assert tracker is not None
        send = self._raw.send
        try:
            for frame in first:
                send(frame, NOBLOCK | MORE)
            send(tracked, NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH, zmq.EFSM):
                return None
            self._check_open()
            raise
        finally:
            self._wake()
        return lambda: bool(tracker.done)

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
            self._check_open()
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
        connections = self.connections
        if connections is None:
            return [("", frames) for frames in await self.receive_batch(limit)]
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._receiver:
            batch: list[tuple[str, list[bytes]]] = []
            while True:
                now = trio.current_time()
                for _ in range(limit):
                    try:
                        first, frames = self._take()
                    except zmq.Again:
                        break
                    if (user := connections.sender(first, frames, now)) is not None:
                        batch.append((user, frames))
                events = self._wake()
                if batch:
                    break
                if events & POLLIN:
                    await trio.lowlevel.checkpoint()
                else:
                    await self._readable.park()
                    self._check_open()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return batch

    async def grant_subscriptions(self, may: Callable[[Line, bytes], bool]) -> None:
        """Of an XPUB opened with `manual` that knows its users: grant what `may` allows; until cancelled.

        Granted in the same breath as received: at the next look at EVENTS libzmq may forget whose it was.
        """
        assert self.connections is not None
        in_step, ask = True, Ask(may, self._apply)
        with self._receiver:
            while True:
                now = trio.current_time()
                for _ in range(DRAIN):
                    try:
                        first, frames = self._take()
                    except zmq.Again:
                        in_step = True
                        break
                    in_step = self.connections.subscription(first, frames, now, ask, in_step=in_step)
                if self._wake() & POLLIN:
                    await trio.lowlevel.checkpoint()
                else:
                    await self._readable.park()
                    self._check_open()

    def _apply(self, frame: bytes) -> None:
        (self.subscribe if frame[:1] == b"\1" else self.unsubscribe)(frame[1:])

    def _take(self) -> tuple[zmq.Frame, list[bytes]]:
        """A message, and its first frame as libzmq has it. zmq.Again if none waits, trio.ClosedResourceError.

        Uncopied frames tell whether more follow: a third of what asking the socket for that costs.
        """
        receive = self._raw.recv
        try:
            first = frame = receive(NOBLOCK, copy=False)
        except zmq.ZMQError:
            self._check_open()
            raise
        frames = [first.bytes]
        while frame.more:
            frame = receive(NOBLOCK, copy=False)
            if len(frames) <= self._max_frames:  # one too many is kept, to show that there were
                frames.append(frame.bytes)
        return first, frames

    @property
    def users(self) -> int:
        """How many connections, of users that are known, have said something and are open."""
        return 0 if self.connections is None else self.connections.lines.heard

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

    def __init__(
        self, nursery: trio.Nursery, curve: Curve | None = None, heartbeat_s: float = tuning.HEARTBEAT_S
    ) -> None:
        self.curve = curve
        self._heartbeat_s = heartbeat_s
        self._guarded = False
        self._names = itertools.count(1)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._context.set(zmq.IO_THREADS, 1)  # `lines` counts on the order in which one of them tells things
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
        watched: bool = False,
        starting: bool = False,
        identity: bytes | None = None,
        max_message: int = MAX_MESSAGE,
        server: bytes = b"",
    ) -> Socket:
        """A socket, bound or connected. Limits are messages per peer (0: none).

        With CURVE keys every one encrypts, and one that binds needs `open_guard` first. server: the public key of
        whom it connects to, where that is not the broker.

        heartbeat: ping the peer; by default on connecting sockets only. manual: XPUB that grants each subscription by
        hand. mandatory: a ROUTER that says so when it can't deliver. relaxed: a REQ that may give up on an answer and
        ask again. immediate: take messages only while there is a connection. watched:
        `happened` tells when it joins and ends. starting: the peer is a program of this machine that is just starting.
        """
        raw = self._context.socket(KINDS[kind])
        pings = heartbeat if heartbeat is not None else connect is not None
        tune(raw, connects=pings, heartbeat_s=self._heartbeat_s, starting=starting)
        apply(raw, tuning.of_kind(kind, manual=manual, mandatory=mandatory, relaxed=relaxed))
        if pings and connect is not None and not immediate:
            # When a queue is full libzmq reads no answer to its pings, and connects anew; it ends the process when
            # the queue then is read from (4.3.5, `_input_stopped`), unless a new connection has a queue of its own.
            # What comes to a SUB is not ours to bound otherwise; others get answers, as many as they asked for.
            immediate, receive_limit = kind == "sub", receive_limit if kind == "sub" else 0
        limits: Options = {"RCVHWM": receive_limit, "SNDHWM": send_limit, "MAXMSGSIZE": max_message}
        apply(raw, limits | {"IPV6": int("[" in (bind or connect or "")), "IMMEDIATE": int(immediate)})
        if identity is not None:
            raw.setsockopt(zmq.IDENTITY, identity)
        if self.curve is not None:
            if bind is not None and not self._guarded:  # without it libzmq would let every key in
                raw.close(linger=0)
                raise ConfigError("nobody guards this context", where="CURVE", hint="open_guard comes first")
            apply(raw, tuning.encryption(self.curve, server, binds=bind is not None))
            if bind is None and kind == "dealer":
                raw.setsockopt(zmq.PROBE_ROUTER, 1)  # it says that it is there: a server cuts who says nothing
        socket = Socket(raw, label or f"{kind} {bind or connect or ''}", mandatory=mandatory)
        try:
            if self.curve is not None and bind is not None:
                socket.know_users(self._context, f"{ZAP_DOMAIN}/{next(self._names)}")
            if watched:
                socket.watch(self._context, str(next(self._names)), (Happening.JOINED, Happening.ENDED))
            for prefix in subscribe:
                socket.subscribe(prefix.encode())
            if bind is not None:
                socket.bind(bind)
            if connect is not None:
                socket.connect(connect)
        except BaseException:
            socket.close(linger_ms=0)
            raise
        return self._keep(socket)

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

    def _keep(self, socket: Socket) -> Socket:
        self._open = [other for other in self._open if not other.closed]
        self._open.append(socket)
        self._nursery.start_soon(socket._pump)
        return socket

    async def close(self) -> None:
        for socket in self._open:
            socket.close()
        await trio.to_thread.run_sync(self._context.term)  # it waits for what lingers


def tune(
    raw: zmq.Socket[bytes], *, connects: bool, heartbeat_s: float = tuning.HEARTBEAT_S, starting: bool = False
) -> None:
    """What every link of ours is set to. `connects`: this end finds out whether the other is still there."""
    apply(raw, tuning.link(pings=connects, heartbeat_s=heartbeat_s, starting=starting))


def apply(raw: zmq.Socket[bytes], options: Options) -> None:
    """Set options by libzmq's names."""
    for name, value in options.items():
        raw.setsockopt(OPTIONS[name] if name in OPTIONS else zmq.SocketOption[name], value)


def _property(message: zmq.Frame, name: str) -> str:
    """What libzmq knows of whom a message came from; "" if nothing."""
    try:
        return str(message.get(name))
    except zmq.ZMQError:
        return ""


@asynccontextmanager
async def open_sockets(
    curve: Curve | None = None, *, heartbeat_s: float = tuning.HEARTBEAT_S
) -> AsyncIterator[Sockets]:
    """A place to open sockets in; on leaving, all are closed (each may still deliver for `LINGER_MS`).

    curve: every socket encrypts and proves itself with these keys. heartbeat_s: between pings of a link.
    """
    async with trio.open_nursery() as nursery:
        sockets = Sockets(nursery, curve, heartbeat_s)
        try:
            yield sockets
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await sockets.close()
