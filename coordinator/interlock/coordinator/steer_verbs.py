"""`interlock approve`, `pause`, `resume`, `hold`, `abort` and `commit`: an operator leads a migration in flight."""

from __future__ import annotations

import argparse
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import trio

from interlock.broker import commands, facts, topics
from interlock.broker.bus import Bus, EventFeed
from interlock.broker.commands import SteerAction
from interlock.broker.config import FleetConfig
from interlock.broker.errors import Unreachable
from interlock.broker.wire import Event
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.ownership import places
from interlock.coordinator.terminal import Output, note, on_bus, say_json
from interlock.coordinator.verbs import (
    ANSWER_MARGIN_S,
    Note,
    Report,
    Tell,
    catch_up,
    follow,
    listening,
    report,
)

ENDING = ("abort", "commit")  # these are followed to the end


@dataclass
class Answer:
    """What the coordinator said: "steered", and until when it may stand so (seconds since 1970; 0: no limit)."""

    outcome: str
    agent: str
    action: str
    migration: str = ""
    reason: str = ""
    until: float = 0.0

    @property
    def exit_code(self) -> int:
        return 0 if self.outcome == "steered" else 12

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(chosen: argparse.Namespace) -> int:
    output = Output(chosen)

    async def verb(bus: Bus, fleet: FleetConfig) -> int:
        told = await steer(
            bus, fleet, chosen.agent, chosen.verb, reason=chosen.because, timeout=chosen.timeout, tell=output.tell,
            note=note,
        )  # fmt: skip
        if isinstance(told, Report):
            output.end(told)
            asked_for = {"abort": "rolled-back", "commit": "committed"}[chosen.verb]
            return 0 if told.outcome == asked_for else told.exit_code
        if chosen.json:
            say_json(told.to_json())
        elif told.outcome == "refused":
            output.screen.line(f"REFUSED, nothing was changed: {told.reason}", "warn")
        return told.exit_code

    return on_bus(chosen, verb, on_interrupt=lambda: note("look how it went on with: interlock status"))


async def steer(
    bus: Bus,
    fleet: FleetConfig,
    agent: str,
    action: SteerAction,
    *,
    reason: str,
    timeout: float,
    tell: Tell,
    note: Note,
) -> Answer | Report:
    """Ask the coordinator. Abort and commit are followed to their outcome: then it is a Report."""
    request, view = uuid.uuid4().hex, Fleet(places(fleet))
    async with listening(bus, fleet, [topics.FACTS, topics.SNAPSHOTS], timeout=timeout, after=0) as feed:
        await catch_up(feed, view, fleet, timeout=timeout)
        asked = commands.Steer(agent=agent, action=action, reason=reason, deadline=time.time() + timeout)
        await bus.publish(topics.COORDINATOR, asked, id=request, timeout=timeout)
        said: Event | None = None
        with trio.move_on_after(timeout + ANSWER_MARGIN_S):
            said = await _answer(feed, view, request)
        if said is None:
            raise Unreachable(
                f"the broker has the request, but the coordinator has not answered within {timeout:g} s",
                where="coordinator",
                hint="is it running? the request has expired, nothing was changed; a rollback needs no coordinator: "
                f"interlock rollback {agent}",
            )
        tell(said)
        body = said.body
        if isinstance(body, facts.MigrationRefused):
            return Answer("refused", agent, action, reason=body.reason)
        assert isinstance(body, facts.Steered)
        if action in ENDING:
            return report(await follow(feed, view, body.migration, tell=tell, note=note))
        return Answer("steered", agent, action, body.migration, body.reason, body.until)


async def _answer(feed: EventFeed, view: Fleet, request: str) -> Event:
    async for event in feed:
        if (
            view.apply(event)
            and isinstance(event.body, facts.Steered | facts.MigrationRefused)
            and event.body.request == request
        ):
            return event
    raise AssertionError("a feed does not end")
