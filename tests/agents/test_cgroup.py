"""Cgroups of instances: real ones where this machine permits it, folders that refuse otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from interlock.agents import cgroup, process
from interlock.agents.cgroup import Cgroups, with_cgroups
from interlock.broker import cgroups
from interlock.broker.cgroups import V2

MARKER = "feedfacecafe"


def here() -> dict[str, Path]:
    return cgroups.folders(cgroups.places(Path("/proc/self/cgroup").read_text()), cgroups.read_hierarchies())


def permitted() -> bool:
    home = Cgroups.here(MARKER)
    home.close()
    return not home.reason


MAY = pytest.mark.skipif(not permitted(), reason="this process may make no cgroups here")


@MAY
async def test_an_instance_runs_in_cgroups_of_its_own_which_go_with_it(tmp_path: Path) -> None:
    async with with_cgroups(MARKER, wanted=True) as lacking, trio.open_nursery() as nursery:
        assert lacking == ""
        started = await process.start(
            nursery, ["sleep", "60"], cwd=tmp_path, env={}, log_path=tmp_path / "log", marker=f"{MARKER}:echo-1"
        )
        with trio.fail_after(10):
            while not started._cgroups:
                await trio.testing.wait_all_tasks_blocked(0.02)
        assert {folder.name for folder in started._cgroups} == {"echo-1"}
        for folder in started._cgroups:
            assert cgroups.is_ours(folder)
            assert str(started.pid) in (folder / "cgroup.procs").read_text().split()
        await started.stop(1.0)
        assert not any(folder.exists() for folder in started._cgroups)
        parents = {folder.parent for folder in started._cgroups}
    assert not any(parent.exists() for parent in parents), "the host's own folder goes with the host"


@MAY
async def test_what_is_run_to_its_end_gets_none(tmp_path: Path) -> None:
    async with with_cgroups(MARKER, wanted=True):
        ended = await process.run_to_end(["cat", "/proc/self/cgroup"], cwd=tmp_path, env={}, timeout_s=10, host=MARKER)
    assert cgroups.PREFIX + MARKER not in ended.output


@MAY
async def test_what_an_earlier_run_left_is_removed_at_the_next_start() -> None:
    left = Cgroups.here(MARKER)
    for folder in left.folders:
        (folder / "old").mkdir()
    async with with_cgroups(MARKER, wanted=True):
        assert not any((folder / "old").exists() for folder in left.folders)


@MAY
def test_a_process_that_has_ended_already_leaves_no_cgroup() -> None:
    home = Cgroups.here(MARKER)
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    try:
        assert home.enter("gone", pid) == []
        assert not any((folder / "gone").exists() for folder in home.folders)
    finally:
        home.close()


async def test_a_host_that_is_told_not_to_makes_none(tmp_path: Path) -> None:
    async with with_cgroups(MARKER, wanted=False) as lacking:
        assert "turned off" in lacking
        assert await cgroup.enter(f"{MARKER}:echo-1", os.getpid()) == []


def test_where_it_may_not_the_reason_says_so_and_what_would_allow_it(tmp_path: Path) -> None:
    home = Cgroups(MARKER, {V2: tmp_path / "none"})
    assert "No such file" in home.reason
    assert "Delegate=yes" in home.reason
    assert home.enter("echo-1", os.getpid()) == []
    assert "no cgroups are mounted" in Cgroups(MARKER, {}).reason


def test_a_folder_in_which_processes_can_not_be_moved_is_left_as_it_was(tmp_path: Path) -> None:
    home = Cgroups(MARKER, {V2: tmp_path})  # an ordinary folder: it has no cgroup.procs
    assert "Permission denied" in home.reason
    assert list(tmp_path.iterdir()) == []
