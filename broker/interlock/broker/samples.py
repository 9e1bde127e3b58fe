"""Telemetry on the wire: batches of samples, one publisher's measurements at one moment.

A series (a name and its labels) is announced once with a small number, its id, and then sent by id. Announcements are
repeated (see `SeriesTable`), since the telemetry plane may drop a batch and a consumer may join late.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

import msgspec

from interlock.broker.fields import says
from interlock.broker.version import WIRE_VERSION, V

NAME = "__name__"  # the label that holds the metric's name, as in Prometheus

KEYFRAME_S = 1.0  # a batch with all announcements at least this often; what a late joiner waits at most
LATE_S = 2.0  # a sample that waited longer on its way is history: nobody may take it for how things stand now
MAX_LABELS = 64  # of a series; Prometheus' usual limit is 30
MAX_LABELS_TEXT = 4096  # characters of all names and values: they come back in alerts, which must fit into a frame
MAX_SERIES = 5_000  # of one source: 50 agents with 100 series each; what comes later is not resolved
MAX_IN_BATCH = 20_000  # announcements, samples: four sources that are full; decoding so many takes some 15 ms
MAX_SOURCES = 20_000  # two roles on each of 10,000 hosts; the one heard of longest ago goes first
ANNOUNCEMENTS = 3  # a new series is announced in so many batches in a row: one lost batch costs no second

_Many = msgspec.Meta(max_length=MAX_IN_BATCH)  # msgspec looks at it before it decodes the first


class Announcement(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`[id, labels]`; labels hold the metric's name under `__name__`."""

    id: Annotated[int, says("the series' number in its publisher's epoch")]
    labels: Annotated[dict[str, str], says("name and value, `__name__` among them")]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Samples that one publisher took at one time. `ids[i]` has the value `values[i]`."""

    v: V = WIRE_VERSION
    source: Annotated[str, says("`<host>/<publisher>`")]
    epoch: Annotated[
        int, says("the publisher's start, nanoseconds since 1970; a larger one: it restarted, ids and counters anew")
    ]
    seq: Annotated[int, says("1, 2, 3, ... in the epoch; a hole is a lost batch")]
    time: Annotated[float, says("when the samples were taken, seconds since 1970 by the publisher's clock")]
    series: Annotated[list[Announcement], _Many, says("announcements, `[id, labels]` each")] = []
    ids: Annotated[list[int], _Many, says("the series `ids[i]` has the value `values[i]`")] = []
    values: Annotated[list[float], _Many, says("as many as ids")] = []
    stale: Annotated[list[int], _Many, says("ids of series that have ended")] = []
    whole: Annotated[bool, says("`series` names all series there are, any other has ended")] = False
    delay: Annotated[float, says("seconds that the batch is known to have waited on its way")] = 0.0
    cached: Annotated[bool, says("no new batch, but the state after batch `seq`, as the broker remembers it")] = False


def fits(labels: dict[str, str]) -> bool:
    """Whether a series with these labels is one that anybody remembers: labels are kept at every reader."""
    return len(labels) <= MAX_LABELS and sum(map(len, labels)) + sum(map(len, labels.values())) <= MAX_LABELS_TEXT


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
        self._labels: OrderedDict[str, dict[int, Labels]] = OrderedDict()
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
            while len(self._labels) > MAX_SOURCES:
                gone, _ = self._labels.popitem(last=False)
                del self._epochs[gone]
        self._labels.move_to_end(batch.source)
        table = self._labels[batch.source]
        if batch.whole:  # a series that it does not name has ended, though the batch that said so was lost
            live = {announced.id for announced in batch.series}
            ended += [table.pop(number) for number in [number for number in table if number not in live]]
        for announced in batch.series:
            if (announced.id in table or len(table) < MAX_SERIES) and fits(announced.labels):
                found = tuple(sorted(announced.labels.items()))
                if table.get(announced.id) != found:  # new ones in place of all old ones each second scatter the memory
                    table[announced.id] = found
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
