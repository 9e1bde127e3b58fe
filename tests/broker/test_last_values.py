"""What the telemetry plane remembers: a late joiner knows what one knows who was there all the time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.broker import lastvalues
from interlock.broker.lastvalues import SILENT_S, LastValues
from interlock.broker.samples import Announcement, Batch, Labels, SeriesReader, SeriesTable, labels

TOPIC = "telemetry/a/host/"
UP = labels("up", host="a")
LOAD = labels("load", host="a")


def table(source: str = "a/host", epoch: int = 1) -> SeriesTable:
    return SeriesTable(source, epoch)


def remembered(last: LastValues, now: float, prefix: str = "") -> list[Batch]:
    return [batch for _, batches in last.snapshot([prefix], now) for batch in batches]


def known(batches: list[Batch]) -> dict[Labels, float]:
    reader = SeriesReader()
    values: dict[Labels, float] = {}
    for batch in batches:
        samples, ended = reader.read(batch)
        values |= samples
        for gone in ended:
            values.pop(gone, None)
    assert reader.unresolved == 0
    return values


def test_each_value_keeps_its_own_time_and_says_how_long_it_has_been_here() -> None:
    last, sender = LastValues(), table()
    last.take(TOPIC, sender.batch({UP: 1.0, LOAD: 0.5}, time=100.0), 10.0)
    last.take(TOPIC, sender.batch({UP: 2.0}, time=101.0), 11.0)
    first, second = remembered(last, 12.5)
    assert (first.time, first.values, first.delay) == (100.0, [0.5], 2.5)
    assert (second.time, second.values, second.delay) == (101.0, [2.0], 1.5)
    assert first.whole
    assert {first.seq, second.seq} == {2}
    assert known([first, second]) == {LOAD: 0.5, UP: 2.0}


def test_only_topics_that_were_asked_for_are_told() -> None:
    last = LastValues()
    last.take(TOPIC, table().batch({UP: 1.0}, time=0.0), 0.0)
    last.take("telemetry/b/host/", table("b/host").batch({UP: 1.0}, time=0.0), 0.0)
    assert [batch.source for batch in remembered(last, 0.0, "telemetry/b/")] == ["b/host"]
    assert remembered(last, 0.0, "telemetry/c/") == []


def test_what_has_ended_or_fell_silent_is_forgotten() -> None:
    last, sender = LastValues(), table()
    last.take(TOPIC, sender.batch({UP: 1.0, LOAD: 0.5}, time=0.0), 0.0)
    last.take(TOPIC, sender.batch({}, time=0.1, ended=[UP]), 0.1)
    assert known(remembered(last, 0.1)) == {LOAD: 0.5}
    last.forget_silent(SILENT_S)
    assert last.sources == 1
    last.forget_silent(SILENT_S + 0.2)
    assert (last.sources, last.series) == (0, 0)


def test_what_ended_unseen_is_forgotten_with_the_next_announcement_of_all() -> None:
    last, reader, sender = LastValues(), SeriesReader(), table()
    first = sender.batch({UP: 1.0, LOAD: 0.5}, time=0.0)
    sender.batch({LOAD: 0.5}, time=0.1, ended=[UP])  # lost
    whole = sender.batch({LOAD: 0.6}, time=2.0)
    for batch in (first, whole):
        last.take(TOPIC, batch, batch.time)
    assert known(remembered(last, 2.0)) == {LOAD: 0.6}
    reader.read(first)
    assert reader.read(whole) == ([(LOAD, 0.6)], [UP])


def test_repeats_and_old_epochs_change_nothing_and_losses_are_counted() -> None:
    last, old, new = LastValues(), table(), table(epoch=2)
    batches = [old.batch({UP: float(n)}, time=float(n)) for n in range(5)]
    for batch in (batches[0], batches[3], batches[2], batches[3]):
        last.take(TOPIC, batch, 1.0)
    assert (last.lost["a/host"], last.repeated) == (2, 2)
    last.take(TOPIC, new.batch({UP: 9.0}, time=9.0), 9.0)
    last.take(TOPIC, batches[4], 9.0)
    assert known(remembered(last, 9.0)) == {UP: 9.0}


def test_beyond_the_limits_it_says_so_and_forgets_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastvalues, "MAX_SERIES", 3)
    monkeypatch.setattr(lastvalues, "MAX_SOURCES", 2)
    last = LastValues()
    many = {labels(f"m{n}", host="a"): float(n) for n in range(5)}
    for source in ("a/host", "b/host", "c/host"):
        last.take(f"telemetry/{source}/", table(source).batch(many, time=0.0), 0.0)
    assert (last.sources, last.series, last.refused) == (2, 6, 2 * 2 + 1)
    batches = remembered(last, 0.0)
    assert not any(batch.whole for batch in batches)  # a reader that knows more must not think the rest ended
    assert all(len(known([batch])) == 3 for batch in batches)


def test_a_publisher_can_not_make_it_hold_many_batches_for_a_value_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastvalues, "SLACK", 100)
    last, sender = LastValues(), table()
    keys = [labels(f"m{n}", host="a") for n in range(50)]
    for n in range(50):  # each batch leaves one value behind that is the newest of its series
        last.take(TOPIC, sender.batch({key: float(n) for key in keys[n:]}, time=n * 0.01), 0.0)
    source = last._sources["a/host"]
    assert sum(len(batch.ids) for batch, _ in source.groups.values()) <= 2 * 50 + 100 + 50
    assert known(remembered(last, 1.0)) == {key: float(n) for n, key in enumerate(keys)}


def test_one_owner_can_not_use_up_the_memory_of_the_others() -> None:
    last = LastValues()
    for n in range(lastvalues.MAX_SOURCES + 500):
        last.take(f"telemetry/b/x{n}/", table(f"b/x{n}").batch({UP: 1.0}, time=0.0), 0.0, owner="b")
    last.take(TOPIC, table().batch({UP: 1.0}, time=0.0), 0.0, owner="a")
    assert (last.sources, last.refused) == (lastvalues.OWN_SOURCES + 1, lastvalues.MAX_SOURCES + 500 - 8)
    assert known(remembered(last, 0.0, TOPIC)) == {UP: 1.0}
    last.forget_silent(SILENT_S + 1.0)
    assert last.sources == 0
    last.take("telemetry/b/x/", table("b/x").batch({UP: 1.0}, time=0.0), 0.0, owner="b")
    assert last.sources == 1  # there is room again


def test_series_and_labels_of_one_owner_are_bounded_over_all_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastvalues, "OWN_SERIES", 5)
    monkeypatch.setattr(lastvalues, "OWN_BYTES", 10_000)
    last = LastValues()
    many = {labels(f"m{n}"): 1.0 for n in range(4)}
    for name in ("b/1", "b/2"):
        last.take(f"telemetry/{name}/", table(name).batch(many, time=0.0), 0.0)
    assert (last.series, last.refused) == (5, 3)
    large = {labels(f"m{n}", text="x" * 4000): 1.0 for n in range(4)}
    last.take(TOPIC, table("a/1").batch(large, time=0.0), 0.0)
    assert (last.series, last.refused) == (7, 5)
    last.take(TOPIC, table("a/1", epoch=2).batch(large, time=0.0), 0.0)  # what it had is given back first
    assert (last.series, last.refused) == (7, 7)


def test_a_series_that_changes_its_labels_again_and_again_is_counted_once() -> None:
    last = LastValues()
    for n in range(100):
        announced = [Announcement(1, {"__name__": "m", "n": str(n) * 2000})]
        last.take(TOPIC, Batch(source="a/host", epoch=1, seq=n + 1, time=0.0, series=announced, ids=[1], values=[n]), 0)
    assert (last.series, last.refused) == (1, 0)
    assert known(remembered(last, 0.0)) == {labels("m", n="99" * 2000): 99.0}


def test_announcements_are_not_kept_with_the_batches_that_brought_them() -> None:
    last = LastValues()
    for n in range(1, 1000):
        announced = [Announcement(1, {"__name__": "m"})] * 100
        batch = Batch(source="a/host", epoch=1, seq=n, time=0.0, series=announced, ids=[n, n, n], values=[1, 2, 3])
        last.take(TOPIC, batch, 0.0)
    source = last._sources["a/host"]
    assert not any(batch.series for batch, _ in source.groups.values())


def test_a_value_that_stands_in_a_batch_many_times_is_held_once() -> None:
    last = LastValues()
    for n in range(1, 40):
        announced = [Announcement(1, {"__name__": "m"})]
        ids = [1] * (20_000 + n)
        batch = Batch(
            source="a/host", epoch=1, seq=n, time=0.0, series=announced, ids=ids, values=[float(n)] * len(ids)
        )
        last.take(TOPIC, batch, 0.0)
    held = sum(len(batch.ids) for batch, _ in last._sources["a/host"].groups.values())
    assert held <= lastvalues.SLACK + 2000
    assert known(remembered(last, 0.0)) == {labels("m"): 39.0}


@settings(deadline=None, max_examples=200)
@given(
    sent=st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abcde"), st.floats(0, 9), max_size=5),
            st.sets(st.sampled_from("abcde")),
            st.booleans(),
        ),
        max_size=40,
    ),
    joins=st.integers(0, 40),
)
def test_who_joins_late_knows_the_same_as_who_saw_everything(
    sent: list[tuple[dict[str, float], set[str], bool]], joins: int
) -> None:
    last, sender = LastValues(), table()
    early: list[Batch] = []
    late: list[Batch] = []
    for number, (values, ended, restarts) in enumerate(sent):
        if restarts:
            sender = table(epoch=sender.epoch + 1)
        given_samples = {labels(name): value for name, value in values.items() if name not in ended}
        batch = sender.batch(given_samples, time=number * 0.3, ended=[labels(name) for name in ended])
        if number == joins:
            late = remembered(last, 0.0)
        last.take(TOPIC, batch, 0.0)
        early.append(batch)
        if number >= joins:
            late.append(batch)
    if len(sent) <= joins:
        late = remembered(last, 0.0)
    assert known(late) == known(early)
