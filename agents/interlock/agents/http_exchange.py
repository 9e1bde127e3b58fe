"""One request of an HTTP client and its way to an instance and back: exchange, attempts, flow, and connections.

Each copy of a request given to an instance is an *attempt*, a task of its own that puts the answer into the exchange's
flow. An instance is free again as soon as its answer is in the flow: a slow client doesn't hold it up, unless the
answer is larger than the flow's buffer.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from functools import partial
from typing import Any, Protocol

import msgspec
import trio

from interlock.agents.connections import Connection, Connections
from interlock.agents.http1 import Backend, ClientSide, HttpError, RequestHead, ResponseHead
from interlock.agents.listening import place_of
from interlock.agents.routing import Router
from interlock.agents.routing_types import Fail, Send

REPEATABLE = frozenset((b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE"))  # idempotent by RFC 9110, 9.2.2
SAFE = frozenset((b"GET", b"HEAD"))  # asking has no effect, as far as the method says
BUFFERED_ANSWER = 1 << 20  # bytes of an answer that the client has not read yet; then the instance has to wait
SHORT_ANSWER = 1 << 16  # bytes; such an answer to what may be asked twice goes to the client when all of it is here
COMPARED_ANSWER = 1 << 20  # bytes; longer answers are not compared
CLIENT_S = 30.0  # a client that takes, or gives, nothing of a body for so long is disconnected
CONNECT_S = 1.0  # an instance on this machine that doesn't accept within this time doesn't listen
POOLED = 32  # idle connections kept per instance
FRESH_S = (
    1.0  # what may not be asked twice takes only a connection used within this time: servers keep idle ones longer
)

BROKEN = (HttpError, OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)

log = logging.getLogger(__name__)


class Answer(msgspec.Struct, frozen=True):
    """A whole answer, kept to be compared."""

    status: int
    body: bytes


class Flow:
    """One answer on its way to the client: a head or a failure, then pieces of the body, bounded in bytes."""

    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        self.failure: Fail[Any, Any] | None = None
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._ended = self._broken = False
        self._changed = trio.lowlevel.ParkingLot()

    def begin(self, head: ResponseHead) -> None:
        self.head = head
        self._changed.unpark_all()

    def fail(self, failure: Fail[Any, Any]) -> None:
        self.failure = failure
        self._changed.unpark_all()

    def end(self, *, broken: bool) -> None:
        if not self._ended:
            self._ended, self._broken = True, broken
        self._changed.unpark_all()

    async def started(self) -> None:
        while self.head is None and self.failure is None:
            await self._changed.park()

    async def put(self, piece: bytes) -> None:
        """Waits while the client has too much unread."""
        self._pieces.append(piece)
        self._size += len(piece)
        self._changed.unpark_all()
        while self._size > BUFFERED_ANSWER:
            await self._changed.park()

    def take(self) -> tuple[bytes, bool]:
        """What is here of the body, and whether that is all of it."""
        body = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        self._changed.unpark_all()
        return body, self._ended and not self._broken

    async def get(self) -> bytes | None:
        """The next piece, None at the end. HttpError if the instance broke off."""
        while not self._pieces and not self._ended:
            await self._changed.park()
        if self._pieces:
            piece = self._pieces.popleft()
            self._size -= len(piece)
            self._changed.unpark_all()
            return piece
        if self._broken:
            raise HttpError("the instance broke off in the middle of its answer", 502)
        return None


class Exchange:
    """One request of a client, with so much of its body as is buffered, and its answer's flow."""

    def __init__(self, head: RequestHead, body: bytes, rest: ClientSide | None, nursery: trio.Nursery) -> None:
        self.head = head
        self.body = body
        self.rest = rest  # where the rest of the body comes from; None: it is all here
        self.nursery = nursery
        self.flow = Flow()
        self.tunnel: tuple[Connection, Backend] | None = None  # after a change of the protocol
        self.attempts: list[Attempt] = []

    @property
    def whole(self) -> bool:
        """All of its body is here, so that it can be sent again."""
        return self.rest is None

    @property
    def repeatable(self) -> bool:
        return self.whole and self.head.method in REPEATABLE

    @property
    def safe(self) -> bool:
        return self.head.method in SAFE and not self.head.upgrade


