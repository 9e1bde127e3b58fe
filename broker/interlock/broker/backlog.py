"""What a publisher of telemetry holds while it can't be sent: a ring that drops the oldest, and counts it. Pure.

What was handed to the connection within the last `RESEND_S` is held as well: when the connection turns out to be
broken, it may have died with it, and is sent again. Readers tell repeats by their numbers.
"""

from __future__ import annotations

from collections import deque

from interlock.broker.samples import Batch

BACKLOG_S = 15.0  # a broker restarts in 1 to 5 s; what is older tells nobody how things stand
BACKLOG_SAMPLES = 50_000  # some 5 MB: 50 s of a host with 100 series at 10 Hz
BACKLOG_BATCHES = 2_000  # also empty ones are messages
RESEND_S = 4.0  # a dead connection is noticed within 2 s, on a busy machine somewhat later
MARK_LATE_S = 1.0  # a batch that leaves later than this says so


class Counts:
    """Of one publisher, in batches. sent: handed to the connection. dropped: never, for too many or too old."""

    def __init__(self) -> None:
        self.sent = 0
        self.dropped = 0


class Entry:
    def __init__(self, topic: bytes, batch: Batch, counts: Counts, now: float) -> None:
        self.topic = topic
        self.batch = batch
        self.counts = counts
        self.taken = now
        self.left = 0.0  # when it was handed over; 0: not yet


class Backlog:
    """Batches of all publishers of one connection, in the order in which they were made."""

    def __init__(self) -> None:
        self._waiting: deque[Entry] = deque()
        self._sent: deque[Entry] = deque()
        self._samples = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, entry: Entry) -> None:
        self._waiting.append(entry)
        self._samples += len(entry.batch.ids)
        self._trim(entry.taken)

    def next(self, now: float) -> Entry | None:
        """The oldest that is to be sent; it stays until `sent` is called."""
        self._trim(now)
        return self._waiting[0] if self._waiting else None

    def sent(self, now: float) -> None:
        """The connection took the oldest one."""
        entry = self._take()
        if not entry.left:
            entry.counts.sent += 1
        entry.left = now
        self._sent.append(entry)
        while self._sent[0].left < now - RESEND_S:
            self._sent.popleft()

    def broken(self, now: float) -> None:
        """The connection is gone: what it took lately goes first when there is another."""
        again = [entry for entry in self._sent if entry.left >= now - RESEND_S]
        self._sent.clear()
        self._waiting.extendleft(reversed(again))
        self._samples += sum(len(entry.batch.ids) for entry in again)

    def _trim(self, now: float) -> None:
        while self._waiting and (
            self._samples > BACKLOG_SAMPLES
            or len(self._waiting) > BACKLOG_BATCHES
            or self._waiting[0].taken < now - BACKLOG_S
        ):
            entry = self._take()
            if not entry.left:  # one that left before has most likely arrived
                entry.counts.dropped += 1

    def _take(self) -> Entry:
        entry = self._waiting.popleft()
        self._samples -= len(entry.batch.ids)
        return entry
