"""What came from the network and is not a message: counted by kind, and logged once a kind."""

from __future__ import annotations

import logging
from collections import Counter

_log = logging.getLogger(__name__)


class Rejects:
    """Counts by kind. The kinds are words of ours, never of a peer: it can't make the table or the log grow."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.counts: Counter[str] = Counter()

    def count(self, kind: str, detail: object = "") -> None:
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            text = str(detail)[:200]
            _log.warning("%s: dropped %s: %s (more of this kind is only counted)", self.where, kind, text)

    @property
    def total(self) -> int:
        return self.counts.total()
