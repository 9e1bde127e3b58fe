"""What a host counts of a trial: both revisions, from the warm-up on, as sums that a comparison can use."""

from __future__ import annotations

import math

import pytest

from interlock.agents.figures import InstanceView, measured, samples, slow_threshold
from interlock.agents.latency import Tally, TrialFigures
from interlock.broker.samples import NAME


def trial_of(tally: Tally) -> TrialFigures | None:
    return tally.figures(100.0, in_flight=0, oldest_s=0.0).trial


def test_nothing_is_counted_before_the_trial_and_after_it() -> None:
    tally = Tally()
    tally.record(1.0, 0.5, error=False, live=True)
    assert trial_of(tally) is None
    tally.begin_trial(0.4)
    assert trial_of(tally) == TrialFigures()
    tally.begin_trial(None)
    tally.record(1.0, 0.5, error=False, live=True)
    assert trial_of(tally) is None


def test_live_requests_are_counted_with_their_logarithms_mirrored_ones_are_not() -> None:
    tally = Tally()
    tally.begin_trial(0.4)
    for latency, error, live in ((0.5, True, True), (0.1, False, True), (9.0, False, False), (0.0, False, True)):
        tally.record(1.0, latency, error=error, live=live)
    found = trial_of(tally)
    assert found is not None
    assert (found.requests, found.errors, found.slow) == (3, 1, 1)
    logs = [math.log(0.5), math.log(0.1), math.log(1e-6)]
    assert found.log_sum == pytest.approx(sum(logs))
    assert found.log_squares_sum == pytest.approx(sum(value * value for value in logs))


def test_a_second_trial_begins_at_nothing() -> None:
    tally = Tally()
    tally.begin_trial(0.4)
    tally.record(1.0, 0.5, error=True, live=True)
    tally.begin_trial(0.4)
    assert trial_of(tally) == TrialFigures()


def test_the_figures_are_published_as_counters_while_a_trial_goes_on() -> None:
    tally = Tally()
    tally.begin_trial(0.4)
    tally.record(1.0, 0.5, error=False, live=True)
    figures = {"i": tally.figures(1.0, in_flight=0, oldest_s=0.0)}
    views = {"i": InstanceView("r2", "candidate")}

    def names(trial: bool) -> set[str]:
        found = samples("alpha", "tutor", views, figures, None, trial=trial)
        return {name for key in found if (name := dict(key)[NAME]).startswith("agent_trial_")}

    assert names(False) == set()
    assert names(True) == {
        "agent_trial_requests_total",
        "agent_trial_errors_total",
        "agent_trial_slow_total",
        "agent_trial_log_seconds_sum",
        "agent_trial_log_seconds_squares_sum",
    }


def test_the_baseline_says_how_slow_19_of_20_answers_were_or_that_it_does_not_know() -> None:
    assert measured([0.1] * 18 + [0.2, 0.5])["slow_s"] == pytest.approx(0.205)
    assert measured([0.1] * 3)["slow_s"] is None
    assert slow_threshold(None) == math.inf
