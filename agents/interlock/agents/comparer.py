"""The host's side of a revision's own comparison functions: their process, asked one pair at a time, with a deadline.

The process is the candidate's code in the candidate's environment, but no instance: no request depends on it. It is
started when a shadow run begins. One that ends, hangs or says what it should not is killed, and another one started for
the next pair; the pair it failed at is an error. Nothing here ever raises for what it does.
"""

from __future__ import annotations

import logging
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from interlock.agents import process as processes
from interlock.agents.compare import Verdict
from interlock.agents.findings import Finding
from interlock.agents.judging import LENGTH, MAX_TEXT, Question, Spec
from interlock.agents.preflight import DISTRIBUTION, environment, interpreter, placeholders
from interlock.agents.revisions import Revision
from interlock.broker.config import CompareConfig
from interlock.broker.errors import InterlockError

START_S = 60.0  # for the functions to import: torch takes 5 to 20 s from a cold disk
RESTART_PAUSE_S = 0.2  # between starts: one that ends at once must not take the machine
MAX_PAIR = 8 << 20  # bytes of a request and both answers that are handed over; a larger pair is an error
MAX_REPLY = 1 << 16  # bytes; a reply is one line of text
TAIL_LINES = 4  # of its log, in the reason why it ended
MODULE = "interlock.agents.judging"

log = logging.getLogger(__name__)


class _Reply(msgspec.Struct, frozen=True):
    ready: bool = False
    difference: str = ""
    error: str = ""


_reply = msgspec.msgpack.Decoder(_Reply)


class _Broken(Exception):
    """The process can't be used any more; the text says why."""


def functions_of(config: CompareConfig) -> list[str]:
    """The functions that the fleet file names for an agent, each once."""
    return sorted({handler.function for handler in config.handlers.values() if handler.function})


@dataclass
class Bench:
    """Where the functions of a revision run."""

    recorded: Revision
    base: Path  # of the fleet file: relative interpreters start here
    marker: str  # of the host
    run_dir: Path  # short and private: the socket is in there
    log_dir: Path
    extra: dict[str, str]  # added to the environment, as for an instance

    def command(self, *arguments: str) -> list[str]:
        return [interpreter(self.recorded.config.python, self.base), "-m", MODULE, *arguments]

    def environment(self) -> dict[str, str]:
        values = placeholders(self.recorded, base=self.base, port=1, health_port=1)
        where = f"{self.recorded.agent} {self.recorded.name}"
        return environment(self.recorded.config.env, values, where=where) | self.extra


class Comparer:
    """`run` owns the process until it is cancelled or `close` is called. One task calls `judge`."""

    def __init__(self, bench: Bench, functions: list[str], *, timeout_s: float, number: int) -> None:
        self.starts = 0
        self._bench = bench
        self._functions = functions
        self._timeout_s = timeout_s
        self._name = f"{bench.recorded.agent}-{bench.recorded.name}-compare-{number}"
        self._socket = bench.run_dir / f"{number}.cmp"
        self._spec = bench.run_dir / f"{number}.cmp.json"
        self._process: processes.Process | None = None
        self._stream: trio.SocketStream | None = None
        self._unusable = ""  # why the functions can't be had, for good
        self._again_at = float("-inf")
        self._scope = trio.CancelScope()
        self._begun = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        spec = Spec(source=str(self._bench.recorded.folder), functions=self._functions, socket=str(self._socket))
        with self._scope:
            await trio.to_thread.run_sync(self._spec.write_bytes, msgspec.json.encode(spec))
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    self._begun.set()
                    await trio.sleep_forever()
            finally:
                self._nursery = None
                self._begun.set()
                self._end_process()
                for path in (self._socket, self._spec):
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """The shadow run is over: the process is killed, and whoever waits for a verdict gets an error."""
        self._scope.cancel()

    async def judge(
        self, function: str, request: list[bytes], old: list[bytes], new: list[bytes], http: dict[str, str] | None
    ) -> Verdict:
        """What the function says of a pair. The candidate's answer is there: silence is for nobody to judge."""
        size = sum(map(len, [*request, *old, *new]))
        if size > MAX_PAIR:
            return Verdict(
                error=f"{function} was not asked: the pair has {size} bytes, at most {MAX_PAIR} are compared"
            )
        await self._begun.wait()
        question = Question(function=function, request=request, old=old, new=new, http=http)
        try:
            stream = self._stream or await self._open()
            with trio.fail_after(self._timeout_s):
                reply = await _ask(stream, msgspec.msgpack.encode(question))
        except trio.TooSlowError:
            self._end_process()
            return Verdict(error=f"{function} did not answer within {self._timeout_s:g} s, and was ended")
        except _Broken as error:
            return Verdict(error=f"{function}: {await self._obituary(str(error))}")
        except (InterlockError, OSError, RuntimeError) as error:  # the last: the run ended while it was started
            return Verdict(error=f"{function}: {error}")
        return Verdict(difference=reply.difference, error=reply.error)

    # --- inside

    async def _open(self) -> trio.SocketStream:
        """A process that has imported the functions, connected. _Broken or InterlockError if there is none."""
        if self._unusable:
            raise processes.StartFailed(self._unusable)
        await trio.sleep_until(self._again_at)
        nursery = self._nursery
        if nursery is None:
            raise _Broken("the shadow run is over")
        self._again_at = trio.current_time() + RESTART_PAUSE_S
        self.starts += 1
        listener = await _listen(self._socket)
        try:
            self._process = await processes.start(
                nursery,
                self._bench.command("--spec", str(self._spec)),
                cwd=self._bench.recorded.folder,
                env=self._bench.environment(),
                log_path=self._bench.log_dir / f"{self._bench.recorded.agent}.{self._bench.recorded.name}.compare.log",
                marker=f"{self._bench.marker}:{self._name}-{self.starts}",
            )
            self._stream = await self._accept(listener, self._process)
        finally:
            listener.close()
        with trio.move_on_after(START_S) as waiting:
            hello = await _read(self._stream)
        if waiting.cancelled_caught:
            self._end_process()
            raise _Broken(f"the functions did not import within {START_S:g} s")
        if not hello.ready:
            self._unusable = hello.error or "the comparison process said nothing of use"
            self._end_process()
            raise processes.StartFailed(self._unusable)
        return self._stream

    async def _accept(self, listener: trio.socket.SocketType, process: processes.Process) -> trio.SocketStream:
        """Its connection, unless it ends before it has one."""
        stream: trio.SocketStream | None = None

        async def accept(scope: trio.CancelScope) -> None:
            nonlocal stream
            connection, _ = await listener.accept()
            stream = trio.SocketStream(connection)
            scope.cancel()

        async def ended(scope: trio.CancelScope) -> None:
            await process.exited()
            scope.cancel()

        with trio.move_on_after(START_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept, nursery.cancel_scope)
                nursery.start_soon(ended, nursery.cancel_scope)
        if stream is None:
            raise _Broken("the comparison process did not start")
        return stream

    async def _obituary(self, what: str) -> str:
        """What is known of the end of the process; it is ended if it still runs."""
        process = self._process
        self._end_process()
        if process is None:
            return what
        with trio.move_on_after(self._timeout_s):
            code = await process.exited()
            tail = " | ".join(process.tail(TAIL_LINES).strip().splitlines())
            if "No module named" in tail and "interlock" in tail:
                self._unusable = f"its interpreter has no {MODULE}: install {DISTRIBUTION} there"
                return self._unusable
            what = f"{what} (its process ended with code {code}{f': {tail}' if tail else ''})"
        return what[:MAX_TEXT]

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
        if self._stream is not None:
            self._stream.socket.close()
        self._process = self._stream = None


