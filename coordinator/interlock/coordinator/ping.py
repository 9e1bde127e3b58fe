"""`interlock ping`: a command to every host, or to some, and who has taken it. Changes nothing."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from interlock.broker import commands, topics
from interlock.broker.bus import Bus
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError

SILENT = 3  # exit codes: somebody has not answered,
REFUSED = 12  # or has refused


@dataclass
class Answer:
    """One host's. `ms`: milliseconds from the sending of the command to its receipt here."""

    host: str
    ms: float
    refused: str = ""


@dataclass
class Roll:
    answers: list[Answer] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        if self.silent:
            return SILENT
        return REFUSED if any(answer.refused for answer in self.answers) else 0


async def ping(bus: Bus, fleet: FleetConfig, hosts: Sequence[str], *, timeout: float) -> Roll:
    """Ask the hosts (none named: all at once) to say that they are there. ConfigError for one that is not known.

    The command goes the way of every other: signed, through the log. Unreachable if the broker is silent.
    """
    for host in hosts:
        if host not in fleet.hosts:
            raise ConfigError(
                f"unknown host {host!r}", where=fleet.path or "fleet", hint=f"known: {', '.join(fleet.hosts)}"
            )
    wanted = list(dict.fromkeys(hosts)) or list(fleet.hosts)
    roll = Roll()
    async with trio.open_nursery() as nursery:
        for host in wanted if hosts else [""]:
            nursery.start_soon(_ask, bus, host, [host] if host else wanted, timeout, roll)
    heard = {answer.host for answer in roll.answers}
    roll.silent = [host for host in wanted if host not in heard]
    return roll


async def _ask(bus: Bus, host: str, wanted: Sequence[str], timeout: float, roll: Roll) -> None:
    """One command, to one host or ("") to all, and the receipts until all have come or the time is over."""
    id, began = uuid.uuid4().hex, trio.current_time()
    asked = commands.RollCall(deadline=time.time() + timeout)
    heard: set[str] = set()
    async with bus.receipts(id) as receipts:
        await bus.publish(topics.command(host) if host else topics.ALL_HOSTS, asked, id=id, timeout=timeout)
        with trio.move_on_at(began + timeout):
            while len(heard) < len(wanted):
                for name in wanted:
                    reason = receipts.by.get(f"host/{name}")
                    if reason is not None and name not in heard:
                        heard.add(name)
                        roll.answers.append(Answer(name, (trio.current_time() - began) * 1e3, reason))
                if len(heard) < len(wanted):
                    await receipts.more()
