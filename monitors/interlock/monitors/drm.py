"""Cards of AMD and Intel as the Linux kernel shows them: files of sysfs, and what each process holds by its fdinfo.

No library is needed, and no rights beyond those of reading: what processes of other users hold can't be seen without
them, and is told as nobody's. Names of files: the kernel's documentation of amdgpu, i915, xe and drm-usage-stats.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from interlock.monitors import gpu
from interlock.monitors import gpu_metrics as gm

SYS, PROC = "/sys", "/proc"
VENDORS = {"0x1002": "AMD", "0x8086": "Intel"}
MAX_CLIENTS = 4096  # of a machine: processes with a card open; more are left out, and then nobody's
MEBI = 1 << 20

# Card memory by the names that drivers give their regions: amdgpu and xe say vram, i915 local. What is resident counts,
# or what older kernels have in its place.
_HELD = tuple(re.compile(rf"drm-{kind}-(?:vram|local)\d*") for kind in ("resident", "memory", "total"))
_ENGINE = re.compile(r"drm-engine-(?!capacity-)([\w-]+)")
_CYCLES = re.compile(r"drm-cycles-([\w-]+)")
_TOTAL_CYCLES = re.compile(r"drm-total-cycles-([\w-]+)")
_UNITS = {"": 1, "ns": 1, "KiB": 1 << 10, "MiB": MEBI, "GiB": 1 << 30}


@dataclass(frozen=True)
class DrmCard:
    """A card, where sysfs has it. `pci`: its address on the bus, by which fdinfo names it."""

    folder: Path
    vendor: str
    pci: str
    uuid: str
    name: str


@dataclass(frozen=True)
class Client:
    """What one open file of a process says of a card: bytes held, and how long each engine worked for it.

    busy: nanoseconds by engine, or cycles; cycles: of these, how many there were in all (xe).
    """

    pid: int
    pci: str
    number: str
    held: int
    busy: Mapping[str, int] = field(default_factory=dict)
    cycles: Mapping[str, int] = field(default_factory=dict)


def find_cards(sys: str = SYS) -> list[DrmCard]:
    """The cards of AMD and Intel, as the kernel numbers them."""
    found = []
    for folder in sorted(Path(sys, "class/drm").glob("card*"), key=lambda path: (len(path.name), path.name)):
        if not re.fullmatch(r"card\d+", folder.name):
            continue  # card0-HDMI-A-1: a connector of it
        device = folder / "device"
        vendor = VENDORS.get(_text(device / "vendor"))
        if vendor is None:
            continue
        about = dict(line.split("=", 1) for line in _text(device / "uevent").splitlines() if "=" in line)
        pci = about.get("PCI_SLOT_NAME", "")
        serial = _text(device / "unique_id")
        name = _text(device / "product_name") or f"{vendor} {about.get('PCI_ID', '')} ({about.get('DRIVER', '?')})"
        found.append(DrmCard(folder, vendor, pci, f"{vendor}-{serial or pci or folder.name}", name))
    return found


def read_memory(card: DrmCard, clients: Iterable[Client]) -> dict[str, float]:
    """In use and in all; where the driver tells what is in use only by process, the sum of those that can be seen."""
    device = card.folder / "device"
    total = _number(device / "mem_info_vram_total")
    if total is None:
        tiles = [_number(path) for path in sorted(device.glob("tile*/physical_vram_size_bytes"))]
        total = sum(tile for tile in tiles if tile is not None) or None
    used = _number(device / "mem_info_vram_used")
    if used is None and total is not None:
        used = sum(one.held for one in clients if one.pci == card.pci)
    if used is None or total is None:
        return {}  # an integrated card: its memory is the machine's
    return gpu.memory(used=used, free=max(0, total - used), total=total)


def read_sensors(card: DrmCard) -> dict[str, float]:
    """Temperature and power, as far as the card has sensors."""
    found: dict[str, float] = {}
    files = {
        gm.TEMPERATURE: (("temp1_input", "temp2_input"), 1e-3),
        gm.POWER: (("power1_average", "power1_input"), 1e-6),
        gm.POWER_LIMIT: (("power1_cap", "power1_max"), 1e-6),
    }
    for folder in sorted((card.folder / "device" / "hwmon").glob("hwmon*")):
        for name, (candidates, scale) in files.items():
            for file in candidates:
                value = _number(folder / file)
                if value is not None and name not in found:
                    found[name] = value * scale
    return found


def read_busy(card: DrmCard) -> float | None:
    """The share of time in which it worked, as the driver says; None where it does not."""
    percent = _number(card.folder / "device" / "gpu_busy_percent")
    return None if percent is None else min(1.0, percent / 100)


class Engines:
    """How busy a card is, from what its engines did for each client. Pure: the time (seconds) is an argument."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], tuple[int, int]] = {}  # (client, engine) -> busy, cycles
        self._at: float | None = None

    def add(self, clients: Iterable[Client], now: float) -> float | None:
        """The busiest engine's share since the last time; None for the first, and where nothing tells."""
        seen = {}
        for one in clients:
            for engine, busy in one.busy.items():
                seen[one.number, engine] = busy, one.cycles.get(engine, 0)
        shares: dict[str, float] = {}
        then, self._at = self._at, now
        for key, (busy, cycles) in seen.items():
            before = self._last.get(key)
            if before is None or then is None or now <= then:
                continue
            whole = (cycles - before[1]) if cycles else (now - then) * 1e9
            if whole > 0:
                shares[key[1]] = shares.get(key[1], 0.0) + max(0, busy - before[0]) / whole
        self._last = seen
        return min(1.0, max(shares.values())) if shares else None


