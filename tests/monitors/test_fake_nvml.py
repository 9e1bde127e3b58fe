"""The stand-in for NVIDIA's library itself: the unmodified nvidia-ml-py loads it, and its state is one file."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import nvml_parts
from nvml_parts import GIB, MIB, FakeNvml

# In: expressions about `p`, the library, and `h`, the first card. Out: their values.
ASKER = """
import json, sys
import pynvml as p
try:
    p.nvmlInit()
    h = p.nvmlDeviceGetHandleByIndex(0)
except p.NVMLError as error:
    print(json.dumps({"error": error.value}), flush=True)
    sys.exit()
print(json.dumps(p.nvmlSystemGetDriverVersion()), flush=True)
for line in sys.stdin:
    try:
        value = eval(line)
    except p.NVMLError as error:
        value = {"error": error.value}
    print(json.dumps(value), flush=True)
"""


class Asker:
    """A process that asks the library through nvidia-ml-py."""

    def __init__(self, fake: FakeNvml) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", ASKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **fake.environment},
        )
        self.began = self.answer()

    def send(self, expression: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, expression: str) -> Any:
        self.send(expression)
        return self.answer()

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_both_sides_have_the_same_structures(nvml_library: Path) -> None:
    size = ctypes.CDLL(str(nvml_library)).fakeSizeOf
    size.restype = ctypes.c_ulong
    assert size(b"struct state") == ctypes.sizeof(nvml_parts.State)
    assert size(b"struct gpu") == ctypes.sizeof(nvml_parts.Gpu)
    assert size(b"state.gpu") == nvml_parts.State.gpu.offset
    assert size(b"gpu.calls") == nvml_parts.Gpu.calls.offset


def test_nvidia_ml_py_reads_what_the_file_says_at_that_moment(fake: FakeNvml) -> None:
    with Asker(fake) as asker:
        assert asker.began == "570.00.00"
        memory = (
            "[getattr(p.nvmlDeviceGetMemoryInfo(h, version=p.nvmlMemory_v2), n) for n in ('used', 'reserved', 'free')]"
        )
        assert asker.ask(memory) == [5 * GIB + 512 * MIB, 512 * MIB, 18 * GIB]
        fake.gpu(0).memory_used = 23 * GIB
        assert asker.ask(memory) == [23 * GIB, 512 * MIB, 512 * MIB]
        assert asker.ask("p.nvmlDeviceGetMemoryInfo(h).used") == 23 * GIB + 512 * MIB, "version 1 counts all as used"
        fake.hold(0, (100, GIB), (101, 2 * GIB))
        processes = "[(q.pid, q.usedGpuMemory) for q in p.nvmlDeviceGetComputeRunningProcesses(h)]"
        assert asker.ask(processes) == [[100, GIB], [101, 2 * GIB]]
        fake.hold(0, (100, nvml_parts.NOT_AVAILABLE))
        assert asker.ask(processes) == [[100, None]]


def test_errors_are_those_of_a_function_of_one_card_or_of_the_library(fake: FakeNvml) -> None:
    power = "p.nvmlDeviceGetPowerUsage(h)"
    with Asker(fake) as asker:
        assert asker.ask(power) == 123_400
        fake.call("nvmlDeviceGetPowerUsage", 0).error = nvml_parts.NOT_SUPPORTED
        assert asker.ask(power) == {"error": nvml_parts.NOT_SUPPORTED}
        assert asker.ask("p.nvmlDeviceGetPowerUsage(p.nvmlDeviceGetHandleByIndex(1))") == 123_400
        fake.gpu(0).error = nvml_parts.LOST
        assert asker.ask("p.nvmlDeviceGetTemperature(h, 0)") == {"error": nvml_parts.LOST}
    fake.fail(nvml_parts.VERSION_MISMATCH)
    with Asker(fake) as asker:
        assert asker.began == {"error": nvml_parts.VERSION_MISMATCH}


def test_calls_are_counted_and_one_that_hangs_goes_on_when_it_is_let_go(fake: FakeNvml) -> None:
    with Asker(fake) as asker:
        fake.clear_counts()
        fake.call("nvmlDeviceGetTemperature", 0).hang = 1
        asker.send("p.nvmlDeviceGetTemperature(h, 0)")
        while not fake.counts(0):
            time.sleep(0.001)
        assert fake.counts(0) == {"nvmlDeviceGetTemperature": 1}
        assert fake.counts(1) == {}
        fake.call("nvmlDeviceGetTemperature", 0).hang = 0
        assert asker.answer() == 61


def test_a_look_up_by_uuid_attaches_to_the_cards_before_it_and_one_by_bus_does_not(fake: FakeNvml) -> None:
    with Asker(fake) as asker:
        uuid, bus = fake.gpu(1).uuid.decode(), fake.gpu(1).bus_id.decode()
        fake.clear_counts()
        asker.ask(f"p.nvmlDeviceGetUUID(p.nvmlDeviceGetHandleByPciBusId({bus!r}))")
        assert "attach" not in fake.counts(0)
        asker.ask(f"p.nvmlDeviceGetUUID(p.nvmlDeviceGetHandleByUUID({uuid!r}))")
        assert "attach" in fake.counts(0)


def test_an_event_wakes_who_waits_for_it(fake: FakeNvml) -> None:
    wait = "(lambda d: (d.eventType, d.eventData, p.nvmlDeviceGetIndex(d.device)))(p.nvmlEventSetWait_v2(s, {}))"
    register = (
        "globals().update(s=p.nvmlEventSetCreate()) or "
        "[p.nvmlDeviceRegisterEvents(p.nvmlDeviceGetHandleByIndex(i), 8, s) for i in (0, 1)]"
    )
    with Asker(fake) as asker:
        asker.ask(register)
        assert asker.ask(wait.format(1)) == {"error": 10}
        asker.send(wait.format(30_000))
        fake.event(0, nvml_parts.DOUBLE_BIT_ECC)  # nobody registered for it
        fake.xid(1, 79)
        assert asker.answer() == [8, 79, 1]


HEADER = """
#include <stdio.h>
#include <nvml.h>
int main(void) {
%s    return 0;
}
"""
STRUCTURES = (
    "nvmlMemory_t",
    "nvmlMemory_v2_t",
    "nvmlUtilization_t",
    "nvmlPciInfo_t",
    "nvmlProcessInfo_v2_t",
    "nvmlProcessUtilizationSample_t",
    "nvmlValue_t",
    "nvmlFieldValue_t",
    "nvmlEventData_t",
)


def header() -> Path | None:
    """NVIDIA's own header, where the package nvidia-nvml-dev is installed."""
    found = [path for root in map(Path, sys.path) for path in root.glob("nvidia/**/nvml.h")]
    return found[0] if found else None


def test_the_structures_are_as_large_as_in_nvidias_header(nvml_library: Path, tmp_path: Path) -> None:
    if (path := header()) is None:
        pytest.skip("the package nvidia-nvml-dev is not installed")
    lines = "".join(f'    printf("%zu\\n", sizeof({name}));\n' for name in STRUCTURES)
    (tmp_path / "sizes.c").write_text(HEADER % lines)
    compiler = nvml_parts.compiler()
    assert compiler is not None
    command = [compiler, f"-I{path.parent}", "-o", str(tmp_path / "sizes"), str(tmp_path / "sizes.c")]
    subprocess.run(command, check=True)
    theirs = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.split()
    size = ctypes.CDLL(str(nvml_library)).fakeSizeOf
    size.restype = ctypes.c_ulong
    assert dict(zip(STRUCTURES, map(int, theirs), strict=True)) == {n: size(n.encode()) for n in STRUCTURES}
