"""Keeps a set of role processes running: starts them in order, starts again what dies, stops them in reverse order.

Every role is a direct child in a process group of its own, so that a terminal's Ctrl-C reaches the supervisor only,
which then stops the roles in order. The kernel ends a role whose supervisor was killed: PR_SET_PDEATHSIG, which holds
for the *thread* that forked, and therefore the fork happens here in the main thread and never in a worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import trio

from interlock.broker.errors import ConfigError, InterlockError
from interlock.broker.role import EXIT_WRONG, READY_FD

MAX_READY = 1 << 20  # bytes in which a role says that it is ready, and what of it is not
FIRST_STARTS = 3  # attempts of a role that dies before it ever was ready: a crash at start is seldom chance
RESTART_S = 0.2  # before the second restart; the first is at once, since a rollback may wait for it
RESTART_MAX_S = 10.0  # each further restart waits twice as long as the last one, up to this
STEADY_S = 30.0  # a role that ran for so long is started again at once
SLOW_START_S = 15.0  # not ready for so long: say so (and again after each such time)
STOP_S = 10.0  # after SIGTERM; then SIGKILL
DRAIN_S = 0.5  # for the last log lines of a role that is gone; its own children may hold the pipe open
MAX_LINE = 8192  # bytes of a log line; a longer one is broken
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: between fork and exec nothing may be imported

Say = Callable[[str, str], None]  # (role, line): must not block


@dataclass(frozen=True)
class RoleSpec:
    """A role as a command line. Roles of one phase start together, a phase when the one before is ready."""

    name: str
    argv: Sequence[str]
    phase: int = 0
    stop_s: float = STOP_S


class Backoff:
    """How long to wait before the next restart. Pure."""

    def __init__(self) -> None:
        self._next = 0.0

    def after(self, ran_s: float) -> float:
        """The wait after a run of `ran_s` seconds."""
        wait = 0.0 if ran_s >= STEADY_S else self._next
        self._next = min(max(2 * wait, RESTART_S), RESTART_MAX_S)
        return wait


class _Role:
    """One role across its restarts. `settled`: it was ready once, or failed for good."""

    def __init__(self, spec: RoleSpec) -> None:
        self.spec = spec
        self.backoff = Backoff()
        self.process: subprocess.Popen[bytes] | None = None
        self.settled = trio.Event()
        self.stop = trio.Event()
        self.gone = trio.Event()
        self.failure: InterlockError | None = None
        self.lacking: dict[str, str] = {}  # what of it did not serve when it was ready first, and why

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself, which is what was wanted
            (os.killpg if group else os.kill)(self.process.pid, number)


class Supervisor:
    """Runs `specs` until cancelled; see `run`. `say` takes the roles' log lines and the supervisor's own ("up")."""

    def __init__(self, specs: Sequence[RoleSpec], say: Say) -> None:
        self._roles = [_Role(spec) for spec in specs]
        self._say = say

    @property
    def pids(self) -> dict[str, int]:
        """Of the roles that run now."""
        return {
            role.spec.name: role.process.pid
            for role in self._roles
            if role.process is not None and role.process.returncode is None
        }

    @property
    def lacking(self) -> dict[str, str]:
        """What did not serve when its role was ready first, by name, and why."""
        return {name: reason for role in self._roles for name, reason in role.lacking.items()}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started when all roles are ready. Returns only by cancellation, or with the error of a role that can't start.

        Either way every role is gone when it returns.
        """
        phases = sorted({role.spec.phase for role in self._roles})
        failure: InterlockError | None = None
        async with trio.open_nursery() as nursery:
            try:
                for phase in phases:
                    roles = [role for role in self._roles if role.spec.phase == phase]
                    for role in roles:
                        nursery.start_soon(self._keep, role)
                    await self._until_ready(roles)
                task_status.started()
                await trio.sleep_forever()
            except InterlockError as error:
                failure = error
            finally:
                with trio.CancelScope(shield=True):
                    for phase in reversed(phases):
                        await self._stop([role for role in self._roles if role.spec.phase == phase])
        if failure is not None:
            raise failure

    async def _until_ready(self, roles: list[_Role]) -> None:
        async with trio.open_nursery() as nursery:
            for role in roles:
                nursery.start_soon(self._settle, role, nursery.cancel_scope)
        for role in roles:
            if role.failure is not None:
                raise role.failure

    async def _settle(self, role: _Role, others: trio.CancelScope) -> None:
        while not role.settled.is_set():
            with trio.move_on_after(SLOW_START_S):
                await role.settled.wait()
            if not role.settled.is_set():
                self._say("up", f"{role.spec.name} is not ready yet")
        if role.failure is not None:
            others.cancel()

    async def _stop(self, roles: list[_Role]) -> None:
        alive = [role for role in roles if role.process is not None]
        for role in roles:
            role.stop.set()
            role.signal(signal.SIGTERM)
        with trio.move_on_after(max((role.spec.stop_s for role in alive), default=0.0)):
            for role in alive:
                await role.gone.wait()
        for role in alive:
            if not role.gone.is_set():
                self._say("up", f"{role.spec.name} did not stop within {role.spec.stop_s:g} s: killed")
                role.signal(signal.SIGKILL, group=True)
        for role in alive:
            await role.gone.wait()

    async def _keep(self, role: _Role) -> None:
        """Shielded: only `stop` ends it, and not before its process is gone."""
        with trio.CancelScope(shield=True):
            starts = 0
            while not role.stop.is_set():
                begun = trio.current_time()
                starts += 1
                code = await self._run_once(role)
                if role.stop.is_set():
                    break
                if not role.settled.is_set() and (code == EXIT_WRONG or code is None or starts >= FIRST_STARTS):
                    role.failure = role.failure or ConfigError(
                        f"did not start: {_ending(code)}", where=role.spec.name, hint="its own words stand above"
                    )
                    role.settled.set()
                    break
                wait = role.backoff.after(trio.current_time() - begun)
                when = f"in {wait:g} s" if wait else "now"
                self._say("up", f"{role.spec.name} ended ({_ending(code)}); starting it again {when}")
                with trio.move_on_after(wait):
                    await role.stop.wait()
            role.gone.set()

    async def _run_once(self, role: _Role) -> int | None:
        """One life of the role's process; its exit code, negative for a signal, None if it can't be started at all."""
        log, log_end = os.pipe2(os.O_CLOEXEC)
        ready, ready_end = os.pipe2(os.O_CLOEXEC)
        log_stream, ready_stream = trio.lowlevel.FdStream(log), trio.lowlevel.FdStream(ready)
        async with log_stream, ready_stream:
            try:
                role.process = process = _spawn(role.spec.argv, log_end, ready_end)
            except OSError as error:
                role.failure = ConfigError(f"can't be started: {error}", where=role.spec.name)
                return None
            finally:
                os.close(log_end)
                os.close(ready_end)
            async with trio.open_nursery() as nursery:
                logged = trio.Event()
                nursery.start_soon(self._read_log, role.spec.name, log_stream, logged)
                nursery.start_soon(self._read_ready, role, ready_stream)
                await _exited(process)
                with trio.move_on_after(DRAIN_S):
                    await logged.wait()
                nursery.cancel_scope.cancel()
            return process.returncode

    async def _read_ready(self, role: _Role, stream: trio.lowlevel.FdStream) -> None:
        line = b""
        while not line.endswith(b"\n"):
            if len(line) > MAX_READY or not (chunk := await stream.receive_some(MAX_READY)):
                return
            line += chunk
        if not role.settled.is_set():
            with contextlib.suppress(msgspec.DecodeError):  # it is ready, whatever else it says, or nothing
                role.lacking = msgspec.json.decode(line.removeprefix(b"ready"), type=dict[str, str])
            role.settled.set()

    async def _read_log(self, name: str, stream: trio.lowlevel.FdStream, logged: trio.Event) -> None:
        rest = b""
        async for chunk in stream:
            *lines, rest = (rest + chunk).split(b"\n")
            while len(rest) > MAX_LINE:
                lines.append(rest[:MAX_LINE])
                rest = rest[MAX_LINE:]
            for line in lines:
                self._say(name, line.decode("utf-8", "replace"))
        if rest:
            self._say(name, rest.decode("utf-8", "replace"))
        logged.set()


def _spawn(argv: Sequence[str], log_end: int, ready_end: int) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def die_with_parent() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died between the fork and the call above
            os._exit(1)

    return subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=log_end,
        stderr=log_end,
        pass_fds=(ready_end,),
        env={**os.environ, READY_FD: str(ready_end), "PYTHONUNBUFFERED": "1"},
        process_group=0,
        preexec_fn=die_with_parent,  # noqa: PLW1509  (no thread here holds a lock it needs)
    )


async def _exited(process: subprocess.Popen[bytes]) -> None:
    """Waits for the end without reaping before the rest of its process group is killed (the number stays taken)."""
    pidfd = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody else was in it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(code: int | None) -> str:
    if code is None:
        return "no process"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
