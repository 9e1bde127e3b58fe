"""`interlock assess`: the tree on disk, the processes that read it, and what is shown."""

from __future__ import annotations

import html.parser
import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import trio

from interlock.broker.errors import ConfigError
from interlock.coordinator.assess import pool, walking, worker
from interlock.coordinator.assess.report import Report
from interlock.coordinator.assess.sarif import RULES, sarif
from interlock.coordinator.assess.settings import EXCLUDED, Settings, parse_settings
from interlock.coordinator.assess_verb import examine
from interlock.coordinator.cli import main

PROJECTS = Path(__file__).parents[1] / "assess"
AGENT = "from base import BaseAgent\nclass {}(BaseAgent): ...\n"


def examined(*paths: Path, settings: Settings | None = None) -> Report:
    return trio.run(examine, list(paths), settings or Settings(), 1)[1]


def names(found: Report) -> list[str]:
    return [agent.name for agent in found.agents]


# --- the tree


def test_links_lead_round_in_circles_and_each_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "agent.py").write_text(AGENT.format("One"))
    (tmp_path / "a" / "again.py").symlink_to("agent.py")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self.py").symlink_to("self.py")
    (tmp_path / "a" / "nowhere.py").symlink_to("missing.py")
    os.mkfifo(tmp_path / "a" / "pipe.py")
    found = examined(tmp_path)
    assert names(found) == ["One"]
    assert sorted(found.notes) == [
        "a/pipe.py: is no ordinary file",
        "nowhere.py: No such file or directory",
        "self.py: Too many levels of symbolic links",
    ]


def test_excludes_are_names_or_paths_and_those_that_ship_can_be_dropped(tmp_path: Path) -> None:
    for name in ("keep.py", "old_keep.py", "tests/mock.py", "lib/inner/deep.py", ".venv/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(AGENT.format(Path(name).stem.title().replace("_", "")))

    def seen(**changes: Any) -> list[str]:
        return sorted(names(examined(tmp_path, settings=Settings(**changes))))

    assert seen() == ["Deep", "Keep", "OldKeep"]
    assert seen(exclude=("old_*", "lib/inner/*")) == ["Keep"]
    assert seen(shipped_excludes=False) == ["Deep", "Keep", "Mock", "OldKeep", "X"]


def test_what_is_named_is_read_though_an_exclude_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "agent.py").write_text(AGENT.format("One"))
    assert "tests" in EXCLUDED
    assert names(examined(tmp_path)) == []
    assert names(examined(tmp_path / "tests")) == ["One"]
    assert names(examined(tmp_path / "tests" / "agent.py")) == ["One"]


def test_several_paths_are_one_tree(tmp_path: Path) -> None:
    for name, text in {"one/base.py": "class BaseAgent: ...\n", "two/agent.py": AGENT.format("One")}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    found = examined(tmp_path / "one", tmp_path / "two")
    assert (names(found), found.base_classes, found.files) == (["One"], ["one/base.py:BaseAgent"], 2)


def test_a_path_that_there_is_not_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assess", str(tmp_path / "missing")]) == 2
    assert "missing: there is no such file or folder" in capsys.readouterr().err


def test_ten_thousand_files_are_walked_and_counted(tmp_path: Path) -> None:
    for folder in range(100):
        (tmp_path / str(folder)).mkdir()
        for number in range(100):
            (tmp_path / str(folder) / f"m{number}.py").touch()
    assert len(walking.walk([tmp_path], EXCLUDED).sources) == 10_000


def test_of_python_s_own_library_the_http_server_is_one_and_json_is_none() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    found = examined(library / "http", library / "json", library / "sqlite3")
    assert names(found) == ["server"]
    (server,) = found.agents
    assert (server.file, server.kind, server.migratable, found.broken) == ("http/server.py", "module", True, [])
    assert {"no_base", "sockets", "threads"} <= {factor.factor for factor in server.factors}


# --- processes


