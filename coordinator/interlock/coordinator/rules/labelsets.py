"""Label sets under dense ids, so that vectors of elements are arrays of numbers. Pure.

What is made of a label set (fewer labels, other ones) is made once and looked up from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interlock.broker.samples import NAME, Labels

Ids = NDArray[np.int64]
METADATA = (NAME, "__type__", "__unit__")  # what arithmetic takes away: the result is another metric


class LabelTable:
    """Interned label sets. It only grows: who feeds it label sets without end starts a new one."""

    def __init__(self) -> None:
        self.sets: list[Labels] = [()]
        self._ids: dict[Labels, int] = {(): 0}
        self._derived: dict[Any, Derivation] = {}

    def __len__(self) -> int:
        return len(self.sets)

    def id(self, labels: Labels) -> int:
        number = self._ids.get(labels)
        if number is None:
            number = self._ids[labels] = len(self.sets)
            self.sets.append(labels)
        return number

    def ids(self, labels: Iterable[Labels]) -> Ids:
        return np.fromiter((self.id(each) for each in labels), np.int64)

    def derive(self, key: Any, function: Callable[[Labels], Labels]) -> Derivation:
        """What `function` makes of label sets; `key` stands for the function."""
        made = self._derived.get(key)
        if made is None:
            made = self._derived[key] = Derivation(self, function)
        return made

    def without(self, names: Iterable[str]) -> Derivation:
        gone = frozenset(names)
        return self.derive(("without", gone), lambda labels: tuple(pair for pair in labels if pair[0] not in gone))

    def only(self, names: Iterable[str]) -> Derivation:
        kept = frozenset(names)
        return self.derive(("only", kept), lambda labels: tuple(pair for pair in labels if pair[0] in kept))

    def unnamed(self) -> Derivation:
        return self.without(METADATA)


class Derivation:
    """Ids of label sets -> ids of what is made of them."""

    def __init__(self, table: LabelTable, function: Callable[[Labels], Labels]) -> None:
        self._table = table
        self._function = function
        self._made: Ids = np.full(16, -1, np.int64)

    def __call__(self, ids: Ids) -> Ids:
        if len(self._made) < len(self._table.sets):
            grown = np.full(2 * len(self._table.sets), -1, np.int64)
            grown[: len(self._made)] = self._made
            self._made = grown
        made = self._made[ids]
        if (made < 0).any():
            for number in np.unique(ids[made < 0]).tolist():
                self._made[number] = self._table.id(self._function(self._table.sets[number]))
            made = self._made[ids]
        return made


def replaced(labels: Labels, name: str, value: str) -> Labels:
    """With this label; an empty value takes it away."""
    rest = [pair for pair in labels if pair[0] != name]
    return tuple(sorted([*rest, (name, value)])) if value else tuple(rest)


def named_set(labels: Labels) -> str:
    """With the metric's name before the braces, as Prometheus writes a series."""
    name = dict(labels).get(NAME, "")
    rest = tuple(pair for pair in labels if pair[0] != NAME)
    return name + (shown(rest) if rest or not name else "")


def shown(labels: Labels) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels) + "}"
