"""Bounds that hold at every moment: checked where the truth is known, with somebody who always looks."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.coordinator.sequential import EVERYTHING, Moments, mean_bounds, share_bounds

RUNS = 100
LENGTH = 300


def missed(rate: float) -> float:
    """The share of runs in which a share's bounds are wrong at least once, looking after every trial."""
    wrong = 0
    for seed in range(RUNS):
        chance = random.Random(seed)
        hits = 0
        for count in range(1, LENGTH):
            hits += chance.random() < rate
            bounds = share_bounds(hits, count, alpha=0.1)
            if not bounds.lower <= rate <= bounds.upper:
                wrong += 1
                break
    return wrong / RUNS


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.5])
def test_bounds_of_a_share_are_ever_wrong_no_more_often_than_promised(rate: float) -> None:
    assert missed(rate) <= 0.1


def test_bounds_of_a_mean_are_ever_wrong_about_as_seldom_as_promised_whatever_the_shape() -> None:
    wrong = 0
    for seed in range(RUNS):
        chance = random.Random(seed)
        seen = Moments()
        for count in range(1, LENGTH):
            value = chance.expovariate(1.0)
            seen += Moments(1, value, value * value)
            if count >= 30:  # an asymptotic promise
                bounds = mean_bounds(seen, alpha=0.1)
                if not bounds.lower <= 1.0 <= bounds.upper:
                    wrong += 1
                    break
    assert wrong / RUNS <= 0.13


def test_looking_often_is_what_breaks_an_ordinary_interval() -> None:
    """Why it is done so: the textbook's 90 % interval, looked at after every answer, is wrong most of the time."""
    wrong = 0
    for seed in range(RUNS):
        chance = random.Random(seed)
        seen = Moments()
        for count in range(1, LENGTH):
            value = chance.gauss(0, 1)
            seen += Moments(1, value, value * value)
            if count >= 30 and abs(seen.mean) > 1.645 * math.sqrt(seen.variance / count):
                wrong += 1
                break
    assert wrong / RUNS > 0.3


@given(st.integers(0, 5000), st.integers(0, 5000), st.floats(1e-6, 0.5))
def test_bounds_of_a_share_contain_the_estimate_and_stay_within_0_and_1(hits: int, misses: int, alpha: float) -> None:
    bounds = share_bounds(hits, hits + misses, alpha=alpha)
    assert 0 <= bounds.lower <= bounds.upper <= 1
    if hits + misses:
        assert bounds.lower <= hits / (hits + misses) <= bounds.upper


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=50), st.floats(1e-6, 0.5))
def test_bounds_of_a_mean_contain_the_estimate(values: list[float], alpha: float) -> None:
    seen = Moments(len(values), math.fsum(values), math.fsum(value * value for value in values))
    bounds = mean_bounds(seen, alpha=alpha)
    assert bounds.lower <= seen.mean <= bounds.upper


def test_nothing_seen_rules_nothing_out() -> None:
    assert mean_bounds(Moments(1, 5.0, 25.0), alpha=0.05) == EVERYTHING
    assert (share_bounds(0, 0, alpha=0.05).lower, share_bounds(0, 0, alpha=0.05).upper) == (0.0, 1.0)


def test_more_of_the_same_narrows_the_bounds() -> None:
    few, many = (share_bounds(n // 100, n, alpha=0.05) for n in (100, 10_000))
    assert many.upper - many.lower < few.upper - few.lower
    assert many.upper < 0.02
