"""The HTTP gateway with real connections, and real server processes from the standard library."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from interlock.agents.compare import Pair
from interlock.agents.http_gateway import BUFFERED_BODY, HttpGateway, forwarded
from interlock.broker.config import CompareConfig, HandlerCompare
from interlock.broker.errors import ConfigError, InUse

# An agent as users have them. Paths: /who, /hang (if ?name matches), /die, /cut, /big, /stream, /echo, /early
HTTP_PROGRAM = """
import http.server, json, os, sys, threading, time
name = sys.argv[1]
class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one write per answer, else Nagle costs 40 ms each
    def log_message(self, *_): pass
    def read(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size); self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    def any(self):
        path, _, to = self.path.partition("?")
        if path == "/early":
            self.close_connection = True
            return self.say(413, b"too much")
        body = self.read()
        if path == "/hang" and to in ("", name): time.sleep(1000)
        if path == "/die" and to in ("", name): os.kill(os.getpid(), 9)
        if path == "/cut" and to in ("", name):
            self.send_response(200); self.send_header("Content-Length", "100"); self.end_headers()
            self.wfile.write(b"half"); self.wfile.flush(); self.connection.close(); os._exit(1)
        if path == "/pause" and to in ("", name):
            self.send_response(200); self.send_header("Content-Length", "100"); self.end_headers()
            self.wfile.write(b"half"); self.wfile.flush(); time.sleep(1000)
        if path == "/stream":
            self.send_response(200); self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
            for n in range(3):
                self.wfile.write(b"5\\r\\npart%d\\r\\n" % n); self.wfile.flush(); time.sleep(0.01)
            self.wfile.write(b"0\\r\\n\\r\\n")
            return
        if path == "/big": return self.say(200, b"x" * 5_000_000)
        if path == "/fail": return self.say(500, b"{}")
        if path == "/headers": return self.say(200, json.dumps(self.headers.items()).encode())
        self.say(200, json.dumps({"by": name, "method": self.command, "length": len(body), "path": path}).encode())
    def say(self, status, body):
        self.send_response(status)
        self.send_header("X-By", name)
        self.send_header("Connection", "X-Private")
        self.send_header("X-Private", "secret")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)
    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = any
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *_): pass
server = Server(("127.0.0.1", 0), Answers)
print("http://127.0.0.1:%d" % server.server_port, flush=True)
server.serve_forever()
"""


class Program:
    def __init__(self, name: str, process: trio.Process, endpoint: str) -> None:
        self.name, self.process, self.endpoint = name, process, endpoint


@asynccontextmanager
async def program(name: str) -> AsyncIterator[Program]:
    process = await trio.lowlevel.open_process([sys.executable, "-c", HTTP_PROGRAM, name], stdout=subprocess.PIPE)
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


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """The standard library's client, which knows nothing of gateways; one connection, kept alive."""

    def __init__(self, endpoint: str) -> None:
        self._connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=30)

    async def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> Answer:
        def talk() -> Answer:
            spelled = {name.replace("_", "-"): value for name, value in headers.items()}
            self._connection.request(method, path, body=body, headers=spelled)
            response = self._connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())

        return await trio.to_thread.run_sync(talk)

    def close(self) -> None:
        self._connection.close()


class Bench:
    def __init__(self, gateway: HttpGateway, nursery: trio.Nursery) -> None:
        self.gateway, self.nursery = gateway, nursery
        self.clients: list[Client] = []

    def attach(self, *instances: Program, window: int = 64) -> None:
        for instance in instances:
            self.gateway.attach(instance.name, instance.endpoint, window=window, idempotent=lambda _: False)

    def client(self) -> Client:
        client = Client(self.gateway.endpoint)
        self.clients.append(client)
        return client

    async def raw(self) -> trio.SocketStream:
        host, _, port = self.gateway.endpoint.removeprefix("http://").partition(":")
        return await trio.open_tcp_stream(host, int(port))


@asynccontextmanager
async def bench(**times: float) -> AsyncIterator[Bench]:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            gateway = HttpGateway("alpha", "http://127.0.0.1:0", **times)
            await nursery.start(gateway.run)
            b = Bench(gateway, nursery)
            try:
                yield b
            finally:
                for client in b.clients:
                    client.close()
                nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110  # counters inside the gateway ring no bell
        await trio.sleep(0.002)


