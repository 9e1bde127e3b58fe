"""What the kernel knows of a TCP stream that libzmq owns, by its descriptor, and how to end one: libzmq has no call."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

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


class _Copy:
    """A descriptor of ours that can be made a copy of another one, also when no further descriptor is to be had."""

    def __init__(self) -> None:
        self._nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._copy = os.dup(self._nothing)

    @contextmanager
    def of(self, descriptor: int) -> Iterator[socket.socket]:
        os.dup2(descriptor, self._copy, inheritable=False)
        stream = socket.socket(fileno=self._copy)
        try:
            yield stream
        finally:
            stream.detach()
            os.dup2(self._nothing, self._copy, inheritable=False)


@cache
def _copy() -> _Copy:
    return _Copy()


@contextmanager
def copied(descriptor: int) -> Iterator[socket.socket]:
    """The stream through a descriptor that nobody closes and uses again meanwhile. OSError if it is closed.

    For one thread, and not twice at once.
    """
    if descriptor < 0:
        raise OSError(errno.EBADF, "not open")
    with _copy().of(descriptor) as stream:
        yield stream


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


@cache
def _statm(pid: int) -> int:
    return os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)


def memory() -> int:
    """Bytes of memory that this process has."""
    return int(os.pread(_statm(os.getpid()), 100, 0).split()[1]) * _PAGE


def descriptor_limit() -> int:
    """How many descriptors this process may have."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def descriptors() -> int:
    """How many it has."""
    try:
        # Linux says it since 6.2; looking at 20,000 entries takes 15 ms
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError:  # there is none left for the look itself
        return descriptor_limit()


def raise_descriptor_limit() -> int:
    """Raise it as far as the system lets us; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return descriptor_limit()
