"""The strategies of the fleet file: what a migration does, how long, and what is judged meanwhile."""

from __future__ import annotations

from typing import Literal

import msgspec

from interlock.broker.errors import ConfigError
from interlock.broker.fields import BackupLevel

Level = Literal["low", "medium", "high", "critical"]
StrategyName = Literal["rapid", "staged", "framework", "custom"]  # the later in the row, the more careful


class _Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class CanaryStep(_Config, frozen=True, kw_only=True):
    """A share of the live requests, and how long the candidate is watched at it."""

    share: float  # of live requests, 0 to 1
    seconds: float  # that it stays at this share at least


class ObserveConfig(_Config, frozen=True, kw_only=True):
    """When a candidate with live requests counts as good as the old one. Ratios of 1.

    Beyond *_failed for sure (with confidence 1 - alpha, however often one looks) it is rolled back; below *_passed it
    passes; what stays between is left to an operator at the end.
    """

    min_s: float | None = None  # enough evidence ends the observation after so long; left out: it takes its full time
    warm_up_s: float = 5.0  # a fresh process answers slowly at first: that does not count (at most a quarter of a step)
    requests: int = 0  # that a candidate must have answered; fewer at the end: inconclusive. 0: judged where there are
    alpha: float = 0.05  # the chance to condemn a candidate that is no worse
    latency_passed: float = 0.05  # longer than the old one's answers, in the geometric mean
    latency_failed: float = 0.15  # the same, for sure
    latency_slack_s: float = 0.005  # longer by no more than this is not worse, whatever the ratio: nobody notices
    errors_passed: float = 0.01  # share of requests
    errors_failed: float = 0.05  # the same, for sure
    slow_passed: float = 0.10  # share of answers slower than 19 of 20 were before: twice as many as then
    slow_failed: float = 0.15  # the same, for sure: three times as many
    failures: int = 0  # measurements that may fail; the next one condemns
    inconclusive: int = 1  # times that it is prolonged by a quarter, where at the end the checks say neither
    errors: int = 4  # measurements in a row, a second apart, that may not come about at the end
    memory_passed: float = 0.20  # more than the old one's, of RAM and of GPU memory


class StrategyConfig(_Config, frozen=True, kw_only=True):
    """What a strategy does, and for how long."""

    baseline_s: float = 2.0  # the old one is measured for this long before anything starts
    shadow_requests: int = 0  # mirrored and compared; 0: no shadow
    shadow_s: float = 30.0  # and at most for so long
    shadow_min_requests: int = 20  # fewer compared than this in that time: inconclusive, no pass
    shadow_max_mismatches: int = 0  # one answer more that differs, and it is rolled back
    canary: list[CanaryStep] = []  # shares before all requests go over; none: all at once
    observation_s: float = 60.0  # with all requests and the old one still warm, before it is made permanent
    observe: ObserveConfig = ObserveConfig()  # what is judged meanwhile
    approve: bool = False  # each stage after prepare begins when an operator approves it
    drill: bool = False  # the rollback is rehearsed and timed before anything moves
    backup: list[BackupLevel] = msgspec.field(default_factory=lambda: ["configuration", "code"])  # in prepare
    promise_s: float = 5.0  # a bad candidate is out of the way within this, from the sample that shows it


RAPID = StrategyConfig(baseline_s=1.0, observation_s=60.0, promise_s=10.0)
STAGED = StrategyConfig(
    baseline_s=5.0,
    shadow_requests=200,
    shadow_s=60.0,
    canary=[CanaryStep(share=0.1, seconds=30.0), CanaryStep(share=0.5, seconds=30.0)],
    observation_s=600.0,
    observe=ObserveConfig(requests=20),
)
FRAMEWORK = StrategyConfig(
    baseline_s=10.0,
    shadow_requests=500,
    shadow_s=120.0,
    canary=[CanaryStep(share=share, seconds=120.0) for share in (0.05, 0.25, 0.5)],
    observation_s=86_400.0,
    observe=ObserveConfig(requests=200, min_s=3600.0),
    drill=True,
    backup=["configuration", "code", "state", "host"],
)
CUSTOM = msgspec.structs.replace(FRAMEWORK, approve=True)
BUILT_IN: dict[StrategyName, StrategyConfig] = {
    "rapid": RAPID, "staged": STAGED, "framework": FRAMEWORK, "custom": CUSTOM,
}  # fmt: skip
STRATEGY_OF: dict[Level, StrategyName] = {
    "low": "rapid", "medium": "staged", "high": "framework", "critical": "custom",
}  # fmt: skip


def check_strategy(strategy: StrategyConfig, where: str) -> None:
    """ConfigError for what no number alone is wrong with."""
    shares = [step.share for step in strategy.canary]
    if shares != sorted(shares):
        raise ConfigError(f"the shares {shares} shrink", where=f"{where}.canary")
