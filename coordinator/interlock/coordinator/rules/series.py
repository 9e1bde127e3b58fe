"""The series the engine knows, under dense ids: newest sample, window of samples, and who wants to know.

A selector is matched against a series once, when the series first appears; a sample then only marks the selectors that
have it. A series ends when its publisher says goodbye (`end`), and falls silent when its newest sample is older than
the lookback; a silent one keeps its id for `IDLE_EXPIRY_S`.
"""

from __future__ import annotations

from collections import deque

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.expression import Selector

LOOKBACK_S = 300.0  # a sample counts for so long where no newer one comes; Prometheus' default
IDLE_EXPIRY_S = 3600.0  # a series without samples for so long is forgotten, and what it held in place resolves
MAX_WINDOW_SAMPLES = 36_000  # per series and window: one hour at 10 Hz; what is older falls out early
MAX_SERIES = 500_000  # at some 1 kB each; a publisher that invents series without end stops here


class Watch:
    """One selector of one rule: which series it has, in which slot, and which of them got a sample since last asked."""

    def __init__(self, selector: Selector, owner: int, window_s: float) -> None:
        self.selector = selector
        self.owner = owner
        self.window_s = window_s
        self.slots: dict[int, int] = {}  # series id -> slot
        self.touched: set[int] = set()  # series ids
        self.unbound = True  # the set of series changed since `bind`

    def bind(self) -> list[int]:
        """Number the slots anew; the series' ids in slot order."""
        self.slots = {number: slot for slot, number in enumerate(self.slots)}
        self.touched.clear()
        self.unbound = False
        return list(self.slots)


class SeriesStore:
    """Samples in; what they touched out."""

    def __init__(self, lookback_s: float = LOOKBACK_S) -> None:
        self.lookback_s = lookback_s
        self.ids: dict[Labels, int] = {}
        self.labels: list[Labels] = []
        self.times: list[float] = []
        self.values: list[float] = []
        self.points: list[deque[tuple[float, float]] | None] = []  # only where a window wants them
        self.touched_owners: set[int] = set()
        self.refused = 0  # samples of series beyond `MAX_SERIES`
        self._windows: list[float] = []
        self._feeds: list[list[Watch]] = []
        self._silent: set[int] = set()
        self._free: list[int] = []
        self._by_metric: dict[str | None, list[Watch]] = {}

    def watch(self, selector: Selector, owner: int, window_s: float = 0.0) -> Watch:
        """A watch of a selector for rule number `owner`; all watches are made before the first sample."""
        made = Watch(selector, owner, window_s)
        self._by_metric.setdefault(selector.metric, []).append(made)
        return made

    def append(self, labels: Labels, value: float, at: float) -> None:
        """A sample. A time before the series' newest counts as that one; an equal time replaces it."""
        number = self.ids.get(labels)
        if number is None:
            if len(self.ids) >= MAX_SERIES:
                self.refused += 1
                return
            number = self._admit(labels)
        at = max(at, self.times[number])
        points = self.points[number]
        if points is not None:
            if points and points[-1][0] == at:
                points.pop()
            points.append((at, value))
            oldest = at - self._windows[number]
            while points[0][0] <= oldest:
                points.popleft()
        self.times[number] = at
        self.values[number] = value
        if number in self._silent:
            self._silent.discard(number)
        for watch in self._feeds[number]:
            watch.touched.add(number)
            self.touched_owners.add(watch.owner)

    def end(self, labels: Labels) -> None:
        """The series reports no more; its id is free for another."""
        number = self.ids.pop(labels, None)
        if number is None:
            return
        for watch in self._feeds[number]:
            watch.slots.pop(number, None)
            watch.unbound = True
            self.touched_owners.add(watch.owner)
        self._feeds[number] = []
        self.points[number] = None
        self.labels[number] = ()
        self.times[number] = float("-inf")
        self._silent.discard(number)
        self._free.append(number)

    def scan(self, at: float) -> None:
        """Mark what fell silent since the last scan as touched, and forget what has been so for long."""
        silent_since, idle_since = at - self.lookback_s, at - max(IDLE_EXPIRY_S, self.lookback_s)
        for number in self.ids.values():
            if self.times[number] <= silent_since and number not in self._silent:
                self._silent.add(number)
                for watch in self._feeds[number]:
                    watch.touched.add(number)
                    self.touched_owners.add(watch.owner)
        for labels in [self.labels[number] for number in self._silent if self.times[number] <= idle_since]:
            self.end(labels)

    def take_touched(self) -> set[int]:
        """Owners of the watches that something happened to since the last call."""
        taken, self.touched_owners = self.touched_owners, set()
        return taken

    def _admit(self, labels: Labels) -> int:
        metric = dict(labels).get(NAME)
        watches = [
            watch
            for candidates in (self._by_metric.get(metric, ()) if metric else (), self._by_metric.get(None, ()))
            for watch in candidates
            if watch.selector.matches(labels)
        ]
        window = max((watch.window_s for watch in watches), default=0.0)
        points: deque[tuple[float, float]] | None = deque(maxlen=MAX_WINDOW_SAMPLES) if window else None
        if self._free:
            number = self._free.pop()
            self.labels[number], self.points[number] = labels, points
            self._windows[number], self._feeds[number] = window, watches
        else:
            number = len(self.labels)
            self.labels.append(labels)
            self.points.append(points)
            self._windows.append(window)
            self._feeds.append(watches)
            self.times.append(float("-inf"))
            self.values.append(0.0)
        self.ids[labels] = number
        for watch in watches:
            watch.slots[number] = -1
            watch.unbound = True
        return number
