"""Messages on a stream of bytes: each is four bytes of length, then MessagePack. And two streams joined to one."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from interlock.broker.errors import WireError
from interlock.broker.wire import MAX_FRAME, encode

READ = 64 << 10  # bytes at once
BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)

_lists = msgspec.msgpack.Decoder(list[Any])


class Frames:
    """Lists of plain values, in order. WireError for what is none, or the end of the stream where more should come."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self._rest = bytearray()

    async def send(self, *values: Any) -> None:
        body = encode(list(values))
        await self.stream.send_all(len(body).to_bytes(4, "big") + body)

    async def receive(self) -> list[Any]:
        size = int.from_bytes(await self._take(4), "big")
        if size > MAX_FRAME:
            raise WireError(f"a message of {size} bytes on a stream", hint=f"at most {MAX_FRAME}")
        try:
            found = _lists.decode(await self._take(size))
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise WireError(f"not a message of a stream: {error}") from None
        if not found or not isinstance(found[0], str):
            raise WireError("a message of a stream has no name")
        return found

    async def _take(self, size: int) -> bytes:
        while len(self._rest) < size:
            data = await self.stream.receive_some(READ)
            if not data:
                raise WireError("the stream ended before its last message")
            self._rest += data
        found = bytes(self._rest[:size])
        del self._rest[:size]
        return found


async def join(one: trio.abc.HalfCloseableStream, other: trio.abc.HalfCloseableStream) -> None:
    """What either says the other hears, until both have said all, or one breaks. Closes both."""
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pass_on, one, other, nursery.cancel_scope)
            nursery.start_soon(_pass_on, other, one, nursery.cancel_scope)
    finally:
        await trio.aclose_forcefully(one)
        await trio.aclose_forcefully(other)


async def _pass_on(
    source: trio.abc.HalfCloseableStream, target: trio.abc.HalfCloseableStream, both: trio.CancelScope
) -> None:
    try:
        while data := await source.receive_some(READ):
            await target.send_all(data)
        await target.send_eof()
    except BROKEN:
        both.cancel()
