"""`interlock report`, `history` and `explain`: what became of migrations. They ask the log, and change nothing."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import trio

from interlock.broker import topics
from interlock.broker.bus import Bus
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError, Refused
from interlock.coordinator import records, report_text
from interlock.coordinator.admission import near
from interlock.coordinator.fleet import Fleet, Migration
from interlock.coordinator.logbook import moment
from interlock.coordinator.ownership import places
from interlock.coordinator.record import Record
from interlock.coordinator.report_page import page
from interlock.coordinator.screen import Screen
from interlock.coordinator.terminal import on_bus, say_json
from interlock.coordinator.verbs import broker_silent, catch_up, listening

REACH = 6  # times the timeout, for reading one migration's events: a long one in a busy fleet has some 100,000


def run(chosen: argparse.Namespace) -> int:
    """0; a migration or an agent that there is not is refused (12)."""
    if chosen.file is not None:
        return _show(records.load(chosen.file), chosen)

    async def verb(bus: Bus, fleet: FleetConfig) -> int:
        found = find(await view(bus, fleet, timeout=chosen.timeout), chosen.name)
        record: Record | None = None
        with trio.move_on_after(chosen.timeout * REACH):
            record = await records.gather(
                bus, found.id, found.agent, found.host, target=found.target, epoch=found.epoch
            )
        if record is None:
            raise broker_silent(fleet, chosen.timeout * REACH)
        return _show(record, chosen)

    return on_bus(chosen, verb, on_interrupt=lambda: None)


async def view(bus: Bus, fleet: FleetConfig, *, timeout: float) -> Fleet:
    """The fleet as the log tells it."""
    found = Fleet(places(fleet))
    async with listening(bus, fleet, [topics.FACTS, topics.SNAPSHOTS], timeout=timeout, after=0) as feed:
        await catch_up(feed, found, fleet, timeout=timeout)
    return found


def find(view: Fleet, name: str) -> Migration:
    """The migration of this id, the last one of this agent, or without a name the last of all."""
    if not name:
        found = next(reversed(view.migrations.values()), None)
        if found is None:
            raise Refused("no migration has begun yet", where="the log", hint="interlock migrate AGENT --to REVISION")
        return found
    found = view.migrations.get(name) or view.last_migration(name)
    if found is not None:
        return found
    if name in view.agents:
        raise Refused(f"{name} was never migrated, as far as the log goes back", where="the log")
    hint = near(name, [*view.agents, *view.migrations])
    raise Refused(f"there is no agent and no migration {name!r}", where="the log", hint=hint)


def _show(record: Record, chosen: argparse.Namespace) -> int:
    screen = Screen(sys.stdout)
    target: Path | None = getattr(chosen, "html", None)
    if target is not None:
        try:
            target.write_text(page(record), "utf-8")
        except OSError as error:
            raise ConfigError(f"can't be written: {error.strerror}", where=str(target)) from None
    if chosen.verb == "explain":
        sentences = report_text.explain(record)
        if chosen.json:
            say_json({"migration": record.migration, "outcome": record.outcome, "sentences": sentences})
        else:
            for sentence in sentences:
                screen.line(sentence)
    elif chosen.json:
        say_json(record.to_json())
    elif target is not None:
        screen.line(f"{record.migration}: written to {target}")
    else:
        for text, tone in report_text.report(record):
            screen.line(text, tone)
    return 0


# --- history


def run_history(chosen: argparse.Namespace) -> int:
    """0, also where there is none; an agent that there is not is refused (12)."""
    since = moment(chosen.since) if chosen.since else 0.0

    async def verb(bus: Bus, fleet: FleetConfig) -> int:
        found = history(
            await view(bus, fleet, timeout=chosen.timeout), agent=chosen.name, since=since, outcome=chosen.outcome
        )
        if chosen.json:
            say_json({"time": time.time(), "migrations": [_row(migration) for migration in found]})
        else:
            Screen(sys.stdout).history(found)
        return 0

    return on_bus(chosen, verb, on_interrupt=lambda: None)


def history(view: Fleet, *, agent: str, since: float, outcome: str) -> list[Migration]:
    """The migrations that the fold still knows, the oldest first."""
    if agent and agent not in view.agents:
        raise Refused(f"there is no agent {agent!r}", where="the log", hint=near(agent, view.agents))
    return [
        migration
        for migration in view.migrations.values()
        if agent in ("", migration.agent)
        and migration.times.get("started", 0.0) >= since
        and outcome in ("", migration.outcome or "in-flight")
    ]


def _row(migration: Migration) -> dict[str, Any]:
    names = (
        "id",
        "agent",
        "host",
        "target",
        "previous",
        "to",
        "strategy",
        "outcome",
        "decided_by",
        "reason",
        "times",
        "deviations",
    )
    return {name: getattr(migration, name) for name in names} | {"in_flight": migration.in_flight}
