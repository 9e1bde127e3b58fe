"""`interlock check`: what goes past an agent's base class, what it leaves behind, and what its clients would miss."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from interlock.agents.check_verb import main
from interlock.agents.instance import HandlerContract
from interlock.agents.readiness import Remark, Seen, State, judge
from interlock.agents.sandbox import Left, Use, Watched

HEAD = "from interlock.agents.agent import Agent, background, handler, thread\n"
CLEAN = """
class Subject(Agent):
    def setup(self):
        self.kept = {}
    @handler("put", idempotent=True)
    async def put(self, key: str, value: int) -> dict:
        self.kept[key] = value
        return {}
    @background
    async def look(self):
        import trio
        await trio.sleep_forever()
    @thread
    def work(self, stop):
        stop.wait()
    def health(self):
        return True
    def snapshot(self):
        return repr(self.kept or {"a": 1}).encode()
    def restore(self, state):
        self.kept = eval(state)
"""
DIRTY = """
import json, socket, subprocess, threading, time
from pathlib import Path
import zmq
class Subject(Agent):
    def setup(self):
        self.settings = json.load(open(Path(__file__).parent / "settings.json"))
        self.door = zmq.Context().socket(zmq.REP)
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.work, name="worker", daemon=False).start()
        self.child = subprocess.Popen(["sleep", "301"])
    def work(self):
        while True:
            time.sleep(0.05)
    @handler("ask")
    async def ask(self, question, limit: int = 3):
        return {}
"""
HANGING = """
import time
class Subject(Agent):
    @handler("ask")
    async def ask(self) -> dict:
        return {}
    async def teardown(self):
        while True:
            time.sleep(0.1)
