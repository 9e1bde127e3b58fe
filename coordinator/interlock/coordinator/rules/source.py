"""Where an evaluation finds its samples: the interface, and a history that holds everything it was told. Pure.

The live engine's store has the same interface over its rings (series.py).
"""

from __future__ import annotations

import math
import struct
from typing import Protocol

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.expression import Selector
from interlock.coordinator.rules.labelsets import Ids, LabelTable
from interlock.coordinator.rules.values import Flags, Floats, Ints

STALE = struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000002))[0]  # Prometheus' marker: the series ended here
_STALE_BITS = np.uint64(0x7FF0000000000002)


def is_stale(values: Floats) -> Flags:
    made: Flags = values.view(np.uint64) == _STALE_BITS
    return made


class Source(Protocol):
    """Series under numbers, their label sets, and their samples. Times in milliseconds."""

    @property
    def table(self) -> LabelTable: ...

    def select(self, selector: Selector) -> Ids:
        """The numbers of the series that it matches, whatever samples they have."""
        ...

    def baselines(self, selector: Selector) -> Ids:
        """The numbers of what was recorded of such series before a migration."""
        ...

    def keys(self, series: Ids) -> Ids:
        """Their label sets in `table`."""
        ...

    def latest(self, series: Ids, at: float, lookback: float) -> tuple[Flags, Floats, Floats]:
        """(whether there is one, time, value) of the newest sample of each in (at - lookback, at]."""
        ...

    def window(self, series: Ids, start: float, end: float) -> tuple[Ints, Floats, Floats]:
        """(bounds, times, values): the samples of each in (start, end], one series after another."""
        ...

    def started(self, series: Ids, times: Floats) -> Floats | None:
        """When the counters of these samples began (a sample is a series and its time), 0 where nobody knows.

        None where nobody knows of any.
        """
        ...


class History:
    """Every sample ever appended, for scripts, unit tests and recordings."""

    def __init__(self) -> None:
        self._table = LabelTable()
        self._numbers: dict[Labels, int] = {}
        self._labels: list[Labels] = []
        self._keys: Ints = np.empty(0, np.int64)
        self._times: list[list[float]] = []
        self._values: list[list[float]] = []
        self._columns: dict[int, tuple[Floats, Floats]] = {}
        self._by_metric: dict[str, list[int]] = {}
        self._starts: dict[int, dict[float, float]] = {}  # by series: time of a sample -> when its counter began

    @property
    def table(self) -> LabelTable:
        return self._table

    def append(self, labels: Labels, value: float, at: float, *, start: float | None = None) -> None:
        """A sample at `at` milliseconds. One that is older than the series' newest is put where it belongs.

        `start`: when its counter began, if that is known.
        """
        number = self._numbers.get(labels)
        if number is None:
            number = self._numbers[labels] = len(self._labels)
            self._labels.append(labels)
            self._times.append([])
            self._values.append([])
            self._by_metric.setdefault(dict(labels).get(NAME, ""), []).append(number)
        if start is not None:
            self._starts.setdefault(number, {})[at] = start
        times, values = self._times[number], self._values[number]
        self._columns.pop(number, None)
        if times and at <= times[-1]:
            place = int(np.searchsorted(times, at))
            if times[place] == at:
                values[place] = value
                return
            times.insert(place, at)
            values.insert(place, value)
            return
        times.append(at)
        values.append(value)

    def end(self, labels: Labels, at: float) -> None:
        self.append(labels, STALE, at)

    def select(self, selector: Selector) -> Ids:
        metric = selector.metric
        numbers = range(len(self._labels)) if metric is None else self._by_metric.get(metric, ())
        return np.array([number for number in numbers if selector.matches(self._labels[number])], np.int64)

    def baselines(self, selector: Selector) -> Ids:
        return np.empty(0, np.int64)

    def keys(self, series: Ids) -> Ids:
        if len(self._keys) < len(self._labels):
            self._keys = self._table.ids(self._labels)
        return self._keys[series]

    def latest(self, series: Ids, at: float, lookback: float) -> tuple[Flags, Floats, Floats]:
        found, times, values = np.zeros(len(series), bool), np.zeros(len(series)), np.zeros(len(series))
        for place, number in enumerate(series.tolist()):
            when, what = self._column(number)
            last = int(np.searchsorted(when, at, "right")) - 1
            if last >= 0 and when[last] > at - lookback:
                found[place], times[place], values[place] = True, when[last], what[last]
        return found & ~is_stale(values), times, values

    def window(self, series: Ids, start: float, end: float) -> tuple[Ints, Floats, Floats]:
        times: list[Floats] = []
        values: list[Floats] = []
        for number in series.tolist():
            when, what = self._column(number)
            low, high = np.searchsorted(when, (start, end), "right")
            when, what = when[low:high], what[low:high]
            live = ~is_stale(what)
            times.append(when[live])
            values.append(what[live])
        bounds = np.zeros(len(series) + 1, np.int64)
        np.cumsum([len(each) for each in times], out=bounds[1:])
        if not times:
            return bounds, np.empty(0), np.empty(0)
        return bounds, np.concatenate(times), np.concatenate(values)

    def started(self, series: Ids, times: Floats) -> Floats | None:
        if not self._starts:
            return None
        pairs = zip(series.tolist(), times.tolist(), strict=True)
        none: dict[float, float] = {}
        return np.array([self._starts.get(number, none).get(time, 0.0) for number, time in pairs], float)

    def _column(self, number: int) -> tuple[Floats, Floats]:
        made = self._columns.get(number)
        if made is None:
            made = self._columns[number] = np.array(self._times[number]), np.array(self._values[number])
        return made


def milliseconds(seconds: float) -> float:
    """As Prometheus keeps times: whole milliseconds."""
    return float(round(seconds * 1000)) if math.isfinite(seconds) else seconds
