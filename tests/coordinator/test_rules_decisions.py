"""What the rule engine says and does, as transcripts: events and batches in, messages out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

import event_parts
from interlock.broker.commands import Breach, RollBack
from interlock.broker.facts import (
    AlertFiring,
    AlertResolved,
    HostUp,
    MigrationEnded,
    MigrationHeld,
    MigrationStarted,
    RolledBack,
)
from interlock.broker.samples import LATE_S, Announcement, Batch, labels
from interlock.broker.wire import Body, Event
from interlock.coordinator.rules.alerts import RESTORE_GRACE_S
from interlock.coordinator.rules.decisions import RuleDecisions, Send
from interlock.coordinator.rules.engine import Engine
from interlock.coordinator.rules.inflight import InFlight
from interlock.coordinator.rules.intake import REMEMBERED_S, Intake
from interlock.coordinator.rules.rulefile import parse_rules

RULES = """
groups:
- name: g
  rules:
  - alert: gpu-memory
    expr: ratio > 0.95
    x_action: rollback
    annotations: {summary: "GPU {{ $labels.gpu }} is full"}
  - {alert: tried, expr: "trial > 0.95", x_action: rollback, x_dry_run: true}
  - {alert: ask, expr: "doubt > 0.95", x_action: hold}
  - {alert: slow, expr: "took > 1", for: 2s, x_action: rollback}
  - {alert: lost, expr: "absent_each(up[3s])", x_action: rollback}
