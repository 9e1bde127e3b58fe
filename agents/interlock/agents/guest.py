"""A candidate that another host runs for a slot of this one: to the slot it is an instance like any other.

Its endpoints are here: what connects to them is passed on through the link. Its process lives there, by a lease that is
renewed from here; if the other host can't be asked for as long as the lease lasts, the process counts as dead, which it
is by then.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import trio

from interlock.agents.folders import Moved, give_folder, take_folder
from interlock.agents.frames import BROKEN, Frames, join
from interlock.agents.instance import Health, InstanceControl
from interlock.agents.launch import Instance
from interlock.agents.link import Link
from interlock.agents.listening import BACKLOG
from interlock.agents.session import Stream
from interlock.agents.state_ports import Taking, Use
from interlock.agents.transfer import End, TransferError, parts
from interlock.broker.errors import InterlockError, Refused

log = logging.getLogger(__name__)

LEASE_S = 3.0  # a guest lives so long without its slot's host: a rollback is due within 5 s
RENEW_S = 0.5  # between renewals: several may be lost
EXIT_S = 60.0  # for one question about its end, which is asked again
ASK_S = 10.0  # for a question that the other host answers at once
START_S = 30.0  # for it to start the process: a revision is read, a program begun
DEAD = -9  # the exit code of what is dead by its lease


class RemoteProcess:
    """What a slot wants to know of a process, of one that runs elsewhere."""

    def __init__(self, pid: int, started: float) -> None:
        self.pid = pid
        self.started = started
        self.marker = ""
        self.returncode: int | None = None
        self.words = ""  # its last, or why it counts as dead
        self._ended = trio.Event()

    def end(self, code: int, words: str) -> None:
        if self.returncode is None:
            self.returncode, self.words = code, words
            self._ended.set()

    async def exited(self) -> int:
        await self._ended.wait()
        return self.returncode if self.returncode is not None else DEAD

    gone = exited

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.words.splitlines()[-lines:])


@dataclass
class Guest(Instance):
    """`about`: the migration that it belongs to. Made by the slot's shell."""

    link: Link | None = None
    about: dict[str, Any] = field(default_factory=dict)
    initial: Path | None = None  # the data folder here, of which it gets what there is before it starts
    restarting: bool = False  # and so not asked whether it is well: whoever restarts it waits for that
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)  # of its ends here

    here: ClassVar[bool] = False

    @property
    def _far(self) -> Link:
        assert self.link is not None
        return self.link

    async def start(self, nursery: trio.Nursery, number: int) -> None:
        """InterlockError if the other host does not start it."""
        about = {**self.about, "instance": self.name, "lease_s": LEASE_S}
        if self.initial is not None:
            await self._far.ask("expect", about, ASK_S)
            await self._send_folder(self.initial, strict=False)
        began = await self._far.ask("start", about, START_S)
        remote = RemoteProcess(int(began["pid"]), float(began["started"]))
        self.process = remote  # type: ignore[assignment]
        self.requests, self.health_endpoint = await nursery.start(self._live, number, remote)
        if self.revision.kind == "class":
            self.control = InstanceControl(self.place.sockets, self.health_endpoint)
        elif self.revision.state is not None:
            self.state_port = RemotePort(self._far, self.name, self._question)

    @property
    def reachable(self) -> bool:
        return self._far.up

    def _question(self, **more: Any) -> dict[str, Any]:
        return {**self.about, "instance": self.name, **more}

    # --- its ends here

    async def _live(self, number: int, remote: RemoteProcess, *, task_status: trio.TaskStatus[tuple[str, str]]) -> None:
        """Its ends here, and its lease, until it is closed."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                requests = await nursery.start(self._serve_port, number, "requests")
                health = await nursery.start(self._serve_port, number, "health")
                nursery.start_soon(self._keep, remote)
                nursery.start_soon(self._watch_link)
                nursery.start_soon(self._await_exit, remote)
                task_status.started((requests, health))

    async def _serve_port(self, number: int, port: str, *, task_status: trio.TaskStatus[str]) -> None:
        if self.revision.kind == "class":
            path = self.place.run_dir / f"{number}.{'req' if port == 'requests' else 'ctl'}"
            self._files.append(path)
            listener = await listen_at(path)
            endpoint = f"ipc://{path}"
        else:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            scheme = "http" if self.config.endpoint.startswith("http") else "tcp"
            endpoint = f"{scheme}://127.0.0.1:{listener.socket.getsockname()[1]}"

        async def serve(client: trio.SocketStream) -> None:
            try:
                await join(client, self._far.open(self.name, port))
            except (*BROKEN, InterlockError):  # whoever connects tries again
                await trio.aclose_forcefully(client)

        task_status.started(endpoint)
        await trio.serve_listeners(serve, [listener])  # it closes the listener at its end

    # --- its life

    async def _keep(self, remote: RemoteProcess) -> None:
        """Renew its lease until it has ended, there or by the lease."""
        good = trio.current_time()
        trouble = ""
        while remote.returncode is None:
            asked = trio.current_time()
            try:
                said = await self._far.ask("renew", self._question(lease_s=LEASE_S), 2 * RENEW_S)
                good = asked
                if said.get("code") is not None:
                    remote.end(int(said["code"]), str(said.get("words", "")))
                    return
            except Refused as refused:
                remote.end(DEAD, str(refused))
                return
            except InterlockError as error:
                trouble = str(error)
            if trio.current_time() - good >= LEASE_S:
                remote.end(DEAD, f"{self._far.there} could not be asked for {LEASE_S:g} s: {trouble}")
                return
            await trio.sleep(RENEW_S)

    async def _watch_link(self) -> None:
        """While the link is down nothing new is sent: it would die with the lease, and could be asked elsewhere."""
        while True:
            await self._far.until_changed()
            self.on_reach(self.reachable)

    async def _await_exit(self, remote: RemoteProcess) -> None:
        """Its end is known here as soon as there: requests go elsewhere before they are given to the dead again."""
        while remote.returncode is None:
            try:
                said = await self._far.ask("exit", self._question(), EXIT_S)
                if said.get("code") is not None:
                    remote.end(int(said["code"]), str(said.get("words", "")))
            except InterlockError:
                await trio.sleep(RENEW_S)  # the lease decides

    async def check(self) -> Health:
        if self.restarting:
            return Health(True)
        if self.revision.kind == "class":
            return await super().check()
        began = trio.current_time()
        try:
            probe = self.revision.probe
            limit = (probe.timeout_s if probe is not None else 1.0) + 1.0
            said = await self._far.ask("check", self._question(), limit)
        except InterlockError as error:
            return Health(False, str(error), trio.current_time() - began)
        return Health(bool(said.get("ok")), str(said.get("detail", "")), trio.current_time() - began)

    async def end(self) -> int | None:
        self.stopping = True
        self.view.up = False
        remote = self.process
        assert isinstance(remote, RemoteProcess) or remote is None
        if remote is not None and remote.returncode is None:
            try:
                said = await self._far.ask("stop", self._question(), self.revision.stop_timeout_s + ASK_S)
                remote.end(int(said.get("code") or 0), "")
            except InterlockError as error:
                log.info("%s: %s; its lease ends it", self.name, error)
                remote.end(DEAD, str(error))
        self.close()
        return None if remote is None else remote.returncode

    def release(self) -> None:
        """It goes on over there, and is no matter of this slot any more."""
        self.stopping = True
        if isinstance(self.process, RemoteProcess):
            self.process.end(0, "")
        self.close()

    def close(self) -> None:
        self.scope.cancel()
        super().close()

    async def restart(self) -> None:
        """Its process anew, on the data folder as it is now; well once this returns. InterlockError."""
        self.restarting = True
        try:
            await self._far.ask("restart", self._question(), START_S + self.revision.start_timeout_s)
        finally:
            self.restarting = False

    def _obituary(self, code: int) -> str:
        if code == DEAD and self.process is not None and self.process.tail():
            return self.process.tail()
        return super()._obituary(code)

    # --- its data folder

    async def send_folder(self, folder: Path) -> Moved:
        """What differs goes there. TransferError."""
        return await self._send_folder(folder, strict=True)

    async def _send_folder(self, folder: Path, *, strict: bool) -> Moved:
        async with self._stream("folder-take" if strict else "folder-take-early") as stream:
            return await give_folder(folder, Frames(stream))

    async def bring_folder(self, folder: Path) -> Moved:
        """What differs comes from there. TransferError."""
        async with self._stream("folder-give") as stream:
            return await take_folder(folder, Frames(stream))

    @asynccontextmanager
    async def _stream(self, port: str) -> AsyncIterator[Stream]:
        async with _opened(self._far, self.name, port) as stream:
            yield stream


@asynccontextmanager
async def _opened(link: Link, whom: str, port: str) -> AsyncIterator[Stream]:
    """A stream for as long as it is used; what breaks it is a TransferError."""
    stream = link.open(whom, port)
    try:
        yield stream
    except BROKEN as error:
        raise TransferError(f"the way to {link.there} broke: {error}") from None
    finally:
        await trio.aclose_forcefully(stream)


async def listen_at(path: Path) -> trio.SocketListener:
    """A listener at a socket file."""
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        await trio.Path(path).unlink(missing_ok=True)
        await sock.bind(str(path))
        sock.listen(BACKLOG)
        return trio.SocketListener(sock)
    except BaseException:
        sock.close()
        raise


# --- the state of a program that runs elsewhere


@dataclass(frozen=True)
class RemotePort:
    """As `CommandPort`, whose commands run on the other host."""

    link: Link
    instance: str
    question: Callable[..., dict[str, Any]]

    async def quiesce(self, limit_s: float) -> None:
        await self._tell("quiesce", limit_s)

    async def resume(self, limit_s: float) -> None:
        await self._tell("resume", limit_s)

    async def _tell(self, what: str, limit_s: float) -> None:
        try:
            await self.link.ask(what, self.question(limit_s=limit_s), limit_s + 1.0)
        except InterlockError as error:
            raise TransferError(str(error)) from None

    async def give(self, use: Use) -> End:
        async with _opened(self.link, self.instance, "state-give") as stream:
            return await receive_state(Frames(stream), use)

    @asynccontextmanager
    async def taking(self) -> AsyncIterator[Taking]:
        async with _opened(self.link, self.instance, "state-take") as stream:
            yield SendingState(Frames(stream))


@dataclass
class SendingState:
    """A state on a stream, to who receives it with `receive_state`."""

    frames: Frames

    async def put(self, data: bytes, whole: bool) -> None:
        for part in parts(data):
            await self.frames.send("piece", part, whole)

    async def done(self, end: End) -> None:
        await self.frames.send("end", end.pieces, end.size, end.sha256, end.whole)
        said, *about = await self.frames.receive()
        if said != "taken":
            raise TransferError(str(about[0]) if about else "the state was not taken")


async def receive_state(frames: Frames, use: Callable[[bytes, bool], Awaitable[None]]) -> End:
    """TransferError if it is not what the sender says that it sent, or the sender gave up."""
    digest, size = hashlib.sha256(), 0
    while True:
        said, *about = await frames.receive()
        match said, about:
            case "piece", [bytes(data), bool(whole)]:
                digest.update(data)
                size += len(data)
                await use(data, whole)
            case "end", [int(pieces), int(total), bytes(sha256), bool(whole)]:
                if (total, sha256) != (size, digest.digest()):
                    raise TransferError("the checksum of the whole is wrong")
                return End(pieces=pieces, size=total, sha256=sha256, whole=whole)
            case "refused", [str(why)]:
                raise TransferError(why)
            case _:
                raise TransferError(f"{said!r} is no message about a state")
