"""Agents as processes: requests, control, crashes, signals and garbage, over real sockets."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import pytest
import trio

from interlock.agents.instance import InstanceControl
from interlock.agents.probes import decode_answer
from interlock.broker.errors import Unreachable, WireError
from interlock.broker.sockets import open_sockets

LaunchAgent = Callable[..., Awaitable[Any]]

IMPORTS = """
    import threading, time, trio
    from interlock.agents.agent import Agent, RequestError, background, handler, thread
"""

COUNTER = (
    IMPORTS
    + """
    class Subject(Agent):
        async def setup(self):
            self.gate = trio.Event()
            self.release = threading.Event()
            self.waiting = 0

        def teardown(self):
            print("torn down", self.config["word"], flush=True)

        @handler("echo", idempotent=True)
        async def echo(self, text: str, times: int = 1) -> dict:
            self.metrics.counter("echoes").add()
            return {"text": text * times, "word": self.config["word"]}

        @handler("wait")
        async def wait(self, number: int) -> dict:
            self.waiting += 1
            self.metrics.gauge("waiting", self.waiting)
            await self.gate.wait()
            return {"number": number}

        @handler("open")
        async def open(self):
            self.gate.set()

        @handler("block")
        def block(self):
            self.metrics.gauge("blocked", 1)
            self.release.wait(30)
            return {"thread": threading.current_thread() is not threading.main_thread()}

        @handler("release")
        def unblock(self):
            self.release.set()

        @handler("fail")
        async def fail(self, how: str):
            if how == "own":
                raise RequestError("no-such-page", "page 9 of 8")
            if how == "reply":
                return {"what": object()}
            raise KeyError("lost")

        @handler("big")
        async def big(self):
            return {"data": "x" * (64 << 20)}
"""
)


async def until_metric(agent: Any, name: str, value: float) -> None:
    with trio.fail_after(20):
        while (await agent.control.metrics()).get(name) != value:
            assert agent.process.poll() is None, agent.log


async def test_an_agent_answers_in_the_encoding_of_the_request(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(COUNTER, config={"word": "w"})
    assert await agent.ask("echo", text="ab", times=2) == {"status": "ok", "text": "abab", "word": "w"}
    with trio.fail_after(20):
        await agent.requests.send([b"7", b"", msgpack.packb({"action": "echo", "text": "q"})])
        frames = await agent.requests.receive()
    assert frames[:2] == [b"7", b""]
    assert msgpack.unpackb(frames[2]) == {"status": "ok", "text": "q", "word": "w"}
    assert await agent.ask("health") == {"status": "ok", "ok": True, "detail": ""}


async def test_errors_have_codes_and_tracebacks_stay_in_the_log(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(COUNTER, config={"word": "w"})

    async def error(action: str, **arguments: Any) -> tuple[str, str]:
        reply = await agent.ask(action, **arguments)
        assert reply["status"] == "error"
        assert set(reply) == {"status", "error"}
        return reply["error"]["code"], reply["error"]["message"]

    code, message = await error("ehco")
    assert code == "unknown-action"
    assert "echo" in message
    assert await error("echo", text=3) == ("bad-request", "argument 'text': expected `str`, got `int`")
    assert await error("fail", how="own") == ("no-such-page", "page 9 of 8")
    assert await error("fail", how="x") == ("internal", "KeyError: 'lost'")
    assert (await error("fail", how="reply"))[0] == "internal"
    assert (await error("big"))[0] == "too-large"
    assert "Traceback" in agent.log
    assert 'raise KeyError("lost")' in agent.log
    assert (await agent.ask("echo", text="on"))["status"] == "ok"


async def test_many_requests_wait_at_once_and_control_answers_meanwhile(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(COUNTER, config={"word": "w"})
    for number in range(50):
        body = json.dumps({"action": "wait", "number": number}).encode()
        await agent.requests.send([str(number).encode(), b"", body])
    await until_metric(agent, "waiting", 50.0)
    assert (await agent.control.health()).ok
    await agent.requests.send([b"open", b"", b'{"action": "open"}'])
    seen = {}
    with trio.fail_after(20):
        while len(seen) < 51:
            id, _, body = await agent.requests.receive()
            seen[id] = json.loads(body).get("number")
    assert seen == {b"open": None, **{str(number).encode(): number for number in range(50)}}


async def test_a_handler_that_blocks_its_thread_stops_neither_health_nor_others(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(COUNTER, config={"word": "w"})
    await agent.requests.send([b"b", b"", b'{"action": "block"}'])
    await until_metric(agent, "blocked", 1.0)
    assert (await agent.control.health()).ok
    assert (await agent.ask("echo", text="x"))["status"] == "ok"
    await agent.requests.send([b"r", b"", b'{"action": "release"}'])
    with trio.fail_after(20):
        replies = {frames[0]: json.loads(frames[2]) for frames in [await agent.requests.receive() for _ in range(2)]}
    assert replies == {b"b": {"status": "ok", "thread": True}, b"r": {"status": "ok"}}


async def test_control_describes_the_instance_and_counts_for_it(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(COUNTER, config={"word": "w"})
    description = await agent.control.describe()
    assert (description.agent, description.revision, description.instance) == ("subject", "v1", "subject-0")
    assert description.pid == agent.process.pid
    assert description.handlers["echo"].idempotent
    assert description.handlers["echo"].parameters == {"text": "str", "times": "int = ..."}
    await agent.ask("echo", text="x")
    assert (await agent.control.metrics())["echoes"] == 1.0


FINISHES = (
    IMPORTS
    + """
    class Subject(Agent):
        async def setup(self):
            self.stopping = trio.Event()

        @background
        async def notice(self):
            try:
                while True:
                    await trio.sleep(30)
            finally:
                print("background ended", flush=True)

        @thread
        def crunch(self, stop: threading.Event):
            stop.wait()
            print("thread ended", flush=True)

        @handler("slow")
        async def slow(self):
            self.metrics.gauge("begun", 1)
            await trio.to_thread.run_sync(time.sleep, 0.3)
            return {"done": True}

        @handler("never")
        async def never(self):
            self.metrics.gauge("never", 1)
            await trio.sleep_forever()

        async def teardown(self):
            print("torn down", flush=True)
