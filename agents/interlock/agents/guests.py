"""Candidates that this host runs for slots of other hosts, and what those may ask of them.

Nobody may ask for anything but what the coordinator's signed command `receive` named: this agent, this revision, this
migration, from that host. A guest lives by its lease; what its host asks for is done once, however often it asks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from interlock.agents.figures import InstanceView
from interlock.agents.folders import give_folder, take_folder
from interlock.agents.frames import BROKEN, Frames, join
from interlock.agents.guest import SendingState, receive_state
from interlock.agents.launch import Instance, Place
from interlock.agents.listening import place_of
from interlock.agents.revisions import RevisionStore
from interlock.agents.session import Stream
from interlock.agents.state_ports import StatePort
from interlock.agents.transfer import TransferError
from interlock.broker import facts
from interlock.broker.config import AgentConfig
from interlock.broker.errors import InterlockError, Refused
from interlock.broker.facts import Fact

log = logging.getLogger(__name__)

INVITED_S = 7 * 86_400.0  # a candidate may be started so long after it was received: approvals take days, at most
MAX_LEASE_S = 60.0  # that anybody may ask for
EXIT_S = 30.0  # for one question about the end of a guest; who asked asks again
LOOK_S = 0.2  # between looks at leases
TAIL_LINES = 6


@dataclass(frozen=True)
class Invitation:
    """What the coordinator named. `config`: the agent as the fleet file of this host had it then."""

    agent: str
    migration: str
    epoch: int
    source: str  # the host that asks
    revision: str
    digest: str
    config: AgentConfig
    until: float  # seconds since 1970


@dataclass
class Guested:
    """A guest that runs here. `kept`: it is being adopted, and no lease ends it any more."""

    invitation: Invitation
    instance: Instance
    lease_until: float
    code: int | None = None
    words: str = ""
    kept: bool = False
    adopted: bool = False
    turn: trio.Lock = field(default_factory=trio.Lock)
    ended: trio.Event = field(default_factory=trio.Event)


class Guests:
    """All of this host. `answer` and `serve` are for its link door."""

    def __init__(
        self, host: str, place: Place, store: RevisionStore, nursery: trio.Nursery, *,
        publish: Callable[[Fact], None], next_number: Callable[[], int],
    ) -> None:  # fmt: skip
        self.host = host
        self.invitations: dict[str, Invitation] = {}  # by agent
        self.running: dict[str, Guested] = {}  # by instance
        self.adopted: dict[str, Guested] = {}  # those that are this host's own now: the last one of each agent
        self._place = place
        self._store = store
        self._nursery = nursery
        self._publish = publish
        self._next_number = next_number
        self._starting = trio.Lock()  # a start that is asked for twice is one

    def invite(self, invitation: Invitation) -> None:
        """From now on that host may have it run here; a newer migration of the agent takes its place."""
        self.invitations[invitation.agent] = invitation

    async def run(self) -> None:
        """End guests whose lease is over; until cancelled."""
        while True:
            now = trio.current_time()
            for name, guest in list(self.running.items()):
                if now > guest.lease_until and not guest.kept:
                    log.warning("%s: its host %s did not renew its lease", name, guest.invitation.source)
                    guest.lease_until = float("inf")
                    self._nursery.start_soon(self._end, name, guest)
            await trio.sleep(LOOK_S)

    async def end(self) -> None:
        """This host ends."""
        async with trio.open_nursery() as nursery:
            for name, guest in list(self.running.items()):
                nursery.start_soon(self._end, name, guest)

    # --- questions

    async def answer(self, host: str, what: str, about: dict[str, Any]) -> dict[str, Any]:
        """Refused for what this host may not ask for, or what can't be."""
        invitation = self._invited(host, about)
        name = str(about.get("instance", ""))
        match what:
            case "invited":
                return {"digest": invitation.digest}
            case "expect":
                if not self._is_name(name, invitation):
                    raise Refused(f"{name[:80]!r} is no name of a candidate of {invitation.agent}")
                return {}
            case "start":
                return await self._start(name, invitation, about)
        if name in self.adopted and what in ("renew", "exit"):
            if what == "exit":
                await trio.sleep(EXIT_S)
            return {"code": None, "words": ""}  # what is on its way to it may still arrive
        guest = self._guest(host, name)
        if guest.adopted:
            raise Refused(f"{name} is this host's own now")
        return await self._answer_of(name, guest, what, about)

    async def _answer_of(self, name: str, guest: Guested, what: str, about: dict[str, Any]) -> dict[str, Any]:
        match what:
            case "renew":
                guest.lease_until = trio.current_time() + _lease(about)
                return {"code": guest.code, "words": guest.words}
            case "exit":
                with trio.move_on_after(EXIT_S):
                    await guest.ended.wait()
                return {"code": guest.code, "words": guest.words}
            case "check":
                health = await guest.instance.check()
                return {"ok": health.ok, "detail": health.detail}
            case "stop":
                return {"code": await self._end(name, guest)}
            case "restart":
                await self._restart(name, guest)
                return {}
            case "quiesce" | "resume":
                port, limit = _port(guest), float(about.get("limit_s", 5.0))
                await (port.quiesce(limit) if what == "quiesce" else port.resume(limit))
                return {}
        raise Refused(f"{what[:80]!r} is nothing that a host is asked for")

    def _invited(self, host: str, about: dict[str, Any]) -> Invitation:
        agent = str(about.get("agent", ""))
        found = self.invitations.get(agent)
        named = found is not None and (found.migration, found.epoch, found.source) == (
            about.get("migration"), about.get("epoch"), host,
        )  # fmt: skip
        if found is None or not named or time.time() > found.until:
            raise Refused(f"the coordinator named no such migration of {agent[:80]!r} from host {host}")
        return found

    def adopt(self, guest: Guested) -> None:
        """It is no guest any more."""
        name = guest.instance.name
        guest.adopted = True
        self.running.pop(name, None)
        agent = guest.invitation.agent
        self.adopted = {
            other: one for other, one in self.adopted.items() if one.invitation.agent != agent
        } | {name: guest}  # fmt: skip

    def _guest(self, host: str, name: str) -> Guested:
        found = self.running.get(name) or self.adopted.get(name)
        if found is None or found.invitation.source != host:
            raise Refused(f"there is no instance {name[:80]!r} here")
        return found

    def _is_name(self, name: str, invitation: Invitation) -> bool:
        return name.startswith(f"{invitation.agent}-{invitation.revision}-{invitation.epoch}.") and "/" not in name

    async def _start(self, name: str, invitation: Invitation, about: dict[str, Any]) -> dict[str, Any]:
        if not self._is_name(name, invitation):
            raise Refused(f"{name[:80]!r} is no name of a candidate of {invitation.agent}")
        async with self._starting:
            found = self.running.get(name) or await self._begin(name, invitation, about)
        process = found.instance.process
        assert process is not None
        return {"pid": process.pid, "started": process.started}

    async def _begin(self, name: str, invitation: Invitation, about: dict[str, Any]) -> Guested:
        if any(guest.invitation.agent == invitation.agent for guest in self.running.values()):
            raise Refused(f"another candidate of {invitation.agent} runs here already")
        instance = await self._launched(name, invitation)
        begun = self.running[name] = Guested(invitation, instance, trio.current_time() + _lease(about))
        self._nursery.start_soon(self._watch, name, begun, instance)
        return begun

    async def _launched(self, name: str, invitation: Invitation) -> Instance:
        revision = await trio.to_thread.run_sync(
            self._store.get, invitation.agent, invitation.revision, invitation.digest
        )
        instance = Instance(
            name=name, agent=invitation.agent, config=invitation.config, recorded=revision, place=self._place,
            view=InstanceView(invitation.revision, "candidate"),
        )  # fmt: skip
        await instance.start(self._nursery, self._next_number())
        assert instance.process is not None
        self._publish(
            facts.InstanceStarted(
                host=self.host, agent=invitation.agent, instance=name, revision=invitation.revision, role="candidate",
                pid=instance.process.pid, started=instance.process.started,
            )
        )  # fmt: skip
        return instance

    async def _watch(self, name: str, guest: Guested, instance: Instance) -> None:
        """Its end by itself is told to who renews its lease."""
        assert instance.process is not None
        code = await instance.process.exited()
        if guest.instance is instance and not instance.stopping and not guest.adopted:
            guest.code, guest.words = code, instance.process.tail(TAIL_LINES)
            guest.ended.set()
            log.warning("%s ended with code %d", name, code)

    async def _restart(self, name: str, guest: Guested) -> None:
        async with guest.turn:
            await self._stopped(name, guest)
            guest.instance = await self._launched(name, guest.invitation)
            self._nursery.start_soon(self._watch, name, guest, guest.instance)
            with trio.move_on_after(guest.instance.revision.start_timeout_s):
                while not (await guest.instance.check()).ok:
                    if guest.code is not None:
                        raise Refused(f"it ended with code {guest.code}: {guest.words}")
                    await trio.sleep(LOOK_S / 4)
                return
        raise Refused(f"it was not healthy after {guest.instance.revision.start_timeout_s:g} s")

    async def _end(self, name: str, guest: Guested) -> int | None:
        async with guest.turn:
            if self.running.get(name) is not guest or guest.adopted:
                return guest.code
            guest.code = await self._stopped(name, guest)
            del self.running[name]
            return guest.code

    async def _stopped(self, name: str, guest: Guested) -> int | None:
        instance = guest.instance
        expected = guest.code is None
        code = await instance.end()
        self._publish(
            facts.InstanceStopped(
                host=self.host, agent=guest.invitation.agent, instance=name, revision=guest.invitation.revision,
                role="candidate", returncode=code or 0, expected=expected,
            )
        )  # fmt: skip
        return code

    # --- streams

    async def serve(self, host: str, stream: Stream, whom: str, port: str) -> None:
        """A stream that a host opened to one of its guests."""
        if port == "folder-take-early":
            await self._take_early(host, stream, whom)
            return
        guest = self._guest(host, whom)
        folder = self._place.data_dir / guest.invitation.agent
        frames = Frames(stream)
        match port:
            case "requests" | "health":
                endpoint = guest.instance.requests if port == "requests" else guest.instance.health_endpoint
                await join(await connect_to(endpoint), stream)
                return
            case "state-give":
                await _give_state(_port(guest), frames)
            case "state-take":
                await _take_state(_port(guest), frames)
            case "folder-take":
                await take_folder(folder, frames)
            case "folder-give":
                await give_folder(folder, frames)
            case _:
                raise Refused(f"there is no port {port[:80]!r}")
        await stream.send_eof()
        while await stream.receive_some():  # what we said is there, once the other side ends too
            pass

    async def _take_early(self, host: str, stream: Stream, whom: str) -> None:
        """Before it starts: the data folder as it is there now, which may change meanwhile."""
        for invitation in self.invitations.values():
            if invitation.source == host and self._is_name(whom, invitation):
                await take_folder(self._place.data_dir / invitation.agent, Frames(stream), strict=False)
                await stream.send_eof()
                while await stream.receive_some():
                    pass
                return
        raise Refused(f"no {whom[:80]!r} is expected from host {host}")


