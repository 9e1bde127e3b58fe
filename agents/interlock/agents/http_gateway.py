"""The gateway of an agent that answers HTTP/1.1 requests; what goes where is decided in `routing.py`.

One task per client connection reads requests and writes answers; `http_exchange.py` is what happens between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from interlock.agents.compare import Pair
from interlock.agents.comparing import Answers, Comparison, Judge, paired, verdict_of
from interlock.agents.connections import Connections
from interlock.agents.gateway import RoutedGateway, digest, guarded
from interlock.agents.http1 import ClientSide, Headers, HttpError, RequestHead, value_of
from interlock.agents.http_exchange import BROKEN, CLIENT_S, Answer, Attempt, Exchange, Pool
from interlock.agents.latency import InstanceFigures
from interlock.agents.listening import open_listeners
from interlock.agents.routing_types import Compare, Fail, Reply, Send
from interlock.broker.config import CompareConfig

BUFFERED_BODY = 1 << 20  # bytes of a request's body kept, so that it can be sent again; a longer one is sent once
MAX_CLIENTS = 2000  # connections at once, each with a descriptor and one more to an instance
STREAMED_S = 0.05  # a chunked body that is not all here after so long is passed on as it comes
LOOK_S = 1.0  # an answer that pauses for so long: is its client still there?
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
        self.connections = Connections()  # of clients that changed to another protocol
        self._pools: dict[str, Pool] = {}
        self._attempts: set[Attempt] = set()
        self._nursery: trio.Nursery | None = None
        self._clients = 0

    @staticmethod
    def key_of(body: Exchange) -> bytes | None:
        return digest(body.head.method, body.head.target, body.body) if body.rest is None else None

    async def run(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        listeners, self.endpoint = await open_listeners(self.endpoint)
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

    def attach(
        self,
        instance: str,
        endpoint: str,
        *,
        window: int,
        idempotent: Callable[[bytes], bool],
        mirrorable: Callable[[bytes], bool] | None = None,
    ) -> None:
        """As of `Gateway`: both are asked about the request line, "METHOD /target".

        `idempotent` adds to what HTTP's methods say, and what it adds may be mirrored; `mirrorable` takes away.
        """
        self.detach(instance)
        self._pools[instance] = Pool(endpoint)
        declared = guarded(idempotent, self.agent)
        harmless = guarded(mirrorable or (lambda _: True), self.agent)

        def may_repeat(exchange: Exchange) -> bool:
            return exchange.repeatable or (exchange.whole and declared([exchange.head.line]))

        def may_mirror(exchange: Exchange) -> bool:
            line = [exchange.head.line]
            return exchange.whole and (exchange.safe or declared(line)) and harmless(line)

        self.router.attach(instance, window=window, idempotent=may_repeat, mirrorable=may_mirror)

    def detach(self, instance: str) -> None:
        super().detach(instance)
        self._gone(instance)
        self.connections.forget(instance)

    def lost(self, instance: str) -> None:
        super().lost(instance)
        self.connections.lost(instance, trio.current_time())

    def rescue(self, instance: str) -> None:
        """As of `Gateway`; connections that changed the protocol are ended: their clients connect again."""
        super().rescue(instance)
        self.connections.end(instance)

    def in_flight(self, instance: str) -> int:
        return super().in_flight(instance) + self.connections.count(instance)

    def snapshot(self, now: float) -> dict[str, InstanceFigures]:
        found = super().snapshot(now)
        for name, figures in found.items():
            seen = self.connections.figures(name)
            if seen.total:
                found[name] = msgspec.structs.replace(
                    figures,
                    errors=figures.errors + seen.errors,
                    connections=seen.open,
                    connections_total=seen.total,
                    bytes_in=seen.received,
                    bytes_out=seen.sent,
                )
        return found

    def mirror(
        self,
        instance: str | None,
        *,
        compare: CompareConfig | None = None,
        on_pair: Callable[[Pair], None] | None = None,
        judge: Judge | None = None,
        action_field: str = "action",
    ) -> None:
        super().mirror(instance, compare=compare, on_pair=on_pair, judge=judge, action_field=action_field)
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
        if head.method == b"CONNECT":
            await self._refuse(client, 501, "not-supported", "a tunnel is not supported: this is no proxy")
            return False
        body, complete = await _buffer(client, streamed=head.chunked)
        head = msgspec.structs.replace(head, headers=forwarded(head.headers, address))
        problem: Exception | None = None
        async with trio.open_nursery() as nursery:
            exchange = Exchange(head, body, None if complete else client, nursery)
            now = trio.current_time()
            try:
                self._carry_out(self.router.request(exchange, id(client), exchange, len(body), now))
                await self._relay(exchange, client)
            except BROKEN as error:
                problem = error  # raised outside, where no nursery wraps it in a group
            finally:
                if exchange.tunnel is not None:
                    connection, backend = exchange.tunnel
                    await backend.close()
                    self.connections.over(connection)
                    self._after()
            nursery.cancel_scope.cancel()
        if problem is not None:
            raise problem
        return exchange.tunnel is None

    async def _relay(self, exchange: Exchange, client: ClientSide) -> None:
        flow = exchange.flow
        await flow.started()
        if flow.head is None:
            assert flow.failure is not None
            await self._refuse(client, STATUS[flow.failure.code], flow.failure.code, flow.failure.message)
            return
        if exchange.tunnel is not None:
            connection, backend = exchange.tunnel
            with trio.fail_after(CLIENT_S):
                up = await client.switch(flow.head)
            await connection.run(client.stream, backend.stream, up=up, down=backend.early)
            return
        body, complete = flow.take()
        with trio.fail_after(CLIENT_S):
            await client.respond(flow.head, body, complete=complete)
        while not complete:
            with trio.move_on_after(LOOK_S) as pause:
                piece = await flow.get()
            if pause.cancelled_caught:
                if flow.head.length < 0 and client.left:  # what has a length comes to an end by itself
                    raise trio.BrokenResourceError("the client left while its answer paused")
                continue
            with trio.fail_after(CLIENT_S):
                await (client.end() if piece is None else client.send(piece))
            complete = piece is None

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

    async def _pair(self, command: Compare[Any, Any], comparison: Comparison) -> Pair:
        head: RequestHead = command.body.head
        old: Answer = command.old
        new: Answer | None = command.new
        method, path = head.method.decode("latin-1"), head.target.decode("latin-1")
        answers = Answers(
            name=f"{method} {path}",
            request=[command.body.body],
            old=[old.body],
            new=[new.body] if new is not None else None,
            found=f"status {old.status}, not {new.status}" if new is not None and old.status != new.status else "",
            http={"method": method, "path": path},
        )
        return paired(command, answers, [answers.name.encode("latin-1")], await verdict_of(answers, comparison))


async def _buffer(client: ClientSide, *, streamed: bool) -> tuple[bytes, bool]:
    """The start of a request's body, and whether it is all of it.

    streamed: of a length not known before; whoever sends it piece by piece may wait for an answer to what came already.
    """
    pieces: list[bytes] = []
    size = 0
    until = trio.current_time() + STREAMED_S if streamed else float("inf")
    while size <= BUFFERED_BODY:
        piece: bytes | None = b""
        try:
            with trio.move_on_at(until) as enough, trio.fail_after(CLIENT_S):
                piece = await client.chunk()
        except trio.TooSlowError:
            raise HttpError(f"nothing of the request's body came for {CLIENT_S:g} s", 408) from None
        if enough.cancelled_caught:
            break
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
