"""From readings to series: names, labels, and which series have ended. Pure. docs/metrics.md explains each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from interlock.broker.samples import NAME, Labels, labels
from interlock.monitors import gpu_metrics
from interlock.monitors.attribution import Holding, share
from interlock.monitors.gpu import Card, Reading
from interlock.monitors.processes import TreeReading
from interlock.monitors.roster import Instance
from interlock.monitors.sampler import Group
from interlock.monitors.templates import Template

ALL_GROUPS = frozenset(Group)
ONLY_HOT = frozenset({Group.HOT})
HOT = gpu_metrics.HOT | frozenset(
    {
        "host_memory_total_bytes",
        "host_memory_available_bytes",
    }
)
SLOW = ("host_disk_", "host_network_")  # how the names of what is read seldom begin

Samples = dict[Labels, float]


def group_of(key: Labels) -> Group:
    name = dict(key)[NAME]
    return Group.HOT if name in HOT else Group.SLOW if name.startswith(SLOW) else Group.CALM


def group_by(template_of: Callable[[str], Template]) -> Callable[[Labels], Group]:
    """The same of the series of agents' processes, by the template of each agent."""

    def group(key: Labels) -> Group:
        of = dict(key)
        return template_of(of.get("agent", "")).tiers.get(of[NAME], Group.CALM)

    return group


def instance_of(key: Labels) -> tuple[str, str, str]:
    """(agent, revision, role) of a series of an agent's processes."""
    of = dict(key)
    return of["agent"], of["revision"], of["role"]


class Live:
    """The series of one source that report. `group`: which beat a series goes by."""

    def __init__(self, group: Callable[[Labels], Group] = group_of) -> None:
        self._group_of = group
        self._groups: dict[Labels, Group] = {}  # of those that report: labels are looked at once
        self._keys: dict[Group, set[Labels]] = {one: set() for one in Group}

    @property
    def keys(self) -> set[Labels]:
        return set(self._groups)

    def update(self, samples: Samples, *, due: frozenset[Group], complete: frozenset[Group]) -> list[Labels]:
        """The series that ended: of a group that was read completely, and no longer there.

        Leaves in `samples` what is of a group that is due.
        """
        ended = [key for group in complete for key in self._keys[group] - samples.keys()]
        self._drop(ended)
        for key in list(samples):
            group = self._groups.get(key)
            if group is None:
                group = self._group_of(key)
                if group in due:
                    self._groups[key] = group
                    self._keys[group].add(key)
            if group not in due:
                del samples[key]
        return ended

    def _drop(self, keys: Iterable[Labels]) -> None:
        for key in keys:
            self._keys[self._groups.pop(key)].discard(key)

    def end(self, over: Callable[[Labels], bool]) -> list[Labels]:
        """The series of which this is true end, whether or not they were read this time."""
        ended = [key for key in self._groups if over(key)]
        self._drop(ended)
        return ended


def _of(instance: Instance) -> dict[str, str]:
    return {"agent": instance.agent, "revision": instance.revision, "role": instance.role}


class TreeKeys:
    """The keys of the series of agents' processes: made once, since a sample of 20 agents has hundreds."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._keys: dict[tuple[str, str, str], dict[str, Labels]] = {}

    def of(self, instance: Instance) -> dict[str, Labels]:
        """By the reading's name; those that were asked for before."""
        return self._keys.setdefault((instance.agent, instance.revision, instance.role), {})

    def make(self, instance: Instance, reading: str) -> Labels:
        metric, _, resource = reading.partition("|")
        more = {"resource": resource} if resource else {}
        key = self.of(instance)[reading] = labels(metric, host=self.host, **_of(instance), **more)
        return key

    def keep(self, instances: Iterable[Instance]) -> None:
        """Forget the keys of all others."""
        kept = {(one.agent, one.revision, one.role) for one in instances}
        self._keys = {of: keys for of, keys in self._keys.items() if of in kept}


def of_trees(keys: TreeKeys, readings: Iterable[TreeReading]) -> Samples:
    """Two processes of one agent, revision and role (one ends, its successor begins) report their sum."""
    samples: Samples = {}
    for reading in readings:
        known = keys.of(reading.instance)
        for name, value in reading.values():
            key = known.get(name) or keys.make(reading.instance, name)
            samples[key] = samples.get(key, 0.0) + value
    return samples


def of_processes(host: str, reading: Reading, owners: Mapping[int, Instance]) -> Samples:
    """The memory of each agent on a card, and what is nobody's. `owners` says whose a process is."""
    card = _card(host, reading.card)
    held = [Holding(reading.card.uuid, pid, size) for pid, size in (reading.processes or {}).items()]
    shares = share(held, owners, used=reading.values.get(gpu_metrics.MEMORY_USED))
    samples: Samples = {}
    for (_, instance), size in shares.agents.items():
        key = labels(gpu_metrics.PROCESS_MEMORY, **card, **_of(instance))
        samples[key] = samples.get(key, 0.0) + size
    if shares.unlisted is not None:
        of = partial(labels, gpu_metrics.UNATTRIBUTED, **card)
        samples[of(holder="stranger")] = float(sum(shares.strangers.values()))
        samples[of(holder="unlisted")] = float(shares.unlisted)
    return samples


def _card(host: str, card: Card) -> dict[str, str]:
    return {"host": host, "gpu": str(card.index), "uuid": card.uuid}


def of_machine(host: str, values: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]) -> Samples:
    """The machine's own series, from values by name and labels."""
    return {labels(name, host=host, **dict(of)): value for (name, of), value in values.items()}
