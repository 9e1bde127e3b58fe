"""Migrations and the coordinator's decisions as transcripts: events of the log in, emits out."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.broker import commands, facts, topics, wire
from interlock.broker.commands import Breach
from interlock.broker.config import FleetConfig, parse_fleet
from interlock.broker.errors import ConfigError
from interlock.coordinator import decisions
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.emit import Emit
from interlock.coordinator.migration import ROLLBACK_ANSWER_S
from interlock.coordinator.observation import Measurement
from interlock.coordinator.phases import Phase
from interlock.coordinator.steps import PlannedStep


def fleet_file(**agent: Any) -> FleetConfig:
    revision = {"entry": "tutor:Tutor"}
    return parse_fleet(
        {
            "hosts": {"alpha": {"control": "tcp://127.0.0.1:7181"}},
            "strategies": {
                "staged": {
                    "shadow_requests": 10,
                    "canary": [{"share": 0.1, "seconds": 2.0}],
                    "observation_s": 5.0,
                },
                "rapid": {"observation_s": 3.0},
            },
            "agents": {
                "tutor": {
                    "host": "alpha",
                    "endpoint": "tcp://127.0.0.1:7801",
                    "serve": "r1",
                    "revisions": {"r1": revision, "r2": revision},
                    **agent,
                }
            },
        }
    )


class Log:
    """A log in memory, and a coordinator that follows it: what the coordinator emits is logged at once, by id."""

    def __init__(self) -> None:
        self.events: list[wire.Event] = []
        self.ids: set[str] = set()
        self.now = 1000.0
        self.config = fleet_file()
        self.direct: list[Emit] = []
        self.verdict: facts.Verdict = "passed"
        self.restart()

    def restart(self) -> None:
        """The coordinator is killed, and another one reads the log."""
        self.core = Coordinator(lambda: self.config, self.config)
        for event in self.events:
            self.core.apply(event)

    def say(self, topic: str, body: wire.Body, id: str = "") -> None:
        id = id or f"e{len(self.events)}"
        if id in self.ids:
            return
        self.ids.add(id)
        raw = wire.encode(body)
        header = wire.Header(id=id, source="test", time=self.now, seq=len(self.events) + 1, logged=self.now)
        event = wire.Event(topic, header, wire.decode_body(raw), raw)
        self.events.append(event)
        self.core.apply(event)

    def run(self) -> list[wire.Body]:
        """Let the coordinator decide until it has nothing more to say; what it logged."""
        before = len(self.events)
        while True:
            emits = self.core.decide(self.now) + self.measure()
            self.direct += [emit for emit in emits if emit.direct or emit.also_direct]
            logged = [emit for emit in emits if not emit.direct]
            if not logged:
                bodies = [event.body for event in self.events[before:]]
                return [body for body in bodies if not isinstance(body, facts.ChecksMeasured)]
            for emit in logged:
                self.say(emit.topic, emit.body, emit.id)

    def measure(self) -> list[Emit]:
        """What the observers do: each candidate with live requests is found to be as `verdict` says."""
        emits = []
        for migration in self.core.migrations.values():
            watched = migration.watched(self.now)
            if watched is not None and self.verdict is not None:
                checks = [facts.Check(check="latency", verdict=self.verdict, value=1.2, limit=1.05, reason="slower")]
                why = "as measured" if self.verdict == "passed" else "latency: slower"
                found = Measurement(self.verdict, why, checks, min(watched.share, 1.0))
                emits += migration.observe(found, self.now)
        return [emit for emit in emits if emit.id not in self.ids]

    def up(self) -> Log:
        self.say(topics.host_fact("alpha"), facts.HostUp(host="alpha", control="c", pid=1, boot="b", agents=["tutor"]))
        self.say(topics.host_fact("alpha"), slot("serving"))
        return self

    def ask(self, to: str = "r2", strategy: str | None = "staged", agent: str = "tutor") -> list[wire.Body]:
        self.say(topics.COORDINATOR, commands.Migrate(agent=agent, to=to, deadline=self.now + 10, strategy=strategy))
        return self.run()

    def host_done(self, **evidence: Any) -> list[wire.Body]:
        """The host does what it was last asked."""
        event = next(e for e in reversed(self.events) if e.topic == "command/alpha/")
        body = event.body
        step = {
            commands.Prepare: "prepare",
            commands.Drill: "drill",
            commands.StartCandidate: "start-candidate",
            commands.HandOver: "hand-over",
            commands.Shadow: "shadow",
            commands.CutOver: "cut-over",
            commands.Commit: "commit",
        }[type(body)]
        done = facts.StepDone(
            host="alpha", agent="tutor", migration=body.migration, epoch=body.epoch, step=step,
            command=event.header.id, evidence=evidence,
        )  # fmt: skip
        self.say(topics.host_fact("alpha"), done)
        return self.run()

    def host_failed(self, check: str, **evidence: Any) -> list[wire.Body]:
        event = next(e for e in reversed(self.events) if e.topic == "command/alpha/")
        step = {commands.Prepare: "prepare", commands.Drill: "drill"}.get(type(event.body), "shadow")
        failed = facts.StepFailed(
            host="alpha", agent="tutor", migration=event.body.migration, epoch=event.body.epoch, step=step,
            command=event.header.id, check=check, reason="as found", evidence=evidence,
        )  # fmt: skip
        self.say(topics.host_fact("alpha"), failed)
        return self.run()

    def host_rolled_back(self, breach: Breach) -> list[wire.Body]:
        (migration,) = self.core.migrations.values()
        done = facts.RolledBack(
            host="alpha", agent="tutor", migration=migration.id, epoch=migration.started.epoch, revision="r1", level=1,
            breach=breach, received=self.now, routed=self.now, restored=self.now, verified=True,
        )  # fmt: skip
        self.say(topics.host_fact("alpha"), done)
        return self.run()

    def later(self, seconds: float) -> list[wire.Body]:
        self.now += seconds
        return self.run()

    def to_shadow(self) -> Log:
        self.ask()
        self.host_done()
        self.host_done()
        return self


def slot(state: str, **rest: Any) -> facts.SlotChanged:
    return facts.SlotChanged(**{"host": "alpha", "agent": "tutor", "state": state, "permanent": "r1", **rest})


def names(bodies: list[wire.Body]) -> list[str]:
    return [getattr(body, "stage", None) or type(body).__name__ for body in bodies]


def test_a_staged_migration_goes_through_its_stages_and_commits() -> None:
    log = Log().up()
    assert names(log.ask()) == ["MigrationStarted", "prepare", "Prepare"]
    assert names(log.host_done()) == ["infrastructure", "StartCandidate"]
    assert names(log.host_done()) == ["core-logic", "Shadow"]
    assert names(log.host_done(compared=10)) == ["integration", "CutOver"]
    assert names(log.host_done()) == []
    assert names(log.later(1.9)) == []
    assert names(log.later(0.2)) == ["observation", "CutOver"]
    assert names(log.host_done()) == []
    assert names(log.later(5.1)) == ["commit", "Commit"]
    (ended,) = log.host_done()
    assert isinstance(ended, facts.MigrationEnded)
    assert (ended.outcome, ended.decided_by) == ("committed", "observation")
    assert not log.core.migrations


def test_a_rapid_migration_cuts_over_at_once() -> None:
    log = Log().up()
    log.config = fleet_file(level="low")
    log.ask(strategy=None)
    log.host_done()
    assert names(log.host_done()) == ["observation", "CutOver"]


@pytest.mark.parametrize("steps", range(7))
def test_a_coordinator_killed_anywhere_goes_on_where_the_log_ends(steps: int) -> None:
    log = Log().up()
    log.ask()
    for number in range(6):
        if number == steps:
            log.restart()
            before = len(log.events)
            log.run()
            assert len(log.events) == before, "a new coordinator repeats nothing under a new id"
        log.host_done()
        log.later(5.1)
    log.restart()
    log.run()
    (ended,) = [e.body for e in log.events if isinstance(e.body, facts.MigrationEnded)]
    assert ended.outcome == "committed"


def test_a_failed_shadow_is_rolled_back_both_ways_and_says_what_decided() -> None:
    log = Log().up().to_shadow()
    (asked,) = log.host_failed("shadow", first_breach_time=999.5)
    assert isinstance(asked, commands.RollBack)
    assert (asked.breach.by, asked.breach.sample_time) == ("check shadow", 999.5)
    assert log.direct[-1].also_direct
    (ended,) = log.host_rolled_back(asked.breach)
    assert isinstance(ended, facts.MigrationEnded)
    assert (ended.outcome, ended.decided_by) == ("rolled-back", "check shadow")
    assert ended.evidence["rollback"]["breach_to_routed_ms"] == pytest.approx(500.0)


def test_a_revision_that_fails_its_checks_is_refused_and_nothing_is_rolled_back() -> None:
    log = Log().up()
    log.ask()
    (ended,) = log.host_failed("parse")
    assert isinstance(ended, facts.MigrationEnded)
    assert (ended.outcome, ended.decided_by, ended.reason) == ("refused", "check parse", "as found")


def test_a_host_that_refuses_the_first_step_ends_it_at_once_since_there_is_nothing_to_undo() -> None:
    log = Log().up()
    log.ask()
    asked = next(e for e in reversed(log.events) if e.topic == "command/alpha/")
    refused = facts.CommandRefused(
        host="alpha", agent="tutor", migration=asked.body.migration, command=asked.header.id, reason="not now"
    )
    log.say(topics.host_fact("alpha"), refused)
    (ended,) = log.run()
    assert isinstance(ended, facts.MigrationEnded)
    assert (ended.outcome, ended.decided_by, ended.reason) == ("refused", "host alpha", "not now")


def test_after_a_log_was_lost_no_migration_has_a_name_or_epoch_that_the_host_has_seen() -> None:
    log = Log()
    log.say(topics.host_fact("alpha"), facts.HostUp(host="alpha", control="c", pid=1, boot="b", agents=["tutor"]))
    log.say(topics.host_fact("alpha"), slot("serving", epoch=28))  # of the log before this one
    started = log.ask()[0]
    assert isinstance(started, facts.MigrationStarted)
    assert (started.migration, started.epoch) == ("tutor-29", 29)


def test_what_the_host_or_a_rule_decides_needs_no_coordinator() -> None:
    log = Log().up().to_shadow()
    (ended,) = log.host_rolled_back(Breach(by="host process-died", reason="SIGABRT"))
    assert isinstance(ended, facts.MigrationEnded)
    assert ended.decided_by == "host process-died"


def test_a_rule_engines_rollback_stops_the_migration_and_is_not_asked_for_again() -> None:
    log = Log().up().to_shadow()
    (migration,) = log.core.migrations.values()
    breach = Breach(by="rule gpu-memory", reason="97 %")
    body = commands.RollBack(migration=migration.id, agent="tutor", epoch=3, breach=breach, issued=log.now)
    log.say(topics.rollback("alpha"), body)
    assert log.run() == []
    assert log.host_done() == []
    assert migration.phase is Phase.ROLLING_BACK


def test_a_host_that_reports_no_rollback_makes_it_failed() -> None:
    log = Log().up().to_shadow()
    log.host_failed("shadow")
    (ended,) = log.later(ROLLBACK_ANSWER_S + 1)
    assert isinstance(ended, facts.MigrationEnded)
    assert ended.outcome == "failed"


def test_a_step_that_is_overdue_is_rolled_back() -> None:
    log = Log().up()
    log.ask()
    bodies = log.later(2.0 + 60.0 + 15.1)
    assert names(bodies) == ["RollBack"]
    assert bodies[0].breach.by == "coordinator step-overdue"  # type: ignore[union-attr]


def test_the_lease_is_renewed_as_long_as_the_candidate_is_on_trial() -> None:
    log = Log().up().to_shadow()
    log.direct.clear()
    for _ in range(10):
        log.later(1.0)
    renewals = [emit for emit in log.direct if isinstance(emit.body, commands.RenewLease)]
    assert len(renewals) == 5  # every 2 s of a 6 s lease
    log.host_rolled_back(Breach(by="x", reason=""))
    log.direct.clear()
    log.later(10.0)
    assert log.direct == []


def test_a_hold_rule_stops_it_until_an_operator_rolls_back() -> None:
    log = Log().up().to_shadow()
    (migration,) = log.core.migrations
    alert = facts.AlertFiring(
        rule="odd", labels={"agent": "tutor"}, value=1.0, action="hold", sample_time=log.now, summary="odd",
        migrations=[migration],
    )  # fmt: skip
    log.say(topics.alert_fact("odd"), alert)
    assert names(log.run()) == ["MigrationHeld"]
    assert log.host_done() == []
    log.say(topics.COORDINATOR, commands.RollBackAgent(agent="tutor", reason="no", deadline=log.now + 5))
    assert names(log.run()) == ["RollBack"]
    (ended,) = log.host_rolled_back(Breach(by="operator", reason="no"))
    assert ended.decided_by == "operator"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("to", "agent", "strategy", "reason"),
    [
        ("r2", "tutro", None, "did you mean 'tutor'"),
        ("r9", "tutor", None, "has no revision 'r9'"),
        ("r1", "tutor", None, "serves revision r1 already"),
        ("r2", "tutor", "brave", "known: custom, framework, rapid, staged"),
    ],
)
def test_a_request_that_can_not_be_is_refused_with_the_reason(
    to: str, agent: str, strategy: str | None, reason: str
) -> None:
    log = Log().up()
    (refused,) = log.ask(to, strategy, agent)
    assert isinstance(refused, facts.MigrationRefused)
    assert reason in refused.reason


def test_a_second_migration_of_the_same_agent_is_refused_also_when_both_ask_at_once() -> None:
    log = Log().up()
    for id in ("a", "b"):
        log.say(topics.COORDINATOR, commands.Migrate(agent="tutor", to="r2", deadline=log.now + 9), id)
    bodies = log.run()
    assert sorted(names(bodies)) == ["MigrationRefused", "MigrationStarted", "Prepare", "prepare"]
    (again,) = log.ask()
    assert "is in flight" in again.reason  # type: ignore[union-attr]


def test_a_host_that_is_down_a_firing_rule_a_broken_fleet_file_and_a_late_request_are_reasons_to_refuse() -> None:
    log = Log()
    assert "is not up" in log.ask()[0].reason  # type: ignore[union-attr]
    log.up()
    alert = facts.AlertFiring(rule="gpu", labels={"host": "alpha"}, value=1.0, action="rollback", sample_time=1.0)
    log.say(topics.alert_fact("gpu"), alert)
    assert "rule gpu fires already" in log.ask()[0].reason  # type: ignore[union-attr]
    log.say(topics.alert_fact("gpu"), facts.AlertResolved(rule="gpu", labels={"host": "alpha"}))
    log.say(topics.COORDINATOR, commands.Migrate(agent="tutor", to="r2", deadline=log.now - 1))
    assert "deadline" in log.run()[0].reason  # type: ignore[union-attr]

    def broken() -> FleetConfig:
        raise ConfigError("unknown key 'hots'", where="fleet.toml: agents.tutor")

    log.core._load = broken
    assert "unknown key 'hots'" in log.ask()[0].reason  # type: ignore[union-attr]


def test_requests_that_came_while_no_coordinator_lived_are_answered_by_the_next() -> None:
    log = Log().up()
    log.say(topics.COORDINATOR, commands.Migrate(agent="tutor", to="r2", deadline=log.now + 9))
    log.restart()
    assert "MigrationStarted" in names(log.run())


def test_an_operator_may_roll_back_only_what_is_in_flight() -> None:
    log = Log().up()
    log.say(topics.COORDINATOR, commands.RollBackAgent(agent="tutor", reason="no", deadline=log.now + 5))
    (refused,) = log.run()
    assert "interlock migrate tutor --to" in refused.reason  # type: ignore[union-attr]


# --- rollbacks that fail, drills, slower classes
def kept(log: Log, revision: str = "r2") -> list[wire.Body]:
    """The host says that it can't bring the old revision back, and which one serves."""
    (migration,) = log.core.migrations.values()
    body = facts.RollBackFailed(
        host="alpha", agent="tutor", migration=migration.id, epoch=migration.started.epoch, kept=revision, level=2,
        breach=Breach(by="rule slow", reason="slow"), reason="r1 does not start",
    )  # fmt: skip
    log.say(topics.host_fact("alpha"), body)
    return log.run()


