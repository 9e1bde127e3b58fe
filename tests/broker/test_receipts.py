"""Who has taken a command: the broker's memory of it, and the way from a host to whoever asked."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from interlock.broker import client, keys, topics
from interlock.broker.bus import Bus
from interlock.broker.commands import Prepare, RollCall
from interlock.broker.config import PLACES, BrokerConfig, load_fleet
from interlock.broker.errors import ConfigError, Refused
from interlock.broker.keyring import Keyring
from interlock.broker.keys import Grant
from interlock.broker.planes import serve_planes
from interlock.broker.protocol import Receipt, Received, Watch
from interlock.broker.receipts import KEEP_S, MAX_COMMANDS, MAX_EARLY, MAX_REASON, MAX_WATCHERS, PART, Receipts
from interlock.broker.security import Security

ANY = BrokerConfig(**dict.fromkeys(PLACES, "tcp://127.0.0.1:*"))
HOSTS = ["alpha", "beta", "gamma"]


def grant(identity: str) -> Grant:
    return Grant(identity=identity, curve="0" * 64)


def known(*, topic: str = topics.ALL_HOSTS, source: str = "operator/o") -> Receipts:
    receipts = Receipts()
    receipts.logged("c", topic=topic, source=source, seq=7, now=0.0)
    return receipts


# --- the memory


def test_a_watcher_is_told_what_is_known_and_then_only_what_is_new() -> None:
    receipts = known()
    receipts.take(grant("host/alpha"), Receipt("host/alpha", "c"))
    assert receipts.watch(grant("operator/o"), b"p", Watch("c")) == [Received("c", 7, {"host/alpha": ""})]
    assert receipts.due() == []
    receipts.take(grant("host/beta"), Receipt("host/beta", "c", "too late"))
    receipts.take(grant("host/alpha"), Receipt("host/alpha", "c", "another word"))
    assert receipts.due() == [(b"p", Received("c", 7, {"host/beta": "too late"}))]
    assert receipts.due() == []
    assert receipts.watch(None, b"q", Watch("c")) == [Received("c", 7, {"host/alpha": "", "host/beta": "too late"})]


def test_of_a_command_that_it_does_not_know_it_says_so() -> None:
    receipts = Receipts()
    receipts.take(None, Receipt("host/alpha", "c"))
    assert receipts.watch(None, b"p", Watch("c")) == [Received("c")]
    receipts.logged("c", topic=topics.ALL_HOSTS, source="operator/o", seq=3, now=0.0)
    assert receipts.watch(None, b"p", Watch("c")) == [Received("c", 3)]


def test_who_watches_before_the_command_is_logged_is_told_without_asking_again() -> None:
    receipts = Receipts()
    receipts.watch(grant("operator/o"), b"p", Watch("c"))
    receipts.watch(grant("operator/p"), b"q", Watch("c"))
    receipts.watch(grant("host/beta"), b"stranger", Watch("c"))
    receipts.logged("c", topic=topics.ALL_HOSTS, source="operator/o", seq=3, now=0.0)
    receipts.take(grant("host/alpha"), Receipt("host/alpha", "c"))
    told = receipts.due()
    assert {peer for peer, _ in told} == {b"p", b"q"}
    assert all(answer == Received("c", 3, {"host/alpha": ""}) for _, answer in told)


def test_watches_of_what_is_never_logged_do_not_pile_up() -> None:
    receipts = Receipts()
    for n in range(MAX_EARLY + 1):
        receipts.watch(None, b"p", Watch(f"c{n}"))
    for n in range(MAX_WATCHERS + 1):
        receipts.watch(None, b"%d" % n, Watch("c1000"))
    for id in ("c0", "c1000"):
        receipts.logged(id, topic=topics.ALL_HOSTS, source="operator/o", seq=3, now=0.0)
        receipts.take(None, Receipt("host/alpha", id))
    assert len(receipts.due()) == MAX_WATCHERS


@pytest.mark.parametrize(
    ("identity", "source", "topic"),
    [
        ("host/alpha", "host/beta", topics.ALL_HOSTS),
        ("host/alpha", "host/alpha", topics.command("beta")),
        ("host/alpha", "host/alpha", topics.COORDINATOR),
        ("monitor/alpha", "monitor/alpha", topics.command("alpha")),
        ("operator/o", "operator/o", topics.ALL_HOSTS),
    ],
)
def test_nobody_answers_for_somebody_else(identity: str, source: str, topic: str) -> None:
    receipts = known(topic=topic)
    with pytest.raises(Refused):
        receipts.take(grant(identity), Receipt(source, "c"))
    assert receipts.watch(None, b"p", Watch("c")) == [Received("c", 7)]


@pytest.mark.parametrize(
    ("identity", "topic"),
    [
        ("host/alpha", topics.ALL_HOSTS),
        ("host/alpha", topics.command("alpha")),
        ("host/alpha", topics.rollback("alpha")),
        ("coordinator", topics.COORDINATOR),
    ],
)
def test_who_is_asked_may_answer(identity: str, topic: str) -> None:
    receipts = known(topic=topic)
    receipts.take(grant(identity), Receipt(identity, "c"))
    assert receipts.watch(None, b"p", Watch("c")) == [Received("c", 7, {identity: ""})]


@pytest.mark.parametrize(
    ("identity", "may"), [("rules", True), ("operator/o", True), ("host/alpha", False), ("monitor/alpha", False)]
)
def test_only_who_asked_and_those_in_command_may_watch(identity: str, may: bool) -> None:
    receipts = known(source="rules")
    if may:
        assert receipts.watch(grant(identity), b"p", Watch("c"))
    else:
        with pytest.raises(Refused):
            receipts.watch(grant(identity), b"p", Watch("c"))


def test_old_commands_are_forgotten_and_none_beyond_the_limits() -> None:
    receipts = Receipts()
    for n in range(MAX_COMMANDS + 5):
        receipts.logged(f"c{n}", topic=topics.ALL_HOSTS, source="o", seq=n + 1, now=0.0)
    assert receipts.watch(None, b"p", Watch("c4")) == [Received("c4")]
    assert receipts.watch(None, b"p", Watch("c5")) == [Received("c5", 6)]
    receipts.logged("late", topic=topics.ALL_HOSTS, source="o", seq=9999, now=KEEP_S)
    assert receipts.watch(None, b"p", Watch(f"c{MAX_COMMANDS}")) == [Received(f"c{MAX_COMMANDS}")]
    assert receipts.watch(None, b"p", Watch("late")) == [Received("late", 9999)]


def test_many_receipts_are_told_in_parts_and_reasons_cut() -> None:
    receipts = known()
    for n in range(PART + 1):
        receipts.take(None, Receipt(f"host/h{n}", "c", "x" * 1000))
    parts = receipts.watch(None, b"p", Watch("c"))
    assert [len(part.by) for part in parts] == [PART, 1]
    assert {len(reason) for part in parts for reason in part.by.values()} == {MAX_REASON}


def test_a_watcher_that_is_gone_is_told_no_more_and_too_many_are_told_once() -> None:
    receipts = known()
    for n in range(MAX_WATCHERS + 1):
        assert receipts.watch(None, b"%d" % n, Watch("c"))
    receipts.gone("c", b"0")
    receipts.take(None, Receipt("host/alpha", "c"))
    told = [peer for peer, _ in receipts.due()]
    assert len(told) == MAX_WATCHERS - 1
    assert b"0" not in told
    assert b"%d" % MAX_WATCHERS not in told


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("log"), st.sampled_from("abc")),
            st.tuples(st.just("take"), st.sampled_from("abc"), st.sampled_from(HOSTS), st.sampled_from(["", "no"])),
            st.tuples(st.just("watch"), st.sampled_from("abc")),
            st.tuples(st.just("due")),
        )
    )
)
def test_a_watcher_knows_in_the_end_what_the_broker_knows(steps: list[tuple[str, ...]]) -> None:
    receipts, heard, truth = Receipts(), dict[str, dict[str, str]](), dict[str, dict[str, str]]()
    watched = set()

    def hear(told: list[Received]) -> None:
        for received in told:
            for who, reason in received.by.items():
                assert heard.setdefault(received.command, {}).setdefault(who, reason) == reason

    for step in steps:
        match step:
            case ("log", id):
                receipts.logged(id, topic=topics.ALL_HOSTS, source="o", seq=1, now=0.0)
                truth.setdefault(id, {})
            case ("take", id, host, reason):
                receipts.take(None, Receipt(host, id, reason))
                if id in truth:
                    truth[id].setdefault(host, reason)
            case ("watch", id):
                hear(receipts.watch(None, b"p", Watch(id)))
                if id in truth:
                    watched.add(id)
            case _:
                hear([received for _, received in receipts.due()])
    hear([received for _, received in receipts.due()])
    assert {id: heard.get(id, {}) for id in watched} == {id: truth[id] for id in watched}


# --- over a closed broker


class Fleet:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "keys"
        self.config = ANY
        who = ["broker", "coordinator", "rules", "operator/local", "monitor/alpha", *(f"host/{name}" for name in HOSTS)]
        Keyring(self.folder, "f").ensure(who, now=time.time())

    def security(self, identity: str) -> Security:
        roll = keys.Roll(keys.read_authority(self.folder))
        return Security(keys.read_private(self.folder, identity), roll, self.folder)

    @asynccontextmanager
    async def bus(self, identity: str) -> AsyncIterator[Bus]:
        async with client.open_bus(self.config, "", security=self.security(identity)) as bus:
            yield bus

    async def host(self, name: str, reason: str = "", *, task_status: trio.TaskStatus[None]) -> None:
        """Takes every command, or refuses it."""
        async with self.bus(f"host/{name}") as bus:
            async with bus.events([topics.command(name), topics.ALL_HOSTS]) as feed:
                task_status.started()
                async for event in feed:
                    bus.receipt(event, reason)


@pytest.fixture
async def fleet(folder: Path, nursery: trio.Nursery) -> Fleet:
    fleet = Fleet(folder)
    fleet.config = await nursery.start(partial(serve_planes, security=fleet.security("broker")), ANY, folder / "log")
    return fleet


def call() -> RollCall:
    return RollCall(deadline=time.time() + 60)


async def test_a_command_to_all_is_taken_or_refused_by_each_and_the_operator_learns_it(
    fleet: Fleet, nursery: trio.Nursery
) -> None:
    with trio.fail_after(60):
        for name, reason in (("alpha", ""), ("beta", "not now"), ("gamma", "")):
            await nursery.start(fleet.host, name, reason)
        async with fleet.bus("operator/local") as bus, bus.receipts("call-1") as receipts:
            await bus.publish(topics.ALL_HOSTS, call(), id="call-1")
            await receipts.complete(f"host/{name}" for name in HOSTS)
        assert receipts.by == {"host/alpha": "", "host/beta": "not now", "host/gamma": ""}
        async with fleet.bus("coordinator") as bus, bus.receipts("call-1") as later:  # asked afterwards, all is told
            await later.complete(f"host/{name}" for name in HOSTS)
        assert later.by == receipts.by
    nursery.cancel_scope.cancel()


async def test_a_command_to_one_is_heard_by_that_one(fleet: Fleet, nursery: trio.Nursery) -> None:
    with trio.fail_after(60):
        for name in HOSTS:
            await nursery.start(fleet.host, name)
        async with fleet.bus("coordinator") as bus:
            async with bus.receipts("to-beta") as one, bus.receipts("to-all") as everybody:
                await bus.publish(topics.command("beta"), call(), id="to-beta")
                await bus.publish(topics.ALL_HOSTS, call(), id="to-all")
                await everybody.complete(f"host/{name}" for name in HOSTS)
                await one.complete(["host/beta"])
                assert one.by == {"host/beta": ""}
    nursery.cancel_scope.cancel()


async def test_a_host_that_was_away_takes_the_command_when_it_comes(fleet: Fleet, nursery: trio.Nursery) -> None:
    with trio.fail_after(60):
        async with fleet.bus("operator/local") as bus, bus.receipts("call") as receipts:
            await bus.publish(topics.ALL_HOSTS, call(), id="call")
            async with fleet.bus("host/gamma") as late, late.events([topics.ALL_HOSTS], after=0) as feed:
                late.receipt(await anext(feed))
                await receipts.complete(["host/gamma"])
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("identity", "topic", "body"),
    [
        ("host/alpha", topics.ALL_HOSTS, call()),
        ("rules", topics.command("alpha"), call()),
        (
            "coordinator",
            topics.ALL_HOSTS,
            Prepare(migration="m", agent="a", epoch=1, deadline=2e9, to="r2", baseline_s=1.0),
        ),
        ("operator/local", topics.COORDINATOR, call()),
    ],
)
async def test_who_may_not_call_is_refused(
    fleet: Fleet, nursery: trio.Nursery, identity: str, topic: str, body: RollCall | Prepare
) -> None:
    with trio.fail_after(60):
        async with fleet.bus(identity) as bus:
            with pytest.raises(Refused):
                await bus.publish(topic, body, timeout=30)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", topics.RESERVED)
def test_no_host_is_called_like_everybody(name: str, folder: Path) -> None:
    file = folder / "fleet.toml"
    file.write_text(f'[hosts.{name}]\ncontrol = "tcp://127.0.0.1:5555"\n')
    with pytest.raises(ConfigError, match="no host may be called"):
        load_fleet(file)
    with pytest.raises(ConfigError, match="no host may be called"):
        keys.identity_of("host", name)
