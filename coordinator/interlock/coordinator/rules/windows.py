"""Functions of a window's samples, for all series at once. Pure; the semantics are Prometheus' (promql/functions.go).

Each takes a matrix and its parameters, and gives a value per series and which series have one (None: all of them).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from interlock.coordinator.rules.reductions import (
    counts,
    deviations,
    largest,
    means,
    ones,
    quantiles,
    smallest,
    sums,
    variances,
)
from interlock.coordinator.rules.values import EvaluationError, Flags, Floats, Ints, Matrix, Runs, fold

Result = tuple[Floats, Flags | None]
WindowFunction = Callable[..., Result]

PREDICT_SAMPLES = 10  # a forecast of a live rule needs so many samples,
PREDICT_SPAN = 0.5  # over this share of its window: two samples after a start say nothing about a trend
ANOMALY_SAMPLES = 10  # an anomaly score needs so many samples before the one that is judged
ANOMALY_LEVEL, ANOMALY_TREND, ANOMALY_SPREAD = 0.3, 0.1, 0.1  # weights of the newest value in Holt's method
CANCELLED = 1e-4  # a counter's change so small against what resets took is summed up step by step: 12 digits are left
TINY = 1e-12  # a spread below this share of the level is none


def extrapolated(  # noqa: PLR0917 - columns of one computation, in both tiers
    count: Ints | Floats,
    first_time: Floats,
    first: Floats,
    last_time: Floats,
    change: Floats,
    start: float,
    end: float,
    *,
    counter: bool,
    per_second: bool,
    began: Floats | None = None,
) -> Result:
    """The change over the whole window from the samples in it, as Prometheus extrapolates it. Times in milliseconds.

    `change`: from the first sample to the last, resets of a counter made good. `began`: when the counter of the first
    sample began, which is a sample of zero if it lies in the window.
    """
    sampled = (last_time - first_time) / 1000
    interval = sampled / (count - 1) if began is None else np.where(count > 1, sampled / np.maximum(count - 1, 1), 0.0)
    to_start, to_end = (first_time - start) / 1000, (end - last_time) / 1000
    threshold = interval * 1.1
    to_start = np.where(to_start >= threshold, interval / 2, to_start)
    if counter:  # a counter never was below zero
        to_zero = np.where((change > 0) & (first >= 0), sampled * (first / change), to_start)
        to_start = np.where(to_zero < to_start, to_zero, to_start)
    found = (count > 1) & (sampled > 0)
    if began is not None:
        zero = (began != 0) & (began > start) & (began < first_time)
        to_start = np.where(zero, 0.0, to_start)
        sampled = np.where(zero, (last_time - began) / 1000, sampled)
        change = np.where(zero, change + first, change)
        found |= zero
    to_end = np.where(to_end >= threshold, interval / 2, to_end)
    factor = (sampled + to_start + to_end) / sampled
    if per_second:
        factor = factor / ((end - start) / 1000)
    return change * factor, found


def cancelled(change: Floats, first: Floats, last: Floats, drops: Floats) -> Flags:
    """Where little is left of a counter's change (last - first + drops) but what rounding did to its parts."""
    size = np.abs(first) + np.abs(last) + np.abs(drops)
    found: Flags = (drops != 0) & (np.abs(change) <= CANCELLED * size) & np.isfinite(size)
    return found


def steps(matrix: Matrix) -> tuple[Floats, Floats, Flags]:
    """(before, value, whether there is a before) of each sample."""
    values = matrix.runs.values
    before = np.empty_like(values)
    before[1:] = values[:-1]
    inner = np.ones(len(values), bool)
    inner[matrix.runs.starts] = False
    before[matrix.runs.starts] = values[matrix.runs.starts]
    return before, values, inner


def began_anew(matrix: Matrix) -> Flags:
    """Which samples' counters began after the sample before them, as far as start times tell."""
    if matrix.starts is None:
        return np.zeros(len(matrix.times), bool)
    starts, times = matrix.starts, matrix.times
    earlier, earlier_start = _shifted(times), _shifted(starts)
    known = (starts != 0) & (starts < times)
    chained = (starts == earlier) & (earlier_start != 0) & (earlier_start < earlier)  # a delta begins where one ended
    found: Flags = known & ((starts > earlier) | chained) & ~_firsts(matrix.runs)
    return found