def test_a_candidate_that_is_kept_is_held_for_an_operator_and_his_rollback_reaches_the_host_once_more() -> None:
    log = Log().up().to_shadow()
    (migration,) = log.core.migrations.values()
    log.host_failed("shadow")
    (held,) = kept(log)
    assert isinstance(held, facts.MigrationHeld)
    assert "r2 is kept" in held.breach.reason
    assert migration.phase is Phase.HELD
    log.restart()
    (migration,) = log.core.migrations.values()
    assert migration.phase is Phase.HELD
    assert log.later(ROLLBACK_ANSWER_S + 1) == []  # it does not fail by itself
    log.say(topics.COORDINATOR, commands.RollBackAgent(agent="tutor", reason="again", deadline=log.now + 5))
    assert names(log.run()) == ["RollBack"]  # under an id of its own: the first one was heard
    (ended,) = log.host_rolled_back(Breach(by="operator", reason="again"))
    assert ended.outcome == "rolled-back"  # type: ignore[union-attr]


def test_an_old_revision_that_comes_back_by_itself_ends_the_hold() -> None:
    log = Log().up().to_shadow()
    log.host_failed("shadow")
    kept(log)
    (ended,) = log.host_rolled_back(Breach(by="check shadow", reason="as found"))
    assert ended.outcome == "rolled-back"  # type: ignore[union-attr]


