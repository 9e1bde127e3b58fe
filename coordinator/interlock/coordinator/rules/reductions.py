"""Many values to one, run by run: sums, means, variances, quantiles. Pure; the semantics are Prometheus'."""

from __future__ import annotations

import numpy as np

from interlock.coordinator.rules.values import Floats, Ints, Runs, fold


def kahan(total: Floats, lost: Floats, value: Floats) -> tuple[Floats, Floats]:
    """Neumaier's step: what large values absorb comes back in the end."""
    after = total + value
    larger = np.abs(total) >= np.abs(value)
    made = lost + np.where(larger, (total - after) + value, (value - after) + total)
    return after, np.where(np.isinf(after), 0.0, made)


def sums(runs: Runs) -> Floats:
    zeros = np.zeros(len(runs.bounds) - 1)
    total, lost = fold(runs, [zeros, zeros.copy()], lambda state, value, _: list(kahan(state[0], state[1], value)))
    return total + lost


def means(runs: Runs) -> Floats:
    """The sum over the count; where the sum overflows, the mean of the scaled values."""
    total, counts = sums(runs), runs.counts
    made = total / counts
    over = np.isinf(total) & np.isfinite(runs.reduce(np.maximum, np.abs(runs.values)))
    over |= np.isnan(total) & np.isfinite(runs.reduce(np.maximum, np.abs(runs.values)))
    if over.any():
        made = np.where(over, sums(runs.with_values(runs.values / np.repeat(counts, counts))), made)
    return made


def smallest(runs: Runs) -> Floats:
    """NaN only where there is nothing else."""
    return runs.reduce(np.fmin)


def largest(runs: Runs) -> Floats:
    return runs.reduce(np.fmax)


def variances(runs: Runs) -> Floats:
    """Of the whole population, by Welford's method, compensated."""

    def step(state: list[Floats], value: Floats, rank: int) -> list[Floats]:
        mean, mean_lost, squares, lost = state
        delta = value - (mean + mean_lost)
        mean, mean_lost = kahan(mean, mean_lost, delta / (rank + 1))
        squares, lost = kahan(squares, lost, delta * (value - (mean + mean_lost)))
        return [mean, mean_lost, squares, lost]

    zeros = [np.zeros(len(runs.bounds) - 1) for _ in range(4)]
    _, _, squares, lost = fold(runs, zeros, step)
    made = (squares + lost) / runs.counts
    return np.where(np.isfinite(runs.reduce(np.maximum, np.abs(runs.values))), made, np.nan)


def deviations(runs: Runs) -> Floats:
    return np.sqrt(variances(runs))


def ranked(runs: Runs) -> Runs:
    """Each run sorted; NaN counts as the smallest value."""
    order = np.lexsort((runs.values, ~np.isnan(runs.values), runs.owners()))
    return runs.with_values(runs.values[order])


def quantiles(q: float | Floats, runs: Runs) -> Floats:
    """Interpolated. q may differ from owner to owner."""
    wanted = np.broadcast_to(np.asarray(q, float), runs.counts.shape)
    ordered = ranked(runs)
    rank = np.clip(np.nan_to_num(wanted), 0.0, 1.0) * (runs.counts - 1)
    below = np.floor(rank).astype(np.int64)
    above = np.minimum(runs.counts - 1, below + 1)
    weight = rank - below
    made = ordered.values[runs.starts + below] * (1 - weight) + ordered.values[runs.starts + above] * weight
    made = np.where(wanted < 0, -np.inf, np.where(wanted > 1, np.inf, made))
    return np.where(np.isnan(wanted), np.nan, made)


def counts(runs: Runs) -> Floats:
    return runs.counts.astype(float)


def ones(runs: Runs) -> Floats:
    return np.ones(len(runs.bounds) - 1)


REDUCTIONS = {
    "sum": sums,
    "avg": means,
    "min": smallest,
    "max": largest,
    "count": counts,
    "group": ones,
    "stddev": deviations,
    "stdvar": variances,
}


def first_of(groups: Ints) -> Ints:
    """The place of the first element of each group."""
    count = int(groups.max()) + 1 if len(groups) else 0
    first = np.full(count, len(groups), np.int64)
    np.minimum.at(first, groups, np.arange(len(groups)))
    return first
