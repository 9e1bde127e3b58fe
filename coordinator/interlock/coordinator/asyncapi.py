"""The AsyncAPI 3 document of the bus, made of the types of its messages: for tools, beside docs/wire.md for people.

It is written from the side of the bus (the broker and the hosts): it receives what others publish, and sends what they
hear. A message is MessagePack; its schema is of the same message in JSON, with binary values in base64. AsyncAPI has no
word for several frames in a message, nor for kinds of sockets: they stand under `x-frames` and `x-zmq`.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import msgspec

from interlock.broker import protocol, telemetry_protocol, wire
from interlock.broker.version import WIRE_VERSION
from interlock.coordinator import catalogue
from interlock.coordinator.catalogue import BEATS, DIRECT, EXCHANGES, FRAMES, REPLY, SERVERS, TELEMETRY, TOPICS, Kind

CONTENT = "application/vnd.msgpack"
PARAMETERS = {
    "host": "a host's name in the fleet file; of telemetry also `fleet`, for roles that belong to no host",
    "agent": "an agent's name in the fleet file",
    "wave": "a wave's id, or `unknown` where there is none",
    "rule": "an alert's name; what a topic can't hold is a dash in it",
    "publisher": "host, monitor, or the role that belongs to no host",
}
# Types of the same name, or with a name that says too little elsewhere.
_NAMES: dict[Kind, str] = {
    protocol.Beat: "FeedBeat",
    telemetry_protocol.Beat: "TelemetryBeat",
    telemetry_protocol.AskFailed: "LastFailed",
    telemetry_protocol.AskLast: "Last",
    telemetry_protocol.Page: "LastPage",
}


def document() -> dict[str, Any]:
    """The whole document as a tree of plain values."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Interlock",
            "version": str(WIRE_VERSION),
            "description": "The bus of Interlock. The version is that of the wire format; docs/wire.md has the rules.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": CONTENT,
        "servers": {name: _server(name) for name in SERVERS},
        "channels": _channels(),
        "operations": _operations(),
        "components": {
            "messages": {name_of(kind): _message(kind) for kind in catalogue.kinds()},
            "schemas": _schemas(),
            "securitySchemes": {
                "curve": {
                    "type": "asymmetricEncryption",
                    "description": "CURVE of ZeroMQ: the server's public key and a key pair of one's own, of 32 bytes "
                    "each, from an enrolment file (docs/security.md). What a key may do goes by its identity.",
                }
            },
        },
    }


def rendered() -> str:
    """The document as JSON text."""
    return msgspec.json.format(msgspec.json.encode(document()), indent=1).decode() + "\n"


def name_of(kind: Kind) -> str:
    """The name of a type in the document."""
    return _NAMES.get(kind, kind.__name__)


# --- parts


def _server(name: str) -> dict[str, Any]:
    server = SERVERS[name]
    return {
        "host": server.endpoint.removeprefix("tcp://"),
        "protocol": "zmq",
        "protocolVersion": "3.1",
        "description": f"{server.says}; the fleet file says where",
        "security": [{"$ref": "#/components/securitySchemes/curve"}],
        "x-zmq": {"socket": server.socket, "connect": server.connects},
    }


def _id(address: str) -> str:
    return re.sub(r"\W+", "-", address).strip("-")


def _channels() -> dict[str, Any]:
    found = {_id(topic.address): _channel(topic.address, topic.says, "feed", topic.kinds) for topic in TOPICS}
    found[_id(TELEMETRY.address)] = _channel(TELEMETRY.address, TELEMETRY.says, "telemetry_out", TELEMETRY.kinds)
    found["telemetry_in"] = _channel(TELEMETRY.address, "batches on their way in", "telemetry_in", TELEMETRY.kinds)
    for server, beat in BEATS.items():
        found[f"{server}-beats"] = _channel("beat/", f"the pulse of {server}", server, (beat,))
    for server in dict.fromkeys(exchange.server for exchange in EXCHANGES):
        here = [exchange for exchange in EXCHANGES if exchange.server == server]
        found[f"{server}-requests"] = _channel(None, "requests", server, [each.request for each in here])
        answers = [answer for each in here for answer in each.answers]
        found[f"{server}-answers"] = _channel(None, "answers, on the connection of the request", server, answers)
    found["control-requests"] = _channel(None, "events for one host, with a topic of that host", "control", DIRECT)
    found["control-answers"] = _channel(None, "answers, on the connection of the event", "control", (REPLY,))
    return found


