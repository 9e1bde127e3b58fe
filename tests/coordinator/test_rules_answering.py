"""Questions to the live engine: what it answers from its own series, and what it refuses before that costs anything."""

from __future__ import annotations

import time

import msgspec
import pytest

from interlock.broker import policy
from interlock.broker.errors import ConfigError, Refused
from interlock.broker.keys import Grant
from interlock.broker.questions import MAX_EXPR, QUESTIONS, Answer, Desk, Question
from interlock.broker.rejects import Rejects
from interlock.broker.samples import Labels, labels
from interlock.broker.wire import MAX_FRAME
from interlock.coordinator.rules import answering
from interlock.coordinator.rules.engine import Engine
from interlock.coordinator.rules.rulefile import parse_rules

T0 = 1_800_000_000.0
RULES = """
groups: [{name: g, rules: [
  {alert: hot, expr: "temperature > 90", for: 2s, x_action: rollback,
   annotations: {summary: "{{ $labels.host }} burns"}},
  {alert: rising, expr: "rate(requests_total[10s]) > 5"},
  {alert: hot, labels: {severity: page}, expr: "topk(1, temperature) > 95"}]}]
"""


def ready(hosts: int = 3, seconds: int = 10) -> Engine:
    engine = Engine(parse_rules(RULES, file="r.yml"))
    for second in range(seconds + 1):
        samples: dict[Labels, float] = {}
        for number in range(hosts):
            samples[labels("temperature", host=f"h{number}")] = 91.0 + number
            samples[labels("requests_total", host=f"h{number}")] = 10.0 * second
            samples[labels("unwatched", host=f"h{number}")] = float(second)
        engine.ingest(samples.items(), (), T0 + second, T0 + second)
        engine.tick(T0 + second)
    return engine


def asked(engine: Engine, *, at: float = T0 + 10, **question: object) -> dict[str, object]:
    return answering.answer(engine, Question(id="q", **question), at)  # type: ignore[arg-type]


def test_an_expression_is_answered_from_the_engine_s_own_series_and_rings() -> None:
    engine = ready()
    told = asked(engine, expr="sum(temperature)")
    assert told == {
        "expr": "sum(temperature)",
        "time": T0 + 10,
        "elements": [{"labels": {}, "value": 276.0}],
        "more": 0,
    }
    rates = asked(engine, expr="rate(requests_total[5s])")["elements"]
    assert [round(row["value"], 6) for row in rates] == [10.0] * 3  # type: ignore[attr-defined, index]
    assert len(asked(engine, expr="unwatched")["elements"]) == 3  # type: ignore[arg-type]
    assert asked(engine, expr="2 * 21")["elements"] == [{"labels": {}, "value": 42.0}]


def test_a_moment_that_passed_is_answered_from_the_rings() -> None:
    told = asked(ready(), expr="requests_total", time=T0 + 5)["elements"]
    assert {row["value"] for row in told} == {50.0}  # type: ignore[attr-defined, index]


def test_an_alert_is_explained_from_the_engine_s_own_state() -> None:
    told = asked(ready(), alert="hot")
    first, second = told["rules"]  # type: ignore[misc]
    assert (first["tier"], first["for"], first["action"], first["error"]) == ("incremental", 2.0, "rollback", "")
    assert (second["tier"], second["why"]) == ("batch", "topk looks at all elements together")
    assert [part["expr"] for part in first["parts"]] == ["temperature > 90", "temperature"]
    assert [row["value"] for row in first["parts"][0]["elements"]] == [91.0, 92.0, 93.0]
    alerts = told["alerts"]
    assert {each["state"] for each in alerts} == {"firing"}  # type: ignore[attr-defined, index]
    assert {each["since"] for each in alerts} == {T0}  # type: ignore[attr-defined, index]
    assert "h0 burns" in {each["summary"] for each in alerts}  # type: ignore[attr-defined, index]


