"""The two tiers of the engine: what is kept up to date sample by sample equals what is computed anew."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.broker.samples import NAME, Labels, labels
from interlock.coordinator.rules.engine import STARTUP_S, Engine
from interlock.coordinator.rules.evaluate import Evaluation
from interlock.coordinator.rules.operators import quietly
from interlock.coordinator.rules.rulefile import parse_rules
from interlock.coordinator.rules.values import EvaluationError

POINTWISE = [
    "a > 1",
    "1 < a",
    "a != bool 1",
    "-a > -1",
    "a / b",
    "a > on(x) group_left() b",
    "b * on(x) group_right(y) a",
    "sum by (x) (a) - on(x) max by (x) (b)",
    "min by (y) (a) or max without (x) (b)",
    "stddev by (x) (a) >= 0",
    "a and b or a unless b",
    "a and on(x) b > 1",
    "a unless ignoring(y) b == 0",
    "avg without (y) (a) >= bool 1",
    "a + on(x, y) b > 1",
    'absent(a{x="1"})',
    "count(a) > 1 or on() b",
    "clamp(a, 0, 1) == 1 or on(x) b",
    'label_replace(a, "z", "$1", "x", "(.*)") * on(z) group_left() sum by (z) (label_join(b, "z", "", "x"))',
    '{__name__=~"a|b"} + 1',
    "sum(a) / count(a) - avg(a)",
]
WINDOWED = [
    "rate(a[5s])",
    "increase(a[5s]) > 0",
    "delta(a[7s])",
    "irate(a[5s])",
    "idelta(a[5s])",
    "sum_over_time(a[5s])",
    "avg_over_time(a[5s])",
    "count_over_time(a[5s])",
    "last_over_time(a[5s])",
    "first_over_time(a[5s])",
    "present_over_time(a[5s])",
    "changes(a[5s])",
    "resets(a[5s])",
    "sum by (x) (rate(a[5s])) / on(x) count by (x) (increase(b[3s]))",
    'absent_over_time(a{x="1"}[3s])',
    "absent_each(a[3s])",
    "increase(a[5s]) / increase(b[5s]) > 0.05 and increase(b[5s]) >= 1",
]
keys = st.builds(
    lambda name, x, y: labels(name, x=x, y=y), st.sampled_from("ab"), st.sampled_from("12"), st.sampled_from("12")
)
values = st.sampled_from([0.0, 1.0, 2.0, 7.5, 1e17, math.nan, math.inf])
steps = st.lists(
    st.tuples(
        st.dictionaries(keys, values, max_size=4),
        st.lists(keys, max_size=1),
        st.sampled_from([0.0, 0.5, 1.0, 3.0, 20.0]),
    ),
    max_size=16,
)


def made_of(text: str) -> Engine:
    return Engine(parse_rules(f"groups: [{{name: g, rules: [{{alert: r, expr: '{text}'}}]}}]", file="f"))


def near(left: float, right: float) -> bool:
    return (math.isnan(left) and math.isnan(right)) or left == right or math.isclose(left, right, rel_tol=1e-9)


def unnamed(key: Labels) -> Labels:
    return tuple(pair for pair in key if pair[0] != NAME)


def check(engine: Engine, now: float) -> None:
    """What the nodes give for all their slots is what the samples give, computed anew."""
    running = engine.running[0]
    assert running.root is not None, running.why
    try:
        anew = Evaluation(engine.store, now, lookback=-1.0).elements(running.rule.expression)
    except EvaluationError:
        assert running.conflicted
        return
    assert len({unnamed(key) for key in anew}) == len(anew) or running.conflicted
    if running.conflicted:
        return
    slots = running.root.slots()
    with quietly():
        found, codes = running.root.at(slots)
    kept = {
        running.root.labels(slot): value
        for slot, value, code in zip(slots.tolist(), found.tolist(), codes.tolist(), strict=True)
        if code == 0
    }
    assert {unnamed(key) for key in kept} == {unnamed(key) for key in anew}, (kept, anew)
    told = {unnamed(key): value for key, value in anew.items()}
    assert all(near(value, told[unnamed(key)]) for key, value in kept.items()), (kept, anew)
    firing = {tuple(sorted(alert.labels.items())) for alert in engine.current("firing")}
    assert firing == set(told), (firing, told)


@pytest.mark.parametrize("text", POINTWISE + WINDOWED)
@settings(max_examples=12, deadline=None)
@given(script=steps)
def test_both_tiers_agree_after_every_step(
    text: str, script: list[tuple[dict[Labels, float], list[Labels], float]]
) -> None:
    engine = made_of(text)
    engine.ingest([], [], 0.0, 90.0)
    now = 90.0 + STARTUP_S
    engine.tick(now)
    for samples, ended, pause in script:
        now += pause
        engine.ingest(samples.items(), ended, now, now)
        now += 0.26  # everything is looked at again
        engine.ingest([], [], now, now)
        engine.tick(now)
        check(engine, now)


def test_a_small_change_beside_a_huge_reset_is_not_lost_in_rounding() -> None:
    engine = made_of("increase(a[60s])")
    engine.ingest([], [], 0.0, 90.0)
    now = 90.0 + STARTUP_S
    engine.tick(now)
    key = labels("a", x="1")
    for value in (1e17, 7.0, 8.0, 0.0, 5.0):
        now += 5.0
        engine.ingest([(key, value)], [], now, now)
    engine.tick(now)
    check(engine, now)
    root = engine.running[0].root
    assert root is not None
    with quietly():
        [increase] = root.at(root.slots())[0].tolist()
    # 7 + 1 + 0 + 5 in 20 s, a bit more extrapolated to the window's start; 1e17 alone is only good to the next 16
    assert increase == pytest.approx(13.0 * (20.0 + 2.5) / 20.0)


def test_every_tier_says_why_a_rule_is_in_it() -> None:
    engine = made_of("topk(1, a)")
    assert (engine.running[0].tier, engine.running[0].why) == ("batch", "topk looks at all elements together")
    assert made_of("a offset 5m").running[0].why == "it looks at another time (offset or @)"
    assert made_of("rate(a[1m]) > 1").running[0].tier == "incremental"


fixed = st.lists(keys, min_size=1, max_size=6, unique=True)
rounds = st.lists(st.lists(values, min_size=6, max_size=6), min_size=4, max_size=8)


@pytest.mark.parametrize("text", POINTWISE + WINDOWED)
@settings(max_examples=4, deadline=None)
@given(first=fixed, second=fixed, script=rounds)
def test_what_publishers_bring_again_and_again_is_planned_and_gives_the_same(
    text: str, first: list[Labels], second: list[Labels], script: list[list[float]]
) -> None:
    engine = made_of(text)
    engine.ingest([], [], 0.0, 90.0)
    now = 90.0 + STARTUP_S
    engine.tick(now)
    second = [key for key in second if key not in first]
    for found in script:
        now += 0.5
        engine.ingest(zip(first, found, strict=False), [], now, now, publisher="one")
        engine.ingest(zip(second, reversed(found), strict=False), [], now, now, publisher="two")
        now += 0.26
        engine.tick(now)
        check(engine, now)
    if not engine.running[0].conflicted:
        known = engine._plans._known["one"]
        assert known[2] is not None


@pytest.mark.parametrize("text", POINTWISE + WINDOWED)
@settings(max_examples=4, deadline=None)
@given(found=st.lists(keys, min_size=3, max_size=8, unique=True), script=rounds)
def test_planned_batches_that_wait_together_give_the_same(
    text: str, found: list[Labels], script: list[list[float]]
) -> None:
    engine = made_of(text)
    engine.ingest([], [], 0.0, 90.0)
    now = 90.0 + STARTUP_S
    engine.tick(now)
    for each in script:
        now += 0.5
        batches = []
        for number in range(3):
            ids = np.array([engine.admit(key, f"p{number}") for key in found[number::3]])
            batches.append((ids, np.array([*each, *each][: len(ids)]), now, f"p{number}"))
        engine.apply(batches, now)
        now += 0.26
        engine.tick(now)
        check(engine, now)


def test_batches_that_wait_together_say_what_they_say_one_after_another() -> None:
    """Planned ones are taken in at once; a late one among them, a new one and one that is out of order are not."""
    text = (
        "groups: [{name: g, rules: [{alert: high, expr: a > 0.5}, {alert: grown, expr: 'increase(c[10s]) > 3'},"
        " {alert: apart, expr: a > on(host) group_left() b}, {alert: sum, expr: sum(a) > 4}]}]"
    )
    random_ = random.Random(7)
    rounds: list[list[tuple[str, dict[Labels, float], float]]] = []
    for second in range(40):
        batches = []
        for number in range(8 if second < 20 else 9):
            host, late = f"h{number}", second % 7 == 3 and number == 2
            found = {
                labels("a", host=host): round(random_.random(), 3),
                labels("b", host=host): round(random_.random(), 3),
                labels("c", host=host): float(second if random_.random() < 0.9 else 0),
            }
            batches.append((host, found, 1000.0 + second - (20.0 if late else 0.0)))
        rounds.append(batches)

    def said(together: bool) -> list[set[tuple[str, str, str]]]:
        engine = Engine(parse_rules(text, file="r"))
        made = []
        for second, batches in enumerate(rounds):
            now = 1000.0 + second
            columns = []
            for host, found, at in batches:
                ids = np.array([engine.admit(key, host) for key in found])
                columns.append((ids, np.array(list(found.values())), at, host))
            groups = [columns] if together else [[each] for each in columns]
            transitions = [each for group in groups for each in engine.apply(group, now)]
            transitions += engine.tick(now)
            firing = engine.current("firing")
            made.append({(each.rule.name, str(sorted(each.labels.items())), f"{each.value:g}") for each in firing})
        return made

    assert said(True) == said(False)