async def test_a_file_that_ends_or_stalls_the_process_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.py", "b.py", "c.py", "d.py"):
        (tmp_path / name).write_text("x = 1\n")
    bad = (
        "import os, sys, time\nfrom pathlib import Path\nfrom interlock.coordinator.assess import worker\n"
        "plain = worker.answer\n"
        "def answer(root, question, limit):\n"
        "    if question.path == 'b.py': os._exit(1)\n"
        "    if question.path == 'c.py': time.sleep(600)\n"
        "    return plain(root, question, limit)\n"
        "worker.answer = answer\nworker.main(Path(sys.argv[1]), int(sys.argv[2]))\n"
    )
    (tmp_path / "bad.txt").write_text(bad)
    plain = trio.lowlevel.open_process
    started = []

    async def open_process(command: list[str], **options: Any) -> trio.Process:
        process = await plain([command[0], str(tmp_path / "bad.txt"), *command[-2:]], **options)
        started.append(process)
        return process

    monkeypatch.setattr(pool.trio.lowlevel, "open_process", open_process)
    monkeypatch.setattr(pool, "FILE_S", 3.0)
    modules, unread = await pool.read_all(tmp_path, ["a.py", "b.py", "c.py", "d.py"], limit=1000, workers=1)
    problems = {module.path: module.problem.message if module.problem else "" for module in modules}
    assert problems == {
        "a.py": "", "b.py": "ended the process that read it", "c.py": "was not read within 3 s", "d.py": "",
    }  # fmt: skip
    assert unread == []
    assert len(started) == 3
    assert all(process.returncode is not None for process in started)


def test_a_file_that_went_away_is_noted(tmp_path: Path) -> None:
    assert worker.answer(tmp_path, worker.Question("gone.py"), 100).unread == "No such file or directory"


# --- what concerns all agents


def test_a_start_up_list_gives_ports_dependencies_clashes_and_circles() -> None:
    found = examined(PROJECTS / "fleet")
    assert found.graph.edges == [
        ("Echo", "Registry"), ("Memory", "Registry"), ("Memory", "Speech"), ("Speech", "Echo"), ("Speech", "Memory"),
    ]  # fmt: skip
    assert [(clash.port, clash.agents) for clash in found.graph.clashes] == [(7201, ["Echo", "Memory"])]
    assert found.graph.cycles == [["Memory", "Speech"]]
    registry = next(agent for agent in found.agents if agent.name == "Registry")
    assert [each.endpoint for each in registry.binds] == ["tcp://0.0.0.0:7200", "tcp://*:8200"]
    assert registry.listed == "agent_groups.core.Registry"
    assert "agent_groups.voice.Gone: Gone: there is no script services/gone.py" in found.notes
    assert "Echo: its start-up list says that it needs Nobody, which is no agent here" in found.notes


def test_the_second_matrix_weighs_what_the_first_does_not_see() -> None:
    weighed = {agent.name: agent.weighed for agent in examined(PROJECTS / "fleet").agents}
    assert weighed["Speech"].found["gpu"] == "memory"
    assert weighed["Speech"].values == {"size": 5, "gpu": 30, "threading": 5, "databases": 0, "criticality": 15}
    assert weighed["Speech"].total == pytest.approx(0.3 * 5 + 0.25 * 30 + 0.2 * 5 + 0.1 * 15)
    assert weighed["Registry"].found["criticality"] == "important"
    assert weighed["Echo"].found["criticality"] == "important"  # Speech connects to its port


def test_adoption_levels_and_total_risk_are_counted() -> None:
    found = examined(PROJECTS)
    assert found.derive == sum(agent.base != "" for agent in found.agents) < len(found.agents)
    assert found.total_risk == sum(agent.score for agent in found.agents)
    assert sum(found.levels.values()) == len(found.agents)


def test_what_does_not_parse_compile_or_import_can_not_be_migrated_whatever_its_score() -> None:
    found = {agent.name: agent for agent in examined(PROJECTS / "broken").agents}
    reasons = {name: (agent.problem.file, agent.problem.line) for name, agent in found.items() if agent.problem}
    assert reasons == {"old": ("old.py", 14), "Cut": ("cut.py", 9), "User": ("half.py", 1), "Late": ("late.py", 8)}
    assert {name: agent.estimated for name, agent in found.items()} == {
        "old": True, "Cut": True, "User": False, "Late": False,
    }  # fmt: skip
    assert all(not agent.migratable for agent in found.values())


def test_the_same_agent_in_two_places_is_named(tmp_path: Path) -> None:
    body = "".join(f"    def m{n}(self):\n        return {n}\n" for n in range(5))
    (tmp_path / "one.py").write_text(f"from base import BaseAgent\nclass One(BaseAgent):\n{body}")
    (tmp_path / "two.py").write_text(f"from base import BaseAgent\n\n# copied\nclass Two(BaseAgent):\n\n{body}")
    (tmp_path / "three.py").write_text("from base import BaseAgent\nclass One(BaseAgent):\n    x = 1\n")
    found = examined(tmp_path)
    assert [(each.why, each.agents) for each in found.duplicates] == [
        ("same code", ["One (one.py)", "Two"]), ("same name", ["One (one.py)", "One (three.py)"]),
    ]  # fmt: skip


