"""The series the live engine knows, under dense ids: newest sample, ring of samples, and who wants to know. Pure.

Selectors are matched against a series once, when it is bound; then a sample only marks the selectors' slots that have
it. A series ends when its publisher says goodbye (`end`), and falls silent when it brought no sample for several of its
own intervals; a silent one is forgotten after `IDLE_EXPIRY_S`. Times are milliseconds, but for those a name says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.columns import Columns
from interlock.coordinator.rules.expression import Selector
from interlock.coordinator.rules.labelsets import Ids, LabelTable
from interlock.coordinator.rules.rings import Rings
from interlock.coordinator.rules.values import Flags, Floats, Ints

IDLE_EXPIRY_S = 3600.0  # a series without samples for so long is forgotten, and what it held in place resolves
MAX_SERIES = 500_000  # at some 0.5 kB each; a publisher that invents series without end stops here
MAX_PUBLISHER_SERIES = 50_000  # of one publisher: ten times what a source may announce at once
LOOK_MS = 1000.0  # between looks at how often series bring samples
STALE_INTERVALS = 10.0  # a series is silent after so many of its own intervals (those below a second count as one),
STALE_FLOOR_S = 10.0  # but not before: what is sampled at 10 Hz in a migration is at 1 Hz after it
MAX_TABLE = 4  # label sets interned for evaluations, as a multiple of the series there are; then the table starts anew

PRESENT, FILTERED, MISSING, ENDED = 0, 1, 2, 3  # codes: a value; data, and the condition says no; silence; gone
NOBODY = 0  # the series that never was: slots that are free belong to it
_SLOT_BITS = 32


class Members:
    """The series that one selector has, each in a slot of its own. Free slots belong to `NOBODY`."""

    def __init__(self, selector: Selector, number: int, *, recorded: bool) -> None:
        self.selector = selector
        self.number = number
        self.recorded = recorded
        self.keep_ms = 0.0
        self.ids: Ints = np.zeros(16, np.int64)
        self.count = 0  # slots ever used
        self.slots: dict[int, int] = {}
        self.listeners: list[Any] = []  # nodes: added(slot), removed(slot), touched(slots)
        self._free: list[int] = []

    def add(self, series: int) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            slot = self.count
            self.count += 1
            if slot >= len(self.ids):
                self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])
        self.ids[slot] = series
        self.slots[series] = slot
        return slot

    def remove(self, series: int) -> int:
        slot = self.slots.pop(series)
        self.ids[slot] = NOBODY
        self._free.append(slot)
        return slot

    def series(self) -> Ids:
        """The ids there are."""
        found = self.ids[: self.count]
        present: Ids = found[found != NOBODY]
        return present

    def matches(self, labels: Labels) -> bool:
        return self.selector.matches(labels)


class SeriesStore(Columns):
    """Samples in; what they touched out. The live `Source` of evaluations."""

    FIELDS = {
        "times": (np.float64, np.inf),  # of the newest sample; infinite: it ended, or is nobody's
        "values": (np.float64, 0.0),
        "taken_s": (np.float64, 0.0),  # when the newest sample was taken, by its publisher's clock
        "code": (np.uint8, ENDED),
        "looked": (np.float64, -np.inf),  # its newest sample, when intervals were last looked at
        "interval": (np.float64, np.nan),  # between samples: the largest lately, as far as looks can tell
        "ring": (np.int64, -1),
        "key": (np.int64, -1),  # its label set in the table
        "generation": (np.int64, 0),
        "publisher": (np.int64, -1),
        "hidden": (np.bool_, False),  # a baseline: only baseline() sees it, and it never falls silent
    }
    times: Floats
    values: Floats
    taken_s: Floats
    code: NDArray[np.uint8]
    looked: Floats
    interval: Floats
    ring: Ints
    key: Ints
    generation: Ints
    publisher: Ints
    hidden: Flags

    def __init__(self, lookback_s: float) -> None:
        super().__init__(1024)
        self.lookback = lookback_s * 1000
        self.rings = Rings()
        self.labels: list[Labels | None] = [None]
        self.numbers: dict[Labels, int] = {}
        self.refused = 0  # samples of series beyond the limits
        self.disordered = 0  # samples older than their series' newest: dropped
        self.repeated = 0  # samples as old as it: the last one counts
        self.unbound: deque[int] = deque()
        self.members: list[Members] = []
        self.feed: Ints = np.full((1024, 2), -1, np.int64)  # series -> (members << 32 | slot), as many as there are
        self._table = LabelTable()
        self._by_selector: dict[tuple[Selector, bool], Members] = {}
        self._by_metric: dict[str | None, list[Members]] = {}
        self._series_of: dict[str, dict[int, None]] = {}
        self.version = 0  # of what belongs to what: it grows where a series is bound or leaves
        self._fed: list[int] = [0] * 1024  # how many places of `feed` are taken
        self._free: list[int] = []
        self._leaving: list[int] = []
        self._next_look = -np.inf
        self._publishers: dict[str, int] = {}
        self._counts: dict[int, int] = {}

    # --- selectors

    def watch(self, selector: Selector, keep_ms: float = 0.0, *, recorded: bool = False) -> Members:
        """The members of a selector; `keep_ms`: how far back somebody looks at their samples."""
        made = self._by_selector.get((selector, recorded))
        if made is None:
            made = Members(selector, len(self.members), recorded=recorded)
            self.members.append(made)
            self._by_selector[selector, recorded] = made
            self._by_metric.setdefault(selector.metric, []).append(made)
            made.keep_ms = keep_ms
            for series in list(self._candidates(selector.metric)):
                self._join(made, series)
        elif keep_ms > made.keep_ms:
            made.keep_ms = keep_ms
            for series in made.slots:
                self._ring(series, keep_ms)
        return made

    def publisher_names(self) -> dict[int, str]:
        return {number: name for name, number in self._publishers.items()}

    def silent_publishers(self, now: float, intervals: float) -> tuple[int, int]:
        """(how many brought none of their series for so many intervals, how many there are)."""
        count = len(self.labels)
        known = (self.code[:count] != ENDED) & np.isfinite(self.interval[:count]) & (self.publisher[:count] >= 0)
        known &= ~self.hidden[:count]
        overdue = now - self.times[:count] > intervals * self.interval[:count]
        publishers = self.publisher[:count]
        seen = np.bincount(publishers[known], minlength=1)
        late = np.bincount(publishers[known & overdue], minlength=len(seen))
        return int(((seen > 0) & (late == seen)).sum()), int((seen > 0).sum())

    def watched(self) -> Iterable[Members]:
        return self._by_selector.values()

    def forget(self, members: Members) -> None:
        """Nobody asks for this selector any more."""
        self.version += 1
        del self._by_selector[members.selector, members.recorded]
        self._by_metric[members.selector.metric].remove(members)
        for series, slot in members.slots.items():
            row = self.feed[series]
            kept = row[(row >= 0) & (row != (members.number << _SLOT_BITS | slot))]
            row[:] = -1
            row[: len(kept)] = kept
            self._fed[series] = len(kept)
        members.slots.clear()
        members.listeners.clear()

    def _candidates(self, metric: str | None) -> Sequence[int] | dict[int, None]:
        if metric is not None:
            return self._series_of.get(metric, {})
        return list(self.numbers.values())

    # --- samples

    def admit(self, labels: Labels, publisher: str = "", *, hidden: bool = False) -> int:
        """The id of a series, a new one if need be; -1 if there are too many."""
        number = self.numbers.get(labels)
        if number is not None:
            return number
        who = self._publishers.setdefault(publisher, len(self._publishers))
        if len(self.numbers) >= MAX_SERIES or (publisher and self._counts.get(who, 0) >= MAX_PUBLISHER_SERIES):
            return -1
        if self._free:
            number = self._free.pop()
            self.labels[number] = labels
        else:
            number = len(self.labels)
            self.labels.append(labels)
            self.fit(number + 1)
            if number >= len(self.feed):
                self.feed = np.concatenate([self.feed, np.full_like(self.feed, -1)])
                self._fed += [0] * len(self._fed)
        self.numbers[labels] = number
        self.publisher[number] = who
        self._counts[who] = self._counts.get(who, 0) + 1
        self.times[number] = self.looked[number] = -np.inf
        self.interval[number] = np.nan
        self.code[number], self.key[number], self.hidden[number] = MISSING, -1, hidden
        self.ring[number] = -1
        self._series_of.setdefault(_metric(labels), {})[number] = None
        self.unbound.append(number)
        return number

    def bind(self, limit: int) -> None:
        """Match up to `limit` new series against the selectors there are."""
        self.version += bool(self.unbound)
        for _ in range(min(limit, len(self.unbound))):
            series = self.unbound.popleft()
            labels = self.labels[series]
            if labels is None:
                continue
            for candidates in (self._by_metric.get(_metric(labels), ()), self._by_metric.get(None, ())):
                for members in candidates:
                    self._join(members, series)

    def append(self, ids: Ids, values: Floats, at: float, taken_s: float) -> Ids:
        """Take in samples of one moment, one for each of these ids, and give back those that count."""
        before = self.times[ids]
        newer = bool(len(ids)) and bool(before.max() < at)
        if len(ids) and not newer:
            ended = before == np.inf
            late = before > at
            self.refused += int(ended.sum())
            self.disordered += int(late.sum()) - int(ended.sum())
            self.repeated += int((before == at).sum())
            if np.count_nonzero(late):
                ids, values = ids[~late], values[~late]
        self.times[ids] = at
        self.values[ids] = values
        self.taken_s[ids] = taken_s
        self.code[ids] = PRESENT
        rings = self.ring[ids]
        if len(rings) and rings.max() >= 0:
            windowed = np.flatnonzero(rings >= 0)
            self.rings.append(rings[windowed], at, values[windowed], newer=newer)
        return ids

    def append_all(self, ids: Ids, values: Floats, at: Floats, taken_s: Floats) -> bool:
        """As `append`, of several moments; False, and nothing is taken in, unless each is newer than what is there."""
        if not (self.times[ids] < at).all():
            return False
        self.times[ids] = at
        self.values[ids] = values
        self.taken_s[ids] = taken_s
        self.code[ids] = PRESENT
        rings = self.ring[ids]
        windowed = np.flatnonzero(rings >= 0)
        if len(windowed):
            self.rings.append(rings[windowed], at[windowed], values[windowed], newer=True)
        return True

    def slots_of(self, ids: Ids) -> list[tuple[Members, Ints]]:
        """The selectors that these series belong to, with the slots of each in order."""
        keys = self.feed[ids].ravel()
        keys = np.sort(keys[keys >= 0])
        if not len(keys):
            return []
        who = keys >> _SLOT_BITS
        starts = np.flatnonzero(np.diff(who, prepend=-1))
        bounds = [*starts.tolist(), len(keys)]
        slots = keys & (1 << _SLOT_BITS) - 1
        return [
            (self.members[number], slots[bounds[place] : bounds[place + 1]])
            for place, number in enumerate(who[starts].tolist())
        ]

    def end(self, labels: Labels) -> int | None:
        """The series reports no more. Its id is free for another after `release`."""
        number = self.numbers.pop(labels, None)
        if number is not None:
            self.code[number] = ENDED
            self.times[number] = np.inf  # later than any sample
            self._series_of[_metric(labels)].pop(number, None)
            self._leaving.append(number)
        return number

    def release(self) -> bool:
        """Free the ids of series that ended, when everybody has looked; whether there were any."""
        some = bool(self._leaving)
        self.version += some
        for series in self._leaving:
            for key in self.feed[series].tolist():
                if key >= 0:
                    members = self.members[key >> _SLOT_BITS]
                    slot = members.remove(series)
                    for listener in members.listeners:
                        listener.removed(slot)
            self.feed[series] = -1
            self._fed[series] = 0
            if self.ring[series] >= 0:
                self.rings.close(int(self.ring[series]))
                self.ring[series] = -1
            who = int(self.publisher[series])
            self._counts[who] -= 1
            self.labels[series] = None
            self.generation[series] += 1
            self._free.append(series)
        self._leaving.clear()
        return some

    def scan(self, at: float) -> tuple[Ids, list[Labels]]:
        """(series that fell silent by now, label sets of those to forget)."""
        count = len(self.labels)
        if at >= self._next_look:
            self._next_look = at + LOOK_MS
            self._measure_intervals(count)
        age = at - self.times[:count]
        own = np.maximum(self.interval[:count] * STALE_INTERVALS, STALE_FLOOR_S * 1000)
        patience = np.fmin(own, self.lookback)  # all of the lookback, while its interval isn't known
        late = (age >= patience) & ~self.hidden[:count]
        code = self.code[:count]
        silent = np.flatnonzero(late & (code == PRESENT))
        self.code[silent] = MISSING
        expired = np.flatnonzero(
            (age > max(IDLE_EXPIRY_S * 1000, self.lookback)) & (code == MISSING) & np.isfinite(age)
        )
        return silent, [labels for series in expired.tolist() if (labels := self.labels[series]) is not None]

    def _measure_intervals(self, count: int) -> None:
        """From look to look: nothing of this is paid for by a sample."""
        times, looked, interval = self.times[:count], self.looked[:count], self.interval[:count]
        gap = times - looked
        some = (gap > 0) & (looked > -np.inf) & (times < np.inf)
        interval[some] = np.fmax(gap[some], interval[some] * 0.9)
        looked[:] = np.where(times < np.inf, times, looked)

    # --- Source

    @property
    def table(self) -> LabelTable:
        return self._table

    def renew_table(self) -> None:
        """Forget interned label sets, when there are far more than series. Between evaluations only."""
        if len(self._table) > max(100_000, MAX_TABLE * len(self.numbers)):
            self._table = LabelTable()
            self.key[:] = -1

    def select(self, selector: Selector) -> Ids:
        plain = selector if not selector.shifted else Selector(selector.matchers, alternatives=selector.alternatives)
        watched = self._by_selector.get((plain, False))
        if watched is not None:
            return watched.series()
        found = [
            series
            for series in self._candidates(selector.metric)
            if not self.hidden[series] and (labels := self.labels[series]) is not None and selector.matches(labels)
        ]
        return np.array(found, np.int64)

    def looks(self, selector: Selector) -> int:
        """How many series `select` holds against the selector; none where it is watched."""
        return 0 if (selector, False) in self._by_selector else len(self._candidates(selector.metric))

    def kept(self, selector: Selector) -> tuple[int, float]:
        """(samples there are of its series, seconds that each is kept for); infinity where there is no series."""
        series = self.select(selector)
        if not len(series):
            return 0, float("inf")
        rings = self.ring[series]
        if (rings < 0).any():
            return 0, 0.0
        return int((self.rings.head[rings] - self.rings.tail[rings]).sum()), float(self.rings.keep[rings].min()) / 1000

    def baselines(self, selector: Selector) -> Ids:
        watched = self._by_selector.get((selector, True))
        return np.empty(0, np.int64) if watched is None else watched.series()

    def keys(self, series: Ids) -> Ids:
        made = self.key[series]
        if (made < 0).any():
            for number in series[made < 0].tolist():
                labels = self.labels[number]
                self.key[number] = self._table.id(_shown_labels(labels) if labels is not None else ())
            made = self.key[series]
        return made

    def latest(self, series: Ids, at: float, lookback: float) -> tuple[Flags, Floats, Floats]:
        """As `Source` has it; a lookback of -1 leaves it to each series when it is silent."""
        times, values, code = self.times[series], self.values[series], self.code[series]
        found = (code != ENDED) & ((times > at - lookback) | self.hidden[series]) if lookback >= 0 else code == PRESENT
        past = (times > at) & (code != ENDED)
        rings = self.ring[series]
        searched = np.flatnonzero(past & (rings >= 0) & (code != ENDED))
        found &= ~past
        if len(searched):
            some = rings[searched]
            index = self.rings.search(some, at) - 1
            place = self.rings.at(some, index)
            there = (index >= self.rings.tail[some]) & (
                self.rings.times[place] > at - (self.lookback if lookback < 0 else lookback)
            )
            found[searched], times[searched], values[searched] = (
                there,
                self.rings.times[place],
                self.rings.values[place],
            )
        return found, times, values

    def window(self, series: Ids, start: float, end: float) -> tuple[Ints, Floats, Floats]:
        rings = self.ring[series]
        has = rings >= 0
        if has.all():
            return self.rings.window(rings, start, end)
        bounds, times, values = self.rings.window(rings[has], start, end)
        counts = np.zeros(len(series), np.int64)
        counts[has] = np.diff(bounds)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]), times, values

    def started(self, series: Ids, times: Floats) -> Floats | None:
        """Publishers on the bus don't say when their counters began."""
        return None

    # --- inside

    def _join(self, members: Members, series: int) -> None:
        labels = self.labels[series]
        if labels is None or bool(self.hidden[series]) != members.recorded or series in members.slots:
            return
        if not members.matches(_shown_labels(labels)):
            return
        slot = members.add(series)
        key = members.number << _SLOT_BITS | slot
        place = self._fed[series]
        self._fed[series] += 1
        if place >= self.feed.shape[1]:
            wider = np.full((len(self.feed), 2 * self.feed.shape[1]), -1, np.int64)
            wider[:, : self.feed.shape[1]] = self.feed
            self.feed = wider
        self.feed[series, place] = key
        if members.keep_ms > 0:
            self._ring(series, members.keep_ms)
        for listener in members.listeners:
            listener.added(slot)

    def _ring(self, series: int, keep_ms: float) -> None:
        ring = int(self.ring[series])
        if ring >= 0:
            self.rings.keep[ring] = max(float(self.rings.keep[ring]), keep_ms)
            return
        ring = self.rings.open(keep_ms)
        if ring < 0:
            self.rings.lost += 1
            return
        self.ring[series] = ring
        if np.isfinite(self.times[series]):
            self.rings.append(np.array([ring]), float(self.times[series]), self.values[series : series + 1].copy())


BASELINE = "__baseline__"  # the label that keeps a recorded value apart from the series it was recorded of


def _metric(labels: Labels) -> str:
    return next((value for name, value in labels if name == NAME), "")


def _shown_labels(labels: Labels) -> Labels:
    return tuple(pair for pair in labels if pair[0] != BASELINE)