class Pool:
    """Connections to one instance."""

    def __init__(self, endpoint: str) -> None:
        self._address = place_of(endpoint)
        self._idle: deque[tuple[Backend, float]] = deque()
        self._closed = False

    async def take(self, *, repeatable: bool, fresh: bool = False) -> Backend:
        """A connection that can carry a request. OSError or TooSlowError if the instance doesn't accept."""
        now = trio.current_time()
        while self._idle and not fresh:
            backend, since = self._idle.pop()
            if backend.quiet and (repeatable or now - since < FRESH_S):
                return backend
            await backend.close()
        with trio.fail_after(CONNECT_S):
            stream = await trio.open_tcp_stream(*self._address)
        return Backend(stream)

    def keep(self, backend: Backend) -> bool:
        """Whether the connection will be used again; if not, it is the caller's to close."""
        if self._closed or len(self._idle) >= POOLED or not backend.again():
            return False
        backend.used = True
        self._idle.append((backend, trio.current_time()))
        return True

    def close(self) -> None:
        self._closed = True
        for backend, _ in self._idle:
            backend.stream.socket.close()
        self._idle.clear()


class _Ending(msgspec.Struct, frozen=True):
    status: int
    answer: Answer | None


class Front(Protocol):
    """What an attempt needs of its gateway."""

    agent: str
    router: Router[Exchange, Exchange, Answer]
    request_timeout_s: float
    mirrors: bool
    connections: Connections

    def tell(self, callback: Any, value: Any) -> None: ...

    def ended(self, attempt: Attempt, commands: list[Any]) -> None: ...


