"""How a host gets at the state of an instance: by the hooks of a class, or by the commands of a program.

`carry` moves it from one instance to another, piece by piece: of what is under way each side holds a few, however large
the state is.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from interlock.agents.instance import InstanceControl
from interlock.agents.preflight import fill_command
from interlock.agents.process import Ended, piped
from interlock.agents.transfer import WINDOW, End, Incoming, Piece, TransferError, parts
from interlock.broker.config import StateConfig
from interlock.broker.errors import InterlockError, Unreachable
from interlock.broker.unwrapped import unwrapped

INSIST_S = 2.0  # a piece that was not taken is sent again after so long, then after twice as long, and so on
FOREVER_S = 1e6  # for one answer: whoever carries has a limit for all of it

Use = Callable[[bytes, bool], Awaitable[None]]  # a piece, and whether the state is one value


class Taking(Protocol):
    """A state that is being handed to an instance."""

    async def put(self, data: bytes, whole: bool) -> None:
        """The next piece. TransferError if the instance does not take it."""

    async def done(self, end: End) -> None:
        """Returns once the instance says that it has all of it. TransferError."""


class StatePort(Protocol):
    """What a host can do with the state of an instance. TransferError with the reason if it can't."""

    async def quiesce(self, limit_s: float) -> None:
        """The instance stops working by itself; requests it gets none."""

    async def resume(self, limit_s: float) -> None:
        """It goes on, or begins."""

    async def give(self, use: Use) -> End:
        """Hand each piece of its state to `use`; what all of it was."""

    def taking(self) -> AbstractAsyncContextManager[Taking]:
        """Hand it a state; leaving early calls that off."""


async def carry(source: StatePort, target: StatePort) -> End:
    """Move the state. TransferError, with whose fault it is; the source is as it was."""
    async with target.taking() as taking:
        end = await source.give(taking.put)
        await taking.done(end)
    return end


# --- a class


class ControlPort:
    """A class's state, over its control socket."""

    def __init__(self, control: InstanceControl) -> None:
        self._control = control

    async def quiesce(self, limit_s: float) -> None:
        await self._turn("deactivate", self._control.deactivate, limit_s)

    async def resume(self, limit_s: float) -> None:
        await self._turn("activate", self._control.activate, limit_s)

    async def _turn(self, what: str, ask: Callable[[float], Awaitable[object]], limit_s: float) -> None:
        try:
            said = await ask(limit_s)
        except Unreachable as error:
            raise TransferError(str(error)) from None
        if not getattr(said, "ok", False):
            raise TransferError(getattr(said, "detail", "") or f"{what} failed")

    async def give(self, use: Use) -> End:
        transfer = uuid.uuid4().hex
        return await fetch(lambda number: self._control.give_state(transfer, number, FOREVER_S), use)

    @asynccontextmanager
    async def taking(self) -> AsyncIterator[Taking]:
        yield _Importing(self._control)


class _Importing:
    def __init__(self, control: InstanceControl) -> None:
        self._control = control
        self._transfer = uuid.uuid4().hex
        self._number = 0

    async def put(self, data: bytes, whole: bool) -> None:
        piece = Piece(number=self._number, data=data, sha256=hashlib.sha256(data).digest(), whole=whole)
        self._number += 1
        await _insist(lambda: self._control.take_state(self._transfer, piece, FOREVER_S))

    async def done(self, end: End) -> None:
        await _insist(lambda: self._control.took_state(self._transfer, end, FOREVER_S))


async def _insist(ask: Callable[[], Awaitable[None]]) -> None:
    """Again and again, as the way there may break: whoever is asked does it once."""
    pause = INSIST_S
    while True:
        with trio.move_on_after(pause):
            await ask()
            return
        pause *= 2


async def fetch(ask: Callable[[int], Awaitable[Piece | End]], use: Use) -> End:
    """Ask for all pieces, a few ahead, and hand them on in order. What `ask` and `use` raise; TransferError."""
    incoming = Incoming()
    give, came = trio.open_memory_channel[Piece | End | InterlockError](WINDOW)

    async def one(number: int) -> None:
        try:
            await give.send(await ask(number))
        except InterlockError as error:
            await give.send(error)

    with unwrapped():
        async with trio.open_nursery() as nursery:
            while not incoming.complete:
                for number in incoming.asks(trio.current_time()):
                    nursery.start_soon(one, number)
                with trio.move_on_at(incoming.deadline()) as waited:
                    found = await came.receive()
                if waited.cancelled_caught:
                    continue
                if isinstance(found, InterlockError):
                    raise found
                for data in incoming.take(found):
                    assert isinstance(found, Piece)
                    await use(data, found.whole)
            nursery.cancel_scope.cancel()
    assert incoming.end is not None
    return incoming.end


# --- a program


@dataclass(frozen=True)
class CommandPort:
    """A program's state, by the commands that its revision names."""

    config: StateConfig
    values: Mapping[str, str]  # of the placeholders
    folder: Path
    env: Mapping[str, str]
    marker: str  # of the host
    where: str

    async def quiesce(self, limit_s: float) -> None:
        await self._run("quiesce", self.config.quiesce, limit_s)

    async def resume(self, limit_s: float) -> None:
        await self._run("resume", self.config.resume, limit_s)

    async def give(self, use: Use) -> End:
        digest, count, size = hashlib.sha256(), 0, 0
        argv = fill_command(self.config.give, self.values, where=self.where)
        async with piped(argv, cwd=self.folder, env=self.env, host=self.marker) as command:
            while data := await command.read():
                for part in parts(data):
                    digest.update(part)
                    count, size = count + 1, size + len(part)
                    await use(part, False)
            _check("give", await command.ended())
        return End(pieces=count, size=size, sha256=digest.digest())

    @asynccontextmanager
    async def taking(self) -> AsyncIterator[Taking]:
        argv = fill_command(self.config.take, self.values, where=self.where)
        async with piped(argv, cwd=self.folder, env=self.env, host=self.marker, given=True) as command:
            yield _Feeding(command.write, command.ended)

    async def _run(self, what: str, command: list[str], limit_s: float) -> None:
        if not command:
            return
        argv = fill_command(command, self.values, where=self.where)
        with trio.move_on_after(limit_s):
            async with piped(argv, cwd=self.folder, env=self.env, host=self.marker, given=True) as running:
                _check(what, await running.ended())
                return
        raise TransferError(f"the command `{what}` did not end within {limit_s:g} s", where=self.where)


@dataclass
class _Feeding:
    write: Callable[[bytes], Awaitable[None]]
    ended: Callable[[], Awaitable[Ended]]

    async def put(self, data: bytes, whole: bool) -> None:
        try:
            await self.write(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            _check("take", await self.ended())
            raise TransferError("the command `take` ended before it had read all of the state") from None

    async def done(self, end: End) -> None:
        _check("take", await self.ended())


def _check(what: str, ended: Ended) -> None:
    if ended.returncode != 0:
        lines = ended.output.strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        raise TransferError(f"the command `{what}` exited with {ended.returncode}{last}")
