"""The way from one host to another: `Link` dials and comes back by itself, `LinkDoor` is where the others arrive.

Only hosts of the fleet get in: the connection proves whose it is (CURVE), and what a host may then ask for is decided
by `guests.py`, by what the coordinator's signed commands named. A session that was silent for `SILENT_S`, on either
side, is over.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from interlock.agents import link_protocol
from interlock.agents.link_protocol import Hello, Ping
from interlock.agents.session import PING_S, SILENT_S, Session, Stream
from interlock.broker import policy
from interlock.broker.errors import Refused, Unreachable, WireError
from interlock.broker.gate import Gate
from interlock.broker.sockets import Socket, Sockets

log = logging.getLogger(__name__)

MEET_S = 3.0  # for the other side to answer the first message; a connection over a slow line takes one
AGAIN_S = 0.2  # before a link that broke is dialled again
MAX_SESSIONS = 256  # of all hosts that dial one: each host has one for each way


class Link:
    """From this host to another one. `run` must run beside it."""

    def __init__(self, sockets: Sockets, endpoint: str, *, own: str, there: str, server: bytes = b"") -> None:
        self.there = there
        self._sockets = sockets
        self._endpoint = endpoint
        self._own = own  # this host's name
        self._server = server
        self._session: Session | None = None
        self._changed = trio.Event()

    @property
    def up(self) -> bool:
        return self._session is not None

    async def until_up(self, timeout: float) -> Session:
        """Unreachable if there is no session within so many seconds."""
        with trio.move_on_after(timeout):
            while self._session is None:
                await self._changed.wait()
            return self._session
        raise Unreachable(f"no connection within {timeout:g} s", where=f"{self.there} at {self._endpoint}")

    async def until_changed(self) -> None:
        """Returns once the link came up, or went down, after this was asked."""
        await self._changed.wait()

    async def ask(self, what: str, about: dict[str, Any], timeout: float) -> dict[str, Any]:
        """As of `Session`. It waits for a session, and asks again in the next one if that breaks: each is done once."""
        until = trio.current_time() + timeout
        while True:
            session = await self.until_up(max(0.0, until - trio.current_time()))
            try:
                return await session.ask(what, about, max(0.0, until - trio.current_time()))
            except Unreachable:
                if not session.broken.is_set() or trio.current_time() >= until:
                    raise
                with trio.move_on_at(until):
                    while self._session is session:
                        await self._changed.wait()

    def open(self, whom: str, port: str) -> Stream:
        """Unreachable if there is no session now."""
        if self._session is None:
            raise Unreachable("no connection", where=f"{self.there} at {self._endpoint}")
        return self._session.open(whom, port)

    async def run(self) -> None:
        while True:
            socket = self._sockets.open(
                "dealer", connect=self._endpoint, server=self._server, send_limit=0, receive_limit=0,
                label=f"link to {self.there}",
            )  # fmt: skip
            try:
                await self._live(socket)
            finally:
                socket.close(linger_ms=0)
            await trio.sleep(AGAIN_S)

    async def _live(self, socket: Socket) -> None:
        """One session, from its first message to its end."""
        async with trio.open_nursery() as nursery:
            put = lambda frame: socket.send_nowait([frame])  # noqa: E731
            session = Session(
                uuid.uuid4().hex, self.there, put, nursery, dials=True, answer=_nothing_asked, serve=_nothing_served
            )
            session.say(Hello(session.name, self._own))
            nursery.start_soon(self._receive, socket, session)
            nursery.start_soon(_stay, session, partial(self._begin, session))
            try:
                await session.broken.wait()
            finally:
                session.broke("this host is ending")
                if self._session is session:
                    log.info("the link to %s is down: %s", self.there, session.reason)
                    self._set(None)
            nursery.cancel_scope.cancel()

    def _begin(self, session: Session) -> None:
        log.info("the link to %s is up", self.there)
        self._set(session)

    def _set(self, session: Session | None) -> None:
        self._session = session
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    @staticmethod
    async def _receive(socket: Socket, session: Session) -> None:
        while True:
            for frames in await socket.receive_batch():
                try:
                    session.take(link_protocol.decode(frames))
                except WireError as error:
                    session.broke(str(error))


async def _stay(session: Session, begin: Callable[[], None]) -> None:
    """Says that we are there, and ends the session when the other side does not."""
    began = session.heard
    met = False
    while not session.broken.is_set():
        now = trio.current_time()
        if not met and session.met:
            met = True
            begin()
        limit = SILENT_S if met else MEET_S
        if now - (session.heard if met else began) > limit:
            session.broke(f"nothing was heard for {limit:g} s")
            return
        if met:
            session.say(Ping())
        with trio.move_on_after(PING_S if met else 0.05):
            await session.broken.wait()


async def _nothing_asked(what: str, about: dict[str, Any]) -> dict[str, Any]:
    raise Refused(f"{what} is not asked this way")


async def _nothing_served(stream: Stream, whom: str, port: str) -> None:
    raise Refused(f"no stream to {port} of {whom} is opened this way")


AnswerHost = Callable[[str, str, dict[str, Any]], Awaitable[dict[str, Any]]]  # the host that asks, what, and about it
ServeHost = Callable[[str, Stream, str, str], Awaitable[None]]  # the host, the stream, to whom, which port


class LinkDoor:
    """Where other hosts arrive."""

    def __init__(self, own: str, answer: AnswerHost, serve: ServeHost, gate: Gate | None) -> None:
        self._own = own
        self._answer = answer
        self._serve = serve
        self._gate = gate
        self._sessions: dict[bytes, Session] = {}

    async def run(
        self, sockets: Sockets, endpoint: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Until cancelled. InUse if the port is taken."""
        socket = sockets.open(
            "router", bind=endpoint, mandatory=True, send_limit=0, receive_limit=0, label=f"link {endpoint}"
        )
        if self._gate is not None:
            self._gate.guard(socket)
        try:
            task_status.started(socket.endpoint)
            async with trio.open_nursery() as nursery:
                while True:
                    for user, (peer, *frames) in await socket.receive_known():
                        self._take(socket, nursery, user, peer, frames)
        finally:
            for session in list(self._sessions.values()):
                session.broke("this host is ending")
            socket.close()

    def _take(self, socket: Socket, nursery: trio.Nursery, user: str, peer: bytes, frames: list[bytes]) -> None:
        try:
            came = link_protocol.decode(frames)
            session = self._sessions.get(peer)
            if self._gate is not None:  # each message anew: a key may have been revoked
                self._gate.admit(user, policy.link)
            if isinstance(came.message, Hello):
                session = self._begin(socket, nursery, user, peer, came.message)
            if session is not None:
                session.take(came)
        except WireError as error:
            log.warning("what came over a link is no message of ours: %s", error)
            if self._gate is not None:
                self._gate.garbage(user)
        except Refused as refused:
            log.warning("a link is refused: %s", refused)

    def _begin(self, socket: Socket, nursery: trio.Nursery, user: str, peer: bytes, hello: Hello) -> Session:
        name = hello.host
        if self._gate is not None:
            name = self._gate.admit(user, policy.link).name
        if peer in self._sessions:
            self._sessions[peer].broke("a new one began")
        if len(self._sessions) >= MAX_SESSIONS:
            raise Refused(f"{MAX_SESSIONS} sessions are open already", where=name)
        put = lambda frame: socket.send_nowait([peer, frame])  # noqa: E731
        session = self._sessions[peer] = Session(
            hello.session, f"host/{name}", put, nursery, dials=False,
            answer=partial(self._answer, name), serve=partial(self._serve, name),
        )  # fmt: skip
        session.say(Hello(hello.session, self._own))
        session.met = True
        nursery.start_soon(self._keep, peer, session)
        return session

    async def _keep(self, peer: bytes, session: Session) -> None:
        await _stay(session, lambda: None)
        await session.broken.wait()
        if self._sessions.get(peer) is session:
            del self._sessions[peer]
