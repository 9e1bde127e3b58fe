"""What is measured of an agent and its host while it is moved, kept small enough for one event of the log. Pure.

The newest points of a series are kept as they came. Older ones are thinned by halves as often as there is need: of
each group of neighbours the one stays that lies farthest from the group before, so that a short peak is still there
after a day. Of a run of equal values the first and the last are kept, which loses nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Literal

from interlock.broker import facts
from interlock.broker.samples import NAME, Labels

POINTS = 240  # of a series: as many as a chart shows apart
NEWEST = 100  # of these, not thinned: the last 10 s at 10 samples a second, in which it is decided
SERIES = (
    96  # of a migration: two revisions of an agent have some 75; with POINTS of 18 bytes each some 400 kB of an event
)
PASSED_OVER = 5000  # series of a host that are remembered as not wanted: as many as the broker remembers of one source
LABEL_BYTES = 4096  # of one series' labels, in the event: a series with more of them is left out

Point = tuple[float, float]  # when, and the value
Kind = Literal["own", "shared"]

# Of the host as a whole only what may decide about an agent, so that 8 cards leave room for the agent's own.
SHARED = {
    "gpu_memory_used_ratio",
    "gpu_utilization_ratio",
    "gpu_temperature_celsius",
    "host_memory_available_bytes",
    "host_load1",
    "host_cpu_ratio",
}


class Thinned:
    """One series. `points` are in the order of their times, POINTS at most."""

    def __init__(self) -> None:
        self._newest: deque[Point] = deque()
        self._history: list[Point] = []
        self._group: list[Point] = []
        self._stride = 1  # points of the series for each of the history

    def add(self, time: float, value: float) -> None:
        """A sample; one that is not newer than the last, or not finite, is passed over."""
        newest = self._newest
        if not math.isfinite(value) or (newest and time <= newest[-1][0]):
            return
        if len(newest) >= 2 and newest[-1][1] == newest[-2][1] == value:
            newest[-1] = (time, value)
            return
        newest.append((time, value))
        if len(newest) > NEWEST:
            self._age(newest.popleft())

    @property
    def points(self) -> list[Point]:
        return [*self._history, *([self._salient(self._group)] if self._group else []), *self._newest]

    def _age(self, point: Point) -> None:
        self._group.append(point)
        if len(self._group) < self._stride:
            return
        self._history.append(self._salient(self._group))
        self._group.clear()
        if len(self._history) >= POINTS - NEWEST:
            before, self._history = self._history, []
            for first in range(0, len(before), 2):
                self._history.append(self._salient(before[first : first + 2]))
            self._stride *= 2

    def _salient(self, group: list[Point]) -> Point:
        if not self._history:
            return group[0]
        level = self._history[-1][1]
        return max(group, key=lambda point: abs(point[1] - level))


class Recorder:
    """The series of one agent's migration. What is the agent's own comes before what is of its host."""

    def __init__(self, migration: str, agent: str) -> None:
        self.migration = migration
        self.agent = agent
        self._series: dict[Labels, Thinned] = {}
        self._shared: list[Labels] = []
        self._left_out: set[int] = set()  # hashes of labels
        self._passed_over: set[Labels] = set()  # what was looked at once, and is not wanted

    def take(self, samples: Iterable[tuple[Labels, float]], time: float) -> None:
        """A batch of samples, taken at `time` (seconds since 1970)."""
        for labels, value in samples:
            series = self._series.get(labels)
            if series is None and labels not in self._passed_over:
                series = self._new(labels)
                if series is None and len(self._passed_over) < PASSED_OVER:
                    self._passed_over.add(labels)
            if series is not None:
                series.add(time, value)

    def recorded(self) -> facts.SeriesRecorded:
        """All of it, for the log."""
        tracks = []
        for labels, series in sorted(self._series.items()):
            points = series.points
            if points:
                times, values = [round(time, 3) for time, _ in points], [value for _, value in points]
                tracks.append(facts.Track(labels=dict(labels), times=times, values=values))
        return facts.SeriesRecorded(
            migration=self.migration, agent=self.agent, series=tracks, left_out=len(self._left_out)
        )

    def _new(self, labels: Labels) -> Thinned | None:
        kind = self._kind(labels)
        if kind is None:
            return None
        if len(self._series) >= SERIES:
            self._leave_out(labels)
            if kind == "shared" or not self._shared:
                return None
            labels_gone = self._shared.pop()
            del self._series[labels_gone]
            self._left_out.discard(hash(labels))
            self._leave_out(labels_gone)
        if kind == "shared":
            self._shared.append(labels)
        series = self._series[labels] = Thinned()
        return series

    def _leave_out(self, labels: Labels) -> None:
        if len(self._left_out) < 10 * SERIES:  # enough to say that many are missing
            self._left_out.add(hash(labels))

    def _kind(self, labels: Labels) -> Kind | None:
        known = dict(labels)
        name = known.get(NAME, "")
        if known.get("agent") not in (None, self.agent):
            return None
        if sum(len(key) + len(value) for key, value in labels) > LABEL_BYTES:
            self._leave_out(labels)
            return None
        if "agent" in known:
            return "own"
        return "shared" if name in SHARED else None
