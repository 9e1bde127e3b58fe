"""What rules record: elements of expressions as samples of series of their own. Pure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from interlock.broker.samples import Labels
from interlock.coordinator.rules.running import Running
from interlock.coordinator.rules.series import PRESENT, SeriesStore
from interlock.coordinator.rules.values import Ints

RECORDER = ""  # the publisher of what rules record


class Recorder:
    """Writes into the store, and tells of what changed there. `now_ms`: of the evaluation that is going on."""

    def __init__(self, store: SeriesStore, tell: Callable[[Ints], None], now_ms: Callable[[], float]) -> None:
        self._store = store
        self._tell = tell
        self._now_ms = now_ms

    def slots(self, running: Running, now: float) -> None:
        """The slots that changed of a rule that looks sample by sample."""
        assert running.root is not None
        slots = running.slots()
        values, codes = running.root.at(slots)
        found = {}
        for slot, value, code in zip(slots.tolist(), values.tolist(), codes.tolist(), strict=True):
            key = running.keys.get(slot)
            if key is None:
                continue
            series = running.series_key(key)
            if code == PRESENT:
                found[series] = value
            elif series in running.recorded:
                self._end(running, series)
        for key in running.take_orphans():
            self._end(running, running.series_key(key))
        self._append(running, found, now)

    def whole(self, running: Running, found: dict[Labels, float], now: float) -> None:
        """The rule's elements become samples of the series it records; an element that goes ends its series."""
        for series in [series for series in running.recorded if series not in found]:
            self._end(running, series)
        self._append(running, found, now)

    def _end(self, running: Running, series: Labels) -> None:
        if running.recorded.pop(series, None) is not None:
            number = self._store.end(series)
            if number is not None:
                self._tell(np.array([number]))

    def _append(self, running: Running, found: dict[Labels, float], now: float) -> None:
        if not found:
            return
        ids = np.fromiter((self._store.admit(series, RECORDER) for series in found), np.int64, len(found))
        values = np.fromiter(found.values(), np.float64, len(found))
        good = ids >= 0
        self._store.refused += int((~good).sum())
        self._store.bind(len(self._store.unbound))
        running.recorded.update(zip(found, ids.tolist(), strict=True))
        taken = running.sample_time if running.sample_time is not None else now
        self._tell(self._store.append(ids[good], values[good], self._now_ms(), taken))
