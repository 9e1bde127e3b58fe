"""`interlock rules eval`, `replay` and `explain`: rules over a recording, or over what the bus brings now."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from interlock.broker.bus import Bus
from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.errors import ConfigError, Unreachable
from interlock.broker.samples import NAME, Labels, SeriesReader
from interlock.coordinator.logbook import moment
from interlock.coordinator.rules import explain as explaining
from interlock.coordinator.rules.answering import told
from interlock.coordinator.rules.evaluate import Evaluation
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.recording import Taken, read
from interlock.coordinator.rules.replay import replay
from interlock.coordinator.rules.retention import wanted
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.rulefile import load_rules
from interlock.coordinator.rules.source import History
from interlock.coordinator.rules.template import number
from interlock.coordinator.terminal import note, on_bus, say_json

LISTEN_S = 2.5  # what there is comes with a publisher's next batch of all its series: one a second
MAX_LISTEN_S = 3600.0  # a window that is longer needs a recording


def evaluate(chosen: argparse.Namespace) -> int:
    tree = parse(chosen.expression)
    rule = Rule(name="eval", text=chosen.expression, expression=tree)
    history, end = _history(chosen, [rule])
    at = moment(chosen.time) if chosen.time else end
    rows = told(Evaluation(history, at).result(tree), history.table.sets)
    if chosen.json:
        say_json({"expr": chosen.expression, "time": at, "elements": rows})
    else:
        tell_elements(rows, at)
    return 0


def tell_elements(rows: Sequence[dict[str, Any]], at: float, more: int = 0) -> None:
    for row in rows:
        worth = row["value"] if isinstance(row["value"], str) else number(row["value"])
        print(shown(tuple(row["labels"].items())), worth, *([f"@ {row['time']:.3f}"] if "time" in row else []))
    if more:
        note(f"and {more} more")
    if not rows:
        note(f"nothing at {clock(at)}")


def run_replay(chosen: argparse.Namespace) -> int:
    rules = _rules(chosen)
    with Recorded(chosen.recording) as taken:
        for at, made in replay(taken, rules):
            if chosen.json:
                say_json(_transition(at, made))
            else:
                word = {"rollback": "  -> rolls back", "hold": "  -> holds"}.get(made.action, "")
                word = word if made.state == "firing" else ""
                text = f"{clock(at)}  {made.state:<8}  {made.rule.name}  {shown(tuple(made.labels.items()))}"
                print(f"{text}  {number(made.value)}{word}{' (dry run)' if word and made.rule.dry_run else ''}")
    return 0


def run_explain(chosen: argparse.Namespace) -> int:
    rules = _rules(chosen)
    named = [rule for rule in rules if rule.name == chosen.alert and rule.kind == "alert"]
    if not named:
        known = ", ".join(rule.name for rule in rules if rule.kind == "alert")
        raise ConfigError(
            f"there is no alert {chosen.alert!r}", where="interlock rules explain", hint=f"there are: {known}"
        )
    taken = list(_taken(chosen, [*named, *(rule for rule in rules if rule.kind == "record")]))
    until = moment(chosen.time) if chosen.time else math.inf
    taken = [each for each in taken if each.time <= until]
    made = [(at, each) for at, each in replay(taken, rules) if each.rule.name == chosen.alert]
    end = min(until, max((each.time for each in taken), default=0.0))
    firing = [at for at, each in made if each.state == "firing"]
    at = end if chosen.time or not firing else firing[-1]
    history = History()
    for each in taken:
        if each.time <= at:
            each.into(history)
    did = [
        (t, body)
        for each in taken
        for t, body in each.events
        if t.startswith((f"fact/alert/{chosen.alert}/", "rollback/"))
    ]
    verdicts = [(rule, list(explaining.explain(rule.expression, partial(Evaluation, history, at)))) for rule in named]
    if chosen.json:
        rows = [
            {"rule": rule.name, "expr": rule.text, "parts": [p.to_json() for p in parts]} for rule, parts in verdicts
        ]
        story = [_transition(when, each) for when, each in made]
        say_json(
            {"alert": chosen.alert, "time": at, "rules": rows, "transitions": story, "did": [body for _, body in did]}
        )
        return 0
    for rule, parts in verdicts:
        tell_parts(rule.where, rule.for_s, parts, at)
    for when, change in made:
        labels = shown(tuple(change.labels.items()))
        print(f"{clock(when)}  {change.state}  {labels}  since {clock(change.since)}: {change.summary}")
    print("\n".join(f"did: {topic} {body}" for topic, body in did) if did else f"x_action: {named[0].action}")
    return 0


def tell_parts(where: str, for_s: float, parts: Sequence[explaining.Part], at: float) -> None:
    holds = "holds" if parts and parts[0].elements else "gives nothing"
    print(f"{where}: {holds} at {clock(at)}" + (f"; for {for_s:g}s" if for_s else ""))
    for part in parts:
        indent = "  " * (part.depth + 1)
        plain = part.error or ("" if part.number is None else f"= {number(part.number)}")
        empty = not (part.elements or part.samples or plain)
        print(f"{indent}{part.text}  {plain or ('nothing' if empty else '')}".rstrip())
        lines: list[tuple[Labels, float | None, float]] = [*part.samples]
        lines = lines or [(labels, None, value) for labels, value in part.elements.items()]
        for labels, when, value in lines[: explaining.MAX_ELEMENTS]:
            print(f"{indent}  {shown(labels)} {number(value)}" + (f" @ {clock(when)}" if when is not None else ""))
        rest = len(lines) - explaining.MAX_ELEMENTS + part.more
        if rest > 0:
            print(f"{indent}  and {rest} more")


# --- where samples come from


class Recorded:
    """The recording of a file, line by line: it may be larger than the memory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Iterator[Taken]:
        try:
            self._file = self._path.open("rb")
        except OSError as error:
            raise ConfigError(f"can't be read: {error.strerror}", where=str(self._path)) from None
        return read(self._file, file=str(self._path))

    def __exit__(self, *raised: object) -> None:
        self._file.close()


