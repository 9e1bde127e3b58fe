"""An operator leads a migration: what follows from each verb, what is refused, what happens if nobody decides."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interlock.broker import commands, facts, topics
from interlock.broker.commands import Breach
from interlock.broker.strategies import BUILT_IN
from interlock.coordinator import steering
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.phases import STEERED, Phase
from interlock.coordinator.steering import standing
from interlock.coordinator.steps import Stage, plan

LIMITS = {"approval_s": 100.0, "pause_s": 200.0, "hold_s": 300.0}


# --- the plan


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_plan_begins_with_prepare_and_ends_with_commit_and_gates_stand_before_stages(name: Any) -> None:
    steps = plan(BUILT_IN[name], start_timeout_s=30.0)
    assert (steps[0].step, steps[-1].step) == ("prepare", "commit")
    assert [step.stage for step in steps] == sorted((step.stage for step in steps), key=list(Stage).index)
    gates = [step.stage for step in steps if step.gate]
    assert gates == (list(Stage)[1:] if name == "custom" else [])
    assert any(step.step == "drill" for step in steps) is (name in ("framework", "custom"))


def test_a_drill_that_fails_is_a_refusal_since_nothing_was_begun(story: Any) -> None:
    play = story(strategy={"drill": True})
    play.migrate()
    assert play.done() == ["Drill"]
    assert play.failed("drill") == ["refused by check drill: as found"]


def kept(story: Any, **strategy: Any) -> Any:
    """The host could not bring r1 back, and lets r2 serve."""
    play = story(strategy=strategy)
    play.to_canary()
    play.steer("abort")
    m = play.migration
    play.said = play.fact(
        facts.RollBackFailed(
            host="alpha", agent="tutor", migration=m.id, epoch=m.started.epoch, kept="r2", level=2,
            breach=Breach(by="operator abort", reason=""), reason="r1 does not start",
        )
    )  # fmt: skip
    return play


def test_a_kept_candidate_is_held_on_until_an_operator_decides(story: Any) -> None:
    play = kept(story)
    assert play.said == ["held by host alpha, blames permanent"]
    assert steering.possible(play.migration) == ["abort", "commit"]
    assert "resume is not possible" in play.steer("resume")[0]
    assert play.later(86_401) == ["held by host alpha, blames permanent"]  # somebody must look: it never ends by itself
    play.restart()
    assert play.run() == []


def test_a_rule_that_goes_on_firing_does_not_end_a_kept_candidate(story: Any) -> None:
    play = kept(story)
    m = play.migration
    rule = Breach(by="rule slow", reason="slow")
    play.say(
        topics.rollback("alpha"),
        commands.RollBack(migration=m.id, agent="tutor", epoch=m.started.epoch, breach=rule, issued=play.now),
    )
    assert play.later(100) == []
    assert play.migration.phase is Phase.HELD


def test_a_kept_candidate_can_be_committed_with_a_reason(story: Any) -> None:
    play = kept(story)
    assert "r2 is kept" in play.steer("commit")[0]
    assert play.steer("commit", "r1 is lost")[2:] == ["stage commit", "Commit"]
    assert play.done()[-1].startswith("committed by operator commit")


def test_a_kept_candidate_whose_commit_the_host_refuses_has_failed_at_once_with_the_hosts_reason(story: Any) -> None:
    play = kept(story)
    play.steer("commit", reason="it is the better one")
    refused = facts.CommandRefused(
        host="alpha", agent="tutor", migration=play.migration.id, command=play.asked().header.id,
        reason="commit is not possible while the slot is rolling-back",
    )  # fmt: skip
    assert play.fact(refused) == [
        "failed by host alpha: commit is not possible while the slot is rolling-back",
    ]
    assert play.core.migrations == {}


def test_an_abort_of_a_kept_candidate_reaches_the_host_once_more(story: Any) -> None:
    play = kept(story)
    assert play.steer("abort", "again") == ["abort by operator/ann", "roll back: operator abort: again"]
    assert play.rolled_back() == ["rolled-back by operator abort: again"]


# --- approval


def test_a_stage_begins_when_it_is_approved_and_each_stage_once(story: Any) -> None:
    play = story(strategy={"approve": True}, coordinator=LIMITS)
    assert play.migrate() == ["MigrationStarted", "stage prepare", "Prepare"]
    assert play.done() == ["waits for infrastructure until 100"]
    assert play.later(99) == []
    assert play.steer("approve") == ["approve by operator/ann", "stage infrastructure", "StartCandidate"]
    assert play.done() == ["waits for integration until 199"]
    assert play.steer("approve")[-1] == "cut over 10%"
    play.done()
    assert play.later(20.1) == ["waits for observation until 219"]
    play.steer("approve")
    play.done()
    assert play.later(60.1)[0].startswith("waits for commit")
    assert play.steer("approve")[1:] == ["stage commit", "Commit"]
    assert play.done() == ["committed by observation: observed for its full time, every check passed"]


def test_what_nobody_approves_is_rolled_back(story: Any) -> None:
    play = story(strategy={"approve": True}, coordinator=LIMITS)
    play.migrate()
    play.done()
    (said,) = play.later(100.1)
    assert said == "roll back: coordinator approval-overdue: nobody approved infrastructure within 100 s"
    assert play.later(1.0) == []
    assert play.rolled_back()[0].startswith("rolled-back by coordinator approval-overdue")


def test_a_commit_is_an_approval_of_the_last_stage(story: Any) -> None:
    play = story(strategy={"approve": True, "canary": []}, coordinator=LIMITS)
    play.migrate()
    for _ in range(2):
        play.done()
        play.steer("approve")
    play.done()
    assert play.later(60.1)[0].startswith("waits for commit")
    assert play.steer("commit") == ["commit by operator/ann", "stage commit", "Commit"]


# --- pause, resume, hold


def test_time_stands_still_while_it_is_paused(story: Any) -> None:
    play = story(coordinator=LIMITS).to_canary()
    play.later(15)
    assert play.steer("pause") == ["pause by operator/ann"]
    assert play.later(100) == []
    assert play.steer("resume") == ["resume by operator/ann"]
    assert play.later(4.9) == []
    assert play.later(0.2) == ["stage observation", "cut over 100%"]


def test_a_step_that_is_done_while_it_is_paused_counts_and_the_next_one_waits(story: Any) -> None:
    play = story(coordinator=LIMITS)
    play.migrate()
    play.steer("pause")
    assert play.done() == []
    assert play.later(50) == []
    assert play.steer("resume")[1:] == ["stage infrastructure", "StartCandidate"]


def test_a_pause_is_not_held_against_the_step_under_way(story: Any) -> None:
    play = story(coordinator=LIMITS)
    play.migrate()
    play.later(70)
    play.steer("pause")
    play.later(100)
    play.steer("resume")
    assert play.later(6) == []
    assert play.later(2)[0].startswith("roll back: coordinator step-overdue")


@pytest.mark.parametrize(("verb", "limit"), [("pause", 200.0), ("hold", 300.0)])
def test_what_stands_for_too_long_is_rolled_back(story: Any, verb: str, limit: float) -> None:
    play = story(coordinator=LIMITS).to_canary()
    play.steer(verb, "let me look")
    assert play.later(limit - 1) == []
    assert standing(play.migration, play.now).until == pytest.approx(1000 + limit)
    (said,) = play.later(1.1)
    assert said.startswith(f"roll back: coordinator {verb}-overdue")


def test_a_hold_of_a_rule_goes_on_when_an_operator_says_so_and_a_second_one_holds_again(story: Any) -> None:
    play = story().to_canary()
    assert play.fires() == ["held by rule odd"]
    assert play.later(1000) == []
    play.steer("resume", "it is the test")
    assert play.fires("odder") == ["held by rule odder"]
    play.steer("resume")
    assert play.later(20.1) == ["stage observation", "cut over 100%"]


def test_a_hold_that_blames_another_is_said_again_and_not_rolled_back(story: Any) -> None:
    play = story(coordinator=LIMITS).to_canary()
    for emit in play.migration.hold(Breach(by="rule hot", reason="90 C"), play.now, "host"):
        play.say(emit.topic, emit.body, emit.id)
    assert play.later(299) == []
    assert standing(play.migration, play.now).then == "it is held on"
    assert play.later(1.1) == ["held by rule hot, blames host"]
    assert play.later(299) == []
    assert play.later(1.1) == ["held by rule hot, blames host"]


def test_the_lease_is_renewed_in_every_phase_that_waits(story: Any) -> None:
    for verb in ("pause", "hold"):
        play = story().to_canary()
        play.steer(verb)
        play.direct.clear()
        for _ in range(10):
            play.later(1.0)
        assert len(play.direct) == 5  # every 2 s of a 6 s lease


# --- abort and commit


@pytest.mark.parametrize("to", ["prepare", "canary", "observation"])
def test_an_abort_goes_to_the_host_both_ways_and_is_what_decided(story: Any, to: str) -> None:
    play = story()
    {"prepare": play.migrate, "canary": play.to_canary, "observation": play.to_observation}[to]()
    said = play.steer("abort", "wrong revision")
    assert said == ["abort by operator/ann", "roll back: operator abort: wrong revision"]
    assert play.direct[-1].also_direct
    assert play.rolled_back() == ["rolled-back by operator abort: wrong revision"]


def test_a_commit_before_its_time_needs_a_reason_and_is_a_deviation(story: Any) -> None:
    play = story().to_observation()
    play.later(12)
    (said,) = play.steer("commit")
    assert said == "refused: it was observed for 12 of 60 s; to commit it all the same, say why: --because TEXT"
    assert play.steer("commit", "the old one is dying") == [
        "commit by operator/ann",
        "deviation: it was observed for 12 of 60 s; because the old one is dying",
        "stage commit",
        "Commit",
    ]
    migration = play.migration
    assert play.done() == ["committed by operator commit: the old one is dying"]
    ended = next(event.body for event in reversed(play.events) if isinstance(event.body, facts.MigrationEnded))
    assert [each["action"] for each in ended.evidence["steered"]] == ["commit"]
    assert ended.evidence["deviations"][0]["by"] == "operator/ann"
    assert migration.phase is Phase.ENDED


def test_a_held_one_can_be_committed_by_whoever_answers_for_it(story: Any) -> None:
    play = story().to_observation()
    play.fires()
    assert "held by rule odd: it is odd" in play.steer("commit")[0]
    assert play.steer("commit", "rule odd is wrong")[-1] == "Commit"


def test_a_commit_outside_the_observation_is_refused(story: Any) -> None:
    play = story().to_canary()
    (said,) = play.steer("commit", "now")
    assert said == (
        "refused: commit is not possible: tutor is in stage integration, and only what is in observation can be "
        "committed"
    )


# --- refusals


def test_every_verb_in_the_wrong_phase_says_the_phase_and_what_is_possible(story: Any) -> None:
    play = story().to_canary()
    assert play.steer("resume") == [
        "refused: resume is not possible: tutor is running; possible is: pause, hold, abort"
    ]
    assert "approve is not possible: tutor is running" in play.steer("approve")[0]
    play.steer("pause")
    assert play.steer("pause")[0].endswith("tutor is paused; possible is: resume, hold, abort")
    play.steer("hold")
    assert play.steer("hold")[0].endswith("tutor is held; possible is: resume, abort")
    play.steer("abort")
    for verb in STEERED:
        assert play.steer(verb)[0].endswith("tutor is rolling-back; possible is: nothing, it ends by itself")
    play.rolled_back()
    for verb in STEERED:
        assert play.steer(verb)[0].startswith(f"refused: nothing to {verb}: no migration of tutor is in flight")


def test_unknown_agents_and_late_requests_are_refused(story: Any) -> None:
    play = story()
    assert play.steer("pause", agent="tutro") == ["refused: there is no agent 'tutro'; did you mean 'tutor'?"]
    play.to_canary()
    assert play.steer("pause", deadline=play.now - 1) == ["refused: the request's deadline has passed"]


def test_while_it_is_committed_only_an_abort_is_heard(story: Any) -> None:
    play = story().to_observation()
    play.later(60.1)
    assert play.steer("pause") == ["refused: pause is not possible: tutor is being committed"]
    assert play.steer("commit") == ["refused: commit is not possible: tutor is being committed"]
    assert play.steer("abort")[0] == "abort by operator/ann"
    assert play.done()[0].startswith("committed by")  # the host had done it: it has the last word


def test_two_operators_at_once_are_answered_one_after_the_other(story: Any) -> None:
    play = story().to_canary()
    for _ in range(2):
        play.say("command/coordinator/", commands.Steer(agent="tutor", action="pause", deadline=play.now + 9))
    assert play.run() == [
        "pause by operator/ann",
        "refused: pause is not possible: tutor is paused; possible is: resume, hold, abort",
    ]


def test_a_request_that_nobody_answered_is_answered_by_the_next_coordinator(story: Any) -> None:
    play = story().to_canary()
    play.say("command/coordinator/", commands.Steer(agent="tutor", action="pause", deadline=play.now + 9))
    play.restart()
    assert play.run() == ["pause by operator/ann"]


# --- a fold over the log


def state(core: Coordinator) -> list[Any]:
    return [(m.id, m.phase, m.index, m.due, m.blame, m.outcome) for m in core.migrations.values()]


MOVES = st.lists(
    st.sampled_from(["done", "fires", "rolled-back", "failed", *STEERED, 1.0, 19.0, 61.0, 250.0]), max_size=14
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES, cut=st.floats(0, 1), approve=st.booleans())
def test_a_coordinator_killed_anywhere_reaches_the_same_state(
    story: Any, moves: list[Any], cut: float, approve: bool
) -> None:
    play = story(strategy={"approve": approve}, coordinator=LIMITS)
    play.migrate()
    for move in moves:
        if isinstance(move, float):
            play.later(move)
        elif move == "fires":
            play.fires(f"rule-{len(play.events)}")
        elif move == "rolled-back":
            if any(isinstance(event.body, commands.RollBack) for event in play.events):
                play.rolled_back()
        elif move in ("done", "failed"):
            play.done() if move == "done" else play.failed("c")
        else:
            play.steer(move, "said so")
    before = len(play.events)
    prefix, rest = play.events[: int(cut * before)], play.events[int(cut * before) :]
    whole, parted = (Coordinator(lambda: play.config, play.config) for _ in range(2))
    for event in play.events:
        whole.apply(event)
    for event in prefix:
        parted.apply(event)
    parted.decide(prefix[-1].header.time if prefix else 0.0)  # it lived on in between, and what it sent was logged once
    for event in rest:
        parted.apply(event)
    assert state(parted) == state(whole)
    play.restart()
    play.run()
    assert len(play.events) == before, "a new coordinator repeats nothing under a new id"