def overlapping(matrix: Matrix) -> Flags:
    """Which series have a sample whose counter began before the sample before it, and not with it."""
    if matrix.starts is None:
        return np.zeros(len(matrix), bool)
    starts, earlier = matrix.starts, _shifted(matrix.times)
    odd = (starts != 0) & (starts < earlier) & (starts != _shifted(matrix.starts)) & ~_firsts(matrix.runs)
    return matrix.runs.reduce(np.maximum, odd.astype(float)) > 0


def _shifted(values: Floats) -> Floats:
    """What stands one place before."""
    return np.concatenate([values[:1], values[:-1]])


def _rate(*, counter: bool, per_second: bool) -> WindowFunction:
    def function(matrix: Matrix) -> Result:
        runs, times = matrix.runs, matrix.times
        first, last = runs.values[runs.starts], runs.values[runs.lasts]
        change = last - first
        if counter:
            before, value, inner = steps(matrix)
            reset = inner & ((value < before) | began_anew(matrix))
            drops = runs.reduce(np.add, np.where(reset, before, 0.0))
            change = change + drops
            doubtful = cancelled(change, first, last, drops)
            if doubtful.any():
                grown = np.where(reset, value, value - before)
                change = np.where(doubtful, sums(runs.with_values(np.where(inner, grown, 0.0))), change)
        return extrapolated(
            runs.counts, times[runs.starts], first, times[runs.lasts], change, matrix.start, matrix.end,
            counter=counter, per_second=per_second,
            began=None if matrix.starts is None or not counter else matrix.starts[runs.starts],
        )  # fmt: skip

    return function


def _instant(*, rate: bool) -> WindowFunction:
    def function(matrix: Matrix) -> Result:
        runs, times = matrix.runs, matrix.times
        last = runs.lasts
        before = np.maximum(last - 1, runs.starts)
        value, earlier = runs.values[last], runs.values[before]
        reset = (value < earlier) | began_anew(matrix)[last]
        change = np.where(reset, value, value - earlier) if rate else value - earlier
        sampled = times[last] - times[before]
        return (change / (sampled / 1000) if rate else change), (runs.counts > 1) & (sampled != 0)

    return function


def _regression(matrix: Matrix, intercept: Floats) -> tuple[Floats, Floats]:
    """(slope per second, value at the time `intercept`) of each series' least-squares line."""
    runs = matrix.runs
    x = (matrix.times - np.repeat(intercept, runs.counts)) / 1000
    y = runs.values

    def total(values: Floats) -> Floats:
        return sums(Runs(runs.bounds, values))

    n = runs.counts
    sum_x, sum_y, sum_xy, sum_xx = total(x), total(y), total(x * y), total(x * x)
    slope = (sum_xy - sum_x * sum_y / n) / (sum_xx - sum_x * sum_x / n)
    at = sum_y / n - slope * sum_x / n
    first = y[runs.starts]
    differs = (y != np.repeat(first, runs.counts)) & ~_firsts(runs)
    constant = runs.reduce(np.add, differs.astype(float)) == 0
    slope = np.where(constant, np.where(np.isinf(first), np.nan, 0.0), slope)
    return slope, np.where(constant, np.where(np.isinf(first), np.nan, first), at)


def _firsts(runs: Runs) -> Flags:
    made = np.zeros(len(runs.values), bool)
    made[runs.starts] = True
    return made


def _deriv(matrix: Matrix) -> Result:
    return _regression(matrix, matrix.times[matrix.runs.starts])[0], matrix.runs.counts > 1


def _predict_linear(matrix: Matrix, ahead: float, *, end: float | None = None) -> Result:
    slope, at = _regression(matrix, np.full(len(matrix), matrix.end if end is None else end))
    return slope * ahead + at, matrix.runs.counts > 1


def enough(matrix: Matrix) -> Flags:
    """Which series have enough samples for a forecast that somebody acts on."""
    span = matrix.times[matrix.runs.lasts] - matrix.times[matrix.runs.starts]
    return (matrix.runs.counts >= PREDICT_SAMPLES) & (span >= PREDICT_SPAN * (matrix.end - matrix.start))


def _changes(matrix: Matrix) -> Result:
    before, value, inner = steps(matrix)
    changed = inner & (value != before) & ~(np.isnan(value) & np.isnan(before))
    return matrix.runs.reduce(np.add, changed.astype(float)), None


def _resets(matrix: Matrix) -> Result:
    before, value, inner = steps(matrix)
    reset = inner & ((value < before) | began_anew(matrix))
    return matrix.runs.reduce(np.add, reset.astype(float)), None


def _quantile(matrix: Matrix, q: float) -> Result:
    return quantiles(q, matrix.runs), None


