"""What passes the HTTP gateway while it happens: streams both ways, server-sent events, websockets, pipelines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from interlock.agents.http_gateway import HttpGateway

# An agent as users have them: /echo (piece by piece), /events, /big and /progress, /status, anything else says its path
HTTP_PROGRAM = """
import http.server, sys, time
name = sys.argv[1]
seen, written = [], 0
class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size); self.rfile.readline()
        self.rfile.readline()
    def piece(self, data):
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data)); self.wfile.flush()
    def head(self, kind="text/plain", status=200):
        self.send_response(status); self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
    def any(self):
        global written
        path, _, query = self.path.partition("?")
        seen.append(self.path)
        if path == "/echo":
            self.head()
            for chunk in self.chunks(): self.piece(chunk.upper())
            return self.piece(b"")
        if path == "/events":
            self.head("text/event-stream")
            for n in range(int(query)):
                self.piece(b"data: %d\\n\\n" % n); time.sleep(0.6)
            return self.piece(b"")
        if path == "/big":
            self.send_response(200); self.send_header("Content-Length", str(200 << 20)); self.end_headers()
            for _ in range(200):
                self.wfile.write(b"x" * (1 << 20)); written += 1
            return
        if path == "/status":
            self.send_response(int(query))
            self.send_header("Content-Length", "0" if query == "204" else "5"); self.end_headers()
            return
        if "chunked" in self.headers.get("Transfer-Encoding", ""): body = b"".join(self.chunks())
        else: body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        text = str(written) if path == "/progress" else ",".join(seen) if path == "/seen" else self.path
        answer = f"{name} {text} {len(body)}".encode()
        self.send_response(200); self.send_header("Content-Length", str(len(answer))); self.end_headers()
        if self.command != "HEAD": self.wfile.write(answer)
    do_GET = do_POST = do_PUT = do_HEAD = any
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *_): pass
server = Server(("127.0.0.1", 0), Answers)
print("http://127.0.0.1:%d" % server.server_port, flush=True)
server.serve_forever()
"""

WEBSOCKET_PROGRAM = """
import logging, sys
from websockets.sync.server import serve
logging.getLogger("websockets").setLevel(logging.CRITICAL)
name = sys.argv[1]
def talk(connection):
    connection.send(f"hello from {name}")
    for message in connection:
        connection.send(message)
with serve(talk, "127.0.0.1", 0, max_size=None) as server:
    print("http://127.0.0.1:%d" % server.socket.getsockname()[1], flush=True)
    server.serve_forever()
"""


# Changes to a protocol of its own, and says its first words together with that; then it echoes.
ECHO_PROGRAM = """
import socketserver, sys
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        received = b""
        while b"\\r\\n\\r\\n" not in received: received += self.request.recv(1000)
        head, _, early = received.partition(b"\\r\\n\\r\\n")
        asked = b"upgrade: echo" in head.lower() and b"connection: upgrade" in head.lower()
        lines = (b"HTTP/1.1 101 Changed", b"Connection: Upgrade", b"Upgrade: echo", b"X-Asked: %d" % asked, b"", b"")
        self.request.sendall(b"\\r\\n".join(lines) + b"welcome " + early)
        while piece := self.request.recv(1000): self.request.sendall(piece)
        self.request.sendall(b"bye")
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
server = Server(("127.0.0.1", 0), Echo)
print("http://127.0.0.1:%d" % server.server_address[1], flush=True)
server.serve_forever()
"""


class Program:
    def __init__(self, name: str, process: trio.Process, endpoint: str) -> None:
        self.name, self.process, self.endpoint = name, process, endpoint


@asynccontextmanager
async def program(name: str, text: str = HTTP_PROGRAM) -> AsyncIterator[Program]:
    process = await trio.lowlevel.open_process([sys.executable, "-c", text, name], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        with trio.fail_after(30):
            line = b""
            while not line.endswith(b"\n"):
                line += await process.stdout.receive_some(100)
        yield Program(name, process, line.decode().strip())
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            await process.stdout.aclose()


class Client:
    """A connection of bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.received = b""

    async def until(self, wanted: bytes) -> bytes:
        """All that came up to these bytes, which are taken off."""
        while wanted not in self.received:
            piece = await self.stream.receive_some(1 << 16)
            assert piece, self.received
            self.received += piece
        before, _, self.received = self.received.partition(wanted)
        return before + wanted

    async def rest(self) -> bytes:
        async for piece in self.stream:
            self.received += piece
        return self.received


