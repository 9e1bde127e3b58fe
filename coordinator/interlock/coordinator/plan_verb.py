"""`interlock plan`: what a migration would do, with the fleet file and the log as they are now. Asks nobody."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

from interlock.broker import commands
from interlock.broker.bus import Bus
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError, Refused
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.planning import Forecast, forecast
from interlock.coordinator.screen import Screen
from interlock.coordinator.source_risk import source_risk
from interlock.coordinator.terminal import on_bus, say_json
from interlock.coordinator.verbs import survey

EXIT_REFUSED = 12  # as of a migration that is refused


def run(chosen: argparse.Namespace) -> int:
    """0 if a migration would begin now, 12 if it would be refused."""

    async def verb(bus: Bus, fleet: FleetConfig) -> int:
        core = await survey(bus, fleet, timeout=chosen.timeout)
        found = ask(core, fleet, chosen, now=time.time())
        found = replace(found, source=await source_risk(fleet, found.agent, found.to))
        if chosen.json:
            say_json(found.to_json())
        else:
            Screen(sys.stdout).forecast(found)
        return EXIT_REFUSED if found.refused else 0

    return on_bus(chosen, verb, on_interrupt=lambda: None)


def ask(core: Coordinator, fleet: FleetConfig, chosen: argparse.Namespace, *, now: float) -> Forecast:
    """Refused if it names an agent, a revision, a level or a strategy that there is not."""
    asked = commands.Migrate(
        agent=chosen.agent, to=chosen.to, strategy=chosen.strategy, level=chosen.level, accept=chosen.accept,
        because=chosen.because, deadline=now, host=chosen.host or None,
    )  # fmt: skip
    try:
        case = core.consider(asked, now)
    except ConfigError as error:
        raise Refused(error.what, where=error.where, hint=error.hint) from None
    slot, risk = core.fleet.agents.get(asked.agent), core.risk.get(asked.agent)
    return forecast(asked, case, slot, risk=risk, config=fleet.coordinator)
