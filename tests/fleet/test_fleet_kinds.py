"""Agents of the other kinds through the command line: connections, websockets, no port; and broken comparisons."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

HERE = Path(__file__).parent / "agents"

CHECKS = {
    "good": "def same(request, old, new):\n    return old['answer'] == new['answer']\n",
    "raises": "def same(request, old, new):\n    return old['nothing'] == new['answer']\n",
    "hangs": "import time\ndef same(request, old, new):\n    time.sleep(1000)\n",
    "dies": "import os\ndef same(request, old, new):\n    os._exit(9)\n",
    "floods": "def same(request, old, new):\n    while True: print('x' * 1000)\n",
}
ERRORS = {
    "raises": "check.py:2: KeyError: 'nothing'",
    "hangs": "did not answer within 0.5 s, and was ended",
    "dies": "ended with code 9",
    "floods": "File too large",
}


def agent(name: str, endpoint: str, revisions: dict[str, str], more: str = "") -> str:
    """A table of the fleet file. What an agent of no endpoint has instead is nothing."""
    where = f'endpoint = "{endpoint}"\n' if endpoint else ""
    text = f'[agents.{name}]\nhost = "alpha"\nserve = "r1"\nlevel = "low"\nhealth_period_s = 0.3\n'
    text += f"hold_s = 20.0\n{where}{more}"
    for revision, lines in revisions.items():
        text += f"[agents.{name}.revisions.{revision}]\nstop_timeout_s = 2.0\n{lines}\n"
    return text


@pytest.fixture(scope="module")
def fleet(make_module_fleet: Callable[..., Any], ports: Callable[[int], list[int]]) -> Iterator[Any]:
    made = make_module_fleet({"calc": "alpha"})
    for name in ("lines", "socket", "worker", "loop"):
        shutil.copytree(HERE / name, made.folder / name)
    made.ports |= dict(zip(("judged", "lines", "socket"), ports(3), strict=True))
    made.path.write_text(made.path.read_text() + text(made))
    made.start()
    yield made
    assert made.stop() == 0
    made.nothing_left()


def text(made: Any) -> str:
    judged = {}
    for name, source in CHECKS.items():
        shutil.copytree(made.folder / "calc", made.folder / f"judged-{name}")
        (made.folder / f"judged-{name}" / "check.py").write_text(source)
        judged[name] = f'source = "judged-{name}"\nentry = "calc:Calc"'
    judged |= {"r1": 'source = "calc"\nentry = "calc:Calc"', "lacks": 'source = "calc"\nentry = "calc:Calc"'}
    compare = 'compare = { timeout_s = 0.5, handlers = { double = { function = "check:same" } } }\n'
    probe = 'probe = { kind = "tcp", port = "request" }'
    alive = 'probe = { kind = "script", command = ["true"] }'
    both = ("r1", "r2")
    return (
        agent("judged", f"tcp://127.0.0.1:{made.ports['judged']}", judged, compare)
        + agent(
            "lines",
            f"stream://127.0.0.1:{made.ports['lines']}",
            {r: f'source = "lines"\ncommand = ["{{python}}", "lines.py", "{{port}}", "{r}"]\n{probe}' for r in both},
        )
        + agent(
            "socket",
            f"http://127.0.0.1:{made.ports['socket']}",
            {r: f'source = "socket"\ncommand = ["{{python}}", "talk.py", "{{port}}", "{r}"]\n{probe}' for r in both},
        )
        + agent(
            "worker",
            "",
            {
                r: f'source = "worker"\nentry = "worker:Worker"\nconfig = {{ out = "{out(made, "worker")}" }}'
                for r in both
            },
        )
        + agent(
            "loop",
            "",
            {
                r: f'source = "loop"\ncommand = ["{{python}}", "loop.py", "{out(made, "loop")}", "{r}"]\n{alive}'
                for r in both
            },
        )
    )


def out(made: Any, name: str) -> Path:
    return Path(made.folder) / f"{name}.out"


# --- comparing


@pytest.mark.parametrize("revision", list(CHECKS))
def test_a_comparison_function_decides_and_a_broken_one_is_no_pass_and_hurts_nobody(
    revision: str, fleet: Any, clients: Any
) -> None:
    fleet.calm()
    with clients(f"tcp://127.0.0.1:{fleet.ports['judged']}") as load:
        before = load.last
        done = fleet.migrate("judged", revision).done()
        load.more()
        if revision == "good":
            assert done.code == 0, done
            assert done.json["outcome"] == "committed"
        else:
            assert done.code == 10, done
            assert done.json["decided_by"] == "check shadow"
            assert ERRORS[revision] in done.json["reason"]
            assert "says nothing about the candidate" in done.json["reason"]
            load.served_by(before)
    assert load.failures == []


def test_a_revision_that_lacks_the_comparison_function_is_refused_before_it_starts(fleet: Any) -> None:
    fleet.calm()
    done = fleet.migrate("judged", "lacks").done()
    assert done.code == 12, done
    assert "No module named 'check'" in done.json["reason"]


# --- connections


class Line:
    """A connection of lines."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.file = self.socket.makefile("rb")
        self.revision = self.line()

    def line(self) -> str:
        try:
            return self.file.readline().decode().strip()
        except ConnectionResetError:
            return ""

    def ask(self, word: str) -> str:
        self.socket.sendall(f"{word}\n".encode())
        return self.line()

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def test_connections_stay_with_the_old_one_new_ones_reach_the_new_and_a_rollback_closes_those(
    fleet: Any, wait_until: Callable[..., Any]
) -> None:
    fleet.calm()
    since = len(fleet.events.events)
    port = fleet.ports["lines"]
    with ExitStack() as stack:

        def line() -> Line:
            made = Line(port)
            stack.callback(made.close)
            return made

        stays = line()
        assert stays.revision == "r1"
        command = fleet.migrate("lines", "r2", "staged")
        fleet.observed("lines", since)
        moved = wait_until(lambda: next((one for one in [line()] if one.revision == "r2"), None), "the new one")
        assert stays.ask("a") == "r1 a"
        undone = fleet.cli("rollback", "lines", "--json")
        assert undone.code == 0, undone
        assert moved.line() == ""
        assert line().revision == "r1"
        assert stays.ask("b") == "r1 b"
        assert command.done().code == 10
        started = fleet.events.wait("migration-started", since, agent="lines")
        assert started["settings"]["left_out"][0] == (
            "shadow is not possible: a TCP agent has connections, no requests to mirror"
        )
        done = fleet.migrate("lines", "r2").done()
        assert done.code == 0, done
        assert line().revision == "r2"
        assert stays.line() == ""  # its instance was stopped, after its time


