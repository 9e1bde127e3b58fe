"""Cards of AMD and Intel, on made-up trees of sysfs and /proc whose lines are those of real drivers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from interlock.monitors import gpu_metrics as gpu
from interlock.monitors.drm import Client, Engines, find_cards, parse_client, read_clients
from interlock.monitors.drm_backend import open_drm_backend
from interlock.monitors.gpu import Heard, NoGpu, Part, Reading
from interlock.monitors.gpu_each import EachCard
from interlock.monitors.sampler import Group

GIB = 1 << 30
ALL = frozenset(Group)
HOT = frozenset({Group.HOT})
AMD, INTEL = "0000:03:00.0", "0000:04:00.0"
AMDGPU = """\
pos:	0
flags:	02100002
drm-driver:	amdgpu
drm-client-id:	{client}
drm-pdev:	0000:03:00.0
drm-total-vram:	{total} KiB
drm-resident-vram:	{held} KiB
drm-memory-vram:	{held} KiB
drm-memory-gtt: 	1024 KiB
drm-engine-gfx:	{busy} ns
drm-engine-capacity-gfx:	1
"""
XE = """\
drm-driver:	xe
drm-client-id:	7
drm-pdev:	0000:04:00.0
drm-total-vram0:	2 GiB
drm-resident-vram0:	{held} MiB
drm-cycles-rcs:	{busy}
drm-total-cycles-rcs:	{cycles}
drm-engine-capacity-rcs:	1
"""


class Tree:
    def __init__(self, root: Path) -> None:
        self.sys, self.proc = root / "sys", root / "proc"
        self.proc.mkdir()

    def write(self, path: str, text: object) -> None:
        place = self.sys / "class/drm" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{text}\n")

    def amd(self, number: int = 0) -> None:
        card = f"card{number}/device"
        self.write(f"{card}/vendor", "0x1002")
        self.write(f"{card}/uevent", f"DRIVER=amdgpu\nPCI_ID=1002:744C\nPCI_SLOT_NAME={AMD}")
        self.write(f"{card}/unique_id", "72a9b1c2d3e4f506")
        self.write(f"{card}/mem_info_vram_total", 24 * GIB)
        self.write(f"{card}/mem_info_vram_used", 6 * GIB)
        self.write(f"{card}/gpu_busy_percent", 42)
        self.write(f"{card}/hwmon/hwmon3/temp1_input", 61000)
        self.write(f"{card}/hwmon/hwmon3/power1_average", 123_000_000)
        self.write(f"{card}/hwmon/hwmon3/power1_cap", 300_000_000)
        self.write(f"card{number}-HDMI-A-1/status", "connected")

    def intel(self, number: int = 1) -> None:
        card = f"card{number}/device"
        self.write(f"{card}/vendor", "0x8086")
        self.write(f"{card}/uevent", f"DRIVER=xe\nPCI_ID=8086:56A0\nPCI_SLOT_NAME={INTEL}")
        self.write(f"{card}/tile0/physical_vram_size_bytes", 16 * GIB)

    def process(self, pid: int, **files: str) -> None:
        for name in ("fd", "fdinfo"):
            (self.proc / str(pid) / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            number = file.removeprefix("f")
            link = self.proc / str(pid) / "fd" / number
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/dri/renderD128" if "drm-" in text else "/dev/null")
            (self.proc / str(pid) / "fdinfo" / number).write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def amdgpu(client: int, held: int, *, busy: int = 0) -> str:
    return AMDGPU.format(client=client, held=held, total=2 * held, busy=busy)


def test_cards_are_found_by_vendor_and_connectors_are_none(tree: Tree) -> None:
    tree.amd()
    tree.intel()
    tree.write("card2/device/vendor", "0x10de")  # NVIDIA has its own library
    amd, intel = find_cards(str(tree.sys))
    assert (amd.uuid, amd.pci, amd.vendor) == ("AMD-72a9b1c2d3e4f506", AMD, "AMD")
    assert (intel.uuid, intel.name) == (f"Intel-{INTEL}", "Intel 8086:56A0 (xe)")


class Asked:
    """A back-end that runs, asked for one card."""

    def __init__(self, backend: EachCard) -> None:
        self.backend = backend
        self._heard: list[Reading] = []
        self._news = trio.lowlevel.ParkingLot()

    async def hear(self, heard: Heard) -> None:
        assert isinstance(heard, Part)
        self._heard += heard.readings
        self._news.unpark_all()

    async def __call__(self, index: int, groups: frozenset[Group]) -> Reading:
        self._heard = []
        await self.backend.sample(groups)
        while not (found := [one for one in self._heard if one.card.index == index]):
            await self._news.park()
        return found[0]


async def opened(tree: Tree, nursery: trio.Nursery, **how: float) -> Asked:
    asked = Asked(await open_drm_backend(str(tree.sys), str(tree.proc), **how))
    await nursery.start(asked.backend.run, asked.hear)
    return asked


async def test_a_card_of_amd_says_all_that_it_has_sensors_for(tree: Tree, nursery: trio.Nursery) -> None:
    tree.amd()
    tree.process(11, f3=amdgpu(1, 1024), f4=amdgpu(1, 1024), f5=amdgpu(2, 512), f6="pos: 0\n")
    tree.process(12, f3=amdgpu(3, 2048))
    ask = await opened(tree, nursery)
    reading = await ask(0, ALL)
    assert reading.values == {
        gpu.MEMORY_USED: 6 * GIB,
        gpu.MEMORY_FREE: 18 * GIB,
        gpu.MEMORY_TOTAL: 24 * GIB,
        gpu.MEMORY_RATIO: 0.25,
        gpu.UTILIZATION: 0.42,
        gpu.TEMPERATURE: 61.0,
        gpu.POWER: 123.0,
        gpu.POWER_LIMIT: 300.0,
    }
    assert reading.processes == {11: 1536 << 10, 12: 2048 << 10}, "a file that is open twice counts once"
    assert reading.lacking == {}


async def test_hot_readings_look_at_no_process_and_no_sensor(tree: Tree, nursery: trio.Nursery) -> None:
    tree.amd()
    ask = await opened(tree, nursery)
    assert (await ask(0, ALL)).processes == {}
    tree.process(11, f3=amdgpu(1, 1024))
    hot = await ask(0, HOT)
    assert hot.processes is None
    assert gpu.TEMPERATURE not in hot.values
    assert hot.values[gpu.MEMORY_USED] == 6 * GIB


async def test_a_card_of_intel_is_told_from_its_processes_and_what_it_has_not_is_absent(
    tree: Tree, nursery: trio.Nursery
) -> None:
    tree.intel()
    tree.process(11, f3=XE.format(held=1024, busy=0, cycles=0))
    ask = await opened(tree, nursery)
    reading = await ask(0, ALL)
    assert reading.values[gpu.MEMORY_USED] == GIB
    assert reading.values[gpu.MEMORY_TOTAL] == 16 * GIB
    assert set(reading.lacking or {}) == {gpu.TEMPERATURE, gpu.POWER, gpu.POWER_LIMIT}
    assert gpu.UTILIZATION not in reading.values, "nothing to compare with yet"


async def test_a_card_without_memory_of_its_own_has_no_memory_readings(tree: Tree, nursery: trio.Nursery) -> None:
    tree.intel()
    (tree.sys / "class/drm/card1/device/tile0/physical_vram_size_bytes").unlink()
    ask = await opened(tree, nursery)
    reading = await ask(0, ALL)
    assert gpu.MEMORY_USED not in reading.values
    assert gpu.MEMORY_USED in (reading.lacking or {})


async def test_a_card_that_vanishes_fails_and_the_other_goes_on(tree: Tree, nursery: trio.Nursery) -> None:
    tree.amd()
    tree.intel()
    ask = await opened(tree, nursery)
    (tree.sys / "class/drm/card0").rename(tree.sys / "gone")
    gone = await ask(0, ALL)
    assert gone.kind == "lost"
    assert "the kernel lists it no more" in gone.error
    assert (await ask(1, ALL)).error == ""


async def test_a_driver_that_hangs_is_a_fault_within_its_deadline_and_is_not_asked_again(
    tree: Tree, nursery: trio.Nursery
) -> None:
    tree.amd()
    stuck = tree.sys / "class/drm/card0/device/gpu_busy_percent"
    stuck.unlink()
    os.mkfifo(stuck)  # reading it waits until somebody writes
    ask = await opened(tree, nursery, deadline_s=0.1)
    with trio.fail_after(5):
        hung = await ask(0, ALL)
        assert hung.kind == "hang"
        assert "nothing within 0.1 s" in hung.error
        assert "still not come back" in (await ask(0, ALL)).error
    with stuck.open("w") as freed:
        freed.write("5")
    stuck.unlink()
    tree.write("card0/device/gpu_busy_percent", 5)
    with trio.fail_after(20):
        while "still not come back" in (reading := await ask(0, ALL)).error:
            await trio.testing.wait_all_tasks_blocked(0.01)
    assert reading.values[gpu.UTILIZATION] == 0.05


async def test_a_machine_without_such_a_card_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoGpu, match="no card of AMD or Intel"):
        await open_drm_backend(str(tmp_path))


def test_engines_are_as_busy_as_what_they_did_for_all_clients_in_the_time() -> None:
    def client(number: str, gfx: int, compute: int) -> Client:
        return Client(1, AMD, number, 0, {"gfx": gfx, "compute": compute})

    engines = Engines()
    assert engines.add([client("1", 0, 0), client("2", 0, 0)], 10.0) is None
    assert engines.add([client("1", 500_000_000, 0), client("2", 250_000_000, 100_000_000)], 11.0) == 0.75
    assert engines.add([client("2", 2_250_000_000, 100_000_000)], 12.0) == 1.0
    assert engines.add([], 13.0) is None


def test_engines_that_count_cycles_are_held_against_the_cycles_there_were() -> None:
    engines = Engines()
    for busy, cycles in ((0, 1000), (300, 2000)):
        told = parse_client(1, XE.format(held=1, busy=busy, cycles=cycles))
        assert told is not None
        share = engines.add([told], float(cycles))
    assert share == 0.3


@pytest.mark.parametrize("text", ["", "pos: 0\n", "drm-driver: x\ndrm-client-id: 3\n", "drm-pdev: a\n", ":::\ndrm-:\n"])
def test_what_is_of_no_card_is_no_client(text: str) -> None:
    assert parse_client(1, text) is None


def test_figures_that_are_none_are_left_out() -> None:
    told = parse_client(1, "drm-pdev: a\ndrm-client-id: 1\ndrm-resident-vram: lots\ndrm-engine-gfx: -1 ns\n")
    assert told == Client(1, "a", "1", 0)


def test_a_process_that_goes_while_it_is_looked_at_is_passed_over(tree: Tree) -> None:
    tree.process(11, f3=amdgpu(1, 1024))
    (tree.proc / "11/fdinfo/3").unlink()
    (tree.proc / "12").mkdir()
    (tree.proc / "self").mkdir()
    assert read_clients(str(tree.proc)) == []
