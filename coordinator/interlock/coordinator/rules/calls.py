"""Functions that are neither of one element nor of a window: absence, order, labels, histograms, time. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, cast

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules import aggregations, buckets, relabel
from interlock.coordinator.rules.enrich import enriched, looked_at
from interlock.coordinator.rules.expression import Expression, Matcher, Moment, Selector, Text, Window
from interlock.coordinator.rules.labelsets import LabelTable, replaced
from interlock.coordinator.rules.notes import Kind, Notes
from interlock.coordinator.rules.source import Source, milliseconds
from interlock.coordinator.rules.values import Flags, Floats, Matrix, Value, Vector, empty, single

MEMBER_S = 3600.0  # a series that was silent for longer is no member that should report


class Around(Protocol):
    """The evaluation that `At` belongs to. Seconds."""

    @property
    def source(self) -> Source: ...

    @property
    def start(self) -> float | None: ...

    @property
    def step(self) -> float: ...

    @property
    def notes(self) -> Notes: ...


class At(Protocol):
    """An evaluation at one of its moments, milliseconds, as the functions see it (evaluate.py)."""

    at: float
    table: LabelTable

    @property
    def of(self) -> Around: ...

    def value(self, expression: Expression) -> Value: ...

    def vector(self, expression: Expression) -> Vector: ...

    def scalar(self, expression: Expression) -> float: ...

    def note(self, kind: Kind, text: str) -> None: ...

    def moment(self, at: Moment | None, offset_s: float) -> float: ...

    def selector(self, selector: Selector, *, lookback_s: float | None = None) -> Vector: ...

    def begun(self, selector: Selector) -> tuple[Vector, Floats | None]: ...

    def check_quantile(self, q: Value | None) -> None: ...

    def relabelled(self, vector: Vector, key: Any, function: Callable[[Labels], Labels], named: Flags) -> Vector: ...


def _absent_labels(matchers: tuple[Matcher, ...]) -> Labels:
    """The labels of what is missing, as far as the selector says them."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for matcher in matchers:
        if matcher.label == NAME:
            continue
        if matcher.op == "=" and matcher.label not in seen:
            found[matcher.label] = matcher.value
            seen.add(matcher.label)
        else:
            found.pop(matcher.label, None)
    return tuple(sorted((name, value) for name, value in found.items() if value))


def absent_labels(expression: Expression) -> Labels:
    match expression:
        case Selector(matchers) | Window(Selector(matchers)):
            return _absent_labels(matchers)
        case _:
            return ()


def _absent(at: At, arguments: tuple[Expression, ...]) -> Vector:
    found = at.value(arguments[0])
    if isinstance(found, (Vector, Matrix)) and len(found):
        return empty()
    return single(1.0, at.table.id(absent_labels(arguments[0])))


def _absent_each(at: At, arguments: tuple[Expression, ...]) -> Vector:
    window = cast(Window, arguments[0])
    found = at.selector(window.selector, lookback_s=MEMBER_S)
    times = cast(Any, found.times)
    silent = times <= at.moment(window.selector.at, window.selector.offset_s) - milliseconds(window.seconds)
    return found.take(silent).with_values(np.ones(int(silent.sum())))


def _baseline(at: At, arguments: tuple[Expression, ...]) -> Vector:
    source = at.of.source
    series = source.baselines(cast(Selector, arguments[0]))
    found, _, values = source.latest(series, at.at, math.inf)
    keys = at.table.without((NAME, "role", "revision"))(source.keys(series[found]))
    return Vector(keys, values[found], np.ones(len(keys), bool))


def _scalar(at: At, arguments: tuple[Expression, ...]) -> float:
    vector = at.vector(arguments[0])
    return float(vector.values[0]) if len(vector) == 1 else math.nan


def _timestamp(at: At, arguments: tuple[Expression, ...]) -> Vector:
    vector = at.vector(arguments[0])
    direct = isinstance(arguments[0], Selector) and vector.times is not None
    return vector.with_values(cast(Any, vector.times) / 1000 if direct else np.full(len(vector), at.at / 1000))


def _sort(at: At, arguments: tuple[Expression, ...], *, descending: bool) -> Vector:
    if at.of.start is not None:
        at.note("warn", "sort is ineffective for range queries since results are always ordered by labels")
    return aggregations.sorted_by_value(at.vector(arguments[0]), descending=descending)


def _sort_by_label(at: At, arguments: tuple[Expression, ...], *, descending: bool) -> Vector:
    vector = at.vector(arguments[0])
    names = [argument.value for argument in arguments[1:] if isinstance(argument, Text)]
    order = list(range(len(vector)))
    found = [at.table.sets[key] for key in vector.keys.tolist()]
    order.sort(key=lambda place: (relabel.natural_key(found[place], names), found[place]), reverse=descending)
    return vector.take(np.array(order, np.int64))


def _label_replace(at: At, arguments: tuple[Expression, ...]) -> Vector:
    texts = [argument for argument in arguments[1:] if isinstance(argument, Text)]
    function, vector = relabel.replacer(*texts), at.vector(arguments[0])
    named = np.zeros(len(vector), bool)
    if texts[0].value == NAME:
        changes = relabel.matching(texts[2], texts[3])
        named = np.array([changes(at.table.sets[key]) for key in vector.keys.tolist()], bool)
    return at.relabelled(vector, ("replace", *texts), function, named)


