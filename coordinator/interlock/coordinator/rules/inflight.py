"""The migrations in flight, as a fold over the event log, and which of them an alert speaks about. Pure.

A breach that began before a migration did says nothing against its candidate. Alerts that fired are remembered with
their place in the log, so that this holds also after the engine was restarted. A migration is over when its own host
says so, and no other one (see ownership.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from interlock.broker.facts import (
    AlertFiring,
    AlertResolved,
    FleetSnapshot,
    HostUp,
    MigrationEnded,
    MigrationHeld,
    MigrationStarted,
    RolledBack,
    Steered,
)
from interlock.broker.samples import Labels
from interlock.broker.wire import Event
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.ownership import Claims, speaker

AlertKey = tuple[str, Labels]


def alert_key(rule: str, labels: Mapping[str, str]) -> AlertKey:
    return rule, tuple(sorted(labels.items()))


@dataclass(frozen=True)
class Migration:
    """A migration in flight. `started`: by the engine's clock.

    `held`: it waits for an operator; a breach of its candidate rolls it back all the same.
    """

    migration: str
    agent: str
    host: str
    epoch: int
    to: str
    started: float
    held: bool = False
    target: str = ""  # the host that the agent moves to, where its candidate runs

    @property
    def labels(self) -> dict[str, str]:
        return {"host": self.host, "agent": self.agent, "revision": self.to, "role": "candidate"}

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Every label that both have is equal; labels that name neither a host nor an agent match nothing."""
        if "host" not in labels and "agent" not in labels:
            return False
        own = self.labels | ({"host": self.target} if self.target and labels.get("host") == self.target else {})
        return all(labels.get(name, value) == value for name, value in own.items())


@dataclass(frozen=True)
class Fired:
    """An alert that fires according to the log, where it stands there since `at`."""

    alert: AlertFiring
    at: float


class InFlight:
    """What the events so far add up to. `firing`: the alerts that the log says are firing."""

    def __init__(self) -> None:
        self.migrations: dict[str, Migration] = {}  # by agent: one at a time
        self.control: dict[str, str] = {}  # host -> where it takes rollbacks directly
        self.firing: dict[AlertKey, Fired] = {}
        self.claims = Claims()  # of hosts, on what is not theirs
        self._seen = 0
        self._restored = 0  # what a snapshot stood for

    def apply(self, event: Event, at: float) -> Migration | None:
        """Take in one event, logged at `at` by the caller's clock; the migration that it began, if it began one."""
        if 0 < event.header.seq <= self._restored:
            return None  # the snapshot stands for it
        if isinstance(event.body, FleetSnapshot):
            self._restore(event)
            return None
        self._seen = max(self._seen, event.header.seq)
        if isinstance(event.body, HostUp | RolledBack):
            self._said_by_host(event, event.body)
            return None
        match event.body:
            case MigrationStarted() as begun:
                return self._begin(begun, at)
            case MigrationEnded(agent=agent, epoch=epoch):
                self._over(agent, epoch)
            case MigrationHeld(agent=agent, migration=migration):
                known = self.migrations.get(agent)
                if known is not None and known.migration == migration:
                    self.migrations[agent] = replace(known, held=True)
            case Steered(agent=agent, migration=migration, action="hold" | "resume" | "commit" as action):
                known = self.migrations.get(agent)
                if known is not None and known.migration == migration:
                    self.migrations[agent] = replace(known, held=action == "hold")
            case AlertFiring(rule=rule, labels=labels) as fired:
                self.firing[alert_key(rule, labels)] = Fired(fired, at)
            case AlertResolved(rule=rule, labels=labels):
                self.firing.pop(alert_key(rule, labels), None)
        return None

    def _said_by_host(self, event: Event, body: HostUp | RolledBack) -> None:
        host, agent = speaker(event), getattr(body, "agent", "")
        known = self.migrations.get(agent)
        if host != body.host or (known is not None and known.host != host):
            self.claims.count(event, agent)
        elif isinstance(body, HostUp):
            self.control[host] = body.control
        else:
            self._over(agent, body.epoch)

    def _over(self, agent: str, epoch: int) -> None:
        known = self.migrations.get(agent)
        if known is not None and known.epoch <= epoch:
            del self.migrations[agent]

    def _restore(self, event: Event) -> None:
        """Take over a snapshot that stands for events not seen. What is known already keeps its times."""
        fleet = Fleet()
        fleet.apply(event)
        if not isinstance(event.body, FleetSnapshot) or event.body.start <= self._seen or not fleet.position:
            return
        self._restored = fleet.position
        known = {(m.agent, m.epoch): m for m in self.migrations.values()}
        self.migrations = {}
        for found in fleet.in_flight():
            started = found.times.get("started", 0.0)
            migration = Migration(
                found.id, found.agent, found.host, found.epoch, found.to, started, found.outcome == "held",
                found.target,
            )  # fmt: skip
            self.migrations[found.agent] = known.get((found.agent, found.epoch), migration)
        self.control = {host.name: host.control for host in fleet.hosts.values()}
        before, self.firing = self.firing, {}
        for alert in fleet.alerts.values():
            key = alert_key(alert.rule, alert.labels)
            fired = AlertFiring(
                rule=alert.rule, labels=alert.labels, value=alert.value, action=alert.action,
                sample_time=alert.sample_time, summary=alert.summary, dry_run=alert.dry_run,
                migrations=alert.migrations, blamed=alert.blamed,
            )  # fmt: skip
            self.firing[key] = before.get(key, Fired(fired, alert.since))

    def matching(self, labels: Mapping[str, str]) -> list[Migration]:
        """The migrations that an alert with these labels speaks about, oldest first."""
        return sorted((m for m in self.migrations.values() if m.matches(labels)), key=lambda m: m.epoch)

    def _begin(self, begun: MigrationStarted, at: float) -> Migration | None:
        known = self.migrations.get(begun.agent)
        if known is not None and known.epoch >= begun.epoch:
            return None
        migration = Migration(
            migration=begun.migration,
            agent=begun.agent,
            host=begun.host,
            epoch=begun.epoch,
            to=begun.to,
            started=at,
            target=begun.target,
        )
        self.migrations[begun.agent] = migration
        return migration
