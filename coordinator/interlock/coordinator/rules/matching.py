"""The nodes of a program that bring two vectors together, by Prometheus' rules of vector matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.cells import FILTERED, MISSING, Cell, EvaluationError, VectorNode, only, shown, without
from interlock.coordinator.rules.expression import Matching


class _Sides:
    """The slots of both sides, sorted into groups by what they are matched on."""

    def __init__(self, left: Sequence[Labels], right: Sequence[Labels], matching: Matching) -> None:
        places: dict[Labels, int] = {}
        self.members: list[tuple[list[int], list[int]]] = []
        self.of_left = self._sort(left, matching, places, 0)
        self.of_right = self._sort(right, matching, places, 1)
        self.keys = list(places)

    def _sort(self, labels: Sequence[Labels], matching: Matching, places: dict[Labels, int], side: int) -> list[int]:
        groups = []
        for slot, key in enumerate(labels):
            matched = only(key, matching.labels) if matching.on else without(key, (*matching.labels, NAME))
            group = places.setdefault(matched, len(places))
            if group == len(self.members):
                self.members.append(([], []))
            self.members[group][side].append(slot)
            groups.append(group)
        return groups


class _TwoSided(VectorNode):
    """Updates both sides and hands each group that something changed in to `_settle`, which gives its out slots."""

    def __init__(self, left: VectorNode, right: VectorNode, matching: Matching) -> None:
        super().__init__()
        self._left = left
        self._right = right
        self._matching = matching
        self._sides = _Sides((), (), matching)

    def bind(self) -> None:
        self._left.bind()
        self._right.bind()
        self._sides = _Sides(self._left.labels, self._right.labels, self._matching)
        self._bind_groups()

    def update(self, at: float, *, full: bool) -> Sequence[int]:
        left = self._left.update(at, full=full)
        right = self._right.update(at, full=full)
        sides = self._sides
        if full:
            groups: Sequence[int] = range(len(sides.members))
        else:
            groups = list({sides.of_left[slot] for slot in left} | {sides.of_right[slot] for slot in right})
        changed: list[int] = []
        for group in groups:
            changed += self._settle(group)
        self._check()
        return changed

    def _bind_groups(self) -> None:
        raise NotImplementedError

    def _settle(self, group: int) -> Sequence[int]:
        raise NotImplementedError


def _present(cells: Sequence[Cell], slots: Sequence[int]) -> list[int]:
    return [slot for slot in slots if type(cells[slot]) is float]


class Combined(_TwoSided):
    """and, or, unless."""

    def __init__(self, op: str, left: VectorNode, right: VectorNode, matching: Matching) -> None:
        super().__init__(left, right, matching)
        self._op = op

    def _bind_groups(self) -> None:
        self._bound(self._left.labels + self._right.labels if self._op == "or" else self._left.labels)

    def _settle(self, group: int) -> Sequence[int]:
        left, right = self._left.cells, self._right.cells
        lefts, rights = self._sides.members[group]
        if self._op == "or":
            return self._either(left, right, lefts, rights)
        some_right = bool(_present(right, rights))
        refused: Cell = FILTERED
        if self._op == "and" and not some_right and not any(right[slot] is FILTERED for slot in rights):
            refused = MISSING
        wanted = self._op == "and"
        for slot in lefts:
            cell = left[slot]
            self.cells[slot] = cell if type(cell) is not float or some_right is wanted else refused
        return lefts

    def _either(
        self, left: Sequence[Cell], right: Sequence[Cell], lefts: Sequence[int], rights: Sequence[int]
    ) -> list[int]:
        offset = len(left)
        some_left = bool(_present(left, lefts))
        for slot in lefts:
            self.cells[slot] = left[slot]
        for slot in rights:
            cell = right[slot]
            self.cells[offset + slot] = FILTERED if some_left and type(cell) is float else cell
        return [*lefts, *(offset + slot for slot in rights)]


class Paired(_TwoSided):
    """Arithmetic and comparison of the elements that belong together: one to one, many to one, one to many.

    A slot stands for a pair of slots of the two sides; a group has more pairs than elements only where several series
    take turns on a side.
    """

    def __init__(
        self,
        function: Callable[[float, float], Cell],
        left: VectorNode,
        right: VectorNode,
        matching: Matching,
        *,
        keeps_name: bool,
    ) -> None:
        super().__init__(left, right, matching)
        self._function = function
        self._keeps_name = keeps_name
        self._pairs: list[list[tuple[int, int, int]]] = []  # per group: (out slot, left slot, right slot)

    def _bind_groups(self) -> None:
        labels: list[Labels] = []
        self._pairs = []
        for lefts, rights in self._sides.members:
            pairs = []
            for left in lefts:
                for right in rights:
                    pairs.append((len(labels), left, right))
                    labels.append(self._labels_of(self._left.labels[left], self._right.labels[right]))
            self._pairs.append(pairs)
        self._bound(labels)

    def _labels_of(self, left: Labels, right: Labels) -> Labels:
        matching = self._matching
        many, one = (right, left) if matching.cardinality == "one-to-many" else (left, right)
        kept = many if self._keeps_name else without(many, (NAME,))
        if matching.cardinality == "one-to-one":
            kept = only(kept, matching.labels) if matching.on else without(kept, matching.labels)
        if matching.include:
            copied = {**dict(without(kept, matching.include)), **dict(only(one, matching.include))}
            kept = tuple(sorted(copied.items()))
        return kept

    def _settle(self, group: int) -> Sequence[int]:
        left, right = self._left.cells, self._right.cells
        pairs = self._pairs[group]
        lefts, rights = self._sides.members[group]
        if len(pairs) != 1 and (len(lefts) > 1 or len(rights) > 1):
            self._check_group(group)
        for slot, at_left, at_right in pairs:
            a, b = left[at_left], right[at_right]
            if type(a) is float and type(b) is float:
                self.cells[slot] = self._function(a, b)
            else:
                self.cells[slot] = MISSING if a is MISSING or b is MISSING else FILTERED
        return [slot for slot, _, _ in pairs]

    def _check_group(self, group: int) -> None:
        sides: list[tuple[str, VectorNode, list[int]]] = [
            ("left", self._left, _present(self._left.cells, self._sides.members[group][0])),
            ("right", self._right, _present(self._right.cells, self._sides.members[group][1])),
        ]
        if self._matching.cardinality == "one-to-many":
            sides.reverse()
        (_, many_node, many), (one_side, one_node, one) = sides
        if len(one) > 1 and any(type(cell) is float for cell in many_node.cells):
            first, second = sorted(one_node.labels[slot] for slot in one)[:2]
            raise EvaluationError(
                f"more than one series for the match group {shown(self._sides.keys[group])} on the {one_side}-hand "
                f"side: {shown(first)}, {shown(second)}",
                hint="match on more labels, or aggregate that side first",
            )
        if self._matching.cardinality == "one-to-one" and len(many) > 1 and one:
            raise EvaluationError(
                f"more than one series for the match group {shown(self._sides.keys[group])}",
                hint="write group_left or group_right if that is what you mean",
            )