class Attempt:
    """A copy of a request at an instance: sends it, puts its answer into the flow, and tells the core how it went."""

    def __init__(self, front: Front, send: Send[Exchange], pool: Pool) -> None:
        self.instance = send.instance
        self.scope = trio.CancelScope()
        self.began = False  # its answer is the client's
        self._front = front
        self._copy = send.copy
        self._mirrored = send.mirrored
        self._exchange = send.body
        self._pool = pool
        self._reached = False  # the instance may have seen the request
        self._client_left = False
        self._uploading = trio.CancelScope()

    async def run(self) -> None:
        router = self._front.router
        report = partial(router.cancelled, self.instance, self._copy)
        try:
            with self.scope:
                ending = await self._converse()
                if ending is not None:
                    report = partial(
                        router.finish, self.instance, self._copy, ending.answer, error=ending.status >= 500
                    )
        except BROKEN as error:
            log.debug("%s: no answer from %s: %s", self._front.agent, self.instance, error)
            report = partial(router.failed, self.instance, self._copy, sent=self._reached)
        except Exception:
            log.exception("%s: a request to %s failed", self._front.agent, self.instance)
            report = partial(router.failed, self.instance, self._copy, sent=True)
        finally:
            self._uploading.cancel()
            if self._client_left:
                report = partial(router.abandoned, self.instance, self._copy)
            if self.began:
                self._exchange.flow.end(broken=True)  # without effect after its proper end
            self._front.ended(self, report(trio.current_time()))

    async def _converse(self) -> _Ending | None:
        """The whole exchange with the instance; None if another attempt was first."""
        backend = await self._pool.take(repeatable=self._exchange.repeatable)
        kept = False
        try:
            try:
                head = await self._ask(backend)
            except BROKEN:
                if not (backend.used and self._exchange.repeatable):
                    raise
                await backend.close()  # the server had closed it while it was idle
                backend = await self._pool.take(repeatable=True, fresh=True)
                head = await self._ask(backend)
            if head.status == 101:
                kept = self._hand_over(backend, head)
                return _Ending(head.status, None) if kept else None
            body = await self._short_body(backend, head)
            first = self._front.router.begin(self.instance, self._copy, trio.current_time())
            if first:
                self._take_over(head)
            elif not self._mirrored:
                return None
            answer = await self._receive(backend, head, body)
            self._uploading.cancel()
            if first:
                self._exchange.flow.end(broken=False)
            kept = self._pool.keep(backend)
            return _Ending(head.status, answer)
        finally:
            if not kept:
                await backend.close()

    async def _ask(self, backend: Backend) -> ResponseHead:
        exchange = self._exchange
        self._reached = True
        try:
            await backend.start(exchange.head, exchange.body, complete=exchange.rest is None)
        except trio.BrokenResourceError:
            return await backend.response()  # it may have answered, "too large" for one, before it closed
        if exchange.rest is not None:
            exchange.nursery.start_soon(self._upload, exchange.rest, backend)
        return await backend.response()

    async def _upload(self, client: ClientSide, backend: Backend) -> None:
        """The part of the body that isn't buffered."""
        with self._uploading:
            while True:
                try:
                    with trio.fail_after(CLIENT_S):
                        piece = await client.chunk()
                except BROKEN:
                    self._client_left = True
                    self.scope.cancel()
                    gone = Fail(self._exchange, self._exchange, "incomplete", "the request's body did not arrive")
                    self._exchange.flow.fail(gone)
                    return
                try:
                    await (backend.end() if piece is None else backend.send(piece))
                except BROKEN:
                    return  # it may have answered before it closed: whoever reads its answer learns
                if piece is None:
                    return

    def _take_over(self, head: ResponseHead) -> None:
        """This answer is the client's; other attempts at the same request are pointless."""
        self.began = True
        for other in self._exchange.attempts:
            if other is not self:
                other.scope.cancel()
        self._exchange.flow.begin(head)

    def _hand_over(self, backend: Backend, head: ResponseHead) -> bool:
        """The connection is the client's from now on, and in nobody's window. False: nobody wants it."""
        if self._mirrored or not self._front.router.begin(self.instance, self._copy, trio.current_time()):
            return False
        connection = self._front.connections.begin(self.instance, self._front.tell)
        self._exchange.tunnel = connection, backend
        self._take_over(head)
        self._exchange.flow.end(broken=False)
        return True

    async def _short_body(self, backend: Backend, head: ResponseHead) -> deque[bytes | None]:
        """The whole body of a short answer: an instance that dies or hangs before its end can still be replaced.

        Many servers send head and body apart. What is long, or of no announced length, is not waited for.
        """
        body: deque[bytes | None] = deque()
        if self._exchange.repeatable and 0 <= head.length <= SHORT_ANSWER:
            with trio.fail_after(self._front.request_timeout_s):
                while not body or body[-1] is not None:
                    body.append(await backend.chunk())
        return body

    async def _receive(self, backend: Backend, head: ResponseHead, begun: deque[bytes | None]) -> Answer | None:
        """The body, into the flow if it is the client's; returned if it is to be compared and not too long.

        begun: what is here of it already, with None where it ends.
        """
        kept: list[bytes] | None = [] if self._mirrored or self._front.mirrors else None
        size = 0
        # a stream of no announced length may be silent for as long as it likes
        silence_s = self._front.request_timeout_s if head.length >= 0 else math.inf
        while True:
            with trio.fail_after(silence_s):
                piece = begun.popleft() if begun else await backend.chunk()
            if piece is None:
                return Answer(head.status, b"".join(kept)) if kept is not None else None
            if self.began:
                await self._exchange.flow.put(piece)
            size += len(piece)
            if size > COMPARED_ANSWER:
                kept = None
            elif kept is not None:
                kept.append(piece)
