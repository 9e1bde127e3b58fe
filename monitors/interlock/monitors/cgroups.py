"""The cgroup that a host made for one instance: who is in it, and what the kernel counts of it."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from interlock.broker import cgroups
from interlock.broker.cgroups import V2
from interlock.monitors import templates
from interlock.monitors.procfs import PROC, KeptFile, parse_pairs, parse_pressure

RESOURCES = ("cpu", "memory", "io")


@cache
def _mounted(proc: str) -> tuple[cgroups.Hierarchy, ...]:
    return tuple(cgroups.read_hierarchies(f"{proc}/self/mountinfo"))


class AgentCgroup:
    """Folders by controller (version 1), or by "" (version 2). A file that is not there counts nothing, and costs
    nothing from then on."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)
        first = self.folders[V2] if V2 in self.folders else next(iter(self.folders.values()))
        self._procs = KeptFile(f"{first}/cgroup.procs")
        self._files = {key: KeptFile(str(path)) for key, path in _files(self.folders)}

    @classmethod
    def of(cls, pid: int, proc: str = PROC) -> AgentCgroup | None:
        """That of a process; None if it shares its cgroups with others, or nobody can see them."""
        try:
            places = cgroups.places(Path(f"{proc}/{pid}/cgroup").read_text("utf-8", "replace"))
        except OSError:
            return None
        found = cgroups.folders(places, list(_mounted(proc)))
        ours = {key: folder for key, folder in found.items() if cgroups.is_ours(folder)}
        return cls(ours) if ours else None

    @property
    def events(self) -> Path | None:
        """The file that changes when the last process has left it; only version 2 has one."""
        return self.folders[V2] / "cgroup.events" if V2 in self.folders else None

    def processes(self) -> list[int]:
        """The pids in it, as they are numbered here."""
        try:
            return [int(word) for word in self._procs.read_all().split() if word != b"0"]
        except (OSError, ValueError):
            return []

    def figures(self) -> dict[str, float]:
        """Readings by metric name; `|` and the resource behind it where there are several."""
        found: dict[str, float] = {}
        for key, file in list(self._files.items()):
            try:
                text = file.read()
            except OSError as error:
                if error.errno != errno.EMFILE:  # no room for it now; all else means that it is not to be had
                    del self._files[key]
                    file.close()
                continue
            found.update(_figure(key, text))
        return found

    def close(self) -> None:
        for file in (self._procs, *self._files.values()):
            file.close()


def _files(folders: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    if V2 in folders:
        yield "memory.current", folders[V2] / "memory.current"
        yield "memory.events", folders[V2] / "memory.events"
        yield "cpu.stat", folders[V2] / "cpu.stat"
        for resource in RESOURCES:
            yield f"{resource}.pressure", folders[V2] / f"{resource}.pressure"
    if "memory" in folders:
        yield "memory.usage_in_bytes", folders["memory"] / "memory.usage_in_bytes"
        yield "memory.oom_control", folders["memory"] / "memory.oom_control"
    if "cpuacct" in folders:
        yield "cpuacct.usage", folders["cpuacct"] / "cpuacct.usage"


def _figure(file: str, text: bytes) -> Iterator[tuple[str, float]]:
    match file:
        case "memory.current" | "memory.usage_in_bytes" if text.strip().isdigit():
            yield templates.CGROUP_MEMORY, float(text)
        case "cpuacct.usage" if text.strip().isdigit():
            yield templates.CGROUP_CPU, int(text) / 1e9
        case "cpu.stat":
            if (micros := parse_pairs(text).get("usage_usec")) is not None:
                yield templates.CGROUP_CPU, micros / 1e6
        case "memory.events" | "memory.oom_control":
            if (kills := parse_pairs(text).get("oom_kill")) is not None:
                yield templates.CGROUP_OOM, float(kills)
        case _ if file.endswith(".pressure"):
            some = parse_pressure(text).get("some")
            if some is not None:
                yield f"{templates.STALLED}|{file.partition('.')[0]}", some[1]
