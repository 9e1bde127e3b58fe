"""The verb `log` of the command line: from its options to what it prints."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Awaitable, Callable

import msgspec

from interlock.broker.bus import Bus
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError
from interlock.coordinator import logbook
from interlock.coordinator.logbook import Entry, Filter, moment
from interlock.coordinator.screen import Screen, clock
from interlock.coordinator.verbs import EXITS

OnBus = Callable[[Callable[[Bus, FleetConfig], Awaitable[int]]], int]


def run(chosen: argparse.Namespace, load: Callable[[], FleetConfig], on_bus: OnBus) -> int:
    """The exit code: 0, or 13 if `verify` found something."""
    if chosen.act == "verify":
        return _verify(chosen, load)
    if chosen.act == "follow" and chosen.file:
        raise ConfigError("a file is not followed", where="interlock log", hint="leave --file away, or use list")
    if chosen.limit is not None and chosen.limit < 1:
        raise ConfigError(f"--limit {chosen.limit}", where="interlock log", hint="1 or more")
    wanted = Filter(
        topics=tuple(chosen.topic),
        types=tuple(chosen.type),
        agent=chosen.agent,
        since=moment(chosen.since) if chosen.since else 0.0,
        until=moment(chosen.until) if chosen.until else float("inf"),
    )
    limit = None if chosen.act == "follow" else chosen.limit
    if chosen.act == "list" and limit is None:
        limit = logbook.LIMIT
    say = _sayer(as_json=chosen.json or chosen.act == "export")
    newest: deque[Entry] = deque(maxlen=limit)
    take = say if limit is None else newest.append

    async def from_broker(bus: Bus, fleet: FleetConfig) -> int:
        follow = chosen.act == "follow"
        await logbook.of_broker(bus, fleet, wanted, after=chosen.after, follow=follow, timeout=chosen.timeout, say=take)
        return 0

    if chosen.file:
        for entry in logbook.of_file(chosen.file, wanted, after=chosen.after):
            take(entry)
    else:
        code = on_bus(from_broker)
        if code:
            return code
    for entry in newest:
        say(entry)
    return 0


def _sayer(*, as_json: bool) -> Callable[[Entry], None]:
    """One JSON object a line, flushed; or a line for a human."""
    screen = Screen(sys.stdout)

    def say(entry: Entry) -> None:
        if as_json:
            print(msgspec.json.encode(entry.to_json()).decode(), flush=True)
        else:
            header = entry.header
            text = entry.text or f"{entry.type}, which this program does not know"
            screen.line(f"{header.seq:>7}  {clock(header.logged or header.time)}  {header.source:<16}  {text}")

    return say


def _verify(chosen: argparse.Namespace, load: Callable[[], FleetConfig]) -> int:
    path = chosen.file or load().state_dir / "broker" / "events.sqlite"
    if not chosen.file and not path.exists():
        raise ConfigError(
            "this machine has no log of the fleet", where=str(path), hint="verify where the broker runs, or name --file"
        )
    verdict = logbook.verify(path, chosen.expect)
    if chosen.json:
        tree = {
            "whole": not verdict.findings,
            "events": verdict.events,
            "anchor": str(verdict.anchor),
            "head": str(verdict.head),
            "findings": [msgspec.to_builtins(finding) for finding in verdict.findings],
        }
        print(msgspec.json.encode(tree).decode(), flush=True)
    else:
        screen = Screen(sys.stdout)
        for finding in verdict.findings:
            screen.line(str(finding), "bad")
        outcome = f"{len(verdict.findings)} findings" if verdict.findings else "whole"
        begin = f" after event {verdict.anchor.seq}" if verdict.anchor.seq else ""
        screen.line(f"{verdict.events} events{begin}: {outcome}; head {verdict.head}")
    return EXITS["failed"] if verdict.findings else 0
