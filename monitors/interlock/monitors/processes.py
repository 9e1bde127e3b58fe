"""The process trees of agents, cheaply: what belongs to an agent is found out seldom, and read often.

Who belongs to whom changes only where a process begins, and the kernel says in one line whether one did; then only what
is new is looked at. Every `WHOLE_S` all of it is looked at again, since a process may be known that has become another.
What belongs is read through files that stay open. All of it blocks, for a millisecond or two: call it in a thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from interlock.monitors import procfs, templates
from interlock.monitors.attribution import trees
from interlock.monitors.cgroups import AgentCgroup
from interlock.monitors.procfs import PROC, KeptFile, Stat
from interlock.monitors.roster import Instance
from interlock.monitors.sampler import Group
from interlock.monitors.templates import Template

START_TOLERANCE_S = 5.0  # a process that began this far from what its host said is another one with the same pid
CPU_WINDOW_S = 1.0  # the kernel counts CPU time in 10 ms: over 0.1 s that would be steps of a tenth
WHOLE_S = 10.0  # between looks at every process of the machine: 200 of them cost 2 ms
MAX_THREADS = 512  # of one process whose context switches are counted: each thread has a file of its own
ANCESTORS = 64  # looked at for the owner of one process; deeper trees are seen with the next look at all

_BY_IO = frozenset({templates.READ, templates.WRITTEN})
_BY_SWITCHES = frozenset({templates.VOLUNTARY, templates.INVOLUNTARY})
_BY_CGROUP = frozenset({templates.CGROUP_MEMORY, templates.CGROUP_CPU, templates.CGROUP_OOM, templates.STALLED})
EVERYTHING = frozenset(templates.METRICS) - {templates.PSS}

Due = Callable[[Instance], frozenset[str]]  # the metrics to read of an instance now


class Total:
    """A counter over processes that come and go. Pure. What one counts after its last reading is lost."""

    def __init__(self) -> None:
        self.value = 0.0
        self._seen: dict[Hashable, float] = {}

    def add(self, counted: Mapping[Hashable, float]) -> float:
        """Take each one's own counter as it is now; the sum of what all of them have counted so far."""
        for key, now in counted.items():
            self.value += max(0.0, now - self._seen.get(key, 0.0))
        self._seen = dict(counted)
        return self.value


class CpuMeter:
    """The CPU use of a set of processes that come and go. Pure."""

    def __init__(self) -> None:
        self._total = Total()
        self._history: deque[tuple[float, float]] = deque()

    @property
    def seconds(self) -> float:
        """CPU seconds of all of them so far."""
        return self._total.value

    def add(self, spent: Mapping[Hashable, float], now: float) -> float | None:
        """Cores used over the last `CPU_WINDOW_S` or little more, from each process's CPU seconds so far.

        None for the first sample: there is nothing to compare with. What a process spends after its last one is lost.
        """
        # a process that was not there before has spent all of it since then
        self._total.add(spent)
        while len(self._history) > 1 and self._history[1][0] <= now - CPU_WINDOW_S:
            self._history.popleft()
        self._history.append((now, self._total.value))
        then, total = self._history[0]
        return (self._total.value - total) / (now - then) if now > then else None


@dataclass(frozen=True)
class TreeReading:
    """A process tree. rss is the sum over its processes: what they share counts several times.

    time: seconds since 1970. cpu: cores in use; None at the first sample. fds: None where they may not be counted, or
    were not asked for. more: further readings by metric name, `|` and the resource behind it where there are several.
    """

    instance: Instance
    time: float
    cpu: float | None
    rss: int
    count: int
    threads: int
    fds: int | None
    more: Mapping[str, float] = field(default_factory=dict)

    def values(self) -> Iterator[tuple[str, float]]:
        """All of it by metric name; what is not known is left out."""
        if self.cpu is not None:
            yield templates.CPU, self.cpu
        yield templates.RSS, self.rss
        yield templates.COUNT, self.count
        yield templates.THREADS, self.threads
        if self.fds is not None:
            yield templates.FDS, self.fds
        yield from self.more.items()


