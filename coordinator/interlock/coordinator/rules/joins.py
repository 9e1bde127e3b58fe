"""Two vectors brought together, by Prometheus' rules of vector matching. Pure."""

from __future__ import annotations

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.expression import Binary, Matching
from interlock.coordinator.rules.labelsets import METADATA, Derivation, Ids, LabelTable, shown
from interlock.coordinator.rules.operators import ARITHMETIC, COMPARISONS
from interlock.coordinator.rules.values import EvaluationError, Floats, Ints, Vector, empty, joined


def signature(table: LabelTable, matching: Matching) -> Derivation:
    """What elements of both sides are matched on."""
    return table.only(matching.labels) if matching.on else table.without((*matching.labels, NAME))


def combined(table: LabelTable, op: str, left: Vector, right: Vector, matching: Matching) -> Vector:
    """and, or, unless."""
    signed = signature(table, matching)
    lefts, rights = signed(left.keys), signed(right.keys)
    if op == "or":
        return joined(left, right.take(~np.isin(rights, lefts)))
    found = np.isin(lefts, rights)
    return left.take(found if op == "and" else ~found)


def paired(table: LabelTable, expression: Binary, left: Vector, right: Vector) -> Vector:
    """Arithmetic and comparison of the elements that belong together: one to one, many to one, one to many."""
    matching = expression.matching
    filled = matching.fill_left is not None or matching.fill_right is not None
    if not (len(left) and len(right)) and not (filled and (len(left) or len(right))):
        return empty()
    swapped = matching.cardinality == "one-to-many"
    many, one = (right, left) if swapped else (left, right)
    fill_many, fill_one = matching.fill_left, matching.fill_right
    if swapped:
        fill_many, fill_one = fill_one, fill_many
    signed = signature(table, matching)
    manys, ones = signed(many.keys), signed(one.keys)
    _check_one_side(table, ones, one, signed, side="left" if swapped else "right")
    order = np.argsort(ones, kind="stable")
    places = np.searchsorted(ones[order], manys)
    places = np.minimum(places, len(ones) - 1)
    matched = np.zeros(len(manys), bool) if not len(ones) else ones[order[places]] == manys
    chosen = np.flatnonzero(matched)
    partner = order[places[chosen]] if len(ones) else chosen
    pairs = _Pairs(
        many.keys[chosen], one.keys[partner], many.values[chosen], one.values[partner], many.dropped[chosen],
        manys[chosen],
    )  # fmt: skip
    if fill_one is not None:
        rest = np.flatnonzero(~matched)
        pairs = pairs.more(many.keys[rest], manys[rest], many.values[rest], fill_one, manys[rest])
    if fill_many is not None:
        rest = np.flatnonzero(~np.isin(ones, manys))
        pairs = pairs.more(ones[rest], one.keys[rest], fill_many, one.values[rest], ones[rest])
    return _settled(table, expression, pairs, swapped=swapped)


class _Pairs:
    """Columns of pairs: the side of which there may be many, and the other."""

    def __init__(  # noqa: PLR0917 - columns
        self, many: Ids, one: Ids, a: Floats, b: Floats, dropped: object, group: Ids
    ) -> None:
        self.many, self.one, self.a, self.b, self.group = many, one, a, b, group
        self.dropped = np.asarray(dropped, bool)

    def more(self, many: Ids, one: Ids, a: Floats | float, b: Floats | float, group: Ids) -> _Pairs:
        count = len(many)
        return _Pairs(
            np.concatenate([self.many, many]),
            np.concatenate([self.one, one]),
            np.concatenate([self.a, np.broadcast_to(np.asarray(a, float), (count,))]),
            np.concatenate([self.b, np.broadcast_to(np.asarray(b, float), (count,))]),
            np.concatenate([self.dropped, np.zeros(count, bool)]),
            np.concatenate([self.group, group]),
        )


def _settled(table: LabelTable, expression: Binary, pairs: _Pairs, *, swapped: bool) -> Vector:
    op, matching = expression.op, expression.matching
    keys = result_keys(table, op, matching, pairs.many, pairs.one)
    if matching.cardinality == "one-to-one":
        if len(np.unique(pairs.group)) < len(pairs.group):
            raise EvaluationError(
                "multiple matches for labels: many-to-one matching must be explicit (group_left/group_right)"
            )
    elif len(keys) and len(np.unique(np.stack([pairs.group, keys]), axis=1)[0]) < len(keys):
        raise EvaluationError("multiple matches for labels: grouping labels must ensure unique matches")
    left, right = (pairs.b, pairs.a) if swapped else (pairs.a, pairs.b)
    if op in ARITHMETIC:
        return Vector(keys, ARITHMETIC[op](left, right), pairs.dropped & False)
    keep = COMPARISONS[op](left, right)
    if expression.bool:
        return Vector(keys, keep.astype(float), np.ones(len(keys), bool))
    return Vector(keys[keep], left[keep], pairs.dropped[keep])


def _check_one_side(table: LabelTable, ones: Ids, one: Vector, signed: Derivation, *, side: str) -> None:
    distinct, counts = np.unique(ones, return_counts=True)
    twice = distinct[counts > 1]
    if not len(twice):
        return
    group = int(twice[0])
    named = sorted(shown(table.sets[key]) for key in one.keys[ones == group].tolist())[:2]
    raise EvaluationError(
        f"found duplicate series for the match group {shown(table.sets[group])} on the {side} hand-side of the "
        f"operation: [{named[0]}, {named[1]}];many-to-many matching not allowed: matching labels must be unique on "
        "one side"
    )


def result_keys(table: LabelTable, op: str, matching: Matching, many: Ids, one: Ids) -> Ids:
    """The label sets of the results: the many side's, less what the matching takes, with what it includes."""
    gone = METADATA if op in ARITHMETIC else ()
    if matching.cardinality != "one-to-one":
        keys = table.without(gone)(many) if gone else many
    elif matching.on:
        kept = tuple(name for name in matching.labels if name not in gone)
        keys = table.only(kept)(many)
    else:
        keys = table.without((*gone, *matching.labels))(many)
    if not matching.include:
        return keys
    copied = table.only(matching.include)(one)
    return _included(table, keys, copied, matching.include)


def _included(table: LabelTable, keys: Ids, copied: Ids, names: tuple[str, ...]) -> Ids:
    made: dict[tuple[int, int], int] = {}
    out: Ints = np.empty(len(keys), np.int64)
    for place, pair in enumerate(zip(keys.tolist(), copied.tolist(), strict=True)):
        number = made.get(pair)
        if number is None:
            number = made[pair] = table.id(included(table.sets[pair[0]], table.sets[pair[1]], names))
        out[place] = number
    return out


def included(labels: Labels, copied: Labels, names: tuple[str, ...]) -> Labels:
    rest = tuple(pair for pair in labels if pair[0] not in names)
    return tuple(sorted((*rest, *copied)))
