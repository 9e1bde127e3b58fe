"""The judgement of a shadow run, and the series that a host publishes: pure, as transcripts."""

from __future__ import annotations

import msgspec
import pytest

from interlock.agents.compare import Pair
from interlock.agents.figures import InstanceView, baseline, samples
from interlock.agents.latency import InstanceFigures
from interlock.agents.shadow import MAX_EXAMPLES, ShadowRun
from interlock.broker.commands import Shadow
from interlock.broker.samples import labels


def run(requests: int = 3, seconds: float = 10.0, least: int = 2, most: int = 0) -> ShadowRun:
    command = Shadow(
        migration="m", agent="a", epoch=1, deadline=0.0, requests=requests, seconds=seconds, min_requests=least,
        max_mismatches=most,
    )  # fmt: skip
    return ShadowRun(command, started=100.0)


def pair(equal: bool = True, new_latency: float | None = 0.02) -> Pair:
    return Pair(
        request=b'{"action":"ask"}', old=b"1", new=b"1" if equal else b"2", old_latency=0.01, new_latency=new_latency,
        equal=equal, difference="" if equal else "$: 1, not 2",
    )  # fmt: skip


def test_enough_equal_answers_pass_without_waiting_for_the_time() -> None:
    shadow = run()
    assert shadow.verdict(100.0) is None
    for _ in range(3):
        shadow.add(pair(), 101.0)
    assert shadow.verdict(101.0) == "passed"
    assert shadow.evidence()["compared"] == 3
    assert shadow.evidence()["new_p95_s"] == 0.02


def test_one_difference_too_many_fails_at_once_and_is_shown() -> None:
    shadow = run(most=1)
    shadow.add(pair(False), 101.0)
    assert shadow.verdict(101.0) is None
    shadow.add(pair(False), 102.0)
    assert shadow.verdict(102.0) == "failed"
    assert "2 of 2 answers differ" in shadow.reason("failed")
    assert shadow.evidence()["first_breach_time"] == 101.0
    assert shadow.evidence()["examples"][0] == {"request": '{"action":"ask"}', "difference": "$: 1, not 2"}


def test_a_comparison_that_fails_is_no_pass_and_no_mismatch_and_too_many_end_the_run() -> None:
    shadow = run(requests=1)
    shadow.max_errors = 1
    failed = msgspec.structs.replace(pair(False), difference="", error="check.py:3: KeyError: 'a'", handler="ask")
    shadow.add(failed, 101.0)
    assert shadow.verdict(101.0) is None
    assert (shadow.compared, shadow.mismatches) == (0, 0)
    shadow.add(failed, 102.0)
    assert shadow.verdict(102.0) == "error"
    assert "2 comparisons failed, 1 may: check.py:3: KeyError: 'a'" in shadow.reason("error")
    evidence = shadow.evidence()
    assert (evidence["errors"], evidence["first_breach_time"]) == (2, 101.0)
    assert evidence["failures"][0]["handler"] == "ask"


def test_too_little_compared_is_inconclusive_and_no_pass() -> None:
    shadow = run()
    shadow.add(pair(), 101.0)
    assert shadow.verdict(109.9) is None
    assert shadow.verdict(110.0) == "inconclusive"
    assert "1 requests were compared in 10 s, 2 are needed" in shadow.reason("inconclusive")
    shadow.add(pair(), 110.0)
    assert shadow.verdict(110.0) == "passed"


def test_no_answer_is_a_difference_without_a_latency_and_examples_are_few() -> None:
    shadow = run(requests=100, most=50)
    for _ in range(20):
        shadow.add(pair(False, None), 101.0)
    assert len(shadow.evidence()["examples"]) == MAX_EXAMPLES
    assert "new_p95_s" not in shadow.evidence()


@pytest.mark.parametrize("count", [0, 19])
def test_too_few_answers_are_no_baseline(count: int) -> None:
    assert baseline([0.01] * count) is None


def test_a_baseline_is_made_of_values_that_were_measured() -> None:
    assert baseline([i / 1000 for i in range(1, 101)]) == {"0.5": 0.05, "0.95": 0.095, "0.99": 0.099}


def test_series_say_which_revision_in_which_role_and_leave_out_what_is_not_known() -> None:
    views = {
        "i1": InstanceView("r1", "permanent", up=True, metrics={"questions": 7.0}),
        "i2": InstanceView("r2", "candidate", failures=2),
    }
    figures = {"i1": InstanceFigures(requests=5, errors=1, in_flight=2, p50=0.1, p95=0.2, p99=0.3, oldest_s=0.5)}
    found = samples("alpha", "tutor", views, figures, {"0.95": 0.15})
    of = {"host": "alpha", "agent": "tutor", "revision": "r1", "role": "permanent"}
    assert found[labels("agent_up", **of)] == 1.0
    assert found[labels("agent_questions", **of)] == 7.0
    assert found[labels("agent_response_seconds", quantile="0.95", **of)] == 0.2
    assert found[labels("agent_errors_total", **of)] == 1.0
    assert found[labels("agent_oldest_request_seconds", **of)] == 0.5
    assert found[labels("agent_response_baseline_seconds", host="alpha", agent="tutor", quantile="0.95")] == 0.15
    new = {**of, "revision": "r2", "role": "candidate"}
    assert found[labels("agent_health_failures", **new)] == 2.0
    assert labels("agent_requests_total", **new) not in found
    assert not any(("__name__", "agent_shadow_compared_total") in key for key in found)
