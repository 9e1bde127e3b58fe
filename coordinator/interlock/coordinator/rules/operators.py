"""What the operators, functions and aggregations of the language do to numbers. Pure; the semantics are Prometheus'.

Go and Python disagree where a result isn't finite: Python raises where Go gives infinity or NaN. Here it is Go's way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

Points = Sequence[tuple[float, float]]  # (time, value), oldest first


# --- binary operators


def divide(a: float, b: float) -> float:
    try:
        return a / b
    except ZeroDivisionError:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)


def modulo(a: float, b: float) -> float:
    try:
        return math.fmod(a, b)
    except ValueError:
        return math.nan


def power(a: float, b: float) -> float:
    odd = math.isfinite(b) and math.fmod(b, 2.0) in (1.0, -1.0)
    try:
        return math.pow(a, b)
    except OverflowError:
        return -math.inf if a < 0 and odd else math.inf
    except ValueError:
        if a == 0:
            return math.copysign(math.inf, a) if odd else math.inf
        return math.nan


ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": float.__add__,
    "-": float.__sub__,
    "*": float.__mul__,
    "/": divide,
    "%": modulo,
    "^": power,
    "atan2": math.atan2,
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "==": float.__eq__,
    "!=": float.__ne__,
    ">": float.__gt__,
    "<": float.__lt__,
    ">=": float.__ge__,
    "<=": float.__le__,
}
SETS = ("and", "or", "unless")


# --- functions of one element; None leaves the element out


def _guarded(function: Callable[[float], float], at_zero: float = math.nan) -> Callable[[float], float]:
    def guarded(value: float) -> float:
        try:
            return float(function(value))
        except OverflowError:
            return math.inf
        except ValueError:
            return at_zero if value == 0 else math.nan

    return guarded


def _whole(function: Callable[[float], int]) -> Callable[[float], float]:
    return lambda value: float(function(value)) if math.isfinite(value) else value


def _round(value: float, nearest: float = 1.0) -> float:
    inverse = divide(1.0, nearest)
    scaled = value * inverse + 0.5
    return divide(float(math.floor(scaled)) if math.isfinite(scaled) else scaled, inverse)


def _clamp(value: float, low: float, high: float) -> float | None:
    if high < low:
        return None
    return (
        math.nan
        if math.isnan(value + low + high) and any(map(math.isnan, (value, low, high)))
        else max(low, min(high, value))
    )


def _clamp_min(value: float, low: float) -> float:
    return math.nan if math.isnan(value) or math.isnan(low) else max(low, value)


def _clamp_max(value: float, high: float) -> float:
    return math.nan if math.isnan(value) or math.isnan(high) else min(high, value)


def _sign(value: float) -> float:
    return 1.0 if value > 0 else -1.0 if value < 0 else value


ELEMENTWISE: dict[str, Callable[..., float | None]] = {
    "abs": abs,
    "ceil": _whole(math.ceil),
    "floor": _whole(math.floor),
    "round": _round,
    "clamp": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "sqrt": _guarded(math.sqrt),
    "exp": _guarded(math.exp),
    "ln": _guarded(math.log, -math.inf),
    "log2": _guarded(math.log2, -math.inf),
    "log10": _guarded(math.log10, -math.inf),
    "sgn": _sign,
}


# --- aggregations over a group's values (never empty)


def compensated_sum(values: Sequence[float]) -> float:
    """Neumaier's sum: what large values absorb comes back in the end."""
    total = lost = 0.0
    for value in values:
        after = total + value
        if math.isinf(after):
            lost = 0.0
        elif abs(total) >= abs(value):
            lost += (total - after) + value
        else:
            lost += (value - after) + total
        total = after
    return total + lost


def mean(values: Sequence[float]) -> float:
    """The sum over the count; where the sum overflows, the mean of the scaled values."""
    total = compensated_sum(values)
    if math.isinf(total) and all(map(math.isfinite, values)):
        return compensated_sum([value / len(values) for value in values])
    return total / len(values)


