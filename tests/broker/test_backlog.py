"""The ring of a publisher: the newest is kept, the order too, and every drop is counted once."""

from __future__ import annotations

import pytest

from interlock.broker import backlog
from interlock.broker.backlog import BACKLOG_S, RESEND_S, Backlog, Counts, Entry
from interlock.broker.samples import Batch


def batch(seq: int, samples: int = 1) -> Batch:
    return Batch(source="a/b", epoch=1, seq=seq, time=0.0, ids=[1] * samples, values=[0.0] * samples)


def drained(ring: Backlog, now: float) -> list[int]:
    found = []
    while (entry := ring.next(now)) is not None:
        found.append(entry.batch.seq)
        ring.sent(now)
    return found


def test_what_is_too_old_or_too_much_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "BACKLOG_SAMPLES", 50)
    ring, counts = Backlog(), Counts()
    for n in range(1, 21):
        ring.add(Entry(b"t/", batch(n, 10), counts, float(n)))
    assert (len(ring), counts.dropped) == (5, 15)
    assert drained(ring, 17.0 + BACKLOG_S) == [17, 18, 19, 20]
    assert (counts.sent, counts.dropped) == (4, 16)


def test_no_more_than_so_many_batches_wait_though_they_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "BACKLOG_BATCHES", 3)
    ring, counts = Backlog(), Counts()
    for n in range(1, 6):
        ring.add(Entry(b"t/", batch(n, 0), counts, 0.0))
    assert drained(ring, 0.0) == [3, 4, 5]
    assert counts.dropped == 2


def test_what_a_broken_connection_took_lately_is_sent_again_before_the_rest_and_counted_once() -> None:
    ring, counts = Backlog(), Counts()
    for n in range(1, 4):
        ring.add(Entry(b"t/", batch(n), counts, float(n)))
        assert drained(ring, float(n)) == [n]
    ring.add(Entry(b"t/", batch(4), counts, 4.0))
    ring.broken(2.0 + RESEND_S)
    assert drained(ring, 2.0 + RESEND_S) == [2, 3, 4]
    assert (counts.sent, counts.dropped) == (4, 0)
    ring.broken(100.0)
    assert drained(ring, 100.0) == []
    assert (counts.sent, counts.dropped) == (4, 0)
