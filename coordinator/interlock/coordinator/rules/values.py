"""What an expression can be worth at one moment: a number, a string, a vector, or the samples of windows.

Elements are columns of arrays. Times are milliseconds, as in Prometheus: its windows and steps are whole ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from interlock.broker.errors import InterlockError
from interlock.coordinator.rules.labelsets import Ids

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]


class EvaluationError(InterlockError):
    """The series there are can't be evaluated by this expression (two match where one may). Other rules go on."""


@dataclass(frozen=True)
class Vector:
    """`keys`: ids of label sets. `dropped`: the name is no longer the element's, and goes when the result is told.

    `times`: of the samples themselves, where the vector is a selector's.
    """

    keys: Ids
    values: Floats
    dropped: Flags
    times: Floats | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, chosen: Flags | Ints) -> Vector:
        times = None if self.times is None else self.times[chosen]
        return Vector(self.keys[chosen], self.values[chosen], self.dropped[chosen], times)

    def with_values(self, values: Floats, *, drop: bool = True) -> Vector:
        dropped = np.ones(len(self.keys), bool) if drop else self.dropped
        return Vector(self.keys, values, dropped)


def empty() -> Vector:
    return Vector(np.empty(0, np.int64), np.empty(0), np.empty(0, bool))


def single(value: float, key: int = 0) -> Vector:
    """One element; key 0 has no labels."""
    return Vector(np.array([key], np.int64), np.array([value], float), np.zeros(1, bool))


def joined(*vectors: Vector) -> Vector:
    return Vector(
        np.concatenate([vector.keys for vector in vectors]),
        np.concatenate([vector.values for vector in vectors]),
        np.concatenate([vector.dropped for vector in vectors]),
    )


@dataclass(frozen=True)
class Runs:
    """Values of several owners one after another: owner i has `values[bounds[i]:bounds[i + 1]]`, at least one."""

    bounds: Ints
    values: Floats

    @property
    def starts(self) -> Ints:
        return self.bounds[:-1]

    @property
    def lasts(self) -> Ints:
        return self.bounds[1:] - 1

    @property
    def counts(self) -> Ints:
        return np.diff(self.bounds)

    def owners(self) -> Ints:
        """The owner of each value."""
        return np.repeat(np.arange(len(self.bounds) - 1), self.counts)

    def reduce(self, ufunc: np.ufunc, values: Floats | None = None) -> Floats:
        found = self.values if values is None else values
        if len(self.bounds) == 1:
            return np.empty(0)
        made: Floats = ufunc.reduceat(found, self.starts)
        return made

    def with_values(self, values: Floats) -> Runs:
        return Runs(self.bounds, values)


@dataclass(frozen=True)
class Matrix:
    """The samples of each series in a window (start, end]; series without any are left out. Milliseconds.

    `starts`: when the counter of each sample began, 0 where nobody knows; None if that is so everywhere.
    """

    keys: Ids
    dropped: Flags
    runs: Runs
    times: Floats
    start: float
    end: float
    starts: Floats | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1000


Value = float | str | Vector | Matrix


def grouped(groups: Ints, values: Floats) -> tuple[Ints, Runs]:
    """(order, runs): the values sorted into runs by group, in their order within each."""
    order = np.argsort(groups, kind="stable")
    count = int(groups.max()) + 1 if len(groups) else 0
    bounds = np.searchsorted(groups[order], np.arange(count + 1))
    return order, Runs(bounds.astype(np.int64), values[order])


def fold(runs: Runs, state: list[Floats], step: Callable[[list[Floats], Floats, int], list[Floats]]) -> list[Floats]:
    """Carry a state per owner through its values, in their order, for all owners at once.

    `step(state, values, rank)` is given the state and the value number `rank` of those that have one.
    """
    counts = runs.counts
    order = np.argsort(-counts, kind="stable")
    carried = [column[order] for column in state]
    starts, ordered = runs.starts[order], counts[order]
    for rank in range(int(counts.max()) if len(counts) else 0):
        active = int(np.searchsorted(-ordered, -rank, "left"))  # those with more than `rank` values
        made = step([column[:active] for column in carried], runs.values[starts[:active] + rank], rank)
        for column, new in zip(carried, made, strict=True):
            column[:active] = new
    out = [np.empty_like(column) for column in carried]
    for column, new in zip(out, carried, strict=True):
        column[order] = new
    return out
