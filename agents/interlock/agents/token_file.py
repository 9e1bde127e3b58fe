"""The token of a wrapped program: a file whose lock says who may work.

While the instance is on standby the host holds a lock on the file, so that the program's own `flock` on it waits. To
give the token is to let go of that lock; to take it is to put a new, locked file in the old one's place, so that nobody
begins anew, and then to wait for the lock of the old file, which the program holds while it works. The kernel frees the
locks of whoever dies.

A program that had opened the old file, but not locked it yet, waits at that one: so the host keeps that lock too, lets
go of all when it gives the token again, and forgets a file once nobody else has it open.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import trio

POLL_S = 0.005  # between looks at a lock that the program holds


class TokenFile:
    """Made locked: the instance begins on standby. A folder that only this user can enter is the caller's to choose."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = [self._place()]  # the newest last: the one that is at `path`

    def give(self) -> None:
        """The program may work from now on."""
        for file in self._files:
            fcntl.flock(file, fcntl.LOCK_UN)

    async def take(self) -> None:
        """Returns once the program does not work, and can't begin."""
        old = self._files
        self._files = [*old, self._place()]
        waiting = list(old)
        while waiting and self._files:  # none: closed meanwhile, the program is dead
            waiting = [file for file in waiting if not _locked(file)]
            if waiting:
                await trio.sleep(POLL_S)
        for file in self._files[:-1]:
            if _only_ours(file):
                os.close(file)
                self._files.remove(file)
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """The program is dead."""
        for file in self._files:
            os.close(file)
        self._files = []
        self.path.unlink(missing_ok=True)

    def _place(self) -> int:
        """A new file at `path`, locked before anybody can open it."""
        aside = self.path.with_suffix(".new")
        file = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside.rename(self.path)
        return file


def _only_ours(file: int) -> bool:
    """Nobody else has it open: only then is a write lease granted. Its name is gone, so that nobody can open it."""
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    return True


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
