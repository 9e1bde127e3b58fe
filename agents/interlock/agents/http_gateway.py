"""The gateway of an agent that answers HTTP/1.1 requests; what goes where is decided in `routing.py`.

One task per client connection reads requests and writes answers; `http_exchange.py` is what happens between.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from interlock.agents.compare import Pair
from interlock.agents.gateway import RoutedGateway, digest, paired
from interlock.agents.http1 import ClientSide, Headers, HttpError, RequestHead, value_of
from interlock.agents.http_exchange import BROKEN, CLIENT_S, Answer, Attempt, Exchange, Flow, Pool, address_of
from interlock.agents.routing_types import Compare, Fail, Reply, Send
from interlock.broker.config import CompareConfig
from interlock.broker.errors import ConfigError, InUse

BUFFERED_BODY = 1 << 20  # bytes of a request's body kept, so that it can be sent again; a longer one is sent once
MAX_CLIENTS = 2000  # connections at once, each with a descriptor and one more to an instance
IDLE_S = 60.0  # a connection on which no whole request head comes for so long is closed

STATUS = {
    "instance-died": 502,
    "timeout": 504,
    "overloaded": 503,
    "no-instance": 503,
    "quarantined": 503,
    "incomplete": 408,
}

log = logging.getLogger(__name__)


class HttpGateway(RoutedGateway):
    """The front of an agent that answers HTTP. What may be asked twice is decided by the method, as RFC 9110 says."""

    def __init__(self, agent: str, endpoint: str, *, request_timeout_s: float = 30.0, hold_s: float = 10.0) -> None:
        super().__init__(agent, endpoint, request_timeout_s=request_timeout_s, hold_s=hold_s)
        self.request_timeout_s = request_timeout_s
        self.mirrors = False  # answers are kept, to be compared
        self.malformed = 0  # client connections that ended because of bad HTTP, theirs or an instance's
        self._pools: dict[str, Pool] = {}
        self._attempts: set[Attempt] = set()
        self._nursery: trio.Nursery | None = None
        self._clients = 0

    @staticmethod
    def key_of(body: Exchange) -> bytes | None:
        return digest(body.head.method, body.head.target, body.body) if body.rest is None else None

    async def run(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        host, port = address_of(self.endpoint)
        try:
            listeners = await trio.open_tcp_listeners(port, host=None if host == "*" else host, backlog=1024)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                hint = "who listens there? try: ss -ltnp"
                raise InUse("the address is in use", where=self.endpoint, hint=hint) from None
            raise ConfigError(f"can't bind: {error}", where=self.endpoint) from None
        self.endpoint = f"http://{host}:{listeners[0].socket.getsockname()[1]}"
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._run_timer)
                nursery.start_soon(self._run_comparisons)
                nursery.start_soon(trio.serve_listeners, self._serve_client, listeners)
                task_status.started(self.endpoint)
        finally:
            self._nursery = None
            self.router.close()
            for pool in self._pools.values():
                pool.close()
            self._pools.clear()

    def attach(self, instance: str, endpoint: str, *, window: int, idempotent: Callable[[bytes], bool]) -> None:
        """As of `Gateway`, but `idempotent` is not asked: HTTP's methods say it."""
        self.detach(instance)
        self._pools[instance] = Pool(endpoint)
        self.router.attach(
            instance, window=window, idempotent=lambda e: e.repeatable, mirrorable=lambda e: e.mirrorable
        )

    def detach(self, instance: str) -> None:
        super().detach(instance)
        self._gone(instance)

    def mirror(
        self,
        instance: str | None,
        *,
        compare: CompareConfig | None = None,
        on_pair: Callable[[Pair], None] | None = None,
    ) -> None:
        super().mirror(instance, compare=compare, on_pair=on_pair)
        self.mirrors = instance is not None

    # --- clients

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        client = ClientSide(stream)
        self._clients += 1
        try:
            if self._clients > MAX_CLIENTS:
                await self._refuse(client, 503, "overloaded", f"{MAX_CLIENTS} connections are open already")
                return
            address = str(stream.socket.getpeername()[0]).encode()
            while await self._serve_request(client, address) and client.again():
                pass
            await client.close_gently()
        except HttpError as error:
            self.malformed += 1
            if client.can_respond:  # else it is in the middle of an answer, and must see that it is cut off
                await self._refuse(client, error.status, "bad-request", error.what)
                await client.close_gently()
        except BROKEN as error:
            log.debug("%s: a client left: %r", self.agent, error)  # its answer has nowhere to go
        except Exception:
            log.exception("%s: a client's connection failed", self.agent)  # and harms no other
        finally:
            self._clients -= 1
            await client.close()

    async def _refuse(self, client: ClientSide, status: int, code: str, message: str) -> None:
        """An answer of the gateway's own, if one can still be given on this connection."""
        if not client.can_respond:
            return
        answer = msgspec.json.encode(
            {"status": "error", "error": {"code": code, "message": f"{self.agent}: {message}"}}
        )
        headers = [(b"Content-Type", b"application/json")]
        if status == 503:
            headers.append((b"Retry-After", b"1"))
        try:
            with trio.fail_after(CLIENT_S):
                await client.respond_whole(status, answer, headers)
        except BROKEN as error:
            log.debug("%s: a client left before it was told %r: %r", self.agent, message, error)

    async def _serve_request(self, client: ClientSide, address: bytes) -> bool:
        """One request and its answer. False if the client has no more."""
        head = None
        with trio.move_on_after(IDLE_S):
            head = await client.request()
        if head is None:
            return False
        if head.method == b"CONNECT" or head.upgrade.lower() not in (b"", b"h2c"):  # h2c may be passed over
            what = "a tunnel" if head.method == b"CONNECT" else f"the upgrade to {head.upgrade.decode('latin-1')!r}"
            await self._refuse(client, 501, "not-supported", f"{what} is not supported: the gateway speaks HTTP/1.1")
            return False
        body, complete = await _buffer(client)
        head = msgspec.structs.replace(head, headers=forwarded(head.headers, address))
        problem: Exception | None = None
        async with trio.open_nursery() as nursery:
            exchange = Exchange(head, body, None if complete else client, nursery)
            now = trio.current_time()
            self._carry_out(self.router.request(exchange, id(client), exchange, len(body), now))
            try:
                await self._relay(exchange.flow, client)
            except BROKEN as error:
                problem = error  # raised outside, where no nursery wraps it in a group
            nursery.cancel_scope.cancel()
        if problem is not None:
            raise problem
        return True

    async def _relay(self, flow: Flow, client: ClientSide) -> None:
        await flow.started()
        if flow.head is None:
            assert flow.failure is not None
            await self._refuse(client, STATUS[flow.failure.code], flow.failure.code, flow.failure.message)
            return
        with trio.fail_after(CLIENT_S):
            await client.respond(flow.head)
        while (piece := await flow.get()) is not None:
            with trio.fail_after(CLIENT_S):
                await client.send(piece)
        with trio.fail_after(CLIENT_S):
            await client.end()

    # --- what the core says

    def _reply(self, command: Reply[Any, Any]) -> None:
        raise AssertionError("answers go through the flow")

    def _fail(self, command: Fail[Any, Any]) -> None:
        command.client.flow.fail(command)

    def _send(self, command: Send[Any]) -> bool:
        exchange: Exchange = command.body
        nursery = self._nursery if command.mirrored else exchange.nursery
        pool = self._pools.get(command.instance)
        if nursery is None or pool is None:
            return False
        attempt = Attempt(self, command, pool)
        if command.mirrored:
            attempt.scope.deadline = trio.current_time() + self.request_timeout_s  # no client's end ends it
        else:
            exchange.attempts.append(attempt)
        self._attempts.add(attempt)
        nursery.start_soon(attempt.run)
        return True

    def ended(self, attempt: Attempt, commands: list[Any]) -> None:
        """An attempt is over, and this is what the core says to that."""
        self._attempts.discard(attempt)
        self._carry_out(commands)

    def _gone(self, instance: str) -> None:
        pool = self._pools.pop(instance, None)
        if pool is not None:
            pool.close()
        for attempt in self._attempts:
            if attempt.instance == instance and not attempt.began:  # one that has begun ends with its connection
                attempt.scope.cancel()

    async def _pair(self, command: Compare[Any, Any], config: CompareConfig) -> Pair:
        head: RequestHead = command.body.head
        old: Answer = command.old
        new: Answer | None = command.new
        found = f"status {old.status}, not {new.status}" if new is not None and old.status != new.status else ""
        request = [b"%s %s" % (head.method, head.target)]
        bodies = [new.body] if new is not None else None
        return await paired(command, request, [old.body], bodies, config=config, found=found)


async def _buffer(client: ClientSide) -> tuple[bytes, bool]:
    """The start of a request's body, and whether it is all of it."""
    pieces: list[bytes] = []
    size = 0
    while size <= BUFFERED_BODY:
        try:
            with trio.fail_after(CLIENT_S):
                piece = await client.chunk()
        except trio.TooSlowError:
            raise HttpError(f"nothing of the request's body came for {CLIENT_S:g} s", 408) from None
        if piece is None:
            return b"".join(pieces), True
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces), False


def forwarded(headers: Headers, address: bytes) -> Headers:
    """The headers, and in X-Forwarded-For the client's address after those that were there."""
    before = value_of(headers, b"x-forwarded-for")
    kept = [(name, value) for name, value in headers if name.lower() != b"x-forwarded-for"]
    return [*kept, (b"X-Forwarded-For", before + b", " + address if before else address)]
