"""Source files read in processes of their own, one for each core. A file that ends or stalls one costs only itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import trio

from interlock.coordinator.assess.model import Module, Problem
from interlock.coordinator.assess.worker import Answer, Question

FILE_S = 60.0  # for one file: the largest that is read takes a few seconds on a busy machine
MAX_WORKERS = 16  # beyond, one process can't take in what they say
AHEAD = 4  # questions that a process has in hand: it need not wait until its answer was taken in
MAX_ANSWER = 256 << 20  # bytes; more is no answer
_decode = msgspec.msgpack.Decoder(Answer).decode


class _Ended(Exception):
    """The process ended before its answer came."""


class Worker:
    """One process, started when it is first needed, and again after it was lost."""

    def __init__(self, root: Path, limit: int) -> None:
        self._command = [sys.executable, "-P", "-m", "interlock.coordinator.assess.worker", str(root), str(limit)]
        self._process: trio.Process | None = None
        self._rest = b""

    async def send(self, question: Question) -> None:
        """Questions may be sent ahead: they are answered in their order. _Ended as for `receive`."""
        process = await self._running()
        assert process.stdin is not None
        try:
            await process.stdin.send_all(msgspec.json.encode(question) + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise _Ended from None

    async def receive(self) -> Answer:
        """The next answer. _Ended if the process ends over it; trio.TooSlowError after FILE_S."""
        process = await self._running()
        with trio.fail_after(FILE_S):
            length = int.from_bytes(await self._read(process, 4), "big")
            if length > MAX_ANSWER:
                raise _Ended
            return _decode(await self._read(process, length))

    async def _running(self) -> trio.Process:
        if self._process is None:
            self._process = await trio.lowlevel.open_process(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._rest = b""
        return self._process

    async def _read(self, process: trio.Process, count: int) -> bytes:
        assert process.stdout is not None
        parts = [self._rest]
        have = len(self._rest)
        while have < count:
            part = await process.stdout.receive_some(1 << 18)
            if not part:
                raise _Ended
            parts.append(bytes(part))
            have += len(part)
        whole = b"".join(parts)
        self._rest = whole[count:]
        return whole[:count]

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                await stream.aclose()


async def read_all(
    root: Path, paths: Sequence[str], *, limit: int, workers: int = 0
) -> tuple[list[Module], list[tuple[str, str]]]:
    """The modules in the order of their paths, and (path, why) of what could not be read."""
    modules: dict[str, Module] = {}
    unread: list[tuple[str, str]] = []

    def take(path: str, answer: Answer) -> None:
        if answer.module is not None:
            modules[path] = answer.module
        else:
            unread.append((path, answer.unread))

    def lost(path: str, why: str) -> None:
        modules[path] = Module(path, _size(root / path), problem=Problem(why))

    await _share([Question(path) for path in paths], lambda: Worker(root, limit), workers, take, lost)
    return [modules[path] for path in paths if path in modules], sorted(unread)


async def compile_all(root: Path, paths: Sequence[str], *, limit: int, workers: int = 0) -> dict[str, Problem]:
    """Why files don't compile, of those that don't."""
    found: dict[str, Problem] = {}

    def take(path: str, answer: Answer) -> None:
        if answer.problem is not None or answer.unread:
            found[path] = answer.problem or Problem(answer.unread)

    def lost(path: str, why: str) -> None:
        found[path] = Problem(why)

    await _share([Question(path, compile=True) for path in paths], lambda: Worker(root, limit), workers, take, lost)
    return found


async def _share(
    questions: Sequence[Question],
    make: Callable[[], Worker],
    workers: int,
    take: Callable[[str, Answer], None],
    lost: Callable[[str, str], None],
) -> None:
    todo = deque(questions)
    count = min(workers or len(os.sched_getaffinity(0)), MAX_WORKERS, -(-len(todo) // 8))

    async def work() -> None:
        worker = make()
        asked: deque[Question] = deque()
        try:
            while todo or asked:
                why = ""
                try:
                    while todo and len(asked) < AHEAD:
                        asked.append(todo.popleft())
                        await worker.send(asked[-1])
                    answer = await worker.receive()
                except _Ended:
                    why = "ended the process that read it"
                except trio.TooSlowError:
                    why = f"was not read within {FILE_S:g} s"
                if not why:
                    take(asked.popleft().path, answer)
                    continue
                await worker.close()
                lost(asked.popleft().path, why)
                todo.extendleft(reversed(asked))
                asked.clear()
        finally:
            await worker.close()

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(work)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