class _Member:
    """A process of a tree, and its files."""

    def __init__(self, pid: int, proc: str, *, keep: bool) -> None:
        self.pid = pid
        self._stat = KeptFile(f"{proc}/{pid}/stat", keep=keep)
        self._io = KeptFile(f"{proc}/{pid}/io", keep=keep)

    def stat(self) -> Stat | None:
        """None once it has ended, though nobody may have taken note of that."""
        try:
            found = procfs.parse_stat(self._stat.read())
        except (OSError, ValueError):
            return None
        return found if found.alive else None

    def io(self) -> tuple[int, int] | None:
        """Bytes (read from, written to) storage so far; None where we may not know."""
        try:
            found = procfs.parse_pairs(self._io.read())
            return found["read_bytes"], found["write_bytes"]
        except (OSError, KeyError):
            return None

    def close(self) -> None:
        self._stat.close()
        self._io.close()


@dataclass
class _Root:
    """An instance, by its process as we see it, and what is remembered between two readings of its tree."""

    instance: Instance
    members: dict[int, _Member]
    cgroup: AgentCgroup | None
    cpu: CpuMeter = field(default_factory=CpuMeter)
    totals: dict[str, Total] = field(default_factory=dict)

    def close(self) -> None:
        for member in self.members.values():
            member.close()
        if self.cgroup is not None:
            self.cgroup.close()


