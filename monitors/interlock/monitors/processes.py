"""Processes and the machine: the only module that imports psutil.

An agent's process tree is whatever descends from its process or is of its process group: a child whose parent died
still counts, though it descends from init now. All parents and groups are read in one pass over /proc, since a pass per
agent would cost a pass each. These functions block for milliseconds: call them in a thread.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from interlock.monitors.roster import Instance

START_TOLERANCE_S = 5.0  # a process that began this far from what its host said is another one with the same pid
CPU_WINDOW_S = 1.0  # the kernel counts CPU time in 10 ms: over 0.1 s that would be steps of a tenth


class CpuMeter:
    """The CPU use of a set of processes that come and go. Pure."""

    def __init__(self) -> None:
        self._seen: dict[psutil.Process, float] = {}
        self._total = 0.0
        self._history: deque[tuple[float, float]] = deque()

    def add(self, spent: Mapping[psutil.Process, float], now: float) -> float | None:
        """Cores used over the last `CPU_WINDOW_S` or little more, from each process's CPU seconds so far.

        None for the first sample: there is nothing to compare with. What a process spends after its last one is lost.
        """
        first = not self._history
        for process, seconds in spent.items():
            # a process that was not there before has spent all of it since then
            self._total += 0.0 if first else max(0.0, seconds - self._seen.get(process, 0.0))
        self._seen = dict(spent)
        while len(self._history) > 1 and self._history[1][0] <= now - CPU_WINDOW_S:
            self._history.popleft()
        self._history.append((now, self._total))
        then, total = self._history[0]
        return (self._total - total) / (now - then) if now > then else None


@dataclass(frozen=True)
class TreeReading:
    """A process tree. rss is the sum over its processes: what they share counts several times.

    time: seconds since 1970. cpu: cores in use; None at the first sample. fds: None where they may not be counted.
    """

    instance: Instance
    time: float
    cpu: float | None
    rss: int
    count: int
    threads: int
    fds: int | None


class Trees:
    """The process trees of the instances of a host. One thread at a time samples; `owners` may run beside that."""

    def __init__(self) -> None:
        self._roots: dict[int, tuple[Instance, psutil.Process]] = {}
        self._meters: dict[str, CpuMeter] = {}

    def sample(self, instances: Iterable[Instance]) -> list[TreeReading]:
        """A reading of each instance that lives; none of one whose process is gone or is another by now."""
        roots = {}
        for instance in instances:
            if (process := self._process(instance)) is not None:
                roots[instance.pid] = (instance, process)
        self._roots = roots  # replaced, never changed: `owners` may be reading it
        kept = {instance.id for instance, _ in roots.values()}
        self._meters = {id: meter for id, meter in self._meters.items() if id in kept}
        members: dict[int, list[int]] = {pid: [] for pid in roots}
        for pid, owner in _trees(roots, _relations()).items():
            members[owner].append(pid)
        return [
            reading
            for pid, (instance, process) in roots.items()
            if (reading := self._read(instance, process, members[pid])) is not None
        ]

    def owners(self, pids: Iterable[int]) -> dict[int, Instance]:
        """Whose each process is, of the instances sampled last; processes of nobody are left out."""
        roots = self._roots
        found = {}
        for pid in pids:
            root = _root_of(pid, roots)
            if root is not None:
                found[pid] = roots[root][0]
        return found

    # --- inside

    def _process(self, instance: Instance) -> psutil.Process | None:
        try:
            known = self._roots.get(instance.pid)
            if known is not None and known[0].id == instance.id:
                process = known[1]
            else:
                process = psutil.Process(instance.pid)
                if abs(process.create_time() - instance.started) > START_TOLERANCE_S:
                    return None
            alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if alive else None

    def _read(self, instance: Instance, root: psutil.Process, pids: list[int]) -> TreeReading | None:
        now = time.time()
        spent: dict[psutil.Process, float] = {}
        rss = threads = 0
        fds: int | None = 0
        for pid in pids:
            try:
                process = root if pid == root.pid else psutil.Process(pid)
                with process.oneshot():
                    cpu = process.cpu_times()
                    resident = process.memory_info().rss
                    threads += process.num_threads()
            except psutil.Error:
                continue  # it ended in this moment
            rss += resident
            spent[process] = cpu.user + cpu.system
            try:
                fds = None if fds is None else fds + process.num_fds()
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied:
                fds = None
        if not spent:
            return None
        meter = self._meters.setdefault(instance.id, CpuMeter())
        return TreeReading(instance, now, meter.add(spent, time.monotonic()), rss, len(spent), threads, fds)


def _relation(pid: int) -> tuple[int, int] | None:
    """(parent, process group) of a process; None if it is gone."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, 4096)
        finally:
            os.close(descriptor)
        fields = text[text.rindex(b")") + 2 :].split(None, 3)  # the name before may hold anything, ")" too
        return int(fields[1]), int(fields[2])
    except (OSError, ValueError, IndexError):
        return None


