"""The steps of a migration in order, as its strategy has them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from interlock.broker.commands import Step
from interlock.broker.config import StrategyConfig

DRILL_S = 60.0  # for a rehearsal, beside two starts: the slowest level of a rollback takes as long


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


def plan(strategy: StrategyConfig, *, start_timeout_s: float) -> list[PlannedStep]:
    """The steps of a strategy in order; the first stage a strategy leaves out is simply not there."""
    steps = [PlannedStep(Stage.PREPARE, "prepare", strategy.baseline_s + 60.0)]
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