"""
BREACH = Breach(by="operator", reason="no")
_count = iter(range(1, 1_000_000))


def event(body: Body, logged: float) -> Event:
    return event_parts.logged(body, next(_count), logged)


def started(agent: str = "chat", host: str = "alpha", epoch: int = 7, to: str = "v2") -> MigrationStarted:
    return MigrationStarted(
        migration=f"m-{agent}", epoch=epoch, agent=agent, host=host, previous="v1", to=to, strategy="rapid", request="r"
    )


def ended(agent: str = "chat", epoch: int = 7) -> MigrationEnded:
    return MigrationEnded(
        migration=f"m-{agent}", agent=agent, epoch=epoch, outcome="committed", decided_by="test", reason=""
    )


def rolled_back(epoch: int = 7) -> RolledBack:
    times: dict[str, Any] = {"received": 1.0, "routed": 1.0, "restored": 1.0}
    return RolledBack(
        host="alpha", agent="chat", migration="m-chat", epoch=epoch, revision="v1", level=1, breach=BREACH,
        verified=True, **times,
    )  # fmt: skip


class Play:
    """Decisions that went live at second 0, and what they send as short lines."""

    def __init__(self, *logged: tuple[float, Body], controls: dict[str, str] | None = None) -> None:
        self.decisions = RuleDecisions(parse_rules(RULES, file="f.yml"), controls or {"alpha": "tcp://alpha:1"})
        for at, body in logged:
            assert self.decisions.follow(event(body, at), 0.0) == []
        self.first = self._told(self.decisions.go_live(0.0))

    def log(self, now: float, body: Body) -> list[str]:
        return self._told(self.decisions.follow(event(body, now), now))

    def sample(self, now: float, metric: str, value: float, **rest: str) -> list[str]:
        batch = [(labels(metric, **rest), value)]
        return self._told(self.decisions.ingest(batch, [], now, now, publisher="p"))

    def tick(self, now: float) -> list[str]:
        return self._told(self.decisions.tick(now))

    def _told(self, sends: list[Send]) -> list[str]:
        self.sends = sends
        lines = []
        for send in sends:
            match send.body:
                case RollBack(agent=agent, epoch=epoch):
                    lines.append(f"roll back {agent} {epoch} via {send.direct or 'the log'}")
                case AlertFiring(rule=rule, migrations=migrations):
                    lines.append(f"firing {rule} {migrations}")
                case AlertResolved(rule=rule):
                    lines.append(f"resolved {rule}")
        return lines


def test_a_breach_rolls_back_the_migration_it_matches_and_says_so_afterwards() -> None:
    play = Play()
    assert play.log(1, started()) == []
    assert play.sample(2, "ratio", 0.97, host="alpha", gpu="0") == [
        "roll back chat 7 via tcp://alpha:1",
        "firing gpu-memory ['m-chat']",
    ]
    rollback, alert = play.sends
    assert isinstance(rollback.body, RollBack)
    assert (rollback.topic, rollback.id) == ("rollback/alpha/", "m-chat/7/rules")
    assert rollback.body.breach == Breach(
        by="rule gpu-memory", reason="GPU 0 is full", labels={"host": "alpha", "gpu": "0"}, value=0.97, sample_time=2.0
    )
    assert rollback.body.issued == 2
    assert alert.topic == "fact/alert/gpu-memory/"
    assert play.sample(3, "ratio", 0.5, host="alpha", gpu="0") == ["resolved gpu-memory"]


def test_a_rule_that_keeps_firing_rolls_one_migration_back_once() -> None:
    play = Play()
    play.log(1, started())
    play.sample(2, "ratio", 0.97, host="alpha", gpu="0")
    play.sample(3, "ratio", 0.5, host="alpha", gpu="0")
    assert play.sample(4, "ratio", 0.97, host="alpha", gpu="0") == ["firing gpu-memory ['m-chat']"]
    assert play.sample(5, "ratio", 0.97, host="alpha", gpu="1") == ["firing gpu-memory ['m-chat']"]


def test_labels_that_both_have_must_be_equal_and_without_host_and_agent_nothing_matches() -> None:
    play = Play()
    play.log(1, started())
    for other in (
        {"host": "beta"},
        {"host": "alpha", "agent": "voice"},
        {"host": "alpha", "revision": "v1"},
        {"host": "alpha", "role": "permanent"},
        {"role": "candidate"},
        {},
    ):
        assert play.sample(2, "ratio", 0.97, **other) == ["firing gpu-memory []"]
    assert play.sample(3, "ratio", 0.97, agent="chat", role="candidate", revision="v2")[0].startswith("roll back chat")


def test_an_alert_that_fired_before_the_migration_began_does_not_roll_it_back() -> None:
    play = Play()
    play.sample(1, "ratio", 0.97, host="alpha", gpu="0")
    assert play.log(2, started()) == []
    assert play.sample(3, "ratio", 0.99, host="alpha", gpu="0") == []
    play.sample(4, "ratio", 0.5, host="alpha", gpu="0")
    assert "roll back chat 7 via tcp://alpha:1" in play.sample(5, "ratio", 0.97, host="alpha", gpu="0")


def test_a_breach_that_began_before_the_migration_and_fires_in_it_does_not_roll_it_back() -> None:
    play = Play()
    play.sample(1, "took", 5.0, host="alpha")
    play.log(2, started())
    assert play.tick(3.5) == ["firing slow ['m-chat']"]


def test_a_migration_that_appears_late_is_held_against_what_fires_since_it_began() -> None:
    play = Play()
    play.log(0.5, HostUp(host="x", control="tcp://x:1", pid=1, boot="b"))  # the log's clock is known
    play.sample(2, "ratio", 0.97, host="alpha", gpu="0")
    late = event(started(), 1.0)
    sends = play.decisions.follow(late, 3.0)
    assert [send.id for send in sends] == ["m-chat/7/rules"]


def test_a_dry_run_and_a_hold_only_say_what_they_see() -> None:
    play = Play()
    play.log(1, started())
    assert play.sample(2, "trial", 1.0, host="alpha") == ["firing tried ['m-chat']"]
    assert isinstance(play.sends[0].body, AlertFiring)
    assert play.sends[0].body.dry_run
    assert play.sample(2, "doubt", 1.0, host="alpha") == ["firing ask ['m-chat']"]
    assert isinstance(play.sends[0].body, AlertFiring)
    assert play.sends[0].body.action == "hold"


def test_a_migration_that_is_over_is_not_rolled_back_and_a_held_one_is() -> None:
    for over in (ended(), rolled_back()):
        play = Play()
        play.log(1, started())
        play.log(2, over)
        assert play.sample(3, "ratio", 0.97, host="alpha", gpu="0") == ["firing gpu-memory []"]
    play = Play()
    play.log(1, started())
    play.log(2, MigrationHeld(migration="m-chat", agent="chat", breach=BREACH))
    assert play.sample(3, "ratio", 0.97, host="alpha", gpu="0")[0].startswith("roll back")


def silence(*silent: str) -> tuple[list[str], list[Send]]:
    """Six hosts report for 12 s, then those that are named no more; what is said in the 6 s after that."""
    play, lines, sends = Play(), [], []
    play.log(1, started(host="h5"))
    for second in range(2, 20):
        for number in range(6):
            if second < 12 or f"h{number}" not in silent:
                found = [(labels("up", host=f"h{number}"), 1.0)]
                play.decisions.ingest(found, [], second, second, publisher=f"h{number}/monitor")
        lines += play.tick(second)
        sends += play.sends
    return lines, sends


def test_a_host_that_falls_silent_alone_rolls_back_and_many_together_hold() -> None:
    lines, _ = silence("h5")
    assert lines == ["roll back chat 7 via the log", "firing lost ['m-chat']"]
    lines, sends = silence("h1", "h2", "h3", "h4", "h5")
    assert not [line for line in lines if line.startswith("roll back")]
    blamed = [send.body.blamed for send in sends if isinstance(send.body, AlertFiring) and send.body.migrations]
    assert [{name: blame.who for name, blame in each.items()} for each in blamed] == [{"m-chat": "host"}]
    assert "5 of 6 publishers fell silent together" in blamed[0]["m-chat"].why


def test_the_next_migration_of_the_agent_is_rolled_back_again() -> None:
    play = Play()
    play.log(1, started())
    play.sample(2, "ratio", 0.97, host="alpha", gpu="0")
    play.log(3, rolled_back())
    play.sample(4, "ratio", 0.5, host="alpha", gpu="0")
    play.log(5, started(epoch=9))
    assert play.sample(6, "ratio", 0.97, host="alpha", gpu="0")[0] == "roll back chat 9 via tcp://alpha:1"


def test_every_migration_of_the_host_that_matches_goes_back_before_anything_is_explained() -> None:
    play = Play()
    play.log(1, started())
    play.log(1, started(agent="voice", epoch=8))
    assert play.sample(2, "ratio", 0.97, host="alpha", gpu="0") == [
        "roll back chat 7 via tcp://alpha:1",
        "roll back voice 8 via tcp://alpha:1",
        "firing gpu-memory ['m-chat', 'm-voice']",
    ]


def test_the_endpoint_is_the_one_the_host_told_last_and_one_without_a_port_is_none() -> None:
    play = Play(controls={"alpha": "tcp://127.0.0.1:*"})
    play.log(1, started())
    assert play.sample(2, "ratio", 0.97, host="alpha", gpu="0")[0] == "roll back chat 7 via the log"
    play = Play()
    play.log(1, HostUp(host="alpha", control="tcp://alpha:99", pid=1, boot="b"))
    play.log(1, started())
    assert play.sample(2, "ratio", 0.97, host="alpha", gpu="0")[0] == "roll back chat 7 via tcp://alpha:99"


def firing(rule: str = "gpu-memory") -> AlertFiring:
    found = {"host": "alpha", "gpu": "0"}
    return AlertFiring(rule=rule, labels=found, value=0.97, action="rollback", sample_time=-50.0)


def test_after_a_restart_migrations_and_alerts_go_on_as_the_log_says() -> None:
    play = Play((-50, firing()), (-40, started()))
    assert play.first == []
    assert play.sample(1, "ratio", 0.97, host="alpha", gpu="0") == []  # it fired before the migration began
    play = Play((-50, started()), (-40, firing()))
    assert play.sample(1, "ratio", 0.97, host="alpha", gpu="0") == []  # rolled back in the life before
    assert play.sample(2, "ratio", 0.97, host="alpha", gpu="1") == [
        "roll back chat 7 via tcp://alpha:1",
        "firing gpu-memory ['m-chat']",
    ]


def test_after_a_restart_an_alert_that_is_over_resolves_and_so_does_one_of_a_rule_that_is_gone() -> None:
    play = Play((-50, firing()), (-50, firing("gone")), (-45, firing("tried")), (-44, resolved("tried")))
    assert play.first == ["resolved gone"]
    play.sample(1, "other", 1.0)
    assert play.tick(RESTORE_GRACE_S) == ["resolved gpu-memory"]


def resolved(rule: str) -> AlertResolved:
    return AlertResolved(rule=rule, labels={"host": "alpha", "gpu": "0"})


def test_an_older_epoch_changes_nothing() -> None:
    fold = InFlight()
    assert fold.apply(event(started(epoch=9), 1), 1) is not None
    assert fold.apply(event(started(epoch=8), 2), 2) is None
    fold.apply(event(ended(epoch=8), 3), 3)
    assert fold.migrations["chat"].epoch == 9


def batch(seq: int, *, epoch: int = 1, time: float = 100.0, announce: bool = True) -> Batch:
    series = [Announcement(1, {"__name__": "a"})] if announce else []
    return Batch(source="p", epoch=epoch, seq=seq, time=time, series=series, ids=[1], values=[1.0])


def test_a_batch_counts_once_and_in_order_and_holes_are_counted() -> None:
    intake = Intake()
    assert intake.read(batch(1), 100) == ([(labels("a"), 1.0)], [])
    assert intake.read(batch(1), 100) == ([], [])
    assert intake.read(batch(4), 100)[0]
    assert intake.read(batch(3), 100) == ([], [])
    assert (intake.repeated, intake.lost) == (2, 2)


def test_a_publisher_that_restarted_begins_anew() -> None:
    intake = Intake()
    intake.read(batch(5), 100)
    assert intake.read(batch(1, epoch=2, announce=False), 100) == ([], [labels("a")])
    assert intake.unresolved == 1
    assert intake.read(batch(6), 100) == ([], [])


def test_what_the_broker_remembers_of_a_dead_publisher_is_no_fresh_sample() -> None:
    intake = Intake()
    assert intake.read(batch(1, time=100.0), 101 + REMEMBERED_S) == ([], [])
    assert intake.read(batch(2, time=100.1), 101 + REMEMBERED_S)[0]


def test_what_waited_on_its_way_is_no_fresh_sample_but_announces_and_ends_series() -> None:
    intake = Intake()
    assert intake.read(msgspec.structs.replace(batch(1), delay=LATE_S + 0.1), 100) == ([], [])
    assert intake.late == 1
    fresh = msgspec.structs.replace(batch(2, announce=False), delay=LATE_S - 0.1, stale=[1])
    assert intake.read(fresh, 100) == ([(labels("a"), 1.0)], [labels("a")])
    assert intake.unresolved == 0


def test_a_remembered_state_of_several_batches_is_taken_once_and_nothing_before_it_was_lost() -> None:
    intake = Intake()
    for at in (99.0, 99.5):
        remembered = msgspec.structs.replace(batch(7, time=at), cached=True)
        assert intake.read(remembered, 100) == ([(labels("a"), 1.0)], [])
    assert intake.read(batch(7), 100) == ([], [])
    assert intake.read(batch(8), 100)[0]
    assert (intake.repeated, intake.lost) == (1, 0)


def test_a_series_with_labels_without_end_is_left_out_and_counted() -> None:
    intake = Intake()
    long = Announcement(2, {"__name__": "a", "x": "y" * 5000})
    many = Announcement(3, {f"l{number}": "1" for number in range(100)})
    odd = Batch(source="p", epoch=1, seq=1, time=100.0, series=[long, many], ids=[2, 3], values=[1.0, 1.0])
    assert intake.read(odd, 100) == ([], [])
    assert (intake.oversized, intake.unresolved) == (2, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": [1.0, 2.0]},  # more than ids
        {"values": []},
        {"ids": [1, 1], "values": [1.0, 2.0]},  # a series twice
        {"ids": [7], "values": [9.0]},  # an id that was never announced
        {"ids": [-1, 2**63 - 1], "values": [9.0, 9.0]},
        {"time": 1e300},
        {"time": float("nan")},
        {"time": -1e18},
        {"series": [Announcement(1, {}), Announcement(1, {"__name__": ""})]},
        {"series": [Announcement(1, {"__name__": "ratio", "host": "beta"})]},  # another host's
    ],
)
def test_a_batch_that_is_wrong_harms_no_other_publisher_and_is_counted(wrong: dict[str, Any]) -> None:
    engine = Engine(parse_rules(RULES, file="f.yml"))
    intake = Intake()

    def took(batch: Batch, now: float) -> list[str]:
        found = intake.columns(batch, now, admit=engine.admit, version=engine.store.version, end=engine.end)
        columns = [] if found is None else [(*found, batch.time, batch.source)]
        made = engine.apply(columns, now) + engine.tick(now)
        return [each.state for each in made if each.labels.get("host") == "alpha"]

    bad = Batch(
        source="alpha/x", epoch=1, seq=1, time=100.0, series=[Announcement(1, {"__name__": "a"})], ids=[1], values=[1.0]
    )
    good = Batch(
        source="alpha/monitor", epoch=1, seq=1, time=100.0, ids=[1], values=[0.5],
        series=[Announcement(1, {"__name__": "ratio", "host": "alpha", "gpu": "0"})],
    )  # fmt: skip
    assert took(good, 100) == []
    for seq in (1, 2, 3):
        assert took(msgspec.structs.replace(bad, **{"seq": seq} | wrong), 100 + seq) == []
    fires = msgspec.structs.replace(good, seq=2, time=104.0, values=[0.97])
    assert took(fires, 104) == ["firing"]
    counted = intake.malformed + intake.unresolved + intake.strange + engine.refused
    assert counted or "time" in wrong or wrong.get("series", [None])[0] == Announcement(1, {})
    assert len(engine.store.numbers) <= 3


def test_other_rules_decide_no_rollback_twice_and_a_rule_that_goes_ends_its_alert() -> None:
    decisions = RuleDecisions(parse_rules(RULES, file="f"), {})
    decisions.go_live(0.0)
    decisions.follow(event(HostUp(host="alpha", control="tcp://x:1", pid=1, boot="b"), 0.0), 0.0)
    decisions.follow(event(started(), 1.0), 1.0)
    bad = [(labels("ratio", host="alpha"), 0.99)]
    first = decisions.ingest(bad, [], 2.0, 2.0, publisher="alpha/monitor")
    assert [type(send.body) for send in first] == [RollBack, AlertFiring]
    other = RULES.replace("ratio > 0.95", "ratio > 0.9")  # not the same: its alert ends, and one of its own begins
    sends = decisions.reload(parse_rules(other, file="f"), 3.0)
    assert [type(send.body) for send in sends] == [AlertResolved, AlertFiring]
    texts = RULES.replace("is full", "is quite full")  # only the text: the alert goes on
    assert decisions.reload(parse_rules(texts.replace("0.95", "0.9", 1), file="f"), 4.0) == []
    (gone,) = decisions.reload([], 5.0)
    assert isinstance(gone.body, AlertResolved)


def test_without_its_x_resolve_expr_an_alert_that_is_held_ends() -> None:
    rule = "groups: [{name: g, rules: [{alert: a, expr: x > 5%s}]}]"
    decisions = RuleDecisions(parse_rules(rule % ", x_resolve_expr: x < 2", file="f"), {})
    decisions.go_live(0.0)
    series = labels("x", host="alpha")
    decisions.ingest([(series, 9.0)], [], 1.0, 1.0, publisher="p")
    assert decisions.ingest([(series, 3.0)], [], 2.0, 2.0, publisher="p") == []
    made = decisions.reload(parse_rules(rule % "", file="f"), 3.0)
    made += decisions.tick(3.1)
    assert [type(send.body) for send in made] == [AlertResolved]
