"""Processes of agents, real ones: their end is always a whole one."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from interlock.agents import guard
from interlock.agents import process as processes
from interlock.agents.process import (
    Process,
    StartFailed,
    host_marker,
    kill_marked,
    run_to_end,
    start,
    trim_log,
)

IDLE = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
# starts, in this order: a child in its group, one in a session of its own, one of its own without any environment
FAMILY = f"""
import subprocess, sys, time
idle = [sys.executable, "-c", {IDLE!r}]
children = [
    subprocess.Popen(idle),
    subprocess.Popen(idle, start_new_session=True),
    subprocess.Popen(idle, start_new_session=True, env={{}}),
]
print(*(child.pid for child in children), flush=True)
time.sleep(600)
"""


@pytest.fixture
def marker() -> str:
    return uuid.uuid4().hex


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - other processes set no event
            await trio.sleep(0.02)


def alive(*pids: int) -> list[int]:
    return [pid for pid in pids if guard.look(pid) is not None]


async def begin(nursery: trio.Nursery, folder: Path, marker: str, code: str, *, name: str = "a-1") -> Process:
    return await start(
        nursery,
        [sys.executable, "-c", code],
        cwd=folder,
        env=dict(os.environ),
        log_path=folder / f"{name}.log",
        marker=f"{marker}:{name}",
    )


async def family(process: Process) -> list[int]:
    await until(lambda: len(process.tail().split()) == 3)
    return [int(pid) for pid in process.tail().split()]


async def test_a_process_runs_in_its_own_group_with_its_markers_and_without_input(tmp_path: Path, marker: str) -> None:
    code = (
        "import os, sys; print(os.getpgrp() == os.getsid(0) == os.getpid(), repr(sys.stdin.read()), "
        "os.environ['INTERLOCK_HOST_RUN'], os.environ['INTERLOCK_INSTANCE']); print('two', file=sys.stderr)"
    )
    async with trio.open_nursery() as nursery:
        before = time.time()
        process = await begin(nursery, tmp_path, marker, code)
        with trio.fail_after(30):
            assert await process.exited() == 0
        assert process.returncode == 0
        assert before <= process.started <= time.time()
    assert sorted(process.tail().splitlines()) == sorted([f"True '' {marker} {marker}:a-1", "two"])


async def test_the_exit_code_of_a_signal_is_negative(tmp_path: Path, marker: str) -> None:
    async with trio.open_nursery() as nursery:
        process = await begin(nursery, tmp_path, marker, IDLE)
        os.kill(process.pid, signal.SIGSEGV)
        with trio.fail_after(30):
            assert await process.gone() == -signal.SIGSEGV


async def test_stop_asks_first(tmp_path: Path, marker: str) -> None:
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "print('up', flush=True); time.sleep(600)"
    )
    async with trio.open_nursery() as nursery:
        process = await begin(nursery, tmp_path, marker, code)
        await until(lambda: process.tail() == "up")
        with trio.fail_after(30):
            assert await process.stop(30) == 7


async def test_stop_kills_what_does_not_listen(tmp_path: Path, marker: str) -> None:
    async with trio.open_nursery() as nursery:
        process = await begin(nursery, tmp_path, marker, STUBBORN)
        await until(lambda: process.tail() == "up")
        with trio.fail_after(30):
            assert await process.stop(0.1) == -signal.SIGKILL
            assert await process.stop(0.1) == -signal.SIGKILL  # again: nothing to do
        assert not alive(process.pid)
        assert process.survivors == []


async def test_stop_ends_descendants_that_left_the_group(tmp_path: Path, marker: str) -> None:
    async with trio.open_nursery() as nursery:
        process = await begin(nursery, tmp_path, marker, FAMILY)
        pids = await family(process)
        with trio.fail_after(30):
            await process.stop(5)
        assert not alive(process.pid, *pids)


async def test_a_process_that_dies_takes_its_children_along(tmp_path: Path, marker: str) -> None:
    async with trio.open_nursery() as nursery:
        process = await begin(nursery, tmp_path, marker, FAMILY)
        pids = await family(process)
        os.kill(process.pid, signal.SIGKILL)
        with trio.fail_after(30):
            assert await process.exited() == -signal.SIGKILL
            await process.gone()
        assert not alive(process.pid, *pids[:2])
        for pid in alive(*pids):  # the third, without environment, group and parent: of that nobody knows any more
            os.kill(pid, signal.SIGKILL)


async def test_a_cancelled_owner_leaves_no_process(tmp_path: Path, marker: str) -> None:
    pids: list[int] = []
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            process = await begin(nursery, tmp_path, marker, FAMILY)
            pids = [process.pid, *await family(process)]
            nursery.cancel_scope.cancel()
    assert not alive(*pids)


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path, marker: str) -> None:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.cancel()
            process = await begin(nursery, tmp_path, marker, IDLE)
    assert not alive(process.pid)


async def test_a_cancelled_stop_kills_at_once(tmp_path: Path, marker: str) -> None:
    async with trio.open_nursery() as nursery:
        process = await begin(nursery, tmp_path, marker, STUBBORN)
        await until(lambda: process.tail() == "up")
        with trio.move_on_after(0.05):
            await process.stop(600)
        with trio.fail_after(30):
            assert await process.gone() == -signal.SIGKILL


async def test_a_suspended_process_can_be_stopped(tmp_path: Path, marker: str) -> None:
    async with trio.open_nursery() as nursery:
        process = await begin(nursery, tmp_path, marker, IDLE)
        os.kill(process.pid, signal.SIGSTOP)
        with trio.fail_after(30):  # which of the two ends it, the kernel decides
            assert await process.stop(0.1) in (-signal.SIGTERM, -signal.SIGKILL)
        assert not alive(process.pid)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["no-such-program-anywhere"], "No such file"),
        (["/etc/passwd"], "Permission denied"),
        (["/bin/echo", "a\0b"], "null byte"),
        ([], "empty command"),
    ],
)
async def test_a_program_that_cannot_be_started_says_why(
    tmp_path: Path, marker: str, argv: list[str], says: str
) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(StartFailed) as caught:
            await start(nursery, argv, cwd=tmp_path, env={}, log_path=tmp_path / "log", marker=f"{marker}:a-1")
    assert says in str(caught.value)


async def test_a_missing_folder_is_named(tmp_path: Path, marker: str) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(StartFailed, match="gone"):
            await begin_in(nursery, tmp_path / "gone", tmp_path, marker)


async def begin_in(nursery: trio.Nursery, cwd: Path, folder: Path, marker: str) -> Process:
    return await start(nursery, ["/bin/true"], cwd=cwd, env={}, log_path=folder / "log", marker=f"{marker}:a-1")


async def test_the_tail_is_of_this_start_only_and_the_log_keeps_the_earlier_ones(tmp_path: Path, marker: str) -> None:
    for word in ("first", "second"):
        async with trio.open_nursery() as nursery:
            process = await begin(nursery, tmp_path, marker, f"print({word!r}); raise SystemExit('no ' + {word!r})")
            assert await process.exited() == 1
        assert sorted(process.tail().split("\n")) == sorted([word, f"no {word}"])
        assert process.tail(1) in (word, f"no {word}")
    assert "first" in process.log_path.read_text()


def test_a_log_is_cut_from_the_start_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number:05}\n" for number in range(1000)))
    assert not trim_log(path, 20_000, 1000)
    assert trim_log(path, 5000, 1000)
    lines = path.read_text().splitlines()
    assert lines == [f"line {number:05}" for number in range(1000 - len(lines), 1000)]
    assert 900 < path.stat().st_size <= 1000
    assert not trim_log(tmp_path / "none", 1, 1)


async def test_a_program_that_floods_its_output_is_cut_while_it_runs(
    tmp_path: Path, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOG_CHECK_S", 0.02)
    monkeypatch.setattr(processes, "LOG_LIMIT", 1 << 20)
    monkeypatch.setattr(processes, "LOG_KEEP", 1 << 16)
    log = tmp_path / "log"
    flood = "while true; do head -c 65536 /dev/zero | tr '\\0' 'x'; echo; done"
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            process = await processes.start(
                nursery, ["sh", "-c", flood], cwd=tmp_path, env=dict(os.environ), log_path=log, marker=f"{marker}:1"
            )
            sizes: list[int] = []
            while not (any(after < before for before, after in itertools.pairwise(sizes)) and process.tail(1)):
                await trio.sleep(0.005)  # the kernel tells nobody that a file grew; cut, it is empty for a moment
                sizes.append((await trio.Path(log).stat()).st_size)
            assert process.returncode is None  # and goes on, with a tail that is its own
            await process.stop(1.0)


async def test_leftovers_of_an_earlier_run_are_killed_and_nothing_else(tmp_path: Path, marker: str) -> None:
    other = uuid.uuid4().hex
    async with trio.open_nursery() as nursery:
        ours = await begin(nursery, tmp_path, marker, FAMILY)
        theirs = await begin(nursery, tmp_path, other, IDLE, name="b-1")
        pids = [ours.pid, *await family(ours)]
        with trio.fail_after(30):
            assert await kill_marked(marker) >= 4  # the one without environment too: its parent lived
        assert not alive(*pids)
        assert alive(theirs.pid)
        assert await kill_marked(marker) == 0
        nursery.cancel_scope.cancel()


def test_the_marker_of_a_host_is_that_of_its_state_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "state")
    assert host_marker(tmp_path / "state") == host_marker(tmp_path / "link")
    assert host_marker(tmp_path / "state") != host_marker(tmp_path / "state2")
    assert ":" not in host_marker(tmp_path)


async def test_a_command_is_run_to_its_end(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    ended = await run_to_end([sys.executable, "-c", code], cwd=tmp_path, env={}, timeout_s=30)
    assert ended.returncode == 3
    assert sorted(ended.output.split()) == ["err", "out"]


async def test_a_command_past_its_deadline_is_killed_with_its_children(tmp_path: Path) -> None:
    with trio.fail_after(60):
        ended = await run_to_end([sys.executable, "-c", FAMILY], cwd=tmp_path, env={}, timeout_s=3)
    assert ended.returncode is None
    pids = [int(pid) for pid in ended.output.split()]
    assert not alive(*pids)
