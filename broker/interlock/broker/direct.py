"""Events past the broker: a host's own endpoint, where a rollback arrives although broker and coordinator are dead.

A request is the three frames of an event; the answer one map, a `Reply`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
import trio

from interlock.broker import policy, wire
from interlock.broker.errors import Refused, UnknownVersion, Unreachable, WireError
from interlock.broker.fields import says
from interlock.broker.gate import Gate
from interlock.broker.protocol import SEE_REFUSALS
from interlock.broker.rejects import Rejects
from interlock.broker.sockets import Socket, Sockets
from interlock.broker.wire import Event

REMEMBERED = 4096  # ids of accepted events kept: a sender repeats within a second, and this is more than come in one
REPEAT_S = 0.3  # a request whose connection broke goes out again: thrice within the second that callers wait


class Reply(msgspec.Struct, frozen=True):
    """What a host says to an event."""

    id: Annotated[str, says("the event's, where its header could be read")]
    ok: Annotated[bool, says("it was accepted")]
    reason: Annotated[str, says("why not, in one line for people")] = ""
    kind: Annotated[Literal["", "invalid", "refused", "version"], says(SEE_REFUSALS)] = ""


_replies = msgspec.msgpack.Decoder(Reply)


def decode_reply(frame: bytes) -> Reply:
    return wire.decode(frame, _replies, what="reply")


class _Entrance:
    """One host's endpoint, from within: decodes, asks the gate, takes each event once."""

    def __init__(self, endpoint: str, accept: Callable[[Event], None], gate: Gate | None) -> None:
        self.rejects = Rejects(f"direct {endpoint}")
        self._accept = accept
        self._gate = gate
        self._accepted: OrderedDict[str, None] = OrderedDict()

    def reply(self, user: str, frames: list[bytes]) -> Reply:
        try:
            event = wire.decode_event(frames)
        except WireError as error:
            unknown = isinstance(error, UnknownVersion)
            self.rejects.count("an event of an unknown version" if unknown else "what is not an event", error)
            if self._gate is not None:
                self._gate.garbage(user)
            return Reply(_id_of(frames), ok=False, reason=str(error), kind="version" if unknown else "invalid")
        id = event.header.id
        try:
            if self._gate is not None:
                self._gate.admit(user, lambda grant: policy.direct(grant, event))
            if id not in self._accepted:
                self._accept(event)
        except Refused as refused:
            return Reply(id, ok=False, reason=str(refused), kind="refused")
        self._accepted[id] = None
        while len(self._accepted) > REMEMBERED:
            self._accepted.popitem(last=False)
        return Reply(id, ok=True)


class DirectLine:
    """A sender's connection to one host's endpoint. `run` must run beside it."""

    def __init__(self, sockets: Sockets, endpoint: str, server: bytes = b"") -> None:
        self._server = server  # the host's public key, where keys are used
        self._sockets = sockets
        self._endpoint = endpoint
        self._socket = self._connect()
        self._waiting: dict[str, Callable[[Reply], None]] = {}
        self._rejects = Rejects(f"direct {endpoint}")

    def _connect(self) -> Socket:
        return self._sockets.open(
            "dealer", connect=self._endpoint, server=self._server, label=f"direct {self._endpoint}"
        )

    async def ask(self, event: Event, timeout: float) -> None:
        """Repeat the event until it is answered. Refused with the reason; Unreachable after `timeout` seconds."""
        replies: list[Reply] = []
        done = trio.Event()

        def answer(reply: Reply) -> None:
            replies.append(reply)
            done.set()

        id = event.header.id
        self._waiting[id] = answer
        try:
            with trio.move_on_after(timeout):
                while not replies:
                    self._socket.send_nowait(wire.encode_event(event))
                    with trio.move_on_after(REPEAT_S):
                        await done.wait()
        finally:
            self._waiting.pop(id, None)
            if not replies and not self._waiting:
                # What still waits in the socket would reach a host that comes back minutes later.
                self._socket.close(linger_ms=0)
                self._socket = self._connect()
        if not replies:
            raise Unreachable(f"no answer within {timeout:g} s", where=self._endpoint, hint="is that host running?")
        if not replies[0].ok:
            raise Refused(replies[0].reason, where=self._endpoint)

    async def run(self) -> None:
        while True:
            try:
                batch = await self._socket.receive_batch()
            except trio.ClosedResourceError:  # replaced by a fresh one
                continue
            for frames in batch:
                self._take(frames)

    def _take(self, frames: list[bytes]) -> None:
        try:
            reply = decode_reply(frames[0])
        except WireError as error:
            self._rejects.count("what is not a reply", error)
            return
        answer = self._waiting.get(reply.id)
        if answer is not None:
            answer(reply)


async def serve_direct(
    sockets: Sockets,
    endpoint: str,
    accept: Callable[[Event], None],
    *,
    gate: Gate | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hand each event that arrives at `endpoint` to `accept`, once by its id, and answer; runs until cancelled.

    gate: who may ask; it serves on these sockets already. None: everybody may.
    `accept` raises Refused to say no. Started with the real endpoint. InUse if the port is taken.
    """
    socket = sockets.open("router", bind=endpoint, mandatory=True, label=f"direct {endpoint}")
    if gate is not None:
        gate.guard(socket)
    entrance = _Entrance(socket.endpoint, accept, gate)
    try:
        task_status.started(socket.endpoint)
        while True:
            for user, (peer, *frames) in await socket.receive_known():
                if not socket.send_nowait([peer, wire.encode(entrance.reply(user, frames))]):
                    entrance.rejects.count("an answer whose asker is gone")
    finally:
        socket.close()


def _id_of(frames: list[bytes]) -> str:
    try:
        return wire.decode_header(frames[1]).id
    except (WireError, IndexError):
        return ""