async def _listen(path: Path) -> trio.socket.SocketType:
    await trio.Path(path).unlink(missing_ok=True)
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(path))
    listener.listen(1)
    return listener


async def _ask(stream: trio.SocketStream, question: bytes) -> _Reply:
    try:
        await stream.send_all(len(question).to_bytes(LENGTH, "big") + question)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise _Broken("it ended") from None
    return await _read(stream)


async def _read(stream: trio.SocketStream) -> _Reply:
    """One message of the process. _Broken if it is none, or the process is gone."""
    received = bytearray()
    wanted = LENGTH
    try:
        while len(received) < wanted:
            piece = await stream.receive_some(MAX_REPLY)
            if not piece:
                raise _Broken("it ended")
            received += piece
            if len(received) >= LENGTH:
                wanted = LENGTH + int.from_bytes(received[:LENGTH], "big")
            if max(wanted, len(received)) > MAX_REPLY:
                raise _Broken("it sent what is no verdict")
        if len(received) != wanted:
            raise _Broken("it sent more than was asked for")
        return _reply.decode(received[LENGTH:])
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise _Broken("it ended") from None
    except (msgspec.DecodeError, RecursionError, ValueError):
        raise _Broken("it sent what is no verdict") from None


async def check_functions(bench: Bench, functions: list[str]) -> Finding:
    """Whether the functions import in the revision's own environment: asked before anything is started."""
    spec = Spec(source=str(bench.recorded.folder), functions=functions)
    with tempfile.TemporaryDirectory(prefix="interlock-spec-") as scratch:
        path = Path(scratch) / "spec.json"
        await trio.Path(path).write_bytes(msgspec.json.encode(spec))
        try:
            ended = await processes.run_to_end(
                bench.command("--check", "--spec", str(path)), cwd=bench.recorded.folder, env=bench.environment(),
                timeout_s=START_S, host=bench.marker,
            )  # fmt: skip
        except InterlockError as error:
            return Finding("comparison", False, str(error))
    for line in reversed(ended.output.splitlines()):
        with suppress(ValueError):
            report: Any = msgspec.json.decode(line)
            if isinstance(report, dict) and "usable" in report:
                ok = report["usable"] is True
                said = f"{', '.join(functions)} can be imported" if ok else str(report.get("error", ""))
                return Finding("comparison", ok, said)
    if "No module named" in ended.output and "interlock" in ended.output:
        return Finding("comparison", False, f"its interpreter has no {MODULE}: install {DISTRIBUTION} there")
    last = ended.output.strip().splitlines()[-1:] or ["nothing was printed"]
    why = f"no answer within {START_S:g} s" if ended.returncode is None else f"code {ended.returncode}: {last[0]}"
    return Finding("comparison", False, f"{', '.join(functions)}: {why}")
