"""What the rule engine's role says and does: events and batches in, messages to send out. Pure.

A rollback goes out before the alert that explains it, and never waits for anything. One rollback per migration and
epoch: its id is made of them, so that a repeated one, also from another life of this process, is recognised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from interlock.broker import topics
from interlock.broker.commands import Breach, RollBack
from interlock.broker.facts import AlertFiring, AlertResolved
from interlock.broker.samples import Labels
from interlock.broker.wire import Event
from interlock.coordinator.rules.alerts import Transition
from interlock.coordinator.rules.engine import Engine, Skew
from interlock.coordinator.rules.inflight import InFlight, Migration
from interlock.coordinator.rules.rule import Rule


@dataclass(frozen=True)
class Send:
    """A message for the log; with `direct`, an endpoint, also straight to there, with the same id."""

    topic: str
    body: RollBack | AlertFiring | AlertResolved
    id: str | None = None
    direct: str = ""


class RuleDecisions:
    """The engine beside the migrations in flight. `controls`: where hosts listen that have not said so themselves."""

    def __init__(self, rules: Sequence[Rule], controls: Mapping[str, str]) -> None:
        self.engine = Engine(rules)
        self.in_flight = InFlight()
        self._controls = controls
        self._log_clock = Skew()
        self._live = False
        self._undone: set[str] = set()  # ids of rollbacks that were decided

    def follow(self, event: Event, now: float) -> list[Send]:
        """An event of the log. A migration that begins is held against the rules that fire already."""
        logged = event.header.logged or event.header.time
        begun = self.in_flight.apply(event, self._log_clock.to_ours(logged, now) if self._live else logged)
        if begun is None or not self._live:
            return []
        firing = self.engine.current("firing")
        return [send for alert in firing if (send := self._rollback(alert, begun, now)) is not None]

    def go_live(self, now: float) -> list[Send]:
        """The log is read: alerts that it says are firing go on, those of rules that are gone resolve."""
        self._live = True
        sends = []
        for fired in list(self.in_flight.firing.values()):
            alert = fired.alert
            known = self.engine.restore(
                alert.rule, alert.labels, alert.value, sample_time=alert.sample_time, since=fired.at, now=now
            )
            if not known:
                sends.append(_resolved(alert.rule, alert.labels))
        return sends

    def ingest(
        self,
        samples: Iterable[tuple[Labels, float]],
        ended: Iterable[Labels],
        time: float,
        now: float,
        *,
        publisher: str,
    ) -> list[Send]:
        return self._answer(self.engine.ingest(samples, ended, time, now, publisher=publisher), now)

    def tick(self, now: float) -> list[Send]:
        return self._answer(self.engine.tick(now), now)

    # --- inside

    def _answer(self, transitions: Sequence[Transition], now: float) -> list[Send]:
        rollbacks: list[Send] = []
        alerts: list[Send] = []
        for transition in transitions:
            if transition.state == "firing":
                matching = self.in_flight.matching(transition.labels)
                for migration in matching:
                    rollback = self._rollback(transition, migration, now)
                    if rollback is not None:
                        rollbacks.append(rollback)
                alerts.append(_firing(transition, matching))
            elif transition.state == "resolved":
                alerts.append(_resolved(transition.rule.name, transition.labels))
        return rollbacks + alerts

    def _rollback(self, alert: Transition, migration: Migration, now: float) -> Send | None:
        """The rollback that this firing alert asks for, if it asks for one that was not decided before."""
        rule = alert.rule
        if rule.action != "rollback" or rule.dry_run or not migration.matches(alert.labels):
            return None
        if alert.since < migration.started:  # whatever it is, the candidate didn't do it
            return None
        id = f"{migration.migration}/{migration.epoch}/rules"
        if id in self._undone:
            return None
        self._undone.add(id)
        breach = Breach(
            by=f"rule {rule.name}",
            reason=alert.summary,
            labels=alert.labels,
            value=alert.value,
            sample_time=alert.sample_time,
        )
        body = RollBack(
            migration=migration.migration, agent=migration.agent, epoch=migration.epoch, breach=breach, issued=now
        )
        control = self.in_flight.control.get(migration.host) or self._controls.get(migration.host, "")
        return Send(topics.rollback(migration.host), body, id, "" if control.endswith(":*") else control)


def _firing(alert: Transition, matching: Sequence[Migration]) -> Send:
    body = AlertFiring(
        rule=alert.rule.name,
        labels=alert.labels,
        value=alert.value,
        action=alert.action,
        sample_time=alert.sample_time,
        summary=alert.summary,
        dry_run=alert.rule.dry_run,
        migrations=[migration.migration for migration in matching],
    )
    return Send(topics.alert_fact(alert.rule.name), body)


def _resolved(rule: str, labels: Mapping[str, str]) -> Send:
    return Send(topics.alert_fact(rule), AlertResolved(rule=rule, labels=dict(labels)))
