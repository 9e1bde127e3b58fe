"""Five agents of a whole fleet, under load, in one wave: what goes wrong with the third takes all of them back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

AGENTS = [f"calc-{letter}" for letter in "abcde"]
HEAD = """
    name = "test"
    state = "state"
    [rules]
    files = ["rules.yaml"]
    [monitor]
    gpu = "none"
    [coordinator]
    lease_s = 6.0
    [strategies.rapid]  # what is judged here is the wave: a machine that is busy makes nobody slow
    baseline_s = 0.2
    observation_s = 1.5
    [strategies.rapid.observe]
    latency_passed = 99.0
    latency_failed = 100.0
    slow_passed = 0.98
    slow_failed = 0.99
    memory_passed = 9.0
    [strategies.staged]  # of calc-c: it is still under way when a wave is stopped
    baseline_s = 0.2
    observation_s = 100.0
"""


@pytest.fixture(scope="module")
def running(make_module_fleet: Callable[..., Any]) -> Iterator[Any]:
    made = make_module_fleet(dict.fromkeys(AGENTS, "alpha"), head=HEAD)
    text = made.path.read_text()
    for before, agent in pairwise(AGENTS):
        text = text.replace(f"[agents.{agent}]\n", f'[agents.{agent}]\ndepends = ["{before}"]\n')
    head, here, tail = text.partition("[agents.calc-c]")
    made.path.write_text(head + here + tail.replace('level = "low"', 'level = "medium"', 1))
    made.start()
    yield made
    assert made.stop() == 0, made.log
    made.nothing_left()


def test_a_bad_third_one_takes_all_back_in_reverse_order_also_with_a_coordinator_that_is_killed(
    running: Any, clients: Any
) -> None:
    fleet = running
    fleet.calm()
    plan = fleet.folder / "plan.toml"
    revisions = "".join(f'{agent} = "{"odd" if agent == "calc-c" else "r2"}"\n' for agent in AGENTS)
    plan.write_text(f"budget = 0\n[revisions]\n{revisions}")
    fleet.trigger("calc-c", "bad")
    since = len(fleet.events.events)
    with ExitStack() as stack:
        loads = {agent: stack.enter_context(clients(fleet.endpoint(agent), 1)) for agent in AGENTS}
        command = fleet.start_cli("wave", "start", "--plan", str(plan), "--json")
        fleet.events.wait("migration-started", since, agent="calc-b")
        fleet.role("coordinator", "coordinator").kill()
        done = command.done(120.0)
        for load in loads.values():
            load.served_by("r1")
    assert done.code == 10, done
    assert {each["agent"]: each["state"] for each in done.json["members"]} == {
        "calc-a": "gone-back", "calc-b": "gone-back", "calc-c": "rolled-back", "calc-d": "left-out",
        "calc-e": "left-out",
    }  # fmt: skip
    bodies = [event["body"] for event in fleet.events.events[since:]]
    began = [(body["agent"], body["to"]) for body in bodies if body["type"] == "migration-started"]
    assert began == [("calc-a", "r2"), ("calc-b", "r2"), ("calc-c", "odd"), ("calc-b", "r1"), ("calc-a", "r1")]
    assert [failure for load in loads.values() for failure in load.failures] == []
    for agent in AGENTS:
        fleet.alone(agent, "r1")

    listed = fleet.cli("wave", "list", "--json").json["waves"][-1]
    assert (listed["outcome"], listed["id"]) == ("rolled-back", done.json["wave"])
    shown = fleet.cli("wave", "status")
    assert shown.code == 0, shown
    assert "gone-back" in shown.out
    assert fleet.cli("wave", "stop").code == 12
    _the_record_of_the_bad_one(fleet)


def _the_record_of_the_bad_one(fleet: Any) -> None:
    """What the log says is what the coordinator kept, and says what decided."""
    told = fleet.cli("report", "calc-c", "--json")
    assert told.code == 0, told
    assert (told.json["outcome"], told.json["decided_by"]) == ("rolled-back", "rule badness")
    assert told.json["deciding"] == ["agent_badness"]
    assert told.json["wave"].startswith("wave-")
    assert told.json["rules"][0]["expr"] == "agent_badness > 0.5"
    explained = fleet.cli("explain", "calc-c")
    assert "Rule badness fired (event" in explained.out, explained
    page = fleet.folder / "page.html"
    assert fleet.cli("report", told.json["migration"], "--html", str(page)).code == 0
    parser = HTMLParser()
    parser.feed(page.read_text())
    assert "<polyline" in page.read_text()
    kept = fleet.folder / "state" / "coordinator" / "records" / f"{told.json['migration']}.json"
    assert json.loads(kept.read_text())["timeline"] == told.json["timeline"]
    undone = fleet.cli("history", "calc-c", "--outcome", "rolled-back", "--json").json["migrations"]
    assert [each["id"] for each in undone] == [told.json["migration"]]


def test_a_good_one_moves_all_of_them_and_a_stop_with_undo_moves_them_back(running: Any) -> None:
    fleet = running
    fleet.trigger("calc-c", "")
    fleet.calm()
    done = fleet.cli(
        "wave", "start", "--to", "r2", "--agents", "calc-a,calc-e", "--parallel", "2", "--json", timeout=120
    )
    assert done.code == 0, done
    assert {each["state"] for each in done.json["members"]} == {"committed"}
    since = len(fleet.events.events)
    begun = fleet.cli("wave", "start", "--to", "r2", "--detach", "--json")
    assert begun.code == 0, begun
    fleet.events.wait("migration-started", since, agent="calc-c")
    assert fleet.cli("wave", "status", "--json").json["wave"] == begun.json["wave"]
    undone = fleet.cli("wave", "stop", "--undo", "--because", "it was a rehearsal", timeout=120)
    assert undone.code == 0, undone
    for agent, revision in (("calc-a", "r2"), ("calc-b", "r1"), ("calc-c", "r1"), ("calc-e", "r2")):
        fleet.alone(agent, revision)
