"""Two vectors brought together in the incremental tier, by Prometheus' rules of vector matching. Pure.

A slot stands for a pair. Where a match group has more elements than the rules allow, the group gives nothing and counts
as a conflict: the batch tier then decides, at each evaluation, whether they are there at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.expression import Matching
from interlock.coordinator.rules.labelsets import METADATA
from interlock.coordinator.rules.nodes import Cells, Codes, Fetch, Node, NoPlan, Planned
from interlock.coordinator.rules.operators import ARITHMETIC, COMPARISONS
from interlock.coordinator.rules.series import ENDED, FILTERED, MISSING, PRESENT
from interlock.coordinator.rules.values import Flags, Floats, Ints


def signed(labels: Labels, matching: Matching) -> Labels:
    """What an element is matched on."""
    if matching.on:
        return tuple(pair for pair in labels if pair[0] in matching.labels)
    return tuple(pair for pair in labels if pair[0] not in matching.labels and pair[0] != NAME)


@dataclass
class _Group:
    """The slots of the side of which there may be many, and of the other; the pairs made of them."""

    many: list[int] = field(default_factory=list)
    one: list[int] = field(default_factory=list)
    pairs: dict[int, int] = field(default_factory=dict)  # many slot -> pair
    results: set[Labels] = field(default_factory=set)
    conflict: bool = False


class Paired(Node):
    """Arithmetic and comparison: one to one, many to one, one to many."""

    def __init__(self, left: Node, right: Node, op: str, matching: Matching, *, returns_bool: bool) -> None:
        super().__init__((left, right))
        self._matching = matching
        self._swapped = matching.cardinality == "one-to-many"
        self._single = matching.cardinality == "one-to-one"
        self._op = op
        self._drops = METADATA if op in ARITHMETIC or returns_bool else ()
        self._function = _function(op, returns_bool=returns_bool)
        self._sides: Ints = np.zeros((2, 16), np.int64)  # the slots of both sides that make a pair
        self._labels: list[Labels | None] = []
        self._free: list[int] = []
        self._groups: dict[Labels, _Group] = {}
        self._keys: tuple[dict[int, Labels], dict[int, Labels]] = ({}, {})
        self._pair: Ints = np.full(16, -1, np.int64)  # of a slot of the many side
        self._fan: dict[int, list[int]] = {}  # slot of the other side -> its pairs
        self._narrow: Ints = np.full(16, -1, np.int64)  # its only pair; -2: look into `_fan`
        left.listen(self, 0)
        right.listen(self, 1)

    def at(self, slots: Ints) -> Cells:
        left, left_codes = self.children[0].at(self._sides[0][slots])
        right, right_codes = self.children[1].at(self._sides[1][slots])
        made: Cells = self._function(left, right, np.maximum(left_codes, right_codes))
        return made

    def labels(self, slot: int) -> Labels:
        return self._labels[slot] or ()

    def slots(self) -> Ints:
        return np.array([slot for slot, labels in enumerate(self._labels) if labels is not None], np.int64)

    def taken_s(self, slot: int) -> float:
        return max(child.taken_s(int(side[slot])) for child, side in zip(self.children, self._sides, strict=True))

    def bound(self, slots: Ints, fresh: Flags) -> Fetch:
        left = self.children[0].bound(self._sides[0][slots], fresh)
        right = self.children[1].bound(self._sides[1][slots], fresh)
        function = self._function

        def fetched() -> tuple[Floats, Codes | None]:
            left_values, left_codes = left()
            right_values, right_codes = right()
            if left_codes is not None and right_codes is not None:
                left_codes = np.maximum(left_codes, right_codes)
            codes = right_codes if left_codes is None else left_codes
            made: tuple[Floats, Codes | None] = function(left_values, right_values, codes)
            return made

        return fetched

    # --- told

    def touched(self, port: int, slots: Ints) -> None:
        pairs = self._pairs(port, slots)
        if len(pairs) or self.conflicts:  # who can't trust the pairs looks at everything
            self.emit(pairs)

    def plan(self, port: int, slots: Ints, plan: Planned) -> None:
        if self.conflicts:
            raise NoPlan
        pairs = self._pairs(port, slots)
        if len(pairs):
            self.pass_on(pairs, plan)

    def _pairs(self, port: int, slots: Ints) -> Ints:
        """The pairs that these slots of one side are in."""
        if port == self._many_port:
            pairs = self._pair[slots]
            return pairs[pairs >= 0]
        narrow = self._narrow[slots]
        pairs = narrow[narrow >= 0]
        wide = slots[narrow == -2]
        if len(wide):
            pairs = np.concatenate([pairs, *(np.array(self._fan[slot], np.int64) for slot in wide.tolist())])
        return pairs

    def added(self, port: int, slot: int) -> None:
        key = signed(self.children[port].labels(slot), self._matching)
        self._keys[port][slot] = key
        self._fit(slot)
        group = self._groups.setdefault(key, _Group())
        is_many = port == self._many_port
        (group.many if is_many else group.one).append(slot)
        if not group.conflict and is_many and len(group.one) == 1 and not (self._single and len(group.many) > 1):
            self._make(group, slot)
        else:
            self._settle(group)

    def removed(self, port: int, slot: int) -> None:
        key = self._keys[port].pop(slot)
        group = self._groups[key]
        if port == self._many_port:
            group.many.remove(slot)
            if not group.conflict and slot in group.pairs:
                self._unmake(group, slot)
        else:
            group.one.remove(slot)
        if not group.many and not group.one:
            self.conflicts -= group.conflict
            del self._groups[key]
        elif group.conflict or port != self._many_port:
            self._settle(group)

    # --- inside

    @property
    def _many_port(self) -> int:
        return 1 if self._swapped else 0

    def _settle(self, group: _Group) -> None:
        """Make the group's pairs anew."""
        for slot in list(group.pairs):
            self._unmake(group, slot)
        self.conflicts -= group.conflict
        group.conflict = len(group.one) > 1 or (self._single and bool(group.one) and len(group.many) > 1)
        self.conflicts += group.conflict
        for slot in group.many if group.one else ():
            if group.conflict:  # two of them would give the same result
                break
            self._make(group, slot)

    def _make(self, group: _Group, many: int) -> None:
        one = group.one[0]
        sides = (one, many) if self._swapped else (many, one)
        labels = self._result(self.children[self._many_port].labels(many), self._other.labels(one))
        if labels in group.results:
            group.conflict = True
            self.conflicts += 1
            for slot in list(group.pairs):
                self._unmake(group, slot)
            return
        if self._free:
            pair = self._free.pop()
            self._labels[pair] = labels
        else:
            pair = len(self._labels)
            self._labels.append(labels)
            if pair >= self._sides.shape[1]:
                self._sides = np.concatenate([self._sides, np.zeros_like(self._sides)], axis=1)
        self._sides[0, pair], self._sides[1, pair] = sides
        group.pairs[many] = pair
        group.results.add(labels)
        self._pair[many] = pair
        self._join(one, pair)
        self.emit_added(pair)

    def _unmake(self, group: _Group, many: int) -> None:
        pair = group.pairs.pop(many)
        self.emit_removed(pair)
        group.results.discard(self.labels(pair))
        self._labels[pair] = None
        self._pair[many] = -1
        self._part(int(self._sides[0 if self._swapped else 1, pair]), pair)
        self._free.append(pair)

    @property
    def _other(self) -> Node:
        return self.children[1 - self._many_port]

    def _join(self, one: int, pair: int) -> None:
        pairs = self._fan.setdefault(one, [])
        pairs.append(pair)
        self._narrow[one] = pair if len(pairs) == 1 else -2

    def _part(self, one: int, pair: int) -> None:
        pairs = self._fan[one]
        pairs.remove(pair)
        self._narrow[one] = -2 if len(pairs) > 1 else pairs[0] if pairs else -1
        if not pairs:
            del self._fan[one]

    def _fit(self, slot: int) -> None:
        while slot >= len(self._pair):
            self._pair = np.concatenate([self._pair, np.full_like(self._pair, -1)])
            self._narrow = np.concatenate([self._narrow, np.full_like(self._narrow, -1)])

    def _result(self, many: Labels, one: Labels) -> Labels:
        matching = self._matching
        kept = tuple(pair for pair in many if pair[0] not in self._drops)
        if self._single:
            kept = tuple(pair for pair in kept if (pair[0] in matching.labels) is matching.on)
        if matching.include:
            rest = tuple(pair for pair in kept if pair[0] not in matching.include)
            kept = tuple(sorted((*rest, *(pair for pair in one if pair[0] in matching.include))))
        return kept


