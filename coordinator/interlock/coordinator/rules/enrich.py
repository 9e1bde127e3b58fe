"""info(): labels that describe a target (target_info) added to its series. Pure; the semantics are Prometheus'."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.expression import Matcher, Selector
from interlock.coordinator.rules.labelsets import LabelTable
from interlock.coordinator.rules.values import EvaluationError, Vector

IDENTIFYING = ("instance", "job")  # the labels by which a series and what describes it belong together
TARGET_INFO = "target_info"


def enriched(table: LabelTable, base: Vector, chosen: Selector | None, select: Callable[[Selector], Vector]) -> Vector:
    """The elements of `base` with the labels of the info series of the same target."""
    matchers = () if chosen is None else chosen.matchers
    named = tuple(matcher for matcher in matchers if matcher.label == NAME)
    wanted = tuple(matcher for matcher in matchers if matcher.label != NAME)
    described = named or (Matcher(NAME, "=", TARGET_INFO),)
    found = select(Selector((*described, *wanted)))
    by_target: dict[Labels, dict[str, tuple[float, Labels]]] = {}
    assert found.times is not None
    for key, time in zip(found.keys.tolist(), found.times.tolist(), strict=True):
        labels = table.sets[key]
        target = tuple(pair for pair in labels if pair[0] in IDENTIFYING)
        names = by_target.setdefault(target, {})
        name = dict(labels)[NAME]
        before = names.get(name)
        if before is not None and before[0] == time:
            raise EvaluationError(f"found duplicate series for info metric {name}")
        if before is None or before[0] < time:
            names[name] = time, labels
    must = any(not matcher.matches("") for matcher in wanted)
    keys: list[int] = []
    kept: list[int] = []
    for place, key in enumerate(base.keys.tolist()):
        labels = table.sets[key]
        if any(matcher.matches(dict(labels).get(NAME, "")) for matcher in described):
            keys.append(key)
            kept.append(place)
            continue
        added = _added(labels, by_target, {matcher.label for matcher in wanted})
        if not added and must:
            continue
        keys.append(table.id(tuple(sorted({**added, **dict(labels)}.items()))))
        kept.append(place)
    chosen_places = np.array(kept, np.int64)
    return Vector(np.array(keys, np.int64), base.values[chosen_places], base.dropped[chosen_places])


def _added(
    labels: Labels, by_target: dict[Labels, dict[str, tuple[float, Labels]]], wanted: set[str]
) -> dict[str, str]:
    target = tuple(pair for pair in labels if pair[0] in IDENTIFYING)
    have = dict(labels)
    added: dict[str, str] = {}
    for _, (_, described) in sorted(by_target.get(target, {}).items()):
        for name, value in described:
            if name == NAME or (wanted and name not in wanted):
                continue
            if added.get(name, value) != value:
                raise EvaluationError(f"conflicting label: {name}")
            if name not in have:
                added[name] = value
    return added
