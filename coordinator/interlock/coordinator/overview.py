"""Hosts, GPUs and agents as the telemetry plane tells of them now. Pure: the time (monotonic, seconds) is an argument.

Silence is not health: what was heard too long ago is told as silent, with its age, and never as if it were so now.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec

from interlock.broker.samples import NAME, Batch, Labels, SeriesReader

SILENT_S = 3.0  # without a word; monitors and hosts speak once a second at least
RATE_S = 1.0  # over which requests for each second are counted, at least
KEPT_S = 5.0  # of a counter's past
MAX_SERIES = 200_000  # that are looked at; a larger fleet is looked at host by host

State = Literal["ok", "busy", "down", "silent"]


class HostRow(msgspec.Struct, frozen=True, kw_only=True):
    """A host. Ratios are of 1, memory in bytes; None: it does not say. age_s: since its monitor spoke last."""

    host: str
    state: State
    age_s: float | None
    cpu_ratio: float | None
    load_per_core: float | None
    memory_used_ratio: float | None
    memory_total_bytes: float | None
    swap_used_bytes: float | None
    pressure_ratio: float | None
    agents: int
    gpus: int
    fast: bool


class GpuRow(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU. unattributed_bytes: memory of no agent."""

    host: str
    gpu: str
    uuid: str
    state: State
    memory_used_bytes: float | None
    memory_total_bytes: float | None
    memory_used_ratio: float | None
    utilization_ratio: float | None
    temperature_celsius: float | None
    power_watts: float | None
    unattributed_bytes: float | None


class AgentRow(msgspec.Struct, frozen=True, kw_only=True):
    """An instance of an agent. cpu: cores. requests_per_s: None while there are not two samples of them."""

    agent: str
    host: str
    revision: str
    role: str
    state: State
    cpu: float | None
    memory_bytes: float | None
    gpu_memory_bytes: float | None
    processes: float | None
    requests_per_s: float | None
    errors_per_s: float | None
    p95_s: float | None
    in_flight: float | None


class View(msgspec.Struct, frozen=True, kw_only=True):
    """All of it at one moment. left_out: series beyond what is looked at."""

    hosts: list[HostRow]
    gpus: list[GpuRow]
    agents: list[AgentRow]
    left_out: int = 0


Sort = Literal["name", "cpu", "memory", "gpu", "requests"]
_KEYS: dict[Sort, Callable[[AgentRow], float]] = {
    "cpu": lambda row: row.cpu or 0.0,
    "memory": lambda row: row.memory_bytes or 0.0,
    "gpu": lambda row: row.gpu_memory_bytes or 0.0,
    "requests": lambda row: row.requests_per_s or 0.0,
}


