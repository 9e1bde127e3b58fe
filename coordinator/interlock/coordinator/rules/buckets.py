"""Classic histograms: series with a label `le` each, counts of what is at most that. Pure; Prometheus' semantics."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from interlock.coordinator.rules.notes import Forced

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


def monotonic(buckets: Sequence[Bucket]) -> tuple[list[float], Forced | None]:
    """(counts that never fall, where that had to be forced beyond inexactness)."""
    made: list[float] = []
    forced: list[Bucket] = []  # (bound, by how much)
    for upper, count in buckets:
        before = made[-1] if made else count
        change = abs(count - before)
        small = change <= SMALL_CHANGE * (abs(count) + abs(before))
        if count == before or small:
            made.append(before)
        elif count < before:
            made.append(before)
            forced.append((upper, before - count))
        else:
            made.append(count)
    if not forced:
        return made, None
    return made, Forced(forced[0][0], forced[-1][0], max(by for _, by in forced))


def quantile(q: float, found: Sequence[Bucket]) -> tuple[float, Forced | None]:
    """(the quantile by linear interpolation in its bucket, where counts had to be forced upwards)."""
    if math.isnan(q):
        return math.nan, None
    if q < 0 or q > 1:
        return math.copysign(math.inf, q), None
    buckets = merged(found)
    if buckets[-1][0] != math.inf:
        return math.nan, None
    counts, forced = monotonic(buckets)
    observations = counts[-1]
    if len(buckets) < 2 or observations == 0:
        return math.nan, forced
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
            if start == -math.inf:  # a bucket without end can't be cut: all of the first counts, none of the last
                return min(total, count)
            return min(before + (total - before) * (value - start) / (upper - start), count)
        before, start = total, upper
    return count
