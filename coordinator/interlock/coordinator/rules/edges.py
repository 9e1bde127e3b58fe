"""Windows whose ends count: `anchored` and `smoothed`. Pure; the semantics are Prometheus' (promql/functions.go).

An anchored window begins with the newest sample before it, so that a counter's increase is a whole number; a smoothed
one begins and ends with what a line through the samples on both sides of an end gives. Neither extrapolates. The matrix
that comes here has the samples around its window too, as far as the lookback reaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from interlock.coordinator.rules.expression import Edges
from interlock.coordinator.rules.values import EvaluationError, Floats, Ints, Matrix, Runs

COUNTERS = ("rate", "increase")
ALLOWED: dict[str, tuple[str, ...]] = {
    "anchored": ("changes", "delta", "increase", "rate", "resets"),
    "smoothed": ("delta", "increase", "rate"),
}


@dataclass(frozen=True)
class _Cut:
    """One series: its samples, which of them are the first and the last that count, and what the ends are worth."""

    times: Floats
    values: Floats
    first: int
    last: int
    left: float
    right: float


def allowed(edges: Edges, function: str) -> None:
    """EvaluationError for a function that would take samples outside of the window for ones inside."""
    if function not in ALLOWED[edges]:
        names = ", ".join(ALLOWED[edges])
        raise EvaluationError(f"{edges} modifier can only be used with: {names} - not with {function}")


def changed(matrix: Matrix, edges: Edges, function: str) -> tuple[Ints, Floats]:
    """(places in the matrix, values) of rate, increase and delta over such a window."""
    counter = function in COUNTERS
    places: list[int] = []
    values: list[float] = []
    for place, cut in _cuts(matrix, edges, counter=counter):
        change = cut.right - cut.left
        if counter:
            first = cut.first + (cut.times[cut.first] <= matrix.start)
            last = cut.last - (cut.times[cut.last] >= matrix.end)
            steps = np.concatenate([[cut.left], cut.values[first : last + 1], [cut.right]])
            change += float(steps[:-1][steps[1:] < steps[:-1]].sum())
        places.append(place)
        values.append(change / matrix.seconds if function == "rate" else change)
    return np.array(places, np.int64), np.array(values, float)


def anchored(matrix: Matrix) -> Matrix:
    """Each series from its newest sample at or before the window's start on; none of those without any behind that."""
    cuts = _cuts(matrix, "anchored")
    return _rebuilt(matrix, ((place, cut.times[cut.first :], cut.values[cut.first :]) for place, cut in cuts))


def extended(matrix: Matrix, edges: Edges) -> Matrix:
    """The window itself as a result: a point at each of its ends, and the samples inside."""

    def points() -> Iterator[tuple[int, Floats, Floats]]:
        for place, cut in _cuts(matrix, edges):
            first = cut.first + (cut.times[cut.first] <= matrix.start)
            last = cut.last - (cut.times[cut.last] >= matrix.end)
            inside = slice(first, max(last + 1, first))
            times = np.concatenate([[matrix.start], cut.times[inside], [matrix.end]])
            yield place, times, np.concatenate([[cut.left], cut.values[inside], [cut.right]])

    return _rebuilt(matrix, points())


def between(matrix: Matrix, at: float) -> tuple[Ints, Floats]:
    """(places, values) at a moment, between the samples before and after it; with none after it, the one before."""
    places: list[int] = []
    values: list[float] = []
    for place in range(len(matrix)):
        low, high = matrix.runs.bounds[place : place + 2].tolist()
        times, found = matrix.times[low:high], matrix.runs.values[low:high]
        after = int(np.searchsorted(times, at, "left"))
        if after < len(times) and times[after] == at:
            value = float(found[after])
        elif after == 0:
            continue
        elif after < len(times):
            value = _interpolated(times, found, after - 1, at, counter=False)
        else:
            value = float(found[-1])
        places.append(place)
        values.append(value)
    return np.array(places, np.int64), np.array(values, float)


def _cuts(matrix: Matrix, edges: Edges, *, counter: bool = False) -> Iterator[tuple[int, _Cut]]:
    smoothed = edges == "smoothed"
    for place in range(len(matrix)):
        low, high = matrix.runs.bounds[place : place + 2].tolist()
        times, values = matrix.times[low:high], matrix.runs.values[low:high]
        last = len(times) - 1
        first = max(0, int(np.searchsorted(times[:last], matrix.start, "right")) - 1)
        if smoothed:
            last = int(np.searchsorted(times[:last], matrix.end, "left"))
        if times[last] <= matrix.start or (smoothed and times[first] > matrix.end):
            continue
        left, right = float(values[first]), float(values[last])
        if smoothed and times[first] < matrix.start:
            left = _interpolated(times, values, first, matrix.start, counter=counter)
        if smoothed and last > 0 and times[last] > matrix.end:
            right = _interpolated(times, values, last - 1, matrix.end, counter=counter)
        yield place, _Cut(times, values, first, last, left, right)


def _interpolated(times: Floats, values: Floats, before: int, at: float, *, counter: bool) -> float:
    """On the line from a sample to the next one; a counter that was reset between them began at zero."""
    y1, y2 = float(values[before]), float(values[before + 1])
    if counter and y2 < y1:
        y1 = 0.0
    return y1 + (y2 - y1) * float((at - times[before]) / (times[before + 1] - times[before]))


def _rebuilt(matrix: Matrix, found: Iterator[tuple[int, Floats, Floats]]) -> Matrix:
    parts = list(found)
    places = np.array([place for place, _, _ in parts], np.int64)
    bounds = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(times) for _, times, _ in parts], out=bounds[1:])
    times = np.concatenate([np.empty(0), *(times for _, times, _ in parts)])
    values = np.concatenate([np.empty(0), *(values for _, _, values in parts)])
    return Matrix(matrix.keys[places], matrix.dropped[places], Runs(bounds, values), times, matrix.start, matrix.end)
