"""The monitor as a process, beside a real broker."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from interlock.broker.client import open_bus
from interlock.broker.config import load_fleet
from interlock.broker.samples import NAME, SeriesReader

FLEET = """
security = {{ mode = "insecure" }}
[broker]
events = "ipc://{folder}/e"
feed = "ipc://{folder}/f"
telemetry_in = "ipc://{folder}/i"
telemetry_out = "ipc://{folder}/o"

[monitor]
idle_s = 0.1
gpu = "simulated"
simulated = [{{ name = "card", memory_bytes = 1000 }}]

[hosts.alpha]
control = "ipc://{folder}/c"
"""


class Roles:
    """Roles of a fleet as processes."""

    def __init__(self, folder: Path) -> None:
        self.fleet = folder / "fleet.toml"
        self.fleet.write_text(FLEET.format(folder=folder))
        self.running: list[subprocess.Popen[str]] = []

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        """Started, and ready."""
        read, write = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--fleet", str(self.fleet), *arguments],
            pass_fds=[write],
            env={**os.environ, "INTERLOCK_READY_FD": str(write), "INTERLOCK_LOG": "WARNING"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        os.close(write)
        with os.fdopen(read) as told:
            assert told.readline() == "ready\n"
        return process

    def stop(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        return process.returncode, said


@pytest.fixture
def roles() -> Iterator[Roles]:
    folder = Path(tempfile.mkdtemp(prefix="il-", dir="/tmp"))  # a socket's path must be short
    roles = Roles(folder)
    yield roles
    for process in reversed(roles.running):
        if process.poll() is None:
            roles.stop(process)
    shutil.rmtree(folder)


async def test_a_monitor_publishes_over_the_broker_and_ends_its_series_when_it_is_stopped(roles: Roles) -> None:
    await trio.to_thread.run_sync(roles.start, "interlock.broker")
    seen: set[str] = set()
    ended: set[str] = set()
    reader = SeriesReader()
    async with open_bus(load_fleet(roles.fleet).broker, "watcher") as bus, bus.samples(["telemetry/alpha/"]) as feed:
        monitor = await trio.to_thread.run_sync(roles.start, "interlock.monitors", "--host", "alpha")

        async def follow(until: set[str], into: set[str]) -> None:
            with trio.fail_after(30):
                async for batches in feed:
                    for batch in batches:
                        samples, gone = reader.read(batch)
                        seen.update(dict(key)[NAME] for key, _ in samples)
                        ended.update(dict(key)[NAME] for key in gone)
                    if until <= into:
                        return

        await follow({"gpu_memory_used_ratio", "host_cpu_ratio", "gpu_up"}, seen)
        code, said = await trio.to_thread.run_sync(roles.stop, monitor)
        assert code == 0, said
        await follow({"gpu_memory_used_ratio", "host_cpu_ratio", "gpu_up"}, ended)


def test_a_second_monitor_of_a_host_says_who_holds_it(roles: Roles) -> None:
    first = roles.start("interlock.monitors", "--host", "alpha")  # it needs no broker to be ready
    command = [sys.executable, "-m", "interlock.monitors", "--fleet", str(roles.fleet), "--host", "alpha"]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 2
    assert f"held by monitor alpha, process {first.pid}" in second.stderr


def test_a_host_that_is_not_in_the_fleet_is_refused(roles: Roles) -> None:
    command = [sys.executable, "-m", "interlock.monitors", "--fleet", str(roles.fleet), "--host", "alhpa"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "unknown host 'alhpa'" in done.stderr
    assert "known: alpha" in done.stderr


def test_the_driver_is_let_go_of_and_taken_up_again_by_verbs_on_the_monitors_machine(roles: Roles) -> None:
    def verb(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "interlock.monitors", *words, "--fleet", str(roles.fleet), "--host", "alpha"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout + done.stderr

    code, said = verb("release")
    assert (code, "no monitor answers" in said) == (3, True)
    monitor = roles.start("interlock.monitors", "--host", "alpha")
    while (found := verb("release", "--for", "30"))[0] == 13:  # it has not opened the cards yet
        pass
    assert found == (0, "alpha: the GPUs' driver was let go for 30 s\n")
    assert verb("resume") == (0, "alpha: the GPUs' driver was taken up again\n")
    code, said = verb("release", "--for", "-1")
    assert (code, "is not above 0" in said) == (13, True)
    roles.stop(monitor)
    assert verb("resume")[0] == 3
