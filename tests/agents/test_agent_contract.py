"""What a class offers, and how a request becomes a call: without a process."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.agents.agent import MAX_METRICS, Agent, Metrics, RequestError, background, handler, thread
from interlock.agents.contract import (
    MAX_REPLY,
    ContractError,
    bind_arguments,
    contract_of,
    decode_map,
    encoding_of,
    health_of,
    name_action,
    reply_error,
    reply_ok,
)
from interlock.agents.instance import HandlerContract, contract_gaps


class Point(msgspec.Struct):
    x: float
    y: float = 0.0


class Tutor(Agent):
    @handler("ask", idempotent=True)
    async def ask(self, question: str, limit: int = 3) -> dict[str, Any]:
        return {"question": question, "limit": limit}

    @handler(side_effects=True)
    def place(self, point: Point, when: date | None = None, kind: Literal["a", "b"] = "a") -> dict[str, Any]:
        return {"x": point.x}

    @handler("store.anything")
    async def anything(self, key, **rest: Any) -> dict[str, Any]:  # type: ignore[no-untyped-def]
        return rest

    @background
    async def refresh(self) -> None: ...

    @thread
    def crunch(self, stop: threading.Event) -> None: ...


CONTRACT = contract_of(Tutor)


def refused(action: str, **arguments: Any) -> str:
    with pytest.raises(RequestError) as caught:
        bind_arguments(CONTRACT.actions[action], {"action": action, **arguments})
    assert caught.value.code == "bad-request"
    return caught.value.message


def test_a_contract_lists_actions_with_their_types_and_what_runs_beside() -> None:
    assert CONTRACT.describe() == {
        "ask": {"idempotent": True, "side_effects": False, "parameters": {"question": "str", "limit": "int = ..."}},
        "place": {
            "idempotent": False,
            "side_effects": True,
            "parameters": {"point": "Point", "when": "datetime.date | None = ...", "kind": "Literal['a', 'b'] = ..."},
        },
        "store.anything": {"idempotent": False, "side_effects": False, "parameters": {"key": "Any", "**": "Any"}},
    }
    assert CONTRACT.backgrounds == ["refresh"]
    assert CONTRACT.threads == ["crunch"]
    assert CONTRACT.actions["place"].blocking
    assert not CONTRACT.actions["ask"].blocking


def test_handlers_are_inherited_and_a_plain_override_takes_one_away() -> None:
    class Child(Tutor):
        @handler("more")
        async def more(self) -> None: ...

        async def ask(self, question: str, limit: int = 3) -> dict[str, Any]:
            return {}

    assert sorted(contract_of(Child).actions) == ["more", "place", "store.anything"]


def test_arguments_are_converted_to_their_types() -> None:
    arguments = bind_arguments(CONTRACT.actions["place"], {"action": "place", "point": {"x": 1}, "when": "2024-02-29"})
    assert arguments == {"point": Point(1.0, 0.0), "when": date(2024, 2, 29)}
    assert bind_arguments(CONTRACT.actions["store.anything"], {"key": None, "b": 2}) == {"key": None, "b": 2}


def test_a_wrong_argument_is_named() -> None:
    assert refused("ask", question=3) == "argument 'question': expected `str`, got `int`"
    assert refused("ask", question="q", limit="3") == "argument 'limit': expected `int`, got `str`"
    assert refused("ask", question="q", limit=True) == "argument 'limit': expected `int`, got `bool`"
    assert refused("ask") == "argument 'question' is missing; it is of type str"
    assert refused("ask", question="q", limti=1) == "unknown argument 'limti'; did you mean 'limit'?"
    assert refused("place", point={"x": "far"}) == "argument 'point': expected `float`, got `str` - at `$.x`"
    assert refused("place", point={"x": 1}, kind="c").startswith("argument 'kind': invalid enum value 'c'")


def test_an_unknown_action_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RequestError) as caught:
        name_action({"action": "aks"}, CONTRACT.actions)
    assert caught.value.code == "unknown-action"
    assert caught.value.message == "no action 'aks'; known: ask, health, place, store.anything"
    for request in ({}, {"action": 3}, {"action": None}):
        with pytest.raises(RequestError, match='the request needs the key "action"'):
            name_action(request, CONTRACT.actions)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), values, max_size=6))
def test_a_request_means_the_same_in_json_and_in_messagepack(request: dict[str, Any]) -> None:
    packed = msgpack.packb(request)
    text = json.dumps(request).encode()
    assert encoding_of(packed) == "msgpack"
    assert encoding_of(text) == "json"
    assert decode_map(packed) == request
    assert decode_map(text) == request


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | values.map(msgpack.packb))
def test_any_bytes_are_a_map_or_a_bad_request(body: bytes) -> None:
    try:
        request = decode_map(body)
    except RequestError as error:
        decode_map(reply_error(error.code, error.message, encoding_of(body)))
    else:
        assert all(isinstance(key, str) for key in request)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"3",
        b'{"a":' * 100_000,
        b"\x81\xa1a" * 100_000,
        b"\x81\x01\x02",
        b"\xdf\xff\xff\xff\xff",
        b"\xc1",
    ],
)
def test_a_hostile_body_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(RequestError, match="not a JSON object or MessagePack map"):
        decode_map(body)


def test_replies_carry_the_result_beside_the_status() -> None:
    @dataclass
    class Answer:
        text: str

    assert json.loads(reply_ok({"a": 1}, "json")) == {"status": "ok", "a": 1}
    assert msgpack.unpackb(reply_ok(Point(1.5), "msgpack")) == {"status": "ok", "x": 1.5, "y": 0.0}
    assert json.loads(reply_ok(Answer("hi"), "json")) == {"status": "ok", "text": "hi"}
    assert json.loads(reply_ok(None, "json")) == {"status": "ok"}
    assert json.loads(reply_error("code", "bad \udcff path", "json"))["error"] == {
        "code": "code",
        "message": "bad ? path",
    }


def test_a_result_that_can_not_be_sent_is_a_fault_of_the_handler() -> None:
    with pytest.raises(TypeError, match="returned list"):
        reply_ok([1], "json")
    with pytest.raises(TypeError, match='the key "status"'):
        reply_ok({"status": "fine"}, "json")
    with pytest.raises(TypeError):
        reply_ok({"a": object()}, "json")
    with pytest.raises(RequestError, match="bytes, at most"):
        reply_ok({"a": "x" * MAX_REPLY}, "json")


def faulty(body: dict[str, Any]) -> str:
    with pytest.raises(ContractError) as caught:
        contract_of(type("Faulty", (Agent,), body))
    assert caught.value.file == __file__
    assert caught.value.line > 1
    return caught.value.what


def test_a_handler_that_can_not_be_called_by_name_is_refused_with_its_line() -> None:
    @handler("a")
    async def by_position(self: Any, x: int, /) -> None: ...

    @handler("a")
    async def twice(self: Any) -> None: ...

    @handler("a")
    async def action_argument(self: Any, action: str) -> None: ...

    @handler("health")
    async def own_health(self: Any) -> None: ...

    @handler("a")
    async def generator(self: Any) -> Any:
        yield 1

    @handler("a")
    async def unknown_type(self: Any, x: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    @background
    def plain(self: Any) -> None: ...

    @thread
    def no_stop(self: Any) -> None: ...

    @thread
    async def not_a_thread(self: Any, stop: threading.Event) -> None: ...

    assert "can't be given by name" in faulty({"m": by_position})
    assert "has two handlers, m and n" in faulty({"m": twice, "n": twice})
    assert 'can\'t be called "action"' in faulty({"m": action_argument})
    assert "override the method health()" in faulty({"m": own_health})
    assert "is a generator" in faulty({"m": generator})
    assert "annotations can't be evaluated" in faulty({"m": unknown_type})
    assert "is not an async def" in faulty({"m": plain})
    assert "should take one argument: stop" in faulty({"m": no_stop})
    assert "should be a plain def" in faulty({"m": not_a_thread})


def test_decorators_say_how_they_are_written() -> None:
    with pytest.raises(TypeError, match="with parentheses"):
        handler(lambda self: None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="can't be an action"):
        handler("two words")


def test_health_takes_what_is_natural_to_return() -> None:
    assert health_of(None) == (True, "")
    assert health_of(True) == (True, "")
    assert health_of(False) == (False, "health() returned False")
    assert health_of({"ok": False, "detail": "no model"}) == (False, "no model")
    assert health_of({"queue": 3}) == (True, "queue=3")
    assert health_of(3)[0] is False


def test_metrics_count_and_hold_and_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    metrics.gauge("queue", 3)
    metrics.gauge("queue", 2)
    metrics.counter("answers").add()
    metrics.counter("answers").add(2)
    assert metrics.values() == {"queue": 2.0, "answers": 3.0}
    with pytest.raises(ValueError, match="a counter can't grow by -1"):
        metrics.counter("answers").add(-1)
    with pytest.raises(ValueError, match="already of the other kind"):
        metrics.gauge("answers", 1)
    with pytest.raises(ValueError, match="can't be a metric"):
        metrics.gauge("no spaces", 1)
    for number in range(2 * MAX_METRICS):
        metrics.gauge(f"g{number}", 1)
    metrics.counter("late").add()
    assert len(metrics.values()) == MAX_METRICS
    assert caplog.text.count("dropped") == 1


def test_gaps_between_contracts_are_what_clients_would_miss() -> None:
    def gaps(old: dict[str, str], new: dict[str, str]) -> list[str]:
        return contract_gaps({"a": HandlerContract(parameters=old)}, {"a": HandlerContract(parameters=new)})

    assert gaps({"x": "int"}, {"x": "int = ..."}) == []
    assert gaps({"x": "int"}, {"x": "Any", "y": "str = ..."}) == []
    assert gaps({"x": "int"}, {"**": "Any"}) == []
    assert gaps({"x": "int"}, {}) == ["action 'a' no longer takes 'x'"]
    assert gaps({"x": "int"}, {"x": "str"}) == ["action 'a': 'x' was int, is str"]
    assert gaps({"x": "int = ..."}, {"x": "int"}) == ["action 'a': 'x' had a default, has none"]
    assert gaps({}, {"y": "int"}) == ["action 'a' needs a new argument 'y'"]
    assert contract_gaps({"a": HandlerContract()}, {"b": HandlerContract()}) == ["action 'a' is gone"]
    assert contract_gaps({"a": HandlerContract(idempotent=True)}, {"a": HandlerContract()}) == [
        "action 'a' is not idempotent any more"
    ]
