"""Batches from the telemetry plane -> samples for the engine. Pure; counts what it can't use."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from interlock.broker.samples import LATE_S, MAX_SOURCES, Batch, Labels, SeriesReader, fits

REMEMBERED_S = 60.0  # a publisher's first batch older than this may be one that the broker remembered of a dead one


class Intake:
    """Resolves ids to labels, and lets each batch through once and in order."""

    def __init__(self) -> None:
        self._reader = SeriesReader()
        self._newest: OrderedDict[str, tuple[int, int]] = OrderedDict()  # source -> (epoch, seq)
        self.repeated = 0  # batches that came twice or late
        self.lost = 0  # batches that never came
        self.late = 0  # samples that tell of the past, since they waited on their way
        self.oversized = 0  # announcements of series with too many labels, or too long ones

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
        fit = [announced for announced in batch.series if fits(announced.labels)]
        if len(fit) < len(batch.series):
            self.oversized += len(batch.series) - len(fit)
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
