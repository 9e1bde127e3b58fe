"""The value of an expression at a moment, computed anew from the samples there are: the batch tier. Pure.

Everything of the language runs here; the incremental tier (graph.py) runs what it can, and must agree. Names that an
operation takes from its elements go only when the result is told, as Prometheus does it with delayed name removal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules import aggregations, edges
from interlock.coordinator.rules.calls import CALLS
from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Expression,
    Moment,
    Negate,
    Number,
    Selector,
    Subquery,
    Text,
    Window,
)
from interlock.coordinator.rules.joins import combined, paired
from interlock.coordinator.rules.labelsets import Ids
from interlock.coordinator.rules.notes import Kind, Notes, general
from interlock.coordinator.rules.operators import (
    ARITHMETIC,
    CALENDAR,
    COMPARISONS,
    ELEMENTWISE,
    RANKINGS,
    SETS,
    number,
    quietly,
)
from interlock.coordinator.rules.source import Source, milliseconds
from interlock.coordinator.rules.values import (
    EvaluationError,
    Flags,
    Floats,
    Matrix,
    Runs,
    Value,
    Vector,
    empty,
    single,
)
from interlock.coordinator.rules.windows import KEEP_NAME, WINDOW_FUNCTIONS, enough, overlapping

LOOKBACK_S = 300.0  # a sample counts for so long where no newer one comes; Prometheus' default
SUBQUERY_STEP_S = 60.0  # of a subquery that names none; Prometheus' default evaluation interval
MAX_STEPS = 11_000  # of a subquery: Prometheus' limit of points of a series
MAX_POINTS = 50_000_000  # samples that one evaluation may bring together; Prometheus' default limit
PART_COST = 20  # elements that cost as much as a part of an expression does in any case
COUNTERS = ("_total", "_sum", "_count", "_bucket")


@dataclass
class Evaluation:
    """One expression at one moment; times in seconds. `start` to `end`, `step`: of the range that is evaluated.

    `wary`: a forecast needs more than two samples. `notes`: what Prometheus would warn of. `budget`: the elements and
    samples that all of its parts may have together, each part counting as `PART_COST` more; 0: no limit.
    """

    source: Source
    at: float
    lookback: float = LOOKBACK_S
    start: float | None = None
    end: float | None = None
    step: float = 0.0
    default_step: float = SUBQUERY_STEP_S
    wary: bool = False
    notes: Notes = field(default_factory=Notes)
    budget: int = 0
    spent: int = 0

    def spend(self, elements: int) -> None:
        self.spent += elements
        if self.spent > self.budget:
            raise EvaluationError(f"it takes more than {self.budget} elements and samples to compute")

    def result(self, expression: Expression) -> Value:
        """What is told: names that are to go are gone, and no two elements have the same labels."""
        with quietly():
            value = _At(self, milliseconds(self.at), [0]).value(expression)
        if isinstance(value, Vector):
            keys = np.where(value.dropped, self.source.table.unnamed()(value.keys), value.keys)
            _distinct(keys)
            return Vector(keys, value.values, np.zeros(len(keys), bool), value.times)
        if isinstance(value, Matrix):
            keys = np.where(value.dropped, self.source.table.unnamed()(value.keys), value.keys)
            _distinct(keys)
            return Matrix(keys, value.dropped, value.runs, value.times, value.start, value.end)
        return value

    def elements(self, expression: Expression) -> dict[Labels, float]:
        """The result as a vector; a number is one element without labels."""
        value = self.result(expression)
        if isinstance(value, Vector):
            sets = self.source.table.sets
            return {sets[key]: worth for key, worth in zip(value.keys.tolist(), value.values.tolist(), strict=True)}
        if isinstance(value, float):
            return {(): value}
        raise EvaluationError("a range of samples or a string is no result")


def _distinct(keys: Any) -> None:
    if len(np.unique(keys)) < len(keys):
        raise EvaluationError("vector cannot contain metrics with the same labelset")


class _At:
    """An evaluation at one of its moments (subqueries have several). Milliseconds."""

    def __init__(self, evaluation: Evaluation, at: float, points: list[int]) -> None:
        self.of = evaluation
        self.at = at
        self.table = evaluation.source.table
        self.points = points  # how many samples were brought together so far

    # --- by kind of node

    def value(self, expression: Expression) -> Value:
        if not self.of.budget:
            return self.worth(expression)
        self.of.spend(PART_COST)
        found = self.worth(expression)
        if isinstance(found, Matrix):
            self.of.spend(len(found.runs.values))
        elif isinstance(found, Vector):
            self.of.spend(len(found))
        return found

    def worth(self, expression: Expression) -> Value:
        match expression:
            case Number(value):
                return value
            case Text(text):
                return text
            case Selector():
                return self.selector(expression)
            case Window():
                return self.window(expression)
            case Subquery():
                return self.subquery(expression)
            case Negate(operand):
                found = self.value(operand)
                return found.with_values(-found.values) if isinstance(found, Vector) else -self.number(found)
            case Binary():
                return self.binary(expression)
            case Aggregate():
                return self.aggregate(expression)
            case Call():
                return self.call(expression)

    def vector(self, expression: Expression) -> Vector:
        found = self.value(expression)
        if isinstance(found, Vector):
            return found
        raise EvaluationError("a vector is needed here")

    def scalar(self, expression: Expression) -> float:
        return self.number(self.value(expression))

    def number(self, value: Value) -> float:
        if isinstance(value, float):
            return value
        raise EvaluationError("a number is needed here")

    def note(self, kind: Kind, text: str) -> None:
        self.of.notes.add(kind, text)

    # --- samples

    def moment(self, at: Moment | None, offset_s: float) -> float:
        match at:
            case None:
                moment = self.at
            case "start":
                moment = self.at if self.of.start is None else milliseconds(self.of.start)
            case "end":
                moment = self.at if self.of.end is None else milliseconds(self.of.end)
            case _:
                moment = milliseconds(at)
        return moment - milliseconds(offset_s)

    def selector(self, selector: Selector, *, lookback_s: float | None = None) -> Vector:
        if selector.edges == "smoothed":
            return self.smoothed(selector)
        return self.newest(selector, self.of.lookback if lookback_s is None else lookback_s)[0]

    def newest(self, selector: Selector, lookback_s: float) -> tuple[Vector, Ids]:
        """The newest sample of each series, and the series' numbers."""
        source = self.of.source
        series = source.select(selector)
        moment = self.moment(selector.at, selector.offset_s)
        found, times, values = source.latest(series, moment, milliseconds(lookback_s))
        keys = source.keys(series[found])
        return Vector(keys, values[found], np.zeros(len(keys), bool), times[found]), series[found]

    def begun(self, selector: Selector) -> tuple[Vector, Floats | None]:
        """The newest samples, and when their counters began (milliseconds, 0 where nobody knows)."""
        vector, series = self.newest(selector, self.of.lookback)
        assert vector.times is not None
        return vector, self.of.source.started(series, vector.times)

    def smoothed(self, selector: Selector) -> Vector:
        at, around = self.moment(selector.at, selector.offset_s), self.lookback
        matrix = self.samples(selector, at - around, at + around, at, at)
        places, values = edges.between(matrix, at)
        return Vector(matrix.keys[places], values, np.zeros(len(places), bool), np.full(len(places), at))

    @property
    def lookback(self) -> float:
        """Milliseconds. Where each series has its own, Prometheus' lookback for what looks around a moment."""
        return milliseconds(self.of.lookback if self.of.lookback > 0 else LOOKBACK_S)

    def window(self, window: Window) -> Matrix:
        matrix = self.around(window)
        return edges.extended(matrix, window.selector.edges) if window.selector.edges else matrix

    def around(self, window: Window) -> Matrix:
        """The samples in a window; and those around it, of one whose ends count."""
        selector = window.selector
        end = self.moment(selector.at, selector.offset_s)
        start = end - milliseconds(window.seconds)
        before = self.lookback if selector.edges else 0.0
        after = self.lookback if selector.edges == "smoothed" else 0.0
        return self.samples(selector, start - before, end + after, start, end)

    def samples(self, selector: Selector, since: float, until: float, start: float, end: float) -> Matrix:
        """The samples in (since, until] of a window (start, end]."""
        source = self.of.source
        series = source.select(selector)
        bounds, times, values = source.window(series, since, until)
        self.count(len(values))
        starts = None if selector.edges else source.started(np.repeat(series, np.diff(bounds)), times)
        some = np.diff(bounds) > 0
        bounds = np.concatenate([bounds[:1], bounds[1:][some]])
        keys = source.keys(series[some])
        return Matrix(keys, np.zeros(len(keys), bool), Runs(bounds, values), times, start, end, starts)

    def count(self, points: int) -> None:
        self.points[0] += points
        if self.points[0] > MAX_POINTS:
            raise EvaluationError("query processing would load too many samples into memory in query execution")

    def subquery(self, subquery: Subquery) -> Matrix:
        end = self.moment(subquery.at, subquery.offset_s)
        start = end - milliseconds(subquery.seconds)
        step = milliseconds(self.of.default_step if subquery.step_s is None else subquery.step_s)
        first = step * math.trunc(start / step)
        if first <= start:
            first += step
        count = max(0, int((end - first) // step) + 1)
        if count > MAX_STEPS:
            raise EvaluationError(f"exceeded maximum resolution of {MAX_STEPS} points per timeseries")
        moments = [first + step * number for number in range(count)]
        vectors = []
        for moment in moments:
            found = _At(self.of, moment, self.points).value(subquery.operand)
            vectors.append(found if isinstance(found, Vector) else single(self.number(found)))
            self.count(len(vectors[-1]))
        if not any(map(len, vectors)):
            none = np.empty(0, np.int64)
            return Matrix(none, np.empty(0, bool), Runs(np.zeros(1, np.int64), np.empty(0)), np.empty(0), start, end)
        keys = np.concatenate([vector.keys for vector in vectors])
        dropped = np.concatenate([vector.dropped for vector in vectors])
        series = keys * 2 + (dropped & (self.table.unnamed()(keys) != keys))  # one without a name has none to lose
        times = np.repeat(moments, [len(vector) for vector in vectors])
        values = np.concatenate([vector.values for vector in vectors])
        distinct, groups = aggregations.numbered(series)
        order = np.argsort(groups, kind="stable")
        bounds = np.searchsorted(groups[order], np.arange(len(distinct) + 1)).astype(np.int64)
        if (np.diff(times[order])[np.diff(groups[order]) == 0] == 0).any():
            raise EvaluationError("vector cannot contain metrics with the same labelset")
        runs = Runs(bounds, values[order])
        return Matrix(distinct // 2, (distinct % 2).astype(bool), runs, times[order], start, end)

    # --- operators

    def binary(self, expression: Binary) -> Value:
        op = expression.op
        left, right = self.value(expression.left), self.value(expression.right)
        if isinstance(left, float) and isinstance(right, float):
            return number(op, left, right)
        if isinstance(left, Vector) and isinstance(right, Vector):
            if op in SETS:
                return combined(self.table, op, left, right, expression.matching)
            return paired(self.table, expression, left, right)
        if isinstance(left, Vector):
            return self.with_number(expression, left, left.values, self.number(right))
        if isinstance(right, Vector):
            return self.with_number(expression, right, self.number(left), right.values)
        raise EvaluationError(f"{op} between a range of samples or a string and something else")

    def with_number(self, expression: Binary, vector: Vector, left: Any, right: Any) -> Vector:
        if expression.op in ARITHMETIC:
            return vector.with_values(ARITHMETIC[expression.op](left, right))
        keep = COMPARISONS[expression.op](left, right)
        if expression.bool:
            return vector.with_values(keep.astype(float))
        return Vector(vector.keys[keep], vector.values[keep], vector.dropped[keep])

    def aggregate(self, expression: Aggregate) -> Vector:
        parameter = None if expression.parameter is None else self.value(expression.parameter)
        if expression.op == "count_values":
            text = expression.parameter
            if not isinstance(text, Text):
                raise EvaluationError("count_values takes the name of a label")
            if not text.value or not text.valid:
                raise EvaluationError(f'invalid label name "{_go_quoted(text)}"')
            return aggregations.counted(self.table, expression, self.vector(expression.operand), text.value)
        vector = self.vector(expression.operand)
        if expression.op == "quantile":
            self.check_quantile(parameter)
        if expression.op in RANKINGS:
            limit = self.number(parameter if parameter is not None else math.nan)
            if expression.op == "limit_ratio" and abs(limit) > 1:
                capped = math.copysign(1.0, limit)
                told = f"got {general(limit)}, capping to {general(capped)}"
                self.note("warn", f"ratio value should be between -1 and 1, {told}")
            return aggregations.ranked(self.table, expression, vector, limit)
        return aggregations.reduced(
            self.table, expression, vector, None if parameter is None else self.number(parameter)
        )

    def check_quantile(self, q: Value | None) -> None:
        if isinstance(q, float) and not 0 <= q <= 1:
            self.note("warn", f"quantile value should be between 0 and 1, got {general(q)}")

    # --- functions

    def call(self, call: Call) -> Value:
        name, arguments = call.function, call.arguments
        if name in WINDOW_FUNCTIONS:
            return self.over_window(name, arguments)
        if name in ELEMENTWISE:
            return self.elementwise(name, arguments)
        return CALLS[name](self, arguments)

    def over_window(self, name: str, arguments: tuple[Expression, ...]) -> Vector:
        ranges = [argument for argument in arguments if isinstance(argument, (Window, Subquery))]
        if not ranges:
            raise EvaluationError(f"{name}() needs a window")
        parameters: list[Any] = [self.scalar(argument) for argument in arguments if argument is not ranges[0]]
        if isinstance(ranges[0], Window) and ranges[0].selector.edges:
            return self.over_edges(name, ranges[0])
        matrix = cast(Matrix, self.value(ranges[0]))
        if name == "quantile_over_time" and len(matrix):
            self.check_quantile(parameters[0])
        if not len(matrix):
            return empty()
        named: dict[str, float] = {"end": self.at} if name == "predict_linear" else {}
        values, found = WINDOW_FUNCTIONS[name](matrix, *parameters, **named)
        if self.of.wary and name in ("predict_linear", "deriv"):
            found = enough(matrix) if found is None else found & enough(matrix)
        dropped = matrix.dropped | (name not in KEEP_NAME)
        made = Vector(matrix.keys, values, dropped)
        made = made if found is None else made.take(found)
        if name in ("rate", "increase"):
            self.check_counters(made)
            for key in matrix.keys[overlapping(matrix)].tolist():
                self.of.notes.overlap(self.metric(key))
        return made

    def over_edges(self, name: str, window: Window) -> Vector:
        """A function of a window whose ends count."""
        edge = window.selector.edges
        edges.allowed(edge, name)
        matrix = self.around(window)
        if name in ("changes", "resets"):
            matrix = edges.anchored(matrix)
            return Vector(matrix.keys, WINDOW_FUNCTIONS[name](matrix)[0], np.ones(len(matrix), bool))
        places, values = edges.changed(matrix, edge, name)
        made = Vector(matrix.keys[places], values, np.ones(len(places), bool))
        if name in edges.COUNTERS:
            self.check_counters(made)
        return made

    def check_counters(self, made: Vector) -> None:
        for metric in {self.metric(key) for key in made.keys.tolist()}:
            if metric and not metric.endswith(COUNTERS):
                self.note(
                    "info",
                    f'metric might not be a counter, name does not end in _total/_sum/_count/_bucket: "{metric}"',
                )

    def metric(self, key: int) -> str:
        return dict(self.table.sets[key]).get(NAME, "")

    def elementwise(self, name: str, arguments: tuple[Expression, ...]) -> Vector:
        if not arguments:  # the date functions look at the time of the evaluation then
            return single(float(CALENDAR[name](np.array([math.floor(self.at / 1000)], float))[0]))
        vector = self.vector(arguments[0])
        parameters = [np.float64(self.scalar(argument)) for argument in arguments[1:]]
        if name == "clamp" and parameters[1] < parameters[0]:
            return empty()
        return vector.with_values(ELEMENTWISE[name](vector.values, *parameters))

    def relabelled(self, vector: Vector, key: Any, function: Callable[[Labels], Labels], named: Flags) -> Vector:
        """With other labels. `named`: which elements were given a name by it, so that theirs goes no more."""
        keys = self.table.derive(key, function)(vector.keys)
        dropped = vector.dropped & ~named
        _distinct(keys * 2 + dropped)
        return Vector(keys, vector.values, dropped)


def _go_quoted(text: Text) -> str:
    """A string that is not UTF-8 as Go shows it."""
    if text.valid:
        return text.value
    return "".join(char if char.isascii() else f"\\x{ord(char):02x}" for char in text.value)
