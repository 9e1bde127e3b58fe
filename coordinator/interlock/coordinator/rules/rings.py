"""Rings of samples in one arena: the newest samples of each series that a window looks at. Pure.

A ring holds `capacity` (a power of two) samples; sample number k of a ring lies at `base + (k & mask)`. A ring that is
full lets go what its windows no longer need, and doubles otherwise; its old place is used again. The arena is address
space that costs memory only where something was written.
"""

from __future__ import annotations

import copy
import mmap

import numpy as np

from interlock.coordinator.rules.values import Floats, Ints

MAX_SAMPLES = 1 << 26  # of all rings together: 1 GiB of times and values; one more is refused and counted
MAX_RING = 1 << 16  # samples of one ring: 1.8 hours at 10 Hz; what is older falls out early, and is counted
FIRST = 16  # samples of a new ring

_FIELDS = ("base", "mask", "head", "tail", "keep", "revised")


class Rings:
    """Columns by ring number. `head`: samples ever written; `tail`: the oldest that is still there."""

    def __init__(self, samples: int = MAX_SAMPLES) -> None:
        self.times: Floats = np.frombuffer(mmap.mmap(-1, samples * 8), np.float64)
        self.values: Floats = np.frombuffer(mmap.mmap(-1, samples * 8), np.float64)
        self.base: Ints = np.zeros(16, np.int64)
        self.mask: Ints = np.zeros(16, np.int64)
        self.head: Ints = np.zeros(16, np.int64)
        self.tail: Ints = np.zeros(16, np.int64)
        self.keep: Floats = np.zeros(16)  # milliseconds that its windows look back
        self.revised: Ints = np.zeros(16, np.int64)  # how often a ring's newest sample was replaced
        self.lost = 0  # samples that fell out before their time, or found no room
        self._samples = samples
        self._used = 0
        self._count = 0
        self._free_rings: list[int] = []
        self._free_places: dict[int, list[int]] = {}

    def open(self, keep_ms: float) -> int:
        """A new ring that keeps samples for so long; -1 if there is no room for one."""
        base = self._place(FIRST)
        if base < 0:
            return -1
        if self._free_rings:
            ring = self._free_rings.pop()
        else:
            ring = self._count
            self._count += 1
            if ring >= len(self.base):
                for name in _FIELDS:
                    setattr(self, name, np.concatenate([getattr(self, name), np.zeros_like(getattr(self, name))]))
        self.base[ring], self.mask[ring], self.keep[ring] = base, FIRST - 1, keep_ms
        self.head[ring] = self.tail[ring] = 0
        return ring

    def close(self, ring: int) -> None:
        capacity = int(self.mask[ring]) + 1
        self._free_places.setdefault(capacity, []).append(int(self.base[ring]))
        self._free_rings.append(ring)
        self.head[ring] = self.tail[ring] = 0

    def append(self, rings: Ints, time: float | Floats, values: Floats, *, newer: bool = False) -> None:
        """One sample for each of these rings, all of them different; newer than what they hold, or just as old.

        `newer`: they are known not to be just as old; only then may each have a time of its own.
        """
        base, mask, head = self.base[rings], self.mask[rings], self.head[rings]
        if not newer:
            again = (head > self.tail[rings]) & (self.times[base + ((head - 1) & mask)] == time)
            if np.count_nonzero(again):
                place = base[again] + ((head[again] - 1) & mask[again])
                self.values[place] = values[again]
                self.revised[rings[again]] += 1
                rings, values = rings[~again], values[~again]
                base, mask, head = self.base[rings], self.mask[rings], self.head[rings]
        full = head - self.tail[rings] > mask
        if np.count_nonzero(full):
            self._make_room(rings[full], np.broadcast_to(time, rings.shape)[full])
            base, mask = self.base[rings], self.mask[rings]
        place = base + (head & mask)
        self.times[place] = time
        self.values[place] = values
        self.head[rings] = head + 1

    def copied(self) -> Rings:
        """The same samples in arrays of their own, to read."""
        made = copy.copy(self)
        made.times, made.values = self.times[: self._used].copy(), self.values[: self._used].copy()
        for name in _FIELDS:
            setattr(made, name, getattr(self, name).copy())
        return made

    def fill(self, ring: int, times: Floats, values: Floats) -> None:
        """Begin a ring anew with these samples, oldest first; the newest of them, if they are too many."""
        times, values = times[-MAX_RING:], values[-MAX_RING:]
        capacity = int(self.mask[ring]) + 1
        while capacity < len(times):
            capacity *= 2
        if capacity > int(self.mask[ring]) + 1:
            base = self._place(capacity)
            if base < 0:
                self.lost += len(times)
                return
            self._free_places.setdefault(int(self.mask[ring]) + 1, []).append(int(self.base[ring]))
            self.base[ring], self.mask[ring] = base, capacity - 1
        base = int(self.base[ring])
        self.times[base : base + len(times)] = times
        self.values[base : base + len(values)] = values
        self.head[ring], self.tail[ring] = len(times), 0
        self.revised[ring] += 1

    def at(self, rings: Ints, index: Ints) -> Ints:
        """Where sample number `index` of each ring lies."""
        place: Ints = self.base[rings] + (index & self.mask[rings])
        return place

    def search(self, rings: Ints, moment: float | Floats) -> Ints:
        """The number of the first sample of each ring that is later than the moment, or than its own one."""
        low, high = self.tail[rings].copy(), self.head[rings].copy()
        while True:
            open_ = low < high
            if not np.count_nonzero(open_):
                return low
            middle = (low + high) >> 1
            later = self.times[self.at(rings, middle)] > moment
            high = np.where(open_ & later, middle, high)
            low = np.where(open_ & ~later, middle + 1, low)

    def window(self, rings: Ints, start: float, end: float) -> tuple[Ints, Floats, Floats]:
        """(bounds, times, values) of the samples in (start, end], ring after ring."""
        low, high = self.search(rings, start), self.search(rings, end)
        bounds = np.zeros(len(rings) + 1, np.int64)
        np.cumsum(high - low, out=bounds[1:])
        index = np.arange(bounds[-1]) + np.repeat(low - bounds[:-1], high - low)
        place = self.at(np.repeat(rings, high - low), index)
        return bounds, self.times[place], self.values[place]

    @property
    def used(self) -> int:
        """Samples that there is room for in the rings there ever were: the memory is 16 bytes for each."""
        return self._used

    # --- inside

    def _make_room(self, rings: Ints, now: Floats) -> None:
        """Let go what is out of all windows; where that is less than half, double the ring."""
        kept_from = self.search(rings, now - self.keep[rings])
        self.tail[rings] = kept_from
        tight = self.head[rings] - kept_from > (self.mask[rings] + 1) // 2
        for ring in rings[tight].tolist():
            self._double(ring)

    def _double(self, ring: int) -> None:
        kept_from, capacity = int(self.tail[ring]), int(self.mask[ring]) + 1
        base = self._place(2 * capacity) if 2 * capacity <= MAX_RING else -1
        if base < 0:
            if int(self.head[ring]) - kept_from == capacity:
                self.tail[ring] += 1
                self.lost += 1
            return
        index = np.arange(kept_from, int(self.head[ring]))
        source = int(self.base[ring]) + (index & (capacity - 1))
        target = base + (index & (2 * capacity - 1))
        self.times[target] = self.times[source]
        self.values[target] = self.values[source]
        self._free_places.setdefault(capacity, []).append(int(self.base[ring]))
        self.base[ring], self.mask[ring] = base, 2 * capacity - 1

    def _place(self, capacity: int) -> int:
        free = self._free_places.get(capacity)
        if free:
            return free.pop()
        if self._used + capacity > self._samples:
            return -1
        self._used += capacity
        return self._used - capacity