"""
)


async def test_sigterm_lets_a_slow_request_end_before_tasks_and_threads_do(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(FINISHES, stop_timeout_s=30.0)
    await agent.requests.send([b"s", b"", b'{"action": "slow"}'])
    await until_metric(agent, "begun", 1.0)
    agent.process.send_signal(signal.SIGTERM)
    with trio.fail_after(20):
        frames = await agent.requests.receive()
    assert json.loads(frames[2]) == {"status": "ok", "done": True}
    assert await agent.ended() == 0
    torn_down = agent.log.index("torn down")
    assert agent.log.index("background ended") < torn_down
    assert agent.log.index("thread ended") < torn_down


async def test_no_new_request_is_begun_after_sigterm(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(FINISHES, stop_timeout_s=120.0)
    await agent.requests.send([b"n", b"", b'{"action": "never"}'])
    await until_metric(agent, "never", 1.0)
    agent.process.send_signal(signal.SIGTERM)
    with trio.fail_after(20):
        while (await agent.control.health()).detail != "stopping":
            pass
    await agent.requests.send([b"s", b"", b'{"action": "slow"}'])
    for _ in range(3):  # round trips, each long enough for a request to be begun
        assert (await agent.control.metrics()).get("begun") is None
    assert agent.requests.receive_nowait() is None


async def test_a_request_that_never_ends_is_given_up_at_its_deadline(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(FINISHES, stop_timeout_s=0.5)
    await agent.requests.send([b"s", b"", b'{"action": "never"}'])
    await until_metric(agent, "never", 1.0)
    assert await agent.terminated() == 0
    assert "given up after 0.3 s" in agent.log
    assert "torn down" in agent.log


async def test_a_blocked_thread_does_not_keep_the_process(launch_agent: LaunchAgent) -> None:
    source = """
        @thread
        def deaf(self, stop):
            self.metrics.gauge("deaf", 1)
            time.sleep(60)

        @handler("stuck")
        def stuck(self):
            self.metrics.gauge("stuck", 1)
            time.sleep(60)
    """
    agent = await launch_agent(IMPORTS + "\n    class Subject(Agent):" + source, stop_timeout_s=1)
    await agent.requests.send([b"s", b"", b'{"action": "stuck"}'])
    await until_metric(agent, "deaf", 1.0)
    await until_metric(agent, "stuck", 1.0)
    assert await agent.terminated() == 0
    assert "thread deaf did not end when told to" in agent.log


async def test_control_can_stop_an_instance(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(COUNTER, config={"word": "w"})
    await agent.control.stop()
    assert await agent.ended() == 0
    assert "torn down w" in agent.log


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("@background\n        async def refresh(self):", "background task refresh"),
        ("@thread\n        def refresh(self, stop):", "thread refresh"),
    ],
)
async def test_what_crashes_beside_the_requests_makes_the_agent_unhealthy(
    launch_agent: LaunchAgent, kind: str, what: str
) -> None:
    source = (
        IMPORTS
        + f"""
    class Subject(Agent):
        {kind}
            raise ValueError("no index")

        @handler("ask")
        async def ask(self):
            return {{"still": "here"}}
