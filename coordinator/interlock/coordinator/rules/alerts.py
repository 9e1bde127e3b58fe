"""The alerts of one rule: pending, firing, resolved, per label set. Pure; the time is an argument.

An alert is pending while its breach has lasted less than `for`, and goes back to nothing without a word if it ends
before. `keep_firing_for` bridges gaps of the condition, `no_data` says what silence means, and where there is an
`x_resolve_expr`, an alert that fires ends only when that holds. What changes with each sample is in columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.columns import Columns
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.series import MISSING, PRESENT
from interlock.coordinator.rules.template import expand, number
from interlock.coordinator.rules.values import Flags, Floats, Ints

AlertState = Literal["pending", "firing", "resolved"]

RESTORE_GRACE_S = 10.0  # an alert that fired before a restart has this long to show itself again: some keyframes
MAX_SUMMARY = 1000  # characters: one line for people
_NONE, _PENDING, _FIRING = 0, 1, 2


@dataclass(frozen=True)
class Transition:
    """An alert entered a state. `sample_time`: of the first sample of the continuous breach, by its publisher's clock.

    `since`: when that sample came here, by the engine's clock.
    """

    rule: Rule
    labels: dict[str, str]
    value: float
    state: AlertState
    sample_time: float
    since: float
    summary: str

    @property
    def action(self) -> str:
        return self.rule.action


class _Rows(Columns):
    FIELDS = {
        "state": (np.uint8, _NONE),
        "value": (np.float64, 0.0),
        "sample_time": (np.float64, 0.0),
        "since": (np.float64, 0.0),
        "keep_until": (np.float64, np.inf),
        "silent": (np.bool_, False),  # no data, and kept: neither a breach nor its end
        "held": (np.bool_, False),  # the condition ended, and x_resolve_expr does not hold yet
    }
    state: NDArray[np.uint8]
    value: Floats
    sample_time: Floats
    since: Floats
    keep_until: Floats
    silent: Flags
    held: Flags


Resolved = Callable[[Labels], bool]


def always(key: Labels) -> bool:
    return True


class Alerts(_Rows):
    """What one rule has pending and firing, in rows by number."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(16)
        self.rule = rule
        self.rows_of: dict[Labels, int] = {}
        self.left: list[Labels] = []  # keys of rows that were given up since somebody looked
        self.resolved: Resolved = always  # what x_resolve_expr says of a label set
        self._labels: list[dict[str, str]] = []
        self._keys: list[Labels] = []
        self._free: list[int] = []
        self._restored: dict[Labels, dict[str, Any]] = {}
        self._restored_until = 0.0

    def __bool__(self) -> bool:
        return bool(self.rows_of)

    # --- in

    def refresh(self, rows: Ints, values: Floats, now: float) -> Flags:
        """Note the values of alerts that go on as they are; the flags of the others, for `observe`."""
        state = self.state[rows]
        due = (state == _PENDING) & (self.since[rows] + self.rule.for_s <= now)
        odd = due | self.silent[rows] | self.held[rows] | np.isfinite(self.keep_until[rows])
        plain = rows[~odd]
        self.value[plain] = values[~odd]
        changed: Flags = odd
        return changed

    def observe(self, key: Labels, code: int, value: float, *, sample_time: float, now: float) -> Transition | None:
        """The rule's result for one label set (its name dropped) is now this."""
        row = self.rows_of.get(key, -1)
        if code == PRESENT:
            return self._breach(key, row, value, sample_time=sample_time, now=now)
        if code == MISSING and self.rule.no_data != "resolve":
            return self._silence(key, row, sample_time=sample_time, now=now)
        return None if row < 0 else self._end(key, row, now)

    def retain(self, keys: Iterable[Labels], now: float) -> list[Transition]:
        """Alerts whose series ended (their label set is none of these) end with them."""
        kept = set(keys)
        gone = [(key, row) for key, row in self.rows_of.items() if key not in kept]
        return [made for key, row in gone if (made := self._end(key, row, now)) is not None]

    def clear(self) -> list[Transition]:
        """The rule is gone: all that fired resolves."""
        made = [self._remove(row, "resolved") for row in list(self.rows_of.values()) if self.state[row] == _FIRING]
        return made + [self._resolve_restored(key) for key in list(self._restored)]

    def tick(self, now: float) -> list[Transition]:
        """What is due by now. A rule with an interval changes its mind only where it is evaluated."""
        made: list[Transition] = []
        if self.rows_of and not self.rule.interval_s:
            firing = self.state == _FIRING
            kept = firing & (self.keep_until <= now)
            due = (self.state == _PENDING) & ~self.silent & (self.since + self.rule.for_s <= now)
            for row in np.flatnonzero(due).tolist():
                self.state[row] = _FIRING
                made.append(self._transition(row, "firing"))
            for row in np.flatnonzero(kept | (firing & self.held)).tolist():
                if self.keep_until[row] <= now or self.resolved(self._keys[row]):
                    made.append(self._remove(row, "resolved"))
        if self._restored and now >= self._restored_until:
            made += [self._resolve_restored(key) for key in list(self._restored)]
        return made

    def next_deadline(self) -> float:
        """When `tick` has something to do; infinity if never."""
        deadline = self._restored_until if self._restored else math.inf
        if self.rows_of and not self.rule.interval_s:
            deadline = min(deadline, float(self.keep_until.min()))
            pending = (self.state == _PENDING) & ~self.silent
            if pending.any():
                deadline = min(deadline, float(self.since[pending].min()) + self.rule.for_s)
            if self.held.any():
                deadline = -math.inf
        return deadline

    # --- across restarts

    def restore(self, labels: dict[str, str], value: float, *, sample_time: float, since: float, now: float) -> None:
        """It fired before a restart: it goes on without a new transition, or resolves after `RESTORE_GRACE_S`."""
        key = tuple(sorted(labels.items()))
        for row in self.rows_of.values():
            if self._labels[row] == labels:  # a snapshot brought it already
                self.state[row] = _FIRING
                return
        self._restored[key] = {
            "labels": dict(labels),
            "value": value,
            "sample_time": sample_time,
            "since": min(since, now),
        }
        self._restored_until = now + RESTORE_GRACE_S

    def dump(self) -> list[dict[str, Any]]:
        """All that is pending or firing, for a snapshot."""
        return [
            {
                "key": list(key),
                "labels": self._labels[row],
                "firing": bool(self.state[row] == _FIRING),
                "value": float(self.value[row]),
                "sample_time": float(self.sample_time[row]),
                "since": float(self.since[row]),
                "keep_until": float(self.keep_until[row]),
                "silent": bool(self.silent[row]),
                "held": bool(self.held[row]),
            }
            for key, row in self.rows_of.items()
        ]

    def load(self, dumped: Iterable[dict[str, Any]]) -> None:
        """Take up what a snapshot has."""
        for each in dumped:
            key = tuple((name, value) for name, value in each["key"])
            row = self._add(key, dict(each["labels"]))
            self.state[row] = _FIRING if each["firing"] else _PENDING
            for name in ("value", "sample_time", "since", "keep_until", "silent", "held"):
                getattr(self, name)[row] = each[name]

    def keep_firing(self, known: Container[Labels]) -> None:
        """Forget the firing alerts with other labels than these: they fire anew if their breach is still there."""
        for row in list(self.rows_of.values()):
            if self.state[row] == _FIRING and tuple(sorted(self._labels[row].items())) not in known:
                self._remove(row, "resolved")

    # --- out

    def current(self, state: Literal["pending", "firing"]) -> list[Transition]:
        wanted = _FIRING if state == "firing" else _PENDING
        made = [self._transition(row, state) for row in self.rows_of.values() if self.state[row] == wanted]
        if state == "firing":
            made += [self._as_transition(restored, "firing") for restored in self._restored.values()]
        return made

    def breaches(self) -> list[Transition]:
        """What breaches by a sample that is there: not what is silent, kept on, or of before a restart."""
        return [
            self._transition(row, "firing" if self.state[row] == _FIRING else "pending")
            for row in self.rows_of.values()
            if not self.silent[row] and not self.held[row] and math.isinf(self.keep_until[row])
        ]

    # --- inside

    def _breach(self, key: Labels, row: int, value: float, *, sample_time: float, now: float) -> Transition | None:
        if row < 0:
            return self._begin(key, value, sample_time=sample_time, now=now)
        self.value[row] = value
        self.keep_until[row] = math.inf
        self.held[row] = False
        if self.silent[row] and self.state[row] == _PENDING:  # the silence broke the breach: `for` counts anew
            self.sample_time[row], self.since[row] = sample_time, now
        self.silent[row] = False
        if self.state[row] == _PENDING and now >= self.since[row] + self.rule.for_s:
            self.state[row] = _FIRING
            return self._transition(row, "firing")
        return None

    def _begin(self, key: Labels, value: float, *, sample_time: float, now: float) -> Transition | None:
        found = {name: text for name, text in key if name != NAME}
        labels = {**found, **{name: expand(text, found, value) for name, text in self.rule.labels.items()}}
        labels = {name: text for name, text in labels.items() if text}
        restored = self._restored.pop(tuple(sorted(labels.items())), None)
        row = self._add(key, labels)
        self.value[row] = value
        if restored is not None:
            self.state[row] = _FIRING
            self.sample_time[row], self.since[row] = restored["sample_time"], restored["since"]
            return None
        self.sample_time[row], self.since[row] = sample_time, now
        fires = self.rule.for_s <= 0
        self.state[row] = _FIRING if fires else _PENDING
        return self._transition(row, "firing" if fires else "pending")

    def _silence(self, key: Labels, row: int, *, sample_time: float, now: float) -> Transition | None:
        if self.rule.no_data == "fire":
            return self._breach(key, row, math.nan, sample_time=sample_time, now=now)
        if row >= 0:
            self.silent[row] = True
        return None

    def _end(self, key: Labels, row: int, now: float) -> Transition | None:
        if self.state[row] == _FIRING:
            if self.rule.keep_firing_for_s > 0:
                if math.isinf(self.keep_until[row]):
                    self.keep_until[row] = now + self.rule.keep_firing_for_s
                if now < self.keep_until[row]:
                    return None
            if not self.resolved(key):
                self.held[row] = True
                return None
            return self._remove(row, "resolved")
        self._remove(row, "pending")
        return None

    def _add(self, key: Labels, labels: dict[str, str]) -> int:
        if self._free:
            row = self._free.pop()
            self._labels[row], self._keys[row] = labels, key
        else:
            row = len(self._keys)
            self._labels.append(labels)
            self._keys.append(key)
            self.fit(row + 1)
        self.rows_of[key] = row
        return row

    def _remove(self, row: int, state: AlertState) -> Transition:
        made = self._transition(row, state)
        del self.rows_of[self._keys[row]]
        self.left.append(self._keys[row])
        for name, (_, default) in self.FIELDS.items():
            getattr(self, name)[row] = default
        self._free.append(row)
        return made

    def _resolve_restored(self, key: Labels) -> Transition:
        return self._as_transition(self._restored.pop(key), "resolved")

    def _as_transition(self, restored: dict[str, Any], state: AlertState) -> Transition:
        summary = self._summary(restored["labels"], restored["value"])
        return Transition(rule=self.rule, state=state, summary=summary, **restored)

    def _transition(self, row: int, state: AlertState) -> Transition:
        labels, value = dict(self._labels[row]), float(self.value[row])
        return Transition(
            rule=self.rule,
            labels=labels,
            value=value,
            state=state,
            sample_time=float(self.sample_time[row]),
            since=float(self.since[row]),
            summary=self._summary(labels, value),
        )

    def _summary(self, labels: dict[str, str], value: float) -> str:
        texts = self.rule.annotations
        text = texts.get("summary") or texts.get("description") or texts.get("message")
        if text is None:
            return f"{self.rule.name}: {self.rule.text.strip()} (value {number(value)})"[:MAX_SUMMARY]
        return " ".join(expand(text, labels, value).split())[:MAX_SUMMARY]
