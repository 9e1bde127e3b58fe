"""What is made of a candidate's telemetry: the verdict of each check, and of all together."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from interlock.broker.facts import Check, Verdict
from interlock.broker.samples import labels
from interlock.broker.strategies import ObserveConfig
from interlock.coordinator.observation import (
    Baseline,
    Measurement,
    Observation,
    together,
)
from interlock.coordinator.sequential import Moments

SETTINGS = ObserveConfig(requests=100, latency_slack_s=0.0)


class Trial:
    """Telemetry of two revisions that answer as told, by one host."""

    def __init__(self, settings: ObserveConfig = SETTINGS, *, baseline: bool = True, seed: int = 0) -> None:
        self.chance = random.Random(seed)
        self.totals: dict[str, list[float]] = {"permanent": [0.0] * 5, "candidate": [0.0] * 5}
        drawn = [self.chance.lognormvariate(-5, 0.3) for _ in range(1000)] if baseline else []
        slow = sorted(drawn)[949] if drawn else None
        logs = [math.log(value) for value in drawn]
        moments = Moments(len(logs), sum(logs), sum(value * value for value in logs))
        self.slow_s = slow
        self.observation = Observation("tutor", "r1", "r2", settings, Baseline(moments, slow))
        self.say("candidate", "agent_up", 1.0)

    def say(self, role: str, name: str, value: float, time: float = 1000.0, **more: str) -> None:
        revision = "r1" if role == "permanent" else "r2"
        key = labels(name, host="alpha", agent="tutor", revision=revision, role=role, **more)
        self.observation.take(key, value, time)

    def answers(self, role: str, count: int, *, slower: float = 1.0, errors: int = 0) -> Trial:
        total = self.totals[role]
        for _ in range(count):
            latency = self.chance.lognormvariate(-5, 0.3) * slower
            total[0] += 1
            total[2] += self.slow_s is not None and latency > self.slow_s
            total[3] += math.log(latency)
            total[4] += math.log(latency) ** 2
        total[1] += errors
        names = ("requests_total", "errors_total", "slow_total", "log_seconds_sum", "log_seconds_squares_sum")
        for name, value in zip(names, total, strict=True):
            self.say(role, f"agent_trial_{name}", value)
        return self

    def measure(self, checkpoint: float = 1.0, now: float = 1001.0) -> Measurement:
        return self.observation.measure(now, checkpoint=checkpoint)

    def verdict(self, check: str, checkpoint: float = 1.0) -> Verdict:
        (found,) = [one for one in self.measure(checkpoint).checks if one.check == check]
        return found.verdict


def test_a_candidate_as_good_as_the_old_one_passes_at_the_end() -> None:
    assert Trial().answers("candidate", 1000).measure().verdict == "passed"


def test_with_enough_answers_it_passes_before_the_end() -> None:
    trial = Trial().answers("permanent", 10_000).answers("candidate", 200)
    assert trial.measure(0.1).verdict == "inconclusive"
    assert trial.answers("candidate", 20_000).measure(0.1).verdict == "passed"


def test_a_slower_candidate_is_condemned_before_the_end() -> None:
    trial = Trial().answers("candidate", 800, slower=1.6)
    assert trial.verdict("latency", 0.1) == "failed"
    assert "ms, the old revision" in trial.measure(0.1).reason


def test_a_candidate_whose_slowest_answers_are_slower_is_condemned_though_its_middle_is_not() -> None:
    trial = Trial().answers("candidate", 1700).answers("candidate", 300, slower=3)
    assert trial.verdict("slow-answers", 0.1) == "failed"


def test_a_candidate_with_errors_is_condemned() -> None:
    assert Trial().answers("candidate", 300, errors=45).verdict("errors", 0.1) == "failed"


def test_where_the_old_one_fails_as_often_it_is_not_the_candidates_fault() -> None:
    trial = Trial().answers("permanent", 300, errors=45).answers("candidate", 300, errors=45)
    assert trial.verdict("errors") == "inconclusive"
    assert "not the candidate's fault" in trial.measure().reason


def test_a_little_slower_stays_open_to_the_end_where_chance_does_not_explain_it() -> None:
    trial = Trial().answers("candidate", 3000, slower=1.1)
    assert trial.verdict("latency") == "inconclusive"
    assert Trial().answers("candidate", 100, slower=1.06).verdict("latency") == "passed"


def test_what_nobody_would_notice_is_not_worse_whatever_the_ratio() -> None:
    """The old one takes some 7 ms."""
    trial = Trial(ObserveConfig(requests=100, latency_slack_s=0.01)).answers("candidate", 3000, slower=1.6)
    assert trial.verdict("latency") == "passed"
    assert trial.answers("candidate", 20_000, slower=4).verdict("latency") == "failed"


@pytest.mark.parametrize(("errors", "verdict"), [(2, "passed"), (6, "inconclusive")])
def test_a_few_errors_more_than_the_limit_may_be_chance(errors: int, verdict: Verdict) -> None:
    assert Trial().answers("candidate", 150, errors=errors).verdict("errors") == verdict


def test_too_few_requests_are_no_pass_where_the_strategy_asks_for_some() -> None:
    assert Trial().answers("candidate", 99).measure().verdict == "inconclusive"


def test_a_strategy_that_asks_for_none_says_that_it_did_not_judge() -> None:
    found = Trial(ObserveConfig()).answers("candidate", 3).measure()
    assert found.verdict == "passed"
    assert "not judged" in found.reason


def test_without_a_baseline_nothing_is_said_of_latencies() -> None:
    assert Trial(baseline=False).answers("candidate", 500).verdict("latency") == "inconclusive"
    assert Trial(ObserveConfig(), baseline=False).answers("candidate", 500).verdict("latency") == "passed"


def test_what_the_old_one_answers_meanwhile_is_a_baseline_too() -> None:
    trial = Trial(baseline=False).answers("permanent", 2000).answers("candidate", 2000)
    assert trial.verdict("latency") == "passed"


def test_a_candidate_of_which_nothing_is_heard_is_an_error_never_a_pass() -> None:
    trial = Trial().answers("candidate", 1000)
    assert trial.measure(now=1000.0 + 30).verdict == "error"
    silent = Observation("tutor", "r1", "r2", SETTINGS, Baseline())
    assert silent.measure(1000.0, checkpoint=1.0).verdict == "error"


def test_a_candidate_that_was_not_well_fails() -> None:
    trial = Trial().answers("candidate", 1000)
    for _ in range(9):
        trial.say("candidate", "agent_up", 0.0)
    assert trial.verdict("health") == "failed"


def test_what_was_remembered_from_before_it_was_up_is_not_held_against_it() -> None:
    trial = Trial().answers("candidate", 1000)
    trial.observation = Observation("tutor", "r1", "r2", ObserveConfig(), Baseline())
    trial.say("candidate", "agent_up", 0.0)
    assert trial.verdict("health") == "error"
    trial.say("candidate", "agent_up", 1.0)
    assert trial.verdict("health") == "passed"


@pytest.mark.parametrize(("before", "verdict"), [(1.0, "failed"), (0.0, "inconclusive")])
def test_a_dependency_that_it_can_not_reach_fails_it_unless_the_old_one_could_not_either(
    before: float, verdict: Verdict
) -> None:
    trial = Trial().answers("candidate", 1000)
    trial.say("permanent", "agent_dependency_up", before, dependency="search")
    trial.say("candidate", "agent_dependency_up", 0.0, dependency="search")
    assert trial.verdict("dependency search") == verdict


def test_more_memory_than_the_old_one_is_left_to_an_operator() -> None:
    trial = Trial().answers("candidate", 1000)
    trial.say("permanent", "gpu_process_memory_bytes", 1e9, uuid="GPU-1")
    trial.say("candidate", "gpu_process_memory_bytes", 1.1e9, uuid="GPU-1")
    assert trial.verdict("gpu-memory") == "passed"
    trial.say("candidate", "gpu_process_memory_bytes", 1e9, uuid="GPU-2")
    assert trial.verdict("gpu-memory") == "inconclusive"


def test_other_agents_revisions_and_values_that_are_no_number_change_nothing() -> None:
    trial = Trial().answers("candidate", 1000)
    before = trial.measure()
    take: Callable[..., None] = trial.observation.take
    take(labels("agent_trial_errors_total", agent="other", revision="r2", role="candidate"), 900.0, 1000.0)
    take(labels("agent_trial_errors_total", agent="tutor", revision="r3", role="candidate"), 900.0, 1000.0)
    take(labels("agent_trial_errors_total", agent="tutor", revision="r2", role="candidate"), math.nan, 1000.0)
    assert trial.measure() == before


def test_a_candidate_that_is_no_worse_is_seldom_condemned_however_often_one_looks() -> None:
    condemned = 0
    for seed in range(40):
        trial = Trial(seed=seed).answers("permanent", 200)
        for _ in range(10):
            if trial.answers("candidate", 100).measure(0.1).verdict == "failed":
                condemned += 1
                break
    assert condemned <= 2


def test_the_worst_check_decides() -> None:
    def check(verdict: Verdict) -> Check:
        return Check(check=verdict, verdict=verdict, value=1.0, limit=1.0, reason="")

    everything: list[Verdict] = ["passed", "inconclusive", "error", "failed"]
    for number, verdict in enumerate(everything):
        found, decisive = together([check(one) for one in everything[: number + 1]])
        assert (found, decisive[-1].verdict) == (verdict, verdict)
    assert together([])[0] == "error"