class Trees:
    """The process trees of the instances of a host. One thread at a time samples; `owners` may run beside that."""

    def __init__(self, proc: str = PROC) -> None:
        self._proc = proc
        self._roots: dict[int, _Root] = {}
        self._owner: dict[int, int | None] = {}  # pid -> the root that it belongs to; None: nobody's
        self._newest = KeptFile(f"{proc}/loadavg")  # its last word is the pid that was given out last
        self._last_pid = b""
        self._whole_at = float("-inf")
        self._missing: frozenset[str] = frozenset()
        self._most = procfs.descriptors_to_keep()
        self._kept = 0

    def sample(
        self, instances: Iterable[Instance], due: Due = lambda instance: EVERYTHING, *, look: bool = True
    ) -> list[TreeReading]:
        """A reading of each instance that lives; none of one whose process is gone or is another by now.

        look: whether processes that began since are looked for; without, what is known is read, and nothing else.
        """
        changed = self._follow(list(instances), look)
        if look or changed:
            self._look(changed)
        readings = []
        for pid, root in list(self._roots.items()):
            reading = self._read(pid, root, due(root.instance))
            if reading is None:
                self._drop(pid)
            else:
                readings.append(reading)
        return readings

    def owners(self, pids: Iterable[int]) -> dict[int, Instance]:
        """Whose each process is, of the instances sampled last; processes of nobody are left out."""
        roots, known = self._roots, self._owner
        found = {}
        for pid in pids:
            owner = known.get(pid)
            if owner is None or owner not in roots:
                owner = self._root_of(pid, roots)
            if owner is not None and owner in roots:
                found[pid] = roots[owner].instance
        return found

    def own_cgroups(self) -> dict[str, AgentCgroup]:
        """The cgroup of each instance that has one to itself, by instance id."""
        return {root.instance.id: root.cgroup for root in self._roots.values() if root.cgroup is not None}

    def processes(self) -> dict[str, int]:
        """The pid of each instance as we see it, by instance id."""
        return {root.instance.id: pid for pid, root in self._roots.items()}

    def close(self) -> None:
        for pid in list(self._roots):
            self._drop(pid)
        self._newest.close()

    # --- whose processes there are

    def _follow(self, instances: list[Instance], look: bool) -> bool:
        """Take up instances that are new, and let go of those that are no more; whether there were any."""
        wanted = {instance.id: instance for instance in instances}
        changed = False
        for pid, root in list(self._roots.items()):
            current = wanted.pop(root.instance.id, None)
            if current is None or current.pid != root.instance.pid:
                self._drop(pid)
                changed = True
            else:
                root.instance = current
        again = look and time.monotonic() - self._whole_at >= WHOLE_S
        new = [instance for id, instance in wanted.items() if again or id not in self._missing]
        for instance in new:
            if (found := self._find(instance)) is not None and found not in self._roots:
                roots = dict(self._roots)
                roots[found] = _Root(instance, {}, None)
                self._roots = roots  # replaced, never changed: `owners` may be reading it
                wanted.pop(instance.id)
                changed = True
        self._missing = frozenset(wanted)
        return changed

    def _find(self, instance: Instance) -> int | None:
        """The process of an instance as it is numbered here: its host may count in a PID namespace of its own."""
        if self._is(instance, instance.pid):
            return instance.pid
        for pid in procfs.pids(self._proc):
            try:
                numbers = procfs.parse_namespaced(KeptFile(f"{self._proc}/{pid}/status", keep=False).read())
            except OSError:
                continue
            if len(numbers) > 1 and numbers[-1] == instance.pid and self._is(instance, pid):
                return pid
        return None

    def _is(self, instance: Instance, pid: int) -> bool:
        stat = procfs.read_stat(pid, self._proc)
        if stat is None or not stat.alive:
            return False
        return abs(procfs.epoch_of_start(stat.started) - instance.started) <= START_TOLERANCE_S

    def _look(self, changed: bool) -> None:
        """Find out who belongs to whom, as far as that may have changed."""
        now = time.monotonic()
        if not self._roots:
            self._owner = {}
            return
        whole = changed or now - self._whole_at >= WHOLE_S
        if not whole and not self._anything_new():
            return
        self._last_pid = self._given_out()
        if whole:
            self._whole_at = now
            for pid, root in self._roots.items():  # a host moves a process into its cgroup just after its start
                root.cgroup = root.cgroup or AgentCgroup.of(pid, self._proc)
            living = procfs.pids(self._proc)
            relations = {pid: found for pid in living if (found := self._relation(pid)) is not None}
            belongs = trees(self._roots, relations)
            # who was seen to belong still does, though its parents are dead and its group is its own
            sticky = {pid: root for pid, root in self._owner.items() if root in self._roots and pid in relations}
            self._owner = {pid: belongs.get(pid, sticky.get(pid)) for pid in relations}
        else:
            self._look_at_new()
        for root_pid, root in self._roots.items():
            if root.cgroup is not None:
                for member in root.cgroup.processes():
                    self._owner[member] = root_pid
        self._regroup()

    def _anything_new(self) -> bool:
        if all(root.cgroup is not None for root in self._roots.values()):
            return True  # their lists are short, and tell of those that ended too
        return self._given_out() != self._last_pid

    def _given_out(self) -> bytes:
        try:
            return self._newest.read().rsplit(None, 1)[-1]
        except (OSError, IndexError):
            return b""

    def _look_at_new(self) -> None:
        if all(root.cgroup is not None for root in self._roots.values()):
            return
        living = set(procfs.pids(self._proc))
        known = {pid: owner for pid, owner in self._owner.items() if pid in living}
        relations = {pid: found for pid in living - known.keys() if (found := self._relation(pid)) is not None}

        def owner_of(pid: int, depth: int) -> int | None:
            if pid in self._roots:
                return pid
            if pid in known:
                return known[pid]
            if pid not in relations or depth > ANCESTORS:
                return None
            parent, group = relations[pid]
            return group if group in self._roots else owner_of(parent, depth + 1)

        self._owner = known | {pid: owner_of(pid, 0) for pid in relations}

    def _regroup(self) -> None:
        """Open the files of who is new in a tree, close those of who is not in it any more."""
        members: dict[int, set[int]] = {pid: {pid} for pid in self._roots}
        for pid, owner in self._owner.items():
            if owner is not None and owner in members and (pid == owner or pid not in self._roots):
                members[owner].add(pid)
        for root_pid, root in self._roots.items():
            for pid in root.members.keys() - members[root_pid]:
                self._forget(root, pid)
            for pid in members[root_pid] - root.members.keys():
                self._kept += 2
                root.members[pid] = _Member(pid, self._proc, keep=self._kept <= self._most)

    def _forget(self, root: _Root, pid: int) -> None:
        root.members.pop(pid).close()
        self._kept -= 2

    def _drop(self, pid: int) -> None:
        roots = dict(self._roots)
        root = roots.pop(pid)
        self._roots = roots
        self._kept -= 2 * len(root.members)
        root.close()

    def _relation(self, pid: int) -> tuple[int, int] | None:
        stat = procfs.read_stat(pid, self._proc)
        return None if stat is None else (stat.parent, stat.group)

    def _root_of(self, pid: int, roots: Mapping[int, object]) -> int | None:
        """The root of one process, by looking at its ancestors only."""
        for _ in range(ANCESTORS):
            if pid in roots:
                return pid
            relation = self._relation(pid) if pid > 0 else None
            if relation is None:
                return None
            parent, group = relation
            if group in roots:
                return group
            pid = parent
        return None

    # --- what they take

    def _read(self, pid: int, root: _Root, due: frozenset[str]) -> TreeReading | None:
        now, clock = time.time(), time.monotonic()
        stats = {member: stat for member in list(root.members.values()) if (stat := member.stat()) is not None}
        if not any(member.pid == pid for member in stats):
            return None  # the agent itself is gone, whatever it left
        for gone in root.members.keys() - {member.pid for member in stats}:
            self._forget(root, gone)
            self._owner.pop(gone, None)  # its pid may be another's tomorrow
        keys: dict[_Member, Hashable] = {member: (member.pid, stat.started) for member, stat in stats.items()}
        cpu = root.cpu.add({keys[member]: stat.cpu for member, stat in stats.items()}, clock)
        more: dict[str, float] = {}
        if templates.CPU_TOTAL in due:
            more[templates.CPU_TOTAL] = root.cpu.seconds
        if templates.FAULTS in due:
            self._count(root, templates.FAULTS, {keys[m]: float(stat.major_faults) for m, stat in stats.items()}, more)
        if due & _BY_IO:
            found = {keys[m]: io for m in stats if (io := m.io()) is not None}
            for index, name in enumerate((templates.READ, templates.WRITTEN)):
                if name in due and found:
                    self._count(root, name, {key: float(io[index]) for key, io in found.items()}, more)
        if due & _BY_SWITCHES:
            self._read_switches(root, keys, due, more)
        if templates.PSS in due:
            shares = [procfs.proportional(member.pid, self._proc) for member in stats]
            if all(one is not None for one in shares):
                more[templates.PSS] = float(sum(one for one in shares if one is not None))
        if due & _BY_CGROUP and root.cgroup is not None:
            more |= {name: value for name, value in root.cgroup.figures().items() if name.partition("|")[0] in due}
        return TreeReading(
            root.instance, now, cpu,
            rss=sum(stat.rss for stat in stats.values()),
            count=len(stats),
            threads=sum(stat.threads for stat in stats.values()),
            fds=self._fds(stats) if templates.FDS in due else None,
            more=more,
        )  # fmt: skip

    def _count(self, root: _Root, name: str, counted: Mapping[Hashable, float], more: dict[str, float]) -> None:
        more[name] = root.totals.setdefault(name, Total()).add(counted)

    def _read_switches(
        self, root: _Root, keys: Mapping[_Member, Hashable], due: frozenset[str], more: dict[str, float]
    ) -> None:
        found = {
            key: told
            for member, key in keys.items()
            if (told := procfs.switches(member.pid, self._proc, most=MAX_THREADS)) is not None
        }
        for index, name in enumerate((templates.VOLUNTARY, templates.INVOLUNTARY)):
            if name in due and found:
                self._count(root, name, {key: float(told[index]) for key, told in found.items()}, more)

    def _fds(self, stats: Iterable[_Member]) -> int | None:
        total = 0
        for member in stats:
            count = procfs.open_descriptors(member.pid, self._proc)
            if count is None:
                if procfs.read_stat(member.pid, self._proc) is not None:
                    return None  # it lives, and we may not know
                continue
            total += count
        return total


def due_by(templates_of: Callable[[str], Template], groups: frozenset[Group]) -> Due:
    """What is due of each instance, by the template of its agent."""
    known: dict[int, frozenset[str]] = {}  # agents share a few templates

    def due(instance: Instance) -> frozenset[str]:
        template = templates_of(instance.agent)
        found = known.get(id(template))
        if found is None:
            found = known[id(template)] = template.due(groups)
        return found

    return due
