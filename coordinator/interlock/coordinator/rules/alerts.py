"""The alerts of one rule: pending, firing, resolved, per label set. Pure; the time is an argument.

An alert is pending while its breach has lasted less than `for`, and goes back to nothing without a word if it ends
before. `keep_firing_for` bridges gaps of the condition, `no_data` says what silence means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from interlock.broker.samples import Labels
from interlock.coordinator.rules.cells import MISSING, Cell, unnamed
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.template import expand, number

AlertState = Literal["pending", "firing", "resolved"]

RESTORE_GRACE_S = 10.0  # an alert that fired before a restart has this long to show itself again: some keyframes
MAX_SUMMARY = 1000  # characters: one line for people


@dataclass(frozen=True)
class Transition:
    """An alert entered a state. `sample_time`: of the first sample of the continuous breach, by its publisher's clock.

    `since`: when that sample came here, by the engine's clock.
    """

    rule: Rule
    labels: dict[str, str]
    value: float
    state: AlertState
    sample_time: float
    since: float
    summary: str

    @property
    def action(self) -> str:
        return self.rule.action


@dataclass
class _Alert:
    labels: dict[str, str]
    value: float
    sample_time: float
    since: float
    firing: bool = False
    silent: bool = False  # no data, and kept: neither a breach nor its end
    keep_until: float | None = None


class Alerts:
    """What one rule has pending and firing."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._active: dict[Labels, _Alert] = {}
        self._restored: dict[Labels, _Alert] = {}
        self._restored_until = 0.0

    def observe(self, key: Labels, cell: Cell, *, sample_time: float, now: float) -> Transition | None:
        """The rule's result for one label set (its name dropped) is now this."""
        alert = self._active.get(key)
        if type(cell) is float:
            return self._breach(key, alert, cell, sample_time=sample_time, now=now)
        if cell is MISSING and self.rule.no_data != "resolve":
            return self._silence(key, alert, sample_time=sample_time, now=now)
        return None if alert is None else self._end(key, alert, now)

    def retain(self, keys: Iterable[Labels], now: float) -> list[Transition]:
        """Alerts whose series ended (their label set is none of these) end with them."""
        kept = set(keys)
        gone = [(key, alert) for key, alert in self._active.items() if key not in kept]
        return [made for key, alert in gone if (made := self._end(key, alert, now)) is not None]

    def tick(self, now: float) -> list[Transition]:
        """What is due by now."""
        made: list[Transition] = []
        for key, alert in list(self._active.items()):
            if alert.firing and alert.keep_until is not None and now >= alert.keep_until:
                del self._active[key]
                made.append(self._transition(alert, "resolved"))
            elif not alert.firing and not alert.silent and now >= alert.since + self.rule.for_s:
                alert.firing = True
                made.append(self._transition(alert, "firing"))
        if self._restored and now >= self._restored_until:
            made += [self._transition(alert, "resolved") for alert in self._restored.values()]
            self._restored.clear()
        return made

    def next_deadline(self) -> float:
        """When `tick` has something to do; infinity if never."""
        deadline = self._restored_until if self._restored else math.inf
        for alert in self._active.values():
            if alert.keep_until is not None:
                deadline = min(deadline, alert.keep_until)
            elif not alert.firing and not alert.silent:
                deadline = min(deadline, alert.since + self.rule.for_s)
        return deadline

    def restore(self, labels: dict[str, str], value: float, *, sample_time: float, since: float, now: float) -> None:
        """It fired before a restart: it goes on without a new transition, or resolves after `RESTORE_GRACE_S`."""
        alert = _Alert(dict(labels), value, sample_time, since=min(since, now), firing=True)
        self._restored[tuple(sorted(labels.items()))] = alert
        self._restored_until = now + RESTORE_GRACE_S

    def current(self, state: Literal["pending", "firing"]) -> list[Transition]:
        alerts = [*self._active.values(), *self._restored.values()]
        return [self._transition(alert, state) for alert in alerts if alert.firing is (state == "firing")]

    def breaches(self) -> list[Transition]:
        """What breaches by a sample that is there: not what is silent, kept on, or of before a restart."""
        seen = [alert for alert in self._active.values() if not alert.silent and alert.keep_until is None]
        return [self._transition(alert, "firing" if alert.firing else "pending") for alert in seen]

    def __bool__(self) -> bool:
        return bool(self._active)

    # --- inside

    def _breach(
        self, key: Labels, alert: _Alert | None, value: float, *, sample_time: float, now: float
    ) -> Transition | None:
        if alert is None:
            return self._begin(key, value, sample_time=sample_time, now=now)
        alert.value = value
        alert.keep_until = None
        if alert.silent and not alert.firing:  # the silence broke the breach: `for` counts anew
            alert.sample_time, alert.since = sample_time, now
        alert.silent = False
        if not alert.firing and now >= alert.since + self.rule.for_s:
            alert.firing = True
            return self._transition(alert, "firing")
        return None

    def _begin(self, key: Labels, value: float, *, sample_time: float, now: float) -> Transition | None:
        found = dict(unnamed(key))
        labels = {**found, **{name: expand(text, found, value) for name, text in self.rule.labels.items()}}
        labels = {name: text for name, text in labels.items() if text}
        alert = self._restored.pop(tuple(sorted(labels.items())), None)
        if alert is not None:
            alert.value = value
            self._active[key] = alert
            return None
        alert = _Alert(labels, value, sample_time, now, firing=self.rule.for_s <= 0)
        self._active[key] = alert
        return self._transition(alert, "firing" if alert.firing else "pending")

    def _silence(self, key: Labels, alert: _Alert | None, *, sample_time: float, now: float) -> Transition | None:
        if self.rule.no_data == "fire":
            return self._breach(key, alert, math.nan, sample_time=sample_time, now=now)
        if alert is not None:
            alert.silent = True
        return None

    def _end(self, key: Labels, alert: _Alert, now: float) -> Transition | None:
        if alert.firing and self.rule.keep_firing_for_s > 0:
            if alert.keep_until is None:
                alert.keep_until = now + self.rule.keep_firing_for_s
            if now < alert.keep_until:
                return None
        del self._active[key]
        return self._transition(alert, "resolved") if alert.firing else None

    def _transition(self, alert: _Alert, state: AlertState) -> Transition:
        return Transition(
            rule=self.rule,
            labels=dict(alert.labels),
            value=alert.value,
            state=state,
            sample_time=alert.sample_time,
            since=alert.since,
            summary=self._summary(alert),
        )

    def _summary(self, alert: _Alert) -> str:
        texts = self.rule.annotations
        text = texts.get("summary") or texts.get("description") or texts.get("message")
        if text is None:
            return f"{self.rule.name}: {self.rule.text.strip()} (value {number(alert.value)})"[:MAX_SUMMARY]
        return " ".join(expand(text, alert.labels, alert.value).split())[:MAX_SUMMARY]
