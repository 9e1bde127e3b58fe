"""What a fleet publishes: its metrics, their labels, and how often samples come. docs/metrics.md explains each.

The coordinator imports neither hosts nor monitors; a test holds this table against their sources and the documentation.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

# between samples while a migration touches the host: monitor.migrating_s, monitor.idle_s, monitor.slow_s
HOT_S, CALM_S, SLOW_S = 0.1, 1.0, 10.0
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
    **_metrics("gpu_memory_reserved_bytes gpu_samples_total", _GPU, HOT_S, _PLUS),
    **_metrics("gpu_memory_used_ratio gpu_utilization_ratio gpu_memory_utilization_ratio", _GPU, HOT_S, _RATIO),
    **_metrics("gpu_sample_quality_ratio", _GPU, HOT_S, _RATIO),
    **_metrics("gpu_fault", f"{_GPU} kind", HOT_S, _FLAG),
    **_metrics("gpu_process_memory_bytes", f"{_GPU} agent revision role", CALM_S, _PLUS),
    **_metrics("gpu_unattributed_memory_bytes", f"{_GPU} holder", CALM_S, _PLUS),
    **_metrics("gpu_process_utilization_ratio", f"{_GPU} agent revision role", CALM_S, _RATIO),
    **_metrics("gpu_temperature_celsius gpu_memory_temperature_celsius", _GPU, CALM_S, _ANY),
    **_metrics("gpu_power_watts gpu_power_average_watts gpu_power_instant_watts", _GPU, CALM_S, _PLUS),
    **_metrics("gpu_energy_joules_total gpu_clock_event_reasons gpu_recovery_action", _GPU, CALM_S, _PLUS),
    **_metrics("gpu_ecc_uncorrected_errors_total gpu_ecc_corrected_errors_total", _GPU, CALM_S, _PLUS),
    **_metrics("gpu_pcie_sent_bytes_total gpu_pcie_received_bytes_total gpu_pcie_replays_total", _GPU, CALM_S, _PLUS),
    **_metrics("gpu_nvlink_sent_bytes_total gpu_nvlink_received_bytes_total", _GPU, CALM_S, _PLUS),
    **_metrics("gpu_sample_seconds", _GPU, CALM_S, _PLUS),
    **_metrics("gpu_nvlink_errors_total", f"{_GPU} kind", CALM_S, _PLUS),
    **_metrics("gpu_clock_hertz", f"{_GPU} clock", CALM_S, _PLUS),
    **_metrics("gpu_throttled", f"{_GPU} cause", CALM_S, _FLAG),
    **_metrics("gpu_xid_errors_total", f"{_GPU} cause", CALM_S, _PLUS),
    **_metrics("gpu_power_limit_watts gpu_pcie_link_generation gpu_pcie_link_lanes", _GPU, SLOW_S, _PLUS),
    **_metrics("gpu_ecc_lifetime_errors_total", f"{_GPU} kind", SLOW_S, _PLUS),
    **_metrics("gpu_remapped_rows", f"{_GPU} cause", SLOW_S, _PLUS),
    **_metrics("gpu_row_remap_pending gpu_row_remap_failed", _GPU, SLOW_S, _FLAG),
    **_metrics("gpu_fan_speed_ratio", f"{_GPU} fan", SLOW_S, _PLUS),
    **_metrics("gpu_reading_lacking", f"{_GPU} reading reason", SLOW_S, (1.0, 1.0)),
    **_metrics("gpu_mig_memory_used_bytes gpu_mig_memory_free_bytes", f"{_GPU} mig instance", HOT_S, _PLUS),
    **_metrics("gpu_mig_memory_total_bytes", f"{_GPU} mig instance", HOT_S, _PLUS),
    **_metrics("gpu_mig_memory_used_ratio", f"{_GPU} mig instance", HOT_S, _RATIO),
    **_metrics("gpu_driver_up gpu_driver_released gpu_kernel_log_readable", "host", CALM_S, _FLAG),
    **_metrics("gpu_sampler_restarts_total", "host", CALM_S, _PLUS),
    **_metrics("agent_process_cpu_ratio agent_process_memory_rss_bytes", _AGENT, HOT_S, _PLUS),
    **_metrics("agent_process_count agent_process_threads agent_process_fds", _AGENT, CALM_S, _PLUS),
    **_metrics("agent_process_cpu_seconds_total agent_process_major_faults_total", _AGENT, CALM_S, _PLUS),
    **_metrics("agent_process_io_read_bytes_total agent_process_io_written_bytes_total", _AGENT, CALM_S, _PLUS),
    **_metrics("agent_process_voluntary_switches_total", _AGENT, SLOW_S, _PLUS),
    **_metrics("agent_process_involuntary_switches_total agent_process_memory_pss_bytes", _AGENT, SLOW_S, _PLUS),
    **_metrics("agent_cgroup_memory_bytes agent_cgroup_cpu_seconds_total", _AGENT, CALM_S, _PLUS),
    **_metrics("agent_cgroup_oom_kills_total", _AGENT, CALM_S, _PLUS),
    **_metrics("agent_pressure_seconds_total", f"{_AGENT} resource", CALM_S, _PLUS),
    **_metrics("agent_cgroup_populated", _AGENT, CALM_S, _FLAG),
    **_metrics("agent_process_exits_total", "host agent", CALM_S, _PLUS),
    **_metrics("host_memory_available_bytes host_memory_total_bytes", "host", HOT_S, _PLUS),
    **_metrics("host_swap_used_bytes host_swap_total_bytes host_load1 host_load5 host_cpus", "host", CALM_S, _PLUS),
    **_metrics("host_context_switches_total host_processes_blocked", "host", CALM_S, _PLUS),
    **_metrics("monitor_missed_samples_total", "host", CALM_S, _PLUS),
    **_metrics("host_cpu_ratio", "host", CALM_S, _RATIO),
    **_metrics("host_cpu_core_ratio", "host core", CALM_S, _RATIO),
    **_metrics("host_pressure_ratio", "host resource share", CALM_S, _RATIO),
    **_metrics("host_pressure_seconds_total", "host resource share", CALM_S, _PLUS),
    **_metrics("host_pressure_stalls_total", "host resource", CALM_S, _PLUS),
    **_metrics("monitor_events_permitted", "host source", CALM_S, _FLAG),
    **_metrics("host_disk_free_bytes host_disk_total_bytes", "host path", SLOW_S, _PLUS),
    **_metrics("host_disk_read_bytes_total host_disk_written_bytes_total", "host device", SLOW_S, _PLUS),
    **_metrics("host_disk_busy_seconds_total", "host device", SLOW_S, _PLUS),
    **_metrics("host_network_received_bytes_total host_network_sent_bytes_total", "host interface", SLOW_S, _PLUS),
    **_metrics("host_network_errors_total host_network_dropped_total", "host interface", SLOW_S, _PLUS),
    **_metrics("cadence_lease_seconds", "host touched migration", CALM_S, _PLUS),
    **_metrics("agent_up agent_active", _AGENT, HOT_S, _FLAG),
    **_metrics("agent_requests_total agent_errors_total agent_in_flight agent_health_failures", _AGENT, HOT_S, _PLUS),
    **_metrics("agent_gpu_reserved_bytes agent_gpu_leaked_bytes", "host agent revision uuid", HOT_S, _PLUS),
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
PER_LABEL = {
    "gpu": 1, "role": 2, "quantile": 3, "path": 1, "direction": 2, "link": 4, "resource": 3, "share": 2, "core": 16,
    "device": 2, "interface": 2, "holder": 2, "clock": 4, "cause": 3, "fan": 2, "mig": 2, "reading": 4,
}  # fmt: skip


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