def test_a_base_class_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "core.py").write_text("class Creature: ...\n")
    (tmp_path / "agent.py").write_text("import core as c\nclass Cat(c.Creature): ...\n")
    assert names(examined(tmp_path)) == []
    for name in ("Creature", "core.Creature"):
        assert names(examined(tmp_path, settings=Settings(base_classes=(name,)))) == ["Cat"]
    assert main(["assess", str(tmp_path), "--base", "Creature", "--json"]) == 0


# --- what is shown


def test_the_exit_code_tells_whether_an_agent_is_above_a_level(capsys: pytest.CaptureFixture[str]) -> None:
    def code(project: str, level: str) -> int:
        return main(["assess", str(PROJECTS / project), "--fail-above", level, "--workers", "1"])

    assert code("plain", "low") == 0
    assert code("aliases", "low") == 13
    assert code("aliases", "high") == 0
    assert code("broken", "critical") == 13  # what can't be migrated is above every level
    assert "can't be migrated: old.py:14:" in capsys.readouterr().out


def test_the_table_and_the_details_name_places(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assess", str(PROJECTS / "sockets"), "--details"]) == 0
    shown = capsys.readouterr().out
    assert "1 agent in 2 files: 1 low" in shown
    assert "1 of 1 derive from an agent base class; total risk 8" in shown
    assert '      agent.py:15: self.socket.bind(f"tcp://*:{port}")' in shown
    assert "binds tcp://*:7301 (agent.py:15)" in shown


def test_json_has_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assess", str(PROJECTS / "database"), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    agent = tree["agents"][0]
    assert (agent["score"], agent["level"], agent["strategy"], agent["databases"]) == (3, "low", "rapid", ["sqlite3"])
    assert agent["factors"][0]["places"] == [
        {"file": "agent.py", "line": 8, "code": 'self.store = sqlite3.connect("memory.db")', "what": "sqlite3.connect"}
    ]


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name in ("src", "href") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_escapes_what_stands_in_the_source(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(
        "import threading\nfrom base import BaseAgent\nclass One(BaseAgent):\n"
        '    def f(self): threading.Thread(name="<script>alert(1)</script>")\n'
    )
    page = tmp_path / "page.html"
    assert main(["assess", str(tmp_path), "--html", str(page)]) == 0
    found = Page()
    found.feed(page.read_text("utf-8"))
    assert "script" not in found.tags
    assert "<script>alert(1)</script>" in found.text


def test_sarif_names_rules_places_and_code(tmp_path: Path) -> None:
    file = tmp_path / "found.sarif"
    assert main(["assess", str(PROJECTS), "--sarif", str(file)]) == 0
    tree = json.loads(file.read_text("utf-8"))
    assert tree["version"] == "2.1.0"
    (run,) = tree["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert rules == list(RULES)
    assert run["originalUriBaseIds"]["ROOT"]["uri"].endswith("/tests/assess/")
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("note", "warning", "error")
        place = result["locations"][0]["physicalLocation"]
        assert place["region"]["startLine"] >= 1
        assert (PROJECTS / place["artifactLocation"]["uri"]).is_file()
    shown = {
        (each["ruleId"], each["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]) for each in run["results"]
    }
    assert {("does-not-parse", "broken/old.py"), ("port-clash", "fleet/services/echo.py")} <= shown
    assert ("threads", "threads/agent.py") in shown


def test_sarif_of_an_empty_tree_is_whole(tmp_path: Path) -> None:
    tree = sarif(examined(tmp_path), tmp_path.as_uri())
    assert tree["runs"][0]["results"] == []


# --- settings


def test_points_bounds_and_limits_can_be_set(tmp_path: Path) -> None:
    file = tmp_path / "assess.toml"
    file.write_text("[points]\nsockets = 30\n[levels]\nlow = 5\nmedium = 10\nhigh = 29\n")
    assert main(["assess", str(PROJECTS / "sockets"), "--config", str(file), "--fail-above", "high"]) == 13


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[points]\nsocket = 3\n", "socket"),
        ("exclude = 3\n", "exclude"),
        ("[levels]\nlow = 30\n", "the levels' bounds must rise"),
        ("[points]\nsockets = -1\n", "points can't be negative"),
        ("x = ", "Invalid value"),
    ],
)
def test_settings_that_are_wrong_are_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"assess\.toml") as caught:
        parse_settings(text, where="assess.toml")
    assert said in str(caught.value)
