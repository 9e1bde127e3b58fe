"""Real processes to look at, which end with the test."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nvml_parts
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


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for NVIDIA's library, compiled; the test is left out where it can't be."""
    if reason := nvml_parts.why_not():
        pytest.skip(reason)
    return nvml_parts.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def fake(nvml_library: Path, tmp_path: Path) -> Iterator[nvml_parts.FakeNvml]:
    """Two cards in good order. Who hangs in it goes on when the test ends."""
    with nvml_parts.fake_nvml(nvml_library, tmp_path) as made:
        yield made
