"""`interlock up`: all roles of a fleet on one machine, from its fleet file."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import trio

from interlock.broker.config import FleetConfig, load_fleet, source_of
from interlock.broker.errors import InterlockError
from interlock.broker.keyring import Keyring, identities_of
from interlock.broker.role import held
from interlock.broker.security import is_insecure
from interlock.coordinator.rules.rulefile import load_rules
from interlock.coordinator.rules.sharing import Part, share
from interlock.coordinator.supervisor import STOP_S, RoleSpec, Supervisor

QUEUED_LINES = 2000  # log lines that wait for a slow terminal; more are dropped: no role may stall for its log
Announce = Callable[[Mapping[str, str]], None]  # told when all roles are ready: which agents don't serve, and why
LAST_WORDS_S = 1.0  # for the lines that still wait at the end


class Console:
    """Writes lines to standard error, prefixed with who says them, in a thread: a stopped terminal stops nobody."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._send, self._receive = trio.open_memory_channel[bytes](QUEUED_LINES)
        self.dropped = 0

    def say(self, name: str, line: str) -> None:
        try:
            self._send.send_nowait(f"{name:<{self._width}} | {line}\n".encode())
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            self.dropped += 1

    async def run(self) -> None:
        """Until `finish`, or standard error is gone."""
        async with self._receive:
            async for text in self._receive:
                batch = [text]
                while len(batch) < QUEUED_LINES:
                    try:
                        batch.append(self._receive.receive_nowait())
                    except (trio.WouldBlock, trio.EndOfChannel):
                        break
                if self.dropped:
                    batch.append(f"{'up':<{self._width}} | {self.dropped} log lines were dropped\n".encode())
                    self.dropped = 0
                try:
                    await trio.to_thread.run_sync(_write, b"".join(batch), abandon_on_cancel=True)
                except OSError:
                    return  # nobody reads any more; the fleet goes on

    def finish(self) -> None:
        self._send.close()


def _write(data: bytes) -> None:
    """To the descriptor itself: a thread abandoned in the middle of sys.stderr would hold its lock at exit."""
    while data:
        data = data[os.write(2, data) :]


def role_specs(fleet: FleetConfig) -> list[RoleSpec]:
    """The roles of the fleet in the order in which they start."""
    stop_s = STOP_S + max(
        (revision.stop_timeout_s for agent in fleet.agents.values() for revision in agent.revisions.values()),
        default=0.0,
    )

    def spec(name: str, phase: int, module: str, *arguments: str, stop_s: float = STOP_S) -> RoleSpec:
        # -P: the working directory is not searched, so that no folder there can pass for one of our modules
        argv = [
            sys.executable,
            "-P",
            "-m",
            f"interlock.{module}",
            *arguments,
            "--fleet",
            str(Path(fleet.path).resolve()),
        ]
        return RoleSpec(name, argv, phase, stop_s)

    count = fleet.rules.partitions
    rules = [spec("rules", 2, "coordinator", "rules")]
    if count > 1:
        rules = [spec(f"rules-{n}", 2, "coordinator", "rules", "--partition", str(n)) for n in range(1, count + 1)]
    monitored = [name for name, host in fleet.hosts.items() if host.monitor]
    return [
        spec("broker", 0, "broker"),
        *(spec(f"host/{name}", 1, "agents", "--name", name, stop_s=stop_s) for name in fleet.hosts),
        # beside the hosts: an agent that reserves GPU memory at its start waits for the first readings
        *(spec(f"monitor/{name}", 1, "monitors", "--host", name) for name in monitored),
        *rules,
        spec("coordinator", 2, "coordinator", "coordinator"),
    ]


def check_fleet(path: Path) -> FleetConfig:
    """The fleet file with all that it needs to start; ConfigError names the first thing that is wrong."""
    fleet = load_fleet(path)
    for name, agent in fleet.agents.items():
        source_of(fleet, agent.revisions[agent.serve], where=f"{path}: agents.{name}.revisions.{agent.serve}")
    share(load_rules(fleet.rules.files, fleet.folder), Part(1, fleet.rules.partitions))
    return fleet


def _write_ready(path: Path, lacking: Mapping[str, str]) -> None:
    lines = [str(os.getpid()), *(f"{name}: {reason}" for name, reason in lacking.items())]
    path.write_text("".join(f"{' '.join(line.splitlines())}\n" for line in lines))


@contextmanager
def _said(ready_file: Path | None) -> Iterator[Announce]:
    """What makes the file; it is there only while the fleet is ready, and one left by a killed `up` says nothing."""
    if ready_file is None:
        yield lambda _: None
        return
    ready_file.unlink(missing_ok=True)
    try:
        yield lambda lacking: _write_ready(ready_file, lacking)
    finally:
        ready_file.unlink(missing_ok=True)


async def supervise(fleet: FleetConfig, announce: Announce, ready_file: Path | None = None) -> None:
    """Run the fleet until SIGINT, SIGTERM or SIGHUP. Raises the error of a role that can't start, InUse if it is up."""
    specs = role_specs(fleet)
    console = Console(max(len(spec.name) for spec in specs))
    supervisor = Supervisor(specs, console.say)
    failure: InterlockError | None = None
    # The signals come first: whatever stops it from here on, the lock file goes.
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        with held(fleet.state_dir / "up", "up"), _said(ready_file) as say_ready:
            async with trio.open_nursery() as outer:
                outer.start_soon(console.run)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_stop_on_signal, signals, nursery.cancel_scope, console)
                    try:
                        await nursery.start(supervisor.run)
                        announce(supervisor.lacking)
                        say_ready(supervisor.lacking)
                        await trio.sleep_forever()
                    except InterlockError as error:
                        failure = error
                        nursery.cancel_scope.cancel()
                console.finish()
                outer.cancel_scope.deadline = trio.current_time() + LAST_WORDS_S
    if failure is not None:
        raise failure


async def _stop_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope, console: Console) -> None:
    async for number in signals:
        console.say("up", f"{signal.Signals(number).name}: stopping")
        scope.cancel()


def up(path: Path, *, as_json: bool = False, ready_file: Path | None = None) -> int:
    """Run the fleet until it is told to stop, then return 0. `ready_file` appears when all roles are ready."""
    fleet = check_fleet(path)
    if not is_insecure(fleet):
        Keyring(fleet.keys_dir, fleet.name).ensure(identities_of(fleet), now=time.time())

    def announce(lacking: Mapping[str, str]) -> None:
        agents, hosts = len(fleet.agents), len(fleet.hosts)
        if as_json:
            told = {"up": fleet.name, "agents": agents, "hosts": hosts, "pid": os.getpid(), "not_serving": lacking}
            print(json.dumps(told), flush=True)
            return
        serve = f"{agents - len(lacking)} of " if lacking else ""
        print(
            f"fleet {fleet.name} is up: {serve}{_count(agents, 'agent')} on {_count(hosts, 'host')} (Ctrl-C stops it)"
        )
        for name, reason in lacking.items():
            print(f"{name} does not serve: {' '.join(reason.splitlines())}")
        sys.stdout.flush()

    trio.run(supervise, fleet, announce, ready_file)
    return 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