class Bench:
    def __init__(self, gateway: HttpGateway) -> None:
        self.gateway = gateway
        self.clients: list[Client] = []
        self.stack = ExitStack()

    @property
    def place(self) -> str:
        return self.gateway.endpoint.removeprefix("http://")

    def attach(self, *instances: Program, window: int = 64) -> None:
        for instance in instances:
            self.gateway.attach(instance.name, instance.endpoint, window=window, idempotent=lambda _: False)

    async def client(self, sent: bytes = b"") -> Client:
        host, _, port = self.place.partition(":")
        client = Client(await trio.open_tcp_stream(host, int(port)))
        self.clients.append(client)
        await client.stream.send_all(sent)
        return client

    async def ask(self, path: str) -> str:
        client = await self.client(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
        return (await client.rest()).partition(b"\r\n\r\n")[2].decode()

    async def websocket(self) -> ClientConnection:
        return await in_thread(
            lambda: self.stack.enter_context(connect(f"ws://{self.place}/", max_size=None, compression=None))
        )


@asynccontextmanager
async def bench(**times: float) -> AsyncIterator[Bench]:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            gateway = HttpGateway("alpha", "http://127.0.0.1:0", **times)
            await nursery.start(gateway.run)
            b = Bench(gateway)
            try:
                yield b
            finally:
                await in_thread(b.stack.close)
                for client in b.clients:
                    await trio.aclose_forcefully(client.stream)
                nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110  # counters inside the gateway ring no bell
        await trio.sleep(0.002)


def in_thread(work: Callable[[], Any]) -> Any:
    return trio.to_thread.run_sync(work)


# --- streams


async def test_each_piece_of_a_body_is_answered_before_the_next_one_is_sent() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = await b.client(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for word in (b"one", b"three", b"x" * 100_000):
            await client.stream.send_all(b"%x\r\n%s\r\n" % (len(word), word))
            await client.until(word[-3:].upper())
        await client.stream.send_all(b"0\r\n\r\n")
        await client.until(b"0\r\n\r\n")
        await client.stream.send_all(b"GET /again HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await client.rest()).endswith(b"old /again 0")
        assert b.gateway.snapshot(trio.current_time())["old"].errors == 0


async def test_server_sent_events_arrive_one_by_one_however_long_the_stream_is_silent() -> None:
    async with program("old") as old, bench(request_timeout_s=0.3) as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = await b.client(b"GET /events?3 HTTP/1.1\r\nHost: x\r\n\r\n")
        for n in range(3):
            await client.until(b"data: %d\n\n" % n)
            assert b.gateway.in_flight("old") == 1
        await client.until(b"0\r\n\r\n")
        await b.gateway.drained("old")


async def test_a_client_that_leaves_a_stream_frees_the_instance() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old, window=1)
        b.gateway.route({"old": 1.0})
        client = await b.client(b"GET /events?1000 HTTP/1.1\r\nHost: x\r\n\r\n")
        await client.until(b"data: 0")
        await client.stream.aclose()
        await b.gateway.drained("old")
        assert await b.ask("/who") == "old /who 0"
        assert b.gateway.snapshot(trio.current_time())["old"].errors == 0


async def test_a_slow_reader_holds_back_a_large_answer_and_nothing_is_kept_of_it() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        slow = await b.client(b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await slow.until(b"\r\n\r\n")
        written, before = 0, -1
        while written != before:
            await trio.sleep(0.3)
            before, written = written, int((await b.ask("/progress")).split()[1])
        assert 0 < written < 100
        total = len(slow.received)
        while piece := await slow.stream.receive_some(1 << 20):
            total += len(piece)
        assert total == 200 << 20


async def test_who_waits_to_be_asked_for_the_body_is_asked_once() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        for framing in (b"Content-Length: 3000000", b"Transfer-Encoding: chunked"):
            client = await b.client(b"POST /who HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n%s\r\n\r\n" % framing)
            assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            body = b"x" * 3_000_000
            chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            await client.stream.send_all(body if b"Length" in framing else chunked)
            answer = await client.until(b"old /who 3000000")
            assert answer.startswith(b"HTTP/1.1 200")


# --- framing


async def test_requests_in_one_piece_are_answered_in_their_order() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = await b.client(
            b"GET /1 HTTP/1.1\r\nHost: x\r\n\r\n"
            b"POST /2 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
            b"POST /3 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
            b"HEAD /4 HTTP/1.1\r\nHost: x\r\n\r\n"
            b"GET /5 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        answers = await client.rest()
        at = [answers.index(text) for text in (b"old /1 0", b"old /2 3", b"old /3 2", b"old /5 0")]
        assert at == sorted(at)
        assert answers.count(b"HTTP/1.1 200") == 5
        assert b"old /4" not in answers


@pytest.mark.parametrize(("status", "length"), [(204, None), (304, b"5")])
async def test_answers_without_a_body_have_none_and_the_connection_goes_on(status: int, length: bytes | None) -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = await b.client(b"GET /status?%d HTTP/1.1\r\nHost: x\r\n\r\n" % status)
        head = await client.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d" % status)
        assert (b"content-length: 5" in head.lower()) == (length is not None)
        await client.stream.send_all(b"GET /next HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await client.rest()).endswith(b"old /next 0")


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 6\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 30",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding:\x0bchunked",
        b"Transfer-Encoding : chunked",
        b"Content-Length: 1, 2",
        b"Content-Length: +6",
        b"Content-Length: 6\r\nContent-Length: 7",
        b"X: y\r\n Content-Length: 0\r\nContent-Length: -1",
    ],
)
async def test_a_request_whose_end_is_not_clear_is_refused_and_hides_no_other(headers: bytes) -> None:
    hidden = b"0\r\n\r\nGET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = await b.client(b"POST /p HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n%s" % (headers, hidden))
        answer = await client.rest()
        assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 501")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert await b.ask("/seen") == "old /seen 0"


async def test_a_transfer_encoding_in_http_1_0_is_refused() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = await b.client(b"POST /p HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 400")


# --- websockets


async def test_a_websocket_passes_both_ways_and_stays_with_its_instance() -> None:
    async with program("old", WEBSOCKET_PROGRAM) as old, program("new", WEBSOCKET_PROGRAM) as new, bench() as b:
        b.attach(old, new, window=1)
        b.gateway.route({"old": 1.0})
        first = await b.websocket()
        assert await in_thread(first.recv) == "hello from old"
        b.gateway.route({"new": 1.0})
        second = await b.websocket()
        assert await in_thread(second.recv) == "hello from new"
        large = os.urandom(3_000_000)
        for socket in (first, second):
            for message in ("text", large):
                await in_thread(lambda s=socket, m=message: s.send(m))
                assert await in_thread(socket.recv) == message
        assert (b.gateway.in_flight("old"), b.gateway.in_flight("new")) == (1, 1)
        seen = b.gateway.snapshot(trio.current_time())["old"]
        assert (seen.connections, seen.connections_total, seen.in_flight, seen.errors) == (1, 1, 0, 0)
        assert seen.bytes_in > len(large)
        assert seen.bytes_out > len(large)
        await in_thread(first.close)
        await b.gateway.drained("old")


async def test_a_rollback_ends_the_candidate_s_websockets_and_no_other() -> None:
    async with program("old", WEBSOCKET_PROGRAM) as old, program("new", WEBSOCKET_PROGRAM) as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 1.0})
        stays = await b.websocket()
        b.gateway.route({"new": 1.0})
        ended = await b.websocket()
        assert await in_thread(ended.recv) == "hello from new"
        b.gateway.route({"old": 1.0})
        b.gateway.rescue("new")
        with pytest.raises(ConnectionClosed):
            await in_thread(ended.recv)
        again = await b.websocket()
        assert await in_thread(again.recv) == "hello from old"
        assert await in_thread(stays.recv) == "hello from old"
        await b.gateway.drained("new")


async def test_many_websockets_take_nothing_of_the_window() -> None:
    async with program("old", WEBSOCKET_PROGRAM) as old, bench() as b:
        b.attach(old, window=2)
        b.gateway.route({"old": 1.0})
        sockets = [await b.websocket() for _ in range(10)]
        assert {await in_thread(socket.recv) for socket in sockets} == {"hello from old"}
        b.gateway.detach("old")
        for socket in sockets:
            with pytest.raises(ConnectionClosed):
                await in_thread(socket.recv)


async def test_a_server_that_does_not_change_the_protocol_answers_as_ever() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        with pytest.raises(InvalidStatus) as refused:
            await b.websocket()
        assert refused.value.response.status_code == 200
        assert b.gateway.snapshot(trio.current_time())["old"].connections is None


async def test_what_is_said_together_with_the_change_of_the_protocol_is_not_lost_nor_is_the_end_of_one_side() -> None:
    async with program("old", ECHO_PROGRAM) as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = await b.client(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: echo\r\n\r\nearly "
        )
        head = (await client.until(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 101 ")
        assert b"x-asked: 1" in head
        assert b"upgrade: echo" in head
        assert b"connection: upgrade" in head
        await client.until(b"welcome early ")
        await client.stream.send_all(b"more ")
        await client.until(b"more ")
        await client.stream.send_eof()
        assert await client.rest() == b"bye"
        await b.gateway.drained("old")


async def test_a_protocol_may_not_be_changed_without_being_asked() -> None:
    async with program("old", ECHO_PROGRAM) as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = await b.client(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 502")
