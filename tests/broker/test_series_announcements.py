"""Announcing series: whatever is lost, a consumer knows a series again within a keyframe, and mixes up none."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.broker.samples import ANNOUNCEMENTS, KEYFRAME_S, Batch, SeriesReader, SeriesTable, labels

UP = labels("agent_up", host="alpha")
LOAD = labels("host_load1", host="alpha")


def test_a_new_series_is_announced_several_times_and_then_with_every_keyframe() -> None:
    table = SeriesTable("alpha/host", 1)
    announced = [bool(table.batch({UP: 1.0}, time=i * 0.1).series) for i in range(12)]
    assert announced[0]  # a keyframe anyway
    assert announced[:ANNOUNCEMENTS] == [True] * ANNOUNCEMENTS
    assert announced[ANNOUNCEMENTS:10] == [False] * (10 - ANNOUNCEMENTS)
    assert any(announced[10:])


def test_a_consumer_that_joined_late_counts_what_it_can_not_resolve_until_the_next_keyframe() -> None:
    table, reader = SeriesTable("alpha/host", 1), SeriesReader()
    for i in range(5):
        table.batch({UP: 1.0}, time=i * 0.1)
    assert reader.read(table.batch({UP: 1.0}, time=0.5)) == ([], [])
    assert reader.unresolved == 1
    assert reader.read(table.batch({UP: 1.0}, time=KEYFRAME_S)) == ([(UP, 1.0)], [])


def test_a_series_that_ended_is_reported_and_its_number_is_not_used_again() -> None:
    table, reader = SeriesTable("alpha/host", 1), SeriesReader()
    first = table.batch({UP: 1.0}, time=0.0)
    reader.read(first)
    second = table.batch({LOAD: 2.0}, time=0.1, ended=[UP])
    assert reader.read(second) == ([(LOAD, 2.0)], [UP])
    assert set(first.ids).isdisjoint(second.ids)


def test_a_publisher_that_restarted_ends_what_it_does_not_announce_again() -> None:
    old, new, reader = SeriesTable("alpha/host", 1), SeriesTable("alpha/host", 2), SeriesReader()
    reader.read(old.batch({UP: 1.0, LOAD: 1.0}, time=0.0))
    assert reader.read(new.batch({LOAD: 3.0}, time=1.0)) == ([(LOAD, 3.0)], [UP])
    assert reader.read(old.batch({UP: 1.0}, time=2.0)) == ([], [])
    assert reader.outdated == 1


@settings(deadline=None, max_examples=200)
@given(
    sent=st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abcde"), st.floats(0, 9)), st.sets(st.sampled_from("abcde")), st.booleans()
        ),
        max_size=40,
    )
)
def test_what_arrives_is_what_was_sent_or_counted_as_unresolved(
    sent: list[tuple[dict[str, float], set[str], bool]],
) -> None:
    table, reader = SeriesTable("alpha/host", 1), SeriesReader()
    for number, (values, ended, lost) in enumerate(sent):
        given_samples = {labels(name): value for name, value in values.items() if name not in ended}
        batch: Batch = table.batch(given_samples, time=number * 0.3, ended=[labels(name) for name in ended])
        if lost:
            continue
        before = reader.unresolved
        samples, _ = reader.read(batch)
        assert len(samples) + reader.unresolved - before == len(given_samples)
        for key, value in samples:
            assert given_samples[key] == value