def _function(op: str, *, returns_bool: bool) -> Callable[[Any, Any, Any], Any]:
    if op in ARITHMETIC:
        compute = ARITHMETIC[op]
        return lambda left, right, codes: (compute(left, right), codes)
    compare = COMPARISONS[op]
    if returns_bool:
        return lambda left, right, codes: (compare(left, right).astype(float), codes)

    def kept(left: Floats, right: Floats, codes: Codes | None) -> tuple[Floats, Codes]:
        left_out = (~compare(left, right)).view(np.uint8)  # True is FILTERED
        return left, left_out if codes is None else np.maximum(codes, left_out)

    return kept


class Combined(Node):
    """and, or, unless. Groups know how many of their elements are there on each side."""

    def __init__(self, left: Node, right: Node, op: str, matching: Matching) -> None:
        super().__init__((left, right))
        self._op = op
        self._matching = matching
        self._groups: dict[Labels, int] = {}
        self._members: list[tuple[dict[int, None], dict[int, None]]] = []
        self._keys: list[Labels] = []
        self._free: list[int] = []
        self._group: list[Ints] = [np.full(16, -1, np.int64), np.full(16, -1, np.int64)]
        self._code: list[Codes] = [np.full(16, ENDED, np.uint8), np.full(16, ENDED, np.uint8)]  # as counted
        self._present: Ints = np.zeros((2, 16), np.int64)
        self._filtered: Ints = np.zeros((2, 16), np.int64)
        self._watched = 0 if op == "or" else 1  # the side that decides about the other
        self._side: Ints = np.zeros(16, np.int64)  # of a slot of ours, where there are both
        self._inner: Ints = np.zeros(16, np.int64)  # its slot there
        self._outer: list[Ints] = [np.full(16, -1, np.int64), np.full(16, -1, np.int64)]
        self._used = 0
        self._free_slots: list[int] = []
        left.listen(self, 0)
        right.listen(self, 1)

    def at(self, slots: Ints) -> Cells:
        if self._op != "or":
            return self._ruled(0, self._inner[slots])
        side, inner = self._side[slots], self._inner[slots]
        values, codes = np.empty(len(slots)), np.empty(len(slots), np.uint8)
        for port in (0, 1):
            here = np.flatnonzero(side == port)
            if len(here):
                found = self.children[0].at(inner[here]) if port == 0 else self._ruled(1, inner[here])
                values[here], codes[here] = found
        return values, codes

    def _ruled(self, port: int, inner: Ints) -> Cells:
        """The elements of one side, as the other side lets them pass."""
        values, codes = self.children[port].at(inner)
        return self._rule(self._group[port][inner], values, codes)

    def bound(self, slots: Ints, fresh: Flags) -> Fetch:
        if self._op == "or":
            return super().bound(slots, fresh)
        inner = self._inner[slots]
        fetch, group = self.children[0].bound(inner, fresh), self._group[0][inner]
        return lambda: self._rule(group, *fetch())

    def _rule(self, group: Ints, values: Floats, codes: Codes | None) -> Cells:
        some = self._present[self._watched][group] > 0
        if self._op == "and":
            said = self._filtered[1][group] > 0
            refused: Any = np.where(some, np.uint8(PRESENT), np.where(said, np.uint8(FILTERED), np.uint8(MISSING)))
        else:
            refused = some.view(np.uint8)  # True is FILTERED
        return values, refused if codes is None else np.where(codes != PRESENT, codes, refused)

    def labels(self, slot: int) -> Labels:
        return self.children[int(self._side[slot])].labels(int(self._inner[slot]))

    def slots(self) -> Ints:
        ports = (0, 1) if self._op == "or" else (0,)
        return np.concatenate([outer[outer >= 0] for outer in (self._outer[port] for port in ports)])

    def taken_s(self, slot: int) -> float:
        port, inner = int(self._side[slot]), int(self._inner[slot])
        best = self.children[port].taken_s(inner)
        others = list(self._members[int(self._group[port][inner])][1 - port])[:16]
        return max([best, *(self.children[1 - port].taken_s(other) for other in others)])

    # --- told

    def added(self, port: int, slot: int) -> None:
        self._fit(port, slot)
        key = signed(self.children[port].labels(slot), self._matching)
        group = self._groups.get(key)
        if group is None:
            group = self._free.pop() if self._free else len(self._members)
            self._groups[key] = group
            if group < len(self._members):
                self._keys[group] = key
            else:
                self._members.append(({}, {}))
                self._keys.append(key)
                if group >= self._present.shape[1]:
                    self._present = np.concatenate([self._present, np.zeros_like(self._present)], axis=1)
                    self._filtered = np.concatenate([self._filtered, np.zeros_like(self._filtered)], axis=1)
        self._group[port][slot] = group
        self._members[group][port][slot] = None
        if port == 0 or self._op == "or":
            made = self._open(port, slot)
            self.emit_added(made)
        if port == self._watched:
            self._count(port, np.array([slot]))

    def removed(self, port: int, slot: int) -> None:
        group = int(self._group[port][slot])
        if port == self._watched:
            self._recount(port, np.array([slot]), np.array([ENDED], np.uint8))
        outer = int(self._outer[port][slot])
        if outer >= 0:
            self.emit_removed(outer)
            self._outer[port][slot] = -1
            self._free_slots.append(outer)
        members = self._members[group]
        del members[port][slot]
        if not members[0] and not members[1]:
            del self._groups[self._keys[group]]
            self._free.append(group)
        self._group[port][slot] = -1

    def touched(self, port: int, slots: Ints) -> None:
        if port == self._watched:
            self._count(port, slots)
        outer = self._outer[port][slots]
        outer = outer[outer >= 0]
        if len(outer):
            self.emit(outer)

    def plan(self, port: int, slots: Ints, plan: Planned) -> None:
        if port == self._watched:
            counted = np.unique(slots)
            fetch = self.children[port].bound(counted, plan.fresh)
            plan.do(
                self, port, lambda slots: self._count(port, slots), counted,
                lambda: self._recount(port, counted, fetch()[1]),
            )  # fmt: skip
        outer = self._outer[port][slots]
        outer = outer[outer >= 0]
        if len(outer):
            self.pass_on(outer, plan)

    # --- inside

    def _count(self, port: int, slots: Ints) -> None:
        """Of slots that may be there twice."""
        self._recount(port, slots, self.children[port].at(slots)[1])

    def _recount(self, port: int, slots: Ints, codes: Codes | None) -> None:
        if codes is None:
            codes = np.zeros(len(slots), np.uint8)
        before = self._code[port][slots]
        changed = before != codes
        if not np.count_nonzero(changed):
            return
        slots, places = np.unique(slots[changed], return_index=True)
        before, codes = before[changed][places], codes[changed][places]
        self._code[port][slots] = codes
        groups = self._group[port][slots]
        present, filtered = self._present[port], self._filtered[port]
        np.add.at(present, groups, (codes == PRESENT).astype(np.int64) - (before == PRESENT))
        np.add.at(filtered, groups, (codes == FILTERED).astype(np.int64) - (before == FILTERED))
        ruled = 1 - port
        listed = (slot for group in np.unique(groups).tolist() for slot in self._members[group][ruled])
        told = [self._outer[ruled][slot] for slot in listed]
        if told:
            self.emit(np.array(told, np.int64))

    def _open(self, port: int, inner: int) -> int:
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot = self._used
            self._used += 1
            if slot >= len(self._side):
                self._side = np.concatenate([self._side, np.zeros_like(self._side)])
                self._inner = np.concatenate([self._inner, np.zeros_like(self._inner)])
        self._side[slot], self._inner[slot] = port, inner
        self._outer[port][inner] = slot
        return slot

    def _fit(self, port: int, slot: int) -> None:
        while slot >= len(self._group[port]):
            self._group[port] = np.concatenate([self._group[port], np.full_like(self._group[port], -1)])
            self._outer[port] = np.concatenate([self._outer[port], np.full_like(self._outer[port], -1)])
            self._code[port] = np.concatenate([self._code[port], np.full_like(self._code[port], ENDED)])
