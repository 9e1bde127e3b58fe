"""What the nodes of a program have in common: slots with labels, and a cell in each slot.

A slot stands for one label set that a node can give. It is numbered when the node is bound to the series there are, and
its labels don't change until it is bound anew. The cell is its value, or says why there is none: `MISSING` (no fresh
sample) or `FILTERED` (there is data, and the expression says no). The difference is what `x_no_data` decides on.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from interlock.broker.errors import InterlockError
from interlock.broker.samples import NAME, Labels


class Absent(enum.Enum):
    MISSING = "missing"
    FILTERED = "filtered"


MISSING: Final = Absent.MISSING
FILTERED: Final = Absent.FILTERED
Cell = float | Absent


class EvaluationError(InterlockError):
    """The series there are can't be evaluated by this rule (two match where one may). Other rules go on."""


class ScalarNode(Protocol):
    value: float

    def bind(self) -> None: ...

    def update(self, at: float, *, full: bool) -> bool:
        """Bring `value` up to date; True if it may have changed."""
        ...


class VectorNode:
    """A node that gives elements. A subclass fills `labels` and `cells` in `bind`, and cells in `update`."""

    def __init__(self) -> None:
        self.labels: list[Labels] = []
        self.cells: list[Cell] = []
        self._clashes: list[list[int]] = []

    def bind(self) -> None:
        raise NotImplementedError

    def update(self, at: float, *, full: bool) -> Sequence[int]:
        """Bring the cells up to date; the slots that may have changed. `full`: all of them, as after `bind`.

        EvaluationError leaves the cells as they are: the next update must be full.
        """
        raise NotImplementedError

    def _bound(self, labels: list[Labels]) -> None:
        self.labels = labels
        self.cells = [MISSING] * len(labels)
        self._clashes = clashes(labels)

    def _check(self) -> None:
        """No two elements with the same labels at once."""
        for slots in self._clashes:
            if sum(type(self.cells[slot]) is float for slot in slots) > 1:
                raise EvaluationError(
                    f"the result has more than one element with the labels {shown(self.labels[slots[0]])}",
                    hint="keep a label that tells them apart",
                )


def clashes(labels: Sequence[Labels]) -> list[list[int]]:
    """Groups of slots that have the same labels; none where all differ."""
    places: dict[Labels, list[int]] = {}
    for slot, key in enumerate(labels):
        places.setdefault(key, []).append(slot)
    return [slots for slots in places.values() if len(slots) > 1]


def without(labels: Labels, names: Iterable[str]) -> Labels:
    gone = frozenset(names)
    return tuple(pair for pair in labels if pair[0] not in gone)


def only(labels: Labels, names: Iterable[str]) -> Labels:
    kept = frozenset(names)
    return tuple(pair for pair in labels if pair[0] in kept)


def unnamed(labels: Labels) -> Labels:
    return without(labels, (NAME,))


def shown(labels: Labels) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels) + "}"


def absence(cells: Iterable[Cell]) -> Absent:
    """Why there is no value where none of these cells has one."""
    return FILTERED if any(cell is FILTERED for cell in cells) else MISSING
