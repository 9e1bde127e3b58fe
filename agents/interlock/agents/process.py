"""Processes of agents: the only module of the host that starts any.

Each runs in a session and process group of its own, carries the markers of its host and instance in its environment,
and has one task in the owner's nursery that waits for its end. Whatever way it ends, or the owner is cancelled, that
task then kills all that belongs to it (`guard.py` says what that is) and waits until it is gone. The guard does the
same for all of a host's processes when the host itself is killed.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

import msgspec
import trio

from interlock.agents import cgroup, guard
from interlock.broker.errors import InterlockError
from interlock.broker.shielding import start_shielded

log = logging.getLogger(__name__)

LOG_KEEP = 1 << 20  # bytes of an instance's log kept when it starts: what happened before is found in there
LOG_LIMIT = 16 << 20  # bytes a log may grow to while the instance runs; then it is cut to LOG_KEEP
LOG_CHECK_S = 0.5  # between looks at the size of a log: a program that floods it writes some 100 MB meanwhile
TAIL_BYTES = 64 << 10  # of a log, read for its last lines
GUARD_PAUSE_S = 0.2  # before a guard that died is replaced, or replacing it is tried again
GUARD_LEAVE_S = 15.0  # for the guard to end with its host; it waits guard.GONE_S for processes that hang
PIPE_BYTES = 1 << 16  # read at once from a command
OUTPUT_LIMIT = 1 << 20  # bytes of output kept of a command that is run to its end

_killing = trio.CapacityLimiter(64)  # threads; of its own, so that a rollback waits for no file or database
CHECK = "check-"  # how the names of what is run to its end begin
_guards: dict[str, Guard] = {}  # by host marker: who is told of each process that starts


class StartFailed(InterlockError):
    """A program could not be started at all: it does not exist or may not be run. No process was left."""


def host_marker(state_dir: Path) -> str:
    """Names the host of a state folder, the same after each restart, so that leftovers of the last run are found."""
    return uuid.uuid5(uuid.NAMESPACE_URL, state_dir.resolve().as_uri()).hex


async def kill_marked(marker: str) -> int:
    """Kill all that an earlier run of this host left, and wait until it is gone. Returns how many there were."""
    killed, left = await _kill_all(guard.HOST_VARIABLE, marker)
    if left:
        log.warning("processes of an earlier run can't be killed, they hang in the kernel: %s", left)
    return killed


async def _kill_all(
    variable: str, marker: str, leaders: Sequence[int] = (), known: Sequence[guard.Seen] = ()
) -> tuple[int, list[int]]:
    work = partial(guard.kill_all, variable, marker, leaders, known=known)
    with trio.CancelScope(shield=True):
        killed, left = await trio.to_thread.run_sync(work, limiter=_killing)
    return killed, left


# --- one process


class Process:
    """A started process and all that it started. Made by `start`."""

    def __init__(self, raw: trio.Process, marker: str, log_path: Path, log_start: int) -> None:
        self.pid = raw.pid  # also its process group and session
        self.started = time.time()
        self.marker = marker
        self.log_path = log_path
        self.survivors: list[int] = []  # what SIGKILL did not end within guard.GONE_S
        self._raw = raw
        self._log_start = log_start
        self._cgroups: list[Path] = []
        self._known: list[guard.Seen] = []
        self._exited = trio.Event()
        self._gone = trio.Event()

    @property
    def returncode(self) -> int | None:
        """Of the process itself; None while it runs, negative for a signal."""
        return self._raw.returncode

    async def exited(self) -> int:
        """Wait for the process itself to end, and return its code; what it started may take a moment longer."""
        await self._exited.wait()
        return self._code()

    async def gone(self) -> int:
        """Wait until nothing of it is left."""
        await self._gone.wait()
        return self._code()

    async def stop(self, grace_s: float) -> int:
        """SIGTERM to its group; SIGKILL to all that belongs to it after `grace_s`, or at once if cancelled.

        Returns when nothing is left (or hangs in the kernel: `survivors`), with the exit code.
        """
        await self._look()
        self._signal(signal.SIGTERM)
        try:
            with trio.move_on_after(grace_s):
                await self._exited.wait()
        finally:
            self.kill()
        return await self.gone()

    def kill(self) -> None:
        """SIGKILL to its group, now; the rest follows by itself."""
        self._signal(signal.SIGKILL)

    def tail(self, lines: int = 20) -> str:
        """The last lines that it printed since it started."""
        return _tail(self.log_path, self._log_start, lines)

    async def _look(self) -> None:
        """Note what belongs to it: once a parent is dead, nobody knows all of its children."""
        if not self._exited.is_set():
            look = partial(guard.belonging, guard.INSTANCE_VARIABLE, self.marker, [self.pid])
            with trio.CancelScope(shield=True):
                self._known = await trio.to_thread.run_sync(look, limiter=_killing)

    def _code(self) -> int:
        code = self._raw.returncode
        return -signal.SIGKILL if code is None else code  # None: it hangs in the kernel, and will end so

    def _signal(self, number: signal.Signals) -> None:
        if not self._exited.is_set():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    async def _watch(self) -> None:
        """Wait for the end; then leave nothing. Cancelled: end it."""
        try:
            if self._raw.returncode is None and f":{CHECK}" not in self.marker:
                # only now, so that nobody waits for it: what it starts in its first millisecond stays outside
                self._cgroups = await cgroup.enter(self.marker, self.pid)
            while self._raw.returncode is None:
                with trio.move_on_after(LOG_CHECK_S):
                    await self._raw.wait()
                    break
                await self._trim()
        finally:
            with trio.CancelScope(shield=True):
                await self._end()

    async def _trim(self) -> None:
        try:
            if self.log_path.stat().st_size <= LOG_LIMIT:
                return
            if await trio.to_thread.run_sync(trim_log, self.log_path, LOG_LIMIT, LOG_KEEP):
                self._log_start = 0
        except FileNotFoundError:  # somebody tidied up
            return
        except OSError as error:  # a full disk is no reason to end an agent
            log.warning("%s: its log can't be cut: %s", self.log_path, error)

    async def _end(self) -> None:
        if self._raw.returncode is not None:
            self._exited.set()
        _, self.survivors = await _kill_all(guard.INSTANCE_VARIABLE, self.marker, [self.pid], self._known)
        if not self.survivors:
            await self._raw.wait()
        if self.survivors:
            log.warning("%s: processes that can't be killed, they hang in the kernel: %s", self.marker, self.survivors)
        elif (told := _guards.get(_host_of(self.marker))) is not None:
            told.forget(self.pid)
        if self._cgroups:
            await cgroup.leave(self._cgroups)
        self._exited.set()
        self._gone.set()


async def start(
    nursery: trio.Nursery,
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log_path: Path,
    marker: str,
) -> Process:
    """Start a program; `nursery` owns it from then on. StartFailed if it can't be run.

    `env` is its whole environment, to which the markers are added. `marker` is `HOST_MARKER:INSTANCE`, unique per start
    within a run of the host. Standard input is empty; standard output and error are appended to `log_path`.
    """
    host = _host_of(marker)
    whole = {**env, guard.HOST_VARIABLE: host, guard.INSTANCE_VARIABLE: marker}
    with trio.CancelScope(shield=True):
        log_start = await trio.to_thread.run_sync(_prepare_log, log_path)
        raw = await _open(argv, cwd, whole, log_path)
        process = Process(raw, marker, log_path, log_start)
        if (told := _guards.get(host)) is not None:
            told.remember(process.pid)
        try:
            nursery.start_soon(process._watch, name=f"process {marker}")
        except RuntimeError:  # the nursery is closed already
            await process._end()
            raise
    return process


def _host_of(marker: str) -> str:
    return marker.partition(":")[0]


async def _open(argv: Sequence[str], cwd: Path, env: Mapping[str, str], log_path: Path) -> trio.Process:
    try:
        output = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StartFailed(f"its log can't be written: {error.strerror}", where=str(log_path)) from None
    try:
        return await _launch(argv, cwd, env, output)
    finally:
        os.close(output)


async def _launch(
    argv: Sequence[str], cwd: Path, env: Mapping[str, str], stderr: int, *,
    stdin: int = subprocess.DEVNULL, stdout: int | None = None,
) -> trio.Process:  # fmt: skip
    """A program in a session of its own; `stdout` None: where `stderr` goes."""
    if not await trio.Path(cwd).is_dir():
        raise StartFailed("there is no such folder to run in", where=str(cwd))
    try:
        return await trio.lowlevel.open_process(
            list(argv), cwd=cwd, env=env, stdin=stdin, stdout=stderr if stdout is None else stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError, IndexError) as error:  # the latter two: a zero byte in an argument, no arguments
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        program = argv[0] if argv else "an empty command"
        raise StartFailed(
            f"can't be started: {reason}", where=program, hint="is it installed, executable, and its path right?"
        ) from None


# --- commands that are run to their end


class Ended(msgspec.Struct, frozen=True):
    """`returncode` is None if the deadline passed and it was killed. `output`: what it printed, both streams."""

    returncode: int | None
    output: str


async def run_to_end(
    argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float, host: str = ""
) -> Ended:
    """Run a command and all that it starts, killed after `timeout_s`. `host` is the host's marker. StartFailed."""
    marker = f"{host or uuid.uuid4().hex}:{CHECK}{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="interlock-check-") as scratch:
        output = Path(scratch) / "output"
        failed: StartFailed | None = None
        async with trio.open_nursery() as nursery:
            try:
                process = await start(nursery, argv, cwd=cwd, env=env, log_path=output, marker=marker)
                with trio.move_on_after(timeout_s) as scope:
                    await process.exited()
            except StartFailed as error:  # raised outside, where it is not in a group
                failed = error
            nursery.cancel_scope.cancel()  # kills what it left, or all of it
        if failed is not None:
            raise failed
        text = _head(output)
    return Ended(None if scope.cancelled_caught else process.returncode, text)


