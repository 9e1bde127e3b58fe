"""What a fleet publishes: its metrics, their labels, and how often samples come. docs/metrics.md explains each.

The coordinator imports neither hosts nor monitors; a test holds this table against their sources and the documentation.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

HOT_S, CALM_S = 0.1, 1.0  # between samples while a migration touches the host: monitor.migrating_s, monitor.idle_s
OWN_PREFIX = "agent_"  # what agents report of themselves begins like this
LIKENESS = 0.87  # from which on an unknown name is taken for a slip: agent_response_second, but not agent_queue


@dataclass(frozen=True)
class Metric:
    """`every_s`: between samples, at most often. `bounds`: no reading is outside."""

    labels: frozenset[str]
    every_s: float = HOT_S
    bounds: tuple[float, float] = (0.0, float("inf"))


def _metrics(names: str, labels: str, every_s: float, bounds: tuple[float, float]) -> dict[str, Metric]:
    return {name: Metric(frozenset(labels.split()), every_s, bounds) for name in names.split()}


_ANY, _PLUS, _FLAG, _RATIO = (float("-inf"), float("inf")), (0.0, float("inf")), (0.0, 1.0), (0.0, 1.0)
_GPU, _AGENT, _CUT = "host gpu uuid", "host agent revision role", "host agent revision role quantile"
_RULES = "host partition"

METRICS: dict[str, Metric] = {
    **_metrics("gpu_up", _GPU, HOT_S, _FLAG),
    **_metrics("gpu_memory_used_bytes gpu_memory_free_bytes gpu_memory_total_bytes", _GPU, HOT_S, _PLUS),
    **_metrics("gpu_memory_used_ratio gpu_utilization_ratio", _GPU, HOT_S, _RATIO),
    **_metrics("gpu_process_memory_bytes", f"{_GPU} agent revision role", HOT_S, _PLUS),
    **_metrics("gpu_temperature_celsius", _GPU, CALM_S, _ANY),
    **_metrics("gpu_power_watts gpu_power_limit_watts gpu_ecc_uncorrected_errors_total", _GPU, CALM_S, _PLUS),
    **_metrics("gpu_driver_up", "host", CALM_S, _FLAG),
    **_metrics("agent_process_cpu_ratio agent_process_memory_rss_bytes", _AGENT, HOT_S, _PLUS),
    **_metrics("agent_process_count agent_process_threads agent_process_fds", _AGENT, CALM_S, _PLUS),
    **_metrics("host_memory_available_bytes host_memory_total_bytes", "host", HOT_S, _PLUS),
    **_metrics("host_swap_used_bytes host_load1 host_cpus monitor_missed_samples_total", "host", CALM_S, _PLUS),
    **_metrics("host_cpu_ratio", "host", CALM_S, _RATIO),
    **_metrics("host_disk_free_bytes", "host path", CALM_S, _PLUS),
    **_metrics("agent_up agent_active", _AGENT, HOT_S, _FLAG),
    **_metrics("agent_requests_total agent_errors_total agent_in_flight agent_health_failures", _AGENT, HOT_S, _PLUS),
    **_metrics("agent_category", "host agent category", HOT_S, (1.0, 1.0)),
    **_metrics("agent_response_seconds", _CUT, HOT_S, _PLUS),
    **_metrics("agent_response_baseline_seconds", "host agent quantile", HOT_S, _PLUS),
    **_metrics("agent_trial_requests_total agent_trial_errors_total agent_trial_slow_total", _AGENT, HOT_S, _PLUS),
    **_metrics("agent_trial_log_seconds_sum agent_trial_log_seconds_squares_sum", _AGENT, HOT_S, _ANY),
    **_metrics("agent_oldest_request_seconds agent_shadow_compared_total", _AGENT, HOT_S, _PLUS),
    **_metrics("agent_shadow_mismatches_total agent_shadow_dropped_total", _AGENT, HOT_S, _PLUS),
    **_metrics("agent_shadow_errors_total agent_connections agent_connections_total", _AGENT, HOT_S, _PLUS),
    **_metrics("agent_connection_bytes_total", f"{_AGENT} direction", HOT_S, _PLUS),
    **_metrics("rules_samples_total rules_evaluations_total rules_evaluation_errors_total", _RULES, CALM_S, _PLUS),
    **_metrics("rules_unresolved_total rules_batches_lost_total rules_late_total", _RULES, CALM_S, _PLUS),
    **_metrics("rules_malformed_total rules_reload_errors_total rules_series_refused_total", _RULES, CALM_S, _PLUS),
    **_metrics("rules_claims_total rules_alerts_firing", _RULES, CALM_S, _PLUS),
    **_metrics("role_up", "host role name", 0.5, _FLAG),
    **_metrics("bus_dropped_total bus_link_up", "host link", 0.5, _PLUS),
    **_metrics("bus_lost_total", "host link source", 0.5, _PLUS),
    **_metrics("bus_batches_total bus_repeated_total bus_remembered_sources", "host", 0.5, _PLUS),
    **_metrics("bus_remembered_series bus_not_remembered_total", "host", 0.5, _PLUS),
    **_metrics("bus_rejected_total", "host link kind", 0.5, _PLUS),
}
# How many series a metric has: what one value of each label is multiplied with.
PER_LABEL = {"gpu": 1, "role": 2, "quantile": 3, "path": 1, "direction": 2, "link": 4}


@dataclass(frozen=True)
class Size:
    """The fleet that costs are estimated for."""

    hosts: int
    agents: int
    gpus: int

    def series(self, metric: Metric) -> int:
        """How many series of a metric there are, while each agent has a candidate beside it."""
        labels = metric.labels
        count = self.agents if "agent" in labels else self.gpus if "gpu" in labels else self.hosts
        for label, times in PER_LABEL.items():
            if label in labels and label != "gpu":
                count *= times
        return max(count, 1)


def nearest(name: str, also: Iterable[str]) -> str:
    """The known name that was probably meant; empty if there is none."""
    found = difflib.get_close_matches(name, [*METRICS, *also], n=1, cutoff=LIKENESS)
    return found[0] if found else ""
