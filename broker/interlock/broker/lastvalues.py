"""What the telemetry plane remembers: of each source the newest announcement and the newest value of each live series.

Pure: the time is an argument, by any clock that never goes back. Of each set of series that a source sends together the
newest batch is kept as it came; so remembering costs no copy of samples, and each value keeps its own time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from interlock.broker.samples import MAX_SERIES, MAX_SOURCES, Announcement, Batch, fits

SILENT_S = 60.0  # a source that sent nothing for so long is forgotten: every role speaks twice a second
MAX_HOST_SOURCES = 64  # of one host: it has two, and no key may take all the room there is
MAX_HOST_SERIES = 20_000  # of one host: four sources that are full
MAX_ALL_SERIES = 500_000  # of all, at some 0.5 kB each; as many as the rule engine takes
SLACK = 10_000  # samples that the batches of one source may hold beyond what is newest
MAX_LOSING = 1_000  # sources whose losses are counted one by one


class _Source:
    def __init__(self, topic: str, batch: Batch) -> None:
        self.topic = topic
        self.epoch = batch.epoch
        self.seq = 0
        self.heard = 0.0
        self.series: dict[int, Announcement] = {}
        self.groups: dict[tuple[int, ...], tuple[Batch, float]] = {}  # ids -> their newest batch, and when it came
        self.partial = False  # it has series beyond the limits
        self.held = 0  # samples in these batches
        self.room = SLACK  # for them, until what is newest is copied out


class LastValues:
    """Batches in, and for who joins late the same state out, as few synthetic batches marked `cached`.

    lost: batches that never came, by source. repeated: came twice or late. refused: series and sources beyond limits.
    """

    def __init__(self) -> None:
        self.lost: Counter[str] = Counter()
        self.repeated = 0
        self.refused = 0
        self.series = 0
        self._sources: dict[str, _Source] = {}
        self._sources_of: Counter[str] = Counter()  # by host
        self._series_of: Counter[str] = Counter()

    @property
    def sources(self) -> int:
        return len(self._sources)

    def has_room(self, name: str) -> bool:
        """Whether this source is known, or its host may have one more."""
        return name in self._sources or self._sources_of[_host(name)] < MAX_HOST_SOURCES

    def take(self, topic: str, batch: Batch, now: float) -> None:
        """Remember what is new in a batch."""
        source = self._sources.get(batch.source)
        if source is not None and (batch.epoch, batch.seq) <= (source.epoch, source.seq):
            self.repeated += 1
            return
        if source is None or batch.epoch != source.epoch:
            source = self._begin(topic, batch)
            if source is None:
                return
        else:
            self._count_lost(batch.source, batch.seq - source.seq - 1)
        source.topic, source.seq, source.heard = topic, batch.seq, now
        before = len(source.series)
        if batch.series:
            self._announce(source, batch)
        for gone in batch.stale:
            source.series.pop(gone, None)
        self._count_series(batch.source, len(source.series) - before)
        if batch.series or batch.stale:  # a batch is held as long as its values are; what it announced is not
            batch = msgspec.structs.replace(batch, series=[], stale=[])
        ids = tuple(batch.ids)
        if ids not in source.groups:
            source.held += len(ids)
        source.groups[ids] = (batch, now)
        if source.held > source.room:
            _compact(source)

    def forget_silent(self, now: float) -> None:
        """Drop every source that sent nothing for `SILENT_S`."""
        for name in [name for name, source in self._sources.items() if now - source.heard > SILENT_S]:
            self._forget(name)
            self.lost.pop(name, None)

    def snapshot(self, prefixes: Sequence[str], now: float) -> Iterator[tuple[str, list[Batch]]]:
        """(topic, batches) of each source whose topic starts with one of the prefixes; for now, and for one consumer.

        The first batch of a source announces all its series (`whole`). `delay` is how long a value has been here. The
        sources are those of this moment; one that is forgotten or restarts while the caller iterates is skipped.
        """
        wanted = tuple(prefixes)
        for name, source in list(self._sources.items()):
            if source.topic.startswith(wanted) and self._sources.get(name) is source:
                yield source.topic, _cached(name, source, now)

    def _begin(self, topic: str, batch: Batch) -> _Source | None:
        if batch.source in self._sources:
            self._forget(batch.source)
        elif len(self._sources) >= MAX_SOURCES or not self.has_room(batch.source):
            self.refused += 1
            return None
        self._sources_of[_host(batch.source)] += 1
        source = self._sources[batch.source] = _Source(topic, batch)
        return source

    def _forget(self, name: str) -> None:
        self._count_series(name, -len(self._sources.pop(name).series))
        host = _host(name)
        self._sources_of[host] -= 1
        if not self._sources_of[host]:
            del self._sources_of[host], self._series_of[host]

    def _count_series(self, name: str, more: int) -> None:
        if more:
            self.series += more
            self._series_of[_host(name)] += more

    def _announce(self, source: _Source, batch: Batch) -> None:
        if batch.whole:  # what it does not name has ended, though the batch that said so was lost
            live = {announced.id for announced in batch.series}
            for gone in source.series.keys() - live:
                del source.series[gone]
        room = min(
            MAX_SERIES - len(source.series),
            MAX_ALL_SERIES - self.series,
            MAX_HOST_SERIES - self._series_of[_host(batch.source)],
        )
        for announced in batch.series:
            known = source.series.get(announced.id)
            if known != announced and not fits(announced.labels):
                self.refused += 1
                source.partial = True
                continue
            if known is None:
                if room <= 0:
                    self.refused += 1
                    source.partial = True
                    continue
                room -= 1
            source.series[announced.id] = announced

    def _count_lost(self, name: str, count: int) -> None:
        if count > 0 and (name in self.lost or len(self.lost) < MAX_LOSING):
            self.lost[name] += count


def _host(name: str) -> str:
    return name.partition("/")[0]


def _compact(source: _Source) -> None:
    newest = _newest(source)
    source.groups = {}
    source.held = 0
    for batch, came, pairs in newest:
        ids = [number for number, _ in pairs]
        small = msgspec.structs.replace(batch, ids=ids, values=[value for _, value in pairs], series=[], stale=[])
        source.groups[tuple(ids)] = (small, came)
        source.held += len(ids)
    source.room = 2 * source.held + SLACK


def _newest(source: _Source) -> list[tuple[Batch, float, list[tuple[int, float]]]]:
    """The batches that hold newest values, in order: each with when it came, and the ids and values that count."""
    found = []
    seen: set[int] = set()
    for batch, came in sorted(source.groups.values(), key=lambda held: held[0].seq, reverse=True):
        pairs = [
            (number, value)
            for number, value in zip(batch.ids, batch.values, strict=False)
            if number not in seen and number in source.series
        ]
        if pairs:
            found.append((batch, came, pairs))
            seen.update(batch.ids)
    return found[::-1]


def _cached(name: str, source: _Source, now: float) -> list[Batch]:
    series = list(source.series.values())
    made = []
    for batch, came, pairs in _newest(source):
        made.append(
            Batch(
                source=name,
                epoch=source.epoch,
                seq=source.seq,
                time=batch.time,
                series=series,
                ids=[number for number, _ in pairs],
                values=[value for _, value in pairs],
                cached=True,
                whole=bool(series) and not source.partial,
                delay=batch.delay + max(0.0, now - came),
            )
        )
        series = []
    return made
