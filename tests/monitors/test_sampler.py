"""When samples are due: the time is an argument, so nothing here waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.monitors.sampler import Beat, Group, Schedule

BOTH = frozenset(Group)
HOT = frozenset({Group.HOT})


def schedule() -> Schedule:
    return Schedule(100.0, idle_s=1.0, migrating_s=0.1)


def run(beats: Schedule, start: float, end: float) -> list[tuple[float, frozenset[Group]]]:
    """What is due from start to end for somebody who is always on time."""
    taken = []
    now = start
    while (now := max(now, beats.next)) < end:
        taken.append((round(now, 6), beats.due(now)))
    return taken


def test_everything_is_due_at_once_and_then_every_idle_period() -> None:
    assert run(schedule(), 100.0, 103.5) == [(100.0, BOTH), (101.0, BOTH), (102.0, BOTH), (103.0, BOTH)]


def test_nothing_is_due_before_its_time() -> None:
    beats = schedule()
    beats.due(100.0)
    assert beats.due(100.99) == frozenset()
    assert beats.next == 101.0


def test_while_migrating_the_hot_readings_come_ten_times_a_second_and_the_calm_ones_with_every_tenth() -> None:
    beats = schedule()
    beats.due(100.0)
    beats.migrating(True, 100.35)
    taken = run(beats, 100.35, 102.05)
    assert [when for when, _ in taken] == [round(100.4 + n / 10, 6) for n in range(17)]
    assert [when for when, groups in taken if groups == BOTH] == [101.0, 102.0]
    assert all(groups == HOT for when, groups in taken if when not in (101.0, 102.0))


def test_a_migration_that_begins_is_sampled_within_one_fast_period() -> None:
    beats = schedule()
    beats.due(100.0)
    beats.migrating(True, 100.51)
    assert beats.next == pytest.approx(100.6)


def test_after_the_migration_both_groups_fall_together_again() -> None:
    beats = schedule()
    beats.migrating(True, 100.0)
    run(beats, 100.0, 105.35)
    beats.migrating(False, 105.35)
    assert run(beats, 105.35, 108.5) == [(106.0, BOTH), (107.0, BOTH), (108.0, BOTH)]


def test_saying_the_same_again_moves_nothing() -> None:
    beats = schedule()
    beats.due(100.0)
    for n in range(10):
        beats.migrating(False, 100.1 * n / 10)
    assert beats.next == 101.0


def test_a_late_sample_does_not_push_the_next_one_back() -> None:
    beats = schedule()
    assert beats.due(100.7) == BOTH
    assert beats.next == 101.0
    assert beats.missed == 0


def test_a_long_stall_is_caught_up_with_one_sample_and_counted() -> None:
    beats = schedule()
    beats.due(100.0)
    assert beats.due(105.5) == BOTH
    assert beats.next == 106.0
    assert beats.missed == 3 * 4  # of each group, 102, 103, 104 and 105; 101 is the late one


def test_an_idle_period_shorter_than_the_migrating_one_is_not_slowed_down() -> None:
    beats = Schedule(0.0, idle_s=0.05, migrating_s=0.1)
    beats.due(0.0)
    beats.migrating(True, 0.0)
    assert beats.next == 0.05


def test_what_is_slow_comes_with_every_tenth_idle_sample_also_while_migrating() -> None:
    beats = Schedule(100.0, idle_s=1.0, migrating_s=0.5, slow_s=10.0)
    beats.migrating(True, 100.0)
    taken = run(beats, 100.0, 121.0)
    assert [when for when, groups in taken if Group.SLOW in groups] == [100.0, 110.0, 120.0]
    assert all(groups == frozenset(Group) for when, groups in taken if Group.SLOW in groups), "in one batch"
    assert sum(Group.HOT in groups for _, groups in taken) == 42


def test_a_slow_period_shorter_than_the_idle_one_is_the_idle_one() -> None:
    beats = Schedule(100.0, idle_s=2.0, migrating_s=0.1, slow_s=1.0)
    assert [when for when, _ in run(beats, 100.0, 105.0)] == [100.0, 102.0, 104.0]


def test_a_period_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a period of 0"):
        Beat(0.0, 0.0)


@given(
    origin=st.floats(0, 1e6),
    period=st.sampled_from([0.01, 0.1, 0.3, 1.0, 7.0]),
    delays=st.lists(st.floats(0, 20), min_size=1, max_size=60),
)
def test_every_point_is_on_the_grid_taken_once_and_in_the_future_after_taking(
    origin: float, period: float, delays: list[float]
) -> None:
    beat = Beat(origin, period)
    now = origin
    taken = 0
    for delay in delays:
        now += delay
        if beat.take(now):
            taken += 1
        assert beat.next > now
        ticks = (beat.next - origin) / period
        assert ticks == pytest.approx(round(ticks), abs=1e-3)
        assert round(ticks) == taken + beat.missed
