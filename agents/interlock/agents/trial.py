"""A class agent started for real in a folder of its own, asked, and stopped: what was seen of it.

Its source is recorded as a host records it, read-only; its data folder is empty. What it starts carries a mark in its
environment, by which all of it is found and ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from interlock.agents.instance import Health, InstanceControl
from interlock.agents.preflight import environment, interpreter, placeholders
from interlock.agents.readiness import Seen, State
from interlock.agents.revisions import Revision, RevisionStore
from interlock.agents.sandbox import HANGS, Watched
from interlock.agents.serving import Spec
from interlock.agents.state_ports import ControlPort, carry
from interlock.agents.transfer import End
from interlock.agents.trees import remove_tree
from interlock.broker.config import RevisionConfig
from interlock.broker.errors import InterlockError
from interlock.broker.sockets import Sockets, open_sockets

MARK = "INTERLOCK_CHECK"
POLL_S = 0.05  # between questions whether it is healthy
STATE_S = 60.0  # for a state to leave one process and enter the other
REPORT_S = 5.0  # after the limit of its end, for the report, or the stacks of what hangs
MAX_STACKS = 6  # places named of what hangs


@dataclass(frozen=True)
class Subject:
    """What is tried. base: the folder that a relative interpreter starts from."""

    agent: str
    name: str  # of the revision
    config: RevisionConfig
    source: Path
    base: Path


async def trial(subject: Subject) -> Seen:
    """InterlockError if nothing of it can be started, such as a source that can't be recorded."""
    folder = Path(tempfile.mkdtemp(prefix="il-check-", dir="/tmp"))  # a short path: sockets are in there
    try:
        store = RevisionStore(folder / "revisions")
        revision = await trio.to_thread.run_sync(
            store.record, subject.agent, subject.name, subject.config, subject.source
        )
        seen = Seen(stop_limit_s=subject.config.stop_timeout_s)
        async with open_sockets() as sockets:
            bench = _Bench(subject, revision, folder, sockets)
            async with bench.running(1) as first:
                await _ask(bench, first, seen)
                await first.stop(seen)
                seen.watched = first.report()
            seen.orphans = await trio.to_thread.run_sync(bench.end_all)
        return _in_place(seen, str(revision.folder), str(subject.source))
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(remove_tree, folder)


async def _ask(bench: _Bench, first: _Run, seen: Seen) -> None:
    health = await first.until_healthy(bench.subject.config.start_timeout_s)
    seen.healthy, seen.detail = health.ok, health.detail
    if not health.ok:
        return
    described = await first.control.describe()
    seen.handlers, seen.keeps_state = described.handlers, described.state
    if described.state:
        seen.state = await _there_and_back(bench, first)


async def _there_and_back(bench: _Bench, first: _Run) -> State:
    """Its state into a second process, and out of that one again."""
    try:
        with trio.fail_after(STATE_S):
            await first.control.deactivate(STATE_S)
            async with bench.running(2, candidate=True) as second:
                health = await second.until_healthy(bench.subject.config.start_timeout_s)
                if not health.ok:
                    return State(trouble=f"a second process was not healthy: {health.detail}")
                end = await carry(ControlPort(first.control), ControlPort(second.control))
                again = await _given(second)
        return State(end.size, end.sha256, again.size, again.sha256)
    except trio.TooSlowError:
        return State(trouble=f"it was not handed over within {STATE_S:g} s")
    except InterlockError as error:
        return State(trouble=str(error))


async def _given(run: _Run) -> End:
    async def pass_over(data: bytes, whole: bool) -> None:
        pass

    return await ControlPort(run.control).give(pass_over)