def test_a_cold_migration_leaves_out_what_needs_both_and_says_cold_to_the_host() -> None:
    log = Log().up()
    body = commands.Migrate(agent="tutor", to="r2", deadline=log.now + 9, strategy="staged", accept="cold")
    log.say(topics.COORDINATOR, body)
    bodies = log.run()
    assert next(body for body in bodies if isinstance(body, commands.Prepare)).accept == "cold"
    bodies = log.host_done(rollback_class="cold")
    assert next(body for body in bodies if isinstance(body, commands.StartCandidate)).cold
    log.restart()
    bodies = log.host_done()
    assert [body.share for body in bodies if isinstance(body, commands.CutOver)] == [1.0]
    assert not any(isinstance(event.body, commands.Shadow) for event in log.events)


def test_a_class_of_rollback_that_nobody_knows_is_refused() -> None:
    log, body = Log().up(), commands.Migrate(agent="tutor", to="r2", deadline=1e9, accept="tepid")
    log.say(topics.COORDINATOR, body)
    assert "no class of rollback 'tepid'" in log.run()[0].reason  # type: ignore[union-attr]


def test_a_sick_old_revision_may_be_replaced_by_whoever_says_why() -> None:
    log = Log().up()
    alert = facts.AlertFiring(rule="health", labels={"agent": "tutor"}, value=3.0, action="rollback", sample_time=1.0)
    log.say(topics.alert_fact("health"), alert)
    assert "rule health fires already" in log.ask()[0].reason  # type: ignore[union-attr]
    body = commands.Migrate(agent="tutor", to="r2", deadline=log.now + 9, because="r1 loops")
    log.say(topics.COORDINATOR, body)
    asked = next(body for body in log.run() if isinstance(body, commands.Prepare))
    assert asked.sick_ok