@asynccontextmanager
async def piped(
    argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], host: str = "", given: bool = False
) -> AsyncIterator[Piped]:
    """A command that writes to us, or (`given`) reads from us; on leaving, it and all that it started is killed.

    `host` is the host's marker. StartFailed.
    """
    marker = f"{host or uuid.uuid4().hex}:pipe-{uuid.uuid4().hex}"
    whole = {**env, guard.HOST_VARIABLE: _host_of(marker), guard.INSTANCE_VARIABLE: marker}
    with tempfile.TemporaryFile() as errors:
        raw = await _launch(
            argv, cwd, whole, errors.fileno(),
            stdin=subprocess.PIPE if given else subprocess.DEVNULL,
            stdout=errors.fileno() if given else subprocess.PIPE,
        )  # fmt: skip
        if (told := _guards.get(_host_of(marker))) is not None:
            told.remember(raw.pid)
        try:
            yield Piped(raw, errors)
        finally:
            with trio.CancelScope(shield=True):
                for stream in (raw.stdin, raw.stdout):
                    if stream is not None:
                        await stream.aclose()
                await _kill_all(guard.INSTANCE_VARIABLE, marker, [raw.pid])
                await raw.wait()
                if told is not None:
                    told.forget(raw.pid)


class Piped:
    """A command at the other end of a pipe."""

    def __init__(self, raw: trio.Process, errors: IO[bytes]) -> None:
        self._raw = raw
        self._errors = errors

    async def read(self) -> bytes:
        """What it wrote, some of it; empty at the end."""
        assert self._raw.stdout is not None
        return bytes(await self._raw.stdout.receive_some(PIPE_BYTES))

    async def write(self, data: bytes) -> None:
        """trio.BrokenResourceError if it does not read any more."""
        assert self._raw.stdin is not None
        await self._raw.stdin.send_all(data)

    async def ended(self) -> Ended:
        """Nothing more is written; its exit code, and the last of what it said of errors."""
        if self._raw.stdin is not None:
            await self._raw.stdin.aclose()
        code = await self._raw.wait()
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - TAIL_BYTES))
        return Ended(code, self._errors.read().decode("utf-8", "replace"))


