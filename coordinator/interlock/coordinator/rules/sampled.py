"""Rules evaluated at moments, over any history, as Prometheus evaluates its groups. Pure.

For unit tests and for rules with an interval in a replay. Each rule is evaluated whole at each moment, one after
another; what one records, the next one sees. Alerts become the series ALERTS and ALERTS_FOR_STATE, as in Prometheus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.alerts import Alerts, Transition
from interlock.coordinator.rules.evaluate import Evaluation
from interlock.coordinator.rules.expression import Expression
from interlock.coordinator.rules.labelsets import METADATA, shown
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.running import plain_selectors, unnamed
from interlock.coordinator.rules.series import FILTERED, MISSING, PRESENT
from interlock.coordinator.rules.source import History, milliseconds
from interlock.coordinator.rules.template import expand
from interlock.coordinator.rules.values import EvaluationError

ALERT_NAME, ALERT_STATE = "alertname", "alertstate"


@dataclass(frozen=True)
class Firing:
    """An alert that fires, as promtool shows it: the labels with the rule's name, the annotations filled in."""

    labels: Labels
    annotations: Labels
    value: float


class Sampled:
    """These rules over this history. EvaluationError names the rule that can't be evaluated."""

    def __init__(self, rules: Sequence[Rule], history: History, *, default_step: float) -> None:
        self._history = history
        self._step = default_step
        self._at = 0.0
        self._rules = [_One(rule) for rule in rules]
        for one in self._rules:
            if one.rule.resolve is not None:
                one.alerts.resolved = self._resolver(one.rule.resolve)

    def evaluate(self, at: float) -> list[Transition]:
        """All rules at a moment, seconds."""
        self._at = at
        made: list[Transition] = []
        for one in self._rules:
            try:
                elements = self._evaluation().elements(one.rule.expression)
                if one.rule.kind == "record":
                    self._publish(one, {_recorded(one.rule, labels): value for labels, value in elements.items()})
                else:
                    made += self._compare(one, elements)
            except EvaluationError as error:
                raise EvaluationError(error.what, where=one.rule.where) from None
        return made

    def firing(self, name: str) -> list[Firing]:
        """What fires now of the rules with this name."""
        return [
            Firing(_labelled(alert.labels, name), one.annotations.get(_key(alert.labels), ()), alert.value)
            for one in self._rules
            if one.rule.kind == "alert" and one.rule.name == name
            for alert in one.alerts.current("firing")
        ]

    # --- inside

    def _evaluation(self) -> Evaluation:
        return Evaluation(self._history, self._at, default_step=self._step)

    def _resolver(self, expression: Expression) -> Callable[[Labels], bool]:
        def holds(key: Labels) -> bool:
            return key in {unnamed(labels) for labels in self._evaluation().elements(expression)}

        return holds

    def _compare(self, one: _One, elements: Mapping[Labels, float]) -> list[Transition]:
        found: dict[Labels, float] = {}
        for labels, value in elements.items():
            key = unnamed(labels)
            if key in found:
                raise EvaluationError(f"more than one result has the labels {shown(key)}")
            found[key] = value
        made: list[Transition | None] = []
        for key, value in found.items():
            made.append(one.alerts.observe(key, PRESENT, value, sample_time=self._at, now=self._at))
        for key in [key for key in one.alerts.rows_of if key not in found]:
            code = self._why_absent(one.rule, key)
            made.append(one.alerts.observe(key, code, 0.0, sample_time=self._at, now=self._at))
        for labels, value in elements.items():
            one.note(dict(labels), value)
        self._publish(one, self._states(one))
        return [transition for transition in made if transition is not None]

    def _states(self, one: _One) -> dict[Labels, float]:
        series: dict[Labels, float] = {}
        for state in ("pending", "firing"):
            for alert in one.alerts.current("pending" if state == "pending" else "firing"):
                labels = {**alert.labels, ALERT_NAME: one.rule.name}
                series[_key({**labels, NAME: "ALERTS", ALERT_STATE: state})] = 1.0
                series[_key({**labels, NAME: "ALERTS_FOR_STATE"})] = float(int(alert.since))
        return series

    def _publish(self, one: _One, series: Mapping[Labels, float]) -> None:
        at = milliseconds(self._at)
        for labels in one.published - series.keys():
            self._history.end(labels, at)
        for labels, value in series.items():
            self._history.append(labels, value, at)
        one.published = set(series)

    def _why_absent(self, rule: Rule, key: Labels) -> int:
        """Silence, or a condition that doesn't hold."""
        if rule.no_data == "resolve":
            return FILTERED
        wanted, history = dict(key), self._history
        silent = False
        for selector in plain_selectors(rule):
            series = history.select(selector)
            if not len(series):
                continue
            at = milliseconds(self._at)
            found, _, _ = history.latest(series, at, milliseconds(Evaluation.lookback))
            ever, _, _ = history.latest(series, at, np.inf)
            sets = history.table.sets
            for place, number in enumerate(history.keys(series).tolist()):
                if all(wanted.get(name, value) == value for name, value in sets[number] if name != NAME):
                    if found[place]:
                        return FILTERED
                    silent = silent or bool(ever[place])  # one that ended says so, and is not silent
        return MISSING if silent else FILTERED


class _One:
    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.alerts = Alerts(rule)
        self.annotations: dict[Labels, Labels] = {}
        self.published: set[Labels] = set()

    def note(self, found: dict[str, str], value: float) -> None:
        """What an element makes of the annotations."""
        rest = {name: text for name, text in found.items() if name != NAME}
        labels = {**rest, **{name: expand(text, found, value) for name, text in self.rule.labels.items()}}
        texts = {name: expand(text, found, value) for name, text in self.rule.annotations.items()}
        self.annotations[_key({name: text for name, text in labels.items() if text})] = _key(texts)


def _key(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


def _labelled(labels: Mapping[str, str], name: str) -> Labels:
    return _key({**labels, ALERT_NAME: name})


def _recorded(rule: Rule, labels: Labels) -> Labels:
    kept = {name: value for name, value in labels if name not in METADATA and name not in rule.labels}
    added = {name: text for name, text in rule.labels.items() if text}
    return _key({**kept, **added, NAME: rule.name})
