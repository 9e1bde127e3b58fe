"""The token of a wrapped program: a file whose lock says who may work.

While the instance is on standby the host holds a lock on the file, so that the program's own `flock` on it waits. To
give the token is to let go of that lock; to take it is to put a new, locked file in the old one's place, so that nobody
begins anew, and then to wait for the lock of the old file, which the program holds while it works. The kernel frees the
locks of whoever dies.

A program that had opened the old file, but not locked it yet, waits at that one: so the host keeps those locks too, and
lets go of all of them when it gives the token again.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import trio

POLL_S = 0.005  # between looks at a lock that the program holds
STALE_S = 5.0  # of being active: whoever had opened a file of before that has locked it since, and opens the new one


class TokenFile:
    """Made locked: the instance begins on standby. A folder that only this user can enter is the caller's to choose."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = [self._place()]  # the newest last: the one that is at `path`
        self._given_at = float("inf")

    def give(self) -> None:
        """The program may work from now on."""
        self._given_at = time.monotonic()
        for file in self._files:
            fcntl.flock(file, fcntl.LOCK_UN)

    async def take(self) -> None:
        """Returns once the program does not work, and can't begin."""
        old = self._files
        if time.monotonic() - self._given_at >= STALE_S:
            for file in old[:-1]:
                os.close(file)
            old = old[-1:]
        self._given_at = float("inf")
        self._files = [*old, self._place()]
        waiting = list(old)
        while waiting and self._files:  # none: closed meanwhile, the program is dead
            waiting = [file for file in waiting if not _locked(file)]
            if waiting:
                await trio.sleep(POLL_S)
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


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