def _mad(matrix: Matrix) -> Result:
    """The median of the distances from the median; nothing is known of it where a sample is NaN."""
    middle = quantiles(0.5, matrix.runs)
    distances = np.abs(matrix.runs.values - np.repeat(middle, matrix.runs.counts))
    unknown = matrix.runs.reduce(np.add, np.isnan(matrix.runs.values).astype(float)) > 0
    return np.where(unknown, np.nan, quantiles(0.5, matrix.runs.with_values(distances))), None


def _smoothed(matrix: Matrix, smoothing: float, trend: float) -> Result:
    for name, given in (("smoothing", smoothing), ("trend", trend)):
        if not 0 < given < 1:
            raise EvaluationError(f"invalid {name} factor. Expected: 0 < {name[0]}f < 1, got: {given:f}")
    runs = matrix.runs
    second = runs.values[np.minimum(runs.starts + 1, runs.lasts)]
    first = runs.values[runs.starts]

    def step(state: list[Floats], value: Floats, rank: int) -> list[Floats]:
        before, now, slope = state
        if rank == 0:
            return state
        if rank > 1:
            slope = trend * (now - before) + (1 - trend) * slope
        return [now, smoothing * value + (1 - smoothing) * (now + slope), slope]

    _, now, _ = fold(runs, [np.zeros(len(first)), first.copy(), second - first], step)
    return now, runs.counts > 1


def _time_of(best: Callable[[Runs], Floats]) -> WindowFunction:
    """When the last of the most extreme values was."""

    def function(matrix: Matrix) -> Result:
        runs = matrix.runs
        found = np.repeat(best(runs), runs.counts)
        places = np.where((runs.values == found) | np.isnan(found), np.arange(len(found)), -1)
        last = np.maximum.reduceat(places, runs.starts) if len(matrix) else places
        return matrix.times[last] / 1000, None

    return function


def _anomaly_score(matrix: Matrix) -> Result:
    """How far the newest sample is from what Holt's method expected, in units of its usual error.

    Level and trend follow the samples of the window; the usual error is exponentially weighted.
    """

    def step(state: list[Floats], value: Floats, rank: int) -> list[Floats]:
        level, trend, spread, score = state
        if rank == 0:
            return [value, trend, spread, score]
        expected = level + trend
        error = value - expected
        usual = np.sqrt(spread) + TINY * (1.0 + np.abs(level))
        score = np.abs(error) / usual
        seen = 1.0 / min(rank, 1.0 / ANOMALY_SPREAD)
        level = expected + ANOMALY_LEVEL * error
        trend = trend + ANOMALY_LEVEL * ANOMALY_TREND * error
        return [level, trend, spread + seen * (error * error - spread), score]

    zeros = [np.zeros(len(matrix)) for _ in range(4)]
    score = fold(matrix.runs, zeros, step)[3]
    return score, matrix.runs.counts > ANOMALY_SAMPLES


def _over_time(reduce: Callable[[Runs], Floats]) -> WindowFunction:
    return lambda matrix: (reduce(matrix.runs), None)


WINDOW_FUNCTIONS: dict[str, WindowFunction] = {
    "rate": _rate(counter=True, per_second=True),
    "increase": _rate(counter=True, per_second=False),
    "delta": _rate(counter=False, per_second=False),
    "irate": _instant(rate=True),
    "idelta": _instant(rate=False),
    "deriv": _deriv,
    "predict_linear": _predict_linear,
    "changes": _changes,
    "resets": _resets,
    "avg_over_time": _over_time(means),
    "min_over_time": _over_time(smallest),
    "max_over_time": _over_time(largest),
    "sum_over_time": _over_time(sums),
    "count_over_time": _over_time(counts),
    "last_over_time": _over_time(lambda runs: runs.values[runs.lasts]),
    "first_over_time": _over_time(lambda runs: runs.values[runs.starts]),
    "present_over_time": _over_time(ones),
    "stddev_over_time": _over_time(deviations),
    "stdvar_over_time": _over_time(variances),
    "quantile_over_time": _quantile,
    "mad_over_time": _mad,
    "double_exponential_smoothing": _smoothed,
    "holt_winters": _smoothed,
    "ts_of_first_over_time": lambda matrix: (matrix.times[matrix.runs.starts] / 1000, None),
    "ts_of_last_over_time": lambda matrix: (matrix.times[matrix.runs.lasts] / 1000, None),
    "ts_of_min_over_time": _time_of(smallest),
    "ts_of_max_over_time": _time_of(largest),
    "anomaly_score": _anomaly_score,
}
KEEP_NAME = ("last_over_time", "first_over_time")  # they give the sample itself
