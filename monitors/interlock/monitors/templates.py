"""Which metrics are read of an agent's processes, and how often: a template for each category of agent. Pure.

An agent that answers people needs other things watched closely than one that works through a queue. A fleet file may
move metrics from one tier to another, or turn them off, for one category: `[monitor.templates.CATEGORY]`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from interlock.broker.config import MonitorTemplate
from interlock.broker.errors import ConfigError
from interlock.monitors.sampler import Group

CPU = "agent_process_cpu_ratio"
RSS = "agent_process_memory_rss_bytes"
COUNT = "agent_process_count"
THREADS = "agent_process_threads"
FDS = "agent_process_fds"
CPU_TOTAL = "agent_process_cpu_seconds_total"
FAULTS = "agent_process_major_faults_total"
READ = "agent_process_io_read_bytes_total"
WRITTEN = "agent_process_io_written_bytes_total"
VOLUNTARY = "agent_process_voluntary_switches_total"
INVOLUNTARY = "agent_process_involuntary_switches_total"
PSS = "agent_process_memory_pss_bytes"
CGROUP_MEMORY = "agent_cgroup_memory_bytes"
CGROUP_CPU = "agent_cgroup_cpu_seconds_total"
CGROUP_OOM = "agent_cgroup_oom_kills_total"
STALLED = "agent_pressure_seconds_total"

_USUAL: dict[str, Group] = {
    CPU: Group.HOT,
    RSS: Group.HOT,
    COUNT: Group.CALM,
    THREADS: Group.CALM,
    FDS: Group.CALM,
    CPU_TOTAL: Group.CALM,
    FAULTS: Group.CALM,
    READ: Group.CALM,
    WRITTEN: Group.CALM,
    CGROUP_MEMORY: Group.CALM,
    CGROUP_CPU: Group.CALM,
    CGROUP_OOM: Group.CALM,
    STALLED: Group.CALM,
    VOLUNTARY: Group.SLOW,
    INVOLUNTARY: Group.SLOW,
}
METRICS = (*_USUAL, PSS)

# What differs from the usual. PSS is in none: it costs milliseconds for each GB, so somebody must ask for it.
_DIFFERENT: dict[str, dict[str, Group]] = {
    "voice": {THREADS: Group.HOT, STALLED: Group.HOT},  # what makes speech stutter
    "gpu-model": {CGROUP_MEMORY: Group.HOT},  # weights pass through the page cache of the host
    "service": {},
    "worker": {READ: Group.HOT, WRITTEN: Group.HOT},
    "utility": {CPU_TOTAL: Group.SLOW, FAULTS: Group.SLOW, READ: Group.SLOW, WRITTEN: Group.SLOW, STALLED: Group.SLOW},
}
CATEGORIES = tuple(_DIFFERENT)
DEFAULT = "service"  # of an agent that the fleet file does not name (any more)


@dataclass(frozen=True)
class Template:
    """The tier of each metric; one without is not read."""

    tiers: Mapping[str, Group]

    def due(self, groups: frozenset[Group]) -> frozenset[str]:
        """The metrics to read with these groups."""
        return frozenset(name for name, group in self.tiers.items() if group in groups)


def templates(changed: Mapping[str, MonitorTemplate], *, where: str = "") -> dict[str, Template]:
    """The template of each category, with what the fleet file changes. ConfigError for a metric nobody knows."""
    found = {}
    for category, different in _DIFFERENT.items():
        tiers = {**_USUAL, **different}
        if category in changed:
            _change(tiers, changed[category], f"{where}monitor.templates.{category}")
        found[category] = Template(tiers)
    for category in changed:
        if category not in found:
            raise ConfigError(
                f"there is no category {category!r}",
                where=f"{where}monitor.templates",
                hint=f"use one of {', '.join(CATEGORIES)}",
            )
    return found


def _change(tiers: dict[str, Group], changed: MonitorTemplate, where: str) -> None:
    named = {Group.HOT: changed.hot, Group.CALM: changed.calm, Group.SLOW: changed.slow, None: changed.off}
    seen: set[str] = set()
    for group, metrics in named.items():
        for metric in metrics:
            _check(metric, seen, where)
            seen.add(metric)
            tiers.pop(metric, None)
            if group is not None:
                tiers[metric] = group


def _check(metric: str, seen: set[str], where: str) -> None:
    if metric in seen:
        raise ConfigError(f"{metric} stands in two tiers", where=where, hint="name it once")
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "docs/metrics.md lists what there is of an agent's processes"
        raise ConfigError(f"{metric!r} is no metric of an agent's processes", where=where, hint=hint)
