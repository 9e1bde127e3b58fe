"""`interlock drill AGENT`: ask for a rehearsal of its rollback, and tell what was measured."""

from __future__ import annotations

import argparse
import time
import uuid

import msgspec
import trio

from interlock.broker import commands, facts, topics
from interlock.broker.bus import Bus, EventFeed
from interlock.broker.config import FleetConfig
from interlock.broker.errors import Refused, Unreachable
from interlock.broker.fields import Evidence
from interlock.coordinator.decisions import DRILL_ID
from interlock.coordinator.terminal import note, on_bus, say_json
from interlock.coordinator.verbs import ANSWER_MARGIN_S, listening

LEVELS = {"1": "route", "2": "code", "3": "host", "4": "backup"}


class Drilled(msgspec.Struct, frozen=True, kw_only=True):
    """What was rehearsed: seconds by level, what was left out and why, and whether the promise holds."""

    outcome: str  # done, or failed
    agent: str
    revision: str
    reason: str
    seconds: dict[str, float]
    skipped: dict[str, str]
    problems: list[str]
    evidence: Evidence

    @property
    def exit_code(self) -> int:
        return 0 if self.outcome == "done" else 13

    def lines(self) -> list[str]:
        rows = [f"{self.agent}: rollback to {self.revision}, rehearsed"]
        for level, name in LEVELS.items():
            if level in self.seconds:
                rows.append(f"  level {level} {name:<7} {self.seconds[level]:9.3f} s")
            elif level in self.skipped:
                rows.append(f"  level {level} {name:<7}   skipped: {self.skipped[level]}")
        if self.evidence.get("route"):
            rows.append(f"  (level 1: {self.evidence['route']})")
        promise = self.evidence.get("promise_s")
        good = "within" if promise is None else f"within the promised {promise:g} s"
        return [*rows, f"DONE, {good}" if self.outcome == "done" else f"FAILED: {self.reason}"]


def run(chosen: argparse.Namespace) -> int:
    """0 if it was done within the promise, 13 if not."""

    async def verb(bus: Bus, fleet: FleetConfig) -> int:
        told = await drill(bus, fleet, chosen.agent, whole_host=chosen.host, timeout=chosen.timeout)
        if chosen.json:
            say_json(told)
        else:
            print("\n".join(told.lines()), flush=True)
        return told.exit_code

    return on_bus(chosen, verb, on_interrupt=lambda: note("the drill goes on without you, and ends by itself"))


async def drill(bus: Bus, fleet: FleetConfig, agent: str, *, whole_host: bool, timeout: float) -> Drilled:
    """Refused with the reason; Unreachable if nobody answers."""
    request = uuid.uuid4().hex
    asked = f"{request}{DRILL_ID}"
    async with listening(bus, fleet, [topics.FACTS, topics.COMMANDS], timeout=timeout) as feed:
        body = commands.RunDrill(agent=agent, whole_host=whole_host, deadline=time.time() + timeout)
        await bus.publish(topics.COORDINATOR, body, id=request, timeout=timeout)
        until: float | None = None
        with trio.move_on_after(timeout + ANSWER_MARGIN_S):
            until = await _taken(feed, request, asked)
        if until is None:
            raise Unreachable(
                f"the coordinator has not answered within {timeout:g} s", where="coordinator",
                hint="is it running? the request has expired; start it with: interlock coordinator, then ask again",
            )  # fmt: skip
        with trio.move_on_after(until - time.time() + timeout):
            return await _ended(feed, agent, asked)
    raise Unreachable("the host has not reported the drill by its deadline", where=agent, hint="is that host running?")


async def _taken(feed: EventFeed, request: str, asked: str) -> float:
    """Until the coordinator has passed it on to the host: the drill's deadline. Refused if it does not."""
    async for event in feed:
        if event.header.id == asked and isinstance(event.body, commands.Drill):
            return event.body.deadline
        if isinstance(event.body, facts.MigrationRefused) and event.body.request == request:
            raise Refused(event.body.reason)
    raise AssertionError("a feed does not end")


async def _ended(feed: EventFeed, agent: str, asked: str) -> Drilled:
    told: facts.DrillDone | None = None
    async for event in feed:
        match event.body:
            case facts.DrillDone() as body if body.command == asked:
                told = body
            case facts.CommandRefused() as body if body.command == asked:
                raise Refused(body.reason, where=f"host {body.host}")
            case facts.StepDone() as body if body.command == asked and told is not None:
                return _drilled("done", "", told)
            case facts.StepFailed() as body if body.command == asked and told is not None:
                return _drilled("failed", body.reason, told)
    raise AssertionError("a feed does not end")


def _drilled(outcome: str, reason: str, told: facts.DrillDone) -> Drilled:
    return Drilled(
        outcome=outcome, agent=told.agent, revision=told.revision, reason=reason, seconds=told.seconds,
        skipped=told.skipped, problems=told.problems, evidence=told.evidence,
    )  # fmt: skip
