"""Every process of a fleet is killed or frozen in the middle of migrations: they end, and somebody always serves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

OUTCOMES = {0: "committed", 10: "rolled-back"}


@pytest.fixture(scope="module")
def running(make_module_fleet: Callable[..., Any]) -> Iterator[Any]:
    made = make_module_fleet({"calc": "alpha", "rep": "alpha"})
    made.start()
    yield made
    assert made.stop() == 0, made.log
    made.nothing_left()


@pytest.fixture
def fleet(running: Any) -> Any:
    running.calm()
    running.trigger("calc", "")
    running.trigger("rep", "")
    return running


@pytest.mark.parametrize("stage", ["prepare", "observation"])
def test_a_coordinator_that_is_killed_comes_back_and_brings_the_migration_to_an_end(
    stage: str, fleet: Any, clients: Any
) -> None:
    old, to, since = fleet.serving("calc"), fleet.other("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc")) as load:
        command = fleet.migrate("calc", to)
        fleet.events.wait("stage-entered", since, agent="calc", stage=stage)
        fleet.role("coordinator", "coordinator").kill()
        done = command.done()
        assert done.code in OUTCOMES, done
        serving = to if done.code == 0 else old
        load.served_by(serving)
    assert load.failures == []
    assert fleet.events.wait("migration-ended", since, agent="calc")["outcome"] == OUTCOMES[done.code]
    fleet.alone("calc", serving)


def test_a_frozen_coordinator_costs_the_candidate_its_lease(fleet: Any, clients: Any) -> None:
    old, since = fleet.serving("rep"), len(fleet.events.events)
    with clients(fleet.endpoint("rep")) as load:
        command = fleet.migrate("rep", fleet.other("rep"), "staged")
        fleet.observed("rep", since)
        coordinator = fleet.role("coordinator", "coordinator")
        coordinator.suspend()
        try:
            rolled_back = fleet.events.wait("rolled-back", since, agent="rep")
            load.served_by(old)
        finally:
            coordinator.resume()
        done = command.done()
    assert rolled_back["breach"]["by"] == "host lease-expired"
    assert done.code == 10, done
    assert load.failures == []
    fleet.alone("rep", old)


@pytest.mark.parametrize("stage", ["prepare", "infrastructure", "core-logic", "observation"])
def test_a_host_that_is_killed_comes_back_with_the_old_revision_and_no_orphans(
    stage: str, fleet: Any, clients: Any
) -> None:
    old, since = fleet.serving("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc"), answer_s=2.0) as load:  # what the host held is lost: clients ask again
        command = fleet.migrate("calc", "odd", "staged")
        fleet.events.wait("stage-entered", since, agent="calc", stage=stage)
        before = {*fleet.instances("calc").values(), *fleet.instances("rep").values()}
        fleet.role("agents", "alpha").kill()
        done = command.done()
        load.served_by(old)
    assert done.code == 10, done
    assert "restart" in done.json["reason"]
    assert fleet.events.wait("migration-ended", since, agent="calc")["outcome"] == "rolled-back"
    fleet.alone("calc", old)
    fleet.alone("rep", fleet.serving("rep"))
    assert not [pid for pid in before if pid in fleet.instances("calc").values()]


def test_a_host_that_is_killed_at_the_commit_has_committed_or_rolled_back(fleet: Any, clients: Any) -> None:
    old, to, since = fleet.serving("calc"), fleet.other("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc"), answer_s=2.0) as load:
        command = fleet.migrate("calc", to)
        host = fleet.role("agents", "alpha")
        fleet.events.wait("stage-entered", since, agent="calc", stage="commit")
        host.kill()
        done = command.done()
        assert done.code in OUTCOMES, done
        serving = to if done.code == 0 else old
        load.served_by(serving)
    assert fleet.events.wait("migration-ended", since, agent="calc")["outcome"] == OUTCOMES[done.code]
    fleet.alone("calc", serving)


@pytest.mark.parametrize("agent", ["calc", "rep"])
def test_a_permanent_instance_that_is_killed_is_started_again_and_no_request_is_lost(
    agent: str, fleet: Any, clients: Any, wait_until: Any
) -> None:
    serving = fleet.serving(agent)
    with clients(fleet.endpoint(agent)) as load:
        pid = fleet.alone(agent, serving)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: fleet.alone(agent, serving) != pid, "another instance")
        load.more(10)
    assert load.failures == []


def test_both_instances_are_killed_in_the_middle_and_no_request_is_lost(fleet: Any, clients: Any) -> None:
    old, since = fleet.serving("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc")) as load:
        command = fleet.migrate("calc", "odd", "staged")
        fleet.observed("calc", since)
        load.served_by("odd")
        for pid in fleet.instances("calc").values():
            os.kill(pid, signal.SIGKILL)
        done = command.done()
        load.served_by(old)
    assert done.code == 10, done
    assert done.json["decided_by"] == "host process-died"
    assert load.failures == []
    fleet.alone("calc", old)


def test_a_broker_that_is_killed_is_no_matter_to_clients_and_the_migration_ends(fleet: Any, clients: Any) -> None:
    old, to, since = fleet.serving("calc"), fleet.other("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc")) as load, clients(fleet.endpoint("rep")) as other:
        command = fleet.migrate("calc", to)
        fleet.events.wait("stage-entered", since, agent="calc", stage="observation")
        fleet.role("broker").kill()
        done = command.done()
        assert done.code in OUTCOMES, done
        serving = to if done.code == 0 else old
        load.served_by(serving)
        other.more()
    assert load.failures == other.failures == []
    assert fleet.events.wait("migration-ended", since, agent="calc")["outcome"] == OUTCOMES[done.code]
    fleet.alone("calc", serving)


def test_without_a_broker_a_candidate_that_dies_is_out_of_the_way(fleet: Any, clients: Any) -> None:
    old, since = fleet.serving("rep"), len(fleet.events.events)
    with clients(fleet.endpoint("rep")) as load:
        command = fleet.migrate("rep", "odd", "staged")
        fleet.observed("rep", since)
        load.served_by("odd")
        broker = fleet.role("broker")
        broker.suspend()
        try:
            fleet.trigger("rep", "die")
            load.served_by(old)
        finally:
            broker.resume()
        done = command.done()
    assert done.code == 10, done
    assert done.json["decided_by"] == "host process-died"
    assert load.failures == []
    fleet.alone("rep", old)


def test_rules_hold_after_the_rule_engine_was_killed(fleet: Any, clients: Any) -> None:
    old, since = fleet.serving("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc")) as load:
        command = fleet.migrate("calc", "odd", "staged")
        fleet.observed("calc", since)
        fleet.role("coordinator", "rules").kill()
        fleet.trigger("calc", "bad")
        done = command.done()
        load.served_by(old)
    assert done.code == 10, done
    assert done.json["decided_by"] == "rule badness"
    assert load.failures == []
    fleet.trigger("calc", "")
    fleet.alone("calc", old)


def test_a_monitor_that_is_killed_disturbs_nothing(fleet: Any, clients: Any) -> None:
    to, since = fleet.other("rep"), len(fleet.events.events)
    with clients(fleet.endpoint("rep")) as load:
        command = fleet.migrate("rep", to)
        fleet.events.wait("stage-entered", since, agent="rep", stage="integration")
        fleet.role("monitors", "alpha").kill()
        done = command.done()
        assert done.code == 0, done
        load.served_by(to)
    assert load.failures == []


def test_roles_by_themselves_and_a_coordinator_that_stays_dead(make_fleet: Callable[..., Any], clients: Any) -> None:
    fleet = make_fleet({"calc": "alpha"})
    assert fleet.cli("keys", "init").code == 0
    fleet.part("broker")
    fleet.part("host", "--name", "alpha")
    coordinator = fleet.part("coordinator")
    fleet.watch()
    with clients(fleet.endpoint("calc")) as load:
        command = fleet.migrate("calc", "r2", "staged")
        fleet.observed("calc", 0)
        coordinator.kill()
        coordinator.wait()
        assert fleet.events.wait("rolled-back", agent="calc")["breach"]["by"] == "host lease-expired"
        load.served_by("r1")
        refused = fleet.cli("migrate", "calc", "--to", "r2", "--timeout", "1")
        assert refused.code == 3, refused
        assert "coordinator" in refused.err
        fleet.part("coordinator")
        done = command.done()
        assert done.code == 10, done
        fleet.events.wait("migration-ended", agent="calc", outcome="rolled-back")
        assert fleet.migrate("calc", "r2").done().code == 0
        load.served_by("r2")
    assert load.failures == []
    fleet.alone("calc", "r2")
    for process in reversed([part for part in fleet.parts if part is not coordinator]):
        process.terminate()
        assert process.wait(20) == 0, fleet.log
    fleet.nothing_left()