"""
    )
    agent = await launch_agent(source, wait=False)
    detail = f"{what} crashed: ValueError: no index"
    with trio.fail_after(30):
        while (await agent.control.health(timeout=0.3)).detail != detail:
            assert agent.process.poll() is None, agent.log
    assert await agent.ask("ask") == {"status": "ok", "still": "here"}
    assert await agent.ask("health") == {"status": "error", "error": {"code": "unhealthy", "message": detail}}
    assert "Traceback" in agent.log


async def test_health_is_what_the_agent_says_or_that_it_does_not(launch_agent: LaunchAgent) -> None:
    source = (
        IMPORTS
        + """
    class Subject(Agent):
        mode = "ok"

        def health(self):
            if self.mode == "raise":
                raise OSError("disk")
            if self.mode == "hang":
                time.sleep(60)
            return {"ok": self.mode == "ok", "detail": self.mode}

        @handler("set")
        async def set(self, mode: str):
            self.mode = mode
"""
    )
    agent = await launch_agent(source)
    health = await agent.control.health()
    assert (health.ok, health.detail) == (True, "ok")
    assert health.latency_s > 0
    for mode, detail in [("sick", "sick"), ("raise", "health() failed: OSError: disk")]:
        await agent.ask("set", mode=mode)
        health = await agent.control.health()
        assert (health.ok, health.detail) == (False, detail)
    await agent.ask("set", mode="hang")
    health = await agent.control.health(timeout=0.2)
    assert (health.ok, health.detail) == (False, "no answer to health within 0.2 s")
    assert (await agent.control.describe()).agent == "subject"  # control still answers what needs no health()


async def test_control_answers_during_setup_and_setup_can_be_stopped(launch_agent: LaunchAgent) -> None:
    source = (
        IMPORTS
        + """
    class Subject(Agent):
        async def setup(self):
            await trio.sleep_forever()
        async def teardown(self):
            print("torn down")
"""
    )
    agent = await launch_agent(source, wait=False)
    with trio.fail_after(30):
        while (await agent.control.health(timeout=0.3)).detail != "starting":
            assert agent.process.poll() is None, agent.log
    assert await agent.terminated() == 0
    assert "torn down" not in agent.log


async def test_a_failing_setup_ends_the_process_with_1(launch_agent: LaunchAgent) -> None:
    source = (
        IMPORTS
        + """
    class Subject(Agent):
        def setup(self):
            raise RuntimeError("no weights")
