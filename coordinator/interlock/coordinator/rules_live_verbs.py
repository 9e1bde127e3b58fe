"""`interlock rules eval` and `explain`, asked of the rule engine that runs."""

from __future__ import annotations

import argparse
from typing import Any

from interlock.broker.bus import Bus
from interlock.broker.config import FleetConfig
from interlock.broker.errors import Unreachable
from interlock.broker.questions import Question, ask, new_id, place
from interlock.broker.security import load_operator
from interlock.coordinator.logbook import moment
from interlock.coordinator.rules.explain import Part
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.template import number
from interlock.coordinator.rules_history_verbs import clock, shown, tell_elements, tell_parts
from interlock.coordinator.terminal import on_bus, say_json

PATIENCE_S = 5.0  # the engine answers within a fraction of a second, or isn't there


def evaluate(chosen: argparse.Namespace) -> int:
    parse(chosen.expression)  # what is no expression is told here, and keeps no engine from its work
    result = _ask(chosen, Question(id=new_id(), expr=chosen.expression, time=_time(chosen)))
    if chosen.json:
        say_json(result)
    else:
        tell_elements(result["elements"], result["time"], result["more"])
    return 0


def explain(chosen: argparse.Namespace) -> int:
    result = _ask(chosen, Question(id=new_id(), alert=chosen.alert, time=_time(chosen)))
    if chosen.json:
        say_json(result)
        return 0
    for rule in result["rules"]:
        parts = [Part.from_json(part) for part in rule["parts"]]
        tell_parts(rule["where"], rule["for"], parts, result["time"])
        print(f"  {rule['tier']}{' (' + rule['why'] + ')' if rule['why'] else ''}")
        if rule["error"]:
            print(f"  can't be evaluated now: {rule['error']}")
    for alert in result["alerts"]:
        labels = shown(tuple(alert["labels"].items()))
        print(
            f"{alert['state']}  {labels}  {number(alert['value'])}  since {clock(alert['since'])}: {alert['summary']}"
        )
    print(f"x_action: {result['rules'][0]['action']}")
    return 0


def _time(chosen: argparse.Namespace) -> float | None:
    return moment(chosen.time) if chosen.time else None


def _ask(chosen: argparse.Namespace, question: Question) -> Any:
    found: list[Any] = []

    async def run(bus: Bus, fleet: FleetConfig) -> int:
        security = load_operator(fleet)
        server = b"" if security is None else security.key_of("rules")
        try:
            found.append(await ask(bus.sockets, place(fleet, chosen.partition), server, question, timeout=PATIENCE_S))
        except Unreachable as error:
            hint = f"{error.hint} --listen computes it from what the bus brings"
            raise Unreachable(error.what, where=error.where, hint=hint) from None
        return 0

    code = on_bus(chosen, run, on_interrupt=lambda: None)
    if not found:
        raise SystemExit(code)
    return found[0]