def _taken(chosen: argparse.Namespace, rules: Sequence[Rule]) -> Iterator[Taken]:
    if chosen.file:
        with Recorded(chosen.file) as taken:
            yield from taken
    else:
        yield from _listened(chosen, rules)


def _history(chosen: argparse.Namespace, rules: Sequence[Rule]) -> tuple[History, float]:
    history, end = History(), 0.0
    for each in _taken(chosen, rules):
        each.into(history)
        end = max(end, each.time)
    return history, end if chosen.file else time.time()


def _listened(chosen: argparse.Namespace, rules: Sequence[Rule]) -> Iterable[Taken]:
    """What the telemetry plane brings, for as long as the longest window asks for."""
    back_s = max((keep_s for rule in rules for _, keep_s, _ in wanted(rule)), default=0.0)
    if back_s > MAX_LISTEN_S:
        raise ConfigError(
            f"a window of {back_s:g} s", where="interlock rules", hint="record it with watch --json, and use --file"
        )
    found: list[Taken] = []

    async def listen(bus: Bus, fleet: FleetConfig) -> int:
        reader = SeriesReader()
        if back_s > LISTEN_S:
            note(f"listening for {back_s:g} s: so long is the longest window")
        with trio.move_on_after(max(back_s, LISTEN_S)):
            async with bus.samples(["telemetry/"]) as feed:
                async for batches in feed:
                    for batch in batches:
                        samples, ended = reader.read(batch)
                        found.append(Taken(batch.time, batch.source, dict(samples), ended))
        if not found:
            raise Unreachable("no telemetry comes", where=fleet.broker.telemetry_out, hint="is the fleet up?")
        return 0

    on_bus(chosen, listen, on_interrupt=lambda: None)
    return found


def _rules(chosen: argparse.Namespace) -> list[Rule]:
    """As --rules says; else those of the fleet file, if there is one; else the rules that ship."""
    if chosen.rules:
        return load_rules(chosen.rules, Path())
    if chosen.fleet.exists():
        fleet = load_fleet(chosen.fleet)
        return load_rules(fleet.rules.files, fleet.folder)
    return load_rules([], Path())


def shown(labels: Labels) -> str:
    name = dict(labels).get(NAME, "")
    inside = ", ".join(f'{label}="{value}"' for label, value in sorted(labels) if label != NAME)
    return f"{name}{{{inside}}}"


def clock(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at * 1000) % 1000:03d}Z"


def _transition(at: float, made: Any) -> dict[str, Any]:
    return {
        "time": at,
        "alert": made.rule.name,
        "state": made.state,
        "labels": made.labels,
        "value": made.value,
        "since": made.since,
        "sample_time": made.sample_time,
        "action": made.action,
        "dry_run": made.rule.dry_run,
        "summary": made.summary,
    }
