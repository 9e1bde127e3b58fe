"""What the kernel counts of an agent's cgroup, from folders with the files of real ones."""

from __future__ import annotations

from pathlib import Path

from interlock.monitors import templates
from interlock.monitors.cgroups import AgentCgroup

V2 = {
    "cgroup.procs": "11\n0\n12\n",
    "memory.current": "1048576\n",
    "memory.events": "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\n",
    "cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\n",
    "io.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\nfull avg10=0.00 total=7\n",
}


def folder(place: Path, files: dict[str, str]) -> Path:
    place.mkdir()
    for name, text in files.items():
        (place / name).write_text(text)
    return place


def test_version_2_counts_memory_cpu_kills_and_time_lost(tmp_path: Path) -> None:
    own = AgentCgroup({"": folder(tmp_path / "v2", V2)})
    assert own.processes() == [11, 12], "0 is a process of another PID namespace"
    assert own.figures() == {
        templates.CGROUP_MEMORY: 1048576,
        templates.CGROUP_OOM: 1,
        templates.CGROUP_CPU: 2.5,
        f"{templates.STALLED}|io": 1.5,
    }
    assert own.events == tmp_path / "v2" / "cgroup.events"
    own.close()


def test_version_1_has_its_own_files_for_the_same(tmp_path: Path) -> None:
    memory = folder(
        tmp_path / "memory",
        {"cgroup.procs": "11\n", "memory.usage_in_bytes": "77\n", "memory.oom_control": "under_oom 0\noom_kill 4\n"},
    )
    counted = folder(tmp_path / "cpuacct", {"cpuacct.usage": "1500000000\n"})
    own = AgentCgroup({"memory": memory, "cpuacct": counted})
    assert own.figures() == {templates.CGROUP_MEMORY: 77, templates.CGROUP_OOM: 4, templates.CGROUP_CPU: 1.5}
    assert own.events is None, "nothing there tells that it ran empty"
    own.close()


def test_both_at_once_are_read_each_for_what_it_has(tmp_path: Path) -> None:
    unified = folder(tmp_path / "unified", {"cgroup.procs": "", "cpu.stat": "usage_usec 1\n"})
    memory = folder(tmp_path / "memory", {"memory.usage_in_bytes": "77\n"})
    own = AgentCgroup({"": unified, "memory": memory})
    assert own.figures() == {templates.CGROUP_MEMORY: 77, templates.CGROUP_CPU: 1e-6}


def test_what_is_not_there_is_absent_never_0_and_not_asked_for_again(tmp_path: Path) -> None:
    place = folder(tmp_path / "v2", {"cgroup.procs": "", "cpu.stat": "usage_usec 1\n", "memory.current": "rubbish\n"})
    own = AgentCgroup({"": place})
    assert own.figures() == {templates.CGROUP_CPU: 1e-6}
    (place / "memory.events").write_text("oom_kill 9\n")
    assert own.figures() == {templates.CGROUP_CPU: 1e-6}


def test_a_process_that_shares_its_cgroup_with_others_has_none_of_its_own(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / "11").mkdir(parents=True)
    (proc / "self").mkdir()
    (proc / "self/mountinfo").write_text(f"41 31 0:38 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    (proc / "11/cgroup").write_text("0::/user.slice/session-1.scope\n")
    assert AgentCgroup.of(11, str(proc)) is None
    assert AgentCgroup.of(12, str(proc)) is None
    (proc / "11/cgroup").write_text("0::/user.slice/interlock-0123/echo-1\n")
    own = AgentCgroup.of(11, str(proc))
    assert own is not None
    assert own.folders == {"": tmp_path / "user.slice/interlock-0123/echo-1"}
    assert own.processes() == []
