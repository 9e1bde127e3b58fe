"""What a migration would do, before it is asked for. Pure: the coordinator's own case and plan, put into words.

Nothing here decides. The request is weighed by `admission.py`, the steps come from `migration.plan`: what is shown is
what the coordinator would do with the same fleet file and the same log.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from interlock.broker import commands
from interlock.broker.config import CoordinatorConfig
from interlock.broker.errors import InterlockError
from interlock.broker.strategies import BUILT_IN, STRATEGY_OF, Level, ObserveConfig, StrategyConfig
from interlock.coordinator.admission import Case
from interlock.coordinator.fleet import Agent
from interlock.coordinator.steps import PlannedStep, Stage, handing_over, plan


@dataclass(frozen=True)
class Promise:
    """Within how many seconds a bad candidate is out of the way, and where that figure comes from."""

    seconds: float
    source: str
    rehearsed: bool


@dataclass(frozen=True)
class SourceRisk:
    """The risk of the revision by its source: points, level, what holds and where; `problem`: why it can't run."""

    score: int
    level: Level
    weighed: float
    factors: list[str]
    problem: str = ""


@dataclass(frozen=True)
class StagePlan:
    """One stage. Seconds: if every answer comes at once, and if every limit is used up. gate: it waits for approval."""

    stage: str
    steps: list[str]
    checks: list[str]
    least_s: float
    most_s: float
    gate: bool


@dataclass(frozen=True)
class Forecast:
    """The whole. left_out: what is not possible for this agent. target: the host
    that it moves to. refused: why it would not begin now, if so."""

    agent: str
    host: str
    previous: str
    to: str
    risk: str
    strategy: str
    due: str
    why: str
    promise: Promise
    backup: list[str]
    stages: list[StagePlan]
    deviations: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    target: str = ""
    refused: list[str] = field(default_factory=list)
    source: SourceRisk | None = None

    @property
    def under_source(self) -> str:
        """The strategy that the source is due, if that is more careful than what is due; else empty."""
        order: list[str] = list(BUILT_IN)
        by_source = STRATEGY_OF[self.source.level] if self.source is not None else self.due
        return by_source if order.index(self.due) < order.index(by_source) else ""

    @property
    def least_s(self) -> float:
        return sum(stage.least_s for stage in self.stages)

    @property
    def most_s(self) -> float:
        return sum(stage.most_s for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"least_s": self.least_s, "most_s": self.most_s}


def forecast(
    asked: commands.Migrate, case: Case, slot: Agent | None, *, risk: Level | None, config: CoordinatorConfig
) -> Forecast:
    strategy = case.settings.strategy
    steps = plan(strategy, start_timeout_s=case.settings.start_timeout_s, moves=bool(case.target))
    if slot is not None and slot.hands_over:
        steps = handing_over(steps, case.settings.hand_over_s)
    stages = [_stage(stage, steps, strategy, config) for stage in Stage if any(step.stage is stage for step in steps)]
    return Forecast(
        agent=asked.agent,
        host=case.agent.host,
        target=case.target,
        previous=case.previous,
        to=asked.to,
        risk=risk or "",
        strategy=case.choice.strategy,
        due=case.choice.due,
        why=case.choice.why,
        promise=promise(strategy, case, slot, asked.to),
        backup=list(strategy.backup),
        stages=stages,
        deviations=case.deviations,
        left_out=list(case.settings.left_out),
        refused=[_sentence(error) for error in case.objections],
    )


def promise(strategy: StrategyConfig, case: Case, slot: Agent | None, to: str) -> Promise:
    """What the last drill's first level took, if it was of one of the two revisions; else the strategy's figure."""
    drill = slot.drill if slot is not None else None
    if drill is None:
        return Promise(strategy.promise_s, f"strategy {case.choice.strategy} says so; nobody has rehearsed it", False)
    if drill.problems:
        problem = "; ".join(drill.problems)
        return Promise(
            strategy.promise_s, f"strategy {case.choice.strategy} says so; the drill failed: {problem}", False
        )
    if drill.revision not in (case.previous, to) or not drill.seconds:
        said = f"strategy {case.choice.strategy} says so; the drill was of {drill.revision}"
        return Promise(strategy.promise_s, said, False)
    levels = ", ".join(f"level {level} took {seconds:.2f} s" for level, seconds in sorted(drill.seconds.items()))
    return Promise(drill.seconds[min(drill.seconds)], f"measured in a drill of {drill.revision}: {levels}", True)


def _stage(stage: Stage, steps: list[PlannedStep], strategy: StrategyConfig, config: CoordinatorConfig) -> StagePlan:
    mine = [step for step in steps if step.stage is stage]
    least = sum(_least(step, strategy) for step in mine)
    most = sum(step.time_s + config.step_margin_s + step.dwell_s for step in mine)
    if any(step.gate for step in mine):
        most += config.approval_s
    return StagePlan(
        stage=stage,
        steps=[_words(step) for step in mine],
        checks=_checks(stage, mine, strategy),
        least_s=least,
        most_s=most,
        gate=any(step.gate for step in mine),
    )


def _least(step: PlannedStep, strategy: StrategyConfig) -> float:
    if step.step == "prepare":
        return strategy.baseline_s
    if step.stage is Stage.OBSERVATION and strategy.observe.min_s is not None:
        return min(step.dwell_s, strategy.observe.min_s)
    return step.dwell_s


def _words(step: PlannedStep) -> str:
    if step.step == "cut-over":
        return f"{step.share:.0%} of the requests" + (f" for {step.dwell_s:g} s" if step.dwell_s else "")
    if step.step == "receive":
        return "the other host looks at the revision, and whether there is room for it"
    if step.step == "hand-over":
        what = "the state in memory" if step.share >= 1 else "a copy of the state in memory"
        return f"hand over {what}: requests wait, for {step.time_s:g} s at most"
    return step.step


def _checks(stage: Stage, steps: list[PlannedStep], strategy: StrategyConfig) -> list[str]:
    """What must hold to go on."""
    match stage:
        case Stage.PREPARE:
            checks = ["preflight", f"backup of {', '.join(strategy.backup)}", f"baseline of {strategy.baseline_s:g} s"]
            drilled = any(step.step == "drill" for step in steps)
            return checks + [f"a drill within {strategy.promise_s:g} s"] * drilled
        case Stage.INFRASTRUCTURE:
            return [f"healthy within {steps[-1].time_s:g} s, and handles what the old one handles"]
        case Stage.CORE_LOGIC:
            return [
                f"{strategy.shadow_requests} requests compared within {strategy.shadow_s:g} s, at least "
                f"{strategy.shadow_min_requests}, and at most {strategy.shadow_max_mismatches} different"
            ]
        case Stage.INTEGRATION | Stage.OBSERVATION:
            checks = ["no rule fires, the process lives, its health checks pass"]
            return checks + (_judged(strategy.observe) if stage is Stage.OBSERVATION else [])
        case Stage.COMMIT:
            return []


def _judged(observe: ObserveConfig) -> list[str]:
    requests = f"at least {observe.requests} requests answered; " if observe.requests else ""
    bad = f"latency less than {observe.latency_passed:.0%} worse, errors below {observe.errors_passed:.0%}"
    early = f"; enough evidence ends it after {observe.min_s:g} s" if observe.min_s is not None else ""
    return [f"{requests}{bad}, at most {observe.memory_passed:.0%} more memory{early}"]


def _sentence(error: InterlockError) -> str:
    return str(error)
