"""The examples run, and what docs/writing-agents.md shows is true."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import tomllib
import types
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from interlock.agents.agent import Agent
from interlock.agents.contract import contract_of
from interlock.agents.instance import contract_gaps
from interlock.agents.probes import probe
from interlock.broker.config import AgentConfig, RevisionConfig, load_fleet, parse_fleet, source_of
from interlock.broker.sockets import open_sockets

ROOT = Path(__file__).resolve().parents[2]
FLEET = load_fleet(ROOT / "examples" / "fleet.toml")
GUIDE = (ROOT / "docs" / "writing-agents.md").read_text()

LaunchAgent = Callable[..., Awaitable[Any]]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def program(agent: str, revision: RevisionConfig, port: int, log: Path) -> Iterator[None]:
    """The wrapped program as a host starts it."""
    values = {"port": str(port), "python": sys.executable, "agent": agent, "revision": "v1"}
    command = [word.format(**values) for word in revision.command]
    env = {key: value.format(**values) for key, value in revision.env.items()}
    with log.open("wb") as output:
        running = subprocess.Popen(
            command, cwd=source_of(FLEET, revision, where=agent), env=env, stdout=output, stderr=output
        )
    try:
        yield
    finally:
        running.terminate()
        running.wait(20)


async def test_the_class_example_greets_in_both_revisions(launch_agent: LaunchAgent) -> None:
    seen = []
    for name, revision in FLEET.agents["greeter"].revisions.items():
        agent = await launch_agent(
            "", entry=revision.entry, config=revision.config, revision=name, source=str(FLEET.folder / revision.source)
        )
        reply = await agent.ask("greet", name="Ada")
        seen.append((reply["text"], (await agent.control.describe()).handlers))
        assert await agent.terminated() == 0
    assert [text for text, _ in seen] == ["Hello, Ada!", "Good day, Ada!"]
    assert contract_gaps(seen[0][1], seen[1][1]) == []


@pytest.mark.parametrize("name", ["adder", "page"])
async def test_the_wrapped_examples_are_found_well_by_their_probes_and_answer(name: str, tmp_path: Path) -> None:
    agent = FLEET.agents[name]
    revision = agent.revisions["v1"]
    assert revision.probe is not None
    port = free_port()
    endpoint = f"{'http' if name == 'page' else 'tcp'}://127.0.0.1:{port}"
    log = tmp_path / "log"
    async with open_sockets() as sockets:
        with program(name, revision, port, log), trio.fail_after(30):
            while True:
                health = await probe(
                    revision.probe, request_endpoint=endpoint, health_endpoint="tcp://127.0.0.1:1", sockets=sockets
                )
                if health.ok:
                    break
                await trio.sleep(0.05)
            if name == "adder":
                req = sockets.open("req", connect=endpoint)
                await req.send([b'{"action": "add", "numbers": [1, 2, 3]}'])
                assert json.loads((await req.receive())[0]) == {"status": "ok", "sum": 6}
                await req.send([b"garbage"])
                assert json.loads((await req.receive())[0])["error"]["code"] == "bad-request"
            else:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                async with stream:
                    await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    answer = b"".join([bytes(chunk) async for chunk in stream])
                assert answer.startswith(b"HTTP/1.1 200 ")
                assert answer.endswith(b"served by page v1\n")


async def test_the_example_with_its_own_protocol_answers_lines(tmp_path: Path) -> None:
    port = free_port()
    with program("lines", FLEET.agents["lines"].revisions["v1"], port, tmp_path / "log"), trio.fail_after(30):
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                break
            except OSError:
                await trio.sleep(0.05)
        async with stream:
            await stream.send_all(b"a line\n")
            await stream.send_eof()
            assert b"".join([bytes(chunk) async for chunk in stream]) == b"hello\nA LINE\n"


async def test_the_worker_example_sorts_in_its_turn_only(
    launch_agent: LaunchAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERLOCK_DATA", str(tmp_path))
    revision = FLEET.agents["sorter"].revisions["v1"]
    agent = await launch_agent("", entry=revision.entry, source=str(FLEET.folder / revision.source), standby=True)
    (tmp_path / "inbox" / "a.txt").write_text("b\na\n")
    assert (await agent.control.activate(20.0)).ok
    result = tmp_path / "inbox" / "a.sorted"
    with trio.fail_after(20):
        while not result.exists():
            assert (await agent.control.health()).ok
    assert (await agent.control.deactivate(20.0)).ok
    assert result.read_text() == "a\nb\n"
    assert await agent.terminated() == 0


def test_every_toml_file_and_block_is_a_fleet() -> None:
    assert set(FLEET.agents) == {"greeter", "adder", "page", "lines", "sorter"}
    for path in (ROOT / "examples").rglob("*.toml"):
        load_fleet(path)
    shown = tables()
    assert [next(iter(table)) for table in shown] == [
        "tutor",
        "counter",
        "tutor",
        "adder",
        "page",
        "page",
        "lines",
        "sorter",
        "adder",
    ]
    for table in shown:
        [(name, agent)] = table.items()
        whole = {name: {**shown[0]["tutor"], **agent} if name == "tutor" else agent}  # its comparison stands by itself
        parse_fleet({"hosts": {"alpha": {"control": "tcp://127.0.0.1:7180"}}, "agents": whole})


def tables() -> list[dict[str, Any]]:
    """The agents of each fleet file in the guide."""
    return [tomllib.loads(block)["agents"] for block in blocks("toml")]


def test_what_the_guide_shows_of_wrapping_is_what_the_examples_do() -> None:
    for name in ("adder", "page", "lines"):
        shown = msgspec.convert(next(table[name] for table in tables() if name in table), AgentConfig)
        assert shown.endpoint == FLEET.agents[name].endpoint
        assert shown.revisions["v1"].command == FLEET.agents[name].revisions["v1"].command


def test_the_guides_class_is_an_agent_and_its_test_passes(tmp_path: Path) -> None:
    tutor, its_test, *_ = (block for block in blocks("python") if "utor" in block)
    module = types.ModuleType("tutor")
    exec(compile(tutor, "tutor.py", "exec"), module.__dict__)
    assert issubclass(module.Tutor, Agent)
    shown = json.loads(re.findall(r'^\{"ok": true.*$', GUIDE, flags=re.MULTILINE)[0])
    assert shown == {"ok": True, "handlers": contract_of(module.Tutor).describe()}
    (tmp_path / "tutor.py").write_text(tutor)
    (tmp_path / "its_test.py").write_text(its_test)
    done = subprocess.run(
        [sys.executable, "its_test.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


async def test_the_guides_class_answers_as_the_guide_says(launch_agent: LaunchAgent) -> None:
    request, reply, error, spec = (json.loads(block) for block in blocks("json"))
    config = tomllib.loads(blocks("toml")[0])["agents"]["tutor"]["revisions"]["v1"]["config"]
    [tutor] = [block for block in blocks("python") if "class Tutor" in block]
    agent = await launch_agent(tutor, entry="subject:Tutor", config=config)
    action = request.pop("action")
    assert await agent.ask(action, **request) == reply
    assert await agent.ask(action, **request, limit="three") == error
    assert (await agent.ask(action, question="rust?"))["error"]["code"] == "no-topic"
    health = await agent.control.health()
    assert (health.ok, health.detail) == (True, "2 topics")
    assert (await agent.control.metrics())["topics"] == 2.0
    assert spec["entry"] == "tutor:Tutor"
    assert await agent.terminated() == 0


async def test_the_guides_worker_works_in_its_turn_and_stops(launch_agent: LaunchAgent) -> None:
    [worker] = [block for block in blocks("python") if "class Sorter" in block]
    agent = await launch_agent(
        worker.replace("trio.sleep(1)", "trio.sleep(0.01)"), entry="subject:Sorter", standby=True
    )
    assert (await agent.control.activate(20.0)).ok
    with trio.fail_after(20):
        while (await agent.control.metrics()).get("sorted", 0) < 3:
            assert agent.process.poll() is None, agent.log
    assert (await agent.control.deactivate(20.0)).ok
    assert await agent.terminated() == 0


def test_the_guides_state_leaves_one_instance_and_enters_another() -> None:
    [source] = [block for block in blocks("python") if "class Sessions" in block]
    module: dict[str, Any] = {}
    exec(compile(source, "sessions.py", "exec"), module)
    old, new = module["Sessions"](), module["Sessions"]()
    old.setup()
    old.sessions = {"a": ["one", "two"], "b": []}
    new.restore(old.snapshot())
    assert new.sessions == old.sessions


def test_the_guides_comparison_function_says_what_it_should() -> None:
    [source] = [block for block in blocks("python") if "def same_meaning" in block]
    module: dict[str, Any] = {}
    exec(compile(source, "judging.py", "exec"), module)
    assert module["same_meaning"]({}, {"a": "x"}, {"a": "y"}) is True
    assert module["same_meaning"]({}, {"a": "x"}, {"a": "y" * 1000}) is False
    assert module["same_meaning"]({}, {"a": "x"}, {"b": "x"}) == "keys ['a'] became ['b']"
