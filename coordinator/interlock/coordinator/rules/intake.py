"""Batches from the telemetry plane -> samples for the engine. Pure; counts what it can't use.

The broker lets a host and its monitor measure under their own topic only. A series that they give another host's name,
or that of an agent that the fleet file has elsewhere, is nobody's measurement: it could roll back a migration there, or
excuse a bad candidate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec
import numpy as np

from interlock.broker.samples import LATE_S, MAX_SOURCES, Announcement, Batch, Labels, SeriesReader, fits
from interlock.coordinator.ownership import Places, owner
from interlock.coordinator.rules.values import Floats, Ints

REMEMBERED_S = 60.0  # a publisher's first batch older than this may be one that the broker remembered of a dead one

Admit = Callable[[Labels, str], int]


class _Source(msgspec.Struct):
    """What a source brought last: the numbers it gave its series, and the engine's ids of them."""

    series: list[Announcement]  # as it announced them last
    numbers: list[int]
    version: int
    ids: Ints


class Intake:
    """Resolves ids to labels, and lets each batch through once and in order. `placed`: see ownership.owner."""

    def __init__(self, placed: Places | None = None) -> None:
        self._placed = placed
        self._reader = SeriesReader()
        self._newest: OrderedDict[str, tuple[int, int]] = OrderedDict()  # source -> (epoch, seq)
        self._sources: dict[str, _Source] = {}
        self.repeated = 0  # batches that came twice or late
        self.lost = 0  # batches that never came
        self.late = 0  # samples that tell of the past, since they waited on their way
        self.oversized = 0  # announcements of series with too many labels, or too long ones
        self.strange = 0  # announcements of series that are not their publisher's to measure
        self.malformed = 0  # batches that bring a series twice, or not as many values as ids

    @property
    def unresolved(self) -> int:
        """Samples of series that were not announced (yet)."""
        return self._reader.unresolved

    def columns(
        self, batch: Batch, now: float, *, admit: Admit, version: int, end: Callable[[Labels], None]
    ) -> tuple[Ints, Floats] | None:
        """(the engine's ids, values) of a batch; None if it brings nothing. Series that ended are told to `end`.

        `version`: what ids mean is as it was while this is the same.
        """
        source = self._sources.get(batch.source)
        plain = not (batch.stale or batch.cached) and batch.delay <= LATE_S
        place = (batch.epoch, batch.seq)
        newest = self._newest.get(batch.source)
        if (
            plain
            and source is not None
            and newest is not None
            and newest[0] == batch.epoch
            and batch.seq > newest[1]
            and source.version == version
            and (not batch.series or batch.series == source.series)  # a keyframe says again what is known
            and (not batch.whole or batch.series)
            and source.numbers == batch.ids
            and len(batch.values) == len(batch.ids)
        ):
            self.lost += batch.seq - newest[1] - 1
            self._newest[batch.source] = place
            return source.ids, np.array(batch.values)
        samples, ended = self.read(batch, now)
        for labels in ended:
            end(labels)
        found = dict(samples)
        if len(found) < len(samples) or len(batch.values) != len(batch.ids):
            self.malformed += 1
        if not samples:
            return None
        ids = np.fromiter((admit(labels, batch.source) for labels in found), np.int64, len(found))
        if len(found) == len(batch.ids) == len(batch.values):
            if source is not None and np.array_equal(source.ids, ids):
                ids = source.ids  # the same array: whoever remembers it need not compare
            announced = batch.series if batch.whole or source is None else source.series
            self._sources[batch.source] = _Source(announced, batch.ids, version, ids)
        return ids, np.fromiter(found.values(), np.float64, len(found))

    def read(self, batch: Batch, now: float) -> tuple[list[tuple[Labels, float]], list[Labels]]:
        """(samples, ended series) of a batch; both empty for one that was seen, or is of an epoch that is over."""
        newest = self._newest.get(batch.source)
        place = (batch.epoch, batch.seq)
        if newest is not None and (place < newest or (place == newest and not batch.cached)):
            self.repeated += 1
            return [], []
        own = [announced for announced in batch.series if self._is_own(announced, batch.source)]
        fit = [announced for announced in own if fits(announced.labels)]
        if len(fit) < len(batch.series):
            self.strange += len(batch.series) - len(own)
            self.oversized += len(own) - len(fit)
            batch = msgspec.structs.replace(batch, series=fit)
        samples, ended = self._reader.read(batch)
        self._newest[batch.source] = place
        self._newest.move_to_end(batch.source)
        while len(self._newest) > MAX_SOURCES:
            gone, _ = self._newest.popitem(last=False)
            self._sources.pop(gone, None)
        if batch.delay > LATE_S:
            self.late += len(samples)
            samples = []
        if newest is None or newest[0] != batch.epoch:
            return ([] if newest is None and now - batch.time > REMEMBERED_S else samples), ended
        self.lost += max(0, batch.seq - newest[1] - 1)
        return samples, ended

    def _is_own(self, announced: Announcement, source: str) -> bool:
        if source.startswith("fleet/partial-"):  # the rule engines' own: of all hosts, and none is called so
            return True
        host, labels = source.partition("/")[0], announced.labels
        if labels.get("host", host) != host:
            return False
        agent = labels.get("agent", "")
        return not agent or owner(agent, self._placed, host) in (host, None)
