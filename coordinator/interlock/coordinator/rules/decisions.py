"""What the rule engine's role says and does: events and batches in, messages to send out. Pure.

A rollback goes out before the alert that explains it, and never waits for anything. One rollback per migration and
epoch: its id is made of them, so that a repeated one, also from another life of this process, is recognised.

A breach that is not the candidate's fault (see blame.py) is told with that, and holds the migration. It stays under
watch: when the evidence is gone and the breach is not, the migration is rolled back after all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from interlock.broker import topics
from interlock.broker.commands import Breach, RollBack
from interlock.broker.facts import AlertFiring, AlertResolved, Blame
from interlock.broker.samples import Labels
from interlock.broker.wire import Event
from interlock.coordinator.rules.alerts import RESTORE_GRACE_S, Transition
from interlock.coordinator.rules.blame import twin, whose
from interlock.coordinator.rules.clocks import Skew
from interlock.coordinator.rules.engine import Columns, Engine
from interlock.coordinator.rules.inflight import AlertKey, InFlight, Migration, alert_key
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.sharing import FLEET, HOST, WHOLE, Part, Shared, share

EXCUSED_S = 2.0  # a breach that nothing excuses any more for so long is the candidate's: well within the 5 s promised


@dataclass(frozen=True)
class Send:
    """A message for the log; with `direct`, an endpoint, also straight to there, with the same id."""

    topic: str
    body: RollBack | AlertFiring | AlertResolved
    id: str | None = None
    direct: str = ""


@dataclass
class Excused:
    """An alert that did not roll a migration back. `gone_since`: nothing speaks for the candidate since then."""

    key: AlertKey
    migration: str
    not_before: float  # it is judged again from then on
    gone_since: float | None = None


class RuleDecisions:
    """The engine beside the migrations in flight. `controls`: where hosts listen that have not said so themselves."""

    def __init__(self, rules: Sequence[Rule], controls: Mapping[str, str], part: Part = WHOLE) -> None:
        self._twins: dict[str, str] = {}
        self._silent: set[str] = set()
        self._part = part
        self._shared = Shared()
        self.engine = Engine(self._arranged(rules))
        self._excused: list[Excused] = []
        self.in_flight = InFlight()
        self._controls = controls
        self._log_clock = Skew()
        self._live = False
        self._undone: set[str] = set()  # ids of rollbacks that were decided, of migrations in flight

    @property
    def silent(self) -> frozenset[str]:
        """Alerts that are ours alone: what they say of a permanent revision speaks for a candidate, and is not told."""
        return frozenset(self._silent)

    def _with_twins(self, rules: Sequence[Rule]) -> list[Rule]:
        names = {rule.name for rule in rules}
        twins = [(rule.name, made) for rule in rules if (made := twin(rule)) is not None and made.name not in names]
        self._twins = {name: made.name for name, made in twins}
        self._silent = set(self._twins.values())
        return [*rules, *(made for _, made in twins)]

    def _arranged(self, rules: Sequence[Rule]) -> list[Rule]:
        """What the engine evaluates of them: with twins, and of several engines this one's part. ConfigError."""
        shared = share(self._with_twins(rules), self._part)
        self._shared = shared
        return shared.rules

    def _is_ours(self, rule: str, labels: Mapping[str, str]) -> bool:
        """Whether this engine is the one that tells of an alert."""
        if not self._part.shared:
            return True
        host = FLEET if rule in self._shared.fleet_wide else labels.get(HOST, FLEET)
        return self._part.owns(host)

    def partials(self) -> dict[Labels, float]:
        """What this engine tells the others: the newest partial results."""
        store, names = self.engine.store, {rule.name for rule in self._shared.partials}
        recorded = [each.recorded for each in self.engine.running if each.rule.name in names]
        return {labels: float(store.values[number]) for series in recorded for labels, number in series.items()}

    def reload(self, rules: Sequence[Rule], now: float) -> list[Send]:
        """Other rules from now on; what is the same keeps its state, alerts of rules that are gone resolve."""
        silent = set(self._silent)
        made = self.engine.reload(self._arranged(rules), now)
        return self._answer([each for each in made if each.rule.name not in silent], now)

    def follow(self, event: Event, now: float) -> list[Send]:
        """An event of the log. A migration that begins is held against the rules that fire already."""
        logged = event.header.logged or event.header.time
        begun = self.in_flight.apply(event, self._log_clock.to_ours(logged, now) if self._live else logged)
        if begun is None:
            return []
        self._undone &= {_rollback_id(each) for each in self.in_flight.migrations.values()}
        if not self._live:
            return []
        sends: list[Send] = []
        for alert in self.firing():
            if alert.since < begun.started or not begun.matches(alert.labels):
                continue
            if blamed := self._blamed(alert, [begun], now):
                sends.append(_firing(alert, [begun], blamed))
            elif (rollback := self._rollback(alert, begun, now)) is not None:
                sends.append(rollback)
        return sends

    def go_live(self, now: float) -> list[Send]:
        """The log is read: alerts that it says are firing go on, those of rules that are gone resolve."""
        self._live = True
        sends = []
        for running in self.engine.running:  # what a snapshot has and the log hasn't is over, or fires anew
            name = running.rule.name
            if name not in self._silent:
                running.alerts.keep_firing({labels for rule, labels in self.in_flight.firing if rule == name})
        for fired in list(self.in_flight.firing.values()):
            alert = fired.alert
            if not self._is_ours(alert.rule, alert.labels):
                continue
            known = self.engine.restore(
                alert.rule, alert.labels, alert.value, sample_time=alert.sample_time, since=fired.at, now=now
            )
            if not known:
                sends.append(_resolved(alert.rule, alert.labels))
            again = now + RESTORE_GRACE_S + EXCUSED_S  # until then what speaks for the candidate may not have come
            self._excused += [Excused(alert_key(alert.rule, alert.labels), name, again) for name in alert.blamed]
        return sends

    def firing(self) -> list[Transition]:
        """All alerts that fire, as the transitions that said so."""
        return [alert for alert in self.engine.current("firing") if alert.rule.name not in self._silent]

    def next_deadline(self) -> float:
        """When `tick` has something to do at the latest; infinity where nothing is known yet."""
        watched = [max(each.not_before, (each.gone_since or 0.0) + EXCUSED_S) for each in self._excused]
        return min([self.engine.next_deadline(), *watched])

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

    def take(self, batches: Sequence[Columns], now: float) -> list[Send]:
        """Batches in columns, of different publishers (`Engine.apply`)."""
        return self._answer(self.engine.apply(batches, now), now)

    def tick(self, now: float, *, backlog: bool = False) -> list[Send]:
        return self._answer(self.engine.tick(now, backlog=backlog), now)

    # --- inside

    def _answer(self, transitions: Sequence[Transition], now: float) -> list[Send]:
        rollbacks: list[Send] = []
        alerts: list[Send] = []
        for transition in transitions:
            if transition.rule.name in self._silent:
                continue
            if transition.state == "firing":
                matching = self.in_flight.matching(transition.labels)
                blamed = self._blamed(transition, matching, now)
                for migration in matching:
                    rollback = None if migration.migration in blamed else self._rollback(transition, migration, now)
                    if rollback is not None:
                        rollbacks.append(rollback)
                alerts.append(_firing(transition, matching, blamed))
            elif transition.state == "resolved":
                alerts.append(_resolved(transition.rule.name, transition.labels))
        return rollbacks + self._judge_again(now) + alerts

    def _blamed(self, alert: Transition, matching: Sequence[Migration], now: float) -> dict[str, Blame]:
        """Those of the migrations that it would roll back, and does not; they are watched from now on."""
        if alert.rule.action != "rollback" or alert.rule.dry_run:
            return {}
        open_ = [each for each in matching if _rollback_id(each) not in self._undone]
        found = {each.migration: made for each in open_ if (made := self._whose(alert, each, now)) is not None}
        key = alert_key(alert.rule.name, alert.labels)
        self._excused += [Excused(key, migration, now) for migration in found]
        return found

    def _whose(self, alert: Transition, migration: Migration, now: float) -> Blame | None:
        if self.engine.judges_absence(alert.rule) and (why := self.engine.partition(now)):
            return Blame(who="host", why=why)
        names = {alert.rule.name, self._twins.get(alert.rule.name, "")}
        return whose(alert, migration, self.engine.breaches(names))

    def _judge_again(self, now: float) -> list[Send]:
        """What was excused and is excused no longer."""
        if not self._excused:
            return []
        sends: list[Send] = []
        kept: list[Excused] = []
        firing = {alert_key(alert.rule.name, alert.labels): alert for alert in self.firing()}
        flying = {migration.migration: migration for migration in self.in_flight.migrations.values()}
        for each in self._excused:
            alert, migration = firing.get(each.key), flying.get(each.migration)
            if alert is None or migration is None:
                continue
            if now < each.not_before or self._whose(alert, migration, now) is not None:
                each.gone_since = None
            elif each.gone_since is None:
                each.gone_since = now
            elif now >= each.gone_since + EXCUSED_S:
                rollback = self._rollback(alert, migration, now)
                sends += [rollback] if rollback is not None else []
                continue
            kept.append(each)
        self._excused = kept
        return sends

    def _rollback(self, alert: Transition, migration: Migration, now: float) -> Send | None:
        """The rollback that this firing alert asks for, if it asks for one that was not decided before."""
        rule = alert.rule
        if rule.action != "rollback" or rule.dry_run or not migration.matches(alert.labels):
            return None
        if alert.since < migration.started:  # whatever it is, the candidate didn't do it
            return None
        id = _rollback_id(migration)
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


def _rollback_id(migration: Migration) -> str:
    return f"{migration.migration}/{migration.epoch}/rules"


def _firing(alert: Transition, matching: Sequence[Migration], blamed: dict[str, Blame]) -> Send:
    body = AlertFiring(
        rule=alert.rule.name,
        labels=alert.labels,
        value=alert.value,
        action=alert.action,
        sample_time=alert.sample_time,
        summary=alert.summary,
        dry_run=alert.rule.dry_run,
        migrations=[migration.migration for migration in matching],
        blamed=blamed,
        expr=alert.rule.text,
    )
    return Send(topics.alert_fact(alert.rule.name), body)


def _resolved(rule: str, labels: Mapping[str, str]) -> Send:
    return Send(topics.alert_fact(rule), AlertResolved(rule=rule, labels=dict(labels)))
