"""XIDs as the kernel log tells them: the NVIDIA driver writes each there, with the process that it blames.

NVRM: Xid (PCI:0000:41:00): 31, pid=4711, name=python3, Ch 00000008, intr 00000000. MMU Fault: ...
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

KMSG = Path("/dev/kmsg")
RECORD = 8192  # bytes: the kernel's own limit of one record
PAUSE_S = 1.0  # where there is nothing to wait on
MAX_WORDS = 200  # characters of the driver's own words

_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)(?:, (.*))?")
_PID = re.compile(r"pid='?(\d+)'?")


@dataclass(frozen=True)
class KernelXid:
    """bus: of the card, "domain:bus:device" in hexadecimal digits. pid: 0 where the driver names no process."""

    bus: str
    number: int
    pid: int
    words: str


def parse(line: str) -> KernelXid | None:
    """The XID that a line of the kernel log tells of, if it does."""
    found = _XID.search(line)
    if found is None:
        return None
    words = (found[3] or "").strip()
    pid = _PID.search(words)
    return KernelXid(place(found[1]), int(found[2]), int(pid[1]) if pid else 0, words[:MAX_WORDS])


def place(bus: str) -> str:
    """A place on the PCI bus in one form, however it was written: 0000:41:00 for 00000000:41:00.0."""
    domain, _, rest = bus.lower().rpartition(":")[0].rpartition(":")
    device = bus.rpartition(":")[2].partition(".")[0]
    return f"{(domain or '0').zfill(4)[-4:]}:{rest}:{device.lower()}"


async def follow(path: Path, hear: Callable[[KernelXid], Awaitable[None]], readable: Callable[[str], None]) -> None:
    """Hear every XID from now on. `readable` is told once: why it can't be read, or nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        readable(f"{path}: {error.strerror}")
        return
    try:
        with suppress(OSError):  # a pipe has no end to go to
            os.lseek(descriptor, 0, os.SEEK_END)
        readable("")
        while True:
            await _next(descriptor, hear)
    finally:
        os.close(descriptor)


async def _next(descriptor: int, hear: Callable[[KernelXid], Awaitable[None]]) -> None:
    try:
        raw = os.read(descriptor, RECORD)
    except BlockingIOError:
        await trio.lowlevel.wait_readable(descriptor)
        return
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # overwritten before it was read; longer than a record
            raise
        await trio.lowlevel.checkpoint()
        return
    if not raw:
        await trio.sleep(PAUSE_S)
    for line in raw.decode("utf-8", "replace").splitlines():
        if (found := parse(line)) is not None:
            await hear(found)
