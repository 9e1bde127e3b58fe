"""Who may do what. Pure: each function returns, or raises Refused with the reason.

What is not allowed here is refused. `identity` is proved by the connection's key, never by what a message claims.
A body belongs to its topic: a host can't slip the coordinator a command under a topic of facts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import get_args

from interlock.broker import cadence, commands, facts, topics
from interlock.broker.errors import Refused
from interlock.broker.keys import Grant
from interlock.broker.samples import Batch
from interlock.broker.wire import Body, Event

BEATS = "beat/"  # the pulse of the feed, which every subscriber needs
RULES_TELEMETRY = "telemetry/fleet/"  # the rule engine, the coordinator and the broker belong to no host
CADENCE = cadence.TOPIC  # how long the coordinator wants hosts sampled fast

EVERYTHING = ("",)

_RULES_TOPIC = re.compile(rf"{RULES_TELEMETRY}(rules|(rules|partial)-[0-9]{{1,2}})/")

_ASKED_OF_COORDINATOR = (
    commands.Migrate,
    commands.RollBackAgent,
    commands.Steer,
    commands.StartWave,
    commands.StopWave,
    commands.RunDrill,
)
_ASKED_OF_HOST = get_args(commands.HostCommand)
BY_HOST = (
    facts.HostUp,
    facts.HostDown,
    facts.InstanceStarted,
    facts.InstanceStopped,
    facts.SlotChanged,
    facts.StepDone,
    facts.StepFailed,
    facts.CommandRefused,
    facts.RolledBack,
    facts.RollBackEscalated,
    facts.RollBackFailed,
    facts.DrillDone,
)
_OF_WAVE = (facts.WaveStarted, facts.WaveRefused, facts.WaveChanged, facts.WaveEnded)
_BY_RULES = (facts.AlertFiring, facts.AlertResolved)
BY_MONITOR = (facts.GpuFault, facts.GpuFaultCleared)


def publish(grant: Grant, event: Event) -> None:
    """May this one have the event logged?"""
    _source(grant, event.header.source)
    role, name = grant.role, grant.name
    kind, _, rest = event.topic.partition("/")
    target = rest.removesuffix("/")
    body = event.body
    match kind:
        case "command" if target == "coordinator":
            _only(grant, event.topic, role in ("operator", "coordinator"), isinstance(body, _ASKED_OF_COORDINATOR))
        case "command" if isinstance(body, commands.RollCall):
            _only(grant, event.topic, role in ("operator", "coordinator"), True)
        case "command":
            fitting = isinstance(body, _ASKED_OF_HOST) and event.topic != topics.ALL_HOSTS
            _only(grant, event.topic, role == "coordinator", fitting)
        case "rollback":
            may = role in ("rules", "coordinator", "operator") or (role == "host" and target == name)
            _only(grant, event.topic, may, isinstance(body, commands.RollBack))
        case "fact" if target.startswith("host/"):
            own = role == "host" and target == f"host/{name}"
            _only(grant, event.topic, own, isinstance(body, BY_HOST) and body.host == name)
        case "fact" if target.startswith("migration/"):
            _only(grant, event.topic, role == "coordinator", _of_migration(body))
        case "fact" if target.startswith("wave/"):
            _only(grant, event.topic, role == "coordinator", isinstance(body, _OF_WAVE))
        case "fact" if target.startswith("alert/"):
            _only(grant, event.topic, role == "rules", isinstance(body, _BY_RULES))
        case "fact" if target.startswith("gpu/"):
            own = role == "monitor" and target == f"gpu/{name}"
            _only(grant, event.topic, own, isinstance(body, BY_MONITOR) and body.host == name)
        case "record":
            _only(grant, event.topic, role == "coordinator", isinstance(body, facts.SeriesRecorded))
        case "snapshot":
            own = event.topic == topics.FLEET_SNAPSHOT
            _only(grant, event.topic, role == "coordinator", own and isinstance(body, facts.FleetSnapshot))
        case _:
            raise Refused("nobody publishes there", where=f"{grant.identity} on {event.topic}")


def direct(grant: Grant, event: Event) -> None:
    """May this one ask a host directly?"""
    _source(grant, event.header.source)
    match event.body:
        case commands.RollBack():
            may = grant.role in ("rules", "coordinator", "operator")
        case commands.RenewLease():
            may = grant.role == "coordinator"
        case _:
            may = False
    _only(grant, event.topic, may, True)


def link(grant: Grant) -> None:
    """May this one ask a host to run an agent's candidate for it? What it may then ask for is the host's to judge."""
    _only(grant, "a host's link", grant.role == "host", True)


def ask(grant: Grant) -> None:
    """May this one ask the rule engine what it knows? It knows all that is measured: who hears all may ask."""
    _only(grant, "the rule engine's answers", grant.role in ("operator", "coordinator"), True)


def telemetry(grant: Grant, topic: str, batch: Batch) -> None:
    """May this one send measurements under the topic?"""
    match grant.role:
        case "host":
            may = topic.startswith(f"telemetry/{grant.name}/") and topic != topics.telemetry(grant.name, "monitor")
        case "monitor":
            may = topic == topics.telemetry(grant.name, "monitor")
        case "rules":  # several of them may share a fleet
            may = _RULES_TOPIC.fullmatch(topic) is not None
        case "coordinator" | "broker":
            may = topic == f"{RULES_TELEMETRY}{grant.role}/" or (grant.role == "coordinator" and topic == CADENCE)
        case _:
            may = False
    _only(grant, topic, may, topic == f"telemetry/{batch.source}/")


def receipt(grant: Grant, source: str, topic: str) -> None:
    """May this one say that it has taken a command of this topic?"""
    _source(grant, source)
    match grant.role:
        case "host":
            may = topic in (topics.command(grant.name), topics.rollback(grant.name), topics.ALL_HOSTS)
        case "coordinator":
            may = topic == topics.COORDINATOR
        case _:
            may = False
    _only(grant, topic, may, True)


def watch(grant: Grant, source: str, topic: str) -> None:
    """May this one know who has taken a command of this source?"""
    _only(grant, topic, grant.identity == source or grant.role in ("coordinator", "operator"), True)


def subscribe(grant: Grant, prefixes: Sequence[str]) -> None:
    """May this one hear everything under these prefixes?"""
    allowed = _hears(grant)
    for prefix in prefixes:
        if not any(prefix.startswith(start) for start in allowed):
            heard = ", ".join(start for start in allowed if start != BEATS)
            raise Refused(
                f"may not hear {prefix!r}", where=grant.identity, hint=f"only {heard}" if heard else "it hears nothing"
            )


def _hears(grant: Grant) -> tuple[str, ...]:
    match grant.role:
        case "coordinator" | "rules" | "operator" | "broker":
            return EVERYTHING
        case "host":
            own = (topics.command(grant.name), topics.rollback(grant.name), topics.telemetry(grant.name, "monitor"))
            return (*own, topics.ALL_HOSTS, topics.FACTS, BEATS)
        case "monitor":
            return (topics.FACTS, CADENCE, BEATS)
        case "subscriber":
            return (*(topic for topic in grant.topics if topic), BEATS)
    return ()


def _source(grant: Grant, source: str) -> None:
    if source != grant.identity:
        raise Refused(
            f"claims to be {source[:80]!r}", where=grant.identity, hint="the header's source is your identity"
        )


def _only(grant: Grant, topic: str, may: bool, fitting: bool) -> None:
    if not may:
        raise Refused("may not publish there", where=f"{grant.identity} on {topic}")
    if not fitting:
        raise Refused("that does not belong under this topic", where=f"{grant.identity} on {topic}")


def _of_migration(body: Body) -> bool:
    elsewhere = (*BY_HOST, *BY_MONITOR, *_BY_RULES, *_OF_WAVE, facts.SeriesRecorded, facts.FleetSnapshot)
    return isinstance(body, get_args(facts.Fact)) and not isinstance(body, elsewhere)
