"""The rule engine that joins by a snapshot knows the same migrations, hosts and alerts as one that read it all."""

from __future__ import annotations

from event_parts import logged
from interlock.broker import facts
from interlock.broker.wire import Body, Event
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.rules.inflight import InFlight


def started(agent: str, epoch: int) -> facts.MigrationStarted:
    return facts.MigrationStarted(
        migration=f"{agent}-{epoch}", epoch=epoch, agent=agent, host="alpha", previous="v1", to="v2",
        strategy="staged", request="r",
    )  # fmt: skip


SAID: list[Body] = [
    facts.HostUp(host="alpha", control="tcp://127.0.0.1:1", pid=1, boot="b", agents=["echo", "page"]),
    started("echo", 2),
    started("page", 3),
    facts.AlertFiring(rule="hot", labels={"host": "alpha"}, value=1.0, action="hold", sample_time=3.5),
    facts.MigrationEnded(
        migration="page-3", agent="page", epoch=3, outcome="committed", decided_by="c", reason="observed"
    ),
    started("page", 6),
]


def read(engine: InFlight, events: list[Event]) -> InFlight:
    for item in events:
        engine.apply(item, item.header.logged)
    return engine


def test_joining_by_a_snapshot_gives_the_same_as_reading_everything() -> None:
    events = [logged(body, seq) for seq, body in enumerate(SAID, 1)]
    whole = read(InFlight(), events)
    for through in range(1, len(events) + 1):
        view = Fleet()
        for item in events[:through]:
            view.apply(item)
        late = read(InFlight(), [logged(view.snapshot(1), 100), *events[1:]])
        assert late.migrations == whole.migrations
        assert late.control == whole.control
        assert late.firing == whole.firing


def test_a_snapshot_of_what_was_seen_changes_nothing() -> None:
    events = [logged(body, seq) for seq, body in enumerate(SAID, 1)]
    engine = read(InFlight(), events)
    before = dict(engine.migrations)
    read(engine, [logged(Fleet().snapshot(0), 7), logged(facts.FleetSnapshot(through=6, start=6, state=b"?"), 8)])
    assert engine.migrations == before
