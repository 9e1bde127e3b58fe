"""Two named hosts on one machine: what happens on one is no matter to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def fleet(make_module_fleet: Callable[..., Any]) -> Iterator[Any]:
    made = make_module_fleet({"calc-a": "alpha", "rep-a": "alpha", "calc-b": "beta"})
    made.start()
    yield made
    assert made.stop() == 0, made.log
    made.nothing_left()


def test_a_migration_on_one_host_leaves_the_other_alone(fleet: Any, clients: Any) -> None:
    before = fleet.instances("calc-b") | fleet.instances("rep-a")
    since = len(fleet.events.events)
    with clients(fleet.endpoint("calc-a")) as here, clients(fleet.endpoint("calc-b")) as there:
        command = fleet.migrate("calc-a", "odd", "staged")
        fleet.observed("calc-a", since)
        fleet.trigger("calc-a", "bad")
        done = command.done()
        here.served_by("r1")
        there.more()
    assert done.code == 10, done
    assert done.json["decided_by"] == "rule badness"
    assert here.failures == there.failures == []
    assert fleet.instances("calc-b") | fleet.instances("rep-a") == before
    status = fleet.cli("status", "--json").json
    assert {name: host["condition"] for name, host in status["hosts"].items()} == {"alpha": "up", "beta": "up"}
    assert status["agents"]["calc-b"]["host"] == "beta"


def test_a_ping_reaches_every_host_and_names_one_that_is_frozen(fleet: Any) -> None:
    done = fleet.cli("ping", "--json", "--timeout", "30")
    assert done.code == 0, done
    assert {answer["host"] for answer in done.json["answers"]} == {"alpha", "beta"}
    assert done.json["silent"] == []
    beta = fleet.role("agents", "beta")
    beta.suspend()
    try:
        done = fleet.cli("ping", "--json", "--timeout", "3")
        assert done.code == 3, done
        assert [answer["host"] for answer in done.json["answers"]] == ["alpha"]
        assert done.json["silent"] == ["beta"]
    finally:
        beta.resume()
    done = fleet.cli("ping", "beta", "--timeout", "30")
    assert done.code == 0, done
    assert done.out.startswith("beta  has it")
    assert fleet.cli("ping", "gamma").code == 2


def test_both_hosts_migrate_at_once_and_one_is_killed(fleet: Any, clients: Any) -> None:
    fleet.calm()
    since = len(fleet.events.events)
    with clients(fleet.endpoint("calc-a"), answer_s=2.0) as dying, clients(fleet.endpoint("calc-b")) as living:
        commands = [fleet.migrate("calc-a", "r2", "staged"), fleet.migrate("calc-b", "r2")]
        fleet.observed("calc-a", since)
        fleet.role("agents", "alpha").kill()
        doomed, lucky = (command.done() for command in commands)
        dying.served_by("r1")
        living.served_by("r2")
    assert doomed.code == 10, doomed
    assert lucky.code == 0, lucky
    assert living.failures == []
