"""Process trees, with real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from interlock.broker import cgroups
from interlock.monitors import templates
from interlock.monitors.attribution import trees as trees_of
from interlock.monitors.processes import CpuMeter, Total, Trees
from interlock.monitors.roster import Instance

Start = Callable[..., tuple[subprocess.Popen[str], Instance]]


def _unified() -> Path:
    """The folder of our own cgroup of version 2."""
    here = cgroups.places(Path("/proc/self/cgroup").read_text())
    return cgroups.folders(here, cgroups.read_hierarchies())[cgroups.V2]


def _no_cgroups() -> str:
    try:
        folder = _unified() / "interlock-test0123"
        folder.mkdir()
        folder.rmdir()
    except (OSError, KeyError) as error:
        return f"this process may make no cgroups: {error}"
    return ""


NO_CGROUPS = _no_cgroups()

SLEEPER = "import sys; print('ready', flush=True); sys.stdin.read()"
HUNGRY = "import sys; kept = b'x' * (64 << 20); print('ready', flush=True); sys.stdin.read()"
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; print('ready', flush=True); sys.stdin.read()"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""
ORPHANER = """
import os, sys
read, write = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(write, b"x")
        sys.stdin.read()
    os._exit(0)
os.wait()
os.read(read, 1)
print("ready", flush=True)
sys.stdin.read()
"""
BUSY = "print('ready', flush=True)\nwhile True: pass"


def test_an_agent_that_lives_has_memory_threads_files_and_one_process(start: Start) -> None:
    process, instance = start(SLEEPER)
    [reading] = Trees().sample([instance])
    assert reading.instance is instance
    assert reading.count == 1
    assert reading.threads == 1
    assert reading.fds == psutil.Process(process.pid).num_fds()
    assert reading.rss > 1 << 20
    assert reading.cpu is None, "nothing to compare with at the first sample"


def test_an_agent_that_takes_memory_shows_it(start: Start) -> None:
    _, small = start(SLEEPER)
    _, large = start(HUNGRY, agent="hungry")
    readings = {reading.instance.agent: reading for reading in Trees().sample([small, large])}
    assert readings["hungry"].rss - readings["echo"].rss > 60 << 20


def test_children_belong_to_the_tree_and_are_attributed_to_the_agent(start: Start) -> None:
    parent, instance = start(PARENT)
    [child] = psutil.Process(parent.pid).children()
    trees = Trees()
    [reading] = trees.sample([instance])
    assert reading.count == 2
    assert trees.owners([child.pid, parent.pid, os.getpid()]) == {child.pid: instance, parent.pid: instance}


def test_a_child_whose_parent_died_still_belongs_to_the_agent_by_its_process_group(start: Start) -> None:
    _, instance = start(ORPHANER)
    trees = Trees()
    [reading] = trees.sample([instance])
    assert reading.count == 2
    [orphan] = [
        process.pid
        for process in psutil.process_iter()
        if process.pid != instance.pid and _group(process.pid) == instance.pid
    ]
    assert trees.owners([orphan]) == {orphan: instance}


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def test_an_agent_killed_with_9_has_no_reading_any_more_and_owns_nothing(start: Start) -> None:
    process, instance = start(SLEEPER)
    _, other = start(SLEEPER, agent="other")
    trees = Trees()
    assert len(trees.sample([instance, other])) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    [left] = trees.sample([instance, other])
    assert left.instance is other
    assert trees.owners([instance.pid]) == {}


def test_an_agent_that_died_but_was_not_reaped_has_no_reading(start: Start) -> None:
    process, instance = start(SLEEPER)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now, and stays one
    assert Trees().sample([instance]) == []


def test_a_process_that_began_at_another_time_is_another_one_with_the_same_pid(start: Start) -> None:
    _, instance = start(SLEEPER)
    for off in (-3600.0, 3600.0):
        assert Trees().sample([replace(instance, started=instance.started + off)]) == []


def test_a_pid_that_does_not_exist_has_no_reading() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert Trees().sample([Instance("x", "x", "v1", "permanent", gone.pid, 0.0)]) == []


def test_a_new_instance_with_the_same_pid_on_the_roster_starts_its_cpu_anew(start: Start) -> None:
    _, instance = start(SLEEPER)
    trees = Trees()
    trees.sample([instance])
    [again] = trees.sample([replace(instance, id="another")])
    assert again.cpu is None


def test_an_agent_that_computes_shows_it(start: Start) -> None:
    process, instance = start(BUSY)
    trees = Trees()
    trees.sample([instance])
    while sum(psutil.Process(process.pid).cpu_times()[:2]) < 0.2:
        os.sched_yield()
    [reading] = trees.sample([instance])
    assert reading.cpu is not None
    assert 0 < reading.cpu < 1.5


def meter_transcript(*samples: tuple[float, dict[str, float]]) -> list[float | None]:
    meter = CpuMeter()
    return [meter.add(spent, now) for now, spent in samples]  # type: ignore[arg-type]  # any key will do


def test_cpu_is_what_was_spent_over_the_time_it_was_spent_in() -> None:
    assert meter_transcript((0.0, {"a": 50.0}), (2.0, {"a": 51.0})) == [None, 0.5]


def test_cpu_is_taken_over_a_second_also_when_samples_come_faster() -> None:
    steps = [(n / 10, {"a": float(n >= 15)}) for n in range(31)]  # one second of CPU is seen at once, at 1.5 s
    seen = meter_transcript(*steps)
    assert seen[14] == 0
    assert seen[15] == pytest.approx(1.0)
    assert seen[24] == pytest.approx(1.0)
    assert seen[26] == 0


def test_cpu_of_a_child_that_began_since_counts_and_of_one_that_ended_does_not_count_backwards() -> None:
    assert meter_transcript((0.0, {"a": 9.0}), (1.0, {"a": 9.0, "b": 0.5}), (2.0, {"b": 0.75})) == [None, 0.5, 0.25]


def test_each_process_belongs_to_its_nearest_root() -> None:
    #            pid: (parent, group)
    relations = {
        1: (0, 1),
        10: (1, 10),  # a root
        11: (10, 10),
        12: (11, 12),  # in a group of its own, but a descendant
        13: (1, 10),  # an orphan, of the group
        14: (13, 99),  # a child of the orphan
        20: (10, 20),  # a root below another
        21: (20, 20),
        30: (1, 30),  # of nobody
        40: (41, 40),  # pids reused while reading: a circle
        41: (40, 41),
    }
    assert trees_of([10, 20], relations) == {10: 10, 11: 10, 12: 10, 13: 10, 14: 10, 20: 20, 21: 20}


def test_a_total_goes_on_when_one_of_those_that_counted_has_ended() -> None:
    total = Total()
    assert total.add({"a": 5.0, "b": 1.0}) == 6
    assert total.add({"b": 2.0, "c": 1.0}) == 8
    assert total.add({"b": 0.5, "c": 1.0}) == 8, "a counter that fell back counts nothing"


SPAWNER = """
import subprocess, sys
print("ready", flush=True)
for line in sys.stdin:
    new = {"start_new_session": True} if "session" in line else {}
    child = subprocess.Popen([sys.executable, "-c", "import sys; print('r', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, **new)
    child.stdout.readline()
    print(child.pid, flush=True)
"""


def spawn(process: subprocess.Popen[str], line: str = "child") -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def test_a_child_that_began_since_is_found_with_the_next_look_and_not_in_between(start: Start) -> None:
    process, instance = start(SPAWNER)
    trees = Trees()
    assert trees.sample([instance])[0].count == 1
    child = spawn(process)
    assert trees.sample([instance], look=False)[0].count == 1
    assert trees.sample([instance])[0].count == 2
    assert trees.sample([instance], look=False)[0].count == 2
    os.kill(child, signal.SIGKILL)
    while trees.sample([instance], look=False)[0].count == 2:
        os.sched_yield()


def test_a_child_seen_to_belong_still_does_when_its_parents_are_dead_and_its_session_is_its_own(start: Start) -> None:
    process, instance = start(SPAWNER)
    _, second = start(SLEEPER, agent="other")
    trees = Trees()
    child = spawn(process, "session")
    trees.sample([instance, second])
    assert trees.owners([child]) == {child: instance}
    process.kill()
    process.wait()
    assert [reading.instance for reading in trees.sample([instance, second])] == [second]
    assert trees.owners([child]) == {}, "its agent is gone: it is nobody's"
    os.kill(child, signal.SIGKILL)


def test_of_an_agent_counters_are_read_that_were_asked_for_and_no_others(start: Start, tmp_path: Path) -> None:
    program = "import os, sys\nf = open(sys.argv[1], 'wb')\nf.write(b'x' * 100_000)\nf.flush()\nos.fsync(f.fileno())\n"
    _, instance = start(program + SLEEPER, tmp_path / "written")
    [reading] = Trees().sample([instance], lambda _: frozenset({templates.WRITTEN, templates.CPU_TOTAL}))
    assert reading.more.keys() <= {templates.WRITTEN, templates.CPU_TOTAL}
    assert reading.more[templates.CPU_TOTAL] >= 0
    assert reading.more.get(templates.WRITTEN, 0) >= 0
    [whole] = Trees().sample([instance])
    assert {templates.VOLUNTARY, templates.INVOLUNTARY, templates.FAULTS} <= whole.more.keys()
    assert templates.PSS not in whole.more
    [asked] = Trees().sample([instance], lambda _: frozenset({templates.PSS}))
    assert asked.fds is None
    assert 0 < asked.more.get(templates.PSS, 1) <= asked.rss


def test_files_of_processes_are_closed_when_the_agents_are_gone(start: Start) -> None:
    process, instance = start(SPAWNER)
    trees = Trees()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        spawn(process)
    for _ in range(3):
        assert trees.sample([instance])[0].count == 6
    trees.sample([])
    trees.close()
    assert len(os.listdir("/proc/self/fd")) == before


UNSHARE = ["unshare", "--pid", "--fork", "--kill-child"]


def may_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_unshare(), reason="this process may make no PID namespace")
def test_an_agent_whose_host_counts_in_a_pid_namespace_of_its_own_is_found_by_both_its_numbers_and_its_start() -> None:
    began = time.time()
    outer = subprocess.Popen([*UNSHARE, sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert outer.stdout is not None
        inside = int(outer.stdout.readline())  # the child's pid, as its parent there knows it
        instance = Instance("echo-1", "echo", "v1", "permanent", inside, began)
        trees = Trees()
        [reading] = trees.sample([instance])
        assert reading.count == 1
        [here] = trees.processes().values()
        assert here != inside
        assert trees.owners([here]) == {here: instance}
        assert Trees().sample([replace(instance, started=began - 3600)]) == []
    finally:
        outer.kill()
        outer.communicate()


@pytest.mark.skipif(bool(NO_CGROUPS), reason=NO_CGROUPS)
def test_whoever_is_in_the_cgroup_of_an_agent_is_its_own_whoever_started_it(start: Start) -> None:
    _, instance = start(SLEEPER)
    stranger, _ = start(SLEEPER, agent="stranger")
    folder = _unified() / "interlock-test0123" / "echo-1"
    folder.mkdir(parents=True)
    try:
        for pid in (instance.pid, stranger.pid):
            (folder / "cgroup.procs").write_text(str(pid))
        trees = Trees()
        [reading] = trees.sample([instance])
        assert reading.count == 2
        assert trees.owners([stranger.pid]) == {stranger.pid: instance}
        assert reading.more[templates.CGROUP_CPU] >= 0
        assert trees.own_cgroups()[instance.id].events == folder / "cgroup.events"
        trees.close()
    finally:
        home = _unified() / "cgroup.procs"
        for pid in (instance.pid, stranger.pid):
            home.write_text(str(pid))
        folder.rmdir()
        folder.parent.rmdir()