def _relations() -> dict[int, tuple[int, int]]:
    """(parent, process group) of every process of the machine, by pid."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return {pid: relation for pid in pids if (relation := _relation(pid)) is not None}


def _trees(roots: Iterable[int], relations: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """The root of each process that has one: itself, its group's, or its nearest ancestor's."""
    owner: dict[int, int | None] = {root: root for root in roots}
    for pid in relations:
        path = []
        at = pid
        while at not in owner and at in relations:
            path.append(at)
            owner[at] = None  # a circle, which pids reused while we read may form, ends here
            parent, group = relations[at]
            at = group if owner.get(group) == group else parent
        for step in path:
            owner[step] = owner.get(at)
    return {pid: root for pid, root in owner.items() if root is not None and pid in relations}


def _root_of(pid: int, roots: Mapping[int, object]) -> int | None:
    """The same for one process, by looking at its ancestors only."""
    seen: set[int] = set()
    while pid not in seen and pid > 0:
        if pid in roots:
            return pid
        seen.add(pid)
        relation = _relation(pid)
        if relation is None:
            return None
        parent, group = relation
        if group in roots:
            return group
        pid = parent
    return None


class Machine:
    """The machine as a whole. Remembers the CPU times of the last sample."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cpu: tuple[float, float] | None = None

    def memory(self) -> dict[str, float]:
        """Bytes by metric name."""
        found = psutil.virtual_memory()
        return {"host_memory_total_bytes": found.total, "host_memory_available_bytes": found.available}

    def load(self) -> dict[str, float]:
        """The other readings by metric name; one that the machine does not give is absent."""
        values: dict[str, float] = {"host_cpus": os.cpu_count() or 1}
        with contextlib.suppress(OSError):
            values["host_load1"] = os.getloadavg()[0]
        with contextlib.suppress(OSError, RuntimeError):
            values["host_swap_used_bytes"] = _swap_used()
        ratio = self._cpu_ratio()
        if ratio is not None:
            values["host_cpu_ratio"] = ratio
        return values

    def disk_free(self) -> float | None:
        """Bytes free for us on the file system of the state folder; None if it can't be asked."""
        try:
            return psutil.disk_usage(str(self._folder)).free
        except OSError:
            return None

    def _cpu_ratio(self) -> float | None:
        times = psutil.cpu_times()
        # guest time is in user time already; waiting for a disk is idle
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0)
        last, self._cpu = self._cpu, (total, idle)
        if last is None or total <= last[0]:
            return None
        return min(1.0, max(0.0, 1 - (idle - last[1]) / (total - last[0])))


def _swap_used() -> int:
    """Bytes. Read here, since psutil warns where /proc/vmstat lacks what we don't ask for."""
    figures = {}
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in ("SwapTotal", "SwapFree"):
            figures[name] = int(rest.split()[0]) * 1024
    if len(figures) != 2:
        raise OSError("no swap figures")
    return figures["SwapTotal"] - figures["SwapFree"]
