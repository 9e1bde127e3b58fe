"""How a migration's observation ends: transcripts of a candidate that is measured to be as the test says."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.broker import facts
from interlock.coordinator.judgement import LAST_WORD_S, SPACING_S
from interlock.coordinator.phases import Phase


def observed(story: Any, verdict: facts.Verdict | None, **observe: Any) -> Any:
    """A rapid migration whose candidate has all requests for 30 s, and is found to be so."""
    told = story(strategy={"observation_s": 30.0, "canary": [], "observe": observe})
    told.verdict = verdict
    told.migrate()
    told.done()
    told.done()
    told.done()
    return told


def measured(told: Any) -> list[facts.ChecksMeasured]:
    return [event.body for event in told.events if isinstance(event.body, facts.ChecksMeasured)]


def test_a_good_candidate_is_measured_at_each_checkpoint_and_committed_at_the_end(story: Any) -> None:
    told = observed(story, "passed")
    for _ in range(3):
        assert told.later(7.6) == []
    assert told.later(7.6) == ["stage commit", "Commit"]
    assert [one.final for one in measured(told)] == [False, False, False, True]
    (ended,) = told.done()
    assert ended.startswith("committed by observation: observed for its full time")
    evidence = told.events[-1].body.evidence
    assert sum(key.startswith("checks-") for key in evidence) == 4


def test_a_candidate_whose_checks_fail_is_rolled_back_before_the_time_is_over(story: Any) -> None:
    told = observed(story, None)
    told.verdict = "failed"
    assert told.later(0.5) == ["roll back: check latency: latency: slower"]


def test_a_canary_step_can_fail_but_never_passes_early(story: Any) -> None:
    told = story(strategy={"observe": {"min_s": 0.0}}).to_canary()
    assert told.later(0.5) == []
    assert measured(told) == []
    told.verdict = "failed"
    assert told.later(0.1) == ["roll back: check latency: latency: slower"]


def test_so_many_measurements_may_fail_as_the_limit_says_counted_a_second_apart(story: Any) -> None:
    told = observed(story, None, failures=2)
    told.verdict = "failed"
    for _ in range(2):
        assert told.later(SPACING_S) == []
        assert told.later(SPACING_S / 2) == []
    assert told.later(SPACING_S) == ["roll back: check latency: latency: slower"]


def test_enough_evidence_ends_the_observation_early_and_the_record_says_so(story: Any) -> None:
    told = observed(story, "inconclusive", min_s=5.0)
    assert told.later(10.0) == []
    told.verdict = "passed"
    assert told.later(1.0) == ["stage commit", "Commit"]
    assert measured(told)[-1].reason.startswith("observed after 11 s: the evidence is enough")


def test_without_a_least_time_no_evidence_shortens_it(story: Any) -> None:
    told = observed(story, "passed")
    assert told.later(29.0) == []


def test_an_inconclusive_end_is_prolonged_by_a_quarter_and_then_held_for_an_operator(story: Any) -> None:
    told = observed(story, "inconclusive", inconclusive=1)
    assert told.later(30.0) == []
    assert told.later(7.4) == []
    assert told.later(0.2) == ["held by check latency"]
    assert told.migration.phase is Phase.HELD


def test_what_is_prolonged_may_still_pass(story: Any) -> None:
    told = observed(story, "inconclusive", inconclusive=1)
    told.later(30.0)
    told.verdict = "passed"
    assert told.later(1.0) == []  # a quarter more was promised, and no evidence may shorten it
    assert told.later(7.0) == ["stage commit", "Commit"]


def test_errors_at_the_end_are_waited_for_up_to_their_limit_then_it_is_held(story: Any) -> None:
    told = observed(story, "error", errors=2)
    assert told.later(30.0) == []
    assert told.later(SPACING_S) == []
    assert told.later(SPACING_S) == ["held by check latency"]


def test_an_operator_who_lets_a_held_one_go_on_has_it_measured_again(story: Any) -> None:
    told = observed(story, "inconclusive", inconclusive=0)
    told.later(30.1)
    told.verdict = "passed"
    assert told.steer("resume") == ["resume by operator/ann", "stage commit", "Commit"]


def test_an_operator_commits_what_was_inconclusive_and_says_why(story: Any) -> None:
    told = observed(story, "inconclusive", inconclusive=0)
    told.later(30.1)
    assert "because" in told.steer("commit")[0]
    lines = told.steer("commit", "seen enough")
    assert "deviation" in " ".join(lines)
    assert lines[-1] == "Commit"


def test_a_candidate_that_nobody_can_judge_is_held_never_committed(story: Any) -> None:
    told = observed(story, None)
    assert told.later(30.1) == []
    assert told.later(LAST_WORD_S) == ["held by check observation"]
    assert told.core.next_deadline(told.now) > told.now


def test_a_hold_that_is_not_in_the_log_yet_is_asked_for_once(story: Any) -> None:
    told = observed(story, None)
    told.now += 30.1 + LAST_WORD_S
    assert len([emit for emit in told.core.decide(told.now) if not emit.direct]) == 1
    assert [emit for emit in told.core.decide(told.now) if not emit.direct] == []
    assert told.core.next_deadline(told.now) > told.now


@pytest.mark.parametrize("verdict", ["passed", "inconclusive", "failed"])
def test_a_coordinator_killed_after_the_last_word_goes_on_as_it_said(story: Any, verdict: facts.Verdict) -> None:
    told = observed(story, None, inconclusive=0)
    told.now += 30.1
    told.verdict = verdict
    (emit,) = told.measure()
    told.say(emit.topic, emit.body, emit.id)
    told.restart()
    first = {"passed": "stage commit", "inconclusive": "held by", "failed": "roll back"}[verdict]
    assert told.run()[0].startswith(first)