class _Run:
    """One process of the agent."""

    def __init__(self, process: trio.Process, control: InstanceControl, report: Path, log: Path) -> None:
        self.process = process
        self.control = control
        self._report = report
        self._log = log

    async def until_healthy(self, limit_s: float) -> Health:
        health = Health(False, "no answer")
        with trio.move_on_after(limit_s):
            while self.process.poll() is None:
                health = await self.control.health()
                if health.ok:
                    return health
                await trio.sleep(POLL_S)
            return Health(False, f"it ended with exit code {self.process.returncode}: {self.tail()}")
        return Health(False, f"not healthy within {limit_s:g} s: {health.detail}")

    async def stop(self, seen: Seen) -> None:
        """As a host stops it. One that does not end says where it is, and is killed."""
        began = trio.current_time()
        with suppress(ProcessLookupError):
            self.process.terminate()
        with trio.move_on_after(seen.stop_limit_s + REPORT_S):
            while not self._report.exists() and self.process.poll() is None and not seen.hangs:
                await trio.sleep(POLL_S)
                if trio.current_time() - began > seen.stop_limit_s:
                    seen.hangs = await self._places()
            seen.stop_s = trio.current_time() - began
        if not seen.hangs:
            with trio.move_on_after(REPORT_S):
                await self.process.wait()

    async def _places(self) -> list[str]:
        """Where its threads are: the innermost line of each that is the agent's own."""
        with suppress(ProcessLookupError):
            self.process.send_signal(HANGS)
        places: list[str] = []
        with trio.move_on_after(REPORT_S / 2):
            while True:
                await trio.sleep(POLL_S)
                if places := self._stacks():
                    break
        return list(dict.fromkeys(places))[:MAX_STACKS] or ["a place outside of its own code"]

    def _stacks(self) -> list[str]:
        try:
            text = Path(f"{self._report}.stacks").read_text("utf-8", "replace")
        except OSError:
            return []
        places = []
        for stack in text.split("\n\n"):
            mine = [line.strip().removeprefix("File ") for line in stack.splitlines() if "/source/" in line]
            places += mine[:1]
        return places

    def report(self) -> Watched | None:
        try:
            return msgspec.json.decode(self._report.read_bytes(), type=Watched)
        except (OSError, msgspec.DecodeError):
            return None

    def tail(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


class _Bench:
    def __init__(self, subject: Subject, revision: Revision, folder: Path, sockets: Sockets) -> None:
        self.subject = subject
        self._revision = revision
        self._folder = folder
        self._sockets = sockets
        self._mark = uuid.uuid4().hex

    @asynccontextmanager
    async def running(self, number: int, *, candidate: bool = False) -> AsyncIterator[_Run]:
        """A process of the agent; on leaving it is killed, if it is there still."""
        subject, config = self.subject, self.subject.config
        values = placeholders(self._revision, base=subject.base)
        data = self._folder / "data"
        data.mkdir(exist_ok=True)
        spec = Spec(
            agent=subject.agent, entry=config.entry, source=str(self._revision.folder), revision=subject.name,
            instance=f"{subject.agent}-{number}", config=config.config, requests=f"ipc://{self._folder}/{number}.req",
            control=f"ipc://{self._folder}/{number}.ctl", stop_timeout_s=config.stop_timeout_s, candidate=candidate,
        )  # fmt: skip
        file, report, log = (self._folder / f"{number}.{kind}" for kind in ("json", "report", "log"))
        file.write_bytes(msgspec.json.encode(spec))
        env = environment(config.env, values) | {"INTERLOCK_DATA": str(data), MARK: self._mark}
        python = interpreter(config.python, subject.base) if config.python else sys.executable
        command = [python, "-P", "-m", "interlock.agents.sandbox", "--spec", str(file), "--report", str(report)]
        with log.open("wb") as said:
            process = await trio.lowlevel.open_process(
                command, cwd=self._revision.folder, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip
        control = InstanceControl(self._sockets, spec.control)
        try:
            yield _Run(process, control, report, log)
        finally:
            control.close()
            with trio.CancelScope(shield=True):
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    def end_all(self) -> list[str]:
        """Kill what carries the mark and is there still; what that was."""
        found = []
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            with suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"{MARK}={self._mark}".encode() in words:
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    found.append(f"{pid}: {line.strip()[:200]}")
                    os.kill(pid, signal.SIGKILL)
        return found


def _in_place(seen: Seen, recorded: str, source: str) -> Seen:
    """The same with the places in the user's own files, instead of the copy that ran."""

    def mended(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(recorded, source)
        if isinstance(value, list):
            return [mended(each) for each in value]
        if isinstance(value, Mapping):
            return {key: mended(each) for key, each in value.items()}
        return value

    tree = mended(msgspec.to_builtins(seen, builtin_types=(bytes,)))
    return msgspec.convert(tree, Seen, builtin_types=(bytes,))
