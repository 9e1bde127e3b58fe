"""What the engine knows, as bytes: series, rings, alerts, recorded series; kept across a restart. Pure.

Alerts are found again by their rule's hash and their labels, samples by the series' labels. A snapshot that is damaged,
of another version or too old is worth nothing, and said to be so.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from interlock.broker.errors import InterlockError
from interlock.broker.samples import Labels
from interlock.coordinator.rules.engine import Engine
from interlock.coordinator.rules.series import ENDED, MISSING, PRESENT
from interlock.coordinator.rules.values import Floats, Ints

VERSION = 1
MAX_AGE_S = 300.0  # a sample counts for no longer (Prometheus' lookback): an older snapshot has nothing to say
PIECE = 500  # label sets that are encoded in one go: while that lasts, nothing else runs
MAX_BYTES = 2 << 30  # of a snapshot that is read


class BadSnapshot(InterlockError):
    """The snapshot can't be used. The engine starts without, as it would the first time."""


class _Wire(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    version: int
    now: float
    labels: list[msgspec.Raw]  # in pieces
    publishers: list[str]  # of each series
    hidden: bytes
    times: bytes
    values: bytes
    taken_s: bytes
    interval: bytes
    counts: bytes  # samples of each series' ring
    ring_times: bytes
    ring_values: bytes
    alerts: dict[str, list[dict[str, Any]]]  # by the hash of their rule
    recorded: dict[str, list[list[tuple[str, str]]]]


class Frozen:
    """The engine's state at one moment: copies of columns, made in milliseconds. `encode` may run in another thread."""

    def __init__(self, engine: Engine, now: float) -> None:
        store = engine.store
        count = len(store.labels)
        self._now = now
        self._labels = store.labels.copy()
        self._names = store.publisher_names()
        columns = (store.code, store.times, store.values, store.taken_s, store.interval, store.hidden)
        self._code, self._times, self._values, self._taken_s, self._interval, self._hidden = (
            column[:count].copy() for column in columns
        )
        self._publisher, self._ring = store.publisher[:count].copy(), store.ring[:count].copy()
        self._rings = store.rings.copied()
        self._alerts = {running.rule.hash: running.alerts.dump() for running in engine.running if running.alerts}
        self._recorded = {
            running.rule.hash: [list(labels) for labels in running.recorded]
            for running in engine.running
            if running.recorded
        }

    def encode(self) -> bytes:
        known = np.flatnonzero((self._code != ENDED) & (self._times > -np.inf))
        rings = self._ring[known]
        bounds, ring_times, ring_values = self._rings.window(rings[rings >= 0], -np.inf, np.inf)
        counts = np.zeros(len(known), np.int64)
        counts[rings >= 0] = np.diff(bounds)
        numbers = known.tolist()
        pieces = [numbers[at : at + PIECE] for at in range(0, len(numbers), PIECE)]
        wire = _Wire(
            version=VERSION,
            now=self._now,
            labels=[_raw([self._labels[number] or () for number in piece]) for piece in pieces],
            publishers=[self._names[number] for number in self._publisher[known].tolist()],
            hidden=self._hidden[known].tobytes(),
            times=self._times[known].tobytes(),
            values=self._values[known].tobytes(),
            taken_s=self._taken_s[known].tobytes(),
            interval=self._interval[known].tobytes(),
            counts=counts.tobytes(),
            ring_times=ring_times.tobytes(),
            ring_values=ring_values.tobytes(),
            alerts=self._alerts,
            recorded=self._recorded,
        )
        return msgspec.msgpack.encode(wire)


def _raw(labels: list[Labels]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(labels))


def restore(engine: Engine, content: bytes, now: float) -> int:
    """Take up a snapshot in an engine that has seen nothing yet; how many series it had. BadSnapshot."""
    wire, found, columns, counts, times, values = _decoded(content)
    if not -1.0 <= now - wire.now <= MAX_AGE_S:
        raise BadSnapshot(f"it was made {now - wire.now:.0f} s ago", hint=f"at most {MAX_AGE_S:g} s")
    hidden = columns[0].astype(bool)
    store = engine.store
    ids: Ints = np.array(
        [
            store.admit(tuple((name, value) for name, value in labels), publisher, hidden=bool(flag))
            for labels, publisher, flag in zip(found, wire.publishers, hidden, strict=True)
        ],
        np.int64,
    )
    good = ids >= 0
    for name, column in zip(("times", "values", "taken_s", "interval"), columns[1:], strict=True):
        getattr(store, name)[ids[good]] = column[good]
    store.looked[ids[good]] = columns[1][good]
    store.code[ids[good]] = PRESENT
    store.bind(len(store.unbound))
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    for place in np.flatnonzero(good & (counts > 0)).tolist():
        ring = int(store.ring[ids[place]])
        if ring >= 0:
            low, high = bounds[place : place + 2].tolist()
            store.rings.fill(ring, times[low:high], values[low:high])
    by_hash = {running.rule.hash: running for running in engine.running}
    for rule, alerts in wire.alerts.items():
        if rule in by_hash:
            by_hash[rule].load(alerts)
    for rule, recorded in wire.recorded.items():
        for pairs in recorded:
            labels = tuple((name, value) for name, value in pairs)
            number = store.numbers.get(labels)
            if number is not None and rule in by_hash:
                by_hash[rule].recorded[labels] = number
    store.code[ids[good & (now * 1000 - columns[1] > store.lookback) & ~hidden]] = MISSING
    engine.refresh(ids[good], now)
    return int(good.sum())


_Found = list[list[tuple[str, str]]]


def _decoded(content: bytes) -> tuple[_Wire, _Found, list[Floats], Ints, Floats, Floats]:
    if len(content) > MAX_BYTES:
        raise BadSnapshot(f"it has {len(content)} bytes", hint=f"at most {MAX_BYTES}")
    try:
        wire = msgspec.msgpack.decode(content, type=_Wire)
        labels = [each for raw in wire.labels for each in msgspec.msgpack.decode(raw, type=_Found)]
        columns: list[Any] = [np.frombuffer(wire.hidden, np.uint8)]
        for column in (wire.times, wire.values, wire.taken_s, wire.interval):
            columns.append(np.frombuffer(column, np.float64))
        counts = np.frombuffer(wire.counts, np.int64)
        times, values = np.frombuffer(wire.ring_times, np.float64), np.frombuffer(wire.ring_values, np.float64)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadSnapshot(f"it can't be read: {error}") from None
    if wire.version != VERSION:
        raise BadSnapshot(f"it is of version {wire.version}, not {VERSION}")
    many = len(labels)
    sizes = {len(wire.publishers), len(counts), *map(len, columns)}
    if sizes != {many} or len(times) != len(values) or (counts < 0).any() or int(counts.sum()) != len(times):
        raise BadSnapshot("its columns don't fit together")
    return wire, labels, columns, counts, times, values
