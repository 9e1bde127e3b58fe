"""`--check`: what it says of code that is an agent, and of code that is not."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from interlock.agents.run import load, main
from interlock.agents.serving import Spec


def run_module(spec: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "interlock.agents.run", "--spec", str(spec), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def write(tmp_path: Path, source: str, entry: str = "subject:Subject") -> Path:
    (tmp_path / "subject.py").write_text(textwrap.dedent(source))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"agent": "a", "entry": entry, "source": str(tmp_path), "unknown": "key"}))
    return spec


def checked(tmp_path: Path, source: str, entry: str = "subject:Subject") -> tuple[int, dict[str, Any]]:
    done = run_module(write(tmp_path, source, entry), "--check")
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


def test_a_good_agent_is_described_and_nothing_is_written_into_its_source(tmp_path: Path) -> None:
    source = """
        import os
        from interlock.agents.agent import Agent, handler
        print("noise of an import")
        os.system("echo noise of its child")

        class Subject(Agent):
            @handler("ask", idempotent=True)
            async def ask(self, question: str, limit: int = 3) -> dict: ...
    """
    code, report = checked(tmp_path, source)
    assert code == 0
    parameters = {"question": "str", "limit": "int = ..."}
    assert report == {
        "ok": True,
        "handlers": {"ask": {"idempotent": True, "side_effects": False, "parameters": parameters}},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spec.json", "subject.py"]


@pytest.mark.parametrize(
    ("source", "error", "line"),
    [
        ("import trio\ndef broken(:\n    pass\n", "SyntaxError: invalid syntax", 2),
        ("import os\n\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'", 3),
        ("def f():\n    return 1 / 0\nf()\n", "ZeroDivisionError: division by zero", 2),
        ("import sys\nsys.exit(4)\n", "SystemExit: 4", 2),
        ("\n\nclass Subject:\n    pass\n", "Subject is not a subclass of interlock.agents.agent.Agent", 3),
        ("Other = 1\n", "there is no Subject in module subject", 0),
        (
            "from interlock.agents.agent import Agent, handler\n"
            "class Subject(Agent):\n    @handler('a')\n    async def a(self, *all): ...\n",
            "handler a: argument 'all' can't be given by name",
            3,
        ),
    ],
)
def test_a_fault_is_reported_with_its_file_and_line(tmp_path: Path, source: str, error: str, line: int) -> None:
    code, report = checked(tmp_path, source)
    assert code == 3
    assert report == {"ok": False, "error": error, "file": str(tmp_path / "subject.py"), "line": line}


def test_a_fault_in_a_second_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text("x = (\n")
    code, report = checked(tmp_path, "import part\n")
    assert code == 3
    assert (report["file"], report["line"]) == (str(tmp_path / "part.py"), 1)
    (tmp_path / "part.py").write_text("\n\nfrom os import no_such_name\n")
    code, report = checked(tmp_path, "import part\n")
    assert (report["file"], report["line"]) == (str(tmp_path / "part.py"), 3)


def test_an_entry_that_is_not_there_is_said_without_a_line(tmp_path: Path) -> None:
    _, report = checked(tmp_path, "", entry="nowhere:Subject")
    assert report == {"ok": False, "error": "ModuleNotFoundError: No module named 'nowhere'", "file": "", "line": 0}
    _, report = checked(tmp_path, "", entry="subject")
    assert report["error"] == "entry 'subject' is not module:Class"


def test_running_faulty_code_exits_3_with_one_line(tmp_path: Path) -> None:
    done = run_module(write(tmp_path, "import no_such_module\n"))
    assert done.returncode == 3
    where = f"{tmp_path}/subject.py:1"
    assert done.stderr == f"interlock agent: {where}: ModuleNotFoundError: No module named 'no_such_module'\n"


def test_a_spec_that_can_not_be_used_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.json"
    assert main(["--spec", str(spec)]) == 2
    assert "can't be read" in capsys.readouterr().err
    for text in ("{", "[]", '{"agent": 3}', '{"agent": "a", "entry": "a:B"}'):
        spec.write_text(text)
        assert main(["--spec", str(spec)]) == 2
        assert "is not an instance's spec" in capsys.readouterr().err


def test_an_endpoint_that_can_not_be_bound_exits_2(tmp_path: Path) -> None:
    spec = write(tmp_path, "from interlock.agents.agent import Agent\nclass Subject(Agent): ...\n")
    done = run_module(spec)
    assert done.returncode == 2
    assert done.stderr.startswith("interlock agent: can't bind")


def test_the_source_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "this_tests_subject.py").write_text(
        "from interlock.agents.agent import Agent\nclass Subject(Agent): ...\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    kind, contract = load(Spec(agent="a", entry="this_tests_subject:Subject", source=str(tmp_path)))
    assert sys.path[0] == str(tmp_path)
    assert kind.__module__ == "this_tests_subject"
    assert contract.describe() == {}
