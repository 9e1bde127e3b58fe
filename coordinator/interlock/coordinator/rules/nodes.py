"""The nodes of a program that take one vector or none: selectors, windows, element by element, aggregations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.cells import (
    FILTERED,
    MISSING,
    Cell,
    EvaluationError,
    ScalarNode,
    VectorNode,
    absence,
    only,
    unnamed,
    without,
)
from interlock.coordinator.rules.expression import Selector
from interlock.coordinator.rules.operators import REDUCTIONS, quantile
from interlock.coordinator.rules.series import SeriesStore, Watch

# --- scalars


class Constant:
    def __init__(self, value: float) -> None:
        self.value = value

    def bind(self) -> None:
        pass

    def update(self, at: float, *, full: bool) -> bool:
        return False


class Time:
    """time(): the moment of the evaluation."""

    value = 0.0

    def bind(self) -> None:
        pass

    def update(self, at: float, *, full: bool) -> bool:
        self.value = at
        return True


class Computed:
    """A number from other numbers."""

    def __init__(self, function: Callable[..., float], operands: Sequence[ScalarNode]) -> None:
        self.value = math.nan
        self._function = function
        self._operands = operands

    def bind(self) -> None:
        for operand in self._operands:
            operand.bind()

    def update(self, at: float, *, full: bool) -> bool:
        changed = _any_changed(self._operands, at, full=full)
        if changed or full:
            self.value = float(self._function(*(operand.value for operand in self._operands)))
        return changed or full


class OnlyElement:
    """scalar(): the value of the vector's only element, or NaN."""

    def __init__(self, inner: VectorNode) -> None:
        self.value = math.nan
        self._inner = inner

    def bind(self) -> None:
        self._inner.bind()

    def update(self, at: float, *, full: bool) -> bool:
        if not self._inner.update(at, full=full) and not full:
            return False
        present = [cell for cell in self._inner.cells if type(cell) is float]
        self.value = present[0] if len(present) == 1 else math.nan
        return True


def _any_changed(scalars: Sequence[ScalarNode], at: float, *, full: bool) -> bool:
    changed = False
    for scalar in scalars:
        changed |= scalar.update(at, full=full)
    return changed


# --- vectors from series


class Latest(VectorNode):
    """An instant selector: the newest sample of each series that is no older than the lookback.

    `timestamps`: the sample's time instead of its value.
    """

    def __init__(self, store: SeriesStore, watch: Watch, *, timestamps: bool = False) -> None:
        super().__init__()
        self._store = store
        self._watch = watch
        self._source = store.times if timestamps else store.values
        self._timestamps = timestamps
        self._ids: list[int] = []

    def bind(self) -> None:
        self._ids = self._watch.bind()
        labels = [self._store.labels[number] for number in self._ids]
        self._bound([unnamed(key) for key in labels] if self._timestamps else labels)

    def update(self, at: float, *, full: bool) -> Sequence[int]:
        watch, times, source, cells = self._watch, self._store.times, self._source, self.cells
        oldest = at - self._store.lookback_s
        if full:
            changed = list(range(len(cells)))
            for slot, number in enumerate(self._ids):
                cells[slot] = source[number] if times[number] > oldest else MISSING
        else:
            changed = []
            for number in watch.touched:
                slot = watch.slots[number]
                cells[slot] = source[number] if times[number] > oldest else MISSING
                changed.append(slot)
        watch.touched.clear()
        self._check()
        return changed


class OverWindow(VectorNode):
    """A function of each series' samples in the window; computed anew at every update, since the window moves."""

    def __init__(
        self,
        store: SeriesStore,
        watch: Watch,
        function: Callable[..., float | None],
        parameters: Sequence[ScalarNode],
        *,
        keeps_name: bool,
    ) -> None:
        super().__init__()
        self._store = store
        self._watch = watch
        self._function = function
        self._parameters = parameters
        self._keeps_name = keeps_name
        self._ids: list[int] = []

    def bind(self) -> None:
        for parameter in self._parameters:
            parameter.bind()
        self._ids = self._watch.bind()
        labels = [self._store.labels[number] for number in self._ids]
        self._bound(labels if self._keeps_name else [unnamed(key) for key in labels])

    def update(self, at: float, *, full: bool) -> Sequence[int]:
        _any_changed(self._parameters, at, full=full)
        parameters = [parameter.value for parameter in self._parameters]
        start = at - self._watch.window_s
        for slot, number in enumerate(self._ids):
            points = [point for point in self._store.points[number] or () if point[0] > start]
            value = self._function(points, start, at, *parameters) if points else None
            self.cells[slot] = MISSING if value is None else float(value)
        self._watch.touched.clear()
        self._check()
        return range(len(self.cells))


class Constantly(VectorNode):
    """vector(): one element without labels."""

    def __init__(self, scalar: ScalarNode) -> None:
        super().__init__()
        self._scalar = scalar

    def bind(self) -> None:
        self._scalar.bind()
        self._bound([()])

    def update(self, at: float, *, full: bool) -> Sequence[int]:
        if not self._scalar.update(at, full=full) and not full:
            return ()
        self.cells[0] = self._scalar.value
        return (0,)


class NoElements(VectorNode):
    """absent(): one element, with the labels that the selector asks for, while the inner vector has none."""

    def __init__(self, inner: VectorNode, selector: Selector | None) -> None:
        super().__init__()
        self._inner = inner
        self._labels = _asked_for(selector)

    def bind(self) -> None:
        self._inner.bind()
        self._bound([self._labels])

    def update(self, at: float, *, full: bool) -> Sequence[int]:
        if not self._inner.update(at, full=full) and not full:
            return ()
        present = any(type(cell) is float for cell in self._inner.cells)
        self.cells[0] = FILTERED if present else 1.0
        return (0,)


