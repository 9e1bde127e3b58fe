"""The steps of a migration in order, as its strategy has them, and what the host is asked for each. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from interlock.broker import commands, facts
from interlock.broker.commands import Step
from interlock.broker.strategies import StrategyConfig

RECEIVE_S = 60.0  # for a host to look at a revision: it is recorded, and imported
DRILL_S = 120.0  # for a rehearsal, beside two starts: a copy of the data folder, and a backup brought back


class Stage(StrEnum):
    PREPARE = "prepare"
    INFRASTRUCTURE = "infrastructure"
    CORE_LOGIC = "core-logic"
    INTEGRATION = "integration"
    OBSERVATION = "observation"
    COMMIT = "commit"


@dataclass(frozen=True)
class PlannedStep:
    """One command to the host, and what it may take. `dwell_s`: seconds to wait and watch after it is done.

    gate: an operator approves it first.
    """

    stage: Stage
    step: Step
    time_s: float
    share: float = 0.0
    dwell_s: float = 0.0
    gate: bool = False


def plan(strategy: StrategyConfig, *, start_timeout_s: float, moves: bool = False) -> list[PlannedStep]:
    """The steps of a strategy in order; the first stage a strategy leaves out is simply not there.

    moves: to another host, which is asked first.
    """
    steps = [PlannedStep(Stage.PREPARE, "receive", RECEIVE_S)] if moves else []
    steps.append(PlannedStep(Stage.PREPARE, "prepare", strategy.baseline_s + 60.0))
    if strategy.drill:
        steps.append(PlannedStep(Stage.PREPARE, "drill", start_timeout_s * 2 + DRILL_S))
    steps.append(PlannedStep(Stage.INFRASTRUCTURE, "start-candidate", start_timeout_s))
    if strategy.shadow_requests:
        steps.append(PlannedStep(Stage.CORE_LOGIC, "shadow", strategy.shadow_s))
    for canary in strategy.canary:
        if canary.share < 1:
            steps.append(PlannedStep(Stage.INTEGRATION, "cut-over", 0.0, canary.share, canary.seconds))
    steps.append(PlannedStep(Stage.OBSERVATION, "cut-over", 0.0, 1.0, strategy.observation_s))
    steps.append(PlannedStep(Stage.COMMIT, "commit", 0.0))
    if not strategy.approve:
        return steps
    stages = [Stage.PREPARE, *(step.stage for step in steps)]
    return [replace(step, gate=step.stage is not before) for step, before in zip(steps, stages, strict=False)]


def cold(steps: list[PlannedStep]) -> list[PlannedStep]:
    """The same where old and new don't fit together: there is nothing to compare with, and no share to give."""
    return [step for step in steps if step.step != "shadow" and (step.step != "cut-over" or step.share >= 1)]


def handing_over(steps: list[PlannedStep], hand_over_s: float) -> list[PlannedStep]:
    """The same for an agent that keeps state in memory: the candidate gets a copy before its answers are compared, and
    the state itself with all requests. A share of them would change two states apart from each other.
    """
    found: list[PlannedStep] = []
    for step in steps:
        if step.step == "cut-over" and step.share < 1:
            continue
        if step.step in ("shadow", "cut-over"):
            share = 1.0 if step.step == "cut-over" else 0.0
            found.append(PlannedStep(step.stage, "hand-over", hand_over_s, share, gate=step.gate))
        found.append(replace(step, gate=step.gate and step.step not in ("shadow", "cut-over")))
    return found


@dataclass(frozen=True)
class Terms:
    """What the operator accepts of this migration, and what prepare made of it.

    accept: the slowest class of rollback. sick_ok: the old revision may be sick. cold: it is stopped before the
    candidate starts. hand_over_s: seconds that the agent's state may take.
    """

    accept: str = ""
    sick_ok: bool = False
    cold: bool = False
    hand_over_s: float = 5.0


def command_of(
    step: PlannedStep,
    started: facts.MigrationStarted,
    strategy: StrategyConfig,
    terms: Terms,
    *,
    deadline: float,
    lease_s: float,
) -> commands.HostCommand:
    """What the host is asked for a step. `deadline` in seconds since 1970."""
    migration, agent, epoch = started.migration, started.agent, started.epoch
    match step.step:
        case "receive":
            return commands.Receive(
                migration=migration, agent=agent, epoch=epoch, deadline=deadline, to=started.to, source=started.host
            )
        case "prepare":
            return commands.Prepare(
                migration=migration, agent=agent, epoch=epoch, deadline=deadline,
                to=started.to, baseline_s=strategy.baseline_s, levels=list(strategy.backup),
                accept=terms.accept, sick_ok=terms.sick_ok, host=started.target,
            )  # fmt: skip
        case "drill":
            return commands.Drill(
                migration=migration, agent=agent, epoch=epoch, deadline=deadline,
                promise_s=strategy.promise_s, accept=terms.accept, cold=terms.cold,
            )  # fmt: skip
        case "start-candidate":
            return commands.StartCandidate(
                migration=migration, agent=agent, epoch=epoch, deadline=deadline, cold=terms.cold
            )
        case "shadow":
            return commands.Shadow(
                migration=migration, agent=agent, epoch=epoch, deadline=deadline,
                requests=strategy.shadow_requests, seconds=strategy.shadow_s,
                min_requests=strategy.shadow_min_requests,
                max_mismatches=strategy.shadow_max_mismatches,
            )  # fmt: skip
        case "cut-over":
            return commands.CutOver(
                migration=migration, agent=agent, epoch=epoch, deadline=deadline,
                share=step.share, lease_s=lease_s,
                warm_up_s=min(strategy.observe.warm_up_s, step.dwell_s / 4),
            )  # fmt: skip
        case "commit":
            return commands.Commit(migration=migration, agent=agent, epoch=epoch, deadline=deadline)
        case "hand-over":
            return commands.HandOver(
                migration=migration, agent=agent, epoch=epoch, deadline=deadline, route=step.share >= 1,
                promise_s=strategy.promise_s, lease_s=lease_s, accept=terms.accept,
            )  # fmt: skip
