"""The host's side of an instance's control socket: who is it, is it well, what are its numbers, stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import trio

from interlock.agents.transfer import End, Piece, TransferError
from interlock.broker.errors import Unreachable, WireError
from interlock.broker.sockets import Socket, Sockets
from interlock.broker.wire import decode, encode

ANSWER_TIMEOUT_S = 2.0  # a control question is answered at once by an instance that lives

T = TypeVar("T")


class Health(msgspec.Struct, frozen=True):
    """One health check: well or not, why, and how long the answer took."""

    ok: bool
    detail: str = ""
    latency_s: float = 0.0


class HandlerContract(msgspec.Struct, frozen=True):
    """One action: its parameters with their types as text; " = ..." behind a type says that it has a default."""

    idempotent: bool = False
    side_effects: bool = False  # never mirrored
    parameters: dict[str, str] = {}


class Description(msgspec.Struct, frozen=True):
    """What an instance says of itself. version: of Interlock, in the agent's own environment."""

    agent: str
    revision: str
    instance: str
    pid: int
    version: str
    handlers: dict[str, HandlerContract]
    state: bool = False  # it has state in memory that can be handed to another instance


class _HealthAnswer(msgspec.Struct, frozen=True):
    ok: bool
    detail: str = ""


class _Gave(msgspec.Struct, frozen=True):
    """The answer to `export`: a piece, or (`end`) what all of them are."""

    ok: bool
    detail: str = ""
    n: int = 0
    data: bytes = b""
    sha256: bytes = b""
    end: bool = False
    pieces: int = 0
    size: int = 0
    whole: bool = False


class _Took(msgspec.Struct, frozen=True):
    """The answer to `import` and `imported`."""

    ok: bool
    detail: str = ""
    size: int = 0
    sha256: bytes = b""


_gave = msgspec.msgpack.Decoder(_Gave)
_took = msgspec.msgpack.Decoder(_Took)
_description = msgspec.msgpack.Decoder(Description)
_health = msgspec.msgpack.Decoder(_HealthAnswer)
_metrics = msgspec.msgpack.Decoder(dict[str, float])
_anything = msgspec.msgpack.Decoder(dict[str, Any])


