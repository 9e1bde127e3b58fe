"""The rule engine's core: samples and the time go in, transitions of alerts come out. No clock, no sockets.

A whole batch is applied before any rule looks, so that a new `used` never meets an old `total`; then each rule that the
batch touched is brought up to date once, in the elements that it touched. Rules over a window or the clock change also
where no sample comes: they are evaluated in `tick`, within `WINDOW_PERIOD_S` of a sample.

Two clocks: `time` is the publisher's, and only reported; `now` is ours, monotone, and decides on `for`, windows and
staleness. A publisher's clock is brought to ours by the smallest difference seen lately (see `Skew`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from typing import Literal

from interlock.broker.samples import MAX_SOURCES, NAME, Labels
from interlock.coordinator.rules.alerts import Alerts, Transition
from interlock.coordinator.rules.cells import Cell, EvaluationError, absence, clashes, shown, unnamed, without
from interlock.coordinator.rules.program import Program
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.series import LOOKBACK_S, SeriesStore

WINDOW_PERIOD_S = 0.25  # rules over windows are evaluated this often where samples come,
IDLE_PERIOD_S = 1.0  # and this often where none do: windows move on
SCAN_PERIOD_S = 1.0  # between looks for silent series; small against any lookback
STARTUP_S = 5.0  # absence is judged after so much ingest: every publisher has sent a keyframe by then
WATERMARK_S = 5.0  # without any sample for so long, the bus stands still and not the series: staleness waits
MAX_DELAY_S = 5.0  # a sample counts as no older than this when it arrives, whatever its publisher's clock says
SKEW_WINDOW_S = 60.0  # a publisher's clock offset is the smallest of the last one to two windows
MAX_PASSES = 16  # recorded series that feed each other settle within so many passes, or the rest waits for a sample


class Skew:
    """A publisher's clock against ours: the smallest difference lately is the offset, the rest is delay."""

    def __init__(self) -> None:
        self._until = -math.inf
        self._current = self._previous = math.inf

    def to_ours(self, time: float, now: float) -> float:
        """`time` by our clock; never after `now`, never more than `MAX_DELAY_S` before it."""
        if now >= self._until:
            self._previous, self._current = self._current, math.inf
            self._until = now + SKEW_WINDOW_S
        self._current = min(self._current, now - time)
        return min(now, max(time + min(self._current, self._previous), now - MAX_DELAY_S))


class _Running:
    """A rule at work."""

    def __init__(self, rule: Rule, number: int, store: SeriesStore) -> None:
        self.rule = rule
        self.program = Program(rule.expression, store, number)
        self.alerts = Alerts(rule)
        self.keys: list[Labels] = []
        self.rivals: dict[int, list[int]] = {}  # slots with the same key: at most one has a value at a time
        self.sample_time: float | None = None
        self.recorded: set[Labels] = set()
        self.error = ""

    def rebind(self) -> None:
        labels = self.program.root.labels
        self.keys = [self._series(key) if self.rule.kind == "record" else unnamed(key) for key in labels]
        self.rivals = {slot: slots for slots in clashes(self.keys) for slot in slots}

    def _series(self, labels: Labels) -> Labels:
        found = dict(without(labels, (NAME, *self.rule.labels)))
        added = {name: text for name, text in self.rule.labels.items() if text}
        return tuple(sorted({**found, **added, NAME: self.rule.name}.items()))

    def cell(self, slot: int) -> Cell:
        """What the rule says of the slot's key. EvaluationError if it says two things."""
        cells = self.program.root.cells
        rivals = self.rivals.get(slot)
        if rivals is None:
            return cells[slot]
        present = [other for other in rivals if type(cells[other]) is float]
        if len(present) > 1:
            raise EvaluationError(f"more than one result has the labels {shown(self.keys[slot])}")
        return cells[present[0]] if present else absence(cells[other] for other in rivals)