"""
OWN = """
import socket, subprocess
class Subject(Agent):
    def setup(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.child = subprocess.Popen(["sleep", "302"])
    def teardown(self):
        self.listener.close()
        self.child.kill()
        self.child.wait()
"""


FLEET = """
[hosts.alpha]
control = "tcp://127.0.0.1:7180"
[agents.one]
host = "alpha"
endpoint = "tcp://127.0.0.1:7201"
serve = "v1"
[agents.one.revisions]
v1 = { source = "v1", entry = "one:One" }
v2 = { source = "v2", entry = "one:One", config = { word = "hello" } }
[agents.two]
host = "alpha"
endpoint = "tcp://127.0.0.1:7202"
serve = "v1"
[agents.two.revisions]
v1 = { source = "v1", command = ["{python}", "two.py"], probe = { kind = "tcp", port = "request" } }
"""


def checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, *options: str
) -> tuple[int, dict[str, Any]]:
    (tmp_path / "subject.py").write_text(HEAD + textwrap.dedent(source))
    code = main([f"{tmp_path / 'subject.py'}:Subject", "--json", *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def said(found: dict[str, Any], *verdicts: str) -> set[tuple[str, str]]:
    return {(each["check"], each["text"]) for each in found["remarks"] if each["verdict"] in verdicts}


def test_an_agent_that_goes_through_its_base_class_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked(tmp_path, capsys, CLEAN)
    assert code == 0, found
    assert (found["outcome"], said(found, "warning", "error")) == ("ready", set())
    assert ("state", "8 bytes went out, in, and out again the same") in said(found, "ok")
    assert {check for check, _ in said(found, "ok")} == {
        "start", "threads", "sockets", "programs", "configuration", "health", "handlers", "shutdown", "state",
    }  # fmt: skip


def test_what_goes_beside_the_base_class_and_what_is_left_behind_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "old.py").write_text(HEAD + CLEAN)
    code, found = checked(tmp_path, capsys, DIRTY, "--against", f"{tmp_path / 'old.py'}:Subject")
    assert (code, found["outcome"]) == (13, "not-ready")
    lines = {each["text"].split(":")[0]: each["where"].rpartition(":")[2] for each in found["remarks"] if each["where"]}
    assert lines["opens a thread"] == "11"
    assert lines["opens a ZeroMQ socket"] == "9"
    assert lines["opens the program sleep"] == "12"
    assert lines["left behind"] == "13"
    assert f"{tmp_path / 'subject.py'}:11" in {each["where"] for each in found["remarks"]}
    texts = [text for _, text in said(found, "warning", "error")]
    assert any(text.startswith(f"opens {tmp_path / 'settings.json'}: self.config") for text in texts)
    assert any(text.startswith("opens a socket, bound to ('127.0.0.1', 0)") for text in texts)
    assert any(text.startswith("left behind: socket listening at ('127.0.0.1', ") for text in texts)
    assert "left behind: zmq 1 ZeroMQ contexts that were not terminated" in texts
    assert {("handlers", "ask: argument 'question' has no type"), ("handlers", "ask: its reply has no type")} <= said(
        found, "warning"
    )
    assert ("shutdown", "left behind: thread worker") in said(found, "error")  # it would keep the process alive
    assert any(text.startswith("outlived it: process ") and text.endswith(": sleep 301") for text in texts)
    assert ("contract", "against old.py: action 'put' is gone") in said(found, "error")
    assert ("contract", "against old.py: action 'ask' is new") in said(found, "note")
    assert not any(process.info["cmdline"] == ["sleep", "301"] for process in psutil.process_iter(["cmdline"]))


def test_one_that_does_not_end_says_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "one.py").write_text(HEAD + HANGING.replace("Subject", "One"))
    (tmp_path / "fleet.toml").write_text(
        FLEET.replace('entry = "one:One" }', 'entry = "one:One", stop_timeout_s = 1 }', 1)
    )
    assert main(["one", "--revision", "v1", "--json", "--fleet", str(tmp_path / "fleet.toml")]) == 13
    (text,) = (text for check, text in said(json.loads(capsys.readouterr().out), "error") if check == "shutdown")
    place = f'"{tmp_path}/v1/one.py", line 10 in teardown'
    assert text == f"it did not end within 1 s of being told to; it was at {place}"


def test_what_it_opens_and_closes_by_itself_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked(tmp_path, capsys, OWN)
    assert code == 0, found
    assert {("sockets", "1 of its own, closed at its end"), ("programs", "1 of its own, closed at its end")} <= said(
        found, "ok"
    )


def test_what_does_not_import_is_told_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked(tmp_path, capsys, "import no_such_module\n")
    assert code == 13
    text, where = "ModuleNotFoundError: No module named 'no_such_module'", f"{tmp_path / 'subject.py'}:2"
    assert found["remarks"] == [{"check": "start", "verdict": "error", "text": text, "where": where}]


def test_an_agent_of_the_fleet_is_tried_against_the_revision_that_it_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, body in {
        "v1": "async def ask(self, n: int) -> dict: ...",
        "v2": "async def ask(self, n: str) -> dict: ...",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.py").write_text(
            f"{HEAD}class One(Agent):\n    @handler('ask')\n    {body}\n"
            "    def health(self): return 'word' not in self.config or self.config['word'] == 'hello'\n"
        )
    (tmp_path / "fleet.toml").write_text(FLEET)
    fleet = ["--fleet", str(tmp_path / "fleet.toml")]
    assert main(["one", *fleet]) == 13
    shown = capsys.readouterr().out
    assert "error    contract       against v1: action 'ask': 'n' was int, is str" in shown
    assert shown.splitlines()[-1] == "NOT READY: one v2: 1 error, 0 warnings"
    assert main(["two", *fleet]) == 12
    assert "two v1 is a program" in capsys.readouterr().err
    assert main(["three", *fleet]) == 12
    assert main(["one", "--revision", "v3", *fleet]) == 12
    assert main(["one", "--config", "x.toml", *fleet]) == 2
    assert main([f"{tmp_path}/missing.py:One"]) == 2


def test_the_command_line_leads_here(tmp_path: Path) -> None:
    (tmp_path / "subject.py").write_text(HEAD + CLEAN)
    command = [sys.executable, "-P", "-m", "interlock.coordinator", "check", "subject.py:Subject"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "READY: Subject subject.py: 0 errors, 0 warnings"


# --- judging, without a process


def verdicts(remarks: list[Remark], check: str) -> list[str]:
    return [remark.verdict for remark in remarks if remark.check == check]


def test_state_that_comes_back_another_is_an_error() -> None:
    seen = Seen(healthy=True, watched=Watched(stopped=True), handlers={}, keeps_state=True)
    seen.state = State(3, b"a", 3, b"a")
    assert verdicts(judge(seen, None), "state") == ["ok"]
    for state in (State(3, b"a", 3, b"b"), State(3, b"a", 4, b"a"), State(trouble="restore() failed"), None):
        seen.state = state
        assert verdicts(judge(seen, None), "state") == ["error"]


def test_only_what_lasts_or_outlives_the_process_stands_in_the_way() -> None:
    watched = Watched(
        stopped=True, left=[Left("file", "/a"), Left("thread", "t", lasting=True), Left("child", "7: sleep")]
    )
    seen = Seen(healthy=True, watched=watched, handlers={"a": HandlerContract()}, orphans=["7: sleep"])
    assert verdicts(judge(seen, {}), "shutdown") == ["warning", "error", "error"]


def test_a_thread_of_its_own_is_a_warning_even_if_it_ends() -> None:
    watched = Watched(
        stopped=True, own_health=True, uses=[Use("thread", "a thread", "a.py", 3), Use("socket", "s", "a.py", 4)]
    )
    remarks = judge(Seen(healthy=True, watched=watched, handlers={}), None)
    assert verdicts(remarks, "threads") == ["warning"]
    assert verdicts(remarks, "sockets") == ["ok"]


def test_one_that_was_never_healthy_is_judged_no_further() -> None:
    assert judge(Seen(detail="health() returned False"), None) == [Remark("start", "error", "health() returned False")]
