"""How an agent's state leaves its process and enters it: the hooks `snapshot` and `restore`, asked piece by piece.

The host asks over the control socket. `export` with a new transfer's name calls `snapshot`, and is answered with one
piece, or the end; `import` hands one over, and is answered once the agent took it, so that a slow `restore` slows down
whoever sends; `imported` is answered when `restore` has returned. A new transfer ends the one before.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import trio

from interlock.agents.agent import Agent
from interlock.agents.transfer import PIECE, End, Incoming, Outgoing, Piece, TransferError

MAX_TEXT = 500  # characters of what went wrong in a hook

Call = Callable[[Callable[[], Any]], Awaitable[Any]]  # runs a hook, in a thread where it is a plain def


@dataclass
class _Leaving:
    """One export: pieces are cut from what `snapshot` gives, only as they are asked for."""

    name: str
    source: AsyncIterator[bytes] | None = None
    outgoing: Outgoing = field(default_factory=Outgoing)
    rest: bytearray = field(default_factory=bytearray)
    whole: bool = False
    turn: trio.Lock = field(default_factory=trio.Lock)
    trouble: str = ""


@dataclass
class _Arriving:
    """One import: what has come goes to `restore`, one piece at a time."""

    name: str
    whole: bool
    give: trio.MemorySendChannel[bytes]
    taken: trio.MemoryReceiveChannel[bytes]
    incoming: Incoming = field(default_factory=Incoming)
    turn: trio.Lock = field(default_factory=trio.Lock)
    over: trio.Event = field(default_factory=trio.Event)
    trouble: str = ""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class StateDoor:
    """Answers the host's questions about the state of one agent, with maps."""

    def __init__(self, agent: Agent, *, call: Call, log: logging.Logger) -> None:
        self._agent = agent
        self._call = call
        self._log = log
        self._leaving: _Leaving | None = None
        self._arriving: _Arriving | None = None
        self._limiter = trio.CapacityLimiter(2)  # one hook reads or writes, another one may be at its end

    async def answer(self, question: dict[str, Any], nursery: trio.Nursery) -> dict[str, Any]:
        """The answer to one question; what the hooks raise is in it. `nursery` owns a `restore` under way."""
        try:
            name, number = str(question.get("transfer", "")), question.get("n", 0)
            if not name or not isinstance(number, int) or number < 0:
                raise TransferError("a transfer has a name, and its pieces a number")
            match question.get("op"):
                case "export":
                    return await self._export(name, number)
                case "import":
                    return await self._import(name, number, question, nursery)
                case _:
                    return await self._imported(name, question, nursery)
        except TransferError as error:
            return {"ok": False, "detail": str(error)}
        except Exception as error:
            self._log.exception("the state could not be handed over")
            return {"ok": False, "detail": f"{type(error).__name__}: {error}"[:MAX_TEXT]}

    # --- out

    async def _export(self, name: str, number: int) -> dict[str, Any]:
        if self._leaving is None or self._leaving.name != name:
            self._leaving = _Leaving(name)
        leaving = self._leaving
        async with leaving.turn:
            if leaving.trouble:  # pieces are asked for ahead: what broke once is not the end of the state
                raise TransferError(leaving.trouble)
            try:
                if leaving.source is None:
                    leaving.source = await self._begin(leaving)
                while leaving.outgoing.wants(number):
                    await self._more(leaving, leaving.source)
            except Exception as error:
                leaving.trouble = f"snapshot() failed: {type(error).__name__}: {error}"[:MAX_TEXT]
                self._log.exception("snapshot() failed")
                raise TransferError(leaving.trouble) from None
        found = leaving.outgoing.get(number)
        if isinstance(found, Piece):
            return {
                "ok": True, "n": found.number, "data": found.data, "sha256": found.sha256, "whole": leaving.whole,
            }  # fmt: skip
        return {
            "ok": True, "end": True, "pieces": found.pieces, "size": found.size, "sha256": found.sha256,
            "whole": found.whole,
        }  # fmt: skip

    async def _begin(self, leaving: _Leaving) -> AsyncIterator[bytes]:
        hook: Any = self._agent.snapshot
        made = hook() if inspect.isasyncgenfunction(hook) else await self._call(hook)
        if isinstance(made, bytes | bytearray | memoryview):
            leaving.whole = True
            return _single(bytes(made))
        if hasattr(made, "__aiter__"):
            return aiter(made)
        if made is None or isinstance(made, str):
            raise TypeError(f"snapshot() returned {type(made).__name__}, not bytes or an iterable of bytes")
        return self._threaded(iter(made))

    async def _threaded(self, source: Iterator[bytes]) -> AsyncIterator[bytes]:
        """An ordinary iterator may block: it runs in a thread."""
        while (
            data := await trio.to_thread.run_sync(next, source, None, abandon_on_cancel=True, limiter=self._limiter)
        ) is not None:
            yield data

    async def _more(self, leaving: _Leaving, source: AsyncIterator[bytes]) -> None:
        """One more piece, or the end."""
        rest = leaving.rest
        while len(rest) < PIECE:
            try:
                data = await anext(source)
            except StopAsyncIteration:
                if rest:
                    leaving.outgoing.add(bytes(rest))
                    rest.clear()
                leaving.outgoing.finish(whole=leaving.whole)
                return
            if not isinstance(data, bytes | bytearray | memoryview):
                raise TypeError(f"snapshot() yielded {type(data).__name__}, not bytes")
            rest += data
        leaving.outgoing.add(bytes(rest[:PIECE]))
        del rest[:PIECE]

    # --- in

    def _arriving_of(self, name: str, whole: bool, nursery: trio.Nursery) -> _Arriving:
        found = self._arriving
        if found is not None and found.name == name:
            return found
        if found is not None:
            found.scope.cancel()
        give, taken = trio.open_memory_channel[bytes](1)
        self._arriving = found = _Arriving(name, whole, give, taken)
        nursery.start_soon(self._restore, found)
        return found

    async def _import(self, name: str, number: int, question: dict[str, Any], nursery: trio.Nursery) -> dict[str, Any]:
        arriving = self._arriving_of(name, bool(question.get("whole")), nursery)
        data, digest = question.get("data"), question.get("sha256")
        if not isinstance(data, bytes) or not isinstance(digest, bytes):
            raise TransferError("a piece has data and their sha256")
        async with arriving.turn:
            for ready in arriving.incoming.take(Piece(number=number, data=data, sha256=digest)):
                await self._hand(arriving, ready)
        return {"ok": not arriving.trouble, "detail": arriving.trouble, "next": arriving.incoming.next}

    async def _hand(self, arriving: _Arriving, data: bytes) -> None:
        try:
            await arriving.give.send(data)
        except trio.BrokenResourceError:  # restore has ended, in good order or not
            await arriving.over.wait()
            arriving.trouble = arriving.trouble or "restore() returned before it had read all of the state"

    async def _imported(self, name: str, question: dict[str, Any], nursery: trio.Nursery) -> dict[str, Any]:
        arriving = self._arriving_of(name, bool(question.get("whole")), nursery)
        pieces, size, digest = (question.get(key) for key in ("pieces", "size", "sha256"))
        if not (isinstance(pieces, int) and isinstance(size, int) and isinstance(digest, bytes)):
            raise TransferError("an end has the number of pieces, their size in bytes, and their sha256")
        async with arriving.turn:
            arriving.incoming.take(End(pieces=pieces, size=size, sha256=digest, whole=arriving.whole))
            if not arriving.incoming.complete:
                raise TransferError(f"piece {arriving.incoming.next} has not come")
            arriving.give.close()
        await arriving.over.wait()
        incoming = arriving.incoming
        return {
            "ok": not arriving.trouble, "detail": arriving.trouble, "size": incoming.bytes, "sha256": incoming.sha256,
        }  # fmt: skip

    async def _restore(self, arriving: _Arriving) -> None:
        hook: Any = self._agent.restore
        try:
            with arriving.scope, arriving.taken:
                if arriving.whole:
                    state: Any = b"".join([data async for data in arriving.taken])
                    if not arriving.incoming.complete:
                        raise TransferError("the state was cut off")
                else:
                    state = self._verified(arriving)
                    if not inspect.iscoroutinefunction(hook):
                        state = _blocking(state)
                if inspect.iscoroutinefunction(hook):
                    await hook(state)
                else:
                    made = await trio.to_thread.run_sync(hook, state, abandon_on_cancel=True, limiter=self._limiter)
                    if inspect.isawaitable(made):
                        await made
            if arriving.scope.cancelled_caught:
                arriving.trouble = "another transfer began"
        except Exception as error:
            arriving.trouble = f"restore() failed: {type(error).__name__}: {error}"[:MAX_TEXT]
            self._log.exception("restore() failed")
        finally:
            arriving.over.set()

    @staticmethod
    async def _verified(arriving: _Arriving) -> AsyncIterator[bytes]:
        """Raises at its end if it was cut off: a hook never takes half of a state for all of it."""
        async for data in arriving.taken:
            yield data
        if not arriving.incoming.complete:
            raise TransferError("the state was cut off")


async def _single(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _blocking(source: AsyncIterator[bytes]) -> Iterator[bytes]:
    """The same for a hook that runs in a thread."""

    async def following() -> bytes | None:
        return await anext(source, None)

    while (data := trio.from_thread.run(following)) is not None:
        yield data
