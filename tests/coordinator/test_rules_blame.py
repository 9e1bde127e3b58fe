"""Whose fault a breach is: what is held instead of rolled back, and when it is rolled back after all."""

from __future__ import annotations

import re
from typing import Any

import pytest

import event_parts
from interlock.broker import facts, topics
from interlock.broker.commands import RollBack
from interlock.broker.facts import AlertFiring, Blame, MigrationStarted
from interlock.broker.samples import labels
from interlock.broker.wire import Body, Event
from interlock.coordinator.rules.alerts import RESTORE_GRACE_S
from interlock.coordinator.rules.blame import twin
from interlock.coordinator.rules.decisions import EXCUSED_S, RuleDecisions, Send
from interlock.coordinator.rules.rulefile import default_rules, parse_rules

RULES = """
groups:
- name: g
  rules:
  - {alert: late, expr: 'took{role="candidate"} > 5', x_action: rollback}
  - {alert: kept, expr: 'kept > 50', x_action: rollback}
  - {alert: all, expr: 'sum by (host, agent) (kept) > 500', x_action: rollback}
  - {alert: full, expr: 'ratio > 0.95', x_action: rollback}
  - {alert: warm, expr: 'celsius > 90', for: 2s, x_action: rollback}
  - {alert: tried, expr: 'trial{role="candidate"} > 5', x_action: rollback, x_dry_run: true}
"""
CANDIDATE = {"host": "alpha", "agent": "chat", "role": "candidate", "revision": "v2"}
PERMANENT = {"host": "alpha", "agent": "chat", "role": "permanent", "revision": "v1"}
_count = iter(range(1, 1_000_000))


def event(body: Body, logged: float) -> Event:
    return event_parts.logged(body, next(_count), logged)


def started(epoch: int = 7) -> MigrationStarted:
    return MigrationStarted(
        migration="m", epoch=epoch, agent="chat", host="alpha", previous="v1", to="v2", strategy="rapid", request="r"
    )


class Play:
    """Decisions that went live at second 0, a migration that began at second 1, and what is sent as short lines."""

    def __init__(self, *logged: tuple[float, Body]) -> None:
        self.decisions = RuleDecisions(parse_rules(RULES, file="f.yml"), {})
        for at, body in logged:
            self.decisions.follow(event(body, at), 0.0)
        self.told(self.decisions.go_live(0.0))

    def begin(self, now: float = 1.0) -> Play:
        self.told(self.decisions.follow(event(started(), now), now))
        return self

    def sample(self, now: float, metric: str, value: float, found: dict[str, str]) -> list[str]:
        return self.batch(now, [(metric, value, found)])

    def batch(self, now: float, samples: list[tuple[str, float, dict[str, str]]]) -> list[str]:
        read = [(labels(metric, **found), value) for metric, value, found in samples]
        return self.told(self.decisions.ingest(read, [], now, now, publisher="p"))

    def tick(self, now: float) -> list[str]:
        return self.told(self.decisions.tick(now))

    def told(self, sends: list[Send]) -> list[str]:
        self.sends = sends
        lines = []
        for send in sends:
            body: Any = send.body
            blamed = "".join(f", blames {blame.who}: {blame.why}" for blame in getattr(body, "blamed", {}).values())
            lines.append(f"roll back by {body.breach.by}" if isinstance(body, RollBack) else f"{body.rule}{blamed}")
        return lines


def test_a_breach_of_the_candidate_alone_is_its_own() -> None:
    play = Play().begin()
    play.sample(2, "took", 0.1, PERMANENT)
    assert play.sample(3, "took", 9.0, CANDIDATE) == ["roll back by rule late", "late"]


def test_when_the_permanent_revision_breaches_the_same_rule_it_is_held_and_not_rolled_back() -> None:
    play = Play().begin()
    play.sample(2, "took", 8.0, PERMANENT)
    assert play.sample(3, "took", 9.0, CANDIDATE) == [
        "late, blames permanent: the permanent revision breaches the same rule"
    ]
    assert play.tick(30) == []


