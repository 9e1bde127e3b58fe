"""A cgroup for each instance, where this host may make one: then the kernel itself knows what belongs to an instance.

They lie in a folder of the host's, below the host's own cgroup, so that whatever limits the host limits them too. None
is given limits or controllers: what the kernel counts without that is what there is. An instance that is not in one is
told from others by its process tree, so nothing here is a reason not to start.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from interlock.broker import cgroups
from interlock.broker.cgroups import COUNTED_BY, PREFIX, V2

log = logging.getLogger(__name__)

MARKER_LETTERS = 12  # of the host's marker, in the folder's name: hosts of one machine must not meet


class Cgroups:
    """The host's folders, by controller (version 1) or by "" (version 2); none if `reason` says why not.

    All of it blocks, for milliseconds: the kernel waits for every process that forks just then.
    """

    def __init__(self, marker: str, parents: Mapping[str, Path]) -> None:
        self.reason = "" if parents else "no cgroups are mounted here, or this process can't see its own"
        self._folders: dict[str, Path] = {}
        for key, parent in parents.items():
            folder = parent / f"{PREFIX}{marker[:MARKER_LETTERS]}"
            try:
                folder.mkdir(exist_ok=True)
                if not os.access(folder / "cgroup.procs", os.W_OK) or not os.access(parent / "cgroup.procs", os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # processes can't be moved
            except OSError as error:
                self.reason = f"{folder}: {error.strerror}; in a systemd unit, Delegate=yes allows it"
                with suppress(OSError):
                    folder.rmdir()
                continue
            self._folders[key] = folder
        if self._folders:
            self.reason = ""

    @classmethod
    def here(cls, marker: str) -> Cgroups:
        """Below the cgroups that this process is in."""
        try:
            places = cgroups.places(Path("/proc/self/cgroup").read_text("utf-8", "replace"))
        except OSError:
            places = {}
        found = cgroups.folders(places, cgroups.read_hierarchies())
        return cls(marker, {key: folder for key, folder in found.items() if key in (V2, *COUNTED_BY)})

    @property
    def folders(self) -> list[Path]:
        return list(self._folders.values())

    def enter(self, instance: str, pid: int) -> list[Path]:
        """Put a process into cgroups of its own; those that could be made. What it started before stays outside."""
        made = []
        for folder in self._folders.values():
            own = folder / cgroups.name_of(instance)
            try:
                own.mkdir(exist_ok=True)
                (own / "cgroup.procs").write_text(f"{pid}\n", "ascii")
            except OSError as error:
                if error.errno != errno.ESRCH:  # it has ended already
                    log.info("%s is in no cgroup of its own: %s: %s", instance, own, error.strerror)
                _remove([own])
                continue
            made.append(own)
        return made

    def clear(self) -> None:
        """Remove what is empty: at the start what an earlier run left, at the end everything."""
        for folder in self._folders.values():
            with suppress(OSError):
                _remove([each for each in folder.iterdir() if each.is_dir()])

    def close(self) -> None:
        self.clear()
        _remove(self._folders.values())
        self._folders = {}


def _remove(folders: Iterable[Path]) -> None:
    """Those that are empty; one in which something still is stays."""
    for folder in list(folders):
        with suppress(OSError):
            folder.rmdir()


_entering = trio.CapacityLimiter(4)  # threads; the kernel moves one process after the other
_homes: dict[str, Cgroups] = {}  # by host marker


@asynccontextmanager
async def with_cgroups(marker: str, *, wanted: bool) -> AsyncIterator[str]:
    """While in here, each instance of this host gets a cgroup of its own; yields why not, or nothing.

    What kills the instances at the end goes inside: a cgroup that is not empty can't be removed.
    """
    home = await trio.to_thread.run_sync(Cgroups.here, marker) if wanted else None
    if home is None or home.reason:
        yield "turned off in the fleet file" if home is None else home.reason
        return
    await trio.to_thread.run_sync(home.clear)
    _homes[marker] = home
    try:
        yield ""
    finally:
        del _homes[marker]
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(home.close)


async def enter(marker: str, pid: int) -> list[Path]:
    """Give a process of a host cgroups of its own, if that host makes any. `marker` is `HOST_MARKER:INSTANCE`."""
    host, _, instance = marker.partition(":")
    home = _homes.get(host)
    if home is None:
        return []
    return await trio.to_thread.run_sync(home.enter, instance, pid, limiter=_entering)


async def leave(folders: list[Path]) -> None:
    """Remove them, now that what was in there is gone."""
    await trio.to_thread.run_sync(_remove, folders, limiter=_entering)
