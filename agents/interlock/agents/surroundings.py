"""What the slots of a host share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from interlock.agents.journal import Journal
from interlock.agents.launch import Place
from interlock.agents.link import Link
from interlock.agents.revisions import RevisionStore
from interlock.broker.config import FleetConfig
from interlock.broker.facts import Fact

if TYPE_CHECKING:
    from interlock.agents.resources import Card
    from interlock.agents.slot_shell import SlotShell


@dataclass
class Surroundings:
    """What the slots of a host share."""

    host: str
    place: Place
    store: RevisionStore
    journal: Journal
    publish: Callable[[Fact], None]
    load: Callable[[], FleetConfig]  # the fleet file as it is now
    backups: Path
    next_number: Callable[[], int]
    nursery: trio.Nursery  # owns the instances; lives as long as the host
    cards: Callable[[str], Awaitable[list[Card] | None]] = field(default=lambda agent: _no_cards())
    neighbours: Callable[[], list[SlotShell]] = field(default=list)  # all slots of the host
    link_to: Callable[[str], Link] | None = None  # the way to another host; ConfigError if it has none

    def up(self, agent: str) -> bool | None:
        """Whether an agent of this host is healthy; None if it is not of this host."""
        found = [shell.slot.permanent_up for shell in self.neighbours() if shell.agent == agent]
        return found[0] if found else None


async def _no_cards() -> None:
    """No monitor tells of a GPU."""
