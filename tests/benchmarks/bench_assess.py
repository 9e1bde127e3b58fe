"""`interlock assess` over CPython's Lib, tests and all, beside radon and lizard; prints JSON.

Each is a command of its own, on as many cores as there are (radon has one process only). Memory is the largest of the
verb's own process and of the processes that read for it, by itself, and added up as an upper bound. On a machine that
does other work, the seconds of the processor say what a quiet one would take: divide by the cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

AIM_FILES, AIM_S, AIM_MB = 1000, 10.0, 300.0
SETTINGS = 'shipped_excludes = false\nexclude = ["site-packages"]\n'
TICK_S = 0.05  # between looks at the memory


def files_below(folder: Path) -> tuple[int, int]:
    """How many source files there are, and their bytes."""
    found = [path for path in folder.rglob("*.py") if "site-packages" not in path.parts and path.is_file()]
    return len(found), sum(path.stat().st_size for path in found)


def timed(command: list[str]) -> dict[str, Any]:
    """Wall and processor seconds of a command with its children, and the sum of their largest memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in (process.pid, *children(process.pid)):
            peaks[pid] = max(peaks.get(pid, 0), peak_of(pid))
        time.sleep(TICK_S)
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    kept = sorted((peak for peak in peaks.values() if peak), reverse=True)
    result = {
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "processes": len(kept),
        "largest_process_mb": round(kept[0] / 1024, 1) if kept else None,
        "all_processes_mb": round(sum(kept) / 1024, 1),
    }
    return result if process.returncode == 0 else {**result, "failed": said[-300:]}


def children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def peak_of(pid: int) -> int:
    """KiB at the most so far; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(sysconfig.get_path("stdlib")))
    folder = parser.parse_args().folder
    count, size = files_below(folder)
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "assess.toml"
        config.write_text(SETTINGS)
        ours = timed(
            [sys.executable, "-m", "interlock.coordinator", "assess", str(folder), "--config", str(config), "--json"]
        )
    rivals = {
        "radon": ["cc", "--total-average", "--exclude", "*/site-packages/*", str(folder)],
        "lizard": ["-l", "python", "-t", str(cores), "-i", "-1", "-x", "*/site-packages/*", str(folder)],
    }
    beside = {
        name: timed([sys.executable, "-m", name, *options]) if importlib.util.find_spec(name) else "not installed"
        for name, options in rivals.items()
    }
    for_aim = AIM_FILES / count
    report = {
        "benchmark": "assess",
        "files": count,
        "bytes": size,
        "python": platform.python_version(),
        "cores": cores,
        "load_before": round(load, 1),
        "interlock": ours,
        "seconds_for_1000_files": round(ours["seconds"] * for_aim, 2),
        "cpu_seconds_for_1000_files_by_cores": round(ours["cpu_seconds"] * for_aim / cores, 2),
        "aim_seconds_for_1000_files": AIM_S,
        "aim_mb": AIM_MB,
        **beside,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
