"""Batches from the telemetry plane -> samples for the engine. Pure; counts what it can't use.

The broker lets a host and its monitor measure under their own topic only. A series that they give another host's name,
or that of an agent that the fleet file has elsewhere, is nobody's measurement: it could roll back a migration there, or
excuse a bad candidate.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from interlock.broker.samples import LATE_S, MAX_SOURCES, Announcement, Batch, Labels, SeriesReader, fits
from interlock.coordinator.ownership import Places, owner

REMEMBERED_S = 60.0  # a publisher's first batch older than this may be one that the broker remembered of a dead one


class Intake:
    """Resolves ids to labels, and lets each batch through once and in order. `placed`: see ownership.owner."""

    def __init__(self, placed: Places | None = None) -> None:
        self._placed = placed
        self._reader = SeriesReader()
        self._newest: OrderedDict[str, tuple[int, int]] = OrderedDict()  # source -> (epoch, seq)
        self.repeated = 0  # batches that came twice or late
        self.lost = 0  # batches that never came
        self.late = 0  # samples that tell of the past, since they waited on their way
        self.oversized = 0  # announcements of series with too many labels, or too long ones
        self.strange = 0  # announcements of series that are not their publisher's to measure

    @property
    def unresolved(self) -> int:
        """Samples of series that were not announced (yet)."""
        return self._reader.unresolved

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
            self._newest.popitem(last=False)
        if batch.delay > LATE_S:
            self.late += len(samples)
            samples = []
        if newest is None or newest[0] != batch.epoch:
            return ([] if newest is None and now - batch.time > REMEMBERED_S else samples), ended
        self.lost += max(0, batch.seq - newest[1] - 1)
        return samples, ended

    def _is_own(self, announced: Announcement, source: str) -> bool:
        host, labels = source.partition("/")[0], announced.labels
        if labels.get("host", host) != host:
            return False
        agent = labels.get("agent", "")
        return not agent or owner(agent, self._placed, host) in (host, None)
