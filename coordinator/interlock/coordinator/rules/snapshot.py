"""What the engine knows, as bytes: series, rings, alerts, recorded series; kept across a restart. Pure.

Alerts are found again by their rule's hash and their labels, samples by the series' labels. A snapshot that is damaged,
of another version or too old is worth nothing, and said to be so.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from interlock.broker.errors import InterlockError
from interlock.coordinator.rules.engine import Engine
from interlock.coordinator.rules.series import ENDED, MISSING, PRESENT
from interlock.coordinator.rules.values import Floats, Ints

VERSION = 1
MAX_AGE_S = 300.0  # a sample counts for no longer (Prometheus' lookback): an older snapshot has nothing to say
MAX_BYTES = 2 << 30  # of a snapshot that is read


class BadSnapshot(InterlockError):
    """The snapshot can't be used. The engine starts without, as it would the first time."""


class _Wire(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    version: int
    now: float
    labels: list[list[tuple[str, str]]]
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
    """The engine's state at one moment: copies of columns, quick to make. `encode` may run in another thread."""

    def __init__(self, engine: Engine, now: float) -> None:
        store = engine.store
        known = np.flatnonzero(
            (store.code[: len(store.labels)] != ENDED) & (store.times[: len(store.labels)] > -np.inf)
        )
        rings = store.ring[known]
        windowed = rings >= 0
        bounds, times, values = store.rings.window(rings[windowed], -np.inf, np.inf)
        counts = np.zeros(len(known), np.int64)
        counts[windowed] = np.diff(bounds)
        names = store.publisher_names()
        self._labels = [store.labels[number] or () for number in known.tolist()]
        self._publishers = [names[number] for number in store.publisher[known].tolist()]
        self._columns = [
            column[known].copy() for column in (store.hidden, store.times, store.values, store.taken_s, store.interval)
        ]
        self._rings = counts, times, values
        self._alerts = {running.rule.hash: running.alerts.dump() for running in engine.running if running.alerts}
        self._recorded = {
            running.rule.hash: [list(labels) for labels in running.recorded]
            for running in engine.running
            if running.recorded
        }
        self._now = now

    def encode(self) -> bytes:
        hidden, times, values, taken_s, interval, counts, ring_times, ring_values = (
            column.tobytes() for column in (*self._columns, *self._rings)
        )
        wire = _Wire(
            version=VERSION, now=self._now, labels=[list(each) for each in self._labels], publishers=self._publishers,
            hidden=hidden, times=times, values=values, taken_s=taken_s, interval=interval, counts=counts,
            ring_times=ring_times, ring_values=ring_values, alerts=self._alerts, recorded=self._recorded,
        )  # fmt: skip
        return msgspec.msgpack.encode(wire)


def restore(engine: Engine, content: bytes, now: float) -> int:
    """Take up a snapshot in an engine that has seen nothing yet; how many series it had. BadSnapshot."""
    wire, columns, counts, times, values = _decoded(content)
    if not -1.0 <= now - wire.now <= MAX_AGE_S:
        raise BadSnapshot(f"it was made {now - wire.now:.0f} s ago", hint=f"at most {MAX_AGE_S:g} s")
    hidden = columns[0].astype(bool)
    store = engine.store
    ids: Ints = np.array(
        [
            store.admit(tuple((name, value) for name, value in labels), publisher, hidden=bool(flag))
            for labels, publisher, flag in zip(wire.labels, wire.publishers, hidden, strict=True)
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


def _decoded(content: bytes) -> tuple[_Wire, list[Floats], Ints, Floats, Floats]:
    if len(content) > MAX_BYTES:
        raise BadSnapshot(f"it has {len(content)} bytes", hint=f"at most {MAX_BYTES}")
    try:
        wire = msgspec.msgpack.decode(content, type=_Wire)
        columns: list[Any] = [np.frombuffer(wire.hidden, np.uint8)]
        for column in (wire.times, wire.values, wire.taken_s, wire.interval):
            columns.append(np.frombuffer(column, np.float64))
        counts = np.frombuffer(wire.counts, np.int64)
        times, values = np.frombuffer(wire.ring_times, np.float64), np.frombuffer(wire.ring_values, np.float64)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadSnapshot(f"it can't be read: {error}") from None
    if wire.version != VERSION:
        raise BadSnapshot(f"it is of version {wire.version}, not {VERSION}")
    many = len(wire.labels)
    sizes = {len(wire.publishers), len(counts), *map(len, columns)}
    if sizes != {many} or len(times) != len(values) or (counts < 0).any() or int(counts.sum()) != len(times):
        raise BadSnapshot("its columns don't fit together")
    return wire, columns, counts, times, values
