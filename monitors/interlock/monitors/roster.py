"""What lives on a host, and whether a migration touches it: a fold over the event log. Pure.

An instance is on the roster from InstanceStarted to InstanceStopped. A candidate becomes permanent with the SlotChanged
that names its revision as the permanent one and no candidate. A host that is killed reports no InstanceStopped; whoever
samples a process finds out by pid and start time that it is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from interlock.broker import facts
from interlock.broker.facts import Role
from interlock.broker.wire import Body


@dataclass(frozen=True)
class Instance:
    """A process of an agent. `pid` is also its process group; `started` in seconds since 1970 by the host's clock."""

    id: str
    agent: str
    revision: str
    role: Role
    pid: int
    started: float


class Roster:
    """The instances of one host and the migrations in flight there."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._instances: dict[str, Instance] = {}
        self._migrations: dict[str, str] = {}  # agent -> migration; an agent has one at a time

    @property
    def instances(self) -> list[Instance]:
        return list(self._instances.values())

    @property
    def migrating(self) -> bool:
        """A migration touches this host: begun, and neither ended nor rolled back; a held one counts."""
        return bool(self._migrations)

    @property
    def migrations(self) -> list[str]:
        """The ids of those that touch this host."""
        return list(self._migrations.values())

    def apply(self, body: Body) -> None:
        """Take in what happened. Facts of other hosts, and what says nothing about instances, change nothing."""
        match body:
            case facts.InstanceStarted() if body.host == self.host:
                self._instances[body.instance] = Instance(
                    body.instance, body.agent, body.revision, body.role, body.pid, body.started
                )
            case facts.InstanceStopped() if body.host == self.host:
                self._instances.pop(body.instance, None)
            case facts.SlotChanged() if body.host == self.host and body.candidate is None:
                self._make_permanent(body.agent, body.permanent)
            case facts.RolledBack() if body.host == self.host:
                self._end(body.agent, body.migration)
            case facts.MigrationStarted():
                if self.host in (body.host, body.target):
                    self._migrations[body.agent] = body.migration
                else:  # the agent lives elsewhere now; whatever was in flight here is over
                    self._migrations.pop(body.agent, None)
            case facts.MigrationEnded():
                self._end(body.agent, body.migration)

    def _make_permanent(self, agent: str, revision: str) -> None:
        for instance in self.instances:
            if instance.agent == agent and instance.revision == revision and instance.role == "candidate":
                self._instances[instance.id] = replace(instance, role="permanent")

    def _end(self, agent: str, migration: str) -> None:
        if self._migrations.get(agent) == migration:
            del self._migrations[agent]