def test_what_asks_for_nothing_known_says_what_there_is() -> None:
    engine = ready()
    with pytest.raises(ConfigError, match="there is no alert 'hto'") as caught:
        asked(engine, alert="hto")
    assert "hot, rising" in caught.value.hint
    for wrong in ({}, {"expr": "a", "alert": "hot"}, {"expr": "a >"}, {"expr": "nosuch(a)"}):
        with pytest.raises(ConfigError):
            asked(engine, **wrong)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("rate(unwatched[5s])", "keeps unwatched"),  # nobody's window: it would look like silence
        ("rate(requests_total[1h])", "3600 s are asked for"),
        ("max_over_time(sum(requests_total)[9s:1ms])", "elements and samples"),
        ('temperature{host=~"(h+)+"}', "regular expression"),
        ('temperature{host=~".*.*.*.*x"}', "regular expression"),
        ('label_replace(temperature, "a", "$1", "host", "(a*)*b")', "regular expression"),
        ("count_over_time(temperature[5s:1ms])", "elements and samples|keeps"),
    ],
)
def test_what_would_explode_or_has_no_samples_is_refused_with_the_way_out(expression: str, reason: str) -> None:
    with pytest.raises((Refused, ConfigError), match=reason) as caught:
        asked(ready(), expr=expression)
    assert "--listen" in caught.value.hint


def test_a_selector_without_a_metric_is_refused_where_there_are_too_many_series(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answering, "MAX_LOOKS", 5)
    with pytest.raises(Refused, match="held against 9 series"):
        asked(ready(), expr='count({host="h1"})')
    assert asked(ready(), expr="count(temperature)")["elements"] == [{"labels": {}, "value": 3.0}]


def test_no_question_keeps_the_engine_from_its_samples_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget counts what is done, so that the bound holds on a machine of any speed."""
    engine = ready(hosts=400, seconds=2)
    monkeypatch.setattr(answering, "MAX_WORK", 1000)
    done = []
    for text in ("temperature + temperature", "sort(temperature) + 1 + 1 + 1", "max_over_time(temperature[2s:10ms])"):
        with pytest.raises((ConfigError, Refused)):
            asked(engine, expr=text, at=T0 + 2)
        done.append(text)
    assert len(done) == 3
    told = asked(engine, alert="hot", at=T0 + 2)
    assert any("more than 1000" in part["error"] for rule in told["rules"] for part in rule["parts"])  # type: ignore[attr-defined]


def test_an_answer_says_how_many_elements_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "MAX_ELEMENTS", 2)
    told = asked(ready(), expr="temperature")
    assert (len(told["elements"]), told["more"]) == (2, 1)  # type: ignore[arg-type]


# --- the desk


def desk(respond: object = None) -> Desk:
    return Desk(respond or (lambda question: {"expr": question.expr}), None, Rejects("test"), time.time())  # type: ignore[arg-type]


def read(frame: bytes) -> Answer:
    return msgspec.msgpack.decode(frame, type=Answer)


@pytest.mark.parametrize(
    "frames",
    [
        [], [b""], [b"\xc1"], [b"x"], [b"\x80", b"\x80"], [msgspec.msgpack.encode({"expr": "a"})],
        [msgspec.msgpack.encode({"id": "1", "expr": "a" * (MAX_EXPR + 1)})],
        [msgspec.msgpack.encode({"id": "1", "time": "now"})], [b"\x91" * 5000],
    ],
)  # fmt: skip
def test_what_is_no_question_is_answered_with_that(frames: list[bytes]) -> None:
    answer = read(desk().answer("", frames, 0.0))
    assert (answer.ok, answer.kind) == (False, "invalid")


def test_who_asks_too_often_waits_and_an_answer_that_is_too_large_is_none() -> None:
    now = 1000.0
    place = Desk(lambda question: {}, None, Rejects("test"), now)
    frame = msgspec.msgpack.encode(Question(id="1", expr="a"))
    answers = [read(place.answer("", [frame], now)) for _ in range(int(QUESTIONS) + 1)]
    assert [each.ok for each in answers] == [True] * int(QUESTIONS) + [False]
    assert answers[-1].kind == "refused"
    assert read(place.answer("", [frame], now + 1)).ok
    large = Desk(lambda question: "x" * (MAX_FRAME + 1), None, Rejects("test"), now)
    answer = read(large.answer("", [frame], now))
    assert (answer.ok, answer.hint) == (False, "ask for less")


def test_operators_may_ask_and_others_not() -> None:
    for role, may in (
        ("operator", True),
        ("coordinator", True),
        ("host", False),
        ("monitor", False),
        ("subscriber", False),
    ):
        grant = Grant(identity=f"{role}/x", curve="")
        if may:
            policy.ask(grant)
        else:
            with pytest.raises(Refused):
                policy.ask(grant)
