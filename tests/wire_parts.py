"""The generated parts of docs/wire.md: what the types of messages, the policy and the constants say (see test_docs)."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from interlock.broker import (
    commands,
    connections,
    direct,
    event_plane,
    facts,
    fields,
    gate,
    lastvalues,
    patrol,
    protocol,
    questions,
    receipts,
    replays,
    samples,
    telemetry_plane,
    telemetry_protocol,
    topics,
    trail,
    tuning,
    wire,
)
from interlock.coordinator import catalogue
from interlock.coordinator.catalogue import DIRECT, EXCHANGES, REPLY, SERVERS, TELEMETRY, TOPICS, Kind

WORDS: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    bytes: "binary",
    Any: "anything",
    NoneType: "nil",
}
PLURAL = {"text": "texts", "whole number": "whole numbers", "number": "numbers", "anything": "anything"}

LIMITS: list[tuple[str, ModuleType, str]] = [
    ("a frame", tuning, "MAX_MESSAGE"),
    ("a frame to a feed", tuning, "MAX_SUBSCRIPTION"),
    ("frames of a message to a server", connections, "MAX_FRAMES"),
    ("an event's header or body, a request, a batch", wire, "MAX_FRAME"),
    ("a topic or subscription", wire, "MAX_TOPIC"),
    ("a name in a topic", topics, "MAX_NAME"),
    ("an id, and a source", event_plane, "MAX_ID"),
    ("a handshake", tuning, "HANDSHAKE_MS"),
    ("silence after it", patrol, "SILENT_S"),
    ("silence of a client that pings", patrol, "SILENCE"),
    ("bytes of a key that were sent and not taken", patrol, "UNREAD"),
    ("connections of a key at one server", gate, "MAX_LINES"),
    ("new connections of a key a second", gate, "NEW_LINES_PER_S"),
    ("requests of a key to `events` a second", gate, "EVENTS_PER_S"),
    ("bytes of them", gate, "EVENT_BYTES_PER_S"),
    ("subscriptions of a key", gate, "MAX_SUBSCRIPTIONS"),
    ("subscribing, a second", gate, "SUBSCRIBES_PER_S"),
    (f"refusals of a key in {gate.REFUSED_S:g} s", gate, "MAX_REFUSED"),
    ("being cut off", gate, "CUT_OFF_S"),
    ("an event's header as its publisher sends it", wire, "MAX_HEADER"),
    ("a signature", wire, "MAX_SIGNATURE"),
    ("events that wait for the broker's disk", event_plane, "QUEUE"),
    ("the same in bytes of bodies", event_plane, "QUEUE_BYTES"),
    ("messages that wait for one client of `events` or `feed`", event_plane, "PEER_QUEUE"),
    ("replays that wait", replays, "REPLAYS"),
    ("of one key", replays, "KEY_REPLAYS"),
    ("bytes of answers that one key has not read", replays, "KEY_UNREAD"),
    ("events in an answer to a replay", protocol, "PAGE_EVENTS"),
    ("bytes in one", protocol, "PAGE_BYTES"),
    ("prefixes of a replay", protocol, "MAX_PREFIXES"),
    ("beats of `feed`", protocol, "BEAT_S"),
    ("a lost link of `feed`", protocol, "LINK_LOST_S"),
    ("beats that tell of an event", protocol, "BEAT_MEMORY"),
    ("topics in a beat", trail, "BEAT_TOPICS"),
    ("events whose topics an event tells", protocol, "TRAIL_EVENTS"),
    ("commands whose receipts are known", receipts, "MAX_COMMANDS"),
    ("for how long they are", receipts, "KEEP_S"),
    ("watchers of a command", receipts, "MAX_WATCHERS"),
    ("receipts in one answer", receipts, "PART"),
    ("a receipt's reason", receipts, "MAX_REASON"),
    ("batches that wait for one reader", telemetry_plane, "SUBSCRIBER_QUEUE"),
    ("batches of a publisher that wait to be read", telemetry_plane, "PUBLISHER_QUEUE"),
    ("requests for newest values that wait", telemetry_plane, "MAX_ASKS"),
    ("prefixes of one", telemetry_protocol, "MAX_PREFIXES"),
    ("batches in a page of newest values", telemetry_protocol, "PAGE_BATCHES"),
    ("bytes in one", telemetry_protocol, "PAGE_BYTES"),
    ("beats of `telemetry_out`", telemetry_protocol, "BEAT_S"),
    ("a lost link of `telemetry_out`", telemetry_protocol, "LINK_LOST_S"),
    ("sources whose newest values are remembered", samples, "MAX_SOURCES"),
    ("series of one source that are", samples, "MAX_SERIES"),
    ("sources of one key that are", lastvalues, "OWN_SOURCES"),
    ("series of one key that are", lastvalues, "OWN_SERIES"),
    ("series of all", lastvalues, "MAX_ALL_SERIES"),
    ("announcements, samples in one batch", samples, "MAX_IN_BATCH"),
    ("labels of one series", samples, "MAX_LABELS"),
    ("characters of all labels of one series", samples, "MAX_LABELS_TEXT"),
    ("maps and lists inside each other in evidence", wire, "MAX_NESTING"),
    ("epoch", fields, "MAX_EPOCH"),
    ("a span of time", fields, "MAX_SPAN_S"),
    ("a source that is forgotten", lastvalues, "SILENT_S"),
    ("all announcements again", samples, "KEYFRAME_S"),
    ("batches that announce a new series", samples, "ANNOUNCEMENTS"),
    ("a sample that is history", samples, "LATE_S"),
    ("ids that a host remembers", direct, "REMEMBERED"),
]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


# --- topics and exchanges


def wire_topics() -> str:
    """Every topic: who publishes there, who may hear it, and what."""
    rows = []
    for topic in TOPICS:
        may = {kind: tuple(_shown(topic, catalogue.publishers(topic, kind))) for kind in topic.kinds}
        for who in dict.fromkeys(may.values()):
            tags = ", ".join(f"`{catalogue.tag(kind)}`" for kind in topic.kinds if may[kind] == who)
            rows.append([f"`{_written(topic)}`", ", ".join(who), ", ".join(_hearing(topic)), tags])
    senders = [{"host": "that host", "monitor": "that host's monitor"}.get(role, role) for role in catalogue.senders()]
    rows.append([f"`{_written(TELEMETRY)}`", ", ".join(senders), ", ".join(_hearing(TELEMETRY)), "batches"])
    return table(("topic", "published by", "may be heard by", "messages"), rows)


def _written(topic: catalogue.Topic) -> str:
    return topic.address.replace("{", "<").replace("}", ">")


def _shown(topic: catalogue.Topic, roles: list[str]) -> list[str]:
    return ["that host" if role == "host" else role for role in roles]


def _hearing(topic: catalogue.Topic) -> list[str]:
    own = topic.address in ("command/{host}/", "rollback/{host}/")
    words = {"host": "that host" if own else "hosts", "monitor": "monitors", "subscriber": "subscribers with it"}
    return [words.get(role, role) for role in catalogue.hearers(topic)]


def wire_requests() -> str:
    """Every request and answer of the event plane."""
    return _exchanges("events")


def wire_telemetry() -> str:
    """The batch, the beat, the requests and answers of the telemetry plane."""
    return fields(samples.Batch) + "\n" + fields(telemetry_protocol.Beat, "beat") + "\n" + _exchanges("telemetry_in")


def _exchanges(server: str) -> str:
    here = [exchange for exchange in EXCHANGES if exchange.server == server]
    rows = [
        [f"`{catalogue.tag(each.request)}`", ", ".join(f"`{catalogue.tag(one)}`" for one in each.answers) or "nothing"]
        for each in here
    ]
    told = list(dict.fromkeys(kind for each in here for kind in (each.request, *each.answers)))
    return table(("request", "answered by"), rows) + "\n" + "\n".join(map(fields, told))


def wire_direct() -> str:
    """What a host is asked directly, by whom, and its answer."""
    rows = [[f"`{catalogue.tag(kind)}`", ", ".join(catalogue.askers(kind))] for kind in DIRECT]
    return table(("message", "asked by"), rows) + "\n" + fields(REPLY)


# --- messages


def wire_header() -> str:
    """The header of an event, and of one on the feed."""
    return fields(protocol.LiveHeader, "header")


def wire_beat() -> str:
    """The beat of the feed."""
    return fields(protocol.Beat, "beat")


def wire_messages() -> str:
    """Every body of an event, by the topic where it belongs."""
    told: dict[Kind, None] = {}
    parts = []
    for topic in TOPICS:
        fresh = [kind for kind in topic.kinds if kind not in told]
        told |= dict.fromkeys(fresh)
        if fresh:
            parts += [f"### {topic.says[0].upper()}{topic.says[1:]}\n", f"Topic `{_written(topic)}`.\n"]
        parts += map(fields, fresh)
    parts += ["### What a host is asked directly only\n", *(fields(kind) for kind in DIRECT if kind not in told)]
    parts += [
        "### Within others\n",
        fields(commands.Breach, "breach"),
        fields(facts.Track, "track"),
        fields(facts.WaveMember, "wavemember"),
        fields(facts.WaveResult, "waveresult"),
    ]
    return "\n".join(parts)


def fields(kind: Kind, name: str = "") -> str:
    """A message: what it says, and its keys."""
    hints = get_type_hints(kind, include_extras=True)
    config, rows = kind.__struct_config__, []
    if config.tag_field:
        rows.append([f"`{config.tag_field}`", f'"{config.tag}"', "*needed*", "which message it is"])
    for field in msgspec.structs.fields(kind):
        hint = hints[field.name]
        rows.append([f"`{field.encode_name}`", _type(hint), _default(field), _meaning(hint)])
    says = " ".join((inspect.getdoc(kind) or "").split())
    return f"**`{name or catalogue.tag(kind)}`**: {says}\n\n" + table(("key", "type", "if left out", "meaning"), rows)


def _type(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return _type(get_args(hint)[0])
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f'"{choice}"' for choice in parts)
    if origin in (Union, UnionType):
        return " or ".join(map(_type, parts))
    if origin is list:
        word = _type(parts[0])
        return f"list of {word if get_origin(parts[0]) is Literal else _plural(word)}"
    if origin is dict:
        return f"map of texts to {_plural(_type(parts[1]))}"
    if origin is tuple:
        return f"list of {len(parts)} {_plural(_type(parts[0]))}"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint.__name__.lower()
    return WORDS[hint]


def _plural(word: str) -> str:
    return PLURAL.get(word, f"{word}s")


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "*needed*"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None:
        return "nil"
    if isinstance(value, bytes):
        return "empty"
    return f"`{msgspec.json.encode(value).decode()}`"


def _meaning(hint: Any) -> str:
    """What the type says; where an alias is annotated again, the outermost, which is said last."""
    found = [meta.description for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
    if found:
        return str(found[-1])
    inner = next((part for part in (hint, *get_args(hint)) if isinstance(part, type)), None)
    assert inner is not None
    assert issubclass(inner, msgspec.Struct), f"{hint} does not say what it means"
    return f"see `{inner.__name__.lower()}` below"


# --- refusals and limits


def wire_refusals() -> str:
    """Every kind of refusal, and what to do."""
    places = {
        "`nack`": protocol.Nack,
        "`failed` of a replay": protocol.ReplayFailed,
        "`failed` of newest values": telemetry_protocol.AskFailed,
        "`reply` of a host": direct.Reply,
    }
    rows = []
    for kind, what in protocol.REFUSALS.items():
        where = [name for name, of in places.items() if kind in _choices(get_type_hints(of)["kind"])]
        rows.append([f"`{kind}`", ", ".join(where), what])
    return table(("kind", "in", "meaning, and what to do"), rows)


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)


def wire_limits() -> str:
    """Every limit, with the comment beside its constant."""
    rows = []
    for what, module, name in LIMITS:
        unit = " ms" if name.endswith("_MS") else " s" if name.endswith("_S") and "_PER_" not in name else ""
        rows.append([what, _figure(getattr(module, name)) + unit, _comment(module, name), f"`{name}`"])
    return table(("limit of", "figure", "unit and reason", "in the code"), rows)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"


def _comment(module: ModuleType, name: str) -> str:
    source = inspect.getsource(module)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and name in {at.id for at in ast.walk(node) if isinstance(at, ast.Name)}:
            line = source.splitlines()[node.lineno - 1]
            found = re.search(r"#\s*(.+)$", line)
            assert found is not None, f"{module.__name__}.{name} has no comment that says its unit and reason"
            return found[1].rstrip(",")
    raise AssertionError(f"{module.__name__} has no {name}")


def wire_endpoints() -> str:
    """The endpoints."""
    rows = [[f"`{name}`", one.endpoint, one.socket, one.connects, one.says] for name, one in SERVERS.items()]
    return table(("key", "default", "socket there", "you connect a", "carries"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "wire-endpoints": wire_endpoints,
    "wire-topics": wire_topics,
    "wire-header": wire_header,
    "wire-messages": wire_messages,
    "wire-requests": wire_requests,
    "wire-beat": wire_beat,
    "wire-telemetry": wire_telemetry,
    "wire-direct": wire_direct,
    "wire-questions": lambda: fields(questions.Question) + "\n" + fields(questions.Answer),
    "wire-refusals": wire_refusals,
    "wire-limits": wire_limits,
}
