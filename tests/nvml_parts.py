"""The stand-in for NVIDIA's library, for tests and benchmarks: its state as ctypes sees it, and how it is built.

`fake.environment` makes a child process load it in place of the real one; this process never does. The structures are
those of monitors/fake_nvml/nvml.c, in the same order.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "monitors" / "fake_nvml" / "nvml.c"
SONAME = "libnvidia-ml.so.1"
GIB = 1024**3
MIB = 1024**2

MAX_GPUS, MAX_FUNCTIONS, MAX_PROCESSES, MAX_MIGS, MAX_FANS, MAX_FIELDS, RING = 16, 80, 64, 7, 4, 8, 1024
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
FUTEX_WAKE = 1

NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND = 3, 4, 9, 12
UNINITIALIZED, LOST, RESET_REQUIRED, VERSION_MISMATCH, UNKNOWN = 1, 15, 16, 18, 999
NOT_AVAILABLE = 2**64 - 1  # as memory of a process: the driver does not tell
XID_EVENT, DOUBLE_BIT_ECC, GPU_UNAVAILABLE = 0x8, 0x2, 0x4000

u32, u64, i32 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32


class Call(ctypes.Structure):
    """One function, of the library or of one card."""

    _fields_ = [("count", u64), ("error", i32), ("hang", u32), ("delay_us", u32), ("unused", u32)]


class Process(ctypes.Structure):
    _fields_ = [
        *[(name, u64) for name in ("memory", "stamp_us")],
        *[(name, u32) for name in ("pid", "graphics", "sm", "mem", "enc", "dec")],
    ]


class Mig(ctypes.Structure):
    _fields_ = [
        ("uuid", ctypes.c_char * 96),
        *[(name, u64) for name in ("total", "reserved", "used")],
        *[(name, u32) for name in ("instance", "compute")],
    ]


class FieldError(ctypes.Structure):
    _fields_ = [("id", u32), ("error", i32)]


class Gpu(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_char * size) for name, size in (("uuid", 96), ("name", 96), ("bus_id", 32))],
        *[(name, u64) for name in ("memory_total", "memory_reserved", "memory_used", "energy_mj", "reasons")],
        ("ecc", u64 * 2 * 2),
        *[(name, u64) for name in ("pcie_sent", "pcie_received", "nvlink_sent_kib", "nvlink_received_kib")],
        ("nvlink_errors", u64 * 3),
        ("event_types", u64),
        *[(name, u32) for name in ("utilization", "memory_utilization", "temperature", "memory_temperature")],
        *[(name, u32) for name in ("power_mw", "power_average_mw", "power_instant_mw", "power_limit_mw")],
        ("clocks_mhz", u32 * 4),
        ("remapped", u32 * 4),
        *[(name, u32) for name in ("recovery_action", "pcie_replays", "pcie_generation", "pcie_width", "fans")],
        ("fan_percent", u32 * MAX_FANS),
        *[(name, u32) for name in ("mig_supported", "mig_mode", "migs", "processes")],
        ("error", i32),
        ("fields", FieldError * MAX_FIELDS),
        ("mig", Mig * MAX_MIGS),
        ("process", Process * MAX_PROCESSES),
        ("calls", Call * MAX_FUNCTIONS),
    ]


class Event(ctypes.Structure):
    _fields_ = [("type", u64), ("data", u64), ("gpu", u32), ("unused", u32)]


class State(ctypes.Structure):
    _fields_ = [
        ("gpus", u32),
        ("events", u32),
        ("driver", ctypes.c_char * 80),
        ("ring", Event * RING),
        ("calls", Call * MAX_FUNCTIONS),
        ("gpu", Gpu * MAX_GPUS),
    ]


def functions() -> list[str]:
    """The names of the stand-in's functions, in the order of their numbers."""
    listed = SOURCE.read_text("utf-8").split("#define FUNCTIONS(X)")[1].split("\n\n")[0]
    return re.findall(r"X\((\w+)\)", listed)


def why_not() -> str:
    """Why the stand-in can't be had on this machine; empty where it can."""
    if compiler() is None:
        return "there is no C compiler"
    return "" if SYS_FUTEX else f"the number of futex is not known for {platform.machine()}"


def compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(folder: Path) -> Path:
    """Compile the stand-in into `folder`; the library's path. Half a second."""
    found = compiler()
    assert found is not None
    library = folder / SONAME
    flags = ["-std=gnu11", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{SONAME}"]
    subprocess.run([found, *flags, "-o", str(library), str(SOURCE)], check=True)
    return library


class FakeNvml:
    """The mapped state of one stand-in. What is changed here, callers read at their next call."""

    def __init__(self, library: Path, path: Path, gpus: int = 2) -> None:
        self.library = library
        self.path = path
        path.write_bytes(bytes(ctypes.sizeof(State)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.state = State.from_buffer(self._map)
        self._numbers = {name: number for number, name in enumerate(functions())}
        self.state.driver = b"570.00.00"
        self.state.gpus = gpus
        for index in range(gpus):
            _furnish(self.state.gpu[index], index)

    @property
    def environment(self) -> dict[str, str]:
        """For a child process that is to load the stand-in in place of NVIDIA's library."""
        return {"LD_LIBRARY_PATH": str(self.library.parent), "FAKE_NVML_STATE": str(self.path)}

    def gpu(self, index: int) -> Any:
        return self.state.gpu[index]

    def call(self, function: str, gpu: int | None = None) -> Any:
        """A function's switches and counter, of one card or (None) of the library as a whole."""
        calls = self.state.calls if gpu is None else self.state.gpu[gpu].calls
        return calls[self._numbers[function]]

    def counts(self, gpu: int | None = None) -> dict[str, int]:
        """How often each function was called; those that never were are left out."""
        return {name: count for name in self._numbers if (count := self.call(name, gpu).count)}

    def clear_counts(self) -> None:
        for name in self._numbers:
            for gpu in (None, *range(self.state.gpus)):
                self.call(name, gpu).count = 0

    def fail(self, error: int) -> None:
        """Every function of the library fails with this code from now on; 0: none does."""
        for name in self._numbers:
            self.call(name).error = error

    def hold(self, index: int, *processes: tuple[int, int], sm: int = 0) -> None:
        """The processes on a card: (pid, bytes); its memory in use is their sum."""
        gpu = self.gpu(index)
        for place, (pid, held) in enumerate(processes):
            stamp = int(time.time() * 1e6)
            gpu.process[place] = Process(memory=held, pid=pid, sm=sm, stamp_us=stamp)
        gpu.processes = len(processes)
        gpu.memory_used = sum(held for _, held in processes if held != NOT_AVAILABLE)

    def event(self, index: int, type: int, data: int = 0) -> None:
        """An event, for every event set that waits for it."""
        written = self.state.events
        self.state.ring[written % RING] = Event(type=type, data=data, gpu=index)
        self.state.events = written + 1
        assert SYS_FUTEX is not None
        address = ctypes.addressof(self.state) + State.events.offset
        ctypes.CDLL(None).syscall(SYS_FUTEX, ctypes.c_void_p(address), FUTEX_WAKE, 2**31 - 1, None, None, 0)

    def xid(self, index: int, number: int) -> None:
        self.event(index, XID_EVENT, number)

    def close(self) -> None:
        """Let every caller that hangs go on."""
        for name in self._numbers:
            for gpu in (None, *range(MAX_GPUS)):
                self.call(name, gpu).hang = 0


def _furnish(gpu: Any, index: int) -> None:
    """A card in good order, each reading with a value of its own."""
    gpu.uuid = f"GPU-{uuid.UUID(int=0xFA4E << 64 | index)}".encode()
    gpu.name = b"Stand-in 24 GB"
    gpu.bus_id = f"00000000:{0x41 + index:02X}:00.0".encode()
    gpu.memory_total, gpu.memory_reserved, gpu.memory_used = 24 * GIB, 512 * MIB, 5 * GIB + 512 * MIB
    gpu.utilization, gpu.memory_utilization, gpu.temperature, gpu.memory_temperature = 40, 12, 61 + index, 70
    gpu.power_mw, gpu.power_average_mw, gpu.power_instant_mw, gpu.power_limit_mw = 123_400, 120_000, 131_000, 450_000
    gpu.energy_mj, gpu.reasons = 7_500_000, 0x1
    gpu.clocks_mhz[:] = [1980, 1980, 10_501, 1755]
    gpu.ecc[0][0], gpu.ecc[0][1], gpu.ecc[1][0], gpu.ecc[1][1] = 3, 5, 0, 1
    gpu.remapped[:] = [2, 0, 0, 0]
    gpu.pcie_sent, gpu.pcie_received, gpu.pcie_replays, gpu.pcie_generation, gpu.pcie_width = 10_000, 20_000, 4, 4, 16
    gpu.nvlink_sent_kib, gpu.nvlink_received_kib = 100, 200
    gpu.nvlink_errors[:] = [0, 1, 2]
    gpu.fans = 2
    gpu.fan_percent[:2] = [30, 45]
    gpu.event_types = 0xFFFB  # all but changes of the performance state


@contextmanager
def fake_nvml(library: Path, folder: Path, gpus: int = 2) -> Iterator[FakeNvml]:
    """A stand-in with `gpus` cards; whoever still hangs in it at the end is let go."""
    fake = FakeNvml(library, folder / f"nvml-{os.urandom(4).hex()}.state", gpus)
    try:
        yield fake
    finally:
        fake.close()