async def test_requests_and_answers_pass_with_all_that_belongs_to_them() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = b.client()
        for method, body, length in (("GET", None, 0), ("POST", b"12345", 5), ("PUT", b"", 0), ("DELETE", None, 0)):
            answer = await client.ask("/who", method, body)
            assert answer.json == {"by": "old", "method": method, "length": length, "path": "/who"}
            assert answer.headers["X-By"] == "old"
            assert "X-Private" not in answer.headers
        head = await client.ask("/who", "HEAD")
        assert (head.status, head.body) == (200, b"")
        assert int(head.headers["Content-Length"]) > 0
        assert (await client.ask("/stream")).body == b"part0part1part2"
        assert len((await client.ask("/big")).body) == 5_000_000
        chunked = await client.ask("/who", "POST", iter([b"abc", b"de"]))
        assert chunked.json["length"] == 5
        figures = b.gateway.snapshot(trio.current_time())["old"]
        assert (figures.requests, figures.errors, figures.in_flight) == (8, 0, 0)


async def test_headers_of_the_hop_stay_and_the_client_s_address_is_added() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        answer = await b.client().ask(
            "/headers", Connection="X-Hop", X_Hop="1", TE="trailers", X_Mine="2", X_Forwarded_For="10.0.0.1"
        )
        seen = {name.lower(): value for name, value in answer.json}
        assert seen["x-mine"] == "2"
        assert seen["x-forwarded-for"] == "10.0.0.1, 127.0.0.1"
        assert not {"x-hop", "te", "connection", "transfer-encoding", "content-length"} & set(seen)
        assert seen["host"] == b.gateway.endpoint.removeprefix("http://")


def test_the_client_s_address_comes_after_all_that_were_there() -> None:
    headers = [(b"X-Forwarded-For", b"a"), (b"Host", b"h"), (b"x-forwarded-for", b"b")]
    assert forwarded(headers, b"c") == [(b"Host", b"h"), (b"X-Forwarded-For", b"a, b, c")]
    assert forwarded([], b"c") == [(b"X-Forwarded-For", b"c")]


async def test_large_bodies_stream_both_ways() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = b.client()
        large = b"x" * (3 * BUFFERED_BODY)
        assert (await client.ask("/who", "POST", large)).json["length"] == len(large)
        pieces = iter([large[:100_000]] * 20)
        answer = await client.ask("/who", "POST", pieces)
        assert answer.json["length"] == 2_000_000


async def test_an_answer_before_the_end_of_the_body_reaches_the_client() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        stream = await b.raw()
        await stream.send_all(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 1_500_000)
        received = b""
        while b"too much" not in received:
            more = await stream.receive_some(1000)
            assert more
            received += more
        assert received.startswith(b"HTTP/1.1 413")
        await stream.aclose()


async def test_clients_see_no_gap_while_the_route_switches_fifty_times() -> None:
    answers: list[Answer] = []
    stop = False

    async def loop(b: Bench) -> None:
        client = b.client()
        n = 0
        while not stop:
            n += 1
            answer = await client.ask(f"/{n}", ("GET", "POST")[n % 2], b"x" if n % 2 else None)
            assert answer.json["path"] == f"/{n}"
            answers.append(answer)

    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 1.0})
        async with trio.open_nursery() as clients:
            for _ in range(2):
                clients.start_soon(loop, b)
            for turn in range(50):
                reached = len(answers) + 3
                await until(lambda r=reached: len(answers) >= r)
                b.gateway.route({("new", "old")[turn % 2]: 1.0})
            stop = True
    assert {answer.status for answer in answers} == {200}
    assert {answer.json["by"] for answer in answers} == {"old", "new"}


async def test_kill_9_of_the_serving_instance_costs_idempotent_requests_nothing() -> None:
    answers: list[Answer] = []

    async def loop(b: Bench) -> None:
        client = b.client()
        for _ in range(30):
            answers.append(await client.ask("/who"))

    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"new": 1.0})
        async with trio.open_nursery() as clients:
            for _ in range(4):
                clients.start_soon(loop, b)
            await until(lambda: len(answers) >= 20)
            new.process.send_signal(signal.SIGKILL)
            await new.process.wait()
            await trio.sleep(0.02)  # the gateway meets a dead instance before it is told
            b.gateway.lost("new")
            b.gateway.route({"old": 1.0})
    assert Counter(answer.status for answer in answers) == {200: 120}


