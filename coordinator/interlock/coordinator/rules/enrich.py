"""info(): labels that describe a target (target_info) added to its series. Pure; the semantics are Prometheus'."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Expression,
    Matcher,
    Moment,
    Negate,
    Selector,
    Subquery,
    Window,
    selectors,
)
from interlock.coordinator.rules.labelsets import LabelTable, named_set
from interlock.coordinator.rules.values import EvaluationError, Vector

IDENTIFYING = ("instance", "job")  # the labels by which a series and what describes it belong together
TARGET_INFO = "target_info"
INFO_METRICS = ".+_info"  # where only names that are not meant are said

Described = dict[str, tuple[float, Labels]]  # by the info metric's name: (time, labels)


def looked_at(expression: Expression) -> tuple[Moment | None, float]:
    """(@, offset in seconds) of the first selector in the expression: info series are those of the same moment."""
    match expression:
        case Selector(at=at, offset_s=offset_s) | Window(Selector(at=at, offset_s=offset_s)):
            return at, offset_s
        case Subquery(operand, at=at, offset_s=offset_s):
            inner, inner_offset = looked_at(operand)
            return (inner, inner_offset) if inner is not None else (at, inner_offset + offset_s)
        case Negate(operand):
            return looked_at(operand)
        case Binary(left=left, right=right):
            return looked_at(left if any(selectors(left)) else right)
        case Aggregate(operand=operand, parameter=parameter):
            first = parameter is not None and any(selectors(parameter))
            return looked_at(parameter if first and parameter is not None else operand)
        case Call(arguments=arguments):
            chosen = next((argument for argument in arguments if any(selectors(argument))), None)
            return (None, 0.0) if chosen is None else looked_at(chosen)
    return None, 0.0


def enriched(
    table: LabelTable, base: Vector, chosen: Selector | None, select: Callable[[tuple[Matcher, ...]], Vector]
) -> Vector:
    """The elements of `base` with the labels of the info series of the same target."""
    matchers = () if chosen is None else chosen.matchers
    named = tuple(matcher for matcher in matchers if matcher.label == NAME)
    wanted = tuple(matcher for matcher in matchers if matcher.label != NAME)
    if not named:
        named = (Matcher(NAME, "=", TARGET_INFO),)
    elif all(matcher.op in ("!=", "!~") for matcher in named):
        named = (Matcher(NAME, "=~", INFO_METRICS), *named)

    def describes(key: int) -> bool:
        name = dict(table.sets[key]).get(NAME, "")
        return all(matcher.matches(name) for matcher in named)

    enrich = [place for place, key in enumerate(base.keys.tolist()) if not describes(key)]
    by_target = _by_target(table, [table.sets[key] for key in base.keys[enrich].tolist()], (*named, *wanted), select)
    chosen_ones = set(enrich)
    must = any(not matcher.matches("") for matcher in wanted)
    keys: list[int] = []
    kept: list[int] = []
    for place, key in enumerate(base.keys.tolist()):
        labels = table.sets[key]
        if place not in chosen_ones:
            keys.append(key)
            kept.append(place)
            continue
        target = tuple(pair for pair in labels if pair[0] in IDENTIFYING)
        if must and not by_target.get(target):
            continue
        added = _added(labels, by_target.get(target, {}), {matcher.label for matcher in wanted})
        keys.append(table.id(tuple(sorted({**added, **dict(labels)}.items()))))
        kept.append(place)
    chosen_places = np.array(kept, np.int64)
    return Vector(np.array(keys, np.int64), base.values[chosen_places], base.dropped[chosen_places])


def _by_target(
    table: LabelTable,
    base: list[Labels],
    matchers: tuple[Matcher, ...],
    select: Callable[[tuple[Matcher, ...]], Vector],
) -> dict[Labels, Described]:
    """The newest info series of each target and name. EvaluationError for two of the same time."""
    values = {name: {value for labels in base for key, value in labels if key == name} for name in IDENTIFYING}
    values = {name: found for name, found in values.items() if found}
    if not values:
        return {}
    found = select(matchers)
    by_target: dict[Labels, Described] = {}
    assert found.times is not None
    for key, time in zip(found.keys.tolist(), found.times.tolist(), strict=True):
        labels = table.sets[key]
        have = dict(labels)
        if any(have.get(name, "") not in wanted for name, wanted in values.items()):
            continue
        names = by_target.setdefault(tuple(pair for pair in labels if pair[0] in IDENTIFYING), {})
        before = names.get(have[NAME])
        if before is not None and before[0] == time:
            raise EvaluationError(
                f"found duplicate series for info metric: existing {named_set(before[1])} @ {time:.0f}, "
                f"new {named_set(labels)} @ {time:.0f}"
            )
        if before is None or before[0] < time:
            names[have[NAME]] = time, labels
    return by_target


def _added(labels: Labels, by_name: Described, wanted: set[str]) -> dict[str, str]:
    have = dict(labels)
    added: dict[str, str] = {}
    for _, (_, described) in sorted(by_name.items()):
        for name, value in described:
            if name == NAME or (wanted and name not in wanted):
                continue
            if added.get(name, value) != value:
                raise EvaluationError(f"conflicting label: {name}")
            if name not in have:
                added[name] = value
    return added