def _asked_for(selector: Selector | None) -> Labels:
    if selector is None:
        return ()
    named = [matcher.label for matcher in selector.matchers if matcher.label != NAME]
    return tuple(
        sorted(
            (matcher.label, matcher.value)
            for matcher in selector.matchers
            if matcher.op == "=" and matcher.value and named.count(matcher.label) == 1
        )
    )


# --- vectors from vectors


class EachElement(VectorNode):
    """Every element through a function of its value and some scalars; what it gives may be an absence."""

    def __init__(
        self, inner: VectorNode, function: Callable[..., Cell], scalars: Sequence[ScalarNode], *, keeps_name: bool
    ) -> None:
        super().__init__()
        self._inner = inner
        self._function = function
        self._scalars = scalars
        self._keeps_name = keeps_name

    def bind(self) -> None:
        self._inner.bind()
        for scalar in self._scalars:
            scalar.bind()
        self._bound(self._inner.labels if self._keeps_name else [unnamed(key) for key in self._inner.labels])

    def update(self, at: float, *, full: bool) -> Sequence[int]:
        changed = self._inner.update(at, full=full)
        if _any_changed(self._scalars, at, full=full):
            changed = range(len(self.cells))
        scalars = [scalar.value for scalar in self._scalars]
        function, source, cells = self._function, self._inner.cells, self.cells
        for slot in changed:
            cell = source[slot]
            cells[slot] = function(cell, *scalars) if type(cell) is float else cell
        self._check()
        return changed


class Groups:
    """Slots sorted into groups by some of their labels."""

    def __init__(self, labels: Sequence[Labels], names: Sequence[str], *, excluded: bool) -> None:
        places: dict[Labels, int] = {}
        self.of_slot: list[int] = []
        self.members: list[list[int]] = []
        for slot, key in enumerate(labels):
            group_key = without(key, (*names, NAME)) if excluded else only(key, names)
            group = places.setdefault(group_key, len(places))
            if group == len(self.members):
                self.members.append([])
            self.members[group].append(slot)
            self.of_slot.append(group)
        self.keys = list(places)


class Aggregated(VectorNode):
    """One element per group: sum, avg, min, max, count, group, stddev, stdvar, quantile."""

    def __init__(
        self, op: str, inner: VectorNode, names: Sequence[str], parameter: ScalarNode | None, *, excluded: bool
    ) -> None:
        super().__init__()
        self._reduce = REDUCTIONS.get(op)
        self._inner = inner
        self._names = names
        self._parameter = parameter
        self._excluded = excluded
        self._groups = Groups((), (), excluded=False)

    def bind(self) -> None:
        self._inner.bind()
        if self._parameter is not None:
            self._parameter.bind()
        self._groups = Groups(self._inner.labels, self._names, excluded=self._excluded)
        self._bound(self._groups.keys)

    def update(self, at: float, *, full: bool) -> Sequence[int]:
        changed = self._inner.update(at, full=full)
        everything = self._parameter is not None and self._parameter.update(at, full=full)
        source, of_slot = self._inner.cells, self._groups.of_slot
        groups = range(len(self.cells)) if full or everything else sorted({of_slot[slot] for slot in changed})
        for group in groups:
            members = self._groups.members[group]
            values = [cell for slot in members if type(cell := source[slot]) is float]
            self.cells[group] = self._value(values) if values else absence(source[slot] for slot in members)
        return groups

    def _value(self, values: list[float]) -> float:
        if self._reduce is not None:
            return self._reduce(values)
        return quantile(self._parameter.value if self._parameter else math.nan, values)


class Ranked(VectorNode):
    """topk, bottomk: the elements themselves, those of each group that rank first; NaN ranks last."""

    def __init__(
        self,
        op: str,
        inner: VectorNode,
        names: Sequence[str],
        parameter: ScalarNode,
        *,
        excluded: bool,
    ) -> None:
        super().__init__()
        self._sign = -1.0 if op == "topk" else 1.0
        self._inner = inner
        self._names = names
        self._parameter = parameter
        self._excluded = excluded
        self._groups = Groups((), (), excluded=False)

    def bind(self) -> None:
        self._inner.bind()
        self._parameter.bind()
        self._groups = Groups(self._inner.labels, self._names, excluded=self._excluded)
        self._bound(self._inner.labels)

    def update(self, at: float, *, full: bool) -> Sequence[int]:
        changed = self._inner.update(at, full=full)
        everything = self._parameter.update(at, full=full) or full
        source, of_slot, members = self._inner.cells, self._groups.of_slot, self._groups.members
        groups = range(len(members)) if everything else sorted({of_slot[slot] for slot in changed})
        count = self._parameter.value
        if math.isnan(count):
            raise EvaluationError("the number of elements that topk or bottomk keeps is NaN")
        wanted = int(min(count, len(source))) if count >= 1 else 0
        out: list[int] = []
        for group in groups:
            present = [(cell, slot) for slot in members[group] if type(cell := source[slot]) is float]
            present.sort(key=lambda pair: (math.isnan(pair[0]), self._sign * pair[0]))
            first = {slot for _, slot in present[:wanted]}
            for slot in members[group]:
                cell = source[slot]
                self.cells[slot] = FILTERED if type(cell) is float and slot not in first else cell
            out += members[group]
        return out
