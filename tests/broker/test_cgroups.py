"""Where cgroups are, from what the kernel tells: real lines of several machines."""

from __future__ import annotations

from pathlib import Path

from interlock.broker import cgroups
from interlock.broker.cgroups import V2, Hierarchy

UNIFIED = "35 24 0:30 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu,cpuset rw,relatime - cgroup cgroup rw,cpu,cpuset
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
CONTAINER = "702 690 0:30 /docker/abc /sys/fs/cgroup\\040here ro - cgroup2 cgroup rw"


def test_the_one_hierarchy_of_version_2() -> None:
    assert cgroups.hierarchies(UNIFIED) == [Hierarchy("/sys/fs/cgroup", "/", frozenset())]


def test_both_versions_at_once_that_of_version_2_first() -> None:
    found = cgroups.hierarchies(HYBRID)
    assert found[0] == Hierarchy("/sys/fs/cgroup/unified", "/", frozenset())
    assert {one.controllers for one in found[1:]} == {
        frozenset({"cpuacct"}), frozenset({"memory"}), frozenset({"cpu", "cpuset"}), frozenset({"name=systemd"})
    }  # fmt: skip


def test_a_process_has_a_folder_in_each() -> None:
    places = cgroups.places("4:memory:/jobs/a\n3:cpu,cpuset:/\n0::/user.slice/session:1.scope\nnonsense\n")
    folders = cgroups.folders(places, cgroups.hierarchies(HYBRID))
    assert folders["memory"] == Path("/sys/fs/cgroup/memory/jobs/a")
    assert folders[V2] == Path("/sys/fs/cgroup/unified/user.slice/session:1.scope")
    assert folders["cpu"] == Path("/sys/fs/cgroup/cpu,cpuset")
    assert "cpuacct" not in folders


def test_in_a_container_the_path_counts_from_what_is_mounted_and_what_is_outside_has_no_folder() -> None:
    [mounted] = cgroups.hierarchies(CONTAINER)
    assert mounted.folder("/docker/abc/x") == Path("/sys/fs/cgroup here/x")
    assert mounted.folder("/docker/other") is None
    assert mounted.folder("/docker/abc/../other") is None


def test_lines_that_are_no_mounts_are_passed_over() -> None:
    assert cgroups.hierarchies("nonsense\n1 2 3\n - cgroup2\n") == []
    assert cgroups.read_hierarchies("/nowhere") == []


def test_ours_are_known_by_the_folder_they_are_in() -> None:
    assert cgroups.is_ours(Path("/sys/fs/cgroup/interlock-0123/echo-1"))
    assert not cgroups.is_ours(Path("/sys/fs/cgroup/interlock-0123"))
    assert cgroups.name_of("echo/../1") == "echo-..-1"
    assert cgroups.name_of("") == "instance"
