"""What an operator on the machine asks of its monitor: to let go of the GPUs' driver, and to take it up again.

One line of JSON each way through a socket in the state folder that only the monitor's user may open. It is no matter of
the bus: who resets a card does so on its machine, perhaps because everything else there is sick.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import trio

from interlock.broker.errors import Unreachable

SOCKET = "control.sock"
MAX_LINE = 1024  # bytes: a request has two short fields
REQUEST_S = 2.0  # for the request to arrive
ANSWER_S = 30.0  # for the answer: a sampler has 2 s to end, each card's may have its own
DEFAULT_S = 120.0  # a reset takes some seconds; then the cards are watched again, also if the operator forgot
MAX_S = 86_400.0  # a day


class Request(msgspec.Struct, frozen=True):
    do: Literal["release", "resume"]
    seconds: float = DEFAULT_S


class Answer(msgspec.Struct, frozen=True):
    """`reason`: why not, or what is not as it should be; empty if it is done."""

    reason: str = ""


class Releasable(Protocol):
    async def release(self) -> str: ...

    def resume(self) -> None: ...


async def serve(folder: Path, gpus: Releasable) -> None:
    """Answer until cancelled. The socket lies in `folder`."""
    with _listening(folder) as listener:
        async with trio.open_nursery() as nursery:
            desk = _Desk(gpus, nursery)
            while True:
                connection, _ = await listener.accept()
                nursery.start_soon(desk.answer, trio.SocketStream(connection))


class _Desk:
    def __init__(self, gpus: Releasable, nursery: trio.Nursery) -> None:
        self._gpus = gpus
        self._nursery = nursery
        self._timer = trio.CancelScope()

    async def answer(self, stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                with trio.move_on_after(REQUEST_S) as waited:
                    line = await _line(stream)
                if not waited.cancelled_caught:
                    await stream.send_all(msgspec.json.encode(await self._do(line)) + b"\n")

    async def _do(self, line: bytes) -> Answer:
        try:
            request = msgspec.json.decode(line, type=Request)
        except msgspec.DecodeError as error:
            return Answer(f"that is no request: {error}")
        if not 0 < request.seconds <= MAX_S:
            return Answer(f"{request.seconds} s is not above 0 and at most {MAX_S:g}")
        self._timer.cancel()
        if request.do == "resume":
            self._gpus.resume()
            return Answer()
        reason = await self._gpus.release()
        self._timer = trio.CancelScope()
        self._nursery.start_soon(self._take_up_again, request.seconds, self._timer)
        return Answer(reason)

    async def _take_up_again(self, seconds: float, timer: trio.CancelScope) -> None:
        with timer:
            await trio.sleep(seconds)
            self._gpus.resume()


async def ask(folder: Path, request: Request) -> Answer:
    """The monitor's answer. Unreachable if none of this host runs on this machine, or it does not answer."""
    where = str(folder / SOCKET)
    try:
        connection = await _connected(folder)
    except OSError as error:
        raise Unreachable(
            f"no monitor answers: {error.strerror}", where=where, hint="it runs on the machine of its host; is it up?"
        ) from None
    async with trio.SocketStream(connection) as stream:
        with trio.move_on_after(ANSWER_S):
            with suppress(trio.BrokenResourceError, msgspec.DecodeError):
                await stream.send_all(msgspec.json.encode(request) + b"\n")
                return msgspec.json.decode(await _line(stream), type=Answer)
        raise Unreachable("the monitor does not answer", where=where, hint="its log may say why")


async def _line(stream: trio.SocketStream) -> bytes:
    line = b""
    while b"\n" not in line and len(line) < MAX_LINE:
        piece = await stream.receive_some(MAX_LINE)
        if not piece:
            break
        line += piece
    return line


async def _connected(folder: Path) -> trio.socket.SocketType:
    connection = trio.socket.socket(socket.AF_UNIX)
    try:
        with _short(folder) as path:
            await connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _listening(folder: Path) -> Iterator[trio.socket.SocketType]:
    (folder / SOCKET).unlink(missing_ok=True)  # of one that was killed: the lock of the role says that we are alone
    listener = socket.socket(socket.AF_UNIX)
    try:
        before = os.umask(0o177)
        try:
            with _short(folder) as path:
                listener.bind(path)
        finally:
            os.umask(before)
        listener.listen()
        listener.setblocking(False)
        yield trio.socket.from_stdlib_socket(listener)
    finally:
        listener.close()
        (folder / SOCKET).unlink(missing_ok=True)


@contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A path to the socket that is short enough for the kernel (107 bytes), wherever the state folder lies."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