def _lease(about: dict[str, Any]) -> float:
    lease_s = about.get("lease_s")
    return min(MAX_LEASE_S, float(lease_s)) if isinstance(lease_s, int | float) else 0.0


def _port(guest: Guested) -> StatePort:
    port = guest.instance.state_port
    if port is None:
        raise TransferError(f"{guest.instance.name} has no state that can be handed over")
    return port


async def connect_to(endpoint: str) -> trio.SocketStream:
    """To an instance, or a gateway, of this host."""
    if endpoint.startswith("ipc://"):
        return await trio.open_unix_socket(endpoint.removeprefix("ipc://"))
    host, port = place_of(endpoint)
    return await trio.open_tcp_stream("127.0.0.1" if host == "*" else host, port)


async def _give_state(port: StatePort, frames: Frames) -> None:
    sending = SendingState(frames)
    try:
        end = await port.give(sending.put)
    except InterlockError as error:
        await frames.send("refused", str(error))
        return
    await frames.send("end", end.pieces, end.size, end.sha256, end.whole)


async def _take_state(port: StatePort, frames: Frames) -> None:
    try:
        async with port.taking() as taking:
            await taking.done(await receive_state(frames, taking.put))
    except (InterlockError, *BROKEN) as error:
        await frames.send("refused", str(error))
        return
    await frames.send("taken")
