"""What the rule engine remembers has bounds, however many migrations and publishers there were."""

from __future__ import annotations

import pytest

import event_parts
from interlock.broker.commands import RollBack
from interlock.broker.facts import MigrationEnded, MigrationStarted
from interlock.broker.samples import SeriesReader, SeriesTable, labels
from interlock.coordinator.rules import engine
from interlock.coordinator.rules.decisions import RuleDecisions
from interlock.coordinator.rules.engine import Engine
from interlock.coordinator.rules.rulefile import parse_rules

RULE = """
groups:
- name: g
  rules:
  - {alert: late, expr: 'took > 5', x_action: rollback}
"""
MIGRATIONS = 300


def test_after_hundreds_of_migrations_that_it_rolled_back_it_remembers_those_in_flight() -> None:
    """Each has series of its own, which end with it, and one rollback."""
    decisions = RuleDecisions(parse_rules(RULE, file="f.yml"), {"alpha": "tcp://alpha:1"})
    decisions.go_live(0.0)
    table, reader, number, undone = SeriesTable("alpha/host", 1), SeriesReader(), 0, 0
    before = [labels("took", host="alpha", agent="a", revision="r0", role="candidate")]
    for epoch in range(1, MIGRATIONS + 1):
        now = float(10 * epoch)
        begun = MigrationStarted(
            migration=f"a-{epoch}", epoch=epoch, agent="a", host="alpha", previous="r0", to=f"r{epoch}",
            strategy="rapid", request="r",
        )  # fmt: skip
        ended = MigrationEnded(
            migration=f"a-{epoch}", agent="a", epoch=epoch, outcome="rolled-back", decided_by="rule late", reason=""
        )
        decisions.follow(event_parts.logged(begun, number + 1, now), now)
        key = labels("took", host="alpha", agent="a", revision=f"r{epoch}", role="candidate")
        samples, gone = reader.read(table.batch({key: 9.0}, time=now + 1, ended=before))
        sends = decisions.ingest(samples, gone, now + 1, now + 1, publisher="alpha/host")
        undone += sum(isinstance(send.body, RollBack) for send in sends)
        decisions.follow(event_parts.logged(ended, number + 2, now + 2), now + 2)
        number, before = number + 2, [key]
    assert undone == MIGRATIONS
    assert len(decisions._undone) <= 1
    assert decisions.in_flight.migrations == {}
    store = decisions.engine.store
    assert len(store.numbers) <= 2
    assert sum(labels is not None for labels in store.labels) <= 3
    assert len(decisions.firing()) <= 1
    assert sum(len(known) for known in reader._labels.values()) <= 2


def test_the_clocks_of_publishers_that_were_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_SOURCES", 50)
    rules = Engine(parse_rules(RULE, file="f.yml"))
    for number in range(200):
        rules.ingest([], [], 1.0, 2.0, publisher=f"alpha/{number}")
        rules.ingest([], [], 1.0, 2.0, publisher="alpha/host")
    assert len(rules._skews) == 50
    assert "alpha/host" in rules._skews


def test_labels_that_are_announced_again_are_the_same_object() -> None:
    """A reader hears all of them each second: new ones in their place would scatter its memory in some minutes."""
    table, reader, key = SeriesTable("alpha/host", 1), SeriesReader(), labels("took", host="alpha")
    found = []
    for second in range(3):
        batch = table.batch({key: 1.0}, time=float(second))
        assert batch.whole
        found += reader.read(batch)[0]
    first = found[0][0]
    assert all(again is first for again, _ in found)
