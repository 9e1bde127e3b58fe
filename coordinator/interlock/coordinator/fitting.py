"""What of a strategy an agent can go through: not every kind has requests to mirror, or to share out. Pure."""

from __future__ import annotations

import msgspec

from interlock.broker.config import AgentConfig
from interlock.broker.strategies import StrategyConfig


def fitted(
    strategy: StrategyConfig, agent: AgentConfig, *, hands_over: bool = False
) -> tuple[StrategyConfig, list[str]]:
    """The strategy without what is not possible for this agent, and a line of why for each stage that is left out.

    hands_over: it keeps state in memory.
    """
    left_out: list[str] = []
    if strategy.shadow_requests and agent.serves != "requests":
        why = "a TCP agent has connections, no requests to mirror"
        if agent.serves == "nothing":
            why = "an agent without a port has no requests to mirror"
        left_out.append(f"shadow is not possible: {why}")
        strategy = msgspec.structs.replace(strategy, shadow_requests=0)
    if strategy.canary and agent.serves == "nothing":
        left_out.append("canary is not possible: an agent without a port has one active instance, nothing to share out")
        strategy = msgspec.structs.replace(strategy, canary=[])
    if strategy.canary and hands_over:
        left_out.append("canary is not possible: it keeps state in memory, which only one instance can have")
        strategy = msgspec.structs.replace(strategy, canary=[])
    if strategy.observe.requests and agent.serves != "requests":
        left_out.append("the checks of latency and errors are not possible: it answers no requests of clients")
        observe = msgspec.structs.replace(strategy.observe, requests=0)
        strategy = msgspec.structs.replace(strategy, observe=observe)
    return strategy, left_out
