"""gpustat and nvitop, as they come from PyPI, read the same stand-in for NVIDIA's library: they and we agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from interlock.monitors import gpu_metrics as gm
from nvml_parts import GIB, MIB, FakeNvml

NVITOP = """
import json
from nvitop import Device

def told(device):
    found = device.as_snapshot()
    names = ("uuid", "memory_used", "memory_free", "memory_total", "gpu_utilization", "memory_utilization",
             "temperature", "power_usage", "power_limit", "fan_speed", "total_volatile_uncorrected_ecc_errors")
    held = {pid: process.gpu_memory() for pid, process in device.processes().items()}
    return {name: getattr(found, name) for name in names} | {"processes": held}

print(json.dumps([told(device) for device in Device.all()]))
"""


def run(fake: FakeNvml, *command: str) -> Any:
    environment = {**os.environ, **fake.environment, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ours(fake: FakeNvml) -> list[dict[str, float]]:
    report = run(fake, "-m", "interlock.monitors", "selftest", "--json")
    return [{each["reading"]: each["value"] for each in card["readings"]} for card in report["cards"]]


@pytest.fixture
def busy(fake: FakeNvml) -> FakeNvml:
    """Two cards with different readings; a process of ours computes on the first."""
    fake.hold(0, (os.getpid(), 3 * GIB), sm=40)
    fake.gpu(1).memory_used = 11 * GIB
    fake.gpu(1).utilization = 93
    return fake


@pytest.mark.skipif(find_spec("gpustat") is None, reason="gpustat is not installed")
def test_gpustat_reads_what_we_read(busy: FakeNvml) -> None:
    for theirs, we in zip(run(busy, "-m", "gpustat", "--json")["gpus"], ours(busy), strict=True):
        assert theirs["memory.used"] * MIB == we[gm.MEMORY_USED]
        assert theirs["memory.total"] * MIB == we[gm.MEMORY_TOTAL]
        assert theirs["utilization.gpu"] / 100 == we[gm.UTILIZATION]
        assert theirs["temperature.gpu"] == we[gm.TEMPERATURE]
        assert theirs["power.draw"] == int(we[gm.POWER])
        assert theirs["enforced.power.limit"] == we[gm.POWER_LIMIT]
        assert theirs["fan.speed"] / 100 == we[f"{gm.FAN} fan=0"]
        held = {process["pid"]: process["gpu_memory_usage"] * MIB for process in theirs["processes"]}
        assert sum(held.values()) == we[gm.PROCESS_MEMORY]


@pytest.mark.skipif(find_spec("nvitop") is None, reason="nvitop is not installed")
def test_nvitop_reads_what_we_read(busy: FakeNvml) -> None:
    for theirs, we in zip(run(busy, "-c", NVITOP), ours(busy), strict=True):
        assert theirs["memory_used"] == we[gm.MEMORY_USED]
        assert theirs["memory_free"] == we[gm.MEMORY_FREE]
        assert 1 - theirs["memory_free"] / theirs["memory_total"] == we[gm.MEMORY_RATIO]
        assert theirs["gpu_utilization"] / 100 == we[gm.UTILIZATION]
        assert theirs["memory_utilization"] / 100 == we[gm.MEMORY_UTILIZATION]
        assert theirs["temperature"] == we[gm.TEMPERATURE]
        assert theirs["power_usage"] / 1000 == we[gm.POWER]
        assert theirs["power_limit"] / 1000 == we[gm.POWER_LIMIT]
        assert theirs["fan_speed"] / 100 == we[f"{gm.FAN} fan=0"]
        assert theirs["total_volatile_uncorrected_ecc_errors"] == we[gm.ECC_ERRORS]
        assert sum(theirs["processes"].values()) == we[gm.PROCESS_MEMORY]
