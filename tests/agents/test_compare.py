"""Shadow comparison: what counts as a difference between two answers."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.agents.answers import MAX_ERROR_ANSWER, error_answer, is_error
from interlock.agents.compare import covers, difference, handler_of
from interlock.agents.values import decode_answer
from interlock.broker.config import CompareConfig, HandlerCompare

EXACT = CompareConfig()


def compare(old: Any, new: Any, config: CompareConfig = EXACT) -> str:
    """The difference of two values as JSON; as MessagePack it must be the same."""
    found = difference([json.dumps(old).encode()], [json.dumps(new).encode()], config)
    packed = difference([msgspec.msgpack.encode(old)], [msgspec.msgpack.encode(new)], config)
    assert found == packed
    return found


def test_the_order_of_keys_and_the_kind_of_number_do_not_matter() -> None:
    assert compare({"a": 1, "b": 2.5}, {"b": 2.5, "a": 1.0}) == ""


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, "$.a.b[1]: 2, not 3"),
        ({"a": 1}, {}, "$.a: lacks 1"),
        ({}, {"new key": {}}, "$.'new key': has a map of 0, not expected"),
        ({"a": [1]}, {"a": [1, 2]}, "$.a: 1 elements, not 2"),
        ({"a": True}, {"a": 1}, "$.a: True, not 1"),
        ({"a": "true"}, {"a": True}, "$.a: 'true', not True"),
        ({"a": None}, {"a": {}}, "$.a: None, not a map of 0"),
        ([1], {"0": 1}, "$: a list of 1, not a map of 1"),
    ],
)
def test_a_difference_names_the_place_and_both_values(old: Any, new: Any, text: str) -> None:
    assert compare(old, new) == text


def test_long_values_are_shortened() -> None:
    assert len(compare({"a": "x" * 100_000}, {"a": "y" * 100_000})) < 200


def test_ignored_keys_may_differ_or_lack_at_any_depth() -> None:
    config = CompareConfig(ignore=["time", "id"])
    assert compare({"time": 1, "a": [{"id": 1, "b": 2}]}, {"a": [{"id": 2, "b": 2}], "time": {}}, config) == ""
    assert compare({"time": 1}, {}, config) == ""
    assert compare({"time": 1, "a": 1}, {"a": 2}, config) == "$.a: 1, not 2"


def test_numbers_may_differ_by_the_tolerance_relative_to_the_larger() -> None:
    config = CompareConfig(tolerance=0.01)
    assert compare([100.0, 5], [101.0, 5], config) == ""
    assert compare([100.0], [102.0], config) == "$[0]: 100.0, not 102.0"
    assert compare([0.0], [1e-9], config) != ""
    assert compare(["100"], ["101"], config) != ""


def test_a_nan_equals_a_nan() -> None:
    nan = msgspec.msgpack.encode({"a": float("nan"), "b": 1})
    other = msgspec.msgpack.encode({"b": 1, "a": float("nan")})
    assert difference([nan], [other], EXACT) == ""


def test_bytes_that_are_neither_encoding_are_compared_as_they_are() -> None:
    assert difference([b"\xc1raw"], [b"\xc1raw"], EXACT) == ""
    assert difference([b"\xc1raw"], [b"\xc1other"], EXACT) == r"b'\xc1raw', not b'\xc1other'"
    assert difference([b""], [b"{}"], EXACT) == "b'', not b'{}'"


def test_another_encoding_is_a_difference_since_the_client_must_read_it() -> None:
    assert difference([b"{}"], [msgspec.msgpack.encode({})], EXACT) == "answered in json, not MessagePack"


def test_frames_are_compared_one_by_one() -> None:
    assert difference([b"{}", b"1"], [b"{}"], EXACT) == "2 frames, not 1"
    assert difference([b"{}", b"1"], [b"{}", b"2"], EXACT) == "frame 1: $: 1, not 2"
    assert difference([b"{}"], None, EXACT) == "no answer"


@pytest.mark.parametrize("bomb", [b"[" * 100_000, b"\x91" * 100_000, b'{"a":' * 50_000])
def test_depth_is_no_danger(bomb: bytes) -> None:
    assert difference([bomb], [bomb + b"1"], EXACT) != ""
    assert not is_error([bomb + b"error"])
    deep = b"[" * 500 + b"1" + b"]" * 500
    assert difference([deep], [deep.replace(b"1", b"2")], EXACT).endswith(": 1, not 2")


@settings(deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_bytes_can_be_compared(old: bytes, new: bytes) -> None:
    assert difference([old], [old], EXACT) == ""
    difference([old], [new], EXACT)
    decode_answer(old)
    is_error([old])
    is_error([old + b"error"])


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(values, values)
def test_a_value_equals_itself_and_what_is_equal_in_one_encoding_is_in_the_other(old: Any, new: Any) -> None:
    assert compare(old, old) == ""
    compare(old, new)


@pytest.mark.parametrize("request_body", [b'{"action": "x"}', msgspec.msgpack.encode({"action": "x"}), b""])
def test_an_error_answer_is_recognised_as_one(request_body: bytes) -> None:
    answer = error_answer([request_body], "timeout", "no answer within 30 s")
    assert is_error([answer])
    assert answer.startswith(b"{") == request_body.startswith(b"{")


def test_what_only_speaks_of_errors_is_none() -> None:
    assert not is_error([b'{"status": "ok", "note": "no error"}'])
    assert not is_error([b'{"errors": 0}'])
    assert not is_error([b'["status", "error"]'])
    assert not is_error([b"error"])
    assert not is_error([b'{"status": "error", "pad": "' + b"x" * MAX_ERROR_ANSWER + b'"}'])


def test_exact_means_the_same_bytes_and_names_the_first_that_differs() -> None:
    assert difference([b'{"a": 1}'], [b'{"a":1}'], EXACT) == ""
    assert difference([b'{"a": 1}'], [b'{"a":1}'], EXACT, exact=True) == "byte 5: b' 1}', not b'1}'"
    assert difference([b"ab", b"c"], [b"ab", b"cd"], EXACT, exact=True) == "frame 1: 1 bytes, not 2"
    assert difference([b"ab"], [b"ab"], EXACT, exact=True) == ""


def test_a_handler_is_found_by_its_action_or_by_the_longest_path_above_it() -> None:
    root, deep, act = (HandlerCompare(tolerance=n) for n in (1.0, 2.0, 3.0))
    handlers = {"GET /": root, "GET /a/b": deep, "act": act}
    assert handler_of("act", handlers) is act
    assert handler_of("other", handlers) is None
    assert handler_of("GET /a/b/c?d=/x", handlers) is deep
    assert handler_of("GET /a/b?c", handlers) is deep
    assert handler_of("GET /a/bc", handlers) is root
    assert handler_of("POST /a/b", handlers) is None
    assert covers("GET /a/", "GET /a/b")
    assert not covers("GET /a/", "GET /a")
