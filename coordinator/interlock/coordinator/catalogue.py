"""What passes on the bus: every channel and the messages on it. docs/wire.md and `interlock asyncapi` are made of it.

Nothing runs by this table; a test holds it against `policy.py`, by which everything does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from interlock.broker import commands, direct, facts, policy, protocol, samples, telemetry_protocol, topics
from interlock.broker.config import BrokerConfig
from interlock.broker.errors import Refused
from interlock.broker.keys import Grant
from interlock.broker.wire import Event, Header, encode

Kind = type[msgspec.Struct]

ROLES = ("coordinator", "rules", "operator", "host", "monitor", "subscriber", "broker")
NAME = "alpha"  # of the host, agent and rule in examples


@dataclass(frozen=True)
class Server:
    """An endpoint: the socket there, what connects to it, and an address as in the fleet file's defaults."""

    endpoint: str
    socket: str
    connects: str
    says: str


@dataclass(frozen=True)
class Topic:
    """A topic, with `{host}` and the like for names, and what is published there."""

    address: str
    says: str
    kinds: tuple[Kind, ...]

    @property
    def example(self) -> str:
        return re.sub(r"\{\w+\}", NAME, self.address)


@dataclass(frozen=True)
class Exchange:
    """A request on a DEALER and what answers it (nothing, where it is empty). `frames` name those of the request."""

    server: str
    request: Kind
    answers: tuple[Kind, ...]
    frames: tuple[str, ...] = ("request",)


_BROKER = BrokerConfig()
SERVERS = {
    "events": Server(_BROKER.events, "ROUTER", "DEALER", "publications, receipts, replays, and their answers"),
    "feed": Server(_BROKER.feed, "XPUB", "SUB", "events as they are logged, and beats"),
    "telemetry_in": Server(_BROKER.telemetry_in, "ROUTER", "DEALER", "batches of samples; requests for newest values"),
    "telemetry_out": Server(_BROKER.telemetry_out, "XPUB", "SUB", "the same batches, and beats"),
    "control": Server(
        "tcp://127.0.0.1:7180", "ROUTER", "DEALER", "of each host: rollbacks and leases, past the broker"
    ),
}

