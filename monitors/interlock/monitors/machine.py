"""The machine as a whole: the only module that imports psutil, for what is not worth a file of our own.

Readings are keyed by metric name, or by name and labels where there are several of one name. One that the machine does
not give is absent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from interlock.monitors import procfs
from interlock.monitors.procfs import PROC, TICK_S, KeptFile

MAX_LISTED = 64  # cores, disks or interfaces with series of their own; a machine with more has the sums only
UNREAL_DISKS = ("loop", "ram", "zram", "fd", "sr")  # what holds no disk's bytes, or holds another's again
RESOURCES = ("cpu", "memory", "io")

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _plain(values: Mapping[str, float]) -> Values:
    return {(name, ()): value for name, value in values.items()}


class Machine:
    """Remembers the CPU times of the last sample. Blocks for less than a millisecond, `disks` for a few."""

    def __init__(self, folder: Path, proc: str = PROC) -> None:
        self._folder = folder
        self._memory = KeptFile(f"{proc}/meminfo")
        self._load = KeptFile(f"{proc}/loadavg")
        self._stat = KeptFile(f"{proc}/stat")
        self._pressure = {name: KeptFile(f"{proc}/pressure/{name}") for name in RESOURCES}
        self._cpu: dict[str, tuple[float, float]] = {}

    def memory(self) -> Values:
        """Bytes; what shows first that a machine runs full."""
        found = self._meminfo()
        wanted = {"host_memory_total_bytes": "MemTotal", "host_memory_available_bytes": "MemAvailable"}
        return _plain({name: found[key] * 1024 for name, key in wanted.items() if key in found})

    def load(self) -> Values:
        """Load, CPU in all and by core, swap, and where tasks stood still for lack of something."""
        values: dict[str, float] = {"host_cpus": os.cpu_count() or 1}
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = self._load.read().split()
            values |= {"host_load1": float(words[0]), "host_load5": float(words[1])}
        memory = self._meminfo()
        if "SwapTotal" in memory and "SwapFree" in memory:
            values["host_swap_total_bytes"] = memory["SwapTotal"] * 1024
            values["host_swap_used_bytes"] = (memory["SwapTotal"] - memory["SwapFree"]) * 1024
        return _plain(values) | self._cpus() | self.pressure()

    def pressure(self) -> Values:
        """Pressure stall information; absent where the kernel was built or started without it."""
        found: Values = {}
        for resource, share, ratio, seconds in procfs.read_pressure(self._pressure):
            of = (("resource", resource), ("share", share))
            found["host_pressure_ratio", of] = ratio
            found["host_pressure_seconds_total", of] = seconds
        return found

    def disks(self) -> Values:
        """Room where the state is, and what went to and from disks and networks since the machine started."""
        found: Values = {}
        with contextlib.suppress(OSError):
            usage = psutil.disk_usage(str(self._folder))
            of = (("path", str(self._folder)),)
            found["host_disk_free_bytes", of] = usage.free
            found["host_disk_total_bytes", of] = usage.total
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            disks = psutil.disk_io_counters(perdisk=True) or {}
            real = {name: one for name, one in disks.items() if not name.startswith(UNREAL_DISKS)}
            for name, disk in sorted(real.items())[:MAX_LISTED]:
                of = (("device", name),)
                found["host_disk_read_bytes_total", of] = disk.read_bytes
                found["host_disk_written_bytes_total", of] = disk.write_bytes
                found["host_disk_busy_seconds_total", of] = getattr(disk, "busy_time", 0) / 1000
        with contextlib.suppress(OSError):
            for name, one in sorted(psutil.net_io_counters(pernic=True).items())[:MAX_LISTED]:
                of = (("interface", name),)
                found["host_network_received_bytes_total", of] = one.bytes_recv
                found["host_network_sent_bytes_total", of] = one.bytes_sent
                found["host_network_errors_total", of] = one.errin + one.errout
                found["host_network_dropped_total", of] = one.dropin + one.dropout
        return found

    def close(self) -> None:
        for file in (self._memory, self._load, self._stat, *self._pressure.values()):
            file.close()

    # --- inside

    def _meminfo(self) -> dict[str, int]:
        try:
            return procfs.parse_pairs(self._memory.read())
        except OSError:
            return {}

    def _cpus(self) -> Values:
        found: Values = {}
        try:
            lines = self._stat.read_all().splitlines()
        except OSError:
            return found
        cores = 0
        for line in lines:
            name, *words = line.decode("ascii", "replace").split()
            if name.startswith("cpu"):
                cores += 1
                if cores > MAX_LISTED + 1:
                    continue
                ratio = self._busy(name, [int(word) for word in words])
                if ratio is not None and name == "cpu":
                    found["host_cpu_ratio", ()] = ratio
                elif ratio is not None:
                    found["host_cpu_core_ratio", (("core", name[3:]),)] = ratio
            elif name == "ctxt":
                found["host_context_switches_total", ()] = int(words[0])
            elif name == "procs_blocked":
                found["host_processes_blocked", ()] = int(words[0])
        return found

    def _busy(self, name: str, ticks: list[int]) -> float | None:
        """The share of its time since the last sample in which a core was neither idle nor waiting for a disk."""
        total = sum(ticks[:8]) * TICK_S  # the two behind, of guests, are in the first two already
        idle = sum(ticks[3:5]) * TICK_S
        last = self._cpu.get(name)
        self._cpu[name] = total, idle
        if last is None or total <= last[0]:
            return None
        return min(1.0, max(0.0, 1 - (idle - last[1]) / (total - last[0])))
