"""What Prometheus would remark on an evaluation: warnings and hints, in its words (util/annotations). Pure.

Of the same remark about several series or moments there is one, which counts them where Prometheus does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal

Kind = Literal["warn", "info"]

_PREFIX = {"warn": "PromQL warning", "info": "PromQL info"}
_PLACE = "(1:1)"  # where in the expression: the parser doesn't say
_FORCED = (
    "input to histogram_quantile needed to be fixed for monotonicity (see "
    "https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile)"
)
_OVERLAP = "sample has start time that overlaps with previous sample timestamp"


@dataclass(frozen=True)
class Forced:
    """Buckets whose counts had to be raised: the lowest and the highest bound, and by how much at most."""

    low: float
    high: float
    by: float


class Notes:
    """Of one evaluation, or of all moments of a range."""

    def __init__(self) -> None:
        self._texts: dict[tuple[Kind, str], None] = {}
        self._forced: dict[str, tuple[Forced, int, float, float]] = {}  # by metric: all of them, count, first, last
        self._overlaps: dict[str, int] = {}

    def add(self, kind: Kind, text: str) -> None:
        self._texts[kind, text] = None

    def forced(self, metric: str, forced: Forced, at_s: float) -> None:
        known = self._forced.get(metric)
        if known is None:
            self._forced[metric] = forced, 1, at_s, at_s
            return
        before, count, first, last = known
        merged = Forced(min(before.low, forced.low), max(before.high, forced.high), max(before.by, forced.by))
        self._forced[metric] = merged, count + 1, min(first, at_s), max(last, at_s)

    def overlap(self, metric: str) -> None:
        """A start time that lies before the sample before."""
        self._overlaps[metric] = self._overlaps.get(metric, 0) + 1

    def texts(self, kind: Kind) -> list[str]:
        found = [text for of, text in self._texts if of == kind]
        if kind == "info":
            for metric, (forced, count, first, last) in self._forced.items():
                named = f' for metric name "{metric}"' if metric else ""
                found.append(
                    f"{_FORCED}{named}, from buckets {general(forced.low)} to {general(forced.high)}, with a max diff "
                    f"of {forced.by:.2g}, over {count} samples from {_clock(first)} to {_clock(last)}"
                )
        else:
            for metric, count in self._overlaps.items():
                times = f" ({count} occurrences)" if count > 1 else ""
                found.append(f'{_OVERLAP} for metric "{metric}"{times}')
        return sorted(f"{_PREFIX[kind]}: {text} {_PLACE}" for text in found)


def general(value: float) -> str:
    """A number as Go's %g writes it: all digits that it has, an exponent from 1e+06 on and below 1e-04."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    power = len(digits) + exponent - 1
    if value == 0 or -4 <= power < 6:
        return format(Decimal(repr(value)).normalize(), "f")
    rest = "".join(map(str, digits[1:]))
    return f"{'-' * sign}{digits[0]}{'.' + rest if rest else ''}e{power:+03d}"


def _clock(at_s: float) -> str:
    try:
        return datetime.fromtimestamp(math.floor(at_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return general(at_s)
