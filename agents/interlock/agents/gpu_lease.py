"""How an agent reserves GPU memory through its host: `async with self.gpu.reserve(8 << 30):` around what takes it.

The host grants what is physically free and not reserved by others, so that an agent that comes too late is told so
before it runs out of memory in the middle of its work. A reservation is a connection to the host: it ends with the
`with`, and also with the process, however that ends. Standard library only (and trio, where it is awaited).
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from types import TracebackType

ENVIRONMENT = "INTERLOCK_GPU_LEASES"  # the host's socket; a host sets it for its agents
MAX_ANSWER = 1 << 16  # bytes of the host's answer
ANSWER_S = 5.0  # for the host to answer, beside the time that it was asked to wait


class GpuMemoryRefused(RuntimeError):
    """The host did not grant it: the text says what is free, and who has reserved what. Nothing is reserved."""


class Reservation:
    """Use it in a `with`, or an `async with`. While it holds, `uuid` is the card's (empty where there is no host)."""

    def __init__(self, size: int, card: str, wait_s: float) -> None:
        if not isinstance(size, int) or size <= 0:
            raise ValueError(f"{size!r} is no number of bytes above 0")
        self.bytes = size
        self.uuid = ""
        self._card = card
        self._wait_s = wait_s
        self._path = ""
        self._socket: socket.socket | None = None

    def __enter__(self) -> Reservation:
        self._open()
        self._ask()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    async def __aenter__(self) -> Reservation:
        import trio

        self._open()
        try:
            await trio.to_thread.run_sync(self._ask, abandon_on_cancel=True)
        except BaseException:
            self.release()  # the thread that still asks is told by that, and the host too
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give it back. A second time does nothing."""
        held, self._socket = self._socket, None
        if held is not None:
            with suppress(OSError):  # the host went away first
                held.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for the answer
            held.close()

    # --- inside

    def _open(self) -> None:
        if self._socket is not None:
            raise RuntimeError("this reservation is in use; make another one with gpu.reserve()")
        path = os.environ.get(ENVIRONMENT)
        if path:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(ANSWER_S + self._wait_s)
            self._path = path

    def _ask(self) -> None:
        held = self._socket
        if held is None:
            return  # in an agent's own tests there is nobody to ask, and nobody to share with
        try:
            held.connect(self._path)
            asked = {"bytes": self.bytes, "card": self._card, "wait_s": self._wait_s}
            held.sendall(json.dumps(asked).encode() + b"\n")
            answer = json.loads(_line(held))
            if not isinstance(answer, dict):
                raise ValueError("no object")
        except (OSError, ValueError) as error:
            self.release()
            raise GpuMemoryRefused(f"the host gives no answer about GPU memory: {error}") from None
        if answer.get("ok") is not True:
            self.release()
            raise GpuMemoryRefused(str(answer.get("reason", "the host gives no reason")))
        held.settimeout(None)
        self.uuid = str(answer.get("uuid", ""))


def _line(held: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        more = held.recv(4096)
        if not more or len(text) > MAX_ANSWER:
            raise ValueError("it ended the connection")
        text += more
    return text


class Gpu:
    """The GPUs of the host, as an agent may use them."""

    def reserve(self, size: int, *, card: str = "", wait_s: float = 0.0) -> Reservation:
        """`size` bytes on a card: `card` names it by UUID or index, by default the one with most room.

        wait_s: how long to wait for others to give memory back, in seconds. GpuMemoryRefused on entering the `with`.
        """
        return Reservation(size, card, wait_s)