async def test_what_died_and_may_not_be_repeated_is_a_502_and_what_never_arrived_is_not_lost() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"new": 1.0})
        client = b.client()
        answer = await client.ask("/die", "POST", b"x")
        assert (answer.status, answer.json["error"]["code"]) == (502, "instance-died")
        got: list[Answer] = []

        async def ask() -> None:
            got.append(await client.ask("/who", "POST", b"x"))  # refused by the dead one's port: nobody saw it

        b.nursery.start_soon(ask)
        await until(lambda: b.gateway.router.waiting or got)
        b.gateway.lost("new")
        b.gateway.route({"old": 1.0})
        await until(lambda: got)
        assert got[0].json["by"] == "old"


async def test_a_get_is_rescued_from_a_hung_instance() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"new": 1.0})
        got: list[Answer] = []

        async def ask() -> None:
            got.append(await b.client().ask("/hang?new"))

        b.nursery.start_soon(ask)
        await until(lambda: b.gateway.in_flight("new") == 1)
        b.gateway.route({"old": 1.0})
        b.gateway.rescue("new")
        await until(lambda: got)
        assert got[0].json["by"] == "old"
        await b.gateway.drained("new")


async def test_a_tenth_of_the_requests_goes_to_the_candidate() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 0.9, "new": 0.1})
        client = b.client()
        answers = [await client.ask("/who") for _ in range(50)]
        assert Counter(answer.json["by"] for answer in answers) == {"old": 45, "new": 5}


async def test_gets_are_mirrored_and_compared_and_posts_are_not() -> None:
    pairs: list[Pair] = []
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 1.0})
        b.gateway.mirror("new", compare=CompareConfig(), on_pair=pairs.append)
        client = b.client()
        assert (await client.ask("/who")).json["by"] == "old"
        await until(lambda: len(pairs) == 1)
        assert (pairs[0].request, pairs[0].difference) == (b"GET /who", "$.by: 'old', not 'new'")
        await client.ask("/who", "POST", b"x")
        b.gateway.mirror("new", compare=CompareConfig(ignore=["by"]), on_pair=pairs.append)
        await client.ask("/who")
        await until(lambda: len(pairs) == 2)
        assert pairs[1].equal
        await client.ask("/die?new")
        await until(lambda: len(pairs) == 3)
        assert pairs[2].difference == "no answer"


async def test_a_declared_post_is_mirrored_and_a_get_with_side_effects_is_not() -> None:
    pairs: list[Pair] = []
    async with program("old") as old, program("new") as new, bench() as b:
        for each in (old, new):
            b.gateway.attach(
                each.name,
                each.endpoint,
                window=4,
                idempotent=lambda line: line == b"POST /ask?x",
                mirrorable=lambda line: line != b"GET /leave",
            )
        b.gateway.route({"old": 1.0})
        b.gateway.mirror("new", compare=CompareConfig(ignore=["by"]), on_pair=pairs.append)
        client = b.client()
        await client.ask("/leave")
        await client.ask("/tell", "POST", b"x")
        await client.ask("/ask?x", "POST", b"x")
        await client.ask("/who")
        await until(lambda: len(pairs) == 2)
    # the candidate answers both at once, over two connections: their order is nobody's
    assert sorted(pair.request for pair in pairs) == [b"GET /who", b"POST /ask?x"]
    assert all(pair.equal for pair in pairs)


async def test_a_path_is_compared_in_its_own_way_and_a_status_is_always_compared() -> None:
    pairs: list[Pair] = []
    config = CompareConfig(ignore=["by"], handlers={"GET /exact": HandlerCompare(mode="exact")})
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 1.0})
        b.gateway.mirror("new", compare=config, on_pair=pairs.append)
        client = b.client()
        for n, path in enumerate(["/who", "/exact/below?query", "/exactly"]):
            await client.ask(path)
            await until(lambda n=n: len(pairs) == n + 1)
    assert [pair.equal for pair in pairs] == [True, False, True]
    assert pairs[1].difference.startswith("byte 8: b'old")


