"""Where cgroups are on this machine, and what ours are called: the host makes one for each instance, monitors find it.

Linux has one hierarchy of version 2, and may have several of version 1, with the controllers that each was mounted
with; both can be there at once. A process has a place in each of them. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PREFIX = "interlock-"  # a folder of this name holds the cgroups of one host's instances
MOUNTS = "/proc/self/mountinfo"
V2 = ""  # in place of a controller's name, as in /proc/PID/cgroup
COUNTED_BY = ("memory", "cpuacct")  # controllers of version 1 that count something which we publish


@dataclass(frozen=True)
class Hierarchy:
    """A mounted tree of cgroups. `root`: which of its cgroups is at the mount; `controllers`: those of version 1."""

    mount: str
    root: str
    controllers: frozenset[str]

    @property
    def keys(self) -> frozenset[str]:
        """The names under which /proc/PID/cgroup may tell of it."""
        return self.controllers or frozenset({V2})

    def folder(self, path: str) -> Path | None:
        """Where the cgroup `path` of /proc/PID/cgroup is; None if it is outside of what is mounted here."""
        try:
            inside = PurePosixPath(path).relative_to(self.root)
        except ValueError:
            return None
        return None if ".." in inside.parts else Path(self.mount) / inside


def hierarchies(mounts: str) -> list[Hierarchy]:
    """The hierarchies in the text of /proc/self/mountinfo, that of version 2 first. Pure."""
    found = []
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        options = frozenset(kind[2].split(","))
        named = {option for option in options if option.startswith("name=")}
        controllers = frozenset() if kind[0] == "cgroup2" else frozenset(named | (options & _CONTROLLERS))
        if controllers or kind[0] == "cgroup2":
            found.append(Hierarchy(_unescaped(fields[4]), _unescaped(fields[3]), controllers))
    return sorted(found, key=lambda one: bool(one.controllers))


def read_hierarchies(path: str = MOUNTS) -> list[Hierarchy]:
    """Of this machine; empty where there are none."""
    try:
        return hierarchies(Path(path).read_text("utf-8", "surrogateescape"))
    except OSError:
        return []


def places(text: str) -> dict[str, str]:
    """Path of a process's cgroup by controller, or by `V2`, from the text of /proc/PID/cgroup. Pure."""
    found = {}
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            found.update(dict.fromkeys(parts[1].split(",") if parts[1] else [V2], parts[2]))
    return found


def folders(places: Mapping[str, str], mounted: list[Hierarchy]) -> dict[str, Path]:
    """Folder of a process's cgroup by controller, or by `V2`, where it is mounted. Pure."""
    found = {}
    for hierarchy in mounted:
        for key in hierarchy.keys & places.keys():
            folder = hierarchy.folder(places[key])
            if folder is not None:
                found[key] = folder
    return found


def is_ours(folder: Path) -> bool:
    """Whether it is one that a host made for one instance. Pure."""
    return folder.parent.name.startswith(PREFIX)


def name_of(instance: str) -> str:
    """The folder's name for an instance: whatever a name can't hold is a dash in it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", instance)[:200] or "instance"


_CONTROLLERS = frozenset(
    {"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "misc", "net_cls", "net_prio"}
    | {"perf_event", "pids", "rdma"}
)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
