"""`interlock import`: what of a start-up list is understood, and the fleet file that comes of it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.broker.config import AgentConfig, load_fleet, parse_fleet
from interlock.coordinator.assess.startup import Entry, port_of, read_startup
from interlock.coordinator.cli import main
from interlock.coordinator.importing import Script, fleet_file
from interlock.coordinator.source_risk import source_risk

PROJECT = Path(__file__).parents[1] / "assess" / "fleet"


@pytest.mark.parametrize(
    ("value", "port"),
    [
        (7200, 7200), ("7200", 7200), ("${OFFSET}+7200", 7300), ("$OFFSET + 7200", 7300), ("7200 - 100", 7100),
        ("${MISSING:-7200}", 7200), ("${MISSING:7200}", 7200), ("${OFFSET:-7}", 100), ("(${OFFSET}+7200)", 7300),
        (0, 0), (70_000, 0), ("seven", 0), (True, 0), (None, 0), ([7200], 0), ("7200*2", 0), ("", 0), ("+", 0),
    ],
)  # fmt: skip
def test_a_port_is_a_number_or_a_sum_with_variables(value: object, port: int) -> None:
    assert port_of(value, {"OFFSET": "100"}) == (port, "")


def test_a_variable_that_is_not_set_is_taken_as_0_and_told() -> None:
    assert port_of("${OFFSET}+7200", {}) == (7200, "OFFSET is not set, and taken as 0")


ENTRY = {"script_path": "a/one.py", "port": 7200}


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ([{**ENTRY, "name": "One"}], [("One", "", "[0]")]),
        ({"agents": [ENTRY]}, [("one", "agents", "agents[0]")]),
        ({"agents": {"First": ENTRY}}, [("First", "agents", "agents.First")]),
        ({"groups": {"core": {"First": ENTRY}}}, [("First", "core", "groups.core.First")]),
        ({"core": [{"agents": [ENTRY]}]}, [("one", "agents", "core[0].agents[0]")]),
        ({"a": {"path": "run.sh", "port": 1}}, [("a", "", "a")]),
        ({"a": {"path": "/var/log"}}, []),
        (None, []),
        ("text", []),
    ],
)
def test_entries_stand_in_lists_and_in_mappings_by_group(tree: object, names: list[tuple[str, str, str]]) -> None:
    found = read_startup(tree, {})
    assert [(entry.name, entry.group, entry.place) for entry in found.entries] == names


def test_keys_have_the_names_that_people_use_and_others_are_kept() -> None:
    tree = {
        "settings": {"log": "INFO"},
        "agents": [
            {
                "name": "One", "script": "one.py", "zmq_port": 7200, "health_port": 8200, "depends_on": "Two, Three",
                "required": False, "args": "--fast '1 2'", "env": {"A": "${B}", "C": 3}, "gpu": True, "port": "many",
            }
        ],
    }  # fmt: skip
    found = read_startup(tree, {"B": "b"})
    (entry,) = found.entries
    assert (entry.health, entry.depends, entry.required) == (8200, ("Two", "Three"), False)
    assert (entry.arguments, entry.environment) == (("--fast", "1 2"), (("A", "b"), ("C", "3")))
    assert entry.port == 0
    assert entry.unknown == {"gpu": True, "port": "many", "zmq_port": 7200}
    assert found.unknown == {"settings": {"log": "INFO"}}


def test_aliases_that_multiply_and_aliases_of_themselves_end() -> None:
    inner: list[Any] = [1]
    for _ in range(30):
        inner = [inner] * 9
    circle: dict[str, Any] = {"entry": ENTRY}
    circle["again"] = circle
    assert read_startup({"bomb": inner}, {}).entries == []
    assert len(read_startup(circle, {}).entries) >= 1


# --- the fleet file


def made(
    entries: list[Entry], script: Script | None = None, **changes: Any
) -> tuple[dict[str, AgentConfig], list[str]]:
    scripts = {entry.place: script or Script(".", "one.py", **changes) for entry in entries}
    found = fleet_file(entries, scripts, {}, name="f", host="main", address="127.0.0.1", origin="list.yaml")
    return parse_fleet(tomllib.loads(found.text)).agents, found.notes


def entry(name: str = "one", place: str = "", **changes: Any) -> Entry:
    return Entry(name, "one.py", "", place or name, **{"port": 7200, **changes})


@pytest.mark.parametrize(
    ("kind", "health", "port", "endpoint", "probe"),
    [
        ("zmq", "zmq", 8200, "tcp://127.0.0.1:7200", ("zmq", "health", {"status": "ok"})),
        ("zmq", "http", 8200, "tcp://127.0.0.1:7200", ("http", "health", {})),
        ("http", "http", 0, "http://127.0.0.1:7200", ("http", "request", {})),
        ("stream", "zmq", 0, "stream://127.0.0.1:7200", ("tcp", "request", {})),
        ("zmq", "zmq", 7200, "tcp://127.0.0.1:7200", ("zmq", "request", {"status": "ok"})),
    ],
)
def test_the_probe_asks_what_the_script_speaks_where_it_answers(
    kind: str, health: str, port: int, endpoint: str, probe: tuple[str, str, dict[str, str]]
) -> None:
    agents, _ = made([entry(health=port)], kind=kind, health=health)
    revision = agents["one"].revisions["v1"]
    assert agents["one"].endpoint == endpoint
    assert revision.probe is not None
    assert (revision.probe.kind, revision.probe.port, revision.probe.expect) == probe
    pairs = ["7200={port}"] + (["8200={health_port}"] if port == 8200 else [])
    assert revision.command == ["{python}", "-P", "-m", "interlock.agents.fixed_ports", *pairs, "one.py"]


def test_a_script_without_a_port_has_no_endpoint_and_runs_as_it_is() -> None:
    agents, _ = made([entry(port=0)])
    assert agents["one"].endpoint == ""
    assert agents["one"].revisions["v1"].command == ["{python}", "one.py"]


def test_names_that_do_not_fit_are_changed_and_told_and_what_is_needed_keeps_its_meaning() -> None:
    agents, notes = made(
        [
            entry("Größe 1", depends=("gr-e-1", "two words", "far")),
            entry("two words", port=7201),
            entry("TWO-WORDS", port=7202),
        ]
    )
    assert list(agents) == ["Gr-e-1", "two-words", "TWO-WORDS-2"]
    assert agents["Gr-e-1"].depends == ["two-words"]
    assert "two words is called two-words here" in notes
    assert "Gr-e-1: it needs far, which is no agent of the list; it stays as a comment" in notes


def test_a_port_that_stands_twice_belongs_to_the_first_and_nobody_needs_the_second() -> None:
    agents, notes = made([entry("a"), entry("b"), entry("c", port=7201, depends=("b", "a"))])
    assert list(agents) == ["a", "c"]
    assert agents["c"].depends == ["a"]
    assert "b is left out: port 7200 is a's already" in notes


def test_the_ports_of_the_bus_and_the_host_make_way() -> None:
    found = fleet_file(
        [entry(port=7171), entry("two", port=7180)], {"one": Script(".", "a.py"), "two": Script(".", "b.py")}, {},
        name="f", host="main", address="0.0.0.0", origin="x",
    )  # fmt: skip
    fleet = parse_fleet(tomllib.loads(found.text))
    assert (fleet.broker.events, fleet.broker.feed) == ("tcp://127.0.0.1:7172", "tcp://127.0.0.1:7173")
    assert fleet.hosts["main"].control == "tcp://127.0.0.1:7181"
    assert fleet.agents["one"].endpoint == "tcp://0.0.0.0:7171"


def test_braces_in_arguments_are_left_out_and_told() -> None:
    agents, notes = made([entry(arguments=("--x", "{port}"), environment=(("A", "{b}"), ("C", '"\\\n')))])
    assert agents["one"].revisions["v1"].command[-2:] == ["one.py", "--x"]
    assert agents["one"].revisions["v1"].env == {"C": '"\\\n'}
    assert len([note for note in notes if "braces" in note]) == 2


WORDS = st.one_of(
    st.text(max_size=12), st.sampled_from(["name", "port", "script_path", "a.py", "7200", "health", "args", "env"])
)
TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=5)),
    max_leaves=20,
)


@given(
    st.lists(
        st.dictionaries(WORDS, TREES, max_size=6).map(lambda tree: {**tree, "script": "a.py"}), min_size=1, max_size=4
    ),
    TREES,
)
@settings(max_examples=40, deadline=None)
def test_whatever_stands_in_a_list_the_file_that_comes_of_it_is_one(entries: list[dict[str, Any]], more: Any) -> None:
    found = read_startup({"agents": entries, "more": more}, {})
    scripts = {each.place: Script("source", "a.py") for each in found.entries}
    text = fleet_file(
        found.entries, scripts, found.unknown, name="f", host="main", address="127.0.0.1", origin="l"
    ).text
    tree = tomllib.loads(text)
    variables = [pair for each in found.entries for pair in each.environment]
    if all(name and "=" not in name and "\0" not in name + value for name, value in variables):
        parse_fleet(tree)


# --- the verb


def test_a_list_of_groups_becomes_a_file_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fleet.toml"
    given = str(PROJECT / "config" / "startup_config.yaml")
    assert main(["import", given, "--out", str(out), "--set", "PORT_OFFSET=100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    fleet = load_fleet(out)
    assert told["agents"] == list(fleet.agents) == ["Registry", "Memory", "Speech"]
    assert fleet.agents["Registry"].endpoint == "http://127.0.0.1:7300"
    assert fleet.agents["Speech"].category == "gpu-model"
    assert (tmp_path / fleet.agents["Memory"].revisions["v1"].source).resolve() == PROJECT / "services"
    assert "Gone is left out: there is no script services/gone.py" in told["notes"]
    assert "Echo is left out: port 7201 is Memory's already" in told["notes"]
    assert main(["import", given, "--out", str(out)]) == 12
    assert "is there already" in capsys.readouterr().err


def test_the_folder_of_a_revision_holds_all_that_the_script_imports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {
        "config/list.yaml": "- {path: agents/voice/one.py, port: 7200}\n- {path: agents/two.py, port: 7201}\n",
        "agents/voice/one.py": "from common.net import answer\nimport near\nanswer()\n",
        "agents/voice/near.py": "",
        "agents/two.py": "import zmq\nprint('alone')\n",
        "common/__init__.py": "",
        "common/net.py": "import zmq\n\n\ndef answer():\n    zmq.Context().socket(zmq.REP).bind('tcp://*:7200')\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert main(["import", str(tmp_path / "config/list.yaml"), "--out", str(tmp_path / "config" / "fleet.toml")]) == 0
    agents = load_fleet(tmp_path / "config" / "fleet.toml").agents
    one, two = agents["one"].revisions["v1"], agents["two"].revisions["v1"]
    assert (one.source, one.command[-1], one.env) == ("..", "agents/voice/one.py", {"PYTHONPATH": "{source}"})
    assert (two.source, two.command[-1], two.env) == ("../agents", "two.py", {})
    assert "2 agents on host main" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("agents: []\n", "holds no entry of a start-up list"),
        ("a: [\n", "is not YAML"),
        ("", "holds no entry"),
    ],
)
def test_a_file_that_is_no_list_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (tmp_path / "list.yaml").write_text(text)
    assert main(["import", str(tmp_path / "list.yaml")]) == 2
    assert said in capsys.readouterr().err
    assert main(["import", str(tmp_path / "list.yaml"), "--set", "nothing"]) == 2
    assert main(["import", str(tmp_path / "missing.yaml")]) == 2


# --- the risk that a plan shows


def planned(tmp_path: Path, revision: str) -> Any:
    config = tmp_path / "fleet.toml"
    config.write_text(
        '[hosts.alpha]\ncontrol = "tcp://127.0.0.1:7180"\n'
        '[agents.one]\nhost = "alpha"\nendpoint = "tcp://127.0.0.1:7201"\nserve = "v1"\nlevel = "low"\n'
        f"[agents.one.revisions]\nv1 = {{ {revision} }}\n"
    )
    return trio.run(source_risk, load_fleet(config), "one", "v1")


def test_a_plan_has_the_score_of_the_class_or_the_script_that_the_revision_names(tmp_path: Path) -> None:
    found = planned(tmp_path, f'source = "{PROJECT.parent / "sockets"}", entry = "agent:Talker"')
    assert (found.score, found.level, found.problem) == (8, "low", "")
    assert found.factors == ["manages its own sockets (agent.py:14)"]
    probe = 'probe = { kind = "tcp", port = "request" }'
    source = PROJECT.parent / "broken"
    found = planned(tmp_path, f'source = "{source}", command = ["{{python}}", "old.py", "{{port}}"], {probe}')
    assert (found.score, found.level) == (34, "high")
    assert found.problem.startswith("old.py:14:")


def test_a_plan_knows_no_score_of_what_it_does_not_find(tmp_path: Path) -> None:
    probe = 'probe = { kind = "tcp", port = "request" }'
    assert planned(tmp_path, f'source = "{PROJECT.parent / "sockets"}", entry = "agent:Other"') is None
    assert planned(tmp_path, f'source = "missing", command = ["run"], {probe}') is None
    assert planned(tmp_path, f'source = "{PROJECT}", command = ["run", "{{port}}"], {probe}') is None
