"""Classic histograms: series with a label `le` each, counts of what is at most that. Pure; Prometheus' semantics."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

Bucket = tuple[float, float]  # (upper bound, count of what is not above it)

SMALL_CHANGE = 1e-12  # relative; a count that falls by less was computed inexactly
_BOUND = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[iI]nf(?:inity)?|INF)")


def bound(text: str) -> float | None:
    """The value of a label `le`; None if it is no number."""
    return float(text) if _BOUND.fullmatch(text) else None


def merged(buckets: Sequence[Bucket]) -> list[Bucket]:
    """In order, those with the same bound added up."""
    made: dict[float, float] = {}
    for upper, count in sorted(buckets, key=lambda bucket: bucket[0]):
        made[upper] = made.get(upper, 0.0) + count
    return list(made.items())


def monotonic(buckets: Sequence[Bucket]) -> tuple[list[float], bool]:
    """(counts that never fall, whether that had to be forced beyond inexactness)."""
    made: list[float] = []
    forced = False
    for _, count in buckets:
        before = made[-1] if made else count
        change = abs(count - before)
        small = change <= SMALL_CHANGE * (abs(count) + abs(before))
        if count == before or small:
            made.append(before)
        elif count < before:
            made.append(before)
            forced = True
        else:
            made.append(count)
    return made, forced


def quantile(q: float, found: Sequence[Bucket]) -> tuple[float, bool]:
    """(the quantile by linear interpolation in its bucket, whether counts had to be forced upwards)."""
    if math.isnan(q):
        return math.nan, False
    if q < 0 or q > 1:
        return math.copysign(math.inf, q), False
    buckets = merged(found)
    if buckets[-1][0] != math.inf:
        return math.nan, False
    counts, forced = monotonic(buckets)
    observations = counts[-1]
    if len(buckets) < 2 or observations == 0 or math.isnan(observations):
        return math.nan, False
    rank = q * observations
    place = next((at for at in range(len(buckets) - 1) if counts[at] >= rank), len(buckets) - 1)
    if place == len(buckets) - 1:
        return buckets[-2][0], forced
    if place == 0 and buckets[0][0] <= 0:
        return buckets[0][0], forced
    start, below = (buckets[place - 1][0], counts[place - 1]) if place else (0.0, 0.0)
    inside = counts[place] - below
    share = (rank - below) / inside if inside else math.nan
    return start + (buckets[place][0] - start) * share, forced


def fraction(lower: float, upper: float, found: Sequence[Bucket]) -> float:
    """The share of what was observed between the two bounds."""
    buckets = merged(found)
    count = buckets[-1][1]
    if buckets[-1][0] != math.inf or count == 0 or any(map(math.isnan, (count, lower, upper))):
        return math.nan
    if lower >= upper:
        return 0.0
    return (_rank(upper, buckets, count) - _rank(lower, buckets, count)) / count


def _rank(value: float, buckets: Sequence[Bucket], count: float) -> float:
    """How many observations are below a value."""
    before = 0.0
    start = 0.0 if buckets[0][0] > 0 else -math.inf
    for upper, total in buckets:
        if start >= value:
            return min(before, count)
        if upper > value:
            inside = total - before
            share = (value - start) / (upper - start) if math.isfinite(upper - start) else _infinite_share(start, upper)
            return min(before + inside * share, count)
        before, start = total, upper
    return count


def _infinite_share(start: float, upper: float) -> float:
    """Interpolation where one side is infinite, as the division gives it."""
    return math.nan if start == -math.inf else 0.0
