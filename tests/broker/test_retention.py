"""What is old is dropped as far as a snapshot stands for it; who joins later misses nothing and sees nothing twice."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio

from interlock.broker import client, event_plane, policy, topics
from interlock.broker.config import BrokerConfig, LogConfig
from interlock.broker.errors import Refused
from interlock.broker.event_plane import serve_events
from interlock.broker.facts import FleetSnapshot, HostDown
from interlock.broker.keys import Grant
from interlock.broker.log import Draft, EventLog
from interlock.broker.wire import Event, Header, encode

A, B = topics.host_fact("a"), topics.host_fact("b")
ALL = {"limit": 1000, "max_bytes": 1 << 24}
ENDPOINTS = ("events", "feed", "telemetry_in", "telemetry_out")


def add(log: EventLog, count: int, *, now: float, topic: str = A) -> None:
    for n in range(log.last + 1, log.last + 1 + count):
        log.append([Draft(topic, Header(id=f"id-{n}", source="s", time=1.0), encode(HostDown(host=str(n))))], now=now)


def snap(log: EventLog, through: int, start: int, *, now: float) -> None:
    body = FleetSnapshot(through=through, start=start, state=b"")
    header = Header(id=f"snapshot/{through}", source="coordinator", time=1.0)
    log.append([Draft(topics.FLEET_SNAPSHOT, header, encode(body))], now=now)


def drop(log: EventLog, *, before: float = 0.0, max_bytes: int = 1 << 40) -> int:
    total = 0
    while dropped := log.prune(before=before, max_bytes=max_bytes):
        total += dropped
    return total


def seqs(log: EventLog, after: int, *prefixes: str) -> list[int]:
    page = log.read(after, prefixes, **ALL)
    first = [] if page.snapshot is None else [page.snapshot.header.seq]
    return first + [record.header.seq for record in page.records]


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    log = EventLog(tmp_path / "events.sqlite")
    add(log, 1500, now=100.0)
    return log


def test_without_a_snapshot_nothing_is_dropped(log: EventLog) -> None:
    assert drop(log, before=1e9, max_bytes=0) == 0
    log.close()


def test_what_is_old_goes_and_what_an_open_migration_needs_stays(log: EventLog) -> None:
    snap(log, through=1500, start=1200, now=200.0)
    assert drop(log, before=150.0) == 1200
    assert log.floor == 1200
    assert drop(log, before=1e9, max_bytes=0) == 0
    assert seqs(log, 0, "fact/") == list(range(1201, 1501))
    assert seqs(log, 0, "fact/", "snapshot/") == [1501, *range(1201, 1502)]
    assert seqs(log, 1300, "fact/", "snapshot/") == list(range(1301, 1502))
    log.close()


def test_what_is_young_stays_unless_the_log_is_too_large(log: EventLog) -> None:
    snap(log, through=1500, start=1500, now=200.0)
    assert drop(log, before=50.0) == 0
    used = log._used_bytes()
    assert 0 < drop(log, max_bytes=used // 2) <= 1500
    assert log._used_bytes() <= used
    log.close()


def test_the_chain_the_numbers_and_the_ids_outlive_what_was_dropped(log: EventLog) -> None:
    snap(log, through=1500, start=1500, now=200.0)
    drop(log, before=1e9)
    log.close()
    again = EventLog(log.path)
    assert again.trouble == ""
    verdict = again.verify()
    assert (verdict.anchor.seq, verdict.events, verdict.findings) == (1500, 1, [])
    header = Header(id="id-7", source="s", time=1.0)
    repeated, fresh = again.append(
        [Draft(A, header, b"\x80"), Draft(A, Header(id="new", source="s", time=1.0), b"\x80")], now=300.0
    )
    assert (repeated.header.seq, repeated.fresh) == (7, False)
    assert (fresh.header.seq, fresh.header.prev) == (1502, 1500)
    (other,) = again.append([Draft(A, Header(id="id-7", source="another", time=1.0), b"\x80")], now=300.0)
    assert (other.header.seq, other.fresh) == (1503, True)
    assert again.verify().findings == []
    again.close()


def test_a_snapshot_that_promises_what_can_not_be_is_none(log: EventLog) -> None:
    snap(log, through=5000, start=1500, now=200.0)
    assert drop(log, before=1e9) == 0
    log.close()


async def test_a_late_joiner_gets_the_snapshot_and_everything_after_it_while_events_are_dropped(
    folder: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_plane, "RETAIN_S", 0.05)
    config = BrokerConfig(**{name: f"ipc://{folder}/{name}" for name in ENDPOINTS})
    await nursery.start(partial(serve_events, keep=LogConfig(keep_days=0.0)), config, folder / "log")
    seen: list[Event] = []

    async def join(bus: client.Bus, last: int, prefixes: list[str]) -> list[Event]:
        events: list[Event] = []
        async with bus.events(prefixes, after=0) as feed:
            while feed.position < last:
                events.append(await anext(feed))
        return events

    with trio.fail_after(60):
        async with client.open_bus(config, "coordinator") as bus, bus.events(["fact/"], after=0) as feed:
            for n in range(1, 701):
                bus.post(A if n % 3 else B, HostDown(host=str(n)))
            await bus.flushed()
            for n in (500, 650):
                snapshot = FleetSnapshot(through=n, start=n - 50, state=b"")
                await bus.publish(topics.FLEET_SNAPSHOT, snapshot)
                bus.post(A, HostDown(host="more"))
            for n in range(705, 1001):
                bus.post(A if n % 3 else B, HostDown(host=str(n)))
            await bus.flushed()
            joined = await join(bus, 1000, ["fact/", "snapshot/"])
            assert isinstance(joined[0].body, FleetSnapshot)
            assert joined[0].body.through == 650
            assert [event.header.seq for event in joined[1:]] == [n for n in range(601, 1001) if n != 703]
            plain = [event.header.seq for event in await join(bus, 1000, ["fact/"])]
            while plain[0] == 1:  # until what is old was dropped
                plain = [event.header.seq for event in await join(bus, 1000, ["fact/"])]
            assert plain == [n for n in range(plain[0], 1001) if n not in (701, 703)]
            half = await join(bus, 999, [B, "snapshot/"])
            wanted = [n for n in range(601, 1000) if n == 701 or (n % 3 == 0 and n != 702)]  # 701: the older snapshot
            assert [event.header.seq for event in half[1:]] == wanted
            while len(seen) < 998:
                seen.append(await anext(feed))
    assert [event.header.seq for event in seen] == [n for n in range(1, 1001) if n not in (701, 703)]


@pytest.mark.parametrize("identity", ["host/alpha", "rules", "operator/eve", "monitor/alpha"])
def test_nobody_but_the_coordinator_says_what_the_fleet_was(identity: str) -> None:
    body = FleetSnapshot(through=1, start=1, state=b"")

    def event(source: str) -> Event:
        return Event(topics.FLEET_SNAPSHOT, Header(id="1", source=source, time=1.0), body, encode(body))

    policy.publish(Grant(identity="coordinator", curve=""), event("coordinator"))
    with pytest.raises(Refused):
        policy.publish(Grant(identity=identity, curve=""), event(identity))
