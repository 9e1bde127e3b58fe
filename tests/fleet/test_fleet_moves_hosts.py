"""An agent moves to another host while clients go on asking at its old address."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.fleet.test_fleet_state import Keepers, kept


@pytest.fixture(scope="module")
def fleet(make_module_fleet: Callable[..., Any]) -> Iterator[Any]:
    made = make_module_fleet({"calc": "alpha", "web": "alpha", "rep": "alpha", "keep": "alpha", "keep-b": "beta"})
    made.start()
    yield made
    assert made.stop() == 0, made.log
    made.nothing_left()


@pytest.mark.parametrize("agent", ["calc", "rep", "web"])
def test_a_candidate_on_another_host_is_rolled_back_to_the_process_here(fleet: Any, clients: Any, agent: str) -> None:
    fleet.calm()
    since = len(fleet.events.events)
    old = fleet.instances(agent)
    with clients(fleet.endpoint(agent)) as asking:
        command = fleet.migrate(agent, "odd", "staged", "--host", "beta")
        fleet.observed(agent, since)
        asking.served_by("odd")
        fleet.trigger(agent, "die")
        done = command.done()
        asking.served_by("r1")
    assert done.code == 10, done
    assert done.json["decided_by"].startswith("host "), done
    assert asking.failures == []
    fleet.alone(agent, "r1")
    assert fleet.instances(agent) == old, "the old process served on all the time"
    started = fleet.events.find("instance-started", since, agent=agent, revision="odd")
    assert started is not None
    assert started["host"] == "beta"
    status = fleet.cli("status", "--json").json
    assert status["agents"][agent]["host"] == "alpha"
    fleet.trigger(agent, "")


def test_state_goes_to_the_other_host_and_comes_back(fleet: Any, clients: Any) -> None:
    fleet.calm()
    since = len(fleet.events.events)
    with Keepers(fleet.endpoint("keep")) as keepers, clients(fleet.endpoint("keep")) as asking:
        command = fleet.migrate("keep", "odd", "staged", "--host", "beta")
        fleet.observed("keep", since)
        asking.served_by("odd")
        done = fleet.cli("rollback", "keep")
        assert done.code in (0, 10), done
        assert command.done().code == 10
        asking.served_by("r1")
    assert keepers.failures == asking.failures == []
    assert kept(fleet.endpoint("keep")) == dict.fromkeys(keepers.kept, 1)
    rolled = fleet.events.find("rolled-back", since, agent="keep")
    assert rolled is not None
    assert rolled["evidence"]["state"]["handed_back"] is True
