"""`python -m interlock.agents.sandbox --spec FILE --report FILE`: a class agent run for real, and watched from inside.

It is served as `agents.run` serves it, until it is told to stop. Meanwhile Python's audit events say what the agent's
own code opens beside the base class: threads, sockets, programs, configuration files. After its end, what is still
there that was not there before it began is left behind. The report is one JSON object. For `interlock check`.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import trio
import zmq

from interlock.agents.agent import Agent
from interlock.agents.contract import Contract, ContractError, contract_of
from interlock.agents.run import EXIT_CODE, load, read_spec
from interlock.agents.serving import Serving, Spec

MAX_USES = 200  # that are told: a loop may open a thousand sockets, from the same line
HANGS = signal.SIGUSR1  # told to write down where every thread is, into the file beside the report
CONFIG = re.compile(r"(?i).*\.(ya?ml|toml|json|ini|cfg|conf|env)$|.*/\.env$")
_CACHE = os.path.join("trio", "_core", "_thread_cache.py")  # threads of trio's: whoever awaits one starts none


class Use(msgspec.Struct, frozen=True):
    """Something that the agent's own code opened by itself. kind: thread, socket, program or file."""

    kind: str
    what: str
    file: str
    line: int


class Left(msgspec.Struct, frozen=True):
    """Something that is still there. kind: thread, child, socket, file or zmq. lasting: it keeps the process alive."""

    kind: str
    what: str
    file: str = ""
    line: int = 0
    lasting: bool = False


class Watched(msgspec.Struct, kw_only=True):
    """The report. error: why it could not be run; then the rest is empty."""

    error: str = ""
    file: str = ""
    line: int = 0
    code: int = 0
    stopped: bool = False  # it came to its end
    own_health: bool = False  # the class has a health() of its own
    untyped: list[Use] = []  # handlers' arguments and replies without a type
    uses: list[Use] = []
    left: list[Left] = []


class Watch:
    """What code in one folder opens. An audit hook stays for as long as the process."""

    def __init__(self, source: str) -> None:
        self._source = os.path.abspath(source) + os.sep
        self._seen: dict[Use, None] = {}
        self._on = True
        sys.addaudithook(self._hear)
        plain = zmq.Context.socket

        def make(context: Any, *given: Any, **named: Any) -> Any:
            self._note("socket", "a ZeroMQ socket", sys._getframe(1))
            return plain(context, *given, **named)

        zmq.Context.socket = make  # type: ignore[method-assign,assignment]
        begin = threading.Thread.start  # audited from Python 3.12 on only

        def start(thread: threading.Thread) -> None:
            self._note("thread", "a thread", sys._getframe(1))
            begin(thread)

        threading.Thread.start = start  # type: ignore[method-assign,assignment]

    @property
    def uses(self) -> list[Use]:
        self._on = False
        return list(self._seen)

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        tell = _EVENTS.get(event)
        if tell is None or not self._on:
            return
        try:
            kind, what = tell(given)
            if what:
                self._note(kind, what, sys._getframe(1))
        except Exception:  # a hook that raises would end what it hears of
            self._on = False

    def _note(self, kind: str, what: str, frame: FrameType | None) -> None:
        while frame is not None:
            name = frame.f_code.co_filename
            if name.endswith(_CACHE):
                return
            if name.startswith(self._source):
                if len(self._seen) < MAX_USES:
                    self._seen[Use(kind, what, name, frame.f_lineno)] = None
                return
            frame = frame.f_back


def _opened(given: tuple[Any, ...]) -> tuple[str, str]:
    path, mode = given[0], given[1] if len(given) > 1 else ""
    if not isinstance(path, str | bytes) or (isinstance(mode, str) and set(mode) & set("wax+")):
        return "file", ""
    name = os.fsdecode(path)
    data = os.environ.get("INTERLOCK_DATA", "")  # the agent's own folder, for what it keeps
    kept = bool(data) and os.path.abspath(name).startswith(os.path.abspath(data))
    return "file", name if CONFIG.fullmatch(name) and not kept else ""


_EVENTS: dict[str, Callable[[tuple[Any, ...]], tuple[str, str]]] = {
    "socket.bind": lambda given: ("socket", f"a socket, bound to {given[1]}"),
    "socket.connect": lambda given: ("socket", f"a socket, connected to {given[1]}"),
    "subprocess.Popen": lambda given: ("program", f"the program {given[0]}"),
    "os.fork": lambda given: ("program", "a forked process"),
    "os.system": lambda given: ("program", f"the command {os.fsdecode(given[0])}"),
    "os.posix_spawn": lambda given: ("program", f"the program {given[0]}"),
    "open": _opened,
}  # fmt: skip