def smallest(values: Sequence[float]) -> float:
    """NaN only where there is nothing else."""
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def largest(values: Sequence[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def variance(values: Sequence[float]) -> float:
    """Of the whole population, by Welford's method."""
    if not all(map(math.isfinite, values)):
        return math.nan
    centre = squares = 0.0
    for count, value in enumerate(values, 1):
        delta = value - centre
        centre += delta / count
        squares += delta * (value - centre)
    return squares / len(values)


def quantile(q: float, values: Sequence[float]) -> float:
    """Interpolated; NaN counts as the smallest value."""
    if math.isnan(q) or not values:
        return math.nan
    if q < 0:
        return -math.inf
    if q > 1:
        return math.inf
    ordered = sorted(values, key=lambda value: (not math.isnan(value), value))
    rank = q * (len(ordered) - 1)
    below = max(0, math.floor(rank))
    above = min(len(ordered) - 1, below + 1)
    weight = rank - math.floor(rank)
    return ordered[below] * (1 - weight) + ordered[above] * weight


REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": compensated_sum,
    "avg": mean,
    "min": smallest,
    "max": largest,
    "count": lambda values: float(len(values)),
    "group": lambda values: 1.0,
    "stddev": lambda values: math.sqrt(variance(values)),
    "stdvar": variance,
}
RANKINGS = ("topk", "bottomk")
AGGREGATIONS = (*REDUCTIONS, *RANKINGS, "quantile")


# --- functions of a window: (points, start, end, parameters) -> a value, or None where there are too few points


def _extrapolated(points: Points, start: float, end: float, *, counter: bool, per_second: bool) -> float | None:
    """The change over the whole window from the samples in it, as Prometheus extrapolates it (promql/functions.go)."""
    if len(points) < 2:
        return None
    (first_time, first), (last_time, last) = points[0], points[-1]
    change = last - first
    if counter:
        before = first
        for _, value in points:
            if value < before:
                change += before
            before = value
    sampled = last_time - first_time
    if sampled <= 0:
        return None
    interval = sampled / (len(points) - 1)
    to_start, to_end = first_time - start, end - last_time
    threshold = interval * 1.1
    if to_start >= threshold:
        to_start = interval / 2
    if counter and change > 0 and first >= 0:
        to_start = min(to_start, sampled * (first / change))  # a counter never was below zero
    if to_end >= threshold:
        to_end = interval / 2
    result = change * ((sampled + to_start + to_end) / sampled)
    return result / (end - start) if per_second else result


def _instant(points: Points, *, counter: bool, per_second: bool) -> float | None:
    if len(points) < 2:
        return None
    (before_time, before), (last_time, last) = points[-2], points[-1]
    change = last if counter and last < before else last - before
    if last_time <= before_time:
        return None
    return change / (last_time - before_time) if per_second else change


def _regression(points: Points, intercept_time: float) -> tuple[float, float] | None:
    """(slope, value at `intercept_time`) of the least-squares line."""
    if len(points) < 2:
        return None
    if all(value == points[0][1] for _, value in points):
        return (math.nan, math.nan) if math.isinf(points[0][1]) else (0.0, points[0][1])
    times = [time - intercept_time for time, _ in points]
    values = [value for _, value in points]
    count = len(points)
    sum_x, sum_y = compensated_sum(times), compensated_sum(values)
    covariance = compensated_sum([x * y for x, y in zip(times, values, strict=True)]) - sum_x * sum_y / count
    spread = compensated_sum([x * x for x in times]) - sum_x * sum_x / count
    slope = divide(covariance, spread)
    return slope, sum_y / count - slope * sum_x / count


def _deriv(points: Points, start: float, end: float) -> float | None:
    line = _regression(points, points[0][0]) if points else None
    return None if line is None else line[0]


def _predict_linear(points: Points, start: float, end: float, ahead: float) -> float | None:
    line = _regression(points, end)
    return None if line is None else line[0] * ahead + line[1]


def _changes(points: Points, start: float, end: float) -> float:
    pairs = itertools.pairwise(points)
    return float(sum(b != a and not (math.isnan(a) and math.isnan(b)) for (_, a), (_, b) in pairs))


def _resets(points: Points, start: float, end: float) -> float:
    return float(sum(b < a for (_, a), (_, b) in itertools.pairwise(points)))


def _over_time(reduce: Callable[[Sequence[float]], float]) -> Callable[..., float | None]:
    return lambda points, start, end: reduce([value for _, value in points])


WINDOWED: dict[str, Callable[..., float | None]] = {
    "rate": lambda p, start, end: _extrapolated(p, start, end, counter=True, per_second=True),
    "increase": lambda p, start, end: _extrapolated(p, start, end, counter=True, per_second=False),
    "delta": lambda p, start, end: _extrapolated(p, start, end, counter=False, per_second=False),
    "irate": lambda p, start, end: _instant(p, counter=True, per_second=True),
    "idelta": lambda p, start, end: _instant(p, counter=False, per_second=False),
    "deriv": _deriv,
    "predict_linear": _predict_linear,
    "changes": _changes,
    "resets": _resets,
    "avg_over_time": _over_time(mean),
    "min_over_time": _over_time(smallest),
    "max_over_time": _over_time(largest),
    "sum_over_time": _over_time(compensated_sum),
    "count_over_time": _over_time(lambda values: float(len(values))),
    "last_over_time": _over_time(lambda values: values[-1]),
    "present_over_time": _over_time(lambda values: 1.0),
    "stddev_over_time": _over_time(lambda values: math.sqrt(variance(values))),
    "stdvar_over_time": _over_time(variance),
    "quantile_over_time": lambda p, start, end, q: quantile(q, [value for _, value in p]),
}
