"""The ids that an operator may want to type, as the log has them; for completion at a prompt."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import trio

from interlock.broker.client import open_bus
from interlock.broker.config import load_fleet
from interlock.broker.errors import InterlockError
from interlock.broker.security import load_operator
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.report_verb import view

NEWEST = 20  # of migrations, and of waves: as many as one looks through
ASK_S = 2.0  # for the log; whoever pressed Tab waits no longer


class Ids(NamedTuple):
    """The newest first."""

    migrations: list[str] = []
    waves: list[str] = []
    moving: list[str] = []  # the waves that are in flight


def ids_of(fleet: Fleet) -> Ids:
    return Ids(
        list(reversed(fleet.migrations))[:NEWEST],
        list(reversed(fleet.waves))[:NEWEST],
        [name for name, wave in reversed(fleet.waves.items()) if not wave.outcome],
    )


def read_ids(path: Path) -> Ids:
    """What the log of the fleet says now; none of it where nobody answers in time."""

    async def ask() -> Ids:
        fleet = load_fleet(path)
        found = Ids()
        with trio.move_on_after(ASK_S):
            async with open_bus(fleet.broker, f"cli/{os.getpid()}", security=load_operator(fleet)) as bus:
                found = ids_of(await view(bus, fleet, timeout=ASK_S))
        return found

    found = Ids()
    with suppress(InterlockError, ExceptionGroup):
        found = trio.run(ask)
    return found
