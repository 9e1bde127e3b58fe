"""Real processes to look at, which end with the test."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from interlock.broker.facts import Role
from interlock.monitors.roster import Instance

Start = Callable[..., tuple[subprocess.Popen[str], Instance]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python program in its own group, wait for its first line, and give it as an instance of an agent."""
    running: list[subprocess.Popen[str]] = []

    def begin(
        program: str, *arguments: object, agent: str = "echo", revision: str = "v1", role: Role = "permanent"
    ) -> tuple[subprocess.Popen[str], Instance]:
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline(), "the program says something when it is ready"
        return process, Instance(f"{agent}-{process.pid}", agent, revision, role, process.pid, began)

    yield begin
    for process in running:
        process.kill()
        process.communicate()