class Engine:
    """All rules over all series. `errors` has the last error of each rule that can't be evaluated now, by its place."""

    def __init__(self, rules: Sequence[Rule], *, lookback_s: float = LOOKBACK_S) -> None:
        self.samples = 0
        self.evaluations = 0
        self.evaluation_errors = 0
        self.errors: dict[str, str] = {}
        self._store = SeriesStore(lookback_s)
        self._running = [_Running(rule, number, self._store) for number, rule in enumerate(rules)]
        self._skews: OrderedDict[str, Skew] = OrderedDict()  # by publisher, MAX_SOURCES of them
        self._scan_period_s = min(SCAN_PERIOD_S, lookback_s / 4)
        self._untried = set(range(len(rules)))  # never evaluated: constants and absences need no sample
        self._touched: set[int] = set()  # timed rules that got a sample since their last evaluation
        self._began: float | None = None
        self._watermark = -math.inf
        self._next_window = self._next_idle = self._next_scan = -math.inf

    @property
    def refused(self) -> int:
        """Samples of series that were too many."""
        return self._store.refused

    # --- in

    def ingest(
        self,
        samples: Iterable[tuple[Labels, float]],
        ended: Iterable[Labels],
        time: float,
        now: float,
        *,
        publisher: str = "",
    ) -> list[Transition]:
        """One batch: series that ended, samples taken at `time` by the publisher's clock, received `now`."""
        store = self._store
        if not math.isfinite(time):
            time = now
        if self._began is None:
            self._began = now
        self._watermark = max(self._watermark, now)
        at = self._skew(publisher).to_ours(time, now)
        for labels in ended:
            store.end(labels)
        count = 0
        for labels, value in samples:
            store.append(labels, float(value), at)
            count += 1
        self.samples += count
        return self._settle(self._store.take_touched(), at=now, now=now, sample_time=time, timed=False)

    def _skew(self, publisher: str) -> Skew:
        found = self._skews.get(publisher)
        if found is None:
            found = self._skews[publisher] = Skew()
            if len(self._skews) > MAX_SOURCES:
                self._skews.popitem(last=False)
        self._skews.move_to_end(publisher)
        return found

    def tick(self, now: float) -> list[Transition]:
        """What the passing of time alone brings about: deadlines, silence, windows that move on."""
        at = min(now, self._watermark + WATERMARK_S)
        made: list[Transition] = []
        due: set[int] = set()
        if now >= self._next_scan:
            self._next_scan = now + self._scan_period_s
            self._store.scan(at)
            due |= self._store.take_touched()
        if self._untried and self._began is not None:
            due |= self._untried
        if now >= self._next_idle:
            self._next_idle = now + IDLE_PERIOD_S
            due |= {number for number, running in enumerate(self._running) if running.program.timed}
        if now >= self._next_window:
            self._next_window = now + WINDOW_PERIOD_S
            due |= self._touched
        if due and self._began is not None:
            made += self._settle(due, at=at, now=now, sample_time=None, timed=True)
        for running in self._running:
            if not running.error:  # what can't be evaluated now is not known to last
                made += running.alerts.tick(now)
        return made

    def restore(
        self, rule: str, labels: dict[str, str], value: float, *, sample_time: float, since: float, now: float
    ) -> bool:
        """An alert of this rule fired before a restart and didn't resolve; False if there is no such rule any more."""
        for running in self._running:
            wanted = running.rule.labels.items()
            fits = all(labels.get(name, "") == text for name, text in wanted if "{{" not in text)
            if running.rule.kind == "alert" and running.rule.name == rule and fits:
                running.alerts.restore(labels, value, sample_time=sample_time, since=since, now=now)
                return True
        return False

    # --- out

    def next_deadline(self) -> float:
        """When `tick` has something to do at the latest; infinity where nothing is known yet."""
        deadlines = [running.alerts.next_deadline() for running in self._running if not running.error]
        if self._began is not None:
            deadlines.append(self._next_scan)
            if any(running.program.timed for running in self._running):
                deadlines.append(self._next_idle)
            if self._touched or self._untried:
                deadlines.append(self._next_window)
        return min(deadlines, default=math.inf)

    def current(self, state: Literal["pending", "firing"]) -> list[Transition]:
        """Every alert in this state, as the transition that would say so."""
        return [made for running in self._running for made in running.alerts.current(state)]

    def breaches(self, names: Container[str]) -> list[Transition]:
        """What is breached now of the rules with these names, whether for long enough or not."""
        return [made for running in self._running if running.rule.name in names for made in running.alerts.breaches()]

    # --- inside

    def _settle(
        self, due: set[int], *, at: float, now: float, sample_time: float | None, timed: bool
    ) -> list[Transition]:
        """Evaluate these rules, and then those that watch what they recorded, until nothing new is recorded."""
        made: list[Transition] = []
        for _ in range(MAX_PASSES):
            for number in sorted(due):
                running = self._running[number]
                if sample_time is not None:
                    running.sample_time = sample_time
                if (running.program.timed and not timed) or self._too_early(running, now):
                    self._touched.add(number)
                    continue
                self._touched.discard(number)
                self._untried.discard(number)
                made += self._evaluate(running, at, now)
            due = self._store.take_touched()
            if not due:
                return made
        self._store.touched_owners |= due
        return made

    def _too_early(self, running: _Running, now: float) -> bool:
        return running.program.judges_absence and (self._began is None or now < self._began + STARTUP_S)

    def _evaluate(self, running: _Running, at: float, now: float) -> list[Transition]:
        self.evaluations += 1
        program, alerts = running.program, running.alerts
        made: list[Transition] = []
        try:
            rebound, changed = program.update(at)
            if rebound or running.error:
                running.rebind()
                changed = range(len(program.root.cells))
            found = [(running.keys[slot], running.cell(slot)) for slot in changed]
        except EvaluationError as error:
            self.evaluation_errors += 1
            running.error = self.errors[running.rule.where] = str(error)
            return []
        if running.error:
            running.error = ""
            self.errors.pop(running.rule.where, None)
            rebound = True
        if running.rule.kind == "record":
            self._record(running, found, at, rebound=rebound)
            return []
        if rebound:
            made += alerts.retain(running.keys, now)
        sample_time = running.sample_time if running.sample_time is not None else now
        watchful = running.rule.no_data == "fire"
        for key, cell in found:
            if type(cell) is not float and not watchful and not alerts:
                continue
            transition = alerts.observe(key, cell, sample_time=sample_time, now=now)
            if transition is not None:
                made.append(transition)
        return made

    def _record(self, running: _Running, found: Sequence[tuple[Labels, Cell]], at: float, *, rebound: bool) -> None:
        """The rule's elements become samples of the series it records; an element that goes ends its series."""
        present = {key for key, cell in found if type(cell) is float}
        considered = running.recorded if rebound else {key for key, _ in found}
        for key in (considered & running.recorded) - present:
            self._store.end(key)
            running.recorded.discard(key)
        for key, cell in found:
            if type(cell) is float:
                self._store.append(key, cell, at)
        running.recorded |= present