def _channel(address: str | None, says: str, server: str, kinds: Any) -> dict[str, Any]:
    channel: dict[str, Any] = {
        "address": address,
        "description": says,
        "servers": [{"$ref": f"#/servers/{server}"}],
        "messages": {name_of(kind): {"$ref": f"#/components/messages/{name_of(kind)}"} for kind in kinds},
    }
    names = re.findall(r"\{(\w+)\}", address or "")
    if names:
        channel["parameters"] = {name: {"description": PARAMETERS[name]} for name in names}
    return channel


def _operations() -> dict[str, Any]:
    found = {}
    for topic in TOPICS:
        found[f"hear-{_id(topic.address)}"] = _operation("send", _id(topic.address), topic.says)
    found["hear-telemetry"] = _operation("send", _id(TELEMETRY.address), TELEMETRY.says)
    found["send-telemetry"] = _operation("receive", "telemetry_in", "take batches of samples")
    for server in BEATS:
        found[f"hear-{server}-beats"] = _operation("send", f"{server}-beats", f"the pulse of {server}")
    for exchange in EXCHANGES:
        channel = f"{exchange.server}-requests"
        operation = _operation("receive", channel, _doc(exchange.request), [exchange.request])
        if exchange.answers:
            operation["reply"] = _reply(f"{exchange.server}-answers", exchange.answers)
        found[catalogue.tag(exchange.request)] = operation
    found["ask-host"] = _operation("receive", "control-requests", "take an event past the broker")
    found["ask-host"]["reply"] = _reply("control-answers", (REPLY,))
    return found


def _operation(action: str, channel: str, says: str, kinds: Any = None) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": says,
    }
    if kinds is not None:
        operation["messages"] = _of_channel(channel, kinds)
    return operation


def _reply(channel: str, kinds: Any) -> dict[str, Any]:
    return {"channel": {"$ref": f"#/channels/{channel}"}, "messages": _of_channel(channel, kinds)}


def _of_channel(channel: str, kinds: Any) -> list[dict[str, str]]:
    return [{"$ref": f"#/channels/{channel}/messages/{name_of(kind)}"} for kind in kinds]


def _message(kind: Kind) -> dict[str, Any]:
    message: dict[str, Any] = {
        "name": catalogue.tag(kind),
        "title": name_of(kind),
        "summary": _doc(kind),
        "contentType": CONTENT,
        "payload": {"$ref": f"#/components/schemas/{name_of(kind)}"},
        "examples": [{"payload": plain(catalogue.example(kind))}],
    }
    if kind.__struct_config__.tag_field == "type":
        message["headers"] = {"$ref": "#/components/schemas/LiveHeader"}
        message["x-frames"] = ["topic", "header", "body"]
    elif kind in FRAMES:
        message["x-frames"] = list(FRAMES[kind])
    return message


def _schemas() -> dict[str, Any]:
    found: dict[str, Any] = {}
    every: list[Kind] = [*catalogue.kinds(), wire.Header, protocol.LiveHeader]
    for kind in every:
        _, parts = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
        for name, schema in parts.items():
            known = name_of(kind) if name == kind.__name__ else name
            found[known] = _draft_7(schema) | {"title": known}
    return dict(sorted(found.items()))


def plain(message: Any) -> Any:
    """A message as JSON has it: binary values in base64."""
    return msgspec.to_builtins(message, builtin_types=())


def _draft_7(schema: Any) -> Any:
    """AsyncAPI's schemas are those of JSON Schema draft 7, which says otherwise what an array's first items are."""
    if isinstance(schema, list):
        return [_draft_7(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _draft_7(value) for key, value in schema.items()}
    if "prefixItems" in made:
        rest = made.pop("items", None)
        made["items"] = made.pop("prefixItems")
        if rest is False:
            made["additionalItems"] = False
    return made


def _doc(kind: Kind) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
