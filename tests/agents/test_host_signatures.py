"""A host believes no broker: whoever asks proves it to the host itself, once, in time."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from interlock.agents.host import Host
from interlock.agents.journal import Journal
from interlock.agents.slot import Slot as Slot_
from interlock.agents.slot_io import AskRollBack, Moment, Renew, Row
from interlock.broker import facts, keys, signing, topics, wire
from interlock.broker.bus import new_event
from interlock.broker.commands import Breach, Commit, RenewLease, RollBack, RollCall
from interlock.broker.config import FleetConfig
from interlock.broker.errors import Refused
from interlock.broker.keyring import Keyring
from interlock.broker.memory import MemoryBroker
from interlock.broker.security import Security
from interlock.broker.wire import Body, Event

NOW = time.time()
ROLL_BACK = RollBack(migration="m", agent="chat", epoch=7, breach=Breach(by="operator", reason="r"), issued=NOW)
LEASE = RenewLease(migration="m", agent="chat", epoch=7, lease_s=6.0)
COMMIT = Commit(migration="m", agent="chat", epoch=7, deadline=NOW + 3600)


class Slot:
    def __init__(self) -> None:
        self.given: list[Any] = []

    def give(self, what: Any) -> None:
        self.given.append(what)


class Stage:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "keys"
        Keyring(self.folder, "f").ensure(["coordinator", "rules", "host/alpha", "broker"], now=1.0)
        self.broker = MemoryBroker()
        self.journal = Journal.open(folder / "host.sqlite")
        roll = keys.Roll(keys.read_authority(self.folder))
        security = Security(keys.read_private(self.folder, "host/alpha"), roll, self.folder)
        self.host = Host("alpha", FleetConfig(), self.broker.bus("host/alpha"), self.journal, security)
        self.slot = Slot()
        self.host.slots["chat"] = cast(Any, self.slot)

    def signed(self, who: str, topic: str, body: Body, id: str = "id") -> Event:
        event = new_event(topic, body, source=who, time=time.time(), id=id)
        return wire.decode_event(wire.encode_event(signing.sign(event, keys.read_private(self.folder, who))))


@pytest.fixture
def stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.WARNING)
    stage = Stage(tmp_path)
    yield stage
    stage.journal.close()


async def test_what_is_signed_is_done_on_both_ways(stage: Stage) -> None:
    rollback = stage.signed("rules", topics.rollback("alpha"), ROLL_BACK)
    stage.host.accept(rollback)
    await stage.host._take(rollback)
    stage.host.accept(stage.signed("coordinator", topics.command("alpha"), LEASE))
    await stage.host._take(stage.signed("coordinator", topics.command("alpha"), COMMIT))
    assert [type(given).__name__ for given in stage.slot.given] == ["AskRollBack", "AskRollBack", "Renew", "Ask"]
    assert isinstance(stage.slot.given[0], AskRollBack)
    assert isinstance(stage.slot.given[2], Renew)


async def test_a_taken_over_broker_forges_nothing(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    rollback = stage.signed("rules", topics.rollback("alpha"), ROLL_BACK)
    unsigned = new_event(topics.rollback("alpha"), ROLL_BACK, source="coordinator", time=NOW)
    other = msgspec.structs.replace(ROLL_BACK, agent="chat", epoch=8)
    altered = Event(rollback.topic, rollback.header, other, wire.encode(other))
    elsewhere = stage.signed("rules", topics.rollback("beta"), ROLL_BACK)  # another host's, passed on to this one
    wrong_role = stage.signed("rules", topics.command("alpha"), COMMIT)
    for event in (unsigned, altered, elsewhere, wrong_role):
        await stage.host._take(event)
        with pytest.raises(Refused):
            stage.host.accept(event)
    assert stage.slot.given == []
    for why in ("it is not signed", "not signed by whom it names", "not for host alpha", "may not ask for Commit"):
        assert why in caplog.text


async def test_a_replayed_command_is_answered_and_not_done_again(stage: Stage) -> None:
    commit = stage.signed("coordinator", topics.command("alpha"), COMMIT, id="c1")
    result = facts.StepDone(host="alpha", agent="chat", migration="m", epoch=7, step="commit", command="c1")
    stage.journal.remember_done("c1", wire.encode(result))
    await stage.host._take(commit)
    assert stage.slot.given == []
    assert stage.broker.log[-1].body == result


async def test_a_roll_call_is_answered_and_what_is_forged_or_late_refused(stage: Stage) -> None:
    async def answers(event: Event) -> dict[str, str]:
        await stage.host._take(event)
        async with stage.broker.bus("coordinator").receipts(event.header.id) as receipts:
            return receipts.by

    call = RollCall(deadline=time.time() + 60)
    assert await answers(stage.signed("coordinator", topics.ALL_HOSTS, call, "all")) == {"host/alpha": ""}
    assert await answers(stage.signed("coordinator", topics.command("alpha"), call, "one")) == {"host/alpha": ""}
    late = await answers(stage.signed("coordinator", topics.ALL_HOSTS, RollCall(deadline=time.time() - 30), "late"))
    assert "deadline passed" in late["host/alpha"]
    forged = new_event(topics.ALL_HOSTS, call, source="coordinator", time=time.time(), id="forged")
    assert "not signed" in (await answers(forged))["host/alpha"]
    elsewhere = await answers(stage.signed("coordinator", topics.command("beta"), call, "elsewhere"))
    assert "not for host alpha" in elsewhere["host/alpha"]
    to_all = await answers(stage.signed("coordinator", topics.ALL_HOSTS, COMMIT, "commit-all"))
    assert "not for host alpha" in to_all["host/alpha"]
    assert stage.slot.given == []
    done = await answers(stage.signed("coordinator", topics.command("alpha"), COMMIT, "commit"))
    assert done == {"host/alpha": ""}
    assert len(stage.slot.given) == 1


async def test_after_a_restart_of_the_host_a_replayed_command_and_an_old_epoch_change_nothing(
    stage: Stage, tmp_path: Path
) -> None:
    commit = stage.signed("coordinator", topics.command("alpha"), COMMIT, id="c1")
    rollback = stage.signed("rules", topics.rollback("alpha"), ROLL_BACK)
    result = facts.StepDone(host="alpha", agent="chat", migration="m", epoch=7, step="commit", command="c1")
    row = Row("chat", "v2", "d2", epoch=7)  # committed: what m brought is permanent
    stage.journal.save_slot(row, "committed", done=("c1", wire.encode(result)))
    stage.journal.close()
    stage.journal = Journal.open(tmp_path / "host.sqlite")
    host = Host("alpha", FleetConfig(), stage.broker.bus("host/alpha"), stage.journal, stage.host.security)
    host.slots["chat"] = cast(Any, stage.slot)
    known = stage.journal.slot("chat")
    assert known == row
    await host._take(commit)
    assert stage.slot.given == []  # answered from the journal
    assert stage.broker.log[-1].body == result
    slot = Slot_("alpha", known)
    now = Moment(mono=1.0, wall=time.time())
    old = msgspec.structs.replace(COMMIT, migration="m0", epoch=6)
    assert "its epoch 6 is older than 7" in str(slot.refusal(old, now))
    assert "not in flight" in str(slot.refusal(COMMIT, now))
    await host._take(rollback)  # replayed: it is passed on, and the slot has nothing to undo
    [asked] = stage.slot.given
    slot.handle(asked, now)
    assert slot.row == row