async def test_an_answer_cut_off_in_the_middle_is_cut_off_for_the_client_too() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        with pytest.raises(http.client.IncompleteRead):
            await b.client().ask("/cut", "POST")  # may not be asked twice, so what there is goes to the client
        assert b.gateway.snapshot(trio.current_time())["old"].errors == 1


@pytest.mark.parametrize("path", ["/cut?new", "/pause?new"])
async def test_a_short_answer_that_ends_after_its_head_comes_from_another_instance(path: str) -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"new": 1.0})
        got: list[Answer] = []

        async def ask() -> None:
            got.append(await b.client().ask(path))

        b.nursery.start_soon(ask)
        await until(lambda: b.gateway.in_flight("new") == 1)
        assert not got
        b.gateway.route({"old": 1.0})
        b.gateway.rescue("new")
        await until(lambda: got)
        assert got[0].json["by"] == "old"


async def test_a_status_of_500_counts_as_an_error() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        assert (await b.client().ask("/fail")).status == 500
        await b.gateway.drained("old")
        figures = b.gateway.snapshot(trio.current_time())["old"]
        assert (figures.requests, figures.errors) == (1, 1)


async def test_holds_and_timeouts_have_their_own_status() -> None:
    async with program("old") as old, bench(hold_s=0.05, request_timeout_s=0.3) as b:
        client = b.client()
        held = await client.ask("/who")
        assert (held.status, held.json["error"]["code"], held.headers["Retry-After"]) == (503, "no-instance", "1")
        b.attach(old)
        b.gateway.route({"old": 1.0})
        late = await client.ask("/hang")
        assert (late.status, late.json["error"]["code"]) == (504, "timeout")
        assert (await client.ask("/who", "HEAD")).status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"\x00\x01\x02\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000, b"431"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n", b"200"),
        (b"GET / HTTP/1.0\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b"200"),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", b"501"),
        (b"GET /who HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n", b"200"),
        (b"GET /who HTTP/1.0\r\n\r\n", b"200"),
        (b"GET /stream HTTP/1.0\r\n\r\n", b"200"),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: 1\r\n\r\na",
            b"200",
        ),
    ],
)
async def test_odd_and_bad_requests_are_answered_and_harm_no_other_client(sent: bytes, status: bytes) -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client = b.client()
        assert (await client.ask("/who")).status == 200
        stream = await b.raw()
        await stream.send_all(sent)
        received = b"".join([piece async for piece in stream])
        assert received.split(b" ")[1] == status
        await stream.aclose()
        assert (await client.ask("/who")).status == 200


async def test_a_client_that_does_not_read_or_vanishes_holds_up_nobody() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old, window=1)
        b.gateway.route({"old": 1.0})
        slow = await b.raw()
        await slow.send_all(b"GET /who HTTP/1.1\r\nHost: x\r\n\r\n" * 3)  # three at once, and reads none
        vanishing = await b.raw()
        await vanishing.send_all(b"POST /who HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 1_500_000)
        await until(lambda: b.gateway.in_flight("old") == 1)
        await vanishing.aclose()
        client = b.client()
        for _ in range(3):
            assert (await client.ask("/who")).status == 200
        assert b.gateway.snapshot(trio.current_time())["old"].errors == 0  # not the instance's fault
        received = b""
        while received.count(b"200 OK") < 3:
            received += await slow.receive_some(1000)
        await slow.aclose()


async def test_a_request_in_small_pieces_is_one_request() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        stream = await b.raw()
        for byte in b"POST /who HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab":
            await stream.send_all(bytes([byte]))
        received = b"".join([piece async for piece in stream])
        assert b'"length": 2' in received
        await stream.aclose()


async def test_an_address_in_use_and_one_that_is_none_are_said_so() -> None:
    async with bench() as b:
        with pytest.raises(InUse):
            await HttpGateway("beta", b.gateway.endpoint).run()
    with pytest.raises(ConfigError):
        await HttpGateway("beta", "http://127.0.0.1").run()
