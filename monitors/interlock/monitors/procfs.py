"""What /proc says of processes and of the machine, through files that are opened once and read again and again.

To open a file of /proc costs several times what reading it does. A file that was opened of a process also stays that
process's: once it is gone, reading fails, and never tells of another process with the same pid.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Mapping

import msgspec

PROC = "/proc"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # the unit of CPU times and of start times
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ONE_READ = 1 << 16  # bytes: more than any file of one process has
MAX_BYTES = 1 << 20  # of a file in all: /proc/stat of 1,000 cores has a tenth of that
KEPT_SHARE = 4  # one in so many of the descriptors that this process may have; the rest is the bus's and the library's


class KeptFile:
    """A file that is read from its beginning each time; with `keep`, it stays open from the first time on."""

    def __init__(self, path: str, *, keep: bool = True) -> None:
        self.path = path
        self._keep = keep
        self._descriptor = -1

    def read(self) -> bytes:
        """What one read gives: all of a file of one process. OSError once the process is gone."""
        descriptor = self._open()
        try:
            return os.pread(descriptor, ONE_READ, 0)
        finally:
            self._let_go()

    def read_all(self) -> bytes:
        """All of it: the kernel gives a list of many lines in pieces."""
        descriptor = self._open()
        try:
            parts = bytearray()
            while len(parts) < MAX_BYTES and (part := os.pread(descriptor, ONE_READ, len(parts))):
                parts += part
            return bytes(parts)
        finally:
            self._let_go()

    def close(self) -> None:
        """A second time does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _open(self) -> int:
        if self._descriptor < 0:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptor

    def _let_go(self) -> None:
        if not self._keep:
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def descriptors_to_keep() -> int:
    """How many files may be kept open, by the limit of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft, 0) // KEPT_SHARE


# --- one process


class Stat(msgspec.Struct, frozen=True, gc=False):  # made many times a second: a dataclass takes twice as long
    """A line of /proc/PID/stat. cpu, started: seconds, `started` since the machine was; rss: bytes."""

    state: str
    parent: int
    group: int
    major_faults: int
    cpu: float
    threads: int
    started: float
    rss: int

    @property
    def alive(self) -> bool:
        return self.state not in "ZXx"


def parse_stat(text: bytes) -> Stat:
    """ValueError for what is no such line."""
    # the name before may hold anything, ")" too
    fields = text[text.rindex(b")") + 2 :].split(None, 22)
    if len(fields) < 22:
        raise ValueError("a line of /proc/PID/stat that is too short")
    return Stat(
        state=chr(fields[0][0]),
        parent=int(fields[1]),
        group=int(fields[2]),
        major_faults=int(fields[9]),
        cpu=(int(fields[11]) + int(fields[12])) * TICK_S,
        threads=int(fields[17]),
        started=int(fields[19]) * TICK_S,
        rss=max(0, int(fields[21])) * PAGE_BYTES,
    )


def read_stat(pid: int, proc: str = PROC) -> Stat | None:
    """Of one process, once; None if there is none."""
    try:
        return parse_stat(KeptFile(f"{proc}/{pid}/stat", keep=False).read())
    except (OSError, ValueError):
        return None


def pids(proc: str = PROC) -> list[int]:
    """Of all processes that can be seen from here."""
    return [int(name) for name in os.listdir(proc) if name.isdigit()]


def parse_pairs(text: bytes) -> dict[str, int]:
    """`name: 12 ...` or `name 12` a line, as in /proc/PID/io, status, meminfo and the files of cgroups."""
    found = {}
    for line in text.split(b"\n"):
        name, _, rest = line.partition(b":" if b":" in line else b" ")
        words = rest.split(None, 1)
        if words and words[0].isdigit():
            found[name.decode("ascii", "replace")] = int(words[0])
    return found


def parse_namespaced(text: bytes) -> list[int]:
    """The pids of a process, from /proc/PID/status: in our PID namespace first, in its own last."""
    for line in text.split(b"\n"):
        if line.startswith(b"NSpid:"):
            return [int(word) for word in line.split()[1:] if word.isdigit()]
    return []


def switches(pid: int, proc: str = PROC, *, most: int) -> tuple[int, int] | None:
    """(voluntary, involuntary) context switches of all threads that live; None of more than `most`, or of none."""
    voluntary = involuntary = 0
    try:
        threads = os.listdir(f"{proc}/{pid}/task")
        if len(threads) > most:
            return None
        for thread in threads:
            found = parse_pairs(KeptFile(f"{proc}/{pid}/task/{thread}/status", keep=False).read())
            voluntary += found["voluntary_ctxt_switches"]
            involuntary += found["nonvoluntary_ctxt_switches"]
    except (OSError, KeyError):
        return None
    return voluntary, involuntary


def open_descriptors(pid: int, proc: str = PROC) -> int | None:
    """How many files a process has open; None where they may not be counted."""
    folder = f"{proc}/{pid}/fd"
    try:
        # since Linux 6.2 the folder's size says it; before, it is 0
        return os.stat(folder).st_size if _size_tells() else len(os.listdir(folder))
    except OSError:
        return None


def _size_tells() -> bool:
    global _told  # noqa: PLW0603  (asked once: it is the kernel's, for good)
    if _told is None:
        _told = os.stat("/proc/self/fd").st_size > 0
    return _told


_told: bool | None = None


def proportional(pid: int, proc: str = PROC) -> int | None:
    """Bytes that a process holds, of shared ones its share (PSS); None where it may not be asked.

    The kernel walks all of its pages for that: milliseconds for each GB.
    """
    try:
        found = parse_pairs(KeptFile(f"{proc}/{pid}/smaps_rollup", keep=False).read())
        return found["Pss"] * 1024
    except (OSError, KeyError):
        return None


def epoch_of_start(started: float) -> float:
    """Seconds since 1970 of a start time in seconds since the machine started, by the clock as it stands now."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + started


# --- pressure


def parse_pressure(text: bytes) -> dict[str, tuple[float, float]]:
    """By share ("some", "full"): (ratio of the last 10 s, seconds in all) in which tasks stood still."""
    found = {}
    for line in text.splitlines():
        words = line.decode("ascii", "replace").split()
        pairs = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        try:
            found[words[0]] = float(pairs["avg10"]) / 100, int(pairs["total"]) / 1e6
        except (LookupError, ValueError):
            continue
    return found


def read_pressure(files: Mapping[str, KeptFile]) -> Iterator[tuple[str, str, float, float]]:
    """(resource, share, ratio, seconds) of each that can be read; `files` by resource."""
    for name, file in files.items():
        try:
            found = parse_pressure(file.read())
        except OSError:
            continue
        for share, (ratio, seconds) in found.items():
            yield name, share, ratio, seconds