class InstanceControl:
    """Questions to one instance, any number at once. Opens a DEALER among `sockets`; `close` it with the instance."""

    def __init__(self, sockets: Sockets, endpoint: str) -> None:
        self.endpoint = endpoint
        self.undecodable = 0  # answers that were none
        self._socket: Socket = sockets.open("dealer", connect=endpoint, starting=True, label=f"control {endpoint}")
        self._last_id = 0
        self._waiting: dict[bytes, bytes | None] = {}
        self._reading = False
        self._turn = trio.lowlevel.ParkingLot()

    def close(self) -> None:
        self._socket.close()

    async def describe(self, timeout: float = ANSWER_TIMEOUT_S) -> Description:
        """Unreachable after `timeout` seconds, WireError if the answer is no description."""
        return await self._ask("describe", _description, timeout)

    async def metrics(self, timeout: float = ANSWER_TIMEOUT_S) -> dict[str, float]:
        """The agent's own numbers by name. Errors as for `describe`."""
        return await self._ask("metrics", _metrics, timeout)

    async def stop(self, timeout: float = ANSWER_TIMEOUT_S) -> None:
        """Asks for an orderly end, as SIGTERM does; returns once the instance has heard it."""
        await self._ask("stop", _anything, timeout)

    async def activate(self, timeout: float) -> Health:
        """Begin a turn at work; well once it has begun. Errors as for `describe`."""
        answer = await self._ask("activate", _health, timeout)
        return Health(answer.ok, answer.detail)

    async def deactivate(self, timeout: float) -> Health:
        """End the turn; well once all that was begun in it has ended. Errors as for `describe`."""
        answer = await self._ask("deactivate", _health, timeout)
        return Health(answer.ok, answer.detail)

    async def give_state(self, transfer: str, number: int, timeout: float) -> Piece | End:
        """A piece of its state, or the end. TransferError with what the agent said; errors as for `describe`."""
        gave = await self._ask("export", _gave, timeout, transfer=transfer, n=number)
        if not gave.ok:
            raise TransferError(gave.detail, where=f"export of {transfer}")
        if gave.end:
            return End(pieces=gave.pieces, size=gave.size, sha256=gave.sha256, whole=gave.whole)
        return Piece(number=gave.n, data=gave.data, sha256=gave.sha256, whole=gave.whole)

    async def take_state(self, transfer: str, piece: Piece, timeout: float) -> None:
        """Hand over a piece; it may come twice. Errors as for `give_state`."""
        took = await self._ask(
            "import", _took, timeout, transfer=transfer, n=piece.number, data=piece.data, sha256=piece.sha256,
            whole=piece.whole,
        )  # fmt: skip
        if not took.ok:
            raise TransferError(took.detail, where=f"import of {transfer}")

    async def took_state(self, transfer: str, end: End, timeout: float) -> None:
        """Returns once it has taken all of the state, and says what it took. Errors as for `give_state`."""
        took = await self._ask(
            "imported", _took, timeout, transfer=transfer, pieces=end.pieces, size=end.size, sha256=end.sha256,
            whole=end.whole,
        )  # fmt: skip
        if not took.ok:
            raise TransferError(took.detail, where=f"import of {transfer}")
        if (took.size, took.sha256) != (end.size, end.sha256):
            raise TransferError("what it says to have restored is not what was sent", where=f"import of {transfer}")

    async def health(self, timeout: float = ANSWER_TIMEOUT_S) -> Health:
        """Never raises for what the instance does: no answer, or a wrong one, is not well."""
        start = trio.current_time()
        try:
            answer = await self._ask("health", _health, timeout)
        except (Unreachable, WireError) as error:
            return Health(False, error.what, trio.current_time() - start)
        return Health(answer.ok, answer.detail, trio.current_time() - start)

    async def _ask(self, op: str, decoder: msgspec.msgpack.Decoder[T], timeout: float, **more: Any) -> T:
        self._last_id += 1
        id = self._last_id.to_bytes(8, "big")
        self._waiting[id] = None
        try:
            with trio.fail_after(timeout):
                await self._socket.send([id, encode({"op": op, **more})])
                body = await self._answer_to(id)
        except trio.TooSlowError:
            raise Unreachable(f"no answer to {op} within {timeout:g} s", where=self.endpoint) from None
        except trio.ClosedResourceError:  # the instance was ended while it was asked
            raise Unreachable(f"no answer to {op}: the instance is gone", where=self.endpoint) from None
        finally:
            del self._waiting[id]
        try:
            return decode(body, decoder, what=f"reply to {op}")
        except WireError:
            self.undecodable += 1
            raise

    async def _answer_to(self, id: bytes) -> bytes:
        """One of those who wait reads for all; when it leaves, the next one takes its place."""
        while (body := self._waiting[id]) is None:
            if self._reading:
                await self._turn.park()
                continue
            self._reading = True
            try:
                for frames in await self._socket.receive_batch():
                    self._sort(frames)
            finally:
                self._reading = False
                self._turn.unpark_all()
        return body

    def _sort(self, frames: list[bytes]) -> None:
        if len(frames) != 2:
            self.undecodable += 1
        elif frames[0] in self._waiting:  # else it came after its deadline
            self._waiting[frames[0]] = frames[1]


def contract_gaps(old: Mapping[str, HandlerContract], new: Mapping[str, HandlerContract]) -> list[str]:
    """What clients of `old` would miss in `new`, one line each; empty if every request to `old` fits `new`."""
    gaps: list[str] = []
    for action, before in sorted(old.items()):
        after = new.get(action)
        if after is None:
            gaps.append(f"action {action!r} is gone")
            continue
        if before.idempotent and not after.idempotent:
            gaps.append(f"action {action!r} is not idempotent any more")
        for name, kind in before.parameters.items():
            type_name, _, default = kind.partition(" = ")
            new_type, _, new_default = after.parameters.get(name, "").partition(" = ")
            if not new_type:
                if "**" not in after.parameters:
                    gaps.append(f"action {action!r} no longer takes {name!r}")
            elif new_type not in (type_name, "Any"):
                gaps.append(f"action {action!r}: {name!r} was {type_name}, is {new_type}")
            elif default and not new_default:
                gaps.append(f"action {action!r}: {name!r} had a default, has none")
        for name in sorted(after.parameters.keys() - before.parameters.keys() - {"**"}):
            if " = " not in after.parameters[name]:
                gaps.append(f"action {action!r} needs a new argument {name!r}")
    return gaps
