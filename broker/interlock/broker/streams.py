"""What the kernel knows of a TCP stream that libzmq owns, by its descriptor, and how to end one: libzmq has no call."""

from __future__ import annotations

import os
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# struct tcp_info of Linux: milliseconds since the last data came, and all bytes that came
_LAST_DATA, _RECEIVED, _INFO_SIZE = struct.Struct("@I"), struct.Struct("@Q"), 136
_LAST_DATA_AT, _RECEIVED_AT = 52, 128
NO_LIMIT = 1 << 20  # descriptors: what Linux allows at most by default
_PAGE = resource.getpagesize()


def look(descriptor: int) -> tuple[int, float] | None:
    """Bytes that it has received, and seconds since it did so last. None if it is no TCP stream, or is closed."""
    try:
        stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
    except OSError:
        return None
    try:
        found = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
    except OSError:
        return None
    finally:
        stream.detach()  # it is libzmq's
    if len(found) < _INFO_SIZE:
        return None
    return _RECEIVED.unpack_from(found, _RECEIVED_AT)[0], _LAST_DATA.unpack_from(found, _LAST_DATA_AT)[0] / 1000


@contextmanager
def copied(descriptor: int) -> Iterator[socket.socket]:
    """The stream through a descriptor that nobody closes and uses again meanwhile. OSError if it is closed."""
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        yield copy


def end(stream: socket.socket) -> None:
    """Shut it down in both directions; its owner reads an end."""
    with suppress(OSError):  # it ended by itself
        stream.shutdown(socket.SHUT_RDWR)


def address(stream: socket.socket) -> str:
    """Where its other end is, or "" if that is not known (any more)."""
    try:
        name = stream.getpeername()
    except OSError:
        return ""
    return str(name[0]) if isinstance(name, tuple) else ""


def memory() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def descriptor_limit() -> int:
    """How many descriptors this process may have."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> int:
    """Raise it as far as the system lets us; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return descriptor_limit()
