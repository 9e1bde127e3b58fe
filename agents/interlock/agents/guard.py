"""Ends what a host leaves behind. Standard library only: it also runs as a process of its own, and must start fast.

As `python -I -S guard.py MARKER` it waits for the end of its standard input, a pipe from the host. The kernel closes
that pipe however the host ends, `kill -9` included; then everything that belongs to the host is killed, until nothing
is left, and the guard ends as well.

What belongs to a host: processes that carry its marker in their environment; the sessions and process groups that it
began, whatever is in them (the host names their first process on the pipe: `+123` when it starts, `-123` when all of it
is gone; this finds programs that overwrite or drop their environment); the sessions that these began; and all their
descendants. A process is sent its signal through a pidfd that was opened before it was looked at, so that a reused
process id never hits a stranger.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Collection
from typing import NamedTuple

HOST_VARIABLE = "INTERLOCK_HOST_RUN"
INSTANCE_VARIABLE = "INTERLOCK_INSTANCE"
PAUSE_S = 0.02  # between looks while killed processes disappear
GONE_S = 10.0  # a process that SIGKILL has not ended by then hangs in a driver: nothing more can be done from here
QUIET_LOOKS = 2  # in a row that find nothing, so that a process that forks during one look is seen by the next
MAX_LINE = 64  # bytes of one line from the host


class Seen(NamedTuple):
    """One line of /proc/PID/stat, as far as it matters."""

    pid: int
    parent: int
    group: int
    session: int
    started: int  # clock ticks since the machine started; with the pid it is unique


def look(pid: int) -> Seen | None:
    """A living process (a zombie is not); None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    fields = text[text.rfind(b")") + 2 :].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return Seen(pid, int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def carries(pid: int, entry: bytes) -> bool:
    """Whether the process was started with `entry` (NAME=value) in its environment."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return entry in file.read().split(b"\0")
    except OSError:
        return False


def belonging(variable: str, marker: str, leaders: Collection[int] = (), known: Collection[Seen] = ()) -> list[Seen]:
    """All living processes that belong to the marker or to the sessions of `leaders`; never the caller's own ones.

    `known`: seen to belong before. Once its parent is dead, a process that shed its environment and session is found
    only so.
    """
    living = {seen.pid: seen for name in os.listdir("/proc") if name.isdigit() and (seen := look(int(name)))}
    entry = f"{variable}={marker}".encode()
    begun = set(leaders)
    found = {each.pid for each in known if each.pid in living and living[each.pid].started == each.started}
    found |= {
        pid for pid, seen in living.items() if seen.session in begun or seen.group in begun or carries(pid, entry)
    }
    spared = _own(living)
    found -= spared
    children: dict[int, list[int]] = {}
    sessions: dict[int, list[int]] = {}
    for seen in living.values():
        children.setdefault(seen.parent, []).append(seen.pid)
        sessions.setdefault(seen.session, []).append(seen.pid)
    sessions.pop(os.getsid(0), None)
    fresh = list(found)
    while fresh:
        pid = fresh.pop()
        session = living[pid].session
        # a session whose first process is alive and a stranger's (a login shell) is not ours to end
        whole = sessions.get(session, []) if session == pid or session not in living else []
        for near in (*children.get(pid, ()), *whole):
            if near not in found and near not in spared:
                found.add(near)
                fresh.append(near)
    return [living[pid] for pid in sorted(found)]


def _own(living: dict[int, Seen]) -> set[int]:
    """The caller and its ancestors."""
    own: set[int] = set()
    pid = os.getpid()
    while pid > 1 and pid not in own:
        own.add(pid)
        pid = living[pid].parent if pid in living else 0
    return own


def kill(seen: Seen) -> None:
    """SIGKILL to exactly this process; nothing if it is gone or not ours to kill."""
    try:
        descriptor = os.pidfd_open(seen.pid)
    except OSError:
        return
    try:
        now = look(seen.pid)
        if now is not None and now.started == seen.started:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except OSError:
        return
    finally:
        os.close(descriptor)


def kill_all(
    variable: str,
    marker: str,
    leaders: Collection[int] = (),
    *,
    known: Collection[Seen] = (),
    within_s: float = GONE_S,
) -> tuple[int, list[int]]:
    """Kill all that belongs, again until nothing is left: (how many, pids that SIGKILL did not end in time).

    Blocks for up to `within_s` seconds. Only processes that this user may signal are counted.
    """
    killed: set[Seen] = set()
    deadline = time.monotonic() + within_s
    quiet = 0
    while True:
        left = [seen for seen in belonging(variable, marker, leaders, [*known, *killed]) if _may_signal(seen.pid)]
        for seen in left:
            kill(seen)
            killed.add(seen)
        quiet = 0 if left else quiet + 1
        if quiet >= QUIET_LOOKS:
            return len(killed), []
        if time.monotonic() > deadline:
            return len(killed), [seen.pid for seen in left]
        if left:
            time.sleep(PAUSE_S)


def _may_signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def main() -> int:
    """Wait for the host's end, then leave nothing of it."""
    marker = sys.argv[1]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    leaders: set[int] = set()
    rest = b""
    while chunk := os.read(0, 4096):
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[:MAX_LINE]
        for line in lines:
            if line[:1] == b"+" and line[1:].isdigit():
                leaders.add(int(line[1:]))
            elif line[:1] == b"-" and line[1:].isdigit():
                leaders.discard(int(line[1:]))
    _, left = kill_all(HOST_VARIABLE, marker, leaders)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
