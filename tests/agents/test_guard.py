"""No orphans: a host is killed by kill -9, and everything it started is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from interlock.agents import guard
from interlock.agents.process import StartFailed, guarded, start

AGENT = """
import subprocess, sys, time
idle = [sys.executable, "-c", "import time; time.sleep(600)"]
deep = [sys.executable, "-c", "import subprocess, sys; p = subprocess.Popen(%r, start_new_session=True); "
        "print(p.pid, flush=True); p.wait()" % (idle,)]
children = [subprocess.Popen(idle), subprocess.Popen(idle, start_new_session=True), subprocess.Popen(deep)]
print(*(child.pid for child in children), flush=True)
time.sleep(600)
"""

HOST = """
import os, sys, trio
from pathlib import Path
from interlock.agents.process import guarded, start

async def main():
    marker, folder, agent = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    python = [sys.executable, "-c", agent]
    async with guarded(marker) as keeper, trio.open_nursery() as nursery:
        begin = lambda argv, n: start(
            nursery, argv, cwd=folder, env=dict(os.environ), log_path=folder / n, marker=marker + ":" + n
        )
        one = await begin(python, "one")
        two = await begin(["/usr/bin/env", "-i", *python], "two")  # loses its markers
        print(keeper.pid, one.pid, two.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if guard.look(pid) is not None]


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - other processes set no event
            await trio.sleep(0.02)


class HostLike:
    def __init__(self, folder: Path, marker: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST, marker, str(folder), AGENT], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.guard, *self.instances = map(int, self.process.stdout.readline().split())

    def descendants(self) -> list[int]:
        return [int(pid) for name in ("one", "two") for pid in (self.folder / name).read_text().split()]

    async def ready(self) -> list[int]:
        await until(lambda: len(self.descendants()) == 8)
        return [*self.instances, *self.descendants()]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def marker() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def host(tmp_path: Path, marker: str) -> Iterator[HostLike]:
    made = HostLike(tmp_path, marker)
    yield made
    made.end()
    guard.kill_all(guard.HOST_VARIABLE, marker, made.instances)


async def test_nothing_survives_a_host_that_is_killed(host: HostLike) -> None:
    pids = await host.ready()
    assert len(alive(pids)) == 10
    os.kill(host.process.pid, signal.SIGKILL)
    await until(lambda: not alive(pids))
    await until(lambda: not alive([host.guard]))  # and the guard has done its work


async def test_a_guard_that_is_killed_is_replaced_and_knows_what_runs(host: HostLike, marker: str) -> None:
    pids = await host.ready()
    os.kill(host.guard, signal.SIGKILL)
    guards: list[int] = []

    def replaced() -> list[int]:
        guards[:] = [pid for pid in children(host.process.pid) if pid not in (host.guard, *host.instances)]
        return guards

    await until(replaced)
    await until(lambda: guard.look(guards[0]) is not None and b"guard.py" in cmdline(guards[0]))
    os.kill(host.process.pid, signal.SIGKILL)
    await until(lambda: not alive([*pids, *guards]))


async def test_a_guard_ignores_the_signals_of_a_terminal(host: HostLike) -> None:
    pids = await host.ready()
    await until(lambda: ignored(host.guard) & 1 << signal.SIGTERM - 1)  # it has come so far
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(host.guard, number)
    os.kill(host.process.pid, signal.SIGKILL)
    await until(lambda: not alive(pids))


def children(parent: int) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if (seen := guard.look(pid)) is not None and seen.parent == parent]


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def ignored(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("SigIgn:")), 16)


async def test_at_an_orderly_end_the_guard_ends_too(tmp_path: Path, marker: str) -> None:
    async with guarded(marker) as keeper:
        assert alive([keeper.pid])
        async with trio.open_nursery() as nursery:
            process = await start(
                nursery, ["/bin/sleep", "600"], cwd=tmp_path, env={}, log_path=tmp_path / "log", marker=f"{marker}:1"
            )
            nursery.cancel_scope.cancel()
    assert not alive([keeper.pid, process.pid])


async def test_a_cancelled_host_leaves_no_guard(marker: str) -> None:
    with trio.CancelScope() as scope:
        async with guarded(marker) as keeper:
            scope.cancel()
            await trio.sleep_forever()
    assert not alive([keeper.pid])


async def test_a_cancelled_host_may_still_stop_its_processes_in_good_order(tmp_path: Path, marker: str) -> None:
    program = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(7))); "
        "print('up', flush=True); time.sleep(600)"
    )
    argv = [sys.executable, "-c", program]
    code = None
    with trio.CancelScope() as scope:
        async with guarded(marker), trio.open_nursery() as nursery:
            nursery.cancel_scope.shield = True
            one = await start(
                nursery, argv, cwd=tmp_path, env=dict(os.environ), log_path=tmp_path / "log", marker=f"{marker}:a-1"
            )
            await until(lambda: "up" in one.tail())
            scope.cancel()
            code = await one.stop(20)
    assert code == 7


async def test_an_error_inside_comes_out_as_it_was(marker: str, tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with guarded(marker), trio.open_nursery() as nursery:
            await start(nursery, ["/none"], cwd=tmp_path, env={}, log_path=tmp_path / "log", marker=f"{marker}:1")
    error: BaseException = caught.value
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, StartFailed)


def test_the_marker_must_match_as_a_whole(marker: str) -> None:
    child = subprocess.Popen(["/bin/sleep", "600"], env={guard.HOST_VARIABLE: f"{marker}2"})
    try:
        assert guard.belonging(guard.HOST_VARIABLE, marker) == []
        assert [seen.pid for seen in guard.belonging(guard.HOST_VARIABLE, f"{marker}2")] == [child.pid]
        # a pid that another process has by now is not hit
        stranger = guard.Seen(child.pid, 0, 0, 0, started=1)
        guard.kill(stranger)
        assert guard.look(child.pid) is not None
    finally:
        child.kill()
        child.wait()


def test_the_session_of_a_stranger_is_not_ended(marker: str) -> None:
    """A marked process in a login shell's session ends alone; the shell and its other children go on."""
    code = (
        "import os, subprocess, sys; e = {**os.environ, sys.argv[1]: sys.argv[2]}; "
        "marked = subprocess.Popen(['/bin/sleep', '600'], env=e); other = subprocess.Popen(['/bin/sleep', '600']); "
        "print(marked.pid, other.pid, flush=True); marked.wait(); print(other.poll(), flush=True); other.kill()"
    )
    shell = subprocess.Popen(
        [sys.executable, "-c", code, guard.HOST_VARIABLE, marker],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert shell.stdout is not None
        shell.stdout.readline()
        assert guard.kill_all(guard.HOST_VARIABLE, marker) == (1, [])
        assert shell.stdout.readline() == "None\n"
    finally:
        shell.kill()
        shell.wait()
        assert shell.stdout is not None
        shell.stdout.close()
