"""What carries out a slot's actions: in order, written first, and never after a rollback has overtaken them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from interlock.agents.figures import InstanceView
from interlock.agents.instance import Health, InstanceControl
from interlock.agents.journal import Journal
from interlock.agents.launch import Instance
from interlock.agents.revisions import Revision
from interlock.agents.slot import Slot
from interlock.agents.slot_io import Ask, AskRollBack, Row, State
from interlock.agents.slot_shell import SlotShell
from interlock.agents.surroundings import Surroundings
from interlock.broker import commands, facts
from interlock.broker.commands import Breach
from interlock.broker.config import AgentConfig, RevisionConfig
from interlock.broker.errors import LogError
from interlock.broker.facts import Fact
from interlock.broker.sockets import open_sockets

CONFIG = AgentConfig(
    host="alpha", endpoint="tcp://127.0.0.1:1", serve="r1", revisions={"r1": RevisionConfig(entry="a:B")}
)


class StandInGateway:
    """Notes what it is told; answers of an instance come when the test says so."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.callbacks: list[Callable[[float], None]] = []

    def route(self, shares: dict[str, float]) -> None:
        self.told.append(shares)

    def begin_trial(self, slow_s: float | None) -> None:
        pass

    def rescue(self, instance: str) -> None:
        self.told.append(f"rescue {instance}")

    def mirror(self, instance: str | None, **_: Any) -> None:
        self.told.append(f"mirror {instance}")

    def on_answer(self, instance: str, callback: Callable[[float], None]) -> None:
        self.callbacks.append(callback)

    def detach(self, instance: str) -> None:
        self.told.append(f"detach {instance}")


class SlowJournal:
    """The real journal, behind a disk that can be stopped or full."""

    def __init__(self, path: Path) -> None:
        self.real = Journal.open(path)
        self.may_write = threading.Event()
        self.may_write.set()
        self.full = False
        self.writing = threading.Event()

    def state(self) -> State | None:
        row = self.real.slot("tutor")
        return row.state if row else None

    def save_slot(self, *args: Any, **rest: Any) -> None:
        self.writing.set()
        assert self.may_write.wait(20)
        if self.full:
            raise LogError("no space left on device", where="host.sqlite")
        self.real.save_slot(*args, **rest)


class Published:
    """The facts that the slot told, and a way to wait for one of a kind."""

    def __init__(self) -> None:
        self.kinds: set[type] = set()
        self.more = trio.Event()

    def __call__(self, fact: Fact) -> None:
        self.kinds.add(type(fact))
        more, self.more = self.more, trio.Event()
        more.set()

    async def one_of(self, kind: type) -> None:
        while kind not in self.kinds:
            await self.more.wait()


@dataclass
class Play:
    shell: SlotShell
    gateway: StandInGateway
    journal: SlowJournal
    published: Published


@pytest.fixture
async def play(tmp_path: Path, nursery: trio.Nursery) -> Play:
    """A slot whose candidate is on standby, and its shell, running."""
    slot = Slot("alpha", Row("tutor", "r1", "d1", "r2", "d2", State.STANDBY, "m", 7))
    slot.permanent, slot.permanent_up, slot.candidate = "old", True, "new"
    gateway, journal, published = StandInGateway(), SlowJournal(tmp_path / "host.sqlite"), Published()
    around = Surroundings(
        host="alpha", place=None, store=None, journal=journal, publish=published, load=None, backups=tmp_path,
        next_number=None, nursery=nursery,
    )  # type: ignore[arg-type] # fmt: skip
    shell = SlotShell(slot, CONFIG, gateway, around)  # type: ignore[arg-type]
    nursery.start_soon(shell.run)
    await trio.testing.wait_all_tasks_blocked()
    return Play(shell, gateway, journal, published)


def cut_over() -> Ask:
    return Ask(commands.CutOver(migration="m", agent="tutor", epoch=7, deadline=4e9, share=0.5, lease_s=60.0), "c1")


def roll_back() -> AskRollBack:
    breach = Breach(by="rule x", reason="x", sample_time=1.0)
    return AskRollBack(commands.RollBack(migration="m", agent="tutor", epoch=7, breach=breach, issued=1.0))


async def test_the_route_changes_only_once_it_is_written(play: Play) -> None:
    shell, journal, gateway = play.shell, play.journal, play.gateway
    with trio.fail_after(20):
        journal.may_write.clear()
        shell.give(cut_over())
        await trio.to_thread.run_sync(journal.writing.wait)
        assert gateway.told == []
        journal.may_write.set()
        await shell.settled()
        assert gateway.told == [{"old": 0.5, "new": 0.5}]
        assert journal.state() is State.LIVE


async def test_a_rollback_does_not_wait_for_the_disk_and_what_was_queued_before_it_is_void(play: Play) -> None:
    shell, journal, gateway = play.shell, play.journal, play.gateway
    with trio.fail_after(20):
        journal.may_write.clear()
        shell.give(cut_over())
        await trio.to_thread.run_sync(journal.writing.wait)
        shell.give(roll_back())
        assert gateway.told == [{"old": 1.0}, "rescue new"]
        journal.may_write.set()
        gateway.callbacks[0](0.0)
        await play.published.one_of(facts.RolledBack)
        assert gateway.told == [{"old": 1.0}, "rescue new"]
        assert journal.state() is State.SERVING


async def test_a_full_disk_stops_changes_but_not_a_rollback(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlock.agents.slot_shell.JOURNAL_RETRY_S", 0.01)
    shell, journal, gateway = play.shell, play.journal, play.gateway
    with trio.fail_after(20):
        journal.full = True
        shell.give(cut_over())
        await trio.to_thread.run_sync(journal.writing.wait)
        assert gateway.told == []
        shell.give(roll_back())
        assert gateway.told[0] == {"old": 1.0}
        gateway.callbacks[0](0.0)
        journal.full = False
        await play.published.one_of(facts.RolledBack)
        assert {"old": 0.5, "new": 0.5} not in gateway.told


async def test_a_question_to_an_instance_that_is_ended_meanwhile_is_a_failed_check_and_no_defect() -> None:
    with trio.fail_after(20):
        async with open_sockets() as sockets, trio.open_nursery() as nursery:
            control = InstanceControl(sockets, "ipc:///tmp/il-nobody-there")
            answers: list[Health] = []

            async def ask() -> None:
                answers.append(await control.health(10.0))

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            control.close()
            while not answers:
                await trio.testing.wait_all_tasks_blocked()
            assert not answers[0].ok
            assert "gone" in answers[0].detail


async def test_a_question_to_an_instance_that_has_ended_is_a_failed_check_and_no_defect(tmp_path: Path) -> None:
    recorded = Revision("tutor", "r1", "d1", tmp_path, CONFIG.revisions["r1"])
    instance = Instance(
        name="old", agent="tutor", config=CONFIG, recorded=recorded, place=None, view=InstanceView("r1", "permanent")
    )  # type: ignore[arg-type]
    with trio.fail_after(20):
        await instance.end()
        health = await instance.check()
    assert not health.ok
    assert "gone" in health.detail
