"""The machine as a whole: this one, and made-up ones."""

from __future__ import annotations

import os
from pathlib import Path

from interlock.monitors.machine import Machine

STAT = """\
cpu  100 0 100 800 0 0 0 0 50 0
cpu0 {} 0 50 {} 0 0 0 0 50 0
cpu1 50 0 50 400 0 0 0 0 0 0
intr 12345 1 2 3
ctxt 987
procs_running 2
procs_blocked 3
"""


def machine(tmp_path: Path, **files: str) -> Machine:
    for name, text in files.items():
        place = tmp_path / name.replace("__", "/")
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    return Machine(tmp_path, str(tmp_path))


def test_the_machine_says_what_it_has(tmp_path: Path) -> None:
    real = Machine(tmp_path)
    memory = real.memory()
    assert memory["host_memory_total_bytes", ()] > memory["host_memory_available_bytes", ()] > 0
    first = real.load()
    assert first["host_cpus", ()] >= 1
    assert first["host_load1", ()] >= 0
    assert first["host_swap_total_bytes", ()] >= first["host_swap_used_bytes", ()] >= 0
    assert ("host_cpu_ratio", ()) not in first, "nothing to compare with at the first sample"
    core = "host_cpu_core_ratio", (("core", "0"),)
    seen = {}
    while not {("host_cpu_ratio", ()), core} <= seen.keys():
        os.sched_yield()
        seen |= real.load()
    assert 0 <= seen["host_cpu_ratio", ()] <= 1
    assert 0 <= seen[core] <= 1
    disks = real.disks()
    here = (("path", str(tmp_path)),)
    assert disks["host_disk_total_bytes", here] >= disks["host_disk_free_bytes", here] > 0
    assert disks["host_network_received_bytes_total", (("interface", "lo"),)] >= 0
    real.close()


def test_a_folder_that_is_not_there_has_no_free_disk(tmp_path: Path) -> None:
    assert not any(name == "host_disk_free_bytes" for name, _ in Machine(tmp_path / "none").disks())


def test_each_core_has_its_share_of_the_time_between_two_samples(tmp_path: Path) -> None:
    made = machine(tmp_path, stat=STAT.format(50, 400))
    assert made.load()["host_context_switches_total", ()] == 987
    (tmp_path / "stat").write_text(STAT.format(50 + 75, 400 + 25).replace("cpu  100", "cpu  175"))
    second = made.load()
    assert second["host_cpu_core_ratio", (("core", "0"),)] == 0.75
    assert ("host_cpu_core_ratio", (("core", "1"),)) not in second, "no time has passed there"
    assert second["host_processes_blocked", ()] == 3


def test_pressure_is_told_by_resource_and_share_as_a_ratio_and_as_seconds(tmp_path: Path) -> None:
    text = "some avg10=25.00 avg60=1.00 total=2500000\nfull avg10=5.00 avg60=0.00 total=500000\n"
    found = machine(tmp_path, pressure__memory=text).pressure()
    some, full = (("resource", "memory"), ("share", "some")), (("resource", "memory"), ("share", "full"))
    assert found["host_pressure_ratio", some] == 0.25
    assert found["host_pressure_seconds_total", some] == 2.5
    assert found["host_pressure_seconds_total", full] == 0.5
    assert not any(("resource", "io") in of for _, of in found), "absent where the kernel does not say, never 0"


def test_files_that_say_something_else_give_no_readings_and_no_error(tmp_path: Path) -> None:
    made = machine(tmp_path, stat="", meminfo="rubbish\n", loadavg="", pressure__io="some of it\nfull avg10=x\n")
    assert made.memory() == {}
    assert set(made.load()) == {("host_cpus", ())}


def test_a_machine_with_very_many_cores_has_series_of_some_and_the_sum(tmp_path: Path) -> None:
    def cores(busy: int) -> str:
        return "".join(f"cpu{n if n >= 0 else ''} {busy} 0 0 100 0 0 0 0 0 0\n" for n in range(-1, 500))

    made = machine(tmp_path, stat=cores(0))
    made.load()
    (tmp_path / "stat").write_text(cores(100))
    found = [name for name, _ in made.load()]
    assert found.count("host_cpu_core_ratio") == 64
    assert found.count("host_cpu_ratio") == 1
