"""A rule at work: its place in a tier, its alerts, what it records. Pure.

A rule whose expression can be had sample by sample listens to the node that gives it (graph.py), and looks at the slots
that changed. Any other is computed as a whole (evaluate.py). While a node can't tell label sets apart, its rules are
computed as a whole too: only at a moment is it clear whether two of them are there at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.alerts import Alerts, Transition
from interlock.coordinator.rules.expression import Call, Selector, parts, selectors
from interlock.coordinator.rules.graph import Graph, NotIncremental, reachable
from interlock.coordinator.rules.labelsets import METADATA, shown
from interlock.coordinator.rules.nodes import Codes, Node, Planned
from interlock.coordinator.rules.pairs import Paired
from interlock.coordinator.rules.retention import wanted
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.series import ENDED, FILTERED, MISSING, PRESENT, Members, SeriesStore
from interlock.coordinator.rules.values import EvaluationError, Floats, Ints

Tier = Literal["incremental", "batch", "sampled"]

SMALL = 256  # series; a rule of the batch tier over no more is evaluated when samples arrive, as the others are
ABSENCES = ("absent", "absent_over_time", "absent_each")


class Running:
    """`touched`: slots to look at. `why`: what keeps it from the incremental tier."""

    def __init__(self, rule: Rule, store: SeriesStore, graph: Graph) -> None:
        self.rule = rule
        self.alerts = Alerts(rule)
        self.why = ""
        self.root: Node | None = None
        self.keys: dict[int, Labels] = {}
        self.sample_time: float | None = None
        self.recorded: dict[Labels, int] = {}  # series that it records
        self.error = ""
        self.marked = False
        self.queue: list[Running] = []  # those that are marked; the engine's
        self.touched: list[Ints] = []
        self.place = 0  # among the rules
        self.last_evaluated = -np.inf
        self._store = store
        self._slot_of: dict[Labels, int] = {}
        self._rivals: dict[Labels, set[int]] = {}  # slots that have one key, where they are several
        self._orphans: set[Labels] = set()
        self._rows: Ints = np.full(16, -1, np.int64)
        self._pairs: list[Paired] = []
        self._new: list[int] = []
        self.members: list[Members] = []
        self.tier: Tier = "sampled" if rule.interval_s else "incremental"
        called = {part.function for part in parts(rule.expression) if isinstance(part, Call)}
        self.judges_absence = not called.isdisjoint(ABSENCES)
        self.timed = "time" in called or not any(True for _ in selectors(rule.expression))
        if self.tier == "incremental":
            try:
                self.root = graph.build(rule.expression)
            except NotIncremental as reason:
                self.tier, self.why = "batch", str(reason)
        if self.root is not None:
            self._pairs = [node for node in reachable(self.root) if isinstance(node, Paired)]
            self.ear = Ear(self)
            self.root.listen(self.ear, 0)
        else:
            self._watch(store)
        self.timed = self.timed or (self.root is None and self.looks_back)

    def _watch(self, store: SeriesStore) -> None:
        for selector, keep_s, recorded in wanted(self.rule):
            members = store.watch(selector, keep_s * 1000, recorded=recorded)
            members.listeners.append(_Mark(self))
            self.members.append(members)

    @property
    def looks_back(self) -> bool:
        return any(keep_s > 0 for _, keep_s, _ in wanted(self.rule))

    @property
    def conflicted(self) -> bool:
        """It must be computed as a whole for now."""
        if self._rivals:
            return True
        return any(node.conflicts for node in self._pairs)

    @property
    def small(self) -> bool:
        return sum(len(members.slots) for members in self.members) <= SMALL

    # --- told by the root node

    def added(self, port: int, slot: int) -> None:
        assert self.root is not None
        labels = self.root.labels(slot)
        key = tuple(pair for pair in labels if pair[0] != NAME)
        self.keys[slot] = key
        while slot >= len(self._rows):
            self._rows = np.concatenate([self._rows, np.full_like(self._rows, -1)])
        other = self._slot_of.setdefault(key, slot)
        if other != slot:
            self._rivals.setdefault(key, {other}).add(slot)
        self._rows[slot] = self.alerts.rows_of.get(key, -1)
        self._orphans.discard(key)
        self._new.append(slot)
        self.mark(None)

    def removed(self, port: int, slot: int) -> None:
        key = self.keys.pop(slot)
        self._rows[slot] = -1
        rivals = self._rivals.get(key)
        if rivals is not None:
            rivals.discard(slot)
            self._slot_of[key] = min(rivals)
            if len(rivals) == 1:
                del self._rivals[key]
        else:
            del self._slot_of[key]
            self._orphans.add(key)
        self.mark(None)

    def tick(self, now: float) -> list[Transition]:
        """What is due by now, by time alone."""
        made = self.alerts.tick(now)
        if self.alerts.left:
            for key in self.alerts.left:
                slot = self._slot_of.get(key)
                if slot is not None:
                    self._rows[slot] = self.alerts.rows_of.get(key, -1)
            self.alerts.left.clear()
        return made

    def mark(self, slots: Ints | None) -> None:
        if not self.marked:
            self.marked = True
            self.queue.append(self)
        if slots is not None:
            self.touched.append(slots)

    # --- evaluation

    def slots(self) -> Ints:
        """Those to look at now."""
        if self._new:
            self.touched.append(np.array([slot for slot in self._new if slot in self.keys], np.int64))
            self._new.clear()
        if not self.touched:
            return np.empty(0, np.int64)
        found = self.touched[0] if len(self.touched) == 1 else np.unique(np.concatenate(self.touched))
        self.touched = []
        return found

    def look(self, now: float) -> list[Transition]:
        """What the slots that changed say, by the alert's rule."""
        assert self.root is not None
        slots = self.slots()
        made: list[Transition] = []
        if len(slots):
            made = self.see(slots, *self.root.at(slots), now)
        return made + self._end_orphans(now) if self._orphans else made

    def at(self, slots: Ints) -> tuple[Floats, Codes]:
        assert self.root is not None
        return self.root.at(slots)

    def see(
        self, slots: Ints, values: Floats, codes: Codes | None, now: float, *, repeated: bool = False
    ) -> list[Transition]:
        """What these cells say. Most say nothing: no breach, and no alert to end. `repeated`: some are there twice."""
        silence_fires = self.rule.no_data == "fire"
        if codes is None:
            codes = np.zeros(len(values), np.uint8)
        elif not self.alerts.rows_of and not silence_fires and codes.tobytes().find(PRESENT) < 0:
            return []
        rows = self._rows[slots]
        odd = (codes == PRESENT) | (rows >= 0)
        if silence_fires:
            odd |= codes == MISSING
        if not np.count_nonzero(odd):
            return []
        if repeated:
            places = np.flatnonzero(odd)
            odd = places[np.unique(slots[places], return_index=True)[1]]
        return self._observe(slots[odd], values[odd], codes[odd], rows[odd], now)

    def _observe(self, slots: Ints, values: Floats, codes: Codes, rows: Ints, now: float) -> list[Transition]:
        made: list[Transition] = []
        going_on = (rows >= 0) & (codes == PRESENT)
        if np.count_nonzero(going_on):
            rest = np.ones(len(slots), bool)
            rest[going_on] = self.alerts.refresh(rows[going_on], values[going_on], now)
            slots, values, codes = slots[rest], values[rest], codes[rest]
        for slot, value, code in zip(slots.tolist(), values.tolist(), codes.tolist(), strict=True):
            key = self.keys.get(slot)
            if key is None:
                continue
            transition = self.alerts.observe(key, code, value, sample_time=self.taken_s(slot, now), now=now)
            self._rows[slot] = self.alerts.rows_of.get(key, -1)
            if transition is not None:
                made.append(transition)
        return made

    def _end_orphans(self, now: float) -> list[Transition]:
        """Alerts of label sets that the expression can't give any more."""
        made = []
        for key in self.take_orphans():
            transition = self.alerts.observe(key, ENDED, 0.0, sample_time=now, now=now)
            if transition is not None:
                made.append(transition)
        return made

    def load(self, alerts: Iterable[dict[str, Any]]) -> None:
        """Take up alerts of a snapshot."""
        self.alerts.load(alerts)
        for slot, key in self.keys.items():
            self._rows[slot] = self.alerts.rows_of.get(key, -1)

    def take_orphans(self) -> set[Labels]:
        gone, self._orphans = self._orphans, set()
        return gone

    def leave(self) -> None:
        """The rule is gone."""
        if self.root is not None:
            self.root.outs = [(listener, port) for listener, port in self.root.outs if listener is not self.ear]
        for members in self.members:
            members.listeners = [each for each in members.listeners if getattr(each, "running", None) is not self]

    def taken_s(self, slot: int, now: float) -> float:
        found = self.root.taken_s(slot) if self.root is not None else -np.inf
        if np.isfinite(found):
            return float(found)
        return self.sample_time if self.sample_time is not None else now

    def elements(self, found: Iterable[tuple[Labels, float]]) -> dict[Labels, float]:
        """A result as a whole, by the keys of alerts or of recorded series. EvaluationError where two have the same."""
        made: dict[Labels, float] = {}
        for labels, value in found:
            key = self.series_key(labels) if self.rule.kind == "record" else unnamed(labels)
            if key in made:
                raise EvaluationError(f"more than one result has the labels {shown(key)}")
            made[key] = value
        return made

    def compare(self, found: dict[Labels, float], now: float) -> list[Transition]:
        """What a result as a whole says, by the alert's rule."""
        self.touched = []
        self._new.clear()
        self._orphans.clear()
        made: list[Transition] = []
        sample_time = self.sample_time if self.sample_time is not None else now
        for key, value in found.items():
            slot = self._slot_of.get(key)
            taken = sample_time if slot is None else self.taken_s(slot, now)
            transition = self.alerts.observe(key, PRESENT, value, sample_time=taken, now=now)
            made += [] if transition is None else [transition]
        for key in [key for key in self.alerts.rows_of if key not in found]:
            transition = self.alerts.observe(key, self._why_absent(key), 0.0, sample_time=sample_time, now=now)
            made += [] if transition is None else [transition]
        for slot, key in self.keys.items():
            self._rows[slot] = self.alerts.rows_of.get(key, -1)
        return made

    def _why_absent(self, key: Labels) -> int:
        """Silence, the end of the series, or a condition that doesn't hold."""
        if self.rule.no_data == "resolve":
            return FILTERED
        store, wanted_labels = self._store, dict(key)
        for members in self.members or [store.watch(each) for each in plain_selectors(self.rule)]:
            series = members.series()
            codes = store.code[series]
            if not (codes == MISSING).any():
                continue
            fitting = [
                int(code)
                for number, code in zip(series.tolist(), codes.tolist(), strict=True)
                if all(wanted_labels.get(name, value) == value for name, value in store.labels[number] or ())
            ]
            if fitting and PRESENT not in fitting and MISSING in fitting:
                return MISSING
        return FILTERED

    def series_key(self, labels: Labels) -> Labels:
        """The series that a recording rule makes of an element."""
        found = {name: value for name, value in labels if name not in METADATA and name not in self.rule.labels}
        added = {name: text for name, text in self.rule.labels.items() if text}
        return tuple(sorted({**found, **added, NAME: self.rule.name}.items()))


class Ear:
    """Listens to the root node for its rule."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.added = running.added
        self.removed = running.removed

    def touched(self, port: int, slots: Ints) -> None:
        self.running.mark(slots)

    def plan(self, port: int, slots: Ints, plan: Planned) -> None:
        plan.look(self.running, slots)


class _Mark:
    """Listens to a selector for a rule that is computed as a whole."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def added(self, slot: int) -> None:
        self.running.mark(None)

    def removed(self, slot: int) -> None:
        self.running.mark(None)

    def touched(self, slots: Ints) -> None:
        self.running.mark(None)

    def plan(self, slots: Ints, plan: Planned) -> None:
        plan.do(self, 0, lambda slots: self.running.mark(None), slots)


def unnamed(labels: Labels) -> Labels:
    return tuple(pair for pair in labels if pair[0] != NAME)


def plain_selectors(rule: Rule) -> list[Selector]:
    return [Selector(each.matchers, alternatives=each.alternatives) for each in selectors(rule.expression)]