class _Series:
    """The newest value of one series, and the past of a counter."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.value = 0.0
        self.time = 0.0
        self.past: list[tuple[float, float]] = []

    def add(self, time: float, value: float, *, counts: bool) -> None:
        self.time, self.value = time, value
        if counts:
            self.past = [point for point in self.past if time - point[0] <= KEPT_S] + [(time, value)]

    @property
    def rate(self) -> float | None:
        """For each second, over the last `RATE_S` or little more."""
        for then, value in reversed(self.past):
            if self.time - then >= RATE_S * 0.95:  # a second by the publisher's clock is never exactly one
                return max(0.0, self.value - value) / (self.time - then)
        return None


_COUNTED = ("agent_requests_total", "agent_errors_total")


class Overview:
    """Batches in, rows out. `hosts`: those that the fleet file names, which are shown though nobody tells of them."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self._hosts = list(hosts)
        self._reader = SeriesReader()
        self._series: dict[Labels, _Series] = {}
        self._heard: OrderedDict[str, float] = OrderedDict()  # by source
        self._left_out = 0

    def take(self, batch: Batch, now: float) -> None:
        """What came now, and what the broker remembered of before."""
        samples, ended = self._reader.read(batch)
        self._heard[batch.source] = max(self._heard.get(batch.source, float("-inf")), now - batch.delay)
        for key in ended:
            self._series.pop(key, None)
        for key, value in samples:
            known = self._series.get(key)
            if known is None:
                if len(self._series) >= MAX_SERIES:
                    self._left_out += 1
                    continue
                known = self._series[key] = _Series(batch.source)
            known.source = batch.source
            known.add(batch.time, value, counts=dict(key)[NAME] in _COUNTED)

    def view(self, now: float, *, sort: Sort = "name") -> View:
        """As it stands; agents by name, or the largest first."""
        hosts: dict[str, dict[str, float]] = {name: {} for name in self._hosts}
        gpus: dict[tuple[str, str, str], dict[str, float]] = {}
        agents: dict[tuple[str, str, str, str], dict[str, _Series | float]] = {}
        for key, series in self._series.items():
            of = dict(key)
            name, host = of[NAME], of.get("host", "")
            if {"agent", "revision", "role"} <= of.keys():
                row = agents.setdefault((of["agent"], host, of["revision"], of["role"]), {})
                _gather_agent(row, name, of, series)
            elif "uuid" in of and "gpu" in of:
                card = gpus.setdefault((host, of["gpu"], of["uuid"]), {})
                card[name] = card.get(name, 0.0) + series.value if "holder" in of else series.value
            elif series.source == f"{host}/monitor":
                _gather_host(hosts.setdefault(host, {}), name, of, series.value)
            elif name == "cadence_lease_seconds":
                hosts.setdefault(of.get("touched", ""), {})[name] = series.value
        counts = _counts(agents), _counts(gpus)
        rows = [self._agent(key, row, now) for key, row in sorted(agents.items())]
        if sort in _KEYS:
            rows.sort(key=_KEYS[sort], reverse=True)
        return View(
            hosts=[self._host(name, row, now, counts) for name, row in sorted(hosts.items())],
            gpus=[self._gpu(key, row, now) for key, row in sorted(gpus.items())],
            agents=rows,
            left_out=self._left_out,
        )

    # --- rows

    def _age(self, source: str, now: float) -> float | None:
        heard = self._heard.get(source)
        return None if heard is None else max(0.0, now - heard)

    def _is_silent(self, source: str, now: float) -> bool:
        age = self._age(source, now)
        return age is None or age > SILENT_S

    def _host(
        self, host: str, row: Mapping[str, float], now: float, counts: tuple[Mapping[str, int], Mapping[str, int]]
    ) -> HostRow:
        source = f"{host}/monitor"
        age, load, cores = self._age(source, now), row.get("host_load1"), row.get("host_cpus")
        total, available = row.get("host_memory_total_bytes"), row.get("host_memory_available_bytes")
        pressure = row.get("host_pressure_ratio")
        state: State = "silent" if self._is_silent(source, now) else "busy" if (pressure or 0) > 0.2 else "ok"
        return HostRow(
            host=host, state=state, age_s=None if age is None else round(age, 3), cpu_ratio=row.get("host_cpu_ratio"),
            load_per_core=load / cores if load is not None and cores else None,
            memory_used_ratio=1 - available / total if available is not None and total else None,
            memory_total_bytes=total, swap_used_bytes=row.get("host_swap_used_bytes"), pressure_ratio=pressure,
            agents=counts[0].get(host, 0), gpus=counts[1].get(host, 0), fast="cadence_lease_seconds" in row,
        )  # fmt: skip

    def _gpu(self, key: tuple[str, str, str], row: Mapping[str, float], now: float) -> GpuRow:
        host, gpu, uuid = key
        down = row.get("gpu_up") == 0
        return GpuRow(
            host=host, gpu=gpu, uuid=uuid,
            state="silent" if self._is_silent(f"{host}/monitor", now) else "down" if down else "ok",
            memory_used_bytes=row.get("gpu_memory_used_bytes"), memory_total_bytes=row.get("gpu_memory_total_bytes"),
            memory_used_ratio=row.get("gpu_memory_used_ratio"), utilization_ratio=row.get("gpu_utilization_ratio"),
            temperature_celsius=row.get("gpu_temperature_celsius"), power_watts=row.get("gpu_power_watts"),
            unattributed_bytes=row.get("gpu_unattributed_memory_bytes"),
        )  # fmt: skip

    def _agent(self, key: tuple[str, str, str, str], row: Mapping[str, _Series | float], now: float) -> AgentRow:
        agent, host, revision, role = key

        def value(name: str) -> float | None:
            found = row.get(name)
            return found.value if isinstance(found, _Series) else found

        def rate(name: str) -> float | None:
            found = row.get(name)
            return found.rate if isinstance(found, _Series) else None

        silent = self._is_silent(f"{host}/host", now)
        return AgentRow(
            agent=agent, host=host, revision=revision, role=role,
            state="silent" if silent else "down" if value("agent_up") == 0 else "ok",
            cpu=value("agent_process_cpu_ratio"), memory_bytes=value("agent_process_memory_rss_bytes"),
            gpu_memory_bytes=value("gpu_process_memory_bytes"), processes=value("agent_process_count"),
            requests_per_s=rate("agent_requests_total"), errors_per_s=rate("agent_errors_total"),
            p95_s=value("agent_response_seconds"), in_flight=value("agent_in_flight"),
        )  # fmt: skip


def _gather_agent(row: dict[str, _Series | float], name: str, of: Mapping[str, str], series: _Series) -> None:
    if name == "gpu_process_memory_bytes":  # of each card that it uses
        before = row.get(name, 0.0)
        row[name] = series.value + (before if isinstance(before, float) else 0.0)
    elif name != "agent_response_seconds" or of.get("quantile") == "0.95":
        row[name] = series


def _gather_host(row: dict[str, float], name: str, of: Mapping[str, str], value: float) -> None:
    if name == "host_pressure_ratio":
        # processors are always wanted by somebody; memory and disks are what makes everything stand still
        if of.get("share") == "some" and of.get("resource") in ("memory", "io"):
            row[name] = max(row.get(name, 0.0), value)
    elif not of.keys() - {NAME, "host"}:
        row[name] = value


def _counts(rows: Iterable[tuple[str, ...]]) -> dict[str, int]:
    """How many different agents (key: agent, host, ...) or cards (host, gpu, uuid) each host has."""
    seen: dict[str, set[str]] = {}
    for key in rows:
        host, what = (key[1], key[0]) if len(key) == 4 else (key[0], key[1])
        seen.setdefault(host, set()).add(what)
    return {host: len(found) for host, found in seen.items()}
