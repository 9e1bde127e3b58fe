"""Preflight: what can't run is refused before anything starts, with file, line and reason."""

from __future__ import annotations

import socket
import sys
import textwrap
import venv
from pathlib import Path

import msgspec
import pytest
import trio

from interlock.agents import preflight as module
from interlock.agents.findings import Finding, first_failed
from interlock.agents.preflight import (
    environment,
    fill,
    fill_command,
    free_ports,
    interpreter,
    placeholders,
    preflight,
)
from interlock.agents.revisions import Revision
from interlock.broker.config import ProbeConfig, RevisionConfig
from interlock.broker.errors import ConfigError

GOOD = """
from interlock.agents.agent import Agent, handler

class Echo(Agent):
    @handler()
    async def echo(self, text: str) -> str:
        return text
"""
TCP = ProbeConfig(kind="tcp", port="request")


def revision(tmp_path: Path, files: dict[str, str], **config: object) -> Revision:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    spec = msgspec.convert({"source": str(folder), **config}, RevisionConfig)
    return Revision("echo", "v2", "0" * 64, folder, spec)


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


async def check(tmp_path: Path, made: Revision) -> dict[str, Finding]:
    before = everything(tmp_path)
    with trio.fail_after(90):
        findings = await preflight(made, base=tmp_path, state_dir=tmp_path)
    assert everything(tmp_path) == before  # a check leaves nothing, no bytecode either
    assert all("\n" not in finding.reason for finding in findings)
    return {finding.check: finding for finding in findings}


async def test_a_good_class_passes_and_its_handlers_are_told(tmp_path: Path) -> None:
    found = await check(tmp_path, revision(tmp_path, {"agent.py": GOOD, "pkg/x.py": "y = 1"}, entry="agent:Echo"))
    assert list(found) == ["disk", "memory", "interpreter", "parse", "import"]
    assert first_failed(list(found.values())) is None
    assert list(found["import"].evidence["handlers"]) == ["echo"]
    assert found["interpreter"].evidence["python"] == sys.version.split()[0]


async def test_a_file_that_does_not_parse_is_named_with_its_line(tmp_path: Path) -> None:
    files = {"agent.py": GOOD, "lib/bad.py": "x = 1\ndef f(:\n", "nul.py": "x = '\0'\n", "warn.py": "1 is 1\n'\\d'\n"}
    found = await check(tmp_path, revision(tmp_path, files, entry="agent:Echo"))
    assert not found["parse"].ok
    assert "lib/bad.py:2: invalid syntax" in found["parse"].reason
    assert "nul.py" in found["parse"].reason
    assert "warn.py" not in found["parse"].reason
    assert "import" not in found  # it rests on parsing


@pytest.mark.parametrize(
    ("source", "entry", "says"),
    [
        ("import nothing_of_that_name\n", "agent:Echo", "^agent.py:1: ModuleNotFoundError: No module named 'nothing"),
        ("x = 1\nraise ValueError('no card')\n", "agent:Echo", "agent.py:2: ValueError: no card"),
        ("import sys\nsys.exit(0)\n", "agent:Echo", "agent.py:2: SystemExit"),
        ("class Echo: ...\n", "agent:Echo", "is not a subclass of"),
        (GOOD, "agent:Other", "there is no Other"),
        (GOOD, "other:Echo", "No module named 'other'"),
        ("import os\nos._exit(0)\n", "agent:Echo", "ended with code 0: it printed nothing"),
        ("print('{\"ok\": true}', flush=True)\nimport os\nos._exit(4)\n", "agent:Echo", "ended with code 4"),
    ],
)
async def test_an_entry_that_does_not_import_says_why(tmp_path: Path, source: str, entry: str, says: str) -> None:
    found = await check(tmp_path, revision(tmp_path, {"agent.py": source}, entry=entry))
    assert not found["import"].ok
    assert says.removeprefix("^") in found["import"].reason
    assert not says.startswith("^") or found["import"].reason.startswith(says[1:])  # the path is that in the source


async def test_an_import_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMPORT_TIMEOUT_S", 1.0)
    made = revision(tmp_path, {"agent.py": "import time\ntime.sleep(600)\n"}, entry="agent:Echo")
    found = await check(tmp_path, made)
    assert found["import"].reason == "agent:Echo: no answer within 1 s"


