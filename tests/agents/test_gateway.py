"""The ZeroMQ gateway with real sockets, and real instance processes that know nothing of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from interlock.agents.answers import MAX_BODY
from interlock.agents.compare import Pair, Verdict
from interlock.agents.front import open_gateway
from interlock.agents.gateway import ZmqGateway
from interlock.broker.config import AgentConfig, CompareConfig, HandlerCompare, RevisionConfig
from interlock.broker.sockets import Socket, Sockets, open_sockets

# An agent as users have them: a REP socket and a loop.
REP_PROGRAM = """
import json, os, sys, time, zmq
name = sys.argv[1]
socket = zmq.Context().socket(zmq.REP)
print("tcp://127.0.0.1:%d" % socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
while True:
    request = json.loads(socket.recv())
    if request.get("to") in (None, name):
        if request["action"] in ("hang", "get-hang"):
            time.sleep(1000)
        if request["action"] in ("die", "get-die"):
            os.kill(os.getpid(), 9)
        if request["action"] == "get-slow":
            time.sleep(0.05)
    socket.send(json.dumps({"status": "ok", "by": name, "n": request.get("n")}).encode())
"""
ANY_PORT = "tcp://127.0.0.1:*"


class Program:
    def __init__(self, name: str, process: trio.Process, endpoint: str) -> None:
        self.name, self.process, self.endpoint = name, process, endpoint

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def program(name: str, source: str = REP_PROGRAM) -> AsyncIterator[Program]:
    process = await trio.lowlevel.open_process([sys.executable, "-c", source, name], stdout=subprocess.PIPE)
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


class Bench:
    """A gateway under test and its clients."""

    def __init__(self, sockets: Sockets, gateway: ZmqGateway, nursery: trio.Nursery) -> None:
        self.sockets, self.gateway, self.nursery = sockets, gateway, nursery

    def attach(self, *instances: Program, window: int = 1) -> None:
        for instance in instances:
            self.gateway.attach(instance.name, instance.endpoint, window=window, idempotent=reads_only)

    def client(self) -> Socket:
        return self.sockets.open("req", connect=self.gateway.endpoint)

    async def ask(self, client: Socket | None = None, **request: Any) -> dict[str, Any]:
        own = client or self.client()
        await own.send([json.dumps(request).encode()])
        (answer,) = await own.receive()
        if client is None:
            own.close()
        decoded: dict[str, Any] = json.loads(answer)
        return decoded


def reads_only(body: bytes) -> bool:
    return bool(json.loads(body)["action"].startswith("get"))


@asynccontextmanager
async def bench(**times: float) -> AsyncIterator[Bench]:
    with trio.fail_after(60):
        async with open_sockets() as sockets, trio.open_nursery() as nursery:
            gateway = ZmqGateway("alpha", ANY_PORT, sockets, **times)
            await nursery.start(gateway.run)
            yield Bench(sockets, gateway, nursery)
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110  # counters inside the gateway ring no bell
        await trio.sleep(0.002)


async def test_clients_see_no_gap_while_the_route_switches_fifty_times() -> None:
    answers: list[list[dict[str, Any]]] = [[], [], []]
    stop = False

    async def loop(b: Bench, into: list[dict[str, Any]]) -> None:
        client = b.client()
        while not stop:
            into.append(await b.ask(client, action="charge", n=len(into)))

    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 1.0})
        async with trio.open_nursery() as clients:
            for into in answers:
                clients.start_soon(loop, b, into)
            for turn in range(50):
                reached = [len(into) + 2 for into in answers]
                await until(lambda r=reached: all(len(i) >= n for i, n in zip(answers, r, strict=True)))
                b.gateway.route({("new", "old")[turn % 2]: 1.0})
            stop = True
    for into in answers:
        assert [answer["status"] for answer in into] == ["ok"] * len(into)
        assert [answer["n"] for answer in into] == list(range(len(into)))
        assert {answer["by"] for answer in into} == {"old", "new"}


async def test_kill_9_of_the_serving_instance_costs_idempotent_requests_nothing() -> None:
    answers: list[dict[str, Any]] = []

    async def loop(b: Bench) -> None:
        client = b.client()
        for n in range(40):
            answers.append(await b.ask(client, action="get", n=n))

    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"new": 1.0})
        async with trio.open_nursery() as clients:
            for _ in range(4):
                clients.start_soon(loop, b)
            await until(lambda: len(answers) >= 20)
            new.signal(signal.SIGKILL)
            await new.process.wait()
            b.gateway.lost("new")
            b.gateway.route({"old": 1.0})
    assert len(answers) == 160
    assert Counter(answer["status"] for answer in answers) == {"ok": 160}


async def test_what_died_and_may_not_be_repeated_is_answered_with_an_error() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"new": 1.0})
        outcome: dict[str, Any] = {}

        async def ask() -> None:
            outcome.update(await b.ask(action="die"))

        b.nursery.start_soon(ask)
        await new.process.wait()
        b.gateway.lost("new")
        b.gateway.route({"old": 1.0})
        await until(lambda: outcome)
        assert outcome["error"]["code"] == "instance-died"
        assert (await b.ask(action="charge"))["by"] == "old"
        figures = b.gateway.snapshot(trio.current_time())
        assert (figures["new"].requests, figures["new"].errors) == (1, 1)


async def test_a_program_that_is_hung_is_rescued_and_the_rest_waits_here_in_safety() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"new": 1.0})
        answers: list[dict[str, Any]] = []

        async def ask(**request: Any) -> None:
            answers.append(await b.ask(**request))

        b.nursery.start_soon(lambda: ask(action="get-hang", to="new", n=0))
        await until(lambda: b.gateway.in_flight("new") == 1)
        for n in range(1, 6):  # only one is at risk: these never reach it
            b.nursery.start_soon(lambda n=n: ask(action="charge", n=n))
        await until(lambda: b.gateway.router.waiting == 5)
        b.gateway.route({"old": 1.0})
        b.gateway.rescue("new")
        await until(lambda: len(answers) == 6)
        assert {answer["by"] for answer in answers} == {"old"}
        await b.gateway.drained("new")


async def test_a_tenth_of_the_requests_goes_to_the_candidate() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 0.9, "new": 0.1})
        client = b.client()
        answers = [await b.ask(client, action="charge") for _ in range(100)]
        assert Counter(answer["by"] for answer in answers) == {"old": 90, "new": 10}


async def test_sixteen_clients_share_one_rep_program() -> None:
    done: list[int] = []

    async def loop(b: Bench, number: int) -> None:
        client = b.client()
        for n in range(20):
            assert (await b.ask(client, action="charge", n=f"{number}-{n}"))["n"] == f"{number}-{n}"
        done.append(number)

    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        async with trio.open_nursery() as clients:
            for number in range(16):
                clients.start_soon(loop, b, number)
        assert len(done) == 16
        figures = b.gateway.snapshot(trio.current_time())["old"]
        assert (figures.requests, figures.errors, figures.in_flight) == (320, 0, 0)
        assert len(b.gateway.latencies("old", 60.0, trio.current_time())) == 320


async def test_a_stopped_process_that_goes_on_answers_what_it_was_given() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        await b.ask(action="get")
        old.signal(signal.SIGSTOP)
        answers: list[dict[str, Any]] = []

        async def ask() -> None:
            answers.append(await b.ask(action="charge", n=7))

        b.nursery.start_soon(ask)
        await until(lambda: b.gateway.in_flight("old") == 1)
        old.signal(signal.SIGCONT)
        await until(lambda: answers)
        assert answers[0]["n"] == 7


async def test_mirrored_requests_are_compared_and_their_answers_dropped() -> None:
    pairs: list[Pair] = []
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 1.0})
        b.gateway.mirror("new", compare=CompareConfig(), on_pair=pairs.append)
        client = b.client()
        for n in range(5):
            assert (await b.ask(client, action="get", n=n))["by"] == "old"
        await b.ask(client, action="charge")
        await until(lambda: len(pairs) == 5)
        assert [pair.difference for pair in pairs] == ["$.by: 'old', not 'new'"] * 5
        assert all(pair.new_latency and pair.old_latency > 0 for pair in pairs)
        b.gateway.mirror("new", compare=CompareConfig(ignore=["by"]), on_pair=pairs.append)
        await b.ask(client, action="get")
        await until(lambda: len(pairs) == 6)
        assert pairs[5].equal
        figures = b.gateway.snapshot(trio.current_time())["new"]
        assert (figures.compared, figures.mismatches, figures.requests) == (6, 5, 0)


async def test_the_first_answer_after_a_switch_is_told_once() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        times: list[float] = []
        before = trio.current_time()
        b.gateway.on_answer("old", times.append)
        await b.ask(action="get")
        await b.ask(action="get")
        assert len(times) == 1
        assert before < times[0] <= trio.current_time()


async def test_a_watcher_that_fails_stops_no_traffic() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        b.gateway.on_answer("old", lambda _: 1 // 0)
        assert (await b.ask(action="get"))["status"] == "ok"
        assert (await b.ask(action="get"))["status"] == "ok"


async def test_errors_come_in_the_encoding_of_the_request() -> None:
    async with bench(hold_s=0.02) as b:
        client = b.client()
        await client.send([b'{"action": "get"}'])
        assert json.loads((await client.receive())[0])["error"]["code"] == "no-instance"
        await client.send([msgspec.msgpack.encode({"action": "get"})])
        assert msgspec.msgpack.decode((await client.receive())[0])["error"]["code"] == "no-instance"
        await client.send([b""])
        assert msgspec.msgpack.decode((await client.receive())[0])["status"] == "error"


async def test_requests_wait_for_a_route_and_a_hung_instance_costs_a_timeout() -> None:
    async with program("old") as old, bench(request_timeout_s=0.4) as b:
        b.attach(old)
        client = b.client()
        await client.send([b'{"action": "charge", "n": 1}'])
        await until(lambda: b.gateway.router.waiting == 1)
        b.gateway.route({"old": 1.0})
        assert json.loads((await client.receive())[0])["n"] == 1
        assert (await b.ask(client, action="hang"))["error"]["code"] == "timeout"


async def test_a_program_that_is_lost_before_it_listens_never_sees_old_requests() -> None:
    async with bench() as b:
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            endpoint = f"ipc://{folder}/i"
            b.gateway.attach("new", endpoint, window=1, idempotent=reads_only)
            b.gateway.route({"new": 1.0})
            client = b.client()
            await client.send([b'{"action": "charge"}'])
            await until(lambda: b.gateway.in_flight("new") == 1)
            b.gateway.lost("new")
            assert json.loads((await client.receive())[0])["error"]["code"] == "instance-died"
            late = b.sockets.open("rep", bind=endpoint)
            b.gateway.attach("newer", endpoint, window=1, idempotent=reads_only)
            b.gateway.route({"newer": 1.0})
            await client.send([b'{"action": "other"}'])
            assert await late.receive() == [b'{"action": "other"}']


async def test_garbage_from_a_client_or_an_instance_harms_nobody() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        bad = b.sockets.open("dealer", connect=b.gateway.endpoint)
        for frames in ([b"x"], [b""], [b"x", b"y", b"z"], [b"x"] * 100, [b"", *[b"x"] * 100]):
            await bad.send(frames)
        await until(lambda: b.gateway.malformed == 5)
        vanishing = b.client()
        await vanishing.send([b'{"action": "get-slow"}'])
        await until(lambda: b.gateway.in_flight("old") == 1)
        vanishing.close(linger_ms=0)
        assert (await b.ask(action="get"))["status"] == "ok"

        rude = b.sockets.open("router", bind=ANY_PORT)
        b.gateway.attach("rude", rude.endpoint, window=4, idempotent=reads_only)
        b.gateway.route({"rude": 1.0})
        client = b.client()
        await client.send([b"not decodable"])
        identity, number, *_ = await rude.receive()
        for answer in ([b"x"], [b"12345678"], [number, b"no delimiter", b"x"], [b"87654321", b"", b"x"], [number, b""]):
            await rude.send([identity, *answer])
        await rude.send([identity, number, b"", b"two", b"frames"])
        await rude.send([identity, number, b"", b"again"])
        assert await client.receive() == [b"two", b"frames"]
        await until(lambda: b.gateway.router.late == 2)
        assert b.gateway.malformed == 9


# Takes many requests at once, and no frame above 1 MB: libzmq drops the connection of whoever sends one.
NARROW_PROGRAM = """
import json, sys, zmq
socket = zmq.Context().socket(zmq.ROUTER)
socket.setsockopt(zmq.MAXMSGSIZE, 1_000_000)
print("tcp://127.0.0.1:%d" % socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
waiting = []
while True:
    *envelope, body = socket.recv_multipart()
    waiting.append(envelope)
    if json.loads(body)["action"] == "get-go":
        for envelope in waiting:
            socket.send_multipart([*envelope, b'{"status": "ok"}'])
        waiting = []
"""


async def test_what_is_on_a_connection_that_breaks_is_retried_or_ends_at_once() -> None:
    answers: list[dict[str, Any]] = []

    async def ask(b: Bench, action: str, more: str = "") -> None:
        answers.append(await b.ask(action=action, more=more))

    async with program("narrow", NARROW_PROGRAM) as narrow, bench() as b:
        b.attach(narrow, window=64)
        b.gateway.route({"narrow": 1.0})
        async with trio.open_nursery() as clients:
            for _ in range(5):
                clients.start_soon(ask, b, "get")
            await until(lambda: b.gateway.in_flight("narrow") == 5)
            clients.start_soon(ask, b, "charge", "x" * 2_000_000)
            await until(lambda: answers)
            error = answers.pop()["error"]
            assert error["code"] == "instance-died"
            assert "or its connection died" in error["message"]
            await until(lambda: b.gateway.in_flight("narrow") == 5)
            clients.start_soon(ask, b, "get-go")
        assert answers == [{"status": "ok"}] * 6


async def test_requests_of_a_client_that_has_left_can_not_keep_an_agent_down() -> None:
    async with bench() as b:
        poisoners = [b.client() for _ in range(20)]
        for poisoner in poisoners:
            await poisoner.send([b'{"action": "get-die"}'])
        await until(lambda: b.gateway.router.waiting == 20)
        for poisoner in poisoners:
            poisoner.close(linger_ms=0)
        died = 0
        answers: list[dict[str, Any]] = []

        async def innocent() -> None:
            answers.append(await b.ask(action="get", n=1))

        async with trio.open_nursery() as clients:
            clients.start_soon(innocent)
            await until(lambda: b.gateway.router.waiting == 21)
            while not answers:
                async with program(f"p{died}") as one:
                    b.attach(one)
                    b.gateway.route({one.name: 1.0})
                    await until(lambda p=one.process: answers or p.poll() is not None)
                    died += not answers
                    b.gateway.detach(one.name)
        assert answers == [{"status": "ok", "by": "p2", "n": 1}]
        assert died == 2
        refused = await b.ask(action="get-die")
        assert refused["error"]["code"] == "quarantined"


async def test_a_request_that_is_too_large_or_in_too_many_frames_is_told_so_at_once() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        for body, code in (([b"{" + bytes(MAX_BODY)], "too-large"), ([b"{"] * 100, "bad-request")):
            client = b.client()
            await client.send(body)
            (answer,) = await client.receive()
            assert json.loads(answer)["error"]["code"] == code
        assert (await b.ask(action="get"))["status"] == "ok"


async def test_a_dealer_keeps_its_whole_envelope() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old, window=8)
        b.gateway.route({"old": 1.0})
        client = b.sockets.open("dealer", connect=b.gateway.endpoint)
        for n in range(5):
            await client.send([b"a", bytes([n]), b"", json.dumps({"action": "charge", "n": n}).encode()])
        for n in range(5):
            a, tag, empty, answer = await client.receive()
            assert (a, tag, empty, json.loads(answer)["n"]) == (b"a", bytes([n]), b"", n)


async def test_when_the_gateway_ends_who_waits_is_told_and_the_address_is_free_again() -> None:
    with trio.fail_after(30):
        async with open_sockets() as sockets:
            client = sockets.open("req")
            async with trio.open_nursery() as nursery:
                gateway = ZmqGateway("alpha", ANY_PORT, sockets)
                endpoint = await nursery.start(gateway.run)
                client.connect(endpoint)
                await client.send([b"{}"])
                await until(lambda: gateway.router.waiting == 1)
                nursery.cancel_scope.cancel()
            assert json.loads((await client.receive())[0])["error"]["code"] == "no-instance"


async def test_the_public_endpoint_decides_which_gateway_opens() -> None:
    revisions = {"a": RevisionConfig(command=["x"])}
    async with open_sockets() as sockets:
        for endpoint, kind in ((ANY_PORT, "ZmqGateway"), ("http://127.0.0.1:0", "HttpGateway")):
            config = AgentConfig(host="h", endpoint=endpoint, serve="a", revisions=revisions)
            assert type(open_gateway("alpha", config, sockets)).__name__ == kind


class StandInJudge:
    """Says what it was asked, or that it can't say."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def judge(
        self, function: str, request: list[bytes], old: list[bytes], new: list[bytes], http: dict[str, str] | None
    ) -> Verdict:
        self.asked.append((function, json.loads(request[0])["n"], json.loads(new[0])["by"], http))
        return Verdict(error="broken") if self.asked[-1][1] == 3 else Verdict()


async def test_each_handler_is_compared_in_its_own_way_and_a_failed_comparison_is_no_verdict() -> None:
    pairs: list[Pair] = []
    judge = StandInJudge()
    config = CompareConfig(
        ignore=["by"],
        handlers={
            "get-exact": HandlerCompare(mode="exact"),
            "get-by": HandlerCompare(ignore=[]),
            "get-own": HandlerCompare(function="check:compare"),
        },
    )
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 1.0})
        b.gateway.mirror("new", compare=config, on_pair=pairs.append, judge=judge)
        for n, action in enumerate(["get", "get-exact", "get-own", "get-own", "get-by"]):
            assert (await b.ask(action=action, n=n))["by"] == "old"
            await until(lambda n=n: len(pairs) == n + 1)
        figures = b.gateway.snapshot(trio.current_time())["new"]
    found = [(pair.handler, pair.equal, pair.difference, pair.error) for pair in pairs]
    assert found == [
        ("get", True, "", ""),
        ("get-exact", False, 'byte 24: b\'old", "n": 1}\', not b\'new", "n": 1}\'', ""),
        ("get-own", True, "", ""),
        ("get-own", False, "", "broken"),
        ("get-by", False, "$.by: 'old', not 'new'", ""),
    ]
    assert judge.asked == [("check:compare", 2, "new", None), ("check:compare", 3, "new", None)]
    assert (figures.compared, figures.mismatches, figures.unjudged) == (4, 2, 1)
