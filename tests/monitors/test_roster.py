"""Who lives on a host, told as the events that say so."""

from __future__ import annotations

from dataclasses import replace

from interlock.broker import facts
from interlock.broker.commands import Breach
from interlock.broker.wire import Body
from interlock.monitors.roster import Instance, Roster

OLD = Instance("echo-1", "echo", "v1", "permanent", 11, 1000.0)
NEW = Instance("echo-2", "echo", "v2", "candidate", 12, 1010.0)


def started(instance: Instance, host: str = "alpha") -> facts.InstanceStarted:
    return facts.InstanceStarted(
        host=host,
        agent=instance.agent,
        instance=instance.id,
        revision=instance.revision,
        role=instance.role,
        pid=instance.pid,
        started=instance.started,
    )


def stopped(instance: Instance, host: str = "alpha") -> facts.InstanceStopped:
    return facts.InstanceStopped(
        host=host,
        agent=instance.agent,
        instance=instance.id,
        revision=instance.revision,
        role=instance.role,
        returncode=0,
        expected=True,
    )


def slot(permanent: str, candidate: str | None = None, host: str = "alpha") -> facts.SlotChanged:
    return facts.SlotChanged(host=host, agent="echo", state="serving", permanent=permanent, candidate=candidate)


def begun(migration: str = "m1", host: str = "alpha", agent: str = "echo") -> facts.MigrationStarted:
    return facts.MigrationStarted(
        migration=migration, epoch=1, agent=agent, host=host, previous="v1", to="v2", strategy="rapid", request="r"
    )


def ended(migration: str = "m1", agent: str = "echo") -> facts.MigrationEnded:
    return facts.MigrationEnded(
        migration=migration, agent=agent, epoch=1, outcome="committed", decided_by="coordinator", reason="ok"
    )


BREACH = Breach(by="rule x", reason="because")
ROLLED_BACK = facts.RolledBack(
    host="alpha",
    agent="echo",
    migration="m1",
    epoch=1,
    revision="v1",
    level=1,
    breach=BREACH,
    received=1.0,
    routed=1.0,
    restored=1.0,
    verified=True,
)


def after(*bodies: Body) -> Roster:
    roster = Roster("alpha")
    for body in bodies:
        roster.apply(body)
    return roster


def test_an_instance_lives_from_its_start_to_its_end() -> None:
    assert after(started(OLD)).instances == [OLD]
    assert after(started(OLD), started(NEW), stopped(OLD)).instances == [NEW]
    assert after(stopped(OLD)).instances == []


def test_what_happens_on_another_host_is_not_ours() -> None:
    assert after(started(OLD, "beta")).instances == []
    assert after(started(OLD), stopped(OLD, "beta")).instances == [OLD]
    assert after(started(NEW), slot("v2", host="beta")).instances == [NEW]


def test_a_commit_makes_the_candidate_permanent() -> None:
    assert after(started(OLD), started(NEW), slot("v2")).instances == [OLD, replace(NEW, role="permanent")]


def test_a_slot_that_still_has_a_candidate_or_went_back_leaves_it_a_candidate() -> None:
    assert after(started(NEW), slot("v1", candidate="v2")).instances == [NEW]
    assert after(started(NEW), slot("v1")).instances == [NEW]


def test_a_migration_is_in_flight_until_it_ended_or_was_rolled_back() -> None:
    assert not after().migrating
    assert after(begun()).migrating
    assert not after(begun(), ended()).migrating
    assert not after(begun(), ROLLED_BACK).migrating


def test_a_held_migration_is_still_in_flight() -> None:
    assert after(begun(), facts.MigrationHeld(migration="m1", agent="echo", breach=BREACH)).migrating


def test_the_late_end_of_an_earlier_migration_does_not_end_the_present_one() -> None:
    assert after(begun("m1"), ROLLED_BACK, begun("m2"), ended("m1")).migrating


def test_two_agents_may_migrate_at_once() -> None:
    assert after(begun("m1"), begun("m2", agent="other"), ended("m1")).migrating


def test_a_migration_on_another_host_does_not_touch_this_one() -> None:
    assert not after(begun(host="beta")).migrating
