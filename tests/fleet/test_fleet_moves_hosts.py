"""An agent moves to another host while clients go on asking at its old address."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fleet.test_fleet_state import Keepers, kept


@pytest.fixture(scope="module")
def fleet(make_module_fleet: Callable[..., Any]) -> Iterator[Any]:
    made = make_module_fleet({"web": "alpha", "rep": "alpha", "keep": "alpha", "calc-b": "beta"})
    made.start()
    yield made
    assert made.stop() == 0, made.log
    made.nothing_left()


@pytest.mark.parametrize("agent", ["rep", "web"])
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


def answers_at(clients: Any, endpoint: str) -> str:
    """The revision that answers there."""
    with clients(endpoint, 1) as client:
        assert client.failures == []
        return str(client.last)


@pytest.mark.parametrize("agent", ["keep", "rep", "web"])
def test_a_committed_move_serves_there_and_is_forwarded_to_from_here(fleet: Any, clients: Any, agent: str) -> None:
    fleet.calm()
    here, there = fleet.endpoint(agent), fleet.endpoint(agent, "beta")
    if agent != "rep":  # what an agent keeps on the disk travels, whether it has hooks for state or not
        folder = fleet.folder / "state" / "host-alpha" / "data" / agent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "notes").write_text(f"of {agent}")
    keepers = Keepers(fleet.endpoint("keep"))
    before = kept(keepers.endpoint)
    with keepers, clients(here) as asking:
        done = fleet.migrate(agent, "r2", "rapid", "--host", "beta").done()
        assert done.code == 0, done
        asking.served_by("r2")
        assert answers_at(clients, there) == "r2"
    assert asking.failures == keepers.failures == []
    assert fleet.alone(agent, "r2")
    wanted = dict(before)
    for n in keepers.kept:
        wanted[n] = wanted.get(n, 0) + 1
    assert kept(keepers.endpoint) == wanted
    if agent == "keep":
        assert kept(there) == wanted
    if agent != "rep":
        notes = fleet.folder / "state" / "host-beta" / "data" / agent / "notes"
        assert notes.read_text() == f"of {agent}"
    status = fleet.cli("status", "--json").json
    assert (status["agents"][agent]["host"], status["agents"][agent]["endpoint"]) == ("beta", there)
    [instance] = status["agents"][agent]["instances"].values()
    assert (instance["revision"], instance["role"]) == ("r2", "permanent")
    assert Path(f"/proc/{instance['pid']}").exists()


def test_both_hosts_know_after_a_restart_whose_it_is(fleet: Any, clients: Any) -> None:
    fleet.calm()
    for host in ("alpha", "beta"):
        fleet.role("agents", host).kill()
        for place in (fleet.endpoint("rep"), fleet.endpoint("rep", "beta")):
            with clients(place, 1) as client:  # a host may take longer to come back than requests wait
                client.served_by("r2")
    fleet.alone("rep", "r2")


def test_a_revision_follows_on_the_new_host_and_the_agent_comes_home(fleet: Any, clients: Any) -> None:
    fleet.calm()
    with clients(fleet.endpoint("rep")) as asking:
        done = fleet.migrate("rep", "r1").done()
        assert done.code == 0, done
        asking.served_by("r1")
        done = fleet.migrate("rep", "r2", "rapid", "--host", "alpha").done()
        assert done.code == 0, done
        asking.served_by("r2")
    assert asking.failures == []
    assert answers_at(clients, fleet.endpoint("rep", "beta")) == "r2"
    status = fleet.cli("status", "--json").json
    assert status["agents"]["rep"]["host"] == "alpha"


def test_what_can_not_be_moved_is_told_so(fleet: Any) -> None:
    done = fleet.migrate("calc-b", "r2", "rapid", "--host", "gamma").done()
    assert done.code == 12, done
    assert "there is no host 'gamma'" in str(done.json)