"""
    )
    agent = await launch_agent(source, wait=False)
    assert await agent.ended() == 1
    assert "RuntimeError: no weights" in agent.log


async def test_a_killed_instance_is_unreachable_and_another_takes_its_endpoints(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(COUNTER, config={"word": "w"})
    agent.process.kill()
    assert await agent.ended() == -signal.SIGKILL
    with pytest.raises(Unreachable, match="no answer to describe"):
        await agent.control.describe(timeout=0.2)
    health = await agent.control.health(timeout=0.2)
    assert (health.ok, health.detail) == (False, "no answer to health within 0.2 s")
    next_one = await launch_agent(
        COUNTER, config={"word": "w"}, requests=agent.spec["requests"], control=agent.spec["control"], instance="next"
    )
    assert (await next_one.control.describe()).instance == "next"


async def test_garbage_on_both_sockets_does_nothing(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(COUNTER, config={"word": "w"})
    malformed = [[b""], [b"x"], [b"1", b"2"], [b"1", b"x", b"{}"], [os.urandom(9)] * 9]
    for frames in malformed:
        await agent.requests.send(frames)
    unpackable = [b"", b"\xc1", b"\x81", b"3", b"{}", b"\x81\xa1a" * 50_000, os.urandom(200)]
    for frames in [*malformed, *([b"1", body] for body in unpackable)]:
        await agent.raw_control.send(frames)
    for body in unpackable:
        with trio.fail_after(20):
            await agent.requests.send([b"1", b"", body])
            reply = decode_answer((await agent.requests.receive())[2])
        assert reply["error"]["code"] == "bad-request"
    await agent.raw_control.send([b"q", msgpack.packb({"op": "explode"})])
    with trio.fail_after(20):
        id, body = await agent.raw_control.receive()
    assert id == b"q"
    assert "known: activate, deactivate, describe, export, health, import" in msgpack.unpackb(body)["error"]
    assert (await agent.ask("echo", text="x"))["status"] == "ok"
    assert (await agent.control.health()).ok
    assert "dropped a message of frame sizes" in agent.log


async def test_a_request_that_is_not_one_frame_is_told_so_at_once(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(COUNTER, config={"word": "w"})
    for body in ([], [b"{}", b"{}"], [b"", b""]):
        with trio.fail_after(20):
            await agent.requests.send([b"7", b"", *body])
            *envelope, answer = await agent.requests.receive()
        assert envelope == [b"7", b""]
        error = decode_answer(answer)["error"]
        assert (error["code"], error["message"]) == ("bad-request", f"a request is one frame, this one has {len(body)}")


async def test_an_agent_takes_as_large_a_request_as_its_gateway(launch_agent: LaunchAgent) -> None:
    agent = await launch_agent(COUNTER, config={"word": "w"})
    large = "x" * 3_000_000
    assert (await agent.ask("echo", text=large))["text"] == large


async def test_a_wrong_answer_of_an_instance_is_a_wire_error_and_not_well(short_folder: Any) -> None:
    async with open_sockets() as sockets, trio.open_nursery() as nursery:
        fake = sockets.open("router", bind=f"ipc://{short_folder}/c")
        control = InstanceControl(sockets, fake.endpoint)

        async def answer() -> None:
            while True:
                peer, id, _ = await fake.receive()
                await fake.send([peer, b"an answer of before", b"\x80"])
                await fake.send([peer, id, b"\xc1"])

        nursery.start_soon(answer)
        with pytest.raises(WireError, match="reply to metrics"):
            await control.metrics()
        health = await control.health()
        assert not health.ok
        assert "not a reply to health" in health.detail
        assert control.undecodable == 2
        nursery.cancel_scope.cancel()


async def test_many_ask_one_instance_at_once_and_giving_up_hands_on_the_turn(launch_agent: LaunchAgent) -> None:
    source = (
        IMPORTS
        + """
    class Subject(Agent):
        slow = False
        async def health(self):
            if self.slow:
                await trio.sleep_forever()
        @handler("slow")
        async def be_slow(self):
            self.slow = True
"""
    )
    agent = await launch_agent(source)
    await agent.ask("slow")
    outcomes: list[Any] = []

    async def ask_health() -> None:
        outcomes.append((await agent.control.health(timeout=0.3)).ok)

    async def describe() -> None:
        outcomes.append((await agent.control.describe(timeout=20)).agent)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask_health)
            nursery.start_soon(describe)
    assert outcomes.count(False) == 10
    assert outcomes.count("subject") == 10