def test_both_in_one_batch_are_evidence_for_each_other_whatever_their_order() -> None:
    for order in ((CANDIDATE, PERMANENT), (PERMANENT, CANDIDATE)):
        play = Play().begin()
        (said,) = play.batch(2, [("took", 9.0, found) for found in order])
        assert said.startswith("late, blames permanent")


def test_what_breaches_for_too_short_is_no_alert_and_evidence_all_the_same_and_nobody_hears_of_a_twin() -> None:
    play = Play().begin()
    assert play.sample(2, "took", 8.0, PERMANENT) == []
    assert play.sample(3, "took", 1.0, PERMANENT) == []
    assert play.decisions.firing() == []


def test_a_rule_about_both_revisions_needs_no_twin() -> None:
    play = Play().begin()
    assert play.sample(2, "kept", 60, PERMANENT) == ["kept"]
    assert play.sample(3, "kept", 70, CANDIDATE) == [
        "kept, blames permanent: the permanent revision breaches the same rule"
    ]


def test_a_sum_over_both_revisions_does_not_excuse_itself() -> None:
    play = Play().begin()
    assert "roll back by rule all" in play.sample(2, "kept", 600, {**CANDIDATE, "role": "x"})


def test_several_agents_of_the_host_that_breach_the_rule_are_the_hosts_fault_and_one_is_its_own_affair() -> None:
    play = Play().begin()
    for agent in ("voice", "search"):
        play.sample(2, "took", 9.0, {**PERMANENT, "agent": agent})
    assert play.sample(3, "took", 9.0, CANDIDATE) == ["late, blames host: search, voice on alpha breach the same rule"]
    for elsewhere in ({"agent": "voice"}, {"agent": "search", "host": "beta"}):
        play = Play().begin()
        play.sample(2, "took", 9.0, {**PERMANENT, "agent": "voice"})
        play.sample(2, "took", 9.0, {**PERMANENT, **elsewhere})
        assert play.sample(3, "took", 9.0, CANDIDATE)[0] == "roll back by rule late"


def test_a_breach_of_the_host_is_the_candidates_unless_it_began_before() -> None:
    host = {"host": "alpha", "gpu": "0"}
    play = Play().begin()
    play.sample(2, "took", 9.0, PERMANENT)
    assert play.sample(3, "ratio", 0.97, host) == ["roll back by rule full", "full"]
    play = Play()
    play.sample(0.5, "celsius", 95, host)
    play.begin()
    assert play.tick(2.6) == ["warm, blames host: it began 0.5 s before the migration"]
    assert play.tick(60) == []
    assert play.sample(61, "celsius", 50, host) == ["warm"]  # it is over
    assert play.sample(62, "celsius", 95, host) == []
    assert play.tick(64.1) == ["roll back by rule warm", "warm"]  # and this one began in the migration


def test_a_breach_of_an_agent_that_began_before_is_the_permanent_revisions() -> None:
    play = Play()
    play.sample(0.5, "celsius", 95, {"host": "alpha", "agent": "chat"})
    play.begin()
    assert play.tick(2.6) == ["warm, blames permanent: it began 0.5 s before the migration"]


def test_what_is_left_of_an_earlier_candidate_neither_rolls_back_nor_holds() -> None:
    play = Play()
    play.sample(0.5, "celsius", 95, CANDIDATE)
    play.begin()
    assert play.tick(2.6) == ["warm"]
    assert play.tick(60) == []


def test_when_the_evidence_is_gone_and_the_breach_is_not_it_is_rolled_back_after_all() -> None:
    play = Play().begin()
    play.batch(2, [("took", 9.0, CANDIDATE), ("took", 9.0, PERMANENT)])
    assert play.sample(10, "took", 0.1, PERMANENT) == []
    assert play.decisions.next_deadline() <= 10 + EXCUSED_S
    assert play.tick(10 + EXCUSED_S - 0.1) == []
    assert play.sample(11.95, "took", 9.0, PERMANENT) == []  # it was a gap: the time counts anew
    assert play.sample(12.5, "took", 0.1, PERMANENT) == []
    assert play.tick(14.4) == []
    assert play.tick(14.6) == ["roll back by rule late"]
    assert play.tick(30) == []


