"""The incremental tier: an expression as a graph of nodes that are told what changed, and give what is asked. Pure.

A slot stands for one label set that a node can give. A node gives, for slots, their values and codes: a value is there,
or why there is none (series.py). Codes are ordered, so that what two sides lack is the larger of their codes, and what
all of a group lack the smallest. What changed travels upwards as slot numbers; nothing is computed before a rule asks,
but what nodes must remember: windows, groups, who is present.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from interlock.broker.samples import Labels
from interlock.coordinator.rules.labelsets import METADATA
from interlock.coordinator.rules.operators import COMPARISONS
from interlock.coordinator.rules.series import ENDED, FILTERED, PRESENT, Members, SeriesStore
from interlock.coordinator.rules.values import Flags, Floats, Ints

Codes = NDArray[np.uint8]
Cells = tuple[Floats, Codes]
Fetch = Callable[[], tuple[Floats, Codes | None]]  # values and codes of some slots; no codes: every value is there


Step = Callable[[Ints], object]


class Planned(Protocol):
    """What a batch of the same series does each time (plans.py)."""

    fresh: Flags  # of each series: the batch brings a sample of it

    def do(self, node: object, port: int, step: Step, slots: Ints, bound: Callable[[], object] | None = None) -> None:
        """Each time, let the node take a step about these slots; `bound`: the same, with all worked out."""
        ...

    def look(self, rule: object, slots: Ints) -> None: ...


class NoPlan(Exception):
    """What this batch does differs from time to time."""


class Listener(Protocol):
    """Who is told of a node's slots. `port`: which of its sides the node is."""

    def added(self, port: int, slot: int) -> None: ...

    def removed(self, port: int, slot: int) -> None: ...

    def touched(self, port: int, slots: Ints) -> None: ...

    def plan(self, port: int, slots: Ints, plan: Planned) -> None:
        """As `touched`, for every time that it happens. NoPlan if that can't be said."""
        ...


class Node:
    """`conflicts`: how many label sets it can't tell apart; the rule is computed anew each time while there are any."""

    conflicts = 0
    timed = False  # it changes also where no sample comes

    def __init__(self, children: Iterable[Node]) -> None:
        self.children = tuple(children)
        self.depth: int = 1 + max((child.depth for child in self.children), default=0)
        self.outs: list[tuple[Listener, int]] = []

    def at(self, slots: Ints) -> Cells:
        raise NotImplementedError

    def labels(self, slot: int) -> Labels:
        raise NotImplementedError

    def slots(self) -> Ints:
        """All that there are."""
        raise NotImplementedError

    def taken_s(self, slot: int) -> float:
        """When the newest sample behind a slot was taken, by its publisher's clock; -inf: unknown."""
        return max((child.taken_s(slot) for child in self.children), default=-np.inf)

    def bound(self, slots: Ints, fresh: Flags) -> Fetch:
        """`at` for always the same slots. `fresh`: the series that have a sample then."""
        return lambda: self.at(slots)

    def pass_on(self, slots: Ints, plan: Planned) -> None:
        for listener, port in self.outs:
            listener.plan(port, slots, plan)

    def listen(self, listener: Listener, port: int) -> None:
        """Tell this one from now on, and at once of the slots that there are."""
        self.outs.append((listener, port))
        for slot in self.slots().tolist():
            listener.added(port, slot)

    def emit(self, slots: Ints) -> None:
        for listener, port in self.outs:
            listener.touched(port, slots)

    def emit_added(self, slot: int) -> None:
        for listener, port in self.outs:
            listener.added(port, slot)

    def emit_removed(self, slot: int) -> None:
        for listener, port in self.outs:
            listener.removed(port, slot)

    def scan(self, at: float) -> None:
        """Time passed; milliseconds."""

    def renew(self) -> None:
        """The samples below are others than they were told to be."""


