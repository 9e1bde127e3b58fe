"""Whose word counts about an agent: that of the host that has it. Pure.

The broker lets a host speak under its own topic only. What it says there of an agent counts where it has the agent: by
the fleet file, or by the coordinator's order; of a migration, where the coordinator has ordered that migration. All
else is passed over, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping

from interlock.broker import commands, topics
from interlock.broker.config import FleetConfig
from interlock.broker.policy import BY_HOST
from interlock.broker.wire import Event

KEPT_CLAIMS = 1000  # pairs of host and agent that are told apart: a host may invent names without end

Places = Mapping[str, str]  # the host of each agent


def places(fleet: FleetConfig) -> Places:
    """Where the fleet file has each agent."""
    return {name: agent.host for name, agent in fleet.agents.items()}


def owner(agent: str, placed: Places | None, ordered: str) -> str | None:
    """The host that has the agent; "": nobody is known to have it. None: no fleet file is known, and no order.

    ordered: where the coordinator has last ordered something of it, or "". The fleet file comes first: an agent that
    stands elsewhere in it now has left that host.
    """
    if placed is None:
        return ordered or None
    return placed.get(agent) or ordered


def speaker(event: Event) -> str | None:
    """The host that the event is a word of, by its topic; "" if the body says another. None: it is no host's word.

    A rollback that is asked of a host is as good as that host's word: it is done there, and nowhere else.
    """
    body = event.body
    if isinstance(body, commands.RollBack):
        return event.topic.removeprefix(topics.ROLLBACKS).removesuffix("/")
    if not isinstance(body, BY_HOST):
        return None
    return body.host if event.topic == topics.host_fact(body.host) else ""


class Claims:
    """What hosts said of what is not theirs: how often, and of whom, each pair of host and agent once."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: dict[tuple[str, str], int] = {}
        self._news: list[str] = []

    def count(self, event: Event, agent: str) -> None:
        self.total += 1
        claim = event.header.source, agent
        if claim in self._seen:
            self._seen[claim] += 1
        elif len(self._seen) < KEPT_CLAIMS:
            self._seen[claim] = 1
            what = f"agent {agent}, which is not its own" if agent else "another host"
            self._news.append(f"{event.header.source} speaks for {what}: passed over (event {event.header.seq})")

    def news(self) -> list[str]:
        """What was not told before, for a log."""
        told, self._news = self._news, []
        return told

    def to_json(self) -> list[dict[str, str | int]]:
        return [{"source": source, "agent": agent, "count": count} for (source, agent), count in self._seen.items()]
