"""What the main program of every role shares: signals, logging, exit codes, readiness, and who holds a state folder."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import msgspec
import trio

from interlock.broker.errors import ConfigError, InterlockError, InUse

EXIT_DONE = 0
EXIT_BROKEN = 1  # a defect of ours: the traceback is on stderr
EXIT_WRONG = 2  # what was asked for can't be done: the line on stderr says why
READY_FD = "INTERLOCK_READY_FD"  # the descriptor on which a supervisor waits for the line that begins with "ready"
MAX_HOLDER = 1000  # bytes of a lock file that are read: it holds one short map


class Ready(Protocol):
    """Says that a role serves now. `lacking`: what of it does not, by name, and why."""

    def __call__(self, lacking: Mapping[str, str] = ...) -> None: ...


_log = logging.getLogger(__name__)


class _OneLine(logging.Formatter):
    """One line a record, also where a traceback belongs to it."""

    def format(self, record: logging.LogRecord) -> str:
        return " | ".join(super().format(record).splitlines())


def log_to_stderr() -> None:
    """Log at the level of INTERLOCK_LOG (default INFO), one line a record. ConfigError for a level nobody knows."""
    level = os.environ.get("INTERLOCK_LOG", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"unknown level {level!r}", where="INTERLOCK_LOG", hint="DEBUG, INFO, WARNING or ERROR")
    stderr = logging.StreamHandler()
    stderr.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[stderr], force=True)


def ready(lacking: Mapping[str, str] = MappingProxyType({})) -> None:
    """Tell whoever started this process that it serves now, all but what is `lacking`; one line.

    Does nothing without INTERLOCK_READY_FD, or twice.
    """
    number = os.environ.pop(READY_FD, "")
    if not number.isdigit():
        return
    with suppress(OSError):  # nobody waits any more
        os.write(int(number), b"ready" + (b" " + msgspec.json.encode(dict(lacking)) if lacking else b"") + b"\n")
        os.close(int(number))


def run_role(name: str, main: Callable[[Ready], Awaitable[None]]) -> int:
    """Run a role until it ends or SIGINT or SIGTERM cancels it, and return the exit code of the process."""

    async def watched() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:

                async def stop_on_signal() -> None:
                    async for number in signals:
                        _log.info("%s: stopping on %s", name, signal.Signals(number).name)
                        nursery.cancel_scope.cancel()

                nursery.start_soon(stop_on_signal)
                await main(ready)
                nursery.cancel_scope.cancel()

    code = EXIT_DONE
    try:
        log_to_stderr()
        trio.run(watched)
    except* InterlockError as group:
        for error in _leaves(group):
            print(f"interlock {name}: {error}", file=sys.stderr, flush=True)
        code = EXIT_WRONG
    except* Exception as group:
        _log.critical("%s: a defect ended it", name, exc_info=group)
        code = EXIT_BROKEN
    return code


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


@contextmanager
def held(path: Path, who: str) -> Iterator[None]:
    """Hold the lock file at `path`, which names this process and role. InUse says who holds it otherwise.

    The lock ends with the process, however it ends. The file goes with the lock; whoever locks a file that was removed
    meanwhile takes the new one, so that two holders are never possible.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, msgspec.json.encode({"pid": os.getpid(), "role": who}) + b"\n", 0)
        yield
    finally:
        with suppress(FileNotFoundError):  # somebody tidied up; the lock was held all the same
            path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"can't be opened: {error.strerror}", where=str(path)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, MAX_HOLDER, 0)
            os.close(descriptor)
            raise _in_use(path, holder) from None
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_use(path: Path, holder: bytes) -> InUse:
    try:
        found = msgspec.json.decode(holder, type=dict[str, str | int])
        by = f"{found['role']}, process {found['pid']}"
    except (msgspec.DecodeError, KeyError):
        by = "a process that has not written its name yet"
    return InUse(f"held by {by}", where=str(path), hint="stop it first, or use another state folder")