_OF_HOST = (
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
_OF_MIGRATION = (
    facts.MigrationStarted,
    facts.MigrationRefused,
    facts.StageEntered,
    facts.MigrationWaiting,
    facts.MigrationHeld,
    facts.ChecksMeasured,
    facts.Steered,
    facts.Deviation,
    facts.MigrationEnded,
)

_OF_WAVE = (facts.WaveStarted, facts.WaveRefused, facts.WaveChanged, facts.WaveEnded)

TOPICS = (
    Topic(
        topics.COORDINATOR,
        "what the coordinator is asked",
        (
            commands.Migrate,
            commands.RollBackAgent,
            commands.Steer,
            commands.StartWave,
            commands.StopWave,
            commands.RunDrill,
        ),
    ),
    Topic(topics.ALL_HOSTS, "what every host is asked", (commands.RollCall,)),
    Topic("command/{host}/", "what a host is asked", (*get_args(commands.HostCommand), commands.RollCall)),
    Topic("rollback/{host}/", "what a host must undo", (commands.RollBack,)),
    Topic("fact/host/{host}/", "what happened at a host", _OF_HOST),
    Topic("fact/migration/{agent}/", "what the coordinator decided about an agent", _OF_MIGRATION),
    Topic("fact/wave/{wave}/", "what the coordinator decided about many agents at once", _OF_WAVE),
    Topic("fact/alert/{rule}/", "that an alert fires, or no longer", (facts.AlertFiring, facts.AlertResolved)),
    Topic("fact/gpu/{host}/", "faults of a host's GPUs", (facts.GpuFault, facts.GpuFaultCleared)),
    Topic("record/{agent}/", "what was measured of a migration", (facts.SeriesRecorded,)),
    Topic(topics.FLEET_SNAPSHOT, "all that was before, folded", (facts.FleetSnapshot,)),
)
TELEMETRY = Topic("telemetry/{host}/{publisher}/", "what was measured", (samples.Batch,))
DIRECT = (commands.RollBack, commands.RenewLease)  # taken at a host's own endpoint, under a topic of that host
BEATS: dict[str, Kind] = {"feed": protocol.Beat, "telemetry_out": telemetry_protocol.Beat}

_EVENT = ("topic", "header", "body")
EXCHANGES = (
    Exchange("events", protocol.Publish, (protocol.Ack, protocol.Nack), ("request", *_EVENT)),
    Exchange(
        "events",
        protocol.Replay,
        (protocol.ReplayEvents, protocol.ReplayEvent, protocol.Replayed, protocol.ReplayFailed),
    ),
    Exchange("events", protocol.Ping, (protocol.Pong,)),
    Exchange("events", protocol.Receipt, ()),
    Exchange("events", protocol.Watch, (protocol.Received,)),
    Exchange("telemetry_in", telemetry_protocol.AskLast, (telemetry_protocol.Page, telemetry_protocol.AskFailed)),
)
REPLY = direct.Reply
# The frames of a message, where they are more than itself.
FRAMES: dict[Kind, tuple[str, ...]] = {
    protocol.Publish: ("request", *_EVENT),
    protocol.ReplayEvent: ("answer", *_EVENT),
    protocol.ReplayEvents: ("answer", "events"),
    telemetry_protocol.Page: ("answer", "topic", "batch", "topic", "batch", "..."),
    **dict.fromkeys(BEATS.values(), ("topic", "beat")),
    samples.Batch: ("topic", "batch"),
}


def kinds() -> Iterator[Kind]:
    """Every type of a message, once."""
    seen: dict[Kind, None] = {}
    for topic in TOPICS:
        seen |= dict.fromkeys(topic.kinds)
    seen |= dict.fromkeys(DIRECT)
    for exchange in EXCHANGES:
        seen |= dict.fromkeys((exchange.request, *exchange.answers))
    seen |= dict.fromkeys((*TELEMETRY.kinds, *BEATS.values(), REPLY))
    yield from seen


def tag(kind: Kind) -> str:
    """What stands under `type` or `op`: "migrate", "publish"; for a message without it a name of ours."""
    found = kind.__struct_config__.tag
    if isinstance(found, str):
        return found
    return {protocol.Beat: "beat", telemetry_protocol.Beat: "telemetry-beat"}.get(kind, kind.__name__.lower())


# --- who may


def publishers(topic: Topic, kind: Kind) -> list[str]:
    """The roles that may publish this there, as `policy.py` decides it."""
    return [role for role in ROLES if _may(role, topic.example, kind)]


def hearers(topic: Topic) -> list[str]:
    """The roles that may subscribe to it. A subscriber hears what its key names."""
    found = []
    for role in ROLES:
        try:
            policy.subscribe(_grant(role, topic.example), [topic.example])
        except Refused:
            continue
        found.append(role)
    return found


def askers(kind: Kind) -> list[str]:
    """The roles that may ask a host directly."""
    return [role for role in ROLES if _may(role, f"rollback/{NAME}/", kind, directly=True)]


def senders() -> list[str]:
    """The roles that may send telemetry, each under its own topic."""
    found = []
    for role in ROLES:
        own = {"host": (NAME, "host"), "monitor": (NAME, "monitor")}.get(role, ("fleet", role))
        batch = samples.Batch(source="/".join(own), epoch=1, seq=1, time=0.0)
        try:
            policy.telemetry(_grant(role), topics.telemetry(*own), batch)
        except Refused:
            continue
        found.append(role)
    return found


def _grant(role: str, topic: str = "") -> Grant:
    alone = role in ("coordinator", "rules", "broker")
    return Grant(identity=role if alone else f"{role}/{NAME}", curve="", topics=[topic])


def _may(role: str, topic: str, kind: Kind, *, directly: bool = False) -> bool:
    grant, body = _grant(role), example(kind)
    header = Header(id="1", source=grant.identity, time=0.0)
    try:
        (policy.direct if directly else policy.publish)(grant, Event(topic, header, body, encode(body)))
    except Refused:
        return False
    return True


# --- examples

_BY_NAME = {
    "agent": "greeter",
    "to": "v2",
    "previous": "v1",
    "permanent": "v1",
    "revision": "v1",
    "strategy": "rapid",
    "migration": "greeter-41",
    "rule": "gpu-memory",
    "action": "rollback",
    "state": "live",
    "stage": "integration",
    "check": "health",
    "control": "tcp://10.0.0.2:7180",
    "reason": "98 % of the GPU's memory is used",
    "decided_by": "rule gpu-memory",
    "by": "rule gpu-memory",
    "source": f"{NAME}/host",
}
_BY_TYPE: dict[Any, Any] = {str: NAME, int: 41, float: 1767225600.5, bool: True, bytes: b"\x00\x01"}


def example(kind: Kind) -> Any:
    """A message of this type, with its optional fields left to their defaults."""
    hints = get_type_hints(kind)
    bounded = get_type_hints(kind, include_extras=True)
    needed = {field.name: _value(field.name, hints[field.name]) for field in _needed(kind)}
    return kind(**{name: _within(value, bounded[name]) for name, value in needed.items()})


def _within(value: Any, hint: Any) -> Any:
    """The value, or one that its bounds allow."""
    most = [meta.le for meta in getattr(hint, "__metadata__", ()) if meta.le is not None]
    return type(value)(most[0] / 2) if most and value > most[0] else value


def _needed(kind: Kind) -> list[msgspec.structs.FieldInfo]:
    return [field for field in msgspec.structs.fields(kind) if field.required]


def _value(name: str, hint: Any) -> Any:
    if hint is str and name in _BY_NAME:
        return _BY_NAME[name]
    origin = get_origin(hint)
    if origin is Literal:
        return get_args(hint)[0]
    if origin is dict:
        return {_value("", part): _value("", of) for part, of in [get_args(hint)]}
    if origin is list:
        return [_value(name, get_args(hint)[0])]
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return example(hint)
    return _BY_TYPE[hint]