class Leaf(Node):
    """An instant selector: the newest sample of each of its series."""

    def __init__(self, store: SeriesStore, members: Members) -> None:
        super().__init__(())
        self.store = store
        self.members = members
        members.listeners.append(self)

    def at(self, slots: Ints) -> Cells:
        ids = self.members.ids[slots]
        return self.store.values[ids], self.store.code[ids]

    def labels(self, slot: int) -> Labels:
        return self.store.labels[int(self.members.ids[slot])] or ()

    def slots(self) -> Ints:
        return np.fromiter(self.members.slots.values(), np.int64)

    def taken_s(self, slot: int) -> float:
        return float(self.store.taken_s[self.members.ids[slot]])

    def added(self, slot: int) -> None:
        self.emit_added(slot)

    def removed(self, slot: int) -> None:
        self.emit_removed(slot)

    def touched(self, slots: Ints) -> None:
        self.emit(slots)

    def plan(self, slots: Ints, plan: Planned) -> None:
        self.pass_on(slots, plan)

    def bound(self, slots: Ints, fresh: Flags) -> Fetch:
        ids, store = self.members.ids[slots], self.store
        if fresh[ids].all():
            return lambda: (store.values[ids], None)
        return lambda: (store.values[ids], store.code[ids])


class Passing(Node):
    """A node with the slots of its only child; what changes there changes here."""

    def __init__(self, child: Node, *, drops_name: bool) -> None:
        super().__init__((child,))
        self.child = child
        self._drops_name = drops_name
        child.outs.append((self, 0))

    def labels(self, slot: int) -> Labels:
        found = self.child.labels(slot)
        return tuple(pair for pair in found if pair[0] not in METADATA) if self._drops_name else found

    def slots(self) -> Ints:
        return self.child.slots()

    def taken_s(self, slot: int) -> float:
        return self.child.taken_s(slot)

    def added(self, port: int, slot: int) -> None:
        self.emit_added(slot)

    def removed(self, port: int, slot: int) -> None:
        self.emit_removed(slot)

    def touched(self, port: int, slots: Ints) -> None:
        self.emit(slots)

    def plan(self, port: int, slots: Ints, plan: Planned) -> None:
        self.pass_on(slots, plan)


class Each(Passing):
    """Every element through a function of its value."""

    def __init__(self, child: Node, function: Callable[[Floats], Any], *, drops_name: bool = True) -> None:
        super().__init__(child, drops_name=drops_name)
        self._function = function

    def at(self, slots: Ints) -> Cells:
        values, codes = self.child.at(slots)
        return self._function(values), codes

    def bound(self, slots: Ints, fresh: Flags) -> Fetch:
        fetch, function = self.child.bound(slots, fresh), self._function

        def fetched() -> tuple[Floats, Codes | None]:
            values, codes = fetch()
            return function(values), codes

        return fetched


class Compared(Passing):
    """The elements that a comparison with a number keeps."""

    def __init__(self, child: Node, op: str, number: float, *, mirrored: bool) -> None:
        super().__init__(child, drops_name=False)
        self._keep = COMPARISONS[_MIRRORED.get(op, op) if mirrored else op]
        self._number = np.float64(number)

    def at(self, slots: Ints) -> Cells:
        values, codes = self.child.at(slots)
        return values, np.maximum(codes, ~self._keep(values, self._number))

    def bound(self, slots: Ints, fresh: Flags) -> Fetch:
        fetch, keep, number = self.child.bound(slots, fresh), self._keep, self._number

        def fetched() -> tuple[Floats, Codes | None]:
            values, codes = fetch()
            left_out = (~keep(values, number)).view(np.uint8)  # True is FILTERED
            return values, left_out if codes is None else np.maximum(codes, left_out)

        return fetched


_MIRRORED = {">": "<", "<": ">", ">=": "<=", "<=": ">="}


