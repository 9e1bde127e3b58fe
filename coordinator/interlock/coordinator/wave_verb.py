"""`interlock wave start|status|stop|list`: many agents are moved together, and moved back together."""

from __future__ import annotations

import argparse
import time
import tomllib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from interlock.broker import commands, facts, topics
from interlock.broker.bus import Bus, EventFeed
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError, Refused, Unreachable
from interlock.broker.facts import WaveResult
from interlock.broker.wire import Body, Event
from interlock.coordinator import report_verb
from interlock.coordinator.admission import near
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.terminal import Output, note, on_bus, say_json
from interlock.coordinator.verbs import ANSWER_MARGIN_S, TICK_S, listening, survey
from interlock.coordinator.wave import Wave

EXITS = {"committed": 0, "rolled-back": 10, "stopped": 11, "refused": 12, "failed": 13}


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan file: `[revisions]` by agent, and what else it says; options of the command line hold before it."""

    revisions: dict[str, str]
    order: commands.WaveOrder | None = None
    parallel: int | None = None
    budget: int | str | None = None
    strategy: str | None = None
    level: str | None = None
    because: str | None = None


def run(chosen: argparse.Namespace) -> int:
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "start": _start, "status": _status, "stop": _stop, "list": _list,
    }  # fmt: skip
    return verbs[chosen.act](chosen)


# --- start


def _start(chosen: argparse.Namespace) -> int:
    asked = asked_of(chosen, time.time() + chosen.timeout)
    output = Output(chosen)
    begun: list[str] = []

    async def verb(bus: Bus, fleet: FleetConfig) -> int:
        async with listening(bus, fleet, [topics.FACTS], timeout=chosen.timeout) as feed:
            answer = await _asked(bus, feed, asked, chosen.timeout)
            if isinstance(answer.body, facts.WaveRefused):
                return _refused(answer.body, chosen, output)
            assert isinstance(answer.body, facts.WaveStarted)
            begun.append(answer.body.wave)
            output.tell(answer)
            for agent, why in answer.body.left_out.items():
                note(f"{agent} is not in it: {why}")
            if chosen.detach:
                if chosen.json:
                    say_json({"outcome": "started", "wave": answer.body.wave})
                return 0
            return _ended(await _follow(feed, answer.body.wave, output), chosen, output)

    def interrupted() -> None:
        if begun:
            note(f"{begun[0]} goes on without you; to end it: interlock wave stop {begun[0]} [--undo]")
        else:
            note("interrupted before an answer came; look with: interlock wave list")

    return on_bus(chosen, verb, on_interrupt=interrupted)


def asked_of(chosen: argparse.Namespace, deadline: float) -> commands.StartWave:
    """The request; ConfigError if its options or its plan are wrong."""
    plan = read_plan(chosen.plan) if chosen.plan is not None else Plan(revisions={})
    budget, share = parse_budget(chosen.budget if chosen.budget is not None else str(plan.budget or 0))
    by_option = chosen.strategy is not None or chosen.level is not None
    return commands.StartWave(
        deadline=deadline,
        revisions=plan.revisions,
        to=chosen.to or "",
        agents=[name for name in chosen.agents.split(",") if name],
        category=chosen.category or "",
        host=chosen.host or "",
        order=chosen.order or plan.order or "dependency",
        parallel=chosen.parallel if chosen.parallel is not None else plan.parallel or 1,
        budget=budget,
        budget_share=share,
        strategy=chosen.strategy if by_option else plan.strategy,
        level=chosen.level if by_option else plan.level,
        because=chosen.because or plan.because or "",
    )


def read_plan(path: Path) -> Plan:
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
        plan = msgspec.convert(tree, Plan)
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", where=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        hint = "a plan is TOML with a table [revisions], by agent; see docs/migrations.md"
        raise ConfigError(f"is no plan of a wave: {error}", where=str(path), hint=hint) from None
    if not plan.revisions:
        raise ConfigError("names no agent", where=f"{path}: revisions")
    return plan


def parse_budget(text: str) -> tuple[int, float]:
    """(how many, or what share of all) may fail; of "3" or "10%"."""
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 <= share <= 1:
                return 0, share
        elif int(text) >= 0:
            return int(text), 0.0
    except ValueError:
        pass
    raise ConfigError(f"{text!r} is no failure budget", hint="a number from 0 on, or a share such as 10%")


async def _asked(bus: Bus, feed: EventFeed, body: commands.StartWave | commands.StopWave, timeout: float) -> Event:
    """The coordinator's answer; Unreachable if there is none."""
    request = uuid.uuid4().hex
    await bus.publish(topics.COORDINATOR, body, id=request, timeout=timeout)
    with trio.move_on_after(timeout + ANSWER_MARGIN_S):
        async for event in feed:
            if getattr(event.body, "request", None) == request:
                return event
    raise Unreachable(
        f"the broker has the request, but the coordinator has not answered within {timeout:g} s",
        where="coordinator",
        hint="is it running? the request has expired, nothing was changed",
    )


