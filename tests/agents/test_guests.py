"""What a host may ask of another one: nothing but what the coordinator named."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
from tests.agents.conftest import Hosted

from interlock.agents.guests import Guests, Invitation
from interlock.agents.launch import Place
from interlock.agents.revisions import RevisionStore
from interlock.agents.session import Stream
from interlock.broker import facts
from interlock.broker.config import AgentConfig
from interlock.broker.errors import Refused
from interlock.broker.facts import Fact

ABOUT: dict[str, Any] = {
    "agent": "tutor",
    "migration": "tutor-7",
    "epoch": 7,
    "instance": "tutor-r2-7.2",
    "lease_s": 600.0,
}


class House:
    """Host beta, with a revision that it may run for alpha."""

    def __init__(self, hosted: Hosted, nursery: trio.Nursery) -> None:
        self.told: list[Fact] = []
        numbers = iter(range(500, 1000))
        place: Place = hosted.around.place
        store = RevisionStore(hosted.folder / "revisions")
        self.guests = Guests(
            "beta", place, store, nursery, publish=self.told.append, next_number=lambda: next(numbers)
        )  # fmt: skip
        revision = {
            "command": ["{python}", "rep.py", "{port}", str(hosted.tells), "r2"], "source": "source",
            "probe": {"kind": "zmq", "port": "request", "expect": {"status": "ok"}}, "stop_timeout_s": 0.3,
        }  # fmt: skip
        tree = {"host": "alpha", "endpoint": "tcp://127.0.0.1:*", "serve": "r2", "revisions": {"r2": revision}}
        config = msgspec.convert(tree, AgentConfig)
        recorded = store.record("tutor", "r2", config.revisions["r2"], Path(hosted.folder / "source"))
        self.guests.invite(
            Invitation("tutor", "tutor-7", 7, "alpha", "r2", recorded.digest, config, time.time() + 600)
        )  # fmt: skip

    async def ask(self, what: str, host: str = "alpha", **about: Any) -> dict[str, Any]:
        return await self.guests.answer(host, what, {**ABOUT, **about})


@pytest.fixture
async def house(hosted: Hosted) -> House:
    return House(hosted, hosted.nursery)


@pytest.mark.parametrize("wrong", [
    {"host": "gamma"}, {"agent": "other"}, {"migration": "tutor-8"}, {"epoch": 8}, {"instance": "tutor-r1-7.2"},
    {"instance": "../x"}, {"agent": 7},
])  # fmt: skip
async def test_nothing_is_started_that_was_not_named(house: House, wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        await house.ask("start", **wrong)
    assert house.guests.running == {}
    assert house.told == []


async def test_a_guest_is_started_once_however_often_it_is_asked_for(house: House) -> None:
    answers: list[dict[str, Any]] = []

    async def ask() -> None:
        answers.append(await house.ask("start"))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
    assert answers[0] == answers[1] == answers[2]
    assert len([fact for fact in house.told if isinstance(fact, facts.InstanceStarted)]) == 1
    with pytest.raises(Refused, match="another candidate"):
        await house.ask("start", instance="tutor-r2-7.3")
    with trio.fail_after(20):
        while not (await house.ask("check"))["ok"]:
            pass
    for what in ("renew", "check", "stop"):
        with pytest.raises(Refused):
            await house.ask(what, host="gamma")
    with pytest.raises(Refused, match="nothing that a host is asked for"):
        await house.ask("explode")
    await house.ask("stop")
    assert house.guests.running == {}


async def test_a_guest_whose_lease_is_not_renewed_is_ended(house: House, hosted: Hosted) -> None:
    await house.ask("start", lease_s=0.2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.guests.run)
        await hosted.until(lambda: not house.guests.running)
        nursery.cancel_scope.cancel()
    stopped = [fact for fact in house.told if isinstance(fact, facts.InstanceStopped)]
    assert [(fact.host, fact.role, fact.expected) for fact in stopped] == [("beta", "candidate", True)]


async def test_the_end_of_a_guest_is_told_as_soon_as_it_comes(house: House) -> None:
    await house.ask("start")
    process = house.guests.running[ABOUT["instance"]].instance.process
    assert process is not None
    process.kill()
    with trio.fail_after(20):
        said = await house.ask("exit")
    assert said["code"] == -9
    assert (await house.ask("renew"))["code"] == -9
    await house.ask("stop")


async def test_a_stream_to_another_hosts_guest_is_refused(house: House) -> None:
    await house.ask("start")
    stream = cast(Stream, None)  # it is not looked at
    for host, whom, port in (
        ("gamma", ABOUT["instance"], "requests"), ("alpha", "tutor-r2-7.9", "requests"),
        ("alpha", ABOUT["instance"], "shell"), ("gamma", ABOUT["instance"], "folder-take-early"),
    ):  # fmt: skip
        with pytest.raises(Refused):
            await house.guests.serve(host, stream, str(whom), port)
    await house.ask("stop")
