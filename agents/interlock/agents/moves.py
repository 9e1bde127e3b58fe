"""What a host has to do with other hosts: links to them, the door for theirs, and candidates that it runs for them."""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

import trio

from interlock.agents.arrivals import Arrivals
from interlock.agents.guests import INVITED_S, Guests, Invitation
from interlock.agents.link import Link, LinkDoor
from interlock.agents.session import Stream
from interlock.agents.slot_io import Row, State
from interlock.agents.slot_shell import SlotShell
from interlock.agents.surroundings import Surroundings
from interlock.broker import commands, facts
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError
from interlock.broker.fields import Evidence
from interlock.broker.gate import Gate
from interlock.broker.security import Security
from interlock.broker.sockets import Sockets
from interlock.broker.wire import encode

log = logging.getLogger(__name__)


class Others(Protocol):
    """What of the host is needed here."""

    name: str
    fleet: FleetConfig
    security: Security | None
    gate: Gate | None
    slots: dict[str, SlotShell]


class Moves:
    """One host's. `around` is what its slots share."""

    def __init__(self, host: Others, sockets: Sockets, around: Surroundings) -> None:
        self._host = host
        self._sockets = sockets
        self._around = around
        self._links: dict[str, Link] = {}
        self.guests = Guests(
            host.name, around.place, around.store, around.nursery,
            publish=around.publish, next_number=around.next_number,
        )  # fmt: skip
        self.arrivals = Arrivals(host, around, self.guests)
        around.link_to = self.link_to

    def link_to(self, there: str) -> Link:
        """The link to a host, which comes up by itself. ConfigError if the fleet file, as it was, names none."""
        link = self._links.get(there)
        if link is None:
            config = self._host.fleet.hosts.get(there)
            if config is None or not config.link:
                where = self._host.fleet.path or "fleet"
                hint = f"add hosts.{there}.link, and start host {self._host.name} again"
                raise ConfigError(f"it does not say where other hosts reach {there}", where=where, hint=hint)
            security = self._host.security
            server = b"" if security is None else security.key_of(f"host/{there}")
            link = Link(self._sockets, config.link, own=self._host.name, there=f"host/{there}", server=server)
            self._links[there] = link
            self._around.nursery.start_soon(link.run)
        return link

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The door, and the leases of guests. InUse if its port is taken."""
        endpoint = self._host.fleet.hosts[self._host.name].link
        async with trio.open_nursery() as nursery:
            if endpoint:
                door = LinkDoor(self._host.name, self._answer, self._serve, self._host.gate)
                await nursery.start(door.run, self._sockets, endpoint)
            nursery.start_soon(self.guests.run)
            nursery.start_soon(self.arrivals.run)
            task_status.started()

    async def _answer(self, host: str, what: str, about: dict[str, Any]) -> dict[str, Any]:
        said = await self.arrivals.answer(host, what, about)
        return await self.guests.answer(host, what, about) if said is None else said

    async def _serve(self, host: str, stream: Stream, whom: str, port: str) -> None:
        if port == "agent":
            await self.arrivals.pass_on(host, stream, whom)
        else:
            await self.guests.serve(host, stream, whom, port)

    def begin_to_receive(self, command: commands.Receive, asked: str) -> None:
        self._around.nursery.start_soon(self.receive, command, asked)

    async def receive(self, command: commands.Receive, asked: str) -> None:
        """Look at the revision, and let the agent's host have it run here; what came of it is published."""
        from interlock.agents.prepare import Preparation, receive  # no part of a start

        around = self._around
        prepare = commands.Prepare(
            migration=command.migration, agent=command.agent, epoch=command.epoch, deadline=command.deadline,
            to=command.to, baseline_s=0.0,
        )  # fmt: skip
        given = Preparation(
            host=around.host, command=prepare, row=Row(command.agent, "", ""), permanent=None, gateway=None,
            store=around.store, journal=around.journal, backups=around.backups, place=around.place, load=around.load,
            cards=around.cards, up=around.up,
        )  # fmt: skip
        check, reason, digest = "place", "", ""
        evidence: Evidence = {}
        if time.time() > command.deadline:
            reason = "its deadline has passed"
        elif (slot := self._host.slots.get(command.agent)) and slot.slot.row.state is not State.FORWARDING:
            reason = f"{command.agent} is on host {around.host} already ({slot.slot.row.state})"
        else:
            ended = await receive(given)
            check, reason, evidence, digest = ended.check, ended.reason, ended.evidence, ended.digest
        at: dict[str, Any] = {
            "host": around.host, "agent": command.agent, "migration": command.migration, "epoch": command.epoch,
            "command": asked,
        }  # fmt: skip
        if reason:
            fact: facts.Fact = facts.StepFailed(**at, step="receive", check=check, reason=reason, evidence=evidence)
        else:
            assert given.config is not None
            invitation = Invitation(
                command.agent, command.migration, command.epoch, command.source, command.to, digest, given.config,
                time.time() + INVITED_S,
            )  # fmt: skip
            self.guests.invite(invitation)
            fact = facts.StepDone(**at, step="receive", evidence=evidence)
        await trio.to_thread.run_sync(around.journal.remember_done, asked, encode(fact))
        around.publish(fact)
