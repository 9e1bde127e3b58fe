"""What happened between two samples, as series that change at once: counters, and flags with both their edges."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Protocol

from interlock.broker.samples import Labels, labels
from interlock.monitors.roster import Instance

EXITS = "agent_process_exits_total"
STALLS = "host_pressure_stalls_total"
POPULATED = "agent_cgroup_populated"
PERMITTED = "monitor_events_permitted"


class Publisher(Protocol):
    def send(self, samples: dict[Labels, float], *, time: float, ended: list[Labels] | None = None) -> None: ...


class Events:
    """Sent when it happens, and repeated with the calm readings. Nothing here waits."""

    def __init__(self, host: str, publisher: Publisher) -> None:
        self._host = host
        self._publisher = publisher
        self._values: dict[Labels, float] = {}
        self._of: dict[str, Labels] = {}  # instance id -> its series of POPULATED

    def live(self) -> list[Labels]:
        """The series that report."""
        return list(self._values)

    def exited(self, agent: str) -> None:
        """A process that a host had started has ended."""
        self._add(labels(EXITS, host=self._host, agent=agent))

    def stalled(self, resource: str) -> None:
        """Tasks stood still for lack of a resource, for longer than the trigger allows."""
        self._add(labels(STALLS, host=self._host, resource=resource))

    def populated(self, instance: str, yes: bool) -> None:
        """Something runs in the cgroup of an instance, or nothing does any more."""
        if (key := self._of.get(instance)) is not None and self._values.get(key) != float(yes):
            self._tell(key, float(yes))

    def follow(self, instances: Collection[Instance], with_cgroup: Collection[str]) -> None:
        """These run now, some of them in a cgroup of their own."""
        wanted = {
            one.id: labels(POPULATED, host=self._host, agent=one.agent, revision=one.revision, role=one.role)
            for one in instances
            if one.id in with_cgroup
        }
        if wanted == self._of:
            return
        gone = [key for id, key in self._of.items() if wanted.get(id) != key and key in self._values]
        kept = {id: self._values[key] for id, key in self._of.items() if key in self._values}
        self._of = wanted
        begun = {key: kept.get(id, 1.0) for id, key in wanted.items() if key not in self._values}
        for key in gone:
            del self._values[key]
        self._values |= begun
        if begun or gone:
            self._publisher.send(begun, time=time.time(), ended=gone)

    def repeated(self, permitted: Mapping[str, bool]) -> dict[Labels, float]:
        """All of it as it stands, and which sources of events this machine permits, to go with the calm readings."""
        for source, yes in permitted.items():
            self._values[labels(PERMITTED, host=self._host, source=source)] = float(yes)
        return dict(self._values)

    def _add(self, key: Labels) -> None:
        self._tell(key, self._values.get(key, 0.0) + 1)

    def _tell(self, key: Labels, value: float) -> None:
        self._values[key] = value
        self._publisher.send({key: value}, time=time.time())