def test_a_drill_that_fails_refuses_the_migration_since_nothing_was_started() -> None:
    log = Log().up()
    log.ask()
    (migration,) = log.core.migrations.values()
    migration.steps.insert(1, PlannedStep(migration.steps[0].stage, "drill", 60.0))
    (asked,) = log.host_done()
    assert isinstance(asked, commands.Drill)
    (ended,) = log.host_failed("drill")
    assert (ended.outcome, ended.decided_by) == ("refused", "check drill")  # type: ignore[union-attr]


def test_an_operators_drill_is_passed_to_the_host_once() -> None:
    log = Log().up()
    log.say(topics.COORDINATOR, commands.RunDrill(agent="tutor", deadline=log.now + 9, whole_host=True), "ask")
    (asked,) = log.run()
    assert isinstance(asked, commands.Drill)
    assert (asked.migration, asked.whole_host, asked.promise_s) == ("", True, 5.0)
    assert log.events[-1].header.id == "ask/drill"
    log.restart()
    assert log.run() == []


def test_a_drill_that_can_not_be_is_refused_with_the_reason() -> None:
    log = Log()

    def asked(agent: str = "tutor", deadline: float = 9.0) -> str:
        log.say(topics.COORDINATOR, commands.RunDrill(agent=agent, deadline=log.now + deadline))
        (refused,) = log.run()
        assert isinstance(refused, facts.MigrationRefused)
        return refused.reason

    log.say(topics.host_fact("alpha"), slot("serving"))
    assert "is not up" in asked()
    log.up()
    assert "did you mean 'tutor'" in asked("tutro")
    assert "deadline" in asked(deadline=-1.0)
    log.ask()
    assert "is in flight" in asked()


