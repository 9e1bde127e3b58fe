"""What a host says of its agents in telemetry, from the figures of their gateways. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from interlock.agents.latency import SHORTEST_S, InstanceFigures, quantile
from interlock.broker.facts import Role
from interlock.broker.samples import Labels, labels

BASELINE_QUANTILES = (0.5, 0.95, 0.99)
NOTICED_S = 0.005  # a shorter delay is the machine's own unrest
MIN_BASELINE = 20  # answers; of fewer there is no baseline to compare with, which the evidence says


@dataclass
class InstanceView:
    """One instance as telemetry sees it."""

    revision: str
    role: Role
    up: bool = False
    failures: int = 0  # health checks failed in a row
    metrics: dict[str, float] = field(default_factory=dict)  # the agent's own


def baseline(latencies: list[float]) -> dict[str, float] | None:
    """Quantiles in seconds by their name; None if too few answers were seen."""
    if len(latencies) < MIN_BASELINE:
        return None
    ordered = sorted(latencies)
    return {str(q): quantile(ordered, q) for q in BASELINE_QUANTILES}


def measured(latencies: list[float]) -> dict[str, float | None]:
    """What an observation compares with: count, sums of logarithms of seconds, and how slow 19 of 20 were at most."""
    logarithms = [math.log(max(latency, SHORTEST_S)) for latency in latencies]
    return {
        "requests": len(latencies),
        "log_sum": math.fsum(logarithms),
        "log_squares_sum": math.fsum(value * value for value in logarithms),
        "slow_s": slow if math.isfinite(slow := slow_threshold(baseline(latencies))) else None,
    }


def slow_threshold(recorded: Mapping[str, float] | None) -> float:
    """What counts as slow: longer than 19 of 20 answers took, by more than anybody would notice. Infinity: unknown."""
    return (recorded or {}).get("0.95", math.inf) + NOTICED_S


def samples(
    host: str,
    agent: str,
    views: Mapping[str, InstanceView],
    figures: Mapping[str, InstanceFigures],
    recorded: Mapping[str, float] | None,
    *,
    trial: bool = False,
) -> dict[Labels, float]:
    """All series of one agent at one moment. `recorded` is the baseline of a migration in flight; `trial`: one is."""
    found: dict[Labels, float] = {}
    for instance, view in views.items():
        of = {"host": host, "agent": agent, "revision": view.revision, "role": view.role}
        found[labels("agent_up", **of)] = float(view.up)
        found[labels("agent_health_failures", **of)] = float(view.failures)
        for name, value in view.metrics.items():
            found[labels(f"agent_{name}", **of)] = value
        seen = figures.get(instance)
        if seen is None:
            continue
        if seen.connections is not None:
            found[labels("agent_connections", **of)] = float(seen.connections)
            found[labels("agent_connections_total", **of)] = float(seen.connections_total)
            found[labels("agent_connection_bytes_total", direction="in", **of)] = float(seen.bytes_in)
            found[labels("agent_connection_bytes_total", direction="out", **of)] = float(seen.bytes_out)
        if seen.active is not None:
            found[labels("agent_active", **of)] = float(seen.active)
            continue  # there are no requests
        found[labels("agent_requests_total", **of)] = float(seen.requests)
        found[labels("agent_errors_total", **of)] = float(seen.errors)
        found[labels("agent_in_flight", **of)] = float(seen.in_flight)
        found[labels("agent_oldest_request_seconds", **of)] = seen.oldest_s
        for quantile_name, latency in (("0.5", seen.p50), ("0.95", seen.p95), ("0.99", seen.p99)):
            if latency is not None:
                found[labels("agent_response_seconds", quantile=quantile_name, **of)] = latency
        for name, count in msgspec.structs.asdict(seen.trial).items() if seen.trial is not None and trial else ():
            suffix = "" if name.endswith("_sum") else "_total"
            found[labels(f"agent_trial_{name.replace('log_', 'log_seconds_')}{suffix}", **of)] = float(count)
        if seen.compared or seen.dropped or seen.unjudged:
            found[labels("agent_shadow_compared_total", **of)] = float(seen.compared)
            found[labels("agent_shadow_mismatches_total", **of)] = float(seen.mismatches)
            found[labels("agent_shadow_dropped_total", **of)] = float(seen.dropped)
            found[labels("agent_shadow_errors_total", **of)] = float(seen.unjudged)
    for quantile_name, latency in (recorded or {}).items():
        key = labels("agent_response_baseline_seconds", host=host, agent=agent, quantile=quantile_name)
        found[key] = latency
    return found
