"""Arrays that grow: one column each of what is known of numbered things."""

from __future__ import annotations

from typing import Any

import numpy as np

FIRST = 64  # rows of a new table


class Columns:
    """Subclasses name their columns with dtype and default in `FIELDS`; each becomes an attribute."""

    FIELDS: dict[str, tuple[Any, Any]] = {}

    def __init__(self, rows: int = FIRST) -> None:
        for name, (kind, default) in self.FIELDS.items():
            setattr(self, name, np.full(rows, default, kind))
        self.rows = rows

    def fit(self, count: int) -> None:
        """Make room for `count` rows."""
        if count <= self.rows:
            return
        rows = max(count, 2 * self.rows)
        for name, (kind, default) in self.FIELDS.items():
            grown = np.full(rows, default, kind)
            grown[: self.rows] = getattr(self, name)
            setattr(self, name, grown)
        self.rows = rows
