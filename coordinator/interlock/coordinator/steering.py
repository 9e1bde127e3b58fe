"""What an operator may ask of a migration in flight, and where it stands. Pure; the time is an argument.

What is possible in a phase stands in the table of `phases.py`; here are the refusals in words, and the answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from interlock.broker import commands, facts, topics
from interlock.broker.commands import Breach, SteerAction
from interlock.coordinator.emit import Emit
from interlock.coordinator.migration import Migration
from interlock.coordinator.phases import STEERED, TRANSITIONS, Phase
from interlock.coordinator.steps import PlannedStep


@dataclass(frozen=True)
class Standing:
    """Where a migration stands. `until` (seconds since 1970; 0: no limit): then `then` happens by itself."""

    phase: Phase
    stage: str
    waits_for: str
    until: float = 0.0
    then: str = ""


def standing(migration: Migration, now: float) -> Standing:
    """What it waits for, and what happens if that does not come."""
    step, agent, host, phase = _step(migration), migration.started.agent, migration.started.host, migration.phase
    behind = migration.steps[max(migration.index - 1, 0)].stage
    stage = step.stage if migration.under_way else behind
    until = 0.0 if migration.due == float("inf") else migration.due
    match phase:
        case Phase.RUNNING if migration.under_way:
            host = migration.started.target if step.step == "receive" else host
            return Standing(phase, stage, f"{host} to do {step.step}", until, "it is rolled back")
        case Phase.RUNNING if now < until:
            return Standing(phase, stage, "the time to watch it", until, f"it goes on to {_words(migration)}")
        case Phase.RUNNING:
            return Standing(phase, stage, f"the coordinator, to go on to {_words(migration)}")
        case Phase.WAITING:
            return Standing(phase, stage, f"interlock approve {agent} (stage {step.stage})", until, "it is rolled back")
        case Phase.PAUSED:
            return Standing(phase, stage, f"interlock resume {agent}", until, "it is rolled back")
        case Phase.HELD:
            then = "it is held on" if migration.blame else "it is rolled back"
            return Standing(phase, stage, f"an operator ({', '.join(possible(migration))})", until, then)
        case Phase.ROLLING_BACK:
            return Standing(phase, stage, f"the old revision to answer on {host}", until, "it has failed")
        case Phase.ENDED:
            return Standing(phase, stage, "nothing")


def possible(migration: Migration) -> list[str]:
    """What an operator can do with it in this phase."""
    names = [action for action in STEERED if TRANSITIONS[migration.phase, action] is not None]
    if migration.kept:
        names = [name for name in names if name != "resume"]  # there is no old revision to watch it beside
    return [name for name in names if name != "commit" or migration.observing]


def refusal(migration: Migration, action: SteerAction, reason: str, now: float) -> str | None:
    """Why an operator can't have this now; None if he can."""
    agent = migration.started.agent
    if TRANSITIONS[migration.phase, action] is None or (migration.kept and action == "resume"):
        what = ", ".join(possible(migration)) or "nothing, it ends by itself"
        return f"{action} is not possible: {agent} is {migration.phase}; possible is: {what}"
    if migration.under_way and _step(migration).step == "commit" and action != "abort":
        return f"{action} is not possible: {agent} is being committed"
    if action == "commit" and not migration.observing:
        stage = standing(migration, now).stage
        return f"commit is not possible: {agent} is in stage {stage}, and only what is in observation can be committed"
    if action == "commit" and not reason and not migration.passed(now):
        return f"{_early(migration, now)}; to commit it all the same, say why: --because TEXT"
    return None


def steer(migration: Migration, asked: commands.Steer, request: str, by: str, now: float) -> list[Emit]:
    """The answer to an operator who asked for what `refusal` has no objection to, and what follows from it."""
    topic, agent = topics.migration_fact(migration.started.agent), migration.started.agent
    steered = facts.Steered(
        request=request, migration=migration.id, agent=agent, action=asked.action, by=by, reason=asked.reason,
        until=migration.limit_of(asked.action, now),
    )  # fmt: skip
    emits = [Emit(topic, steered, f"{request}/steered")]
    if asked.action == "abort":
        emits += migration.roll_back(Breach(by="operator abort", reason=asked.reason, sample_time=now), now)
    elif asked.action == "commit" and not migration.passed(now):
        deviation = facts.Deviation(
            migration=migration.id, agent=agent, what=_early(migration, now), because=asked.reason, by=by
        )
        emits.append(Emit(topic, deviation, f"{request}/deviation"))
    migration.steering = request
    return emits


def _early(migration: Migration, now: float) -> str:
    """What a commit at this moment would pass over."""
    if migration.phase is Phase.HELD and migration.breach is not None:
        return f"it is held by {migration.breach.by}: {migration.breach.reason}"
    dwell = migration.steps[migration.index - 1].dwell_s
    return f"it was observed for {min(migration.watched_s(now), dwell):.0f} of {dwell:.0f} s"


def _step(migration: Migration) -> PlannedStep:
    return migration.steps[migration.index]


def _words(migration: Migration) -> str:
    step = _step(migration)
    return f"{step.share:.0%} of the requests" if step.step == "cut-over" else step.step
