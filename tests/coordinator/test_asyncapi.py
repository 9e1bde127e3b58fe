"""The AsyncAPI document: valid by AsyncAPI's own schema, true of the messages, and as complete as the policy."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, get_args

import jsonschema
import msgpack
import msgspec
import pytest

from interlock.broker import commands, facts, protocol, wire
from interlock.broker.errors import Refused
from interlock.coordinator import asyncapi, catalogue
from interlock.coordinator.catalogue import DIRECT, TELEMETRY, TOPICS, Kind

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "asyncapi.json"
KINDS = list(catalogue.kinds())
EVERY_BODY = get_args(wire.Body)


@cache
def official() -> jsonschema.Draft7Validator:
    """AsyncAPI's schema of version 3.0.0, as the AsyncAPI Initiative publishes it; tests/asyncapi has its licence."""
    schema = json.loads((ROOT / "tests" / "asyncapi" / "3.0.0.json").read_text("utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def document() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(asyncapi.rendered())
    return tree


def validator(schema: str) -> jsonschema.Draft7Validator:
    """Of one schema of the document, with all that it refers to."""
    return jsonschema.Draft7Validator({"allOf": [{"$ref": schema}], "components": document()["components"]})


def test_the_document_is_valid_by_the_schema_of_asyncapi() -> None:
    errors = [f"{list(error.absolute_path)}: {error.message}" for error in official().iter_errors(document())]
    assert errors == []


@pytest.mark.parametrize(
    "path",
    [
        ("asyncapi",),
        ("info", "version"),
        ("servers", "events", "host"),
        ("operations", "ping", "action"),
        ("channels", "feed-beats", "address"),
        ("components", "securitySchemes", "curve", "type"),
        ("components", "schemas", "Batch", "type"),
    ],
)
def test_that_schema_finds_what_is_wrong(path: tuple[str, ...]) -> None:
    broken = copy.deepcopy(document())
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    assert path[-1] in inner
    inner[path[-1]] = 4711
    assert not official().is_valid(broken)


def test_every_reference_in_the_document_leads_somewhere() -> None:
    tree = document()
    found = set()

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                found.add(part["$ref"])
            for inner in part.values():
                walk(inner)
        elif isinstance(part, list):
            for inner in part:
                walk(inner)

    walk(tree)
    assert len(found) > 100
    for reference in found:
        at = tree
        for key in reference.removeprefix("#/").split("/"):
            assert key in at, reference
            at = at[key]


def test_the_kept_document_is_what_the_verb_prints() -> None:
    command = [sys.executable, "-c", "import sys; from interlock.coordinator.cli import main; sys.exit(main())"]
    printed = subprocess.run([*command, "asyncapi"], capture_output=True, text=True, check=True).stdout
    assert printed == KEPT.read_text("utf-8"), "old; run: interlock asyncapi > docs/asyncapi.json"


# --- true of the messages


def as_json(packed: bytes) -> Any:
    """What an outsider reads, as JSON has it."""
    return json.loads(msgspec.json.encode(msgpack.unpackb(packed)))


@pytest.mark.parametrize("kind", KINDS, ids=asyncapi.name_of)
def test_an_encoded_message_fits_its_schema_and_comes_back_from_its_example(kind: Kind) -> None:
    message = catalogue.example(kind)
    name = asyncapi.name_of(kind)
    entry = document()["components"]["messages"][name]
    of_schema = validator(entry["payload"]["$ref"])
    packed = wire.encode(message)
    of_schema.validate(as_json(packed))
    assert msgspec.msgpack.decode(packed, type=kind) == message
    (given,) = entry["examples"]
    of_schema.validate(given["payload"])
    assert msgspec.convert(given["payload"], kind, builtin_types=()) == message


@pytest.mark.parametrize("kind", KINDS, ids=asyncapi.name_of)
def test_a_message_without_one_of_its_needed_keys_does_not_fit(kind: Kind) -> None:
    of_schema = validator(f"#/components/schemas/{asyncapi.name_of(kind)}")
    whole = as_json(wire.encode(catalogue.example(kind)))
    for field in msgspec.structs.fields(kind):
        if field.required:
            assert not of_schema.is_valid({key: value for key, value in whole.items() if key != field.encode_name})


def test_the_headers_of_the_feed_and_of_publishers_fit_theirs() -> None:
    logged = wire.Header(id="1", source="host/alpha", time=1.5, seq=7, prev=3, logged=2.0, sig=b"\xff\x00")
    live = protocol.LiveHeader(**msgspec.structs.asdict(logged), since=0, recent={"fact/host/alpha/": 3})
    validator("#/components/schemas/Header").validate(as_json(wire.encode(logged)))
    validator("#/components/schemas/LiveHeader").validate(as_json(wire.encode(live)))
    assert not validator("#/components/schemas/LiveHeader").is_valid(as_json(wire.encode(logged)))


# --- complete


def test_every_message_of_an_event_stands_under_a_topic_or_goes_to_a_host() -> None:
    assert {kind for topic in TOPICS for kind in topic.kinds} | set(DIRECT) == set(EVERY_BODY)
    assert set(EVERY_BODY) == {*get_args(commands.Command), *get_args(facts.Fact)}


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.address)
def test_a_topic_has_the_messages_that_somebody_may_publish_there_and_no_others(topic: catalogue.Topic) -> None:
    may = {kind for kind in EVERY_BODY if catalogue.publishers(topic, kind)}
    assert may == set(topic.kinds)
    assert catalogue.hearers(topic)


def test_a_host_is_asked_directly_what_somebody_may_ask() -> None:
    assert {kind for kind in EVERY_BODY if catalogue.askers(kind)} == set(DIRECT)
    assert catalogue.senders() == ["coordinator", "rules", "host", "monitor", "broker"]
    assert "subscriber" in catalogue.hearers(TELEMETRY)


def test_every_request_and_answer_of_the_protocols_is_in_the_catalogue() -> None:
    asked = {exchange.request for exchange in catalogue.EXCHANGES}
    answers = {answer for exchange in catalogue.EXCHANGES for answer in exchange.answers}
    assert set(get_args(protocol.Request)) <= asked
    assert set(get_args(protocol.Answer)) <= answers


def test_no_body_of_an_event_has_a_key_that_means_the_version_elsewhere() -> None:
    assert [kind for kind in EVERY_BODY if "v" in kind.__struct_fields__] == []


def test_every_field_says_what_it_means() -> None:
    silent = []
    for name, schema in document()["components"]["schemas"].items():
        assert schema["description"], name
        for key, field in schema.get("properties", {}).items():
            if key not in ("type", "op") and "description" not in field and "$ref" not in field:
                silent.append(f"{name}.{key}")
    assert silent == []


def test_a_subscriber_may_publish_nothing_that_the_catalogue_knows_and_a_monitor_only_of_gpus() -> None:
    for topic in TOPICS:
        for kind in topic.kinds:
            publishers = catalogue.publishers(topic, kind)
            assert "subscriber" not in publishers
            assert ("monitor" in publishers) == topic.address.startswith("fact/gpu/")
    with pytest.raises(Refused):
        catalogue.policy.subscribe(catalogue._grant("subscriber", "fact/"), ["command/"])
