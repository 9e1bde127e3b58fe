"""Windows in the incremental tier: what a sample changes is kept up to date, however long the window is. Pure.

Running sums are compensated, and computed anew from the ring whenever it wraps, so that rounding never adds up. While a
window has NaN or infinite values, its functions are computed from the samples themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from interlock.coordinator.rules.columns import Columns
from interlock.coordinator.rules.nodes import Cells, Codes, Fetch, Leaf, Passing, Planned
from interlock.coordinator.rules.rings import Rings
from interlock.coordinator.rules.series import ENDED, MISSING, PRESENT
from interlock.coordinator.rules.values import Flags, Floats, Ints, Matrix, Runs
from interlock.coordinator.rules.windows import WINDOW_FUNCTIONS, cancelled, extrapolated

REFRESH_MS = 250.0  # a window without samples moves on this often


class Rolling(Columns):
    """What a window remembers of each slot, so that a sample costs the same however long the window is."""

    FIELDS = {
        "tail": (np.int64, 0),  # number in the ring of the oldest sample inside
        "seen": (np.int64, 0),  # samples of the ring that were taken in
        "total": (np.float64, 0.0),  # compensated sum of the values inside
        "total_lost": (np.float64, 0.0),
        "drops": (np.float64, 0.0),  # compensated sum of what resets of a counter took
        "drops_lost": (np.float64, 0.0),
        "resets": (np.int64, 0),
        "changes": (np.int64, 0),
        "wild": (np.int64, 0),  # NaN and infinite values inside: sums are computed anew while there are any
        "live": (np.bool_, False),
        "revised": (np.int64, 0),  # as the ring's
        "looked": (np.float64, -np.inf),  # when it was last brought up to date
    }
    tail: Ints
    seen: Ints
    total: Floats
    total_lost: Floats
    drops: Floats
    drops_lost: Floats
    resets: Ints
    changes: Ints
    wild: Ints
    live: Flags
    revised: Ints
    looked: Floats


class Windowed(Passing):
    """A function of each series' samples in a window, kept up to date sample by sample. Milliseconds."""

    timed = True

    def __init__(self, leaf: Leaf, name: str, window_ms: float, clock: Callable[[], float]) -> None:
        super().__init__(leaf, drops_name=name not in ("last_over_time", "first_over_time"))
        self._leaf = leaf
        self._name = name
        self._window = window_ms
        self._clock = clock
        self._sums = name in ("sum_over_time", "avg_over_time")  # what is kept up to date is what is asked for
        self._resets = name in ("rate", "increase", "resets")
        self._changes = name == "changes"
        self.state = Rolling()
        self.anchored = 0  # how often sums were computed anew
        for slot in leaf.slots().tolist():
            self.added(0, slot)

    # --- told

    def added(self, port: int, slot: int) -> None:
        self.state.fit(slot + 1)
        self._clear(slot)
        self.state.live[slot] = True
        ring = int(self._leaf.store.ring[self._leaf.members.ids[slot]])
        if ring >= 0 and self._leaf.store.rings.head[ring]:
            self._update(np.array([slot]))
        self.emit_added(slot)

    def removed(self, port: int, slot: int) -> None:
        self._clear(slot)
        self.emit_removed(slot)

    def touched(self, port: int, slots: Ints) -> None:
        self._update(slots)
        self.emit(slots)

    def plan(self, port: int, slots: Ints, plan: Planned) -> None:
        plan.do(self, port, self._update, slots)
        self.pass_on(slots, plan)

    def scan(self, at: float) -> None:
        """Windows that move on where no sample comes."""
        state, members = self.state, self._leaf.members
        state.fit(members.count)
        count = members.count
        late = state.looked[:count] <= at - REFRESH_MS
        due = np.flatnonzero(late & state.live[:count] & (state.seen[:count] > state.tail[:count]))
        if len(due):
            self._update(due)
            self.emit(due)

    def renew(self) -> None:
        members, rings = self._leaf.members, self._leaf.store.rings
        slots = np.flatnonzero(self.state.live[: members.count])
        slots = slots[self._leaf.store.ring[members.ids[slots]] >= 0]
        ring = self._leaf.store.ring[members.ids[slots]]
        self.state.tail[slots], self.state.seen[slots] = rings.tail[ring], rings.head[ring]
        self._anchor(slots, ring, rings)
        self._update(slots)

    def _clear(self, slot: int) -> None:
        for name, (_, default) in Rolling.FIELDS.items():
            getattr(self.state, name)[slot] = default

    # --- asked

    def at(self, slots: Ints) -> Cells:
        ids = self._leaf.members.ids[slots]
        codes = self._leaf.store.code[ids]
        rings = self._leaf.store.ring[ids]
        values, found = self._function(slots, rings)
        codes = np.where(found, np.uint8(PRESENT), np.where(codes == ENDED, np.uint8(ENDED), np.uint8(MISSING)))
        return values, codes

    def bound(self, slots: Ints, fresh: Flags) -> Fetch:
        ids, rates = self._leaf.members.ids[slots], self._name in ("rate", "increase", "delta")
        rings, store = self._leaf.store.ring[ids], self._leaf.store.rings
        if not (rates and len(slots) and fresh[ids].all() and (rings >= 0).all()):
            return lambda: self.at(slots)

        def fetched() -> tuple[Floats, Codes | None]:
            state = self.state
            tail, head = state.tail[slots], state.seen[slots]
            count = head - tail
            if count.min() < 2 or np.count_nonzero(state.wild[slots]):
                return self.at(slots)
            base, mask = store.base[rings], store.mask[rings]
            first, last = base + (tail & mask), base + ((head - 1) & mask)
            values, found, doubtful = self._rate(store, slots, count, first, last)
            if np.count_nonzero(doubtful) or np.count_nonzero(found) < len(found):
                return self.at(slots)
            return values, None

        return fetched

    def _function(self, slots: Ints, rings: Ints) -> tuple[Floats, Flags]:
        state, store = self.state, self._leaf.store.rings
        tail, head = state.tail[slots], state.seen[slots]
        count = head - tail
        some = (count > 0) & (rings >= 0)
        safe = np.where(some, rings, 0)
        first, last = store.at(safe, tail), store.at(safe, np.maximum(head - 1, tail))
        anew = some & (state.wild[slots] > 0)
        match self._name:
            case "rate" | "increase" | "delta":
                values, found, doubtful = self._rate(store, slots, count, first, last)
                anew |= some & doubtful
            case "irate" | "idelta":
                values, found = self._instant(store, safe, count, head, last)
            case "count_over_time":
                values, found = count.astype(float), some
            case "present_over_time":
                values, found = np.ones(len(slots)), some
            case "last_over_time":
                values, found = store.values[last], some
            case "first_over_time":
                values, found = store.values[first], some
            case "changes":
                values, found = state.changes[slots].astype(float), some
            case "resets":
                values, found = state.resets[slots].astype(float), some
            case _:
                values, found = state.total[slots] + state.total_lost[slots], some
                if self._name == "avg_over_time":
                    values = values / count
        if np.count_nonzero(anew) and self._name not in ("count_over_time", "present_over_time", "last_over_time"):
            values = values.copy()
            values[anew], found[anew] = self._anew(store, safe[anew], tail[anew], head[anew])
        return values, found & some

    def _rate(self, store: Rings, slots: Ints, count: Ints, first: Ints, last: Ints) -> tuple[Floats, Flags, Flags]:
        """And where it has to be computed from the samples themselves."""
        state, first_value, last_value = self.state, store.values[first], store.values[last]
        counter = self._name != "delta"
        change = last_value - first_value
        doubtful = np.zeros(len(slots), bool)
        if counter and np.count_nonzero(reset := state.resets[slots] > 0):
            drops = np.where(reset, state.drops[slots] + state.drops_lost[slots], 0.0)
            change = change + drops
            doubtful = cancelled(change, first_value, last_value, drops)
        end = self._clock()
        values, found = extrapolated(
            count, store.times[first], first_value, store.times[last], change, end - self._window, end,
            counter=counter, per_second=self._name == "rate",
        )  # fmt: skip
        assert found is not None
        return values, found, doubtful

    def _instant(self, store: Rings, rings: Ints, count: Ints, head: Ints, last: Ints) -> tuple[Floats, Flags]:
        before = store.at(rings, np.maximum(head - 2, 0))
        value, earlier = store.values[last], store.values[before]
        sampled = store.times[last] - store.times[before]
        change = value - earlier
        if self._name == "irate":
            change = np.where(value < earlier, value, change) / (sampled / 1000)
        return change, (count > 1) & (sampled != 0)

    def _anew(self, store: Rings, rings: Ints, tail: Ints, head: Ints) -> tuple[Floats, Flags]:
        """From the samples themselves, as the batch tier does it."""
        counts = head - tail
        bounds = np.zeros(len(rings) + 1, np.int64)
        np.cumsum(counts, out=bounds[1:])
        index = np.arange(bounds[-1]) + np.repeat(tail - bounds[:-1], counts)
        place = store.at(np.repeat(rings, counts), index)
        end = self._clock()
        none = np.zeros(len(rings), np.int64)
        matrix = Matrix(
            none, none.astype(bool), Runs(bounds, store.values[place]), store.times[place], end - self._window, end
        )
        values, found = WINDOW_FUNCTIONS[self._name](matrix)
        return values, np.ones(len(rings), bool) if found is None else found

    # --- kept up to date

    def _update(self, slots: Ints) -> None:
        """Take in what the rings got, and let go what the window has left behind."""
        state, store = self.state, self._leaf.store
        rings = store.ring[self._leaf.members.ids[slots]]
        if np.count_nonzero(rings < 0):
            slots, rings = slots[rings >= 0], rings[rings >= 0]
        arena = store.rings
        state.looked[slots] = self._clock()
        revised = arena.revised[rings] != state.revised[slots]
        if np.count_nonzero(revised):
            state.revised[slots[revised]] = arena.revised[rings[revised]]
            self._anchor(slots[revised], rings[revised], arena)
        while True:
            lead = arena.head[rings] - state.seen[slots]
            if not np.count_nonzero(lead > 0):
                break
            if len(lead) and lead.min() == lead.max() == 1:  # a sample for each, as a planned batch brings
                if self._take(slots, rings, arena):
                    break
                continue
            new = lead > 0
            self._take(slots[new], rings[new], arena)
        start = self._clock() - self._window
        while True:
            tail = state.tail[slots]
            oldest = arena.times[arena.at(rings, tail)]
            out = (tail < state.seen[slots]) & ((oldest <= start) | (tail < arena.tail[rings]))
            count = np.count_nonzero(out)
            if not count:
                break
            if count == len(out):
                self._drop(slots, rings, arena)
            else:
                self._drop(slots[out], rings[out], arena)

    def _take(self, slots: Ints, rings: Ints, arena: Rings) -> bool:
        """The next sample of each; whether every one of them was there to take."""
        state = self.state
        seen = state.seen[slots]
        lost = seen < arena.tail[rings]  # the ring let go what was never looked at
        some_lost = bool(np.count_nonzero(lost))
        if some_lost:
            self._anchor(slots[lost], rings[lost], arena)
            slots, rings, seen = slots[~lost], rings[~lost], seen[~lost]
        value = arena.values[arena.at(rings, seen)]
        self._count(slots, value, 1)
        if self._resets or self._changes:
            before = arena.values[arena.at(rings, np.maximum(seen - 1, 0))]
            self._pair(slots, before, value, seen > state.tail[slots], 1)
        state.seen[slots] = seen + 1
        mask = arena.mask[rings]
        wrapped = (seen & mask) == mask
        if np.count_nonzero(wrapped):
            self._anchor(slots[wrapped], rings[wrapped], arena)
        return not some_lost

    def _drop(self, slots: Ints, rings: Ints, arena: Rings) -> None:
        state = self.state
        tail = state.tail[slots]
        lost = tail < arena.tail[rings]
        if np.count_nonzero(lost):
            self._anchor(slots[lost], rings[lost], arena)
            slots, rings, tail = slots[~lost], rings[~lost], tail[~lost]
        value, seen = arena.values[arena.at(rings, tail)], state.seen[slots]
        self._count(slots, value, -1)
        if self._resets or self._changes:
            self._pair(slots, value, arena.values[arena.at(rings, tail + 1)], tail + 1 < seen, -1)
        state.tail[slots] = tail + 1
        emptied = tail + 1 == seen
        if np.count_nonzero(emptied):
            empty = slots[emptied]
            for column in (state.total, state.total_lost, state.drops, state.drops_lost):
                column[empty] = 0.0

    def _count(self, slots: Ints, value: Floats, sign: int) -> None:
        state = self.state
        finite = np.isfinite(value)
        if np.count_nonzero(finite) < len(value):
            state.wild[slots] += np.where(finite, 0, sign)
            value = np.where(finite, value, 0.0)
        if self._sums:
            _add(state.total, state.total_lost, slots, sign * value)

    def _pair(self, slots: Ints, before: Floats, value: Floats, inside: Flags, sign: int) -> None:
        state = self.state
        if self._changes:
            changed = inside & (value != before) & ~(np.isnan(value) & np.isnan(before))
            state.changes[slots] += sign * changed
        reset = inside & (value < before)
        if self._resets and np.count_nonzero(reset):
            state.resets[slots] += sign * reset
            _add(state.drops, state.drops_lost, slots, np.where(reset & np.isfinite(before), sign * before, 0.0))

    def _anchor(self, slots: Ints, rings: Ints, arena: Rings) -> None:
        """Compute sums and counts anew from the ring: whatever rounding left behind ends here."""
        state = self.state
        self.anchored += len(slots)
        low = np.maximum(state.tail[slots], arena.tail[rings])
        high = np.maximum(low, state.seen[slots])
        state.tail[slots], state.seen[slots] = low, high
        counts = high - low
        bounds = np.zeros(len(slots) + 1, np.int64)
        np.cumsum(counts, out=bounds[1:])
        index = np.arange(bounds[-1]) + np.repeat(low - bounds[:-1], counts)
        values = arena.values[arena.at(np.repeat(rings, counts), index)]
        owners = np.repeat(np.arange(len(slots)), counts)
        finite = np.isfinite(values)

        def count(what: Flags) -> Ints:
            return np.bincount(owners[what], minlength=len(slots))

        def total(what: Flags, of: Floats, sums: Floats, lost: Floats) -> None:
            sums[slots] = lost[slots] = 0.0
            for owner in np.unique(owners[what]).tolist():
                run = slice(bounds[owner], bounds[owner + 1])
                sums[slots[owner]], lost[slots[owner]] = _exactly(of[run][what[run]])

        state.wild[slots] = count(~finite)
        if self._sums:
            total(finite, values, state.total, state.total_lost)
        if self._resets or self._changes:
            before = np.concatenate([values[:1], values[:-1]])
            inner = np.ones(len(values), bool)
            inner[bounds[:-1][counts > 0]] = False
            reset = inner & (values < before)
            state.resets[slots] = count(reset)
            total(reset & np.isfinite(before), before, state.drops, state.drops_lost)
            state.changes[slots] = count(inner & (values != before) & ~(np.isnan(values) & np.isnan(before)))


def _exactly(values: Floats) -> tuple[float, float]:
    """Their sum, and what rounding took from it."""
    parts = values.tolist()
    try:
        total = math.fsum(parts)
        return total, math.fsum([*parts, -total])
    except OverflowError:  # finite values, whose sum is not
        return float(values.sum()), 0.0


def _add(total: Floats, lost: Floats, slots: Ints, value: Floats) -> None:
    """Neumaier's step, in place."""
    before = total[slots]
    after = before + value
    larger = np.abs(before) >= np.abs(value)
    lost[slots] += np.where(larger, (before - after) + value, (value - after) + before)
    total[slots] = after


INCREMENTAL_WINDOWS = (
    "rate", "increase", "delta", "irate", "idelta", "sum_over_time", "avg_over_time", "count_over_time",
    "last_over_time", "first_over_time", "present_over_time", "changes", "resets",
)  # fmt: skip
