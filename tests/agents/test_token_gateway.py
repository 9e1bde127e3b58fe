"""The token on its way: between stand-in instances, to wrapped programs by a lock, to classes over their control."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from interlock.agents.front import open_gateway
from interlock.agents.token_file import TokenFile
from interlock.agents.token_gateway import TokenGateway
from interlock.broker.config import AgentConfig, RevisionConfig
from interlock.broker.sockets import open_sockets

LaunchAgent = Callable[..., Awaitable[Any]]


class StandIn:
    """An instance that notes what it is told, and does it when it may."""

    def __init__(self, name: str, told: list[str], limit_s: float = 60.0) -> None:
        self.name, self.told, self.limit_s = name, told, limit_s
        self.may_stop = trio.Event()
        self.may_stop.set()
        self.can_stop = True
        self.dead = trio.Event()

    async def give(self) -> bool:
        await trio.lowlevel.checkpoint()
        self.told.append(f"{self.name} works")
        return True

    async def take(self) -> bool:
        await self.may_stop.wait()
        self.told.append(f"{self.name} stops" if self.can_stop else f"{self.name} can't stop")
        return self.can_stop

    async def kill(self) -> None:
        self.told.append(f"{self.name} is killed")
        self.dead.set()
        await trio.lowlevel.checkpoint()

    async def gone(self) -> None:
        await self.dead.wait()


@asynccontextmanager
async def gateway(*holders: StandIn) -> AsyncIterator[TokenGateway]:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            made = TokenGateway("worker")
            await nursery.start(made.run)
            for holder in holders:
                made.hold(holder.name, holder)
            yield made
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110  # what other processes do rings no bell
        await trio.sleep(0.002)


async def test_it_moves_with_the_route_and_back() -> None:
    told: list[str] = []
    old, new = StandIn("old", told), StandIn("new", told)
    async with gateway(old, new) as one:
        answers: list[float] = []
        one.route({"old": 1.0})
        await until(lambda: one.serves("old"))
        one.route({"old": 0.5, "new": 0.5})  # nothing to share out: it stays
        one.route({"new": 1.0})
        await until(lambda: one.serves("new"))
        assert {name: seen.active for name, seen in one.snapshot(0.0).items()} == {"old": False, "new": True}
        one.route({"old": 1.0})
        one.rescue("new")
        one.on_answer("old", answers.append)
        await one.drained("new")
        await until(lambda: answers)
        assert one.serves("old")
    assert told == ["old works", "old stops", "new works", "new stops", "old works"]


async def test_one_that_hangs_is_killed_when_its_second_is_over_and_only_then_the_other_begins() -> None:
    told: list[str] = []
    old, new = StandIn("old", told), StandIn("new", told)
    new.may_stop = trio.Event()
    async with gateway(old, new) as one:
        one.route({"new": 1.0})
        await until(lambda: one.serves("new"))
        one.route({"old": 1.0})
        one.rescue("new")
        await until(lambda: one.serves("old"))
    assert told == ["new works", "new is killed", "old works"]


async def test_one_that_can_t_stop_is_killed_at_once() -> None:
    told: list[str] = []
    old, new = StandIn("old", told), StandIn("new", told)
    old.can_stop = False
    async with gateway(old, new) as one:
        one.route({"old": 1.0})
        await until(lambda: one.serves("old"))
        one.route({"new": 1.0})
        await until(lambda: one.serves("new"))
    assert told == ["old works", "old can't stop", "old is killed", "new works"]


async def test_one_whose_process_died_frees_it_when_nothing_of_it_is_left() -> None:
    told: list[str] = []
    old, new = StandIn("old", told), StandIn("new", told)
    async with gateway(old, new) as one:
        one.route({"old": 1.0})
        await until(lambda: one.serves("old"))
        old.may_stop = trio.Event()
        one.lost("old")
        one.route({"new": 1.0})
        await trio.testing.wait_all_tasks_blocked()
        assert not one.serves("new")  # a child of it may still work
        old.dead.set()
        await until(lambda: one.serves("new"))


async def test_an_agent_without_an_endpoint_gets_this_gateway_and_nothing_can_be_attached_by_address() -> None:
    config = AgentConfig(host="h", serve="r1", revisions={"r1": RevisionConfig(entry="a:B")})
    async with open_sockets() as sockets:
        made = open_gateway("worker", config, sockets)
    assert isinstance(made, TokenGateway)
    with pytest.raises(ValueError, match="has no endpoint"):
        made.attach("x", "tcp://127.0.0.1:1", window=1, idempotent=lambda _: True)


# --- a wrapped program

# Appends a line at the beginning and the end of each piece of work, as fast as it can.
LOOP = """
import fcntl, os, sys
name, out = sys.argv[1:]
with open(out, "ab", buffering=0) as file:
    while True:
        with open(os.environ["INTERLOCK_TOKEN"]) as token:
            fcntl.flock(token, fcntl.LOCK_SH)
            file.write(f"{name} begins\\n".encode())
            file.write(f"{name} ends\\n".encode())
