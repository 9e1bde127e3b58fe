"""A script that binds ports of its own, started where other ports are given to it."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from interlock.agents.fixed_ports import address_for, endpoint_for

PORTS = {7200: 41001, 8200: 41002}


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        ("tcp://*:7200", "tcp://127.0.0.1:41001"),
        ("tcp://0.0.0.0:8200", "tcp://127.0.0.1:41002"),
        (b"tcp://eth0:7200", "tcp://127.0.0.1:41001"),
        ("tcp://[::]:7200", "tcp://127.0.0.1:41001"),
        ("tcp://*:7201", "tcp://*:7201"),
        ("ipc:///run/7200", "ipc:///run/7200"),
        ("inproc://7200", "inproc://7200"),
        (7200, 7200),
    ],
)
def test_an_endpoint_of_a_pair_is_bound_elsewhere(given: object, bound: object) -> None:
    assert endpoint_for(given, PORTS) == bound


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        (("", 7200), ("127.0.0.1", 41001)),
        (("0.0.0.0", 8200), ("127.0.0.1", 41002)),
        (("::", 7200, 0, 0), ("::", 41001, 0, 0)),
        (("", 0), ("", 0)),
        ("/run/7200", "/run/7200"),
    ],
)
def test_an_address_of_a_pair_is_bound_elsewhere(given: object, bound: object) -> None:
    assert address_for(given, PORTS) == bound


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "interlock.agents.fixed_ports", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_script_runs_as_it_would_by_itself_but_for_its_ports(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'found'\n")
    script = """
        import asyncio, http.server, sys, zmq
        import beside
        assert __name__ == "__main__"
        door = zmq.Context().socket(zmq.REP)
        door.bind("tcp://*:7200")
        server = http.server.HTTPServer(("", 8200), None)
        async def serve():
            async with await asyncio.start_server(print, "127.0.0.1", 9200) as third:
                return third.sockets[0].getsockname()[1]
        print(beside.WORD, sys.argv[1:], door.last_endpoint.decode(), *server.server_address, asyncio.run(serve()))
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        with socket.create_server(("127.0.0.1", 0)) as three:
            a, b, c = (each.getsockname()[1] for each in (one, two, three))
    done = run(f"7200={a}", f"8200={b}", f"9200={c}", str(tmp_path / "script.py"), "--fast", "1=2")
    assert done.stdout == f"found ['--fast', '1=2'] tcp://127.0.0.1:{a} 127.0.0.1 {b} {c}\n", done.stderr


def test_what_can_not_be_run_is_said() -> None:
    assert run("7200=7201").returncode == 2
    assert run("script.py").stderr.startswith("usage: ")
    assert run("7200=7201", "missing.py").stderr == "interlock: there is no script missing.py\n"
