"""The codecs: whatever is sent comes back, plain MessagePack programs read it, and garbage is a WireError."""

from __future__ import annotations

from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.broker import commands, facts, wire
from interlock.broker.commands import Breach
from interlock.broker.errors import WireError
from interlock.broker.samples import Announcement, Batch

KINDS = get_args(wire.Body)
TEXT = st.text(max_size=20)
NUMBERS = st.floats(allow_nan=False)

FIELDS: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: st.integers(-(2**63), 2**64 - 1),
    float: NUMBERS,
    bool: st.booleans(),
    bytes: st.binary(max_size=20),
    Breach: st.builds(Breach, by=TEXT, reason=TEXT, labels=st.dictionaries(TEXT, TEXT, max_size=3)),
}


def bodies(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any value of a kind of message: required fields are drawn, of optional ones some."""
    fields, plain, bounded = {}, get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        annotation = plain[field.name]
        bounds = [meta for meta in getattr(bounded[field.name], "__metadata__", ()) if meta.le is not None]
        if bounds:
            numbers = st.integers if annotation is int else st.floats
            fields[field.encode_name] = numbers(bounds[0].ge, bounds[0].le)
        elif annotation in FIELDS:
            fields[field.encode_name] = FIELDS[annotation]
        elif field.required and get_origin(annotation) is list:
            fields[field.encode_name] = st.just([])
        elif field.required:
            values = get_args(annotation)
            fields[field.encode_name] = (
                st.sampled_from(values) if values and isinstance(values[0], str) else st.just({})
            )
    return st.builds(kind, **fields)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_kind_of_message_comes_back_as_it_was_and_is_a_plain_map_to_others(
    kind: type[Any], data: st.DataObject
) -> None:
    body = data.draw(bodies(kind))
    raw = wire.encode(body)
    assert wire.decode_body(raw) == body
    plain = msgpack.unpackb(raw)
    assert plain["type"] == kind.__struct_config__.tag
    assert wire.decode_body(msgpack.packb(plain)) == body


def test_the_types_of_messages_are_all_different() -> None:
    tags = [kind.__struct_config__.tag for kind in KINDS]
    assert len(set(tags)) == len(tags)


@settings(max_examples=300, deadline=None)
@given(frames=st.lists(st.binary(max_size=200), max_size=5))
def test_garbage_is_a_wire_error_and_nothing_else(frames: list[bytes]) -> None:
    for decode in (wire.decode_event, wire.decode_batch):
        with pytest.raises(WireError):
            decode(frames)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_message_is_a_message_or_a_wire_error(data: st.DataObject) -> None:
    body = data.draw(bodies(data.draw(st.sampled_from(KINDS))))
    raw = bytearray(wire.encode(body))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))

    def outcome() -> Any:
        try:
            return wire.decode_body(bytes(raw))
        except WireError as error:
            return str(error)

    assert outcome()


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x81" * 200_000,  # nested deeper than any stack
        b"\x80",
        b"\x81\xa4type\xa7unknown",
        b"\x00" * (wire.MAX_FRAME + 1),
        msgpack.packb({"type": "host-down", "host": 3}),
        msgpack.packb([1, 2, 3]),
    ],
)
def test_what_is_no_body_is_refused_in_one_line(frame: bytes) -> None:
    with pytest.raises(WireError) as raised:
        wire.decode_body(frame)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("evidence", "why"),
    [
        ({"x": b"bytes"}, "a bytes"),
        ({"x": msgspec.msgpack.Ext(5, b"x")}, "a Ext"),
        ({"x": msgspec.Raw(b"\xd6\xff\0\0\0\0")}, "a datetime"),
        ({"x": {1: 2}}, "no text"),
        ({"x": [{(1, 2): 3}]}, "no text"),
        ({"x": msgspec.Raw(b"\x91" * wire.MAX_NESTING + b"\xc0")}, "nested too deeply"),
        ({"x": msgspec.Raw(b"\x81\xa1k" * 500 + b"\xc0")}, "nested too deeply"),
    ],
)
def test_evidence_that_json_can_t_say_is_refused(evidence: dict[str, Any], why: str) -> None:
    """It was logged, and ended whatever folded or printed it: the coordinator, at each of its starts."""
    body = facts.StepDone(host="a", agent="b", migration="m", epoch=1, step="commit", command="c", evidence=evidence)
    with pytest.raises(WireError, match=why):
        wire.decode_body(wire.encode(body))


def test_evidence_may_be_as_deep_as_the_limit_says() -> None:
    deep: Any = None
    for _ in range(wire.MAX_NESTING - 2):
        deep = [deep]
    body = facts.StepDone(host="a", agent="b", migration="m", epoch=1, step="commit", command="c", evidence={"x": deep})
    assert wire.decode_body(wire.encode(body)) == body


@pytest.mark.parametrize(
    "field",
    [{"epoch": -1}, {"epoch": 2**64 - 1}, {"lease_s": float("nan")}, {"lease_s": float("inf")}, {"lease_s": -1.0}],
)
def test_a_command_with_numbers_at_which_clocks_and_journals_break_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="Expected"):
        wire.decode_body(
            wire.encode(commands.RenewLease(**{"migration": "m", "agent": "a", "epoch": 1, "lease_s": 1.0} | field))
        )


def test_an_event_keeps_the_bytes_of_its_body() -> None:
    raw = wire.encode(facts.HostDown(host="alpha"))
    header = wire.Header(id="1", source="host/alpha", time=1.5, seq=7, prev=3, logged=2.0)
    event = wire.Event("fact/host/alpha/", header, facts.HostDown(host="alpha"), raw)
    assert wire.decode_event(wire.encode_event(event)) == event


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(1, 1000), max_size=20),
    labels=st.dictionaries(TEXT, TEXT, max_size=4),
    time=NUMBERS,
    value=st.floats(),
)
def test_a_batch_comes_back_nan_and_infinity_included(
    ids: list[int], labels: dict[str, str], time: float, value: float
) -> None:
    batch = Batch(
        source="alpha/monitor", epoch=1, seq=2, time=time, series=[Announcement(1, labels)], ids=ids,
        values=[value] * len(ids),
    )  # fmt: skip
    back = wire.decode_batch([b"telemetry/alpha/monitor/", wire.encode(batch)])
    assert wire.encode(back) == wire.encode(batch)
    assert msgpack.unpackb(wire.encode(batch))["series"] == [[1, labels]]


def test_ids_without_values_are_refused() -> None:
    batch = Batch(source="a", epoch=1, seq=1, time=0.0, ids=[1, 2], values=[1.0])
    with pytest.raises(WireError, match="2 ids but 1 values"):
        wire.decode_batch([b"t/", wire.encode(batch)])


def test_a_topic_that_is_not_ascii_or_too_long_is_refused() -> None:
    for topic in ("ü".encode(), b"x" * (wire.MAX_TOPIC + 1)):
        with pytest.raises(WireError, match="topic"):
            wire.decode_topic(topic)


def test_commands_and_facts_do_not_share_a_type() -> None:
    assert not set(get_args(commands.Command)) & set(get_args(facts.Fact))
