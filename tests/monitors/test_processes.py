"""Process trees, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from interlock.monitors.processes import CpuMeter, Machine, Trees, _trees
from interlock.monitors.roster import Instance

Start = Callable[..., tuple[subprocess.Popen[str], Instance]]

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
    assert _trees([10, 20], relations) == {10: 10, 11: 10, 12: 10, 13: 10, 14: 10, 20: 20, 21: 20}


def test_the_machine_says_what_it_has(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    memory = machine.memory()
    assert memory["host_memory_total_bytes"] > memory["host_memory_available_bytes"] > 0
    first = machine.load()
    assert first["host_cpus"] >= 1
    assert first["host_load1"] >= 0
    assert first["host_swap_used_bytes"] >= 0
    assert "host_cpu_ratio" not in first, "nothing to compare with at the first sample"
    while "host_cpu_ratio" not in (second := machine.load()):
        os.sched_yield()
    assert 0 <= second["host_cpu_ratio"] <= 1
    free = machine.disk_free()
    assert free is not None
    assert free > 0


def test_a_folder_that_is_not_there_has_no_free_disk(tmp_path: Path) -> None:
    assert Machine(tmp_path / "none").disk_free() is None
