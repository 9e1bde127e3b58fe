"""What the kernel tells by itself, at once: a process ended, the machine lacks something, a cgroup ran empty.

A process is waited for through a pidfd. Pressure triggers and cgroups signal by POLLPRI, which a poll consumes: so a
thread of its own polls for those, and nothing else does. What this machine does not permit is said once, with the
reason, and is noticed with the next sample instead.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import trio

from interlock.monitors.procfs import PROC, parse_pairs

log = logging.getLogger("interlock.monitors")

# Stood still for 150 ms of 2 s: a machine that is only busy does not, one that swaps does. Windows of whole two seconds
# are what a process without rights may ask for (since Linux 6.1).
TRIGGER = b"some 150000 2000000"
RESOURCES = ("cpu", "memory", "io")
SOURCES = ("pidfd", "pressure", "cgroup")


class Alarms:
    """Owned by a monitor; `run` ends with it. Callbacks are called in the trio thread, and return at once."""

    def __init__(
        self,
        *,
        ended: Callable[[str], None],
        stalled: Callable[[str], None],
        populated: Callable[[str, bool], None],
        proc: str = PROC,
    ) -> None:
        self.permitted: dict[str, bool] = {}  # by source; one that was not needed yet is not in here
        self._ended = ended
        self._stalled = stalled
        self._populated = populated
        self._proc = proc
        self._watching: dict[str, tuple[int, trio.CancelScope]] = {}
        self._nursery: trio.Nursery | None = None
        self._cgroups: Mapping[str, Path] = {}
        self._kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    async def run(self) -> None:
        """Until cancelled."""
        token = trio.lowlevel.current_trio_token()

        def tell(call: Callable[[], None]) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(call)

        poller = _Poller(self, tell)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._poll, poller)
                self._nursery = nursery
                try:
                    await trio.sleep_forever()
                finally:
                    self._nursery = None
                    poller.over = True
                    os.eventfd_write(self._kick, 1)
        finally:
            os.close(self._kick)

    async def _poll(self, poller: _Poller) -> None:
        with trio.CancelScope(shield=True):  # ended by the kick, within a millisecond
            await trio.to_thread.run_sync(poller.run, limiter=trio.CapacityLimiter(1))

    def follow(self, processes: Mapping[str, int], cgroups: Mapping[str, Path]) -> None:
        """Watch these from now on, by instance id: the process, and the file of events of its cgroup."""
        for id, (pid, scope) in list(self._watching.items()):
            if processes.get(id) != pid:
                scope.cancel()
                del self._watching[id]
        for id, pid in processes.items():
            if id not in self._watching and self._nursery is not None:
                self._watch(id, pid, self._nursery)
        if self._nursery is not None and dict(cgroups) != dict(self._cgroups):
            self._cgroups = dict(cgroups)
            os.eventfd_write(self._kick, 1)

    def _watch(self, id: str, pid: int, nursery: trio.Nursery) -> None:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # the next sample finds it gone
        except OSError as error:
            self.permit("pidfd", error)
            return
        self.permit("pidfd")
        scope = trio.CancelScope()
        self._watching[id] = pid, scope

        async def wait() -> None:
            try:
                with scope:
                    await trio.lowlevel.wait_readable(descriptor)
                    self._ended(id)
            finally:
                os.close(descriptor)

        nursery.start_soon(wait)

    def permit(self, source: str, error: OSError | None = None) -> None:
        """Note whether a source of events can be had; why not is said once."""
        if self.permitted.get(source, True) and error is not None:
            log.info("no events by %s: %s; what they tell is noticed with the next sample", source, _why(error))
        self.permitted[source] = error is None


class _Poller:
    """Runs in a thread of its own; tells what happened through `tell`."""

    def __init__(self, alarms: Alarms, tell: Callable[[Callable[[], None]], None]) -> None:
        self.over = False
        self._alarms = alarms
        self._tell = tell
        self._poll = select.poll()
        self._pressure: dict[int, str] = {}
        self._cgroups: dict[str, int] = {}

    def run(self) -> None:
        alarms = self._alarms
        self._poll.register(alarms._kick, select.POLLIN)
        try:
            for resource in RESOURCES:
                self._trigger(resource)
            while not self.over:
                for descriptor, events in self._poll.poll():
                    self._take(descriptor, events)
        finally:
            for descriptor in (*self._pressure, *self._cgroups.values()):
                os.close(descriptor)

    def _trigger(self, resource: str) -> None:
        alarms = self._alarms
        try:
            descriptor = os.open(f"{alarms._proc}/pressure/{resource}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(descriptor, TRIGGER + b"\0")
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            self._tell(lambda error=error: alarms.permit("pressure", error))  # type: ignore[misc]
            return
        self._pressure[descriptor] = resource
        self._poll.register(descriptor, select.POLLPRI)
        self._tell(lambda: alarms.permit("pressure"))

    def _take(self, descriptor: int, events: int) -> None:
        alarms = self._alarms
        if descriptor == alarms._kick:
            with suppress(BlockingIOError):
                os.eventfd_read(descriptor)
            self._follow()
        elif descriptor in self._pressure:
            resource = self._pressure[descriptor]
            if events & select.POLLPRI:
                self._tell(lambda: alarms._stalled(resource))
            else:  # the source is gone
                self._poll.unregister(descriptor)
        else:
            self._read_cgroup(descriptor)

    def _follow(self) -> None:
        wanted = self._alarms._cgroups
        for id in self._cgroups.keys() - wanted.keys():
            self._leave(id)
        for id in wanted.keys() - self._cgroups.keys():
            try:
                descriptor = os.open(wanted[id], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                self._tell(lambda error=error: self._alarms.permit("cgroup", error))  # type: ignore[misc]
                continue
            self._cgroups[id] = descriptor
            self._poll.register(descriptor, select.POLLPRI)
            self._tell(lambda: self._alarms.permit("cgroup"))
            self._read_cgroup(descriptor)

    def _leave(self, id: str) -> None:
        descriptor = self._cgroups.pop(id)
        self._poll.unregister(descriptor)
        os.close(descriptor)

    def _read_cgroup(self, descriptor: int) -> None:
        """Reading it is also what makes the next change signal."""
        id = next((id for id, one in self._cgroups.items() if one == descriptor), None)
        if id is None:
            return  # let go of since the poll returned
        try:
            populated = parse_pairs(os.pread(descriptor, 4096, 0)).get("populated")
        except OSError:  # it was removed
            populated = 0
            self._leave(id)
        if populated is not None:
            self._tell(lambda: self._alarms._populated(id, bool(populated)))


def _why(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.EOPNOTSUPP:
            return "this kernel has none (CONFIG_PSI, psi=1)" if "pressure" in str(error.filename) else str(error)
        case errno.EPERM | errno.EACCES | errno.EINVAL:
            return f"not permitted: {error.strerror}; it takes CAP_SYS_RESOURCE, or Linux 6.1 or later"
        case _:
            return str(error)
