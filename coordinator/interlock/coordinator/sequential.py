"""Confidence sequences: bounds that hold at every moment at once, however often and whenever one looks. Pure.

An ordinary confidence interval holds for a sample whose size was fixed beforehand. Who looks again and again, and stops
as soon as it pleases, is wrong far more often than it says. These bounds are wider, and are allowed to be looked at
after every request: the chance that they *ever* miss the truth is at most `alpha`.

Two are used here:

- of a share (errors, slow answers): Robbins' mixture of likelihood ratios with a Beta prior. Exact: it holds for every
  number of trials. With s hits and f misses it contains each p whose p^s (1-p)^f is at least `alpha` times the average
  of that likelihood over the prior.
- of a mean (log-latency): the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas,
  "Time-uniform central limit theory and asymptotic confidence sequences" (2021), Theorem 2.2. It needs a variance, no
  shape; as the central limit theorem does, it holds the better the more there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

TIGHT_AT = 500.0  # answers at which the bounds of a mean are tightest: some seconds of an agent's traffic
PRIOR = (0.5, 0.5)  # of a share (Jeffreys); any prior keeps the promise, this one is tight near 0
STEPS = 40  # of the bisection: to 12 digits


@dataclass(frozen=True)
class Bounds:
    """Between these, with the chosen confidence, at all times."""

    lower: float
    upper: float


EVERYTHING = Bounds(-math.inf, math.inf)


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of some numbers: all that a bound of their mean needs."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """NaN of none."""
        return self.total / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """Of the numbers as they are (divided by their count); 0 of fewer than two."""
        if self.count < 2:
            return 0.0
        return max(0.0, self.squares / self.count - self.mean**2)


def mean_bounds(seen: Moments, *, alpha: float, tight_at: float = TIGHT_AT) -> Bounds:
    """Of the mean of numbers like these. Fewer than two tell nothing.

    `alpha`: the chance to miss it, above 0 and below 1. `tight_at`: the count at which the bounds are tightest.
    """
    if seen.count < 2:
        return EVERYTHING
    wanted = -2 * math.log(alpha)
    rho2 = (wanted + math.log(wanted) + 1) / tight_at if wanted > 1 else 1 / tight_at
    grown = seen.count * rho2 + 1
    width = math.sqrt(2 * grown / (seen.count**2 * rho2) * math.log(math.sqrt(grown) / alpha))
    half = math.sqrt(seen.variance) * width
    return Bounds(seen.mean - half, seen.mean + half)


def share_bounds(hits: float, count: float, *, alpha: float) -> Bounds:
    """Of the share of hits in trials like these `count`. None tell nothing: 0 to 1."""
    if count <= 0:
        return Bounds(0.0, 1.0)
    hits = min(max(hits, 0.0), count)
    misses = count - hits
    a, b = PRIOR
    mixture = _log_beta(a + hits, b + misses) - _log_beta(a, b)
    least = mixture + math.log(alpha)  # of the log-likelihood of a share that is not ruled out

    def possible(p: float) -> bool:
        return _log_likelihood(p, hits, misses) >= least

    best = hits / count
    return Bounds(
        0.0 if possible(0.0) else _edge(0.0, best, possible_at_high=True, possible=possible),
        1.0 if possible(1.0) else _edge(best, 1.0, possible_at_high=False, possible=possible),
    )


def is_chance(estimate: float, limit: float, spread: float) -> bool:
    """Whether an estimate above a limit may be so by chance: within two standard errors, of a look taken only once."""
    return estimate - limit <= 2 * spread


def share_is_chance(hits: float, count: float, limit: float) -> bool:
    """The same of a share, by Wilson's interval, which also holds for few hits."""
    share, z2 = hits / count, 4.0
    middle = share + z2 / (2 * count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count * count)))
    return (middle - half) / (1 + z2 / count) <= limit


def _edge(low: float, high: float, *, possible_at_high: bool, possible: Callable[[float], bool]) -> float:
    """Where `possible` changes between `low` and `high`, on the side that is not possible: never too narrow."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        if possible(middle) == possible_at_high:
            high = middle
        else:
            low = middle
    return low if possible_at_high else high


def _log_likelihood(p: float, hits: float, misses: float) -> float:
    if (p <= 0 and hits > 0) or (p >= 1 and misses > 0):
        return -math.inf
    return (hits * math.log(p) if hits else 0.0) + (misses * math.log1p(-p) if misses else 0.0)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
