"""What the operators and the functions of one element do to numbers, column by column. Pure; Prometheus' semantics.

numpy computes as Go does where a result isn't finite; the caller silences its warnings about that (`quietly`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from interlock.coordinator.rules.reductions import REDUCTIONS
from interlock.coordinator.rules.values import Flags, Floats


def quietly() -> np.errstate:
    """For a division by zero, and the like: Go says nothing about them, and the result tells."""
    return np.errstate(all="ignore")


# --- binary operators

ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "%": np.fmod,
    "^": np.power,
    "atan2": np.arctan2,
}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": np.equal,
    "!=": np.not_equal,
    ">": np.greater,
    "<": np.less,
    ">=": np.greater_equal,
    "<=": np.less_equal,
}
SETS = ("and", "or", "unless")
RANKINGS = ("topk", "bottomk", "limitk", "limit_ratio")
AGGREGATIONS = (*REDUCTIONS, "quantile", "count_values", *RANKINGS)


def number(op: str, left: float, right: float) -> float:
    """An operator between two numbers; a comparison gives 1 or 0."""
    function = ARITHMETIC.get(op) or COMPARISONS[op]
    with quietly():
        return float(function(np.float64(left), np.float64(right)))


# --- functions of one element


def _round(values: Floats, nearest: float = 1.0) -> Floats:
    inverse = np.float64(1.0) / np.float64(nearest)
    made: Floats = np.floor(values * inverse + 0.5) / inverse
    return made


def _clamp(values: Floats, low: float, high: float) -> Floats:
    return np.maximum(low, np.minimum(high, values))


def _sign(values: Floats) -> Floats:
    return np.where(values > 0, 1.0, np.where(values < 0, -1.0, values))


def _calendar(unit: str) -> Callable[[Floats], Floats]:
    """A part of the date that a Unix time falls on, in UTC."""

    def part(values: Floats) -> Floats:
        whole = np.where(np.isfinite(values), np.trunc(values), 0.0)
        seconds = np.clip(whole, -6e10, 2.5e11).astype(np.int64).astype("datetime64[s]")
        day = seconds.astype("datetime64[D]")
        month, year = seconds.astype("datetime64[M]"), seconds.astype("datetime64[Y]")
        made: Any
        match unit:
            case "year":
                made = year.astype(np.int64) + 1970
            case "month":
                made = (month - year).astype(np.int64) + 1
            case "day_of_month":
                made = (day - month.astype("datetime64[D]")).astype(np.int64) + 1
            case "day_of_year":
                made = (day - year.astype("datetime64[D]")).astype(np.int64) + 1
            case "day_of_week":
                made = (day.astype(np.int64) + 4) % 7  # 1970 began on a Thursday
            case "days_in_month":
                made = ((month + 1).astype("datetime64[D]") - month.astype("datetime64[D]")).astype(np.int64)
            case "hour":
                made = (seconds - day.astype("datetime64[s]")).astype(np.int64) // 3600
            case _:
                made = (seconds - day.astype("datetime64[s]")).astype(np.int64) // 60 % 60
        return np.asarray(made, float)

    return part


CALENDAR = {
    unit: _calendar(unit)
    for unit in ("year", "month", "day_of_month", "day_of_year", "day_of_week", "days_in_month", "hour", "minute")
}
ELEMENTWISE: dict[str, Callable[..., Floats]] = {
    "abs": np.abs,
    "ceil": np.ceil,
    "floor": np.floor,
    "round": _round,
    "clamp": _clamp,
    "clamp_min": lambda values, low: np.maximum(low, values),
    "clamp_max": lambda values, high: np.minimum(high, values),
    "sqrt": np.sqrt,
    "exp": np.exp,
    "ln": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "sgn": _sign,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "deg": lambda values: values * 180 / np.pi,
    "rad": lambda values: values * np.pi / 180,
    **CALENDAR,
}
WINDOWED = (
    "rate", "increase", "delta", "irate", "idelta", "deriv", "predict_linear", "changes", "resets",
    "avg_over_time", "min_over_time", "max_over_time", "sum_over_time", "count_over_time", "last_over_time",
    "first_over_time", "present_over_time", "stddev_over_time", "stdvar_over_time", "quantile_over_time",
    "mad_over_time", "double_exponential_smoothing", "holt_winters", "ts_of_first_over_time", "ts_of_last_over_time",
    "ts_of_min_over_time", "ts_of_max_over_time", "anomaly_score",
)  # fmt: skip
OTHER_FUNCTIONS = (
    "absent", "absent_over_time", "absent_each", "baseline", "scalar", "vector", "time", "timestamp", "start_timestamp",
    "pi", "start", "end", "step", "range", "max_of", "min_of", "sort", "sort_desc", "sort_by_label",
    "sort_by_label_desc", "label_replace", "label_join", "histogram_quantile", "histogram_quantiles",
    "histogram_fraction", "info",
)  # fmt: skip


def kept(op: str, left: Any, right: Any) -> Flags:
    """Which elements a comparison keeps."""
    made: Flags = COMPARISONS[op](left, right)
    return made