# --- what is there


class Inventory:
    """Threads, children, descriptors and ZeroMQ contexts of this process, at one moment."""

    def __init__(self) -> None:
        gc.collect()
        self.threads = {one for one in threading.enumerate() if not one.name.startswith("Trio thread")}
        self.children = set(_children())
        self.descriptors = _descriptors()
        self.zmq = sum(name.startswith("ZMQbg/Reaper") for name in _native_threads())

    def since(self, before: Inventory) -> list[Left]:
        """What is there now and was not then."""
        left = [_thread(one) for one in self.threads - before.threads]
        left += [Left("child", f"{pid}: {_command(pid)}") for pid in sorted(self.children - before.children)]
        for number, target in self.descriptors.items():
            if before.descriptors.get(number) == target:
                continue
            if target.startswith("socket:"):
                left.append(Left("socket", _socket(number)))
            elif target.startswith("/") and not target.startswith(("/dev/", "/proc/")):
                left.append(Left("file", target))
        if self.zmq > before.zmq:
            left.append(Left("zmq", f"{self.zmq - before.zmq} ZeroMQ contexts that were not terminated"))
        return left


def _thread(one: threading.Thread) -> Left:
    code = getattr(getattr(one, "_target", None), "__code__", None)
    file, line = (code.co_filename, code.co_firstlineno) if code is not None else ("", 0)
    return Left("thread", one.name, file, line, lasting=not one.daemon)


def _children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += [int(each) for each in (task / "children").read_text().split()]
        except OSError:
            continue  # the thread has ended
    return found


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        return " ".join(words).strip()[:200] or Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # of the listing itself
    return found


def _socket(number: int) -> str:
    try:
        with socket.socket(fileno=os.dup(number)) as one:
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return f"listening at {one.getsockname()}"
            return f"{one.family.name} at {one.getsockname() or 'no address'}"
    except OSError:
        return f"descriptor {number}"


def _native_threads() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:
            continue
    return names


# --- the run


def untyped(kind: type[Agent], contract: Contract) -> list[Use]:
    """Arguments and replies of handlers that have no type."""
    found = []
    for action in contract.actions.values():
        method = getattr(kind, action.method)
        code = getattr(method, "__code__", None)
        place = (code.co_filename, code.co_firstlineno) if code is not None else ("", 0)
        hints = getattr(method, "__annotations__", {})
        found += [Use(action.name, f"argument {name!r}", *place) for name in action.parameters if name not in hints]
        if "return" not in hints:
            found.append(Use(action.name, "its reply", *place))
    return found


async def warm_up(spec: Spec) -> None:
    """An agent that does nothing, begun and stopped: what the library itself keeps is there before the inventory."""
    serving = Serving(msgspec.structs.replace(spec, requests=f"{spec.requests}0", control=f"{spec.control}0"), Agent(),
                      contract_of(Agent))  # fmt: skip
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serving.run)
        await trio.to_thread.run_sync(lambda: None)
        serving.stop()


def watched(spec: Spec, report: Path) -> Watched:
    trio.run(warm_up, spec)
    before = Inventory()
    watch = Watch(spec.source)
    found = Watched()
    try:
        kind, contract = load(spec)
    except ContractError as error:
        return Watched(error=error.what, file=error.file, line=error.line, code=EXIT_CODE)
    found.own_health = kind.health is not Agent.health
    found.untyped = untyped(kind, contract)
    agent = kind(name=spec.agent, revision=spec.revision, instance=spec.instance, config=spec.config)
    try:
        found.code = trio.run(Serving(spec, agent, contract).run)
        found.stopped = True
    except BaseException as error:  # anything that the agent's own code raises
        found.error, found.code = f"{type(error).__name__}: {error}", 1
    found.uses = watch.uses
    found.left = Inventory().since(before)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m interlock.agents.sandbox", description="Run and watch one agent.")
    parser.add_argument("--spec", required=True)
    parser.add_argument("--report", required=True, type=Path)
    given = parser.parse_args(arguments)
    with open(f"{given.report}.stacks", "w") as stacks:
        faulthandler.register(HANGS, stacks, all_threads=True)
        found = watched(read_spec(given.spec), given.report)
        aside = given.report.with_suffix(".aside")
        aside.write_bytes(msgspec.json.encode(found))
        aside.replace(given.report)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(found.code)  # a thread that is left would keep it here


if __name__ == "__main__":
    main()