def test_websockets_do_too(fleet: Any, wait_until: Callable[..., Any]) -> None:
    fleet.calm()
    since = len(fleet.events.events)
    place = f"ws://127.0.0.1:{fleet.ports['socket']}/"
    with ExitStack() as stack:

        def talk() -> Any:
            made = stack.enter_context(connect(place))
            return made, made.recv()

        stays, revision = talk()
        assert revision == "r1"
        strategy = fleet.path.read_text()
        fleet.path.write_text(strategy.replace("shadow_requests = 10", "shadow_requests = 0"))
        command = fleet.migrate("socket", "r2", "staged")
        fleet.observed("socket", since)
        fleet.path.write_text(strategy)
        moved = wait_until(lambda: next((one for one, by in [talk()] if by == "r2"), None), "the new one")
        undone = fleet.cli("rollback", "socket", "--json")
        assert undone.code == 0, undone
        with pytest.raises(ConnectionClosed):
            moved.recv()
        stays.send("a")
        assert stays.recv() == "r1 a"
        assert talk()[1] == "r1"
        assert command.done().code == 10


# --- no port


def notes(fleet: Any, name: str) -> list[tuple[str, str, str]]:
    """(revision, pid, begins or ends), in the order of the file."""
    file = out(fleet, name)
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [tuple(line.split()[1:]) for line in lines if line.endswith("\n")]  # type: ignore[misc]


def alone(seen: list[tuple[str, str, str]], killed: int) -> None:
    """No piece of work was begun while another instance had one in hand, but for the one that was killed over it."""
    for before, after in pairwise(seen):
        if before[1] == after[1]:
            assert {before[2], after[2]} == {"begins", "ends"}
        else:
            assert after[2] == "begins"
            assert before[2] == "ends" or int(before[1]) == killed


@pytest.mark.parametrize("name", ["worker", "loop"])
def test_of_an_agent_without_a_port_one_instance_works_at_a_time_whatever_happens(
    name: str, fleet: Any, wait_until: Callable[..., Any]
) -> None:
    fleet.calm()
    since = len(fleet.events.events)

    def works(revision: str) -> None:
        goal = len(notes(fleet, name)) + 3
        wait_until(
            lambda: len(notes(fleet, name)) >= goal and notes(fleet, name)[-1][0] == revision, f"{revision} works"
        )

    works("r1")
    done = fleet.migrate(name, "r2").done()
    assert done.code == 0, done
    works("r2")

    command = fleet.migrate(name, "r1", "staged")
    fleet.observed(name, since + 1)
    works("r1")
    undone = fleet.cli("rollback", name, "--json")
    assert undone.code == 0, undone
    assert command.done().code == 10
    works("r2")
    assert {seen[0] for seen in notes(fleet, name)[-3:]} == {"r2"}

    since = len(fleet.events.events)
    command = fleet.migrate(name, "r1", "staged")
    fleet.observed(name, since)
    works("r1")
    [pid] = {int(seen[1]) for seen in notes(fleet, name) if seen[0] == "r1"} & set(fleet.instances(name).values())
    os.kill(pid, signal.SIGSTOP if name == "worker" else signal.SIGKILL)  # with the token in hand
    done = command.done()
    assert done.code == 10, done
    assert done.json["decided_by"] == ("host health-failed" if name == "worker" else "host process-died")
    works("r2")
    alone(notes(fleet, name), pid)
    ended = fleet.events.wait("rolled-back", since, agent=name)
    assert ended["verified"]