def test_a_candidate_that_recovers_is_excused_for_good() -> None:
    play = Play().begin()
    play.batch(2, [("took", 9.0, CANDIDATE), ("took", 9.0, PERMANENT)])
    assert play.sample(3, "took", 0.1, CANDIDATE) == ["late"]
    assert play.sample(4, "took", 0.1, PERMANENT) == []
    assert play.tick(60) == []
    assert play.decisions.next_deadline() > 60


def test_another_rule_that_nothing_excuses_rolls_it_back_at_once() -> None:
    play = Play().begin()
    play.batch(2, [("took", 9.0, CANDIDATE), ("took", 9.0, PERMANENT)])
    assert play.sample(3, "kept", 70, CANDIDATE)[0] == "roll back by rule kept"


def test_a_dry_run_blames_nobody() -> None:
    play = Play().begin()
    assert play.batch(2, [("trial", 9.0, CANDIDATE), ("trial", 9.0, PERMANENT)]) == ["tried"]


def test_an_engine_that_restarts_watches_what_was_excused_and_gives_the_evidence_time_to_come() -> None:
    alert = AlertFiring(
        rule="late", labels=CANDIDATE, value=9.0, action="rollback", sample_time=-40.0, migrations=["m"],
        blamed={"m": Blame(who="permanent", why="so")},
    )  # fmt: skip
    play = Play((-50, started()), (-40, alert))
    assert play.sample(1, "took", 9.0, CANDIDATE) == []
    assert play.tick(5) == []
    play.sample(9, "took", 9.0, PERMANENT)
    assert play.tick(RESTORE_GRACE_S + EXCUSED_S + 1) == []
    play.sample(20, "took", 0.1, PERMANENT)
    assert play.tick(20 + EXCUSED_S + 0.1) == ["roll back by rule late"]


def test_each_default_rule_about_candidates_that_rolls_back_has_a_twin() -> None:
    rules = default_rules()
    twins = {rule.name: made for rule in rules if (made := twin(rule)) is not None}
    assert set(twins) == {
        rule.name for rule in rules if rule.action == "rollback" and 'role="candidate"' in re.sub(r"\s", "", rule.text)
    }
    assert "health" in twins
    for made in twins.values():
        assert (made.action, made.no_data) == ("notify", "resolve")
        assert "candidate" not in repr(made.expression)


# --- the coordinator


@pytest.mark.parametrize("who", ["host", "permanent"])
def test_a_blamed_breach_holds_the_migration_and_says_whose_fault_it_is(story: Any, who: Any) -> None:
    play = story().to_canary()
    alert = AlertFiring(
        rule="late", labels=CANDIDATE, value=9.0, action="rollback", sample_time=1.0, summary="9 s",
        migrations=list(play.core.migrations), blamed={play.migration.id: Blame(who=who, why="so are others")},
    )  # fmt: skip
    play.say(topics.alert_fact("late"), alert)
    assert play.run() == [f"held by rule late, blames {who}"]
    held = play.events[-1].body
    assert isinstance(held, facts.MigrationHeld)
    assert held.breach.reason == "9 s; so are others"
    assert play.core.fleet.migrations[play.migration.id].blame == who
    assert play.core.fleet.alerts  # and a rollback that the rule engine sends later ends it
    play.steer("resume", "it was the disk")
    assert play.later(20.1) == ["stage observation", "cut over 100%"]


def test_an_alert_that_blames_another_migration_does_not_hold_this_one(story: Any) -> None:
    play = story().to_canary()
    alert = AlertFiring(
        rule="late", labels=CANDIDATE, value=9.0, action="rollback", sample_time=1.0,
        migrations=[*play.core.migrations, "other"], blamed={"other": Blame(who="host", why="so")},
    )  # fmt: skip
    play.say(topics.alert_fact("late"), alert)
    assert play.run() == []