def test_a_coordinator_that_joins_by_a_snapshot_goes_on_with_the_migration_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decisions, "SNAPSHOT_EVENTS", 5)
    log = Log().up()
    log.ask()
    begun = next(event.header.seq for event in log.events if isinstance(event.body, facts.MigrationStarted))
    log.host_done(ready=True)
    emit = log.core.snapshot()
    assert emit is not None
    assert isinstance(emit.body, facts.FleetSnapshot)
    assert emit.body.start == begun - 1
    assert emit.body.through == len(log.events)
    assert log.core.snapshot() is None  # not until more has happened
    dropped = emit.body.start
    log.say(emit.topic, emit.body, emit.id)
    kept = log.events[dropped:]
    late = Coordinator(lambda: log.config, log.config)
    for event in [log.events[-1], *kept[:-1]]:  # as the log replays it
        late.apply(event)
    log.restart()  # one that reads it all
    whole, joined = ([(m.id, m.decide(log.now)) for m in core.migrations.values()] for core in (log.core, late))
    assert joined == whole
    assert late.fleet.to_json() == log.core.fleet.to_json() | {"position": len(log.events) - 1}
    log.core = late
    breach = Breach(by="rule x", reason="y", sample_time=log.now)
    log.host_rolled_back(breach)
    assert not late.migrations