def read_clients(proc: str = PROC) -> list[Client]:
    """What processes that we may look into hold of any card. Walks all their open files: tens of milliseconds."""
    found: dict[tuple[str, str], Client] = {}
    for name in os.listdir(proc):
        if name.isdigit() and len(found) < MAX_CLIENTS:
            for client in _clients_of(int(name), proc):
                # a file that was handed on is one client, whoever has it; the first that has it counts
                found.setdefault((client.pci, client.number), client)
    return list(found.values())


def _clients_of(pid: int, proc: str) -> Iterator[Client]:
    try:
        files = os.listdir(f"{proc}/{pid}/fd")
    except OSError:
        return  # gone, or somebody else's
    for file in files:
        try:
            if not os.readlink(f"{proc}/{pid}/fd/{file}").startswith("/dev/dri/"):
                continue
            with open(f"{proc}/{pid}/fdinfo/{file}", encoding="ascii", errors="replace") as text:
                client = parse_client(pid, text.read(1 << 16))
        except OSError:
            continue
        if client is not None:
            yield client


def parse_client(pid: int, text: str) -> Client | None:
    """The lines of an fdinfo; None if they are of no card. Pure."""
    lines = dict(line.split(":", 1) for line in text.splitlines() if line.startswith("drm-") and ":" in line)
    pci, number = lines.get("drm-pdev", "").strip(), lines.get("drm-client-id", "").strip()
    if not pci or not number:
        return None
    held: dict[str, int] = {}
    for pattern in _HELD:
        held = held or _sizes(lines, pattern)
    busy = _sizes(lines, _ENGINE) or _sizes(lines, _CYCLES)
    return Client(pid, pci, number, sum(held.values()), busy, _sizes(lines, _TOTAL_CYCLES))


def _sizes(lines: Mapping[str, str], pattern: re.Pattern[str]) -> dict[str, int]:
    """By what the pattern has a group for, else by name; bytes, nanoseconds or cycles."""
    found = {}
    for name, value in lines.items():
        if (match := pattern.fullmatch(name)) and (number := _size(value)) is not None:
            found[match[match.lastindex or 0]] = number
    return found


def _size(text: str) -> int | None:
    words = text.split()
    if not words or not words[0].isdigit() or len(words) > 2:
        return None
    unit = _UNITS.get(words[1] if len(words) == 2 else "")
    return None if unit is None else int(words[0]) * unit


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else None
