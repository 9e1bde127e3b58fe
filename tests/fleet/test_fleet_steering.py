"""An operator leads migrations of a whole fleet under load: approval, pause, hold, commit, abort, and nobody at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

HEAD = """
    name = "test"
    state = "state"
    [rules]
    files = ["rules.yaml"]
    [monitor]
    gpu = "none"
    [coordinator]
    lease_s = 6.0
    pause_s = 3.0
    [strategies.rapid]
    baseline_s = 0.3
    observation_s = 100.0
    [strategies.custom]
    approve = true
    baseline_s = 0.3
    canary = [{ share = 0.5, seconds = 0.2 }]
    observation_s = 0.5
"""


@pytest.fixture(scope="module")
def running(make_module_fleet: Callable[..., Any]) -> Iterator[Any]:
    made = make_module_fleet({"calc": "alpha"}, head=HEAD)
    made.start()
    yield made
    assert made.stop() == 0, made.log
    made.nothing_left()


@pytest.fixture
def fleet(running: Any) -> Any:
    running.calm()
    return running


def standing(fleet: Any, migration: str) -> dict[str, Any]:
    """What `interlock status` says of it."""
    done = fleet.cli("status", "--json")
    assert done.code == 0, done
    found: dict[str, Any] = done.json["migrations"][migration]
    return found


def test_stages_begin_when_they_are_approved_also_by_a_coordinator_that_was_killed(fleet: Any, clients: Any) -> None:
    to, since = fleet.other("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc")) as load:
        command = fleet.start_cli("migrate", "calc", "--to", to, "--level", "critical", "--json")
        for number, stage in enumerate(("infrastructure", "integration", "observation", "commit")):
            waiting = fleet.events.wait("migration-waiting", since, agent="calc", stage=stage)
            if stage == "integration":
                found = standing(fleet, waiting["migration"])
                assert (found["phase"], found["then"]) == ("waiting", "it is rolled back")
                assert found["waits_for"] == "interlock approve calc (stage integration)"
                fleet.role("coordinator", "coordinator").kill()
            approved = fleet.cli("approve", "calc", "--because", f"reason {number}", "--json")
            assert approved.code == 0, approved
            assert approved.json["outcome"] == "steered"
        done = command.done()
        load.served_by(to)
    assert done.code == 0, done
    assert [each["action"] for each in done.json["evidence"]["steered"]] == ["approve"] * 4
    assert load.failures == []
    fleet.alone("calc", to)


def test_a_pause_that_nobody_ends_is_rolled_back(fleet: Any, clients: Any) -> None:
    old, since = fleet.serving("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc")) as load:
        command = fleet.migrate("calc", fleet.other("calc"))
        migration = fleet.observed("calc", since)
        paused = fleet.cli("pause", "calc")
        assert paused.code == 0, paused
        assert standing(fleet, migration)["phase"] in ("paused", "rolling-back")
        done = command.done()
        load.served_by(old)
    assert done.code == 10, done
    assert done.json["decided_by"] == "coordinator pause-overdue"
    assert load.failures == []


def test_a_held_one_is_refused_a_silent_commit_and_committed_with_a_reason(fleet: Any, clients: Any) -> None:
    to, since = fleet.other("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc")) as load:
        command = fleet.migrate("calc", to)
        migration = fleet.observed("calc", since)
        assert fleet.cli("hold", "calc", "--because", "odd answers").code == 0
        held = command.done()
        assert (held.code, held.json["decided_by"]) == (11, "operator hold")
        assert standing(fleet, migration)["waits_for"] == "an operator (resume, abort, commit)"
        silent = fleet.cli("commit", "calc", "--json")
        assert silent.code == 12, silent
        assert "held by operator hold: odd answers" in silent.json["reason"]
        done = fleet.cli("commit", "calc", "--because", "they were right", "--json")
        load.served_by(to)
    assert done.code == 0, done
    assert done.json["decided_by"] == "operator commit"
    assert fleet.events.find("deviation", since, agent="calc")["because"] == "they were right"
    assert load.failures == []
    fleet.alone("calc", to)


def test_an_abort_brings_the_old_one_back_and_a_plan_shows_what_can_be_then(fleet: Any, clients: Any) -> None:
    old, to, since = fleet.serving("calc"), fleet.other("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc")) as load:
        command = fleet.migrate("calc", to)
        migration = fleet.observed("calc", since)
        plan = fleet.cli("plan", "calc", "--to", to, "--json")
        assert plan.code == 12, plan
        assert f"migration {migration} of calc is in flight" in plan.json["refused"][0]
        aborted = fleet.cli("abort", "calc", "--because", "wrong one", "--json")
        done = command.done()
        load.served_by(old)
    assert aborted.code == 0, aborted
    assert (aborted.json["decided_by"], aborted.json["reason"]) == ("operator abort", "wrong one")
    assert done.code == 10, done
    assert load.failures == []
    fleet.alone("calc", old)
    plan = fleet.cli("plan", "calc", "--to", to, "--json")
    assert (plan.code, plan.json["refused"], plan.json["strategy"]) == (0, [], "rapid")
