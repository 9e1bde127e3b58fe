"""Migrations of every kind of agent through the command line, good ones and bad ones, on a fleet that stays up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

AGENTS = ["calc", "rep", "web"]
DECIDED_BY = {
    "die": "host process-died",
    "sick": "host health-failed",
    "hang": "host health-failed",
    "bad": "rule badness",  # by the agent's own gauge
}


@pytest.fixture(scope="module")
def fleet(make_module_fleet: Callable[..., Any], own_python: Path) -> Iterator[Any]:
    made = make_module_fleet({"calc": "alpha", "rep": "alpha", "web": "alpha"})
    with made.path.open("a") as file:
        file.write(f'[agents.calc.revisions.own]\nsource = "own"\nentry = "calc:Own"\npython = "{own_python}"\n')
    (made.folder / "own").mkdir()
    (made.folder / "own" / "calc.py").write_text(
        (made.folder / "calc" / "calc.py").read_text()
        + "\nimport sys\nclass Own(Calc):\n"
        + '    @handler("where")\n    def where(self) -> dict:\n        return {"prefix": sys.prefix}\n'
    )
    made.start()
    yield made
    assert made.stop() == 0
    made.nothing_left()


@contextmanager
def loaded(fleet: Any, clients: Any, agents: list[str]) -> Iterator[dict[str, Any]]:
    """Clients at each of these agents; none of them may get a wrong answer, or none."""
    with ExitStack() as stack:
        loads = {agent: stack.enter_context(clients(fleet.endpoint(agent))) for agent in agents}
        yield loads
    assert {agent: load.failures for agent, load in loads.items()} == {agent: [] for agent in agents}


def test_good_revisions_are_committed_and_no_request_is_lost(fleet: Any, clients: Any) -> None:
    fleet.calm()
    since = len(fleet.events.events)
    to = {agent: fleet.other(agent) for agent in AGENTS}
    with loaded(fleet, clients, AGENTS) as loads:
        commands = {agent: fleet.migrate(agent, to[agent]) for agent in AGENTS}
        for agent, command in commands.items():
            done = command.done()
            assert done.code == 0, done
            assert (done.json["outcome"], done.json["agent"], done.json["to"]) == ("committed", agent, to[agent])
            loads[agent].served_by(to[agent])
    for agent in AGENTS:
        fleet.alone(agent, to[agent])
        assert fleet.events.wait("instance-stopped", since, agent=agent)["role"] == "permanent"


@pytest.mark.parametrize("what", list(DECIDED_BY))
def test_bad_revisions_are_rolled_back_and_no_request_is_lost(what: str, fleet: Any, clients: Any) -> None:
    fleet.calm()
    agents = ["calc"] if what == "bad" else AGENTS
    old, since = {agent: fleet.serving(agent) for agent in agents}, len(fleet.events.events)
    with loaded(fleet, clients, agents) as loads:
        for agent in agents:
            fleet.trigger(agent, "")
        commands = {agent: fleet.migrate(agent, "odd", "staged") for agent in agents}
        for agent in agents:
            fleet.observed(agent, since)
            loads[agent].served_by("odd")
        for agent in agents:
            fleet.trigger(agent, what)
        for agent in agents:
            done = commands[agent].done()
            assert done.code == 10, done
            assert done.json["decided_by"] == DECIDED_BY[what]
            assert done.json["rollback"]["revision"] == old[agent]
            loads[agent].served_by(old[agent])
    for agent in agents:
        fleet.alone(agent, old[agent])


def test_an_operator_undoes_a_migration(fleet: Any, clients: Any) -> None:
    fleet.calm()
    old, since = fleet.serving("calc"), len(fleet.events.events)
    with clients(fleet.endpoint("calc")) as load:
        command = fleet.migrate("calc", fleet.other("calc"), "staged")
        fleet.observed("calc", since)
        undone = fleet.cli("rollback", "calc", "--reason", "changed my mind", "--json")
        done = command.done()
        load.served_by(old)
    assert undone.code == 0, undone
    assert undone.json["outcome"] == "rolled-back"
    assert done.code == 10, done
    assert done.json["decided_by"] == "operator"
    assert done.json["reason"] == "changed my mind"
    assert load.failures == []


def test_an_agent_moves_to_an_interpreter_of_its_own(fleet: Any, clients: Any, own_python: Path) -> None:
    fleet.calm()
    back = fleet.other("calc")
    with clients(fleet.endpoint("calc")) as load:
        done = fleet.migrate("calc", "own").done()
        assert done.code == 0, done
        load.served_by("own")
        pid = fleet.alone("calc", "own")
        assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(str(own_python).encode() + b"\0")
        done = fleet.migrate("calc", back).done()  # `where` is gone there, so the contract says no
        assert done.code == 10, done
        assert "where" in done.json["reason"]
        load.served_by("own")
    assert load.failures == []


def test_status_and_watch_say_in_json_what_there_is(fleet: Any) -> None:
    fleet.calm()
    serving = {agent: fleet.serving(agent) for agent in AGENTS}
    status = fleet.cli("status", "--json")
    assert status.code == 0, status
    tree = status.json
    assert tree["hosts"]["alpha"]["condition"] == "up"
    assert sorted(tree["hosts"]["alpha"]["agents"]) == AGENTS
    assert {name: agent["permanent"] for name, agent in tree["agents"].items()} == serving
    assert {agent["state"] for agent in tree["agents"].values()} == {"serving"}
    assert tree["alerts"] in ([], {})

    watch = fleet.start_cli("watch", "--telemetry", "--json", "telemetry/alpha/")
    assert watch.process.stdout is not None
    seen: set[str] = set()
    for line in watch.process.stdout:
        sample = json.loads(line)
        assert sample["plane"] == "telemetry"
        assert sample["labels"]["host"] == "alpha"
        seen.add(sample["name"])
        if {"agent_up", "agent_badness", "host_load1", "agent_process_memory_rss_bytes"} <= seen:
            break
    watch.process.terminate()
    assert watch.done().code == 143  # as of whatever SIGTERM ended
    numbers = [event["seq"] for event in fleet.events.events]
    assert numbers == list(range(1, len(numbers) + 1))


def test_what_was_committed_serves_after_everything_was_restarted(fleet: Any, clients: Any) -> None:
    fleet.calm()
    serving = {agent: fleet.serving(agent) for agent in AGENTS}
    assert fleet.stop() == 0, fleet.log
    fleet.nothing_left()
    fleet.start()
    for agent in AGENTS:
        with clients(fleet.endpoint(agent), 1) as load:
            load.served_by(serving[agent])
        assert load.failures == []