async def _follow(feed: EventFeed, wave: str, output: Output) -> facts.WaveEnded:
    """Until it has ended; its members' ends are told meanwhile."""
    migrations: set[str] = set()
    lost = False
    while True:
        with trio.move_on_after(TICK_S):
            event = await anext(feed)
            body = event.body
            if isinstance(body, facts.MigrationStarted) and body.wave == wave:
                migrations.add(body.migration)
            if _tells(body, wave, migrations):
                output.tell(event)
            if isinstance(body, facts.WaveEnded) and body.wave == wave:
                return body
        if feed.lost != lost:
            lost = feed.lost
            note("the broker is silent; hosts decide alone meanwhile" if lost else "the broker is back")


def _tells(body: Body, wave: str, migrations: set[str]) -> bool:
    """Whoever follows the wave wants to see it."""
    match body:
        case facts.WaveChanged() | facts.WaveEnded():
            return body.wave == wave
        case facts.MigrationStarted() | facts.MigrationEnded() | facts.MigrationHeld():
            return body.migration in migrations
        case facts.MigrationRefused():
            return body.request.startswith(f"{wave}/")
    return False


def _refused(body: facts.WaveRefused, chosen: argparse.Namespace, output: Output) -> int:
    if chosen.json:
        say_json({"outcome": "refused", "wave": body.wave, "reason": body.reason})
    else:
        output.screen.line(f"REFUSED, nothing was changed: {body.reason}", "warn")
    return EXITS["refused"]


def _ended(body: facts.WaveEnded, chosen: argparse.Namespace, output: Output) -> int:
    if chosen.json:
        say_json(msgspec.to_builtins(body))
    else:
        output.screen.wave(list(body.members))
    return EXITS[body.outcome]


# --- stop


def _stop(chosen: argparse.Namespace) -> int:
    output = Output(chosen)

    async def verb(bus: Bus, fleet: FleetConfig) -> int:
        core = await survey(bus, fleet, timeout=chosen.timeout)
        name = chosen.name or _only(core.waves.open)
        async with listening(bus, fleet, [topics.FACTS], timeout=chosen.timeout) as feed:
            body = commands.StopWave(
                wave=name, deadline=time.time() + chosen.timeout, undo=chosen.undo, reason=chosen.because
            )
            answer = await _asked(bus, feed, body, chosen.timeout)
            if isinstance(answer.body, facts.WaveRefused):
                return _refused(answer.body, chosen, output)
            output.tell(answer)
            ended = await _follow(feed, name, output)
        code = _ended(ended, chosen, output)
        return 0 if ended.outcome == ("rolled-back" if chosen.undo else "stopped") else code

    return on_bus(chosen, verb, on_interrupt=lambda: note("it goes on without you; look with: interlock wave status"))


def _only(waves: dict[str, Wave]) -> str:
    if len(waves) == 1:
        return next(iter(waves))
    known = ", ".join(waves)
    raise Refused(f"{len(waves)} waves are in flight: name one" if waves else "no wave is in flight", where=known)


# --- status and list


def _status(chosen: argparse.Namespace) -> int:
    output = Output(chosen)

    async def verb(bus: Bus, fleet: FleetConfig) -> int:
        core = await survey(bus, fleet, timeout=chosen.timeout)
        name = chosen.name or next(reversed(core.waves.open), "") or next(reversed(core.fleet.waves), "")
        found = core.fleet.waves.get(name)
        if found is None:
            hint = near(name, core.fleet.waves) if name else "interlock wave start --to REVISION"
            raise Refused(f"there is no wave {name!r}" if name else "no wave has begun yet", where="the log", hint=hint)
        wave = core.waves.open.get(name)
        results = wave.results() if wave is not None else msgspec.convert(found.results, list[WaveResult])
        waits = wave.waits_for(core.migrations) if wave is not None else "nothing"
        if chosen.json:
            tree: dict[str, Any] = {
                "wave": name,
                "phase": found.phase,
                "outcome": found.outcome,
                "reason": found.reason,
            }
            say_json(tree | {"waits_for": waits, "members": msgspec.to_builtins(results)})
            return 0
        output.screen.line(
            f"{name}: {found.outcome or found.phase}, waits for {waits}" if wave else f"{name}: {found.outcome}"
        )
        if found.reason:
            output.screen.line(found.reason)
        output.screen.wave(results)
        return 0

    return on_bus(chosen, verb, on_interrupt=lambda: None)


def _list(chosen: argparse.Namespace) -> int:
    output = Output(chosen)

    async def verb(bus: Bus, fleet: FleetConfig) -> int:
        view: Fleet = await report_verb.view(bus, fleet, timeout=chosen.timeout)
        if chosen.json:
            say_json({"waves": msgspec.to_builtins(list(view.waves.values()))})
        else:
            output.screen.waves(list(view.waves.values()))
        return 0

    return on_bus(chosen, verb, on_interrupt=lambda: None)
