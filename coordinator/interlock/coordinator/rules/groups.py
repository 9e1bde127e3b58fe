"""Aggregations in the incremental tier: one slot for each group of the child's slots. Pure.

A group that something changed in is computed anew from its members, all such groups at once. Nothing is carried from
one sample to the next, so nothing drifts. Groups of very many members wait for the next scan.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.nodes import Cells, Codes, Node, Planned
from interlock.coordinator.rules.reductions import sums
from interlock.coordinator.rules.series import ENDED, PRESENT
from interlock.coordinator.rules.values import Floats, Ints, Runs

MAX_AT_ONCE = 4096  # members that are looked at for one batch: some 0.1 ms; larger groups wait for the scan, 50 ms
CANCELLED = 1e-9  # a sum so small against its parts is computed again, compensated

INCREMENTAL_AGGREGATIONS = ("sum", "avg", "min", "max", "count", "group", "stddev", "stdvar")


class Aggregated(Node):
    """sum, avg, min, max, count, group, stddev, stdvar; by some labels, or without some."""

    def __init__(self, child: Node, op: str, names: tuple[str, ...], *, without: bool) -> None:
        super().__init__((child,))
        self._op = op
        self._names = frozenset((*names, NAME)) if without else frozenset(names)
        self._without = without
        self._slots: dict[Labels, int] = {}
        self._labels: list[Labels | None] = []
        self._size: list[int] = []
        self._free: list[int] = []
        self._group: Ints = np.full(16, -1, np.int64)  # of each of the child's slots
        self._values: Floats = np.zeros(16)
        self._codes: Codes = np.full(16, ENDED, np.uint8)
        self._order: Ints = np.empty(0, np.int64)  # the child's slots, group by group
        self._bounds: Ints = np.zeros(1, np.int64)
        self._sorted = True
        self._waiting: set[int] = set()
        child.listen(self, 0)

    def at(self, slots: Ints) -> Cells:
        return self._values[slots], self._codes[slots]

    def labels(self, slot: int) -> Labels:
        return self._labels[slot] or ()

    def slots(self) -> Ints:
        return np.fromiter(self._slots.values(), np.int64)

    def taken_s(self, slot: int) -> float:
        self._sort()
        members = self._order[self._bounds[slot] : self._bounds[slot + 1]].tolist()
        return max((self.children[0].taken_s(member) for member in members[:MAX_AT_ONCE]), default=-np.inf)

    def added(self, port: int, slot: int) -> None:
        while slot >= len(self._group):
            self._group = np.concatenate([self._group, np.full_like(self._group, -1)])
        found = self.children[0].labels(slot)
        key = tuple(pair for pair in found if (pair[0] not in self._names) is self._without)
        group = self._slots.get(key)
        self._sorted = False
        if group is not None:
            self._group[slot] = group
            self._size[group] += 1
            self._recompute(np.array([group]))
            return
        group = self._open(key)
        self._group[slot] = group
        self.emit_added(group)  # before anybody is told what it is worth
        self._recompute(np.array([group]))

    def removed(self, port: int, slot: int) -> None:
        group = int(self._group[slot])
        self._group[slot] = -1
        self._sorted = False
        self._size[group] -= 1
        if self._size[group]:
            self._recompute(np.array([group]))
            return
        self._codes[group] = ENDED
        self.emit_removed(group)
        del self._slots[self.labels(group)]
        self._labels[group] = None
        self._free.append(group)
        self._waiting.discard(group)

    def touched(self, port: int, slots: Ints) -> None:
        self._recompute(np.unique(self._group[slots]))

    def plan(self, port: int, slots: Ints, plan: Planned) -> None:
        groups = np.unique(self._group[slots])
        if sum(self._size[group] for group in groups.tolist()) > MAX_AT_ONCE:
            plan.do(self, port, lambda groups: self._waiting.update(groups.tolist()), groups)
            return
        self._sort()
        members, starts = self._members(groups)
        fetch = self.children[0].bound(members, plan.fresh)
        plan.do(self, port, self._again, groups, lambda: self._note(groups, starts, *fetch()))
        self.pass_on(groups, plan)

    def scan(self, at: float) -> None:
        if self._waiting:
            groups = np.array(sorted(self._waiting), np.int64)
            self._waiting.clear()
            self._compute(groups)

    # --- inside

    def _open(self, key: Labels) -> int:
        if self._free:
            group = self._free.pop()
            self._labels[group], self._size[group] = key, 1
        else:
            group = len(self._labels)
            self._labels.append(key)
            self._size.append(1)
            if group >= len(self._values):
                self._values = np.concatenate([self._values, np.zeros_like(self._values)])
                self._codes = np.concatenate([self._codes, np.full_like(self._codes, ENDED)])
        self._slots[key] = group
        return group

    def _recompute(self, groups: Ints) -> None:
        groups = groups[groups >= 0]
        if sum(self._size[group] for group in groups.tolist()) > MAX_AT_ONCE:
            self._waiting.update(groups.tolist())
            return
        self._compute(groups)

    def _sort(self) -> None:
        if not self._sorted:
            members = np.flatnonzero(self._group >= 0)
            self._order = members[np.argsort(self._group[members], kind="stable")]
            self._bounds = np.searchsorted(self._group[self._order], np.arange(len(self._labels) + 1)).astype(np.int64)
            self._sorted = True

    def _again(self, groups: Ints) -> None:
        """Compute these groups, of which some may be named twice; who listens knows already."""
        groups = np.unique(groups)
        members, starts = self._members(groups)
        self._note(groups, starts, *self.children[0].at(members))

    def _compute(self, groups: Ints) -> None:
        if not len(groups):
            return
        members, starts = self._members(groups)
        self._note(groups, starts, *self.children[0].at(members))
        self.emit(groups)

    def _note(self, groups: Ints, starts: Ints, values: Floats, codes: Codes | None) -> None:
        if codes is None:
            codes = np.zeros(len(values), np.uint8)
        present = codes == PRESENT
        self._codes[groups] = np.minimum.reduceat(codes, starts)
        if present.all():
            counts = np.diff(starts, append=len(values)).astype(float)
        else:
            counts = np.add.reduceat(present.astype(float), starts)
        self._values[groups] = _REDUCE[self._op](values, present, starts, counts)

    def _members(self, groups: Ints) -> tuple[Ints, Ints]:
        """(the child's slots of these groups one after another, where each group begins)."""
        if not self._sorted and len(groups) == 1 and len(self._group) > MAX_AT_ONCE:
            return np.flatnonzero(self._group == groups[0]), np.zeros(1, np.int64)  # while many are being added
        self._sort()
        low, high = self._bounds[groups], self._bounds[groups + 1]
        counts = high - low
        ends = np.cumsum(counts)
        starts = ends - counts
        index = np.arange(ends[-1]) + np.repeat(low - starts, counts)
        return self._order[index], starts


def _sum(values: Floats, present: object, starts: Ints, counts: Floats) -> Floats:
    found = np.where(present, values, 0.0)  # type: ignore[call-overload]
    made: Floats = np.add.reduceat(found, starts)
    sizes = np.add.reduceat(np.abs(found), starts)
    doubtful = (np.abs(made) <= CANCELLED * sizes) & (sizes > 0)
    if doubtful.any():
        made = np.where(doubtful, sums(Runs(np.append(starts, len(found)), found)), made)
    return made


def _mean(values: Floats, present: object, starts: Ints, counts: Floats) -> Floats:
    total = _sum(values, present, starts, counts)
    over = np.isinf(total) | np.isnan(total)
    if over.any():  # a sum that overflows, of values that don't
        scaled = np.where(present, values, 0.0) / np.repeat(counts, np.diff(starts, append=len(values)))  # type: ignore[call-overload]
        return np.where(over, np.add.reduceat(scaled, starts), total / counts)
    return total / counts


def _variance(values: Floats, present: object, starts: Ints, counts: Floats) -> Floats:
    sizes = np.diff(starts, append=len(values))
    mean = _mean(values, present, starts, counts)
    first = np.where(present, values - np.repeat(mean, sizes), 0.0)  # type: ignore[call-overload]
    return np.add.reduceat(first * first, starts) / counts


_REDUCE: dict[str, Callable[..., Floats]] = {
    "sum": _sum,
    "avg": _mean,
    "min": lambda values, present, starts, counts: np.fmin.reduceat(np.where(present, values, np.nan), starts),
    "max": lambda values, present, starts, counts: np.fmax.reduceat(np.where(present, values, np.nan), starts),
    "count": lambda values, present, starts, counts: counts,
    "group": lambda values, present, starts, counts: np.ones(len(starts)),
    "stddev": lambda *columns: np.sqrt(_variance(*columns)),
    "stdvar": _variance,
}
