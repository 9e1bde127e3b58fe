"""`interlock up` and the verbs with real processes: a small fleet whose agent is a program that knows nothing of us."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from interlock.broker.errors import ConfigError, InUse
from interlock.broker.role import held
from interlock.coordinator import cli
from interlock.coordinator.up import check_fleet, role_specs

PATIENCE_S = 60.0  # for anything that real processes do; a slow machine starts five interpreters
INTERLOCK = [sys.executable, "-P", "-m", "interlock.coordinator"]

AGENT = """
[hosts.alpha]
control = "ipc://{folder}/h"
monitor = false

[strategies.rapid]
baseline_s = 0.1
observation_s = 60.0

[agents.page]
host = "alpha"
endpoint = "http://127.0.0.1:{port}"
serve = "v1"
strategy = "rapid"

[agents.page.revisions.v1]
source = "page"
command = ["{{python}}", "-m", "http.server", "{{port}}"]
probe = {{ kind = "tcp", port = "request" }}

[agents.page.revisions.v2]
source = "page"
command = ["{{python}}", "-m", "http.server", "{{port}}"]
probe = {{ kind = "tcp", port = "request" }}
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, since sockets live in it."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    yield path
    shutil.rmtree(path)


def lay_out(folder: Path, more: str = "") -> Path:
    names = ("events", "feed", "telemetry_in", "telemetry_out")
    lines = "\n".join(f'{name} = "ipc://{folder}/{number}"' for number, name in enumerate(names))
    (folder / "page").mkdir()
    path = folder / "fleet.toml"
    path.write_text(f'name = "small"\nstate = "s"\n[broker]\n{lines}\n{more}')
    return path


def with_agent(folder: Path) -> Path:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    return lay_out(folder, AGENT.format(folder=folder, port=port))


class Up:
    """`interlock up` as a process; its standard error in a file."""

    def __init__(self, fleet: Path) -> None:
        self.fleet = fleet
        self.ready = fleet.parent / "ready"
        self.log = fleet.parent / f"log-{time.monotonic_ns()}"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*INTERLOCK, "up", str(fleet), "--ready-file", str(self.ready)],
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        until(lambda: self.ready.exists() or self.process.poll() is not None, "ready", self.text)
        assert self.process.poll() is None, self.text()

    def text(self) -> str:
        return self.log.read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*INTERLOCK, *arguments, "--fleet", str(self.fleet)],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip


def until(condition: Callable[[], bool], what: str, more: Callable[[], str] = str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: {more()}"
        time.sleep(0.05)


def processes_of(folder: Path) -> dict[int, str]:
    """Every process whose command line or working directory names the folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            place = os.readlink(entry / "cwd")
        except OSError:
            continue
        if str(folder) in line or str(folder) in place:
            found[int(entry.name)] = line
    return found


def leftovers(folder: Path) -> list[str]:
    """Sockets and lock files below the folder."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_socket() or path.name == "lock" or path == folder / "s" / "up" or path.name == "ready"
    ]


def wait_gone(folder: Path) -> None:
    until(lambda: not processes_of(folder), "all processes gone", lambda: str(processes_of(folder)))


@pytest.fixture
def started(folder: Path) -> Iterator[Callable[[Path], Up]]:
    ups: list[Up] = []

    def start(fleet: Path) -> Up:
        ups.append(Up(fleet))
        return ups[-1]

    yield start
    for up in ups:
        if up.process.poll() is None:
            up.process.kill()
            up.process.wait()
        assert up.process.stdout is not None
        up.process.stdout.close()
    wait_gone(folder)


Start = Callable[[Path], Up]


def test_a_fleet_comes_up_says_so_and_goes_down_without_a_trace(folder: Path, started: Start) -> None:
    up = started(with_agent(folder))
    up.wait_ready()
    second = up.run("up")
    assert second.returncode == 2
    assert f"process {up.process.pid}" in second.stderr
    assert up.stop(signal.SIGINT) == 0
    assert up.process.stdout is not None
    assert up.process.stdout.readline() == "fleet small is up: 1 agent on 1 host (Ctrl-C stops it)\n"
    wait_gone(folder)
    assert leftovers(folder) == []
    stopping = [line.split()[0] for line in up.text().splitlines() if line.endswith("stopping on SIGTERM")]
    assert set(stopping[:2]) == {"coordinator", "rules"}
    assert stopping.index("host/alpha") < stopping.index("broker")


def test_an_agent_that_does_not_serve_is_named_when_the_fleet_is_up(folder: Path, started: Start) -> None:
    fleet = with_agent(folder)
    text = fleet.read_text()
    command = 'command = ["{python}", "-m", "http.server", "{port}"]'
    assert command in text
    fleet.write_text(text.replace(command, """command = ["{python}", "-c", "raise SystemExit('no model')"]""", 1))
    up = started(fleet)
    up.wait_ready()
    number, reason = up.ready.read_text().splitlines()
    assert number == str(up.process.pid)
    assert reason.startswith("page: revision v1: ")
    assert "no model" in reason
    assert up.stop(signal.SIGINT) == 0
    assert up.process.stdout is not None
    assert up.process.stdout.read().splitlines() == [
        "fleet small is up: 0 of 1 agent on 1 host (Ctrl-C stops it)",
        f"page does not serve: {reason.removeprefix('page: ')}",
    ]


