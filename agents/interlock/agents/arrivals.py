"""Agents that come to this host from another one: who may bring them, and whose they are. `ownership.py` says why."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import msgspec
import trio
from msgspec.structs import replace

from interlock.agents.forwarding import end_forwarding
from interlock.agents.frames import join
from interlock.agents.front import open_gateway
from interlock.agents.gateway import Gateway
from interlock.agents.guests import Guested, Guests, connect_to
from interlock.agents.link import Link
from interlock.agents.ownership import DECISIONS, Turn, Word, word_of
from interlock.agents.session import Stream
from interlock.agents.slot import Slot
from interlock.agents.slot_io import Forward, Owned, Row, State
from interlock.agents.slot_shell import SlotShell
from interlock.agents.surroundings import Surroundings
from interlock.broker.config import AgentConfig
from interlock.broker.errors import InterlockError, Refused

log = logging.getLogger(__name__)

ASK_S = 2.0  # for a source to say whose an agent is
SETTLE_S = 5.0  # for the journal to be written, before the source hears that it is
AGAIN_S = 0.5  # between questions, while it can't be asked or has not decided
FROM = "from/"  # mark in the journal: the host that an agent came from, which may forward to it
BEFORE = "before/"  # mark: that this host forwarded to the source before the agent came (back)


class Owner(Protocol):
    """What of the host is needed here."""

    name: str
    slots: dict[str, SlotShell]


class Arrivals:
    def __init__(self, host: Owner, around: Surroundings, guests: Guests) -> None:
        self._host = host
        self._around = around
        self._guests = guests
        self._turn = trio.Lock()  # one after the other: each writes, and opens an endpoint

    async def answer(self, host: str, what: str, about: dict[str, Any]) -> dict[str, Any] | None:
        """None: it is not about arrivals."""
        agent = str(about.get("agent", ""))
        match what:
            case "arrive":
                with trio.CancelScope(shield=True):  # half of it is not to be left, should the link break meanwhile
                    async with self._turn:
                        return {"endpoint": await self._arrive(host, agent, about)}
            case "serve":
                with trio.CancelScope(shield=True):
                    async with self._turn:
                        await self._serve(host, agent, about)
                return {}
            case "whose":
                row = await trio.to_thread.run_sync(self._around.journal.slot, agent)
                return {"word": str(word_of(row, str(about.get("migration", "")), host))}
            case "contract":
                shell = await self._came_from(host, agent)
                instance = shell.instances.get(shell.slot.permanent or "")
                return {"handlers": msgspec.to_builtins(instance.handlers) if instance is not None else {}}
        return None

    async def pass_on(self, host: str, stream: Stream, agent: str) -> None:
        """A connection that the source's gateway has for the agent."""
        shell = await self._came_from(host, agent)
        await join(await connect_to(shell.gateway.endpoint), stream)

    async def _came_from(self, host: str, agent: str) -> SlotShell:
        shell = self._host.slots.get(agent)
        if shell is None or await trio.to_thread.run_sync(self._around.journal.mark, f"{FROM}{agent}") != host:
            raise Refused(f"no agent {agent[:80]!r} has come here from host {host}")
        return shell

    # --- arriving

    async def _arrive(self, host: str, agent: str, about: dict[str, Any]) -> str:
        """Written before it is answered; what was opened for it stays if it was asked before."""
        guest = self._guests.running.get(str(about.get("instance", "")))
        if guest is None or guest.code is not None or not _is_of(guest, host, about):
            raise Refused(f"no candidate of {agent[:80]!r} runs here for host {host} and this migration")
        shell = self._host.slots.get(agent)
        state = None if shell is None else shell.slot.row.state
        invited = guest.invitation
        row = Row(
            agent, invited.revision, invited.digest, state=State.ARRIVING, migration=invited.migration,
            epoch=invited.epoch, place=host,
        )  # fmt: skip
        if shell is not None and state is State.ARRIVING and shell.slot.row == row:
            return shell.gateway.endpoint
        if shell is not None and state is not State.FORWARDING:
            raise Refused(f"{agent} is {state} here")
        config = here(invited.config, self._host.name)
        await self._write(row, host, forwarded=shell is not None)
        guest.kept = True
        try:
            if shell is None:
                await self._open(row, config)
            else:
                shell.slot.row, shell.config = row, config
                shell.gateway.route({})
        except InterlockError:
            guest.kept = False
            await trio.to_thread.run_sync(self._around.journal.drop_slot, agent, "it can't arrive")
            raise
        return self._host.slots[agent].gateway.endpoint

    async def _write(self, row: Row, host: str, *, forwarded: bool) -> None:
        journal = self._around.journal
        await trio.to_thread.run_sync(journal.set_mark, f"{FROM}{row.agent}", host)
        await trio.to_thread.run_sync(journal.set_mark, f"{BEFORE}{row.agent}", int(forwarded))
        await trio.to_thread.run_sync(journal.save_slot, row, f"it arrives from host {host}")

    async def _open(self, row: Row, config: AgentConfig) -> None:
        """Its gateway, which holds what comes, and its slot. InUse if the endpoint is taken."""
        gateway = open_gateway(row.agent, config, self._around.place.sockets)
        scope = trio.CancelScope()
        endpoint, beside = await self._around.nursery.start(_run_gateway, gateway, scope)
        shell = SlotShell(Slot(self._host.name, row, endpoint=endpoint), config, gateway, self._around, opened=scope)
        self._host.slots[row.agent] = shell
        shell.first_news.set()
        beside.start_soon(shell.run)
        shell.begin()

    # --- whose it is

    async def _serve(self, host: str, agent: str, about: dict[str, Any]) -> None:
        """The source says that it has written."""
        shell = self._host.slots.get(agent)
        if shell is None:
            raise Refused(f"there is no agent {agent[:80]!r} here")
        row = shell.slot.row
        if row.state is State.ARRIVING:
            if (row.place, row.migration) != (host, about.get("migration")):
                raise Refused(f"{agent} does not arrive from host {host} in that migration")
            await self._own(shell)
        elif await trio.to_thread.run_sync(self._around.journal.mark, f"{FROM}{agent}") != host:
            raise Refused(f"{agent} did not come from host {host}")

    async def _own(self, shell: SlotShell) -> None:
        guest = next((one for one in self._guests.running.values() if one.invitation.agent == shell.agent), None)
        if shell.forwards is not None:  # it was here before
            self._around.nursery.start_soon(end_forwarding, shell, shell.slot.row.place)
        if guest is None or guest.code is not None:
            shell.give(Owned())
        else:
            instance = guest.instance
            self._guests.adopt(guest)
            if instance.control is not None:
                problems = await instance.learn_contract({})
                if problems:
                    log.warning("%s: %s", instance.name, "; ".join(problems))
            instance.view.up = True
            shell.slot.keeps_state = instance.state_port is not None
            shell.adopt(instance)
            shell.give(Owned(instance.name))
        with trio.move_on_after(SETTLE_S) as waited:
            await shell.settled()
        if waited.cancelled_caught:
            raise Refused(f"{shell.agent}: the journal can't be written")
        if (serving := shell.instances.get(shell.slot.permanent or "")) is not None:
            shell.publish_started(serving)  # a guest's start was no word of who has the agent
        log.info("%s has arrived, and serves here", shell.agent)

    async def run(self) -> None:
        """Ask about agents that are arriving, until their source says whose they are; until cancelled."""
        while True:
            for shell in list(self._host.slots.values()):
                if shell.slot.row.state is State.ARRIVING:
                    await self._resolve(shell)
            await trio.sleep(AGAIN_S)

    async def _resolve(self, shell: SlotShell) -> None:
        row = shell.slot.row
        word: Word | None = None
        try:
            assert self._around.link_to is not None
            link: Link = self._around.link_to(row.place)
            said = await link.ask("whose", {"agent": row.agent, "migration": row.migration}, ASK_S)
            word = Word(str(said.get("word")))
        except (InterlockError, ValueError) as error:
            log.info("%s: host %s does not say whose it is: %s", row.agent, row.place, error)
        async with self._turn:
            if shell.slot.row != row:
                return
            match DECISIONS[word]:
                case Turn.SERVE:
                    await self._own(shell)
                case Turn.DROP:
                    await self._drop(shell)

    async def _drop(self, shell: SlotShell) -> None:
        """It stays where it was."""
        row, journal = shell.slot.row, self._around.journal
        log.info("%s did not arrive: it stays on host %s", row.agent, row.place)
        for guest in self._guests.running.values():
            if guest.invitation.agent == row.agent:
                guest.kept = False
        if await trio.to_thread.run_sync(journal.mark, f"{BEFORE}{row.agent}"):
            back = replace(row, state=State.FORWARDING, migration=None)
            await trio.to_thread.run_sync(journal.save_slot, back, "it did not arrive: forward as before")
            shell.slot.row = back
            shell.carry_out([Forward(row.place)])
            return
        await trio.to_thread.run_sync(journal.drop_slot, row.agent, "it did not arrive")
        del self._host.slots[row.agent]
        if shell.opened is not None:
            shell.opened.cancel()


def here(config: AgentConfig, host: str) -> AgentConfig:
    """The agent's settings as they are on a host that it was moved to."""
    return msgspec.structs.replace(config, host=host, endpoint=config.endpoint_at(host), endpoints={})


def _is_of(guest: Guested, host: str, about: dict[str, Any]) -> bool:
    invited = guest.invitation
    named = (about.get("agent"), about.get("migration"), about.get("epoch"))
    return invited.source == host and (invited.agent, invited.migration, invited.epoch) == named


async def _run_gateway(
    gateway: Gateway, scope: trio.CancelScope, *, task_status: trio.TaskStatus[tuple[str, trio.Nursery]]
) -> None:
    """The gateway, and beside it what belongs to it."""
    with scope:
        async with trio.open_nursery() as nursery:
            endpoint = await nursery.start(gateway.run)
            task_status.started((endpoint, nursery))
