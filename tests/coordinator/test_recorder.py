"""What is kept of the measurements of a migration: little, and what matters of it."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from interlock.broker import wire
from interlock.broker.samples import labels
from interlock.coordinator.recorder import NEWEST, POINTS, SERIES, Recorder, Thinned

OWN = labels("agent_up", agent="tutor", role="candidate", revision="r2")


def thinned(values: list[float]) -> Thinned:
    series = Thinned()
    for number, value in enumerate(values):
        series.add(float(number), value)
    return series


def test_a_short_series_is_kept_whole() -> None:
    assert thinned([1.0, 2.0, 3.0]).points == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]


def test_of_a_day_at_ten_samples_a_second_the_newest_are_whole_and_the_rest_is_thin() -> None:
    values = [float(number % 7) for number in range(200_000)]
    points = thinned(values).points
    assert len(points) <= POINTS
    assert points[-NEWEST:] == [(float(n), values[n]) for n in range(len(values) - NEWEST, len(values))]
    assert points[0][0] < 2000


def test_a_peak_of_one_sample_outlives_the_thinning() -> None:
    values = [1.0 + (number % 2) / 100 for number in range(50_000)]
    values[20_000] = 9.0
    assert (20_000.0, 9.0) in thinned(values).points


def test_what_stays_the_same_takes_two_points() -> None:
    assert thinned([5.0] * 1000 + [6.0] * 1000).points == [(0.0, 5.0), (999.0, 5.0), (1000.0, 6.0), (1999.0, 6.0)]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=2000))
def test_points_are_samples_in_the_order_of_their_times_and_never_too_many(values: list[float]) -> None:
    points = thinned(values).points
    assert len(points) <= POINTS
    assert [time for time, _ in points] == sorted({time for time, _ in points})
    assert all(math.isfinite(value) and values[int(time)] == value for time, value in points)


def test_a_sample_that_comes_late_or_again_is_passed_over() -> None:
    series = thinned([1.0, 2.0])
    series.add(1.0, 7.0)
    series.add(0.5, 7.0)
    assert series.points == [(0.0, 1.0), (1.0, 2.0)]


def recorded(*all_labels: Any) -> Any:
    recorder = Recorder("tutor-1", "tutor")
    for number, one in enumerate(all_labels):
        recorder.take([(one, float(number))], 1.0)
    return recorder.recorded()


def test_other_agents_and_what_decides_nothing_are_not_recorded() -> None:
    found = recorded(
        OWN, labels("agent_up", agent="other"), labels("gpu_memory_used_ratio", gpu="0"), labels("host_swap_used_bytes")
    )
    assert [track.labels["__name__"] for track in found.series] == ["agent_up", "gpu_memory_used_ratio"]
    assert found.left_out == 0


def test_where_there_is_no_room_the_agents_own_series_come_first_and_the_rest_is_counted() -> None:
    cards = [labels("gpu_memory_used_ratio", gpu=str(number)) for number in range(SERIES)]
    own = [labels("agent_own", agent="tutor", number=str(number)) for number in range(5)]
    found = recorded(*cards, *own, labels("host_load1"))
    assert len(found.series) == SERIES
    assert sum("agent" in track.labels for track in found.series) == 5
    assert found.left_out == 6


def test_labels_without_end_are_left_out() -> None:
    assert recorded(labels("agent_own", agent="tutor", text="x" * 5000)).left_out == 1


def test_the_largest_record_fits_into_an_event() -> None:
    recorder = Recorder("tutor-1", "tutor")
    series = [labels("agent_own", agent="tutor", text=f"{number}" * 300) for number in range(10, 10 + SERIES)]
    for time in range(2 * POINTS):
        recorder.take([(one, math.sin(time)) for one in series], 1.7e9 + time / 10)
    assert len(wire.encode(recorder.recorded())) < wire.MAX_FRAME // 2