def test_a_killed_role_is_started_again_and_the_fleet_goes_on(folder: Path, started: Start) -> None:
    up = started(lay_out(folder))
    up.wait_ready()
    (coordinator,) = [pid for pid, line in processes_of(folder).items() if "interlock.coordinator coordinator" in line]
    os.kill(coordinator, signal.SIGKILL)
    until(lambda: up.text().count("the log is read up to event") >= 3, "the coordinator is back", up.text)
    refused = up.run("migrate", "nobody", "--to", "v2", "--json")
    assert refused.returncode == 12, refused.stderr
    assert json.loads(refused.stdout)["outcome"] == "refused"
    assert up.stop() == 0


def test_roles_do_not_outlive_a_killed_up_and_the_next_one_starts(folder: Path, started: Start) -> None:
    fleet = with_agent(folder)
    up = started(fleet)
    up.wait_ready()
    up.process.kill()
    up.process.wait()
    wait_gone(folder)
    up.ready.unlink()
    again = started(fleet)
    again.wait_ready()
    assert again.stop() == 0
    wait_gone(folder)
    assert leftovers(folder) == []


@pytest.mark.parametrize("moment_s", [0.05, 0.4, 0.8, 1.6])
def test_a_stop_at_any_moment_of_the_start_leaves_nothing(folder: Path, started: Start, moment_s: float) -> None:
    up = started(with_agent(folder))
    end = time.monotonic() + moment_s
    until(lambda: time.monotonic() > end or up.ready.exists(), "the moment")
    up.stop()
    wait_gone(folder)
    assert leftovers(folder) == []


def test_an_endpoint_in_use_ends_it_with_the_words_of_the_role(folder: Path, started: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        fleet = lay_out(folder)
        fleet.write_text(fleet.read_text().replace(f"ipc://{folder}/0", endpoint))
        up = started(fleet)
        assert up.process.wait(PATIENCE_S) == 2
    assert "broker" in up.text()
    assert endpoint in up.text()
    assert "did not start" in up.text().splitlines()[-1]


def test_an_operator_s_day(folder: Path, started: Start) -> None:
    """Migrate, leave with Ctrl-C, look, roll back, look again."""
    up = started(with_agent(folder))
    up.wait_ready()
    assert up.run("rollback", "page").returncode == 12
    watching = subprocess.Popen(
        [*INTERLOCK, "migrate", "page", "--to", "v2", "--fleet", str(up.fleet)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert watching.stdout is not None
        assert watching.stderr is not None
        for line in watching.stdout:
            if "stage observation" in line:
                break
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_S) == 130
        assert "goes on without you; to undo it: interlock rollback page" in watching.stderr.read()
    finally:
        watching.kill()
        watching.communicate()

    found = look(up)
    (flying,) = [m for m in found["migrations"].values() if m["in_flight"]]
    assert (flying["agent"], flying["to"]) == ("page", "v2")
    assert found["hosts"]["alpha"]["condition"] == "up"

    undone = up.run("rollback", "page", "--json", "--reason", "had second thoughts")
    assert undone.returncode == 0, undone.stderr
    told = json.loads(undone.stdout)
    assert (told["outcome"], told["decided_by"], told["reason"]) == ("rolled-back", "operator", "had second thoughts")
    assert look(up)["agents"]["page"]["permanent"] == "v1"
    assert "rolled-back: v2" in up.run("status").stdout

    first_line(up, "watch", "--events", "--after", "0", "--json")
    assert first_line(up, "watch", "--telemetry", "--json")["plane"] == "telemetry"
    assert up.stop() == 0


def look(up: Up) -> dict[str, Any]:
    found = up.run("status", "--json")
    assert found.returncode == 0, found.stderr
    tree: dict[str, Any] = json.loads(found.stdout)
    return tree


def first_line(up: Up, *arguments: str) -> dict[str, Any]:
    """Of a verb that never ends by itself; it ends when its reader goes away."""
    with subprocess.Popen(
        [*INTERLOCK, *arguments, "--fleet", str(up.fleet)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        tree: dict[str, Any] = json.loads(watching.stdout.readline())
        watching.stdout.close()
        assert watching.wait(PATIENCE_S) == 0
        assert watching.stderr.read() == ""
    return tree


# --- without processes


def test_what_is_wrong_is_said_before_anything_starts(folder: Path) -> None:
    fleet = with_agent(folder)
    (folder / "page").rmdir()
    with pytest.raises(ConfigError, match="page"):
        check_fleet(fleet)
    (folder / "page").mkdir()
    fleet.write_text('rules = { files = ["none.yaml"] }\n' + fleet.read_text())
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        check_fleet(fleet)
    assert not (folder / "s").exists()


def test_the_roles_of_a_fleet_start_from_the_broker_up(folder: Path) -> None:
    fleet = check_fleet(with_agent(folder))
    assert [(spec.name, spec.phase) for spec in role_specs(fleet)] == [
        ("broker", 0), ("host/alpha", 1), ("rules", 2), ("coordinator", 2),
    ]  # fmt: skip


def test_a_lock_that_is_held_names_its_holder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = lay_out(folder)
    with held(folder / "s" / "up", "up"):
        with pytest.raises(InUse), held(folder / "s" / "up", "up"):
            pass
        assert cli.main(["up", str(fleet)]) == 2
    assert f"process {os.getpid()}" in capsys.readouterr().err