def test_a_snapshot_of_a_quiet_fleet_stands_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "SNAPSHOT_EVENTS", 1)
    log = Log().up()
    emit = log.core.snapshot()
    assert emit is not None
    assert isinstance(emit.body, facts.FleetSnapshot)
    assert emit.body.start == emit.body.through == 2


def test_a_state_in_memory_is_copied_before_the_shadow_and_handed_over_with_all_requests() -> None:
    log = Log().up()
    body = commands.Migrate(agent="tutor", to="r2", deadline=log.now + 9, strategy="staged", accept="hand-over")
    log.say(topics.COORDINATOR, body)
    log.run()
    log.host_done(hands_over=True)
    (migration,) = log.core.migrations.values()
    assert [(step.step, step.share) for step in migration.steps[1:]] == [
        ("start-candidate", 0.0), ("hand-over", 0.0), ("shadow", 0.0), ("hand-over", 1.0), ("cut-over", 1.0),
        ("commit", 0.0),
    ]  # fmt: skip
    copied = next(body for body in log.host_done() if isinstance(body, commands.HandOver))
    assert (copied.route, copied.accept) == (False, "hand-over")
    assert any(isinstance(body, commands.Shadow) for body in log.host_done())
    moved = next(body for body in log.host_done() if isinstance(body, commands.HandOver))
    assert moved.route