# --- logs


def trim_log(path: Path, limit: int, keep: int) -> bool:
    """Cut a log of more than `limit` bytes to its last `keep` bytes, from the start of a line. True if it was cut.

    In place, since a running process may hold it open (for appending); a line that it prints meanwhile may be lost.
    """
    with suppress(FileNotFoundError):
        size = path.stat().st_size
        if size > limit:
            with open(path, "r+b") as file:
                file.seek(size - keep)
                rest = file.read(keep)
                file.truncate(0)
            with open(path, "ab") as file:
                file.write(rest[rest.find(b"\n") + 1 :])
            return True
    return False


def _prepare_log(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trim_log(path, LOG_KEEP, LOG_KEEP)
        return path.stat().st_size if path.exists() else 0
    except OSError as error:
        raise StartFailed(f"its log can't be written: {error.strerror}", where=str(path)) from None


def _head(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(OUTPUT_LIMIT).decode("utf-8", "replace")


def _tail(path: Path, begin: int, lines: int) -> str:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(begin if begin <= size else 0, size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


# --- the guard


class Guard:
    """The guard of this host while it runs: `pid` changes when one that was killed is replaced."""

    def __init__(self, marker: str) -> None:
        self.marker = marker
        self.pid = 0
        self._leaders: set[int] = set()
        self._pipe: int | None = None

    def remember(self, pid: int) -> None:
        self._leaders.add(pid)
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        self._leaders.discard(pid)
        self._tell(f"-{pid}\n")

    def _tell(self, line: str) -> None:
        if self._pipe is not None:
            with suppress(BrokenPipeError, BlockingIOError):  # it was killed, or stopped: the next one gets all of them
                os.write(self._pipe, line.encode())

    async def _run(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        raw = await self._open()
        starting = True
        while True:
            try:
                if starting:
                    await start_shielded(scope, task_status, None)
                starting = False
                await raw.wait()
            finally:
                self._close()
                with trio.CancelScope(shield=True), trio.move_on_after(GUARD_LEAVE_S):
                    await raw.wait()
            log.warning("the guard of this host's processes ended (code %s); starting another", raw.returncode)
            raw = await self._replace()

    async def _replace(self) -> trio.Process:
        while True:
            await trio.sleep(GUARD_PAUSE_S)
            try:
                return await self._open()
            except StartFailed as error:  # out of processes or memory: agents go on, unguarded for the moment
                log.error("%s; trying again", error)

    async def _open(self) -> trio.Process:
        for_guard, ours = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(for_guard, True)
        self._pipe = ours
        for leader in sorted(self._leaders):  # before it starts: it must not miss one if the host dies right then
            self._tell(f"+{leader}\n")
        try:
            with trio.CancelScope(shield=True):
                raw = await trio.lowlevel.open_process(
                    [sys.executable, "-I", "-S", guard.__file__, self.marker],
                    stdin=for_guard,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as error:
            self._close()
            raise StartFailed(f"the guard can't be started: {error.strerror}", where=sys.executable) from None
        finally:
            os.close(for_guard)
        self.pid = raw.pid
        return raw

    def _close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


@asynccontextmanager
async def guarded(marker: str) -> AsyncIterator[Guard]:
    """While in here, a guard runs that kills all of this host's processes when the host is killed.

    One that is killed itself is replaced. At the end it kills whatever is left, so this goes around the nursery of the
    instances. Cancelling what is in here doesn't end it: instances that are being stopped get the time they have.
    """
    keeper = Guard(marker)
    _guards[marker] = keeper
    scope = trio.CancelScope()

    async def watch(*, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await keeper._run(scope, task_status=task_status)

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(watch)
            try:
                yield keeper
            finally:
                scope.cancel()
    finally:
        _guards.pop(marker, None)