def _label_join(at: At, arguments: tuple[Expression, ...]) -> Vector:
    texts = [argument for argument in arguments[1:] if isinstance(argument, Text)]
    function, vector = relabel.joiner(texts[0], texts[1], texts[2:]), at.vector(arguments[0])
    return at.relabelled(vector, ("join", *texts), function, np.full(len(vector), texts[0].value == NAME))


def _histograms(at: At, expression: Expression) -> tuple[list[int], list[list[buckets.Bucket]]]:
    """(label sets without `le`, their buckets) of the classic histograms in a vector."""
    vector = at.vector(expression)
    without = at.table.without(("le",))(vector.keys)
    found: dict[int, list[buckets.Bucket]] = {}
    for key, rest, count in zip(vector.keys.tolist(), without.tolist(), vector.values.tolist(), strict=True):
        labels = dict(at.table.sets[key])
        upper = buckets.bound(labels.get("le", ""))
        if upper is None:
            named = f' for metric name "{labels[NAME]}"' if labels.get(NAME) else ""
            at.note(
                "warn",
                f'bucket label "le" is missing or has a malformed value of "{labels.get("le", "")}"{named}',
            )
            continue
        found.setdefault(rest, []).append((upper, count))
    return list(found), list(found.values())


def _histogram_quantile(at: At, arguments: tuple[Expression, ...]) -> Vector:
    q = at.scalar(arguments[0])
    at.check_quantile(q)
    keys, found = _histograms(at, arguments[1])
    return Vector(np.array(keys, np.int64), np.array(_quantiles(at, q, keys, found)), np.ones(len(keys), bool))


def _quantiles(at: At, q: float, keys: list[int], found: list[list[buckets.Bucket]]) -> list[float]:
    made = []
    for key, each in zip(keys, found, strict=True):
        value, forced = buckets.quantile(q, each)
        made.append(value)
        if forced is not None:
            at.of.notes.forced(dict(at.table.sets[key]).get(NAME, ""), forced, at.at / 1000)
    return made


def _histogram_quantiles(at: At, arguments: tuple[Expression, ...]) -> Vector:
    label = cast(Text, arguments[1]).value
    keys, found = _histograms(at, arguments[0])
    out_keys: list[int] = []
    values: list[float] = []
    for argument in arguments[2:]:
        q = at.scalar(argument)
        at.check_quantile(q)
        text = relabel.open_metrics(q)
        out_keys += [at.table.id(replaced(at.table.sets[key], label, text)) for key in keys]
        values += _quantiles(at, q, keys, found)
    return Vector(np.array(out_keys, np.int64), np.array(values, float), np.ones(len(out_keys), bool))


def _histogram_fraction(at: At, arguments: tuple[Expression, ...]) -> Vector:
    lower, upper = at.scalar(arguments[0]), at.scalar(arguments[1])
    keys, found = _histograms(at, arguments[2])
    values = np.array([buckets.fraction(lower, upper, each) for each in found], float)
    return Vector(np.array(keys, np.int64), values, np.ones(len(keys), bool))


def _info(at: At, arguments: tuple[Expression, ...]) -> Vector:
    chosen = arguments[1] if len(arguments) > 1 else None
    moment, offset_s = looked_at(arguments[0])

    def select(matchers: tuple[Matcher, ...]) -> Vector:
        return at.selector(Selector(matchers, offset_s, moment))

    return enriched(at.table, at.vector(arguments[0]), cast(Selector | None, chosen), select)


def _start_timestamp(at: At, arguments: tuple[Expression, ...]) -> Vector:
    selector = arguments[0]
    if not isinstance(selector, Selector):
        at.vector(selector)
        return empty()
    vector, starts = at.begun(selector)
    return empty() if starts is None else vector.with_values(starts / 1000)


def _seconds_of(which: Literal["start", "end"]) -> Callable[[At, tuple[Expression, ...]], float]:
    def function(at: At, arguments: tuple[Expression, ...]) -> float:
        return at.moment(which, 0.0) / 1000

    return function


def _range(at: At, arguments: tuple[Expression, ...]) -> float:
    return (at.moment("end", 0.0) - at.moment("start", 0.0)) / 1000


def _extreme(choose: Any) -> Callable[[At, tuple[Expression, ...]], float]:
    return lambda at, arguments: float(choose(at.scalar(arguments[0]), at.scalar(arguments[1])))


CALLS: dict[str, Callable[[At, tuple[Expression, ...]], Value]] = {
    "absent": _absent,
    "absent_over_time": _absent,
    "absent_each": _absent_each,
    "baseline": _baseline,
    "scalar": _scalar,
    "vector": lambda at, arguments: single(at.scalar(arguments[0])),
    "time": lambda at, arguments: at.at / 1000,
    "timestamp": _timestamp,
    "start_timestamp": _start_timestamp,
    "pi": lambda at, arguments: math.pi,
    "start": _seconds_of("start"),
    "end": _seconds_of("end"),
    "step": lambda at, arguments: at.of.step,
    "range": _range,
    "max_of": _extreme(np.fmax),
    "min_of": _extreme(np.fmin),
    "sort": lambda at, arguments: _sort(at, arguments, descending=False),
    "sort_desc": lambda at, arguments: _sort(at, arguments, descending=True),
    "sort_by_label": lambda at, arguments: _sort_by_label(at, arguments, descending=False),
    "sort_by_label_desc": lambda at, arguments: _sort_by_label(at, arguments, descending=True),
    "label_replace": _label_replace,
    "label_join": _label_join,
    "histogram_quantile": _histogram_quantile,
    "histogram_quantiles": _histogram_quantiles,
    "histogram_fraction": _histogram_fraction,
    "info": _info,
}
