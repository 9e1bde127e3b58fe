"""The table walk: every phase of a migration, and every event there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest

from event_parts import topic_of
from interlock.broker import commands, facts
from interlock.broker.commands import Breach, SteerAction
from interlock.coordinator.phases import EVENTS, ON_TRIAL, STANDING, STEERED, TRANSITIONS, Phase

BREACH = Breach(by="rule x", reason="y")
STAGED = {"shadow_requests": 0, "approve": True}


def test_the_table_has_a_row_for_every_event_in_every_phase() -> None:
    assert set(TRANSITIONS) == {(phase, event) for phase in Phase for event in EVENTS}
    assert set(STEERED) == set(get_args(SteerAction)) <= set(EVENTS)


def test_every_phase_can_be_reached_and_an_end_is_an_end() -> None:
    reached, edge = {Phase.RUNNING}, [Phase.RUNNING]
    while edge:
        phase = edge.pop()
        fresh = {to for event in EVENTS if (to := TRANSITIONS[phase, event]) is not None} - reached
        reached |= fresh
        edge += fresh
    assert reached == set(Phase)
    assert {TRANSITIONS[Phase.ENDED, event] for event in EVENTS} == {None, Phase.ENDED}


def test_a_rollback_preempts_every_phase_and_nothing_leads_out_of_it_but_an_end_or_its_failure() -> None:
    for phase in ON_TRIAL:
        assert TRANSITIONS[phase, "roll-back"] is Phase.ROLLING_BACK
        assert TRANSITIONS[phase, "abort"] is Phase.ROLLING_BACK
        assert TRANSITIONS[phase, "rolled-back"] is Phase.ENDED
    ends = {TRANSITIONS[Phase.ROLLING_BACK, event] for event in EVENTS if event != "kept"}
    assert ends == {None, Phase.ROLLING_BACK, Phase.ENDED}
    assert TRANSITIONS[Phase.ROLLING_BACK, "kept"] is Phase.HELD  # there is nothing to go back to: an operator decides
    assert all(TRANSITIONS[Phase.ROLLING_BACK, action] is None for action in STEERED)


def test_where_nobody_decides_an_operator_can() -> None:
    for phase in STANDING:
        assert {action for action in STEERED if TRANSITIONS[phase, action] is not None} > {"abort"}


# --- the machine does what the table says


def at_running(story: Any) -> Any:
    play = story(strategy=STAGED)
    play.migrate()
    play.done()
    play.steer("approve")
    return play


def at_paused(story: Any) -> Any:
    play = at_running(story)
    play.steer("pause")
    return play


def at_waiting(story: Any) -> Any:
    play = story(strategy=STAGED)
    play.migrate()
    play.done()
    return play


def at_held(story: Any) -> Any:
    play = at_running(story)
    play.fires()
    return play


def at_rolling_back(story: Any) -> Any:
    play = at_running(story)
    play.steer("abort")
    return play


def at_ended(story: Any) -> Any:
    play = at_rolling_back(story)
    migration = play.migration
    play.rolled_back()
    play.ended = migration
    return play


ARRIVE: dict[Phase, Callable[[Any], Any]] = {
    Phase.RUNNING: at_running, Phase.PAUSED: at_paused, Phase.WAITING: at_waiting, Phase.HELD: at_held,
    Phase.ROLLING_BACK: at_rolling_back, Phase.ENDED: at_ended,
}  # fmt: skip


STEP_OF = {"committed": "commit", "not-prepared": "prepare"}


def body_of(event: str, migration: Any, command: str) -> Any:
    """The event as it stands in the log."""
    common: dict[str, Any] = {"migration": migration.id, "agent": "tutor"}
    hosts = {**common, "host": "alpha", "epoch": migration.started.epoch}
    match event:
        case "step-done" | "committed":
            step = "commit" if event == "committed" else "start-candidate"
            return facts.StepDone(**hosts, step=step, command=command)
        case "step-failed" | "not-prepared":
            step = "prepare" if event == "not-prepared" else "start-candidate"
            return facts.StepFailed(**hosts, step=step, command=command, check="c", reason="r")  # type: ignore[arg-type]
        case "checks-failed":
            return facts.ChecksMeasured(
                **common, epoch=migration.started.epoch, verdict="failed", reason="r", checkpoint=0.5, final=True
            )
        case "refused" | "not-committed":
            return facts.CommandRefused(**common, host="alpha", command=command, reason="r")
        case "waiting":
            return facts.MigrationWaiting(**common, stage="s", until=2000.0)
        case "held":
            return facts.MigrationHeld(**common, breach=BREACH, until=2000.0)
        case "roll-back":
            return commands.RollBack(**common, epoch=migration.started.epoch, breach=BREACH, issued=1.0)
        case "roll-back-failed":
            return facts.RollBackFailed(**hosts, breach=BREACH, reason="r")
        case "kept":
            return facts.RollBackFailed(**hosts, breach=BREACH, reason="r", kept="r2")
        case "rolled-back":
            return facts.RolledBack(
                **hosts, revision="r1", level=1, breach=BREACH, received=1.0, routed=1.0, restored=1.0, verified=True
            )
        case "closed":
            return facts.MigrationEnded(
                **common, epoch=migration.started.epoch, outcome="failed", decided_by="x", reason="y"
            )
        case _:
            return facts.Steered(**common, request="r", action=event, by="operator/ann", until=2000.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("phase", Phase)
def test_each_event_in_each_phase_leads_where_the_table_says(story: Any, phase: Phase, event: str) -> None:
    play = ARRIVE[phase](story)
    migration = play.ended if phase is Phase.ENDED else play.migration
    assert migration.phase is phase
    if event == "not-committed":
        migration._kept = BREACH
    if event in STEP_OF:  # it answers this step, and no other
        migration.index = [one.step for one in migration.steps].index(STEP_OF[event])
    body = body_of(event, migration, migration._command_id())
    play.say(topic_of(body), body)  # folded only; the coordinator decides nothing upon it
    if phase is Phase.ENDED:
        migration.apply(play.events[-1])
    assert migration.phase is (TRANSITIONS[phase, event] or phase)
