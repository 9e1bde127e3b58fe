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


def test_every_toml_file_and_block_is_a_fleet() -> None:
    assert set(FLEET.agents) == {"greeter", "adder", "page"}
    for path in (ROOT / "examples").rglob("*.toml"):
        load_fleet(path)
    assert len(blocks("toml")) == 4
    for block in blocks("toml"):
        parse_fleet({"hosts": {"alpha": {"control": "tcp://127.0.0.1:7180"}}, **tomllib.loads(block)})


def test_what_the_guide_shows_of_wrapping_is_what_the_examples_do() -> None:
    for name, block in zip(("adder", "page"), blocks("toml")[1:3], strict=True):
        shown = msgspec.convert(tomllib.loads(block)["agents"][name], AgentConfig)
        assert shown.endpoint == FLEET.agents[name].endpoint
        assert shown.revisions["v1"].command == FLEET.agents[name].revisions["v1"].command


def test_the_guides_class_is_an_agent_and_its_test_passes(tmp_path: Path) -> None:
    tutor, its_test = blocks("python")
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
    agent = await launch_agent(blocks("python")[0], entry="subject:Tutor", config=config)
    action = request.pop("action")
    assert await agent.ask(action, **request) == reply
    assert await agent.ask(action, **request, limit="three") == error
    assert (await agent.ask(action, question="rust?"))["error"]["code"] == "no-topic"
    health = await agent.control.health()
    assert (health.ok, health.detail) == (True, "2 topics")
    assert (await agent.control.metrics())["topics"] == 2.0
    assert spec["entry"] == "tutor:Tutor"
    assert await agent.terminated() == 0
