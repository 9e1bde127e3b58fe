"""From readings to series: names, labels, and which series have ended. Pure. docs/metrics.md explains each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from interlock.broker.samples import NAME, Labels, labels
from interlock.monitors import gpu_metrics
from interlock.monitors.gpu import Card, Reading
from interlock.monitors.processes import TreeReading
from interlock.monitors.roster import Instance
from interlock.monitors.sampler import Group

ALL_GROUPS = frozenset(Group)
HOT = gpu_metrics.HOT | frozenset(
    {
        "agent_process_cpu_ratio",
        "agent_process_memory_rss_bytes",
        "host_memory_total_bytes",
        "host_memory_available_bytes",
    }
)

Samples = dict[Labels, float]


def group_of(key: Labels) -> Group:
    return Group.HOT if dict(key)[NAME] in HOT else Group.CALM


class Live:
    """The series of one source that report."""

    def __init__(self) -> None:
        self.keys: set[Labels] = set()

    def update(self, samples: Samples, *, due: frozenset[Group], complete: frozenset[Group]) -> list[Labels]:
        """The series that ended: of a group that was read completely, and no longer there.

        Leaves in `samples` what is of a group that is due.
        """
        ended = [key for key in self.keys if group_of(key) in complete and key not in samples]
        self.keys.difference_update(ended)
        for key in [key for key in samples if group_of(key) not in due]:
            del samples[key]
        self.keys.update(samples)
        return ended


def _of(instance: Instance) -> dict[str, str]:
    return {"agent": instance.agent, "revision": instance.revision, "role": instance.role}


def of_trees(host: str, readings: Iterable[TreeReading]) -> Samples:
    """Two processes of one agent, revision and role (one ends, its successor begins) report their sum."""
    samples: Samples = {}
    for reading in readings:
        values: dict[str, float | None] = {
            "agent_process_cpu_ratio": reading.cpu,
            "agent_process_memory_rss_bytes": reading.rss,
            "agent_process_count": reading.count,
            "agent_process_threads": reading.threads,
            "agent_process_fds": reading.fds,
        }
        for name, value in values.items():
            if value is not None:
                key = labels(name, host=host, **_of(reading.instance))
                samples[key] = samples.get(key, 0.0) + value
    return samples


def of_card(host: str, reading: Reading, owners: Mapping[int, Instance]) -> Samples:
    """A card's own series, and the memory of each agent on it. `owners` says whose a process is."""
    card = _card(host, reading.card)
    samples: Samples = {labels(gpu_metrics.UP, **card): 0.0 if reading.error else 1.0}
    for name, value in reading.values.items():
        samples[labels(name, **card)] = value
    for pid, held in (reading.processes or {}).items():
        if (instance := owners.get(pid)) is not None:
            key = labels(gpu_metrics.PROCESS_MEMORY, **card, **_of(instance))
            samples[key] = samples.get(key, 0.0) + held
    return samples


def _card(host: str, card: Card) -> dict[str, str]:
    return {"host": host, "gpu": str(card.index), "uuid": card.uuid}


def of_machine(host: str, values: Mapping[str, float], disk: tuple[str, float | None]) -> Samples:
    """The machine's own series; `disk` is (path, bytes free)."""
    samples = {labels(name, host=host): value for name, value in values.items()}
    path, free = disk
    if free is not None:
        samples[labels("host_disk_free_bytes", host=host, path=path)] = free
    return samples