"""
SHELL = 'while true; do flock "$INTERLOCK_TOKEN" sh -c "echo $1 begins >> $2; echo $1 ends >> $2"; done'


def lines(out: Path) -> list[str]:
    return out.read_text().splitlines() if out.exists() else []


def started(argv: list[str], token: TokenFile) -> subprocess.Popen[bytes]:
    env = {**os.environ, "INTERLOCK_TOKEN": str(token.path)}
    return subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.parametrize("argv", [[sys.executable, "-c", LOOP], ["sh", "-c", SHELL, "sh"]], ids=["python", "shell"])
async def test_a_program_that_locks_its_token_works_in_its_turns_only(argv: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokens = {name: TokenFile(tmp_path / f"{name}.token") for name in ("one", "two")}
    processes = [started([*argv, name, str(out)], token) for name, token in tokens.items()]
    try:
        with trio.fail_after(60):
            for turn in range(12):
                name = ("one", "two")[turn % 2]
                before = len(lines(out))
                tokens[name].give()
                await until(lambda b=before: len(lines(out)) >= b + 4)
                await tokens[name].take()
                seen = lines(out)
                assert {line.partition(" ")[0] for line in seen[before:]} == {name}
                assert seen[-1] == f"{name} ends"
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for token in tokens.values():
            token.close()
    assert os.listdir(tmp_path) == ["out"]


async def test_a_thousand_turns_leave_one_open_file_and_a_program_that_waits_at_an_old_one_still_waits(
    tmp_path: Path,
) -> None:
    token = TokenFile(tmp_path / "token")
    with trio.fail_after(60):
        for _ in range(1000):
            token.give()
            await token.take()
        assert len(token._files) == 1
        token.give()
        late = os.open(token.path, os.O_RDONLY)
        await token.take()
        assert len(token._files) == 2
        with pytest.raises(BlockingIOError):
            fcntl.flock(late, fcntl.LOCK_SH | fcntl.LOCK_NB)
        token.give()
        fcntl.flock(late, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with trio.move_on_after(0.05) as waited:
            await token.take()
        assert waited.cancelled_caught
        os.close(late)
        await token.take()
        assert len(token._files) <= 2
    token.close()


async def test_the_lock_of_a_dead_program_is_free(tmp_path: Path) -> None:
    token = TokenFile(tmp_path / "token")
    out = tmp_path / "out"
    hold = LOOP.replace('file.write(f"{name} ends\\n".encode())', "import time; time.sleep(1000)")
    process = started([sys.executable, "-c", hold, "one", str(out)], token)
    with trio.fail_after(60):
        token.give()
        await until(lambda: lines(out))
        with trio.move_on_after(0.1) as waited:
            await token.take()
        assert waited.cancelled_caught
        process.kill()
        process.wait()
        await token.take()
    token.close()


# --- a class

WORKER = """
    import threading, trio
    from interlock.agents.agent import Agent, background, handler, while_active

    class Subject(Agent):
        def note(self, what):
            with open(self.config["out"], "a") as file:
                file.write(what + "\\n")

        async def activated(self):
            self.note("activated")
            if self.config.get("fail"):
                raise OSError("the queue is gone")

        def deactivated(self):
            self.note("deactivated")

        @while_active
        async def work(self):
            self.note("work")
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.05)
                    self.note("work done")

        @while_active
        def crunch(self, stop: threading.Event):
            self.note("crunch")
            stop.wait()
            self.note("crunch done")

        @background
        async def wait(self):
            await self.until_active()
            self.note(f"waited {self.active}")

        @handler("active")
        async def is_active(self):
            return {"active": self.active}
"""


async def test_a_class_works_in_its_turns_and_says_that_it_stopped_after_all_has_stopped(
    launch_agent: LaunchAgent, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    agent = await launch_agent(WORKER, config={"out": str(out)}, standby=True)
    assert await agent.ask("active") == {"status": "ok", "active": False}
    assert lines(out) == []
    for turn in range(2):
        assert (await agent.control.activate(20.0)).ok
        assert (await agent.control.activate(20.0)).ok  # the same again does no harm
        assert await agent.ask("active") == {"status": "ok", "active": True}
        started = {"activated", "work", "crunch"} | ({"waited True"} if not turn else set())
        await until(lambda s=started: s <= set(lines(out)))
        assert (await agent.control.deactivate(20.0)).ok
        assert (await agent.control.deactivate(20.0)).ok
        seen = lines(out)
        assert seen[0] == "activated"
        assert seen[-1] == "deactivated"
        assert set(seen) == started | {"work done", "crunch done", "deactivated"}
        assert await agent.ask("active") == {"status": "ok", "active": False}
        out.unlink()
    assert await agent.terminated() == 0
    assert lines(out) == []


async def test_the_turn_of_an_agent_that_is_stopped_ends_first(launch_agent: LaunchAgent, tmp_path: Path) -> None:
    out = tmp_path / "out"
    agent = await launch_agent(WORKER, config={"out": str(out)}, standby=True)
    assert (await agent.control.activate(20.0)).ok
    await until(lambda: "crunch" in lines(out))
    assert await agent.terminated() == 0
    assert {"work done", "crunch done", "deactivated"} <= set(lines(out))


async def test_an_agent_with_an_endpoint_is_active_from_the_start(launch_agent: LaunchAgent, tmp_path: Path) -> None:
    agent = await launch_agent(WORKER, config={"out": str(tmp_path / "out")})
    await until(lambda: {"activated", "work", "crunch", "waited True"} <= set(lines(tmp_path / "out")))
    assert await agent.ask("active") == {"status": "ok", "active": True}


async def test_one_that_can_t_begin_says_why_and_is_not_well(launch_agent: LaunchAgent, tmp_path: Path) -> None:
    agent = await launch_agent(WORKER, config={"out": str(tmp_path / "out"), "fail": True}, standby=True)
    said = await agent.control.activate(20.0)
    assert (said.ok, said.detail) == (False, "activated() failed: OSError: the queue is gone")
    health = await agent.control.health()
    assert (health.ok, health.detail) == (False, said.detail)
    assert (await agent.control.deactivate(20.0)).ok
