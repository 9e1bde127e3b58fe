"""The fold over the event log, as transcripts: what was said, and what the fleet looks like then."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from event_parts import logged
from interlock.broker import commands, facts
from interlock.broker.commands import Breach
from interlock.broker.wire import Body
from interlock.coordinator import fleet
from interlock.coordinator.fleet import Fleet

UP = facts.HostUp(host="alpha", control="tcp://127.0.0.1:1", pid=10, boot="b", agents=["echo"])
SERVING = facts.SlotChanged(host="alpha", agent="echo", state="serving", permanent="v1", endpoint="tcp://e")
STARTED = facts.MigrationStarted(
    migration="echo-7", epoch=7, agent="echo", host="alpha", previous="v1", to="v2", strategy="staged", request="r"
)
CANARY = facts.SlotChanged(
    host="alpha", agent="echo", state="live", permanent="v1", candidate="v2", share=0.1, migration="echo-7", epoch=7
)
BREACH = Breach(by="rule gpu-memory", reason="96 % used", sample_time=99.8)
ROLLED_BACK = facts.RolledBack(
    host="alpha", agent="echo", migration="echo-7", epoch=7, revision="v1", level=1, breach=BREACH,
    received=100.0, routed=100.01, restored=100.02, verified=True,
)  # fmt: skip
ROLL_BACK_FAILED = facts.RollBackFailed(
    host="alpha", agent="echo", migration="echo-7", epoch=7, breach=BREACH, reason="it does not start"
)
COMMIT_DONE = facts.StepDone(host="alpha", agent="echo", migration="echo-7", epoch=7, step="commit", command="c")
HELD = facts.MigrationHeld(migration="echo-7", agent="echo", breach=BREACH)
FIRING = facts.AlertFiring(
    rule="gpu-memory", labels={"host": "alpha"}, value=0.96, action="rollback", sample_time=99.8, migrations=["echo-7"]
)
RESOLVED = facts.AlertResolved(rule="gpu-memory", labels={"host": "alpha"})


def stage(name: str) -> facts.StageEntered:
    return facts.StageEntered(migration="echo-7", agent="echo", stage=name)


def ended(outcome: facts.Outcome, migration: str = "echo-7") -> facts.MigrationEnded:
    return facts.MigrationEnded(
        migration=migration, agent="echo", epoch=7, outcome=outcome, decided_by="rule gpu-memory", reason="96 % used"
    )


def instance(role: facts.Role, revision: str, pid: int) -> facts.InstanceStarted:
    return facts.InstanceStarted(
        host="alpha", agent="echo", instance=f"i{pid}", revision=revision, role=role, pid=pid, started=1.0
    )


def play(*bodies: Body) -> Fleet:
    """The fleet after these events, numbered from 1 and a second apart."""
    return play_into(Fleet(), bodies)


def play_into(view: Fleet, bodies: Sequence[Body]) -> Fleet:
    for number, body in enumerate(bodies, start=view.position + 1):
        view.apply(logged(body, number))
    return view


def test_a_host_that_says_it_is_up_is_up_until_it_says_goodbye() -> None:
    view = play(UP, SERVING)
    assert view.hosts["alpha"].up
    assert view.hosts["alpha"].control == "tcp://127.0.0.1:1"
    assert view.agents["echo"].permanent == "v1"
    assert not play_into(view, [facts.HostDown(host="alpha")]).hosts["alpha"].up


def test_instances_come_and_go_with_their_role_and_process() -> None:
    view = play(UP, instance("permanent", "v1", 11), instance("candidate", "v2", 12))
    found = view.agents["echo"].instances
    assert {(i.role, i.revision, i.pid) for i in found.values()} == {("permanent", "v1", 11), ("candidate", "v2", 12)}
    stopped = facts.InstanceStopped(
        host="alpha", agent="echo", instance="i12", revision="v2", role="candidate", returncode=-9, expected=False
    )
    assert list(play_into(view, [stopped]).agents["echo"].instances) == ["i11"]


def test_a_host_that_comes_back_as_another_process_has_none_of_its_old_instances() -> None:
    again = facts.HostUp(host="alpha", control="tcp://127.0.0.1:1", pid=99, boot="b", agents=["echo"])
    view = play(UP, instance("permanent", "v1", 11), again, instance("permanent", "v1", 12))
    assert list(view.agents["echo"].instances) == ["i12"]


def test_a_migration_is_in_flight_until_it_is_settled() -> None:
    view = play(UP, SERVING, STARTED, stage("prepare"), CANARY, stage("integration"))
    (migration,) = view.in_flight("echo")
    assert (migration.stage, migration.previous, migration.to, migration.host) == ("integration", "v1", "v2", "alpha")
    assert view.agents["echo"].share == 0.1
    assert view.in_flight("other") == []
    play_into(view, [ended("committed")])
    assert view.in_flight() == []
    assert view.last_migration("echo") is migration
    assert list(migration.times) == ["started", "prepare", "integration", "ended"]


def test_a_host_settles_a_migration_without_a_coordinator() -> None:
    for last, outcome in ((ROLLED_BACK, "rolled-back"), (ROLL_BACK_FAILED, "failed"), (COMMIT_DONE, "committed")):
        migration = play(UP, STARTED, CANARY, last).migrations["echo-7"]
        assert (migration.outcome, migration.ended, migration.in_flight) == (outcome, False, False)


def test_a_rollback_keeps_who_decided_it_and_its_times() -> None:
    migration = play(STARTED, ROLLED_BACK, ended("rolled-back")).migrations["echo-7"]
    assert (migration.decided_by, migration.reason) == ("rule gpu-memory", "96 % used")
    assert migration.rollback is not None
    assert migration.rollback["routed"] == 100.01
    assert migration.ended


def test_a_held_migration_can_still_be_rolled_back() -> None:
    view = play(STARTED, HELD)
    assert view.migrations["echo-7"].outcome == "held"
    assert view.in_flight("echo")
    assert play_into(view, [ROLLED_BACK]).migrations["echo-7"].outcome == "rolled-back"


def test_what_comes_after_the_end_changes_no_outcome() -> None:
    migration = play(STARTED, ended("committed"), HELD, ROLLED_BACK, stage("prepare")).migrations["echo-7"]
    assert (migration.outcome, migration.stage) == ("committed", "")


def test_a_slot_change_of_an_older_migration_is_passed_over() -> None:
    newer = facts.SlotChanged(host="alpha", agent="echo", state="serving", permanent="v2", migration="echo-9", epoch=9)
    assert play(newer, CANARY).agents["echo"].permanent == "v2"


def test_an_alert_fires_until_it_is_resolved_and_keeps_when_it_began() -> None:
    view = play(FIRING, FIRING)
    (alert,) = view.alerts.values()
    assert (alert.since, alert.migrations) == (1.0, ["echo-7"])
    assert play_into(view, [RESOLVED, RESOLVED]).alerts == {}


def test_commands_say_nothing_about_what_happened() -> None:
    view = play(commands.Migrate(agent="echo", to="v2", deadline=1.0))
    assert (view.agents, view.migrations, view.position) == ({}, {}, 1)


def test_ended_migrations_are_forgotten_in_the_end_and_those_in_flight_never() -> None:
    view = play(STARTED)
    play_into(view, [ended("committed", f"m{number}") for number in range(fleet.KEPT_MIGRATIONS + 50)])
    assert len(view.migrations) <= fleet.KEPT_MIGRATIONS + 2
    assert view.in_flight("echo")[0].id == "echo-7"


ALL: list[Body] = [
    UP, SERVING, STARTED, stage("prepare"), CANARY, instance("candidate", "v2", 12), HELD, ROLLED_BACK,
    ROLL_BACK_FAILED, COMMIT_DONE, ended("rolled-back"), FIRING, RESOLVED, facts.HostDown(host="alpha"),
    facts.InstanceStopped(
        host="alpha", agent="echo", instance="i12", revision="v2", role="candidate", returncode=0, expected=True
    ),
]  # fmt: skip


@given(st.lists(st.sampled_from(ALL), max_size=30))
def test_events_in_any_order_and_number_make_a_state_that_can_be_shown(bodies: list[Body]) -> None:
    view = play(*bodies)
    tree = json.loads(json.dumps(view.to_json()))
    assert tree["position"] == len(bodies)
    if any(isinstance(body, facts.MigrationEnded) for body in bodies):
        assert not view.migrations["echo-7"].in_flight
        assert view.migrations["echo-7"].outcome == "rolled-back"


SAID: list[Body] = [
    UP, SERVING, instance("permanent", "v1", 11), STARTED, CANARY, instance("candidate", "v2", 12), FIRING, HELD,
    ROLLED_BACK, ended("rolled-back"), RESOLVED, FIRING, COMMIT_DONE, facts.HostDown(host="alpha"),
]  # fmt: skip


@given(st.lists(st.sampled_from(SAID), max_size=25), st.data())
def test_a_snapshot_and_what_follows_give_the_same_fleet_as_the_whole_log(
    said: list[Body], data: st.DataObject
) -> None:
    through = data.draw(st.integers(0, len(said)))
    start = data.draw(st.integers(0, through))
    whole = play(*said)
    early = play(*said[:through])
    snapshot = early.snapshot(start)
    assert (snapshot.through, snapshot.start) == (through, start)
    late = Fleet()
    late.apply(logged(snapshot, 1000))
    for number, body in enumerate(said[start:], start + 1):
        late.apply(logged(body, number))
    assert late.to_json() == whole.to_json()


def test_a_snapshot_changes_nothing_where_the_events_were_seen_and_a_broken_one_nothing_at_all() -> None:
    whole = play(*SAID)
    before = whole.to_json()
    whole.apply(logged(play(UP).snapshot(1), 50))
    whole.apply(logged(facts.FleetSnapshot(through=900, start=900, state=b"broken"), 901))
    assert whole.to_json() == before


def test_a_snapshot_that_would_be_too_large_leaves_out_the_oldest_that_ended() -> None:
    view = Fleet()
    for number in range(40):
        body = facts.MigrationEnded(
            migration=f"echo-{number}", agent="echo", epoch=number, outcome="committed", decided_by="x",
            reason=os.urandom(25_000).hex(),
        )  # fmt: skip
        view.apply(logged(body, number + 1))
    snapshot = view.snapshot(40)
    assert len(snapshot.state) <= fleet.SNAPSHOT_BYTES
    late = Fleet()
    late.apply(logged(snapshot, 50))
    assert list(late.migrations)[-1] == "echo-39"
    assert 0 < len(late.migrations) < 40


# --- led by an operator


def steered(action: commands.SteerAction) -> facts.Steered:
    return facts.Steered(request="r", migration="echo-7", agent="echo", action=action, by="operator/ann", reason="so")


def test_what_an_operator_says_is_the_phase_and_a_hold_ends_with_it() -> None:
    waiting = facts.MigrationWaiting(migration="echo-7", agent="echo", stage="observation", until=9.0)
    for said, phase, outcome in (
        ([waiting], "waiting", ""),
        ([waiting, steered("approve")], "running", ""),
        ([steered("pause")], "paused", ""),
        ([steered("pause"), steered("resume")], "running", ""),
        ([HELD], "held", "held"),
        ([HELD, steered("resume")], "running", ""),
        ([HELD, steered("abort")], "rolling-back", ""),
        ([steered("hold")], "held", "held"),
        ([HELD, steered("commit"), COMMIT_DONE], "running", "committed"),
    ):
        migration = play(UP, SERVING, STARTED, CANARY, *said).migrations["echo-7"]
        assert (migration.phase, migration.outcome) == (phase, outcome), said
    assert play(STARTED, steered("hold")).migrations["echo-7"].decided_by == "operator hold"
    assert play(STARTED, ended("committed"), steered("pause")).migrations["echo-7"].phase == "running"


def test_deviations_and_drills_are_kept_and_travel_in_a_snapshot() -> None:
    deviation = facts.Deviation(migration="echo-7", agent="echo", what="lower", because="fix", by="operator/ann")
    drill = facts.DrillDone(host="alpha", agent="echo", revision="v1", seconds={"1": 0.04})
    before = play(UP, SERVING, STARTED, deviation, drill)
    assert before.migrations["echo-7"].deviations == ["lower; because: fix (operator/ann)"]
    assert before.agents["echo"].drill == fleet.Drill("v1", {"1": 0.04}, [], 5.0)
    after = play(before.snapshot(before.position))
    assert after.to_json() == before.to_json()


# --- moves to another host

MOVING = msgspec.structs.replace(STARTED, target="beta")
GUEST = facts.InstanceStarted(
    host="beta", agent="echo", instance="echo-v2-7.2", revision="v2", role="candidate", pid=9, started=1.0
)
RECEIVED = facts.StepDone(host="beta", agent="echo", migration="echo-7", epoch=7, step="receive", command="c")
ARRIVING = facts.SlotChanged(
    host="beta", agent="echo", state="arriving", permanent="v2", migration="echo-7", epoch=7, endpoint="tcp://b"
)
MOVED = msgspec.structs.replace(COMMIT_DONE, evidence={"host": "beta", "endpoint": "tcp://b"})
FORWARDING = facts.SlotChanged(
    host="alpha", agent="echo", state="forwarding", permanent="v1", migration="echo-7", epoch=7, endpoint="tcp://e"
)
SERVES_THERE = facts.SlotChanged(host="beta", agent="echo", state="serving", permanent="v2", endpoint="tcp://b")
BETA_UP = facts.HostUp(host="beta", control="tcp://127.0.0.1:2", pid=11, boot="b", agents=["echo"])


def place(view: Fleet) -> tuple[str, str, str, str]:
    agent = view.agents["echo"]
    return agent.host, agent.permanent, agent.state, agent.endpoint


def test_until_the_commit_an_agent_that_moves_is_where_it_was() -> None:
    view = play(UP, SERVING, MOVING, RECEIVED, GUEST, CANARY, ARRIVING)
    assert place(view) == ("alpha", "v1", "live", "tcp://e")
    assert view.migrations["echo-7"].host == "alpha"


def test_the_commit_of_its_own_host_takes_it_to_the_other_one_for_good() -> None:
    view = play(UP, SERVING, MOVING, CANARY, ARRIVING, MOVED, FORWARDING, SERVES_THERE, ended("committed"))
    assert place(view) == ("beta", "v2", "serving", "tcp://b")
    play_into(view, [UP, SERVING])  # its old host says what it likes
    assert place(view) == ("beta", "v2", "serving", "tcp://b")
    again = Fleet()
    play_into(again, [view.snapshot(view.position)])
    assert place(again) == ("beta", "v2", "serving", "tcp://b")


def test_no_host_takes_an_agent_over_by_saying_so() -> None:
    stolen = msgspec.structs.replace(MOVED, host="beta")
    for body in (SERVES_THERE, BETA_UP, ARRIVING, stolen):
        view = play(UP, SERVING, MOVING, CANARY, body)
        assert place(view)[0] == "alpha", body
    not_ordered = play(UP, SERVING, STARTED, CANARY, MOVED)
    assert place(not_ordered)[0] == "alpha"
    moved = play(UP, SERVING, MOVING, CANARY, MOVED, ended("committed"), UP, SERVING, FORWARDING)
    assert place(moved)[0] == "beta"


def test_what_a_host_says_of_a_candidate_that_it_runs_is_no_claim_and_a_move_holds_before_the_file() -> None:
    view = Fleet({"echo": "alpha"})
    said = [UP, SERVING, MOVING, RECEIVED, GUEST, ARRIVING, CANARY, MOVED, FORWARDING, SERVES_THERE, UP]
    play_into(view, said)
    assert view.claims.total == 0
    assert place(view) == ("beta", "v2", "serving", "tcp://b")


def test_a_rolled_back_move_leaves_it_where_it_was() -> None:
    view = play(UP, SERVING, MOVING, RECEIVED, GUEST, CANARY, ROLLED_BACK, SERVING, ended("rolled-back"))
    assert place(view)[0] == "alpha"
    assert not view.agents["echo"].moved
