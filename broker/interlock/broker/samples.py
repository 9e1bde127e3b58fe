"""Telemetry on the wire: batches of samples, one publisher's measurements at one moment.

A series (a name and its labels) is announced once with a small number, its id, and then sent by id. Announcements are
repeated (see `SeriesTable`), since the telemetry plane may drop a batch and a consumer may join late.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

NAME = "__name__"  # the label that holds the metric's name, as in Prometheus

KEYFRAME_S = 1.0  # a batch with all announcements at least this often; what a late joiner waits at most
LATE_S = 2.0  # a sample that waited longer on its way is history: nobody may take it for how things stand now
ANNOUNCEMENTS = 3  # a new series is announced in so many batches in a row: one lost batch costs no second

# Who sends more is not understood: what a series is called is kept at every reader.
MAX_LABELS = 64  # of one series; Prometheus itself advises to have ten at most
MAX_LABEL_NAME = 128  # characters
MAX_LABEL_VALUE = 1024  # characters: a path, or the first line of an error

_Label = Annotated[str, msgspec.Meta(max_length=MAX_LABEL_NAME)]
_Value = Annotated[str, msgspec.Meta(max_length=MAX_LABEL_VALUE)]


class Announcement(msgspec.Struct, frozen=True, array_like=True):
    """`[id, labels]`; labels hold the metric's name under `__name__`."""

    id: int
    labels: Annotated[dict[_Label, _Value], msgspec.Meta(max_length=MAX_LABELS)]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Samples that one publisher took at one time. `ids[i]` has the value `values[i]`.

    epoch: the publisher's start, in nanoseconds since 1970; a larger one means it restarted: ids and counters begin
    anew. seq: 1, 2, 3, ... within the epoch; a hole is a lost batch. time: when the samples were taken, in seconds
    since 1970 by the publisher's clock. stale: ids of series that have ended. whole: `series` names all there are, any
    other has ended. delay: seconds for which the batch is known to have waited on its way, 0 where it did not.
    cached: no new batch, but the state after batch `seq`, as the broker or a reader remembers it.
    """

    v: int = 1
    source: str
    epoch: int
    seq: int
    time: float
    series: list[Announcement] = []
    ids: list[int] = []
    values: list[float] = []
    stale: list[int] = []
    whole: bool = False
    delay: float = 0.0
    cached: bool = False


Labels = tuple[tuple[str, str], ...]


def labels(name: str, /, **rest: str) -> Labels:
    """The canonical key of a series: sorted pairs, the name among them."""
    return tuple(sorted({NAME: name, **rest}.items()))


class SeriesTable:
    """A publisher's side of the announcements. Pure: the time is an argument."""

    def __init__(self, source: str, epoch: int) -> None:
        self.source = source
        self.epoch = epoch
        self._ids: dict[Labels, int] = {}
        self._announced: dict[int, int] = {}
        self._next_id = 1
        self._seq = 0
        self._last_keyframe = float("-inf")

    def batch(self, samples: dict[Labels, float], *, time: float, ended: list[Labels] | None = None) -> Batch:
        """The batch to send for these samples; `ended` names series that will report no more."""
        self._seq += 1
        for key in samples:
            if key not in self._ids:
                self._ids[key] = self._next_id
                self._next_id += 1
        stale = [self._ids.pop(key) for key in ended or () if key in self._ids]
        for gone in stale:
            self._announced.pop(gone, None)
        keyframe = time - self._last_keyframe >= KEYFRAME_S or time < self._last_keyframe
        if keyframe:
            self._last_keyframe = time
        series = []
        for key in self._ids if keyframe else samples:
            number = self._ids[key]
            sent = self._announced.get(number, 0)
            if keyframe or sent < ANNOUNCEMENTS:
                series.append(Announcement(number, dict(key)))
                self._announced[number] = sent + 1
        return Batch(
            source=self.source,
            epoch=self.epoch,
            seq=self._seq,
            time=time,
            series=series,
            ids=[self._ids[key] for key in samples],
            values=list(samples.values()),
            stale=stale,
            whole=keyframe,
        )


class SeriesReader:
    """A consumer's side: resolves ids to labels, publisher by publisher. Counts what it can't resolve."""

    def __init__(self) -> None:
        self._epochs: dict[str, int] = {}
        self._labels: dict[str, dict[int, Labels]] = {}
        self.unresolved = 0  # samples whose announcement has not arrived (yet)
        self.outdated = 0  # batches of an epoch that is over

    def read(self, batch: Batch) -> tuple[list[tuple[Labels, float]], list[Labels]]:
        """(samples, ended series) of a batch; samples of unknown series are left out and counted."""
        known_epoch = self._epochs.get(batch.source)
        ended: list[Labels] = []
        if known_epoch is not None and batch.epoch < known_epoch:
            self.outdated += 1
            return [], []
        if batch.epoch != known_epoch:
            ended = list(self._labels.get(batch.source, {}).values())
            self._epochs[batch.source] = batch.epoch
            self._labels[batch.source] = {}
        table = self._labels[batch.source]
        if batch.whole:  # a series that it does not name has ended, though the batch that said so was lost
            live = {announced.id for announced in batch.series}
            ended += [table.pop(number) for number in [number for number in table if number not in live]]
        for announced in batch.series:
            table[announced.id] = tuple(sorted(announced.labels.items()))
        samples = []
        for number, value in zip(batch.ids, batch.values, strict=False):
            key = table.get(number)
            if key is None:
                self.unresolved += 1
            else:
                samples.append((key, value))
        if ended:
            again = set(table.values())
            ended = [key for key in ended if key not in again]
        ended += [key for number in batch.stale if (key := table.pop(number, None)) is not None]
        return samples, ended