class Relabelled(Passing):
    """The same elements with other labels."""

    def __init__(self, child: Node, function: Callable[[Labels], Labels]) -> None:
        super().__init__(child, drops_name=False)
        self._relabel = function

    def at(self, slots: Ints) -> Cells:
        return self.child.at(slots)

    def bound(self, slots: Ints, fresh: Flags) -> Fetch:
        return self.child.bound(slots, fresh)

    def labels(self, slot: int) -> Labels:
        return self._relabel(self.child.labels(slot))


class Silent(Passing):
    """absent_each(): the series that brought no sample for so long, and said no goodbye."""

    timed = True

    def __init__(self, leaf: Leaf, window_ms: float, clock: Callable[[], float]) -> None:
        super().__init__(leaf, drops_name=True)
        self._leaf = leaf
        self._clock = clock
        self._window = window_ms
        self._silent: Flags = np.zeros(16, bool)

    def at(self, slots: Ints) -> Cells:
        self._fit()
        codes = self._leaf.store.code[self._leaf.members.ids[slots]]
        silent = np.where(self._silent[slots], np.uint8(PRESENT), np.uint8(FILTERED))
        return np.ones(len(slots)), np.where(codes == ENDED, np.uint8(ENDED), silent)

    def scan(self, at: float) -> None:
        self._fit()
        store, members = self._leaf.store, self._leaf.members
        ids = members.ids[: members.count]
        times = store.times[ids]
        silent = (times <= at - self._window) & np.isfinite(times) & (store.code[ids] != ENDED)
        changed = np.flatnonzero(silent != self._silent[: members.count])
        if len(changed):
            self._silent[changed] = silent[changed]
            self.emit(changed)

    def touched(self, port: int, slots: Ints) -> None:
        self._fit()
        times = self._leaf.store.times[self._leaf.members.ids[slots]]
        self._silent[slots[times > self._clock() - self._window]] = False
        self.emit(slots)

    def plan(self, port: int, slots: Ints, plan: Planned) -> None:
        self._fit()
        plan.do(self, port, lambda slots: self._silent.__setitem__(slots, False), slots)
        self.pass_on(slots, plan)

    def removed(self, port: int, slot: int) -> None:
        self._fit()
        self._silent[slot] = False
        super().removed(port, slot)

    def _fit(self) -> None:
        if len(self._silent) < len(self._leaf.members.ids):
            grown = np.zeros(len(self._leaf.members.ids), bool)
            grown[: len(self._silent)] = self._silent
            self._silent = grown


class Nothing(Node):
    """absent(): one element, with the labels that the selector asks for, while the child has none."""

    def __init__(self, child: Node, labels: Labels) -> None:
        super().__init__((child,))
        self._labels = labels
        self._present: Flags = np.zeros(16, bool)
        self._count = 0
        child.listen(self, 0)

    def at(self, slots: Ints) -> Cells:
        code = FILTERED if self._count else PRESENT
        return np.ones(len(slots)), np.full(len(slots), code, np.uint8)

    def labels(self, slot: int) -> Labels:
        return self._labels

    def slots(self) -> Ints:
        return np.zeros(1, np.int64)

    def taken_s(self, slot: int) -> float:
        return -np.inf

    def added(self, port: int, slot: int) -> None:
        while slot >= len(self._present):
            self._present = np.concatenate([self._present, np.zeros_like(self._present)])
        self.touched(port, np.array([slot]))

    def removed(self, port: int, slot: int) -> None:
        self._set(np.array([slot]), np.zeros(1, bool))

    def touched(self, port: int, slots: Ints) -> None:
        found = np.unique(slots)
        self._set(found, self.children[0].at(found)[1] == PRESENT)

    def plan(self, port: int, slots: Ints, plan: Planned) -> None:
        plan.do(self, port, lambda slots: self.touched(port, slots), slots)

    def _set(self, slots: Ints, present: Flags) -> None:
        before = bool(self._count)
        self._count += int(present.sum()) - int(self._present[slots].sum())
        self._present[slots] = present
        if bool(self._count) != before:
            self.emit(np.zeros(1, np.int64))