async def test_an_environment_without_our_package_is_told_what_to_install(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    made = revision(tmp_path, {"agent.py": GOOD}, entry="agent:Echo", python="bare/bin/python")
    found = await check(tmp_path, made)
    assert found["interpreter"].ok
    assert "install interlock-agent there" in found["import"].reason
    assert str(tmp_path / "bare" / "bin" / "python") in found["import"].reason


@pytest.mark.parametrize(
    ("python", "says"),
    [("no/such/python", "No such file"), ("/bin/false", "ended with code 1"), ("nopython", "No such")],
)
async def test_an_interpreter_that_does_not_run_is_told(tmp_path: Path, python: str, says: str) -> None:
    found = await check(tmp_path, revision(tmp_path, {"agent.py": GOOD}, entry="agent:Echo", python=python))
    assert says in found["interpreter"].reason
    assert not found["interpreter"].ok
    assert "parse" not in found
    assert "import" not in found


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["{python}", "serve.py", "{port}"], ""),
        (["sh", "-c", "true"], ""),
        (["./run.sh"], ""),
        (["./serve.py"], "./serve.py is not executable"),
        (["bin/none"], "there is no bin/none in the source of echo v2"),
        (["/none/at/all"], "there is no /none/at/all"),
        (["no-such-program-anywhere"], "no program 'no-such-program-anywhere' on the PATH"),
        (["sh", "{prot}"], "unknown placeholder {prot}"),
    ],
)
async def test_the_program_of_a_command_must_be_there(tmp_path: Path, command: list[str], says: str) -> None:
    made = revision(tmp_path, {"serve.py": "x = 1", "run.sh": "#!/bin/sh\n"}, command=command, probe=TCP)
    (made.folder / "run.sh").chmod(0o755)
    found = await check(tmp_path, made)
    assert found["command"].ok == (not says)
    assert says in found["command"].reason


async def test_a_wrong_placeholder_in_the_environment_or_probe_is_found(tmp_path: Path) -> None:
    found = await check(tmp_path, revision(tmp_path, {}, command=["sh"], probe=TCP, env={"URL": "x{porto}"}))
    assert "env.URL: unknown placeholder {porto}" in found["environment"].reason
    probe = ProbeConfig(kind="script", command=["sh", "{nothing}"])
    found = await check(tmp_path, revision(tmp_path, {}, command=["sh"], probe=msgspec.to_builtins(probe)))
    assert "probe.command: unknown placeholder {nothing}" in found["command"].reason


async def test_too_little_disk_or_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_DISK_BYTES", 1 << 60)
    monkeypatch.setattr(module, "MIN_MEMORY_BYTES", 1 << 60)
    found = await check(tmp_path, revision(tmp_path, {}, command=["sh"], probe=TCP))
    assert "1099511627776 MiB needed" in found["disk"].reason
    assert "1099511627776 MiB needed" in found["memory"].reason
    assert not found["disk"].ok
    assert not found["memory"].ok


def test_placeholders_are_filled_and_other_braces_stay() -> None:
    values = {"port": "71", "agent": "echo"}
    assert fill_command(["--p={port}", "{agent}-{port}"], values) == ["--p=71", "echo-71"]
    for text in ('{"port": 1}', "{}", "{ port }", "${HOME:-x}", "{1,2}", "a{2}", "{{port"):
        assert fill(text, values) == text
    with pytest.raises(ConfigError, match=r"there is no \{health_port\} here"):
        fill("{health_port}", values, where="echo v1 command")
    with pytest.raises(ConfigError, match=r"echo v1: unknown placeholder \{HOME\} \(use one of \{port\}, "):
        fill("{HOME}", values, where="echo v1")


def test_all_placeholders_have_a_value(tmp_path: Path) -> None:
    made = revision(tmp_path, {}, command=["x"], probe=TCP)
    values = placeholders(made, base=tmp_path, port=1, health_port=2)
    assert set(values) == set(module.PLACEHOLDERS)
    assert values["source"] == str(made.folder)
    assert set(placeholders(made, base=tmp_path)) == set(module.PLACEHOLDERS) - {"port", "health_port"}


def test_an_instance_inherits_nothing_of_the_hosts_own_python() -> None:
    inherited = {"PATH": "/bin", "PYTHONPATH": "/x", "INTERLOCK_READY_FD": "3", "INTERLOCK_LOG": "DEBUG", "HOME": "/h"}
    made = environment({"A": "{port}", "HOME": "/other"}, {"port": "5"}, inherited=inherited)
    assert made == {
        "PATH": "/bin",
        "HOME": "/other",
        "A": "5",
        "INTERLOCK_LOG": "DEBUG",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def test_the_interpreter_is_found_and_its_link_kept(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "python").symlink_to(sys.executable)
    assert interpreter("", tmp_path) == sys.executable
    assert interpreter("env/python", tmp_path) == str(tmp_path / "env" / "python")
    assert interpreter("/usr/bin/../bin/python9", tmp_path) == "/usr/bin/python9"
    assert interpreter("sh", tmp_path).endswith("/sh")


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    with socket.socket() as one:
        one.bind(("127.0.0.1", ports[0]))
