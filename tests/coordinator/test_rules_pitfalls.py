"""What goes wrong with rule engines, and the mechanism against it: each test fails without its mechanism."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from interlock.broker.samples import Labels, labels
from interlock.coordinator.rules import rings as rings_module
from interlock.coordinator.rules import series as series_module
from interlock.coordinator.rules.engine import BIND_AT_ONCE, STARTUP_S, WATERMARK_S, Engine
from interlock.coordinator.rules.rings import Rings
from interlock.coordinator.rules.rolling import Windowed
from interlock.coordinator.rules.rulefile import parse_rules
from interlock.coordinator.rules.series import IDLE_EXPIRY_S, STALE_FLOOR_S, STALE_INTERVALS
from interlock.coordinator.rules.snapshot import BadSnapshot, Frozen, restore
from interlock.coordinator.rules.values import Vector


def engine(*rules: str, lookback_s: float = 300.0) -> Engine:
    text = f"groups: [{{name: g, rules: [{', '.join(rules)}]}}]"
    return Engine(parse_rules(text, file="f.yml"), lookback_s=lookback_s)


def told(made: Engine) -> set[tuple[str, ...]]:
    return {(alert.rule.name, *alert.labels.values()) for alert in made.current("firing")}


def value(made: Engine, text: str, at: float) -> dict[Labels, float]:
    found = made.eval(text, at)
    assert isinstance(found, Vector)
    sets = made.store.table.sets
    return {sets[key]: worth for key, worth in zip(found.keys.tolist(), found.values.tolist(), strict=True)}


A, B = labels("up", host="a"), labels("up", host="b")


# --- the engine or the bus stalls, and everything seems absent


def test_absence_is_judged_against_what_arrives_and_not_against_the_clock() -> None:
    made = engine('{alert: lost, expr: "absent_each(up[3s])"}')
    for second in range(10):
        made.ingest([(A, 1.0), (B, 1.0)], [], second, second)
        made.tick(second)
    made.tick(9 + WATERMARK_S / 2)
    made.ingest([(B, 1.0)], [], 13, 13)
    made.tick(13)
    assert told(made) == {("lost", "a")}
    made.ingest([(A, 1.0)], [], 13, 13.1)
    assert told(made) == set()
    made.tick(13.2)
    made.tick(10_000.0)  # nothing came: the bus stands still
    assert [alert.labels["host"] for alert in made.current("firing")] == ["a", "b"]  # silent for 3 s by the watermark
    assert value(made, "up", 13.2).keys() == {A, B}


def test_absence_is_not_judged_while_samples_wait() -> None:
    made = engine('{alert: lost, expr: "absent_each(up[3s])"}')
    for second in range(10):
        made.ingest([(A, 1.0)], [], second, second)
        made.tick(second)
    made.ingest([(B, 1.0)], [], 20, 20)  # the first of those that waited while the process was held up
    made.tick(20, backlog=True)
    assert told(made) == set()
    made.ingest([(A, 1.0)], [], 20, 20.1)
    made.tick(20.2)
    assert told(made) == set()


def test_many_that_fall_silent_together_are_a_partition_and_one_alone_is_not() -> None:
    made = engine('{alert: lost, expr: "absent_each(up[3s])"}')
    hosts = [labels("up", host=f"h{number}") for number in range(6)]
    for second in range(12):
        for number, key in enumerate(hosts):
            made.ingest([(key, 1.0)], [], second, second, publisher=f"h{number}/monitor")
        made.tick(second)
    for second in range(12, 18):
        made.ingest([(hosts[number], 1.0) for number in range(1)], [], second, second, publisher="h0/monitor")
        made.tick(second)
    assert made.partition(18) == "5 of 6 publishers fell silent together: a partition"
    assert made.judges_absence(made.rules[0])
    for second in range(18, 24):
        for number, key in enumerate(hosts[:5]):
            made.ingest([(key, 1.0)], [], second, second, publisher=f"h{number}/monitor")
        made.tick(second)
    assert made.partition(23.5) == ""
    assert told(made) == {("lost", "h5")}


# --- staleness


def test_a_series_is_silent_after_several_of_its_own_intervals() -> None:
    made = engine('{alert: bad, expr: "x > 1", x_no_data: resolve}')
    for second in range(20):
        made.ingest([(labels("x"), 2.0), (labels("y"), 0.0)], [], second, second)
        made.tick(second)
    gone = 20 + max(STALE_FLOOR_S, STALE_INTERVALS)
    for second in range(20, int(gone) + 2):
        made.ingest([(labels("y"), 0.0)], [], second, second)
        made.tick(second)
    assert told(made) == set()
    slow = engine('{alert: bad, expr: "x > 1", x_no_data: resolve}')
    for minute in range(4):
        slow.ingest([(labels("x"), 2.0)], [], minute * 60, minute * 60)
        slow.tick(minute * 60)
    slow.ingest([(labels("y"), 0.0)], [], 280, 280)
    slow.tick(280)
    assert told(slow) == {("bad",)}  # one that comes once a minute is not silent after 100 s


def test_a_series_that_said_goodbye_is_gone_at_once() -> None:
    made = engine('{alert: bad, expr: "x > 1", x_no_data: keep}')
    made.ingest([(labels("x"), 2.0)], [], 1, 1)
    assert told(made) == {("bad",)}
    made.ingest([], [labels("x")], 1.1, 1.1)
    assert told(made) == set()


# --- clocks, order


@pytest.mark.parametrize("wrong", [1e6, -1e6, 1e300, math.nan])
def test_a_publishers_wrong_clock_decides_nothing(wrong: float) -> None:
    made = engine('{alert: bad, expr: "x > 1", for: 2s}')
    made.ingest([(labels("x"), 2.0)], [], 10 + wrong, 10)
    made.ingest([(labels("x"), 2.0)], [], 11 + wrong, 11)
    made.tick(11.9)
    assert told(made) == set()
    made.tick(12)
    assert told(made) == {("bad",)}


def test_what_is_out_of_order_or_comes_twice_is_dropped_and_counted() -> None:
    made = engine('{alert: r, expr: "increase(c_total[1m]) > 1e9"}')
    ids = np.array([made.admit(labels("c_total"))])
    made.bind()
    store = made.store
    for at, worth in ((1000.0, 1.0), (2000.0, 5.0)):
        store.append(ids, np.array([worth]), at, 0.0)
    assert len(store.append(ids, np.array([3.0]), 1500.0, 0.0)) == 0
    assert (store.disordered, store.values[ids[0]]) == (1, 5.0)
    store.append(ids, np.array([6.0]), 2000.0, 0.0)
    assert store.repeated == 1
    _, times, values = store.window(ids, 0.0, 5000.0)
    assert (times.tolist(), values.tolist()) == ([1000.0, 2000.0], [1.0, 6.0])


# --- counters, sums


def test_a_counter_that_begins_anew_counts_what_it_had_and_a_new_epoch_is_a_new_counter() -> None:
    made = engine('{alert: r, expr: "increase(c_total[10s]) > 1000"}')
    for second, worth in enumerate([0, 10, 20, 5, 15]):
        made.ingest([(labels("c_total"), float(worth))], [], second, second)
    (found,) = value(made, "increase(c_total[10s])", 4.0).values()
    assert found == pytest.approx(35.0)
    assert window_of(made).at(np.zeros(1, np.int64))[0][0] == pytest.approx(35.0)  # and as it is kept up to date
    made.ingest([(labels("c_total"), 900.0)], [labels("c_total")], 5, 5)  # a new epoch that is already further
    made.ingest([(labels("c_total"), 910.0)], [], 6, 6)
    assert list(value(made, "increase(c_total[10s]) < 900", 6.0)) == [()]


def window_of(made: Engine) -> Windowed:
    return next(node for node in made._graph._nodes.values() if isinstance(node, Windowed))


def test_nan_and_infinity_are_counted_and_leave_no_trace_when_they_are_gone() -> None:
    made = engine('{alert: r, expr: "sum_over_time(x[5s]) > 1e9"}')
    for second, worth in enumerate([1.0, math.nan, math.inf, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]):
        made.ingest([(labels("x"), worth)], [], second, second)
        if second == 3:
            assert window_of(made).state.wild[0] == 2
            assert math.isnan(window_of(made).at(np.zeros(1, np.int64))[0][0])
    assert window_of(made).at(np.zeros(1, np.int64))[0][0] == 3 + 4 + 5 + 6 + 7


def test_running_sums_do_not_drift_in_an_hour() -> None:
    made = engine('{alert: r, expr: "sum_over_time(x[20s]) > 1e30"}')
    random = np.random.default_rng(1)
    ids = np.array([made.admit(labels("x", n=str(number))) for number in range(8)])
    made.bind()
    for second in range(3_600):
        some = [1e-3, 1.0, 1e15] if second < 3_580 else [1e-3]  # in the end what large values left behind would show
        made.apply([(ids, random.choice(some, 8), float(second), "p")], float(second))
    node = window_of(made)
    kept = node.at(np.arange(8))[0]
    anew = value(made, "sum_over_time(x[20s])", 3_599.0)
    assert list(anew.values()) == pytest.approx([0.02] * 8, rel=1e-12)
    assert kept == pytest.approx([0.02] * 8, rel=1e-9)
    assert node.anchored >= 8 * 3_600 // 64  # at each wrap of the ring


# --- flapping


def test_hysteresis_an_alert_ends_only_where_its_resolve_expression_holds() -> None:
    made = engine('{alert: hot, expr: "t > 90", x_resolve_expr: "t < 80"}')
    for second, worth, fires in ((1, 95, True), (2, 85, True), (3, 92, True), (4, 85, True), (5, 79, False)):
        made.ingest([(labels("t", gpu="0"), float(worth))], [], second, second)
        made.tick(second)
        assert bool(told(made)) is fires, second
    made.ingest([(labels("t", gpu="0"), 85.0)], [], 6, 6)
    assert told(made) == set()


# --- forecasts


def test_a_forecast_waits_for_samples_and_for_a_span() -> None:
    made = engine('{alert: leak, expr: "predict_linear(free[60s], 60) < 0"}')
    for tenth in range(40):  # 4 s that fall steeply say nothing about a minute
        now = tenth / 10
        made.ingest([(labels("free"), 100.0 - 3 * now)], [], now, now)
        made.tick(now)
    assert told(made) == set()
    for second in range(4, 33):
        made.ingest([(labels("free"), 100.0 - 3 * second)], [], second, second)
        made.tick(second + 0.3)
    assert told(made) == {("leak",)}


# --- cardinality


def test_ids_are_used_again_under_a_new_generation_and_never_mistaken() -> None:
    made = engine('{alert: bad, expr: "x > 1"}')
    old = made.admit(labels("x", n="old"), "p")
    made.apply([(np.array([old]), np.array([2.0]), 1.0, "p")], 1)
    made.ingest([], [labels("x", n="old")], 2, 2)
    generation = int(made.store.generation[old])
    new = made.admit(labels("x", n="new"), "p")
    assert new == old
    assert made.store.generation[new] == generation
    made.apply([(np.array([new]), np.array([0.0]), 3.0, "p")], 3)
    assert told(made) == set()
    made.ingest([], [labels("x", n="new")], 4, 4)
    assert made.store.generation[old] == generation + 1
    made.apply([(np.array([old]), np.array([9.0]), 5.0, "p")], 5)  # an id that nobody has
    assert told(made) == set()
    assert made.refused == 1


def test_a_publisher_that_invents_series_without_end_stops_and_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series_module, "MAX_PUBLISHER_SERIES", 1000)
    made = engine('{alert: bad, expr: "x > 1"}')
    for batch in range(30):
        found = [(labels("x", n=str(batch * 100 + number)), 0.0) for number in range(100)]
        made.ingest(found, [], batch, batch, publisher="mad")
    assert len(made.store.numbers) == 1000
    assert made.refused == 2000
    made.ingest([(labels("x", n="well"), 2.0)], [], 31, 31, publisher="sane")
    while made.backlog:
        made.bind()
    made.ingest([(labels("x", n="well"), 2.0)], [], 32, 32, publisher="sane")
    assert told(made) == {("bad", "well")}


def test_a_series_that_is_silent_for_an_hour_is_forgotten_with_what_it_held() -> None:
    made = engine('{alert: bad, expr: "x > 1", x_no_data: keep}')
    made.ingest([(labels("x", n="1"), 2.0)], [], 0, 0)
    for minute in range(62):
        made.ingest([(labels("x", n="2"), 0.0)], [], minute * 60, minute * 60)
        made.tick(minute * 60)
        assert (told(made) == {("bad", "1")}) == (minute * 60 <= IDLE_EXPIRY_S)
    assert len(made.store.numbers) == 1


def test_memory_stays_flat_while_series_come_and_go() -> None:
    made = engine('{alert: bad, expr: "sum by (n) (increase(x_total[10s])) > 1e9"}')
    now = 0.0

    def churn(rounds: int) -> None:
        nonlocal now
        for _ in range(rounds):
            now += 1.0
            fresh = [(labels("x_total", n=str(number), at=str(now)), 1.0) for number in range(50)]
            gone = [labels("x_total", n=str(number), at=str(now - 1.0)) for number in range(50)]
            made.ingest(fresh, gone, now, now, publisher="p")
            made.tick(now)

    churn(10)
    rows, used, members = made.store.rows, made.store.rings.used, len(made.store.labels)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    churn(25)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert (made.store.rows, made.store.rings.used, len(made.store.labels)) == (rows, used, members)
    assert grown < 2_000_000  # 1,250 series came and went
    assert len(made.store.numbers) == 50


def test_new_series_are_bound_in_slices() -> None:
    made = engine('{alert: bad, expr: "x > 1"}')
    many = BIND_AT_ONCE * 3
    made.ingest([(labels("x", n=str(number)), 2.0) for number in range(many)], [], 1, 1)
    assert made.backlog == many - BIND_AT_ONCE
    assert len(told(made)) == BIND_AT_ONCE
    while made.backlog:
        made.bind()
    made.ingest([], [], 2, 2)
    assert len(told(made)) == many


def test_an_evaluation_that_explodes_is_an_error_of_its_rule_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine('{alert: much, expr: "count_over_time(x[1h:1ms]) > 0"}', '{alert: bad, expr: "x > 1"}')
    made.ingest([(labels("x"), 2.0)], [], 1, 1)
    made.tick(2)
    assert told(made) == {("bad",)}
    assert "maximum resolution" in made.errors["f.yml: group 'g': rule 'much'"]


def test_rings_are_bounded_all_together_and_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings_module, "MAX_RING", 64)
    rings = Rings(256)
    first = np.array([rings.open(1e9)])
    for second in range(200):
        rings.append(first, second * 1000.0, np.array([1.0]))
    assert int(rings.head[first][0] - rings.tail[first][0]) <= 64
    assert rings.lost > 0
    opened = [rings.open(1e9) for _ in range(20)]
    assert -1 in opened
    assert rings.used <= 256


# --- restart


RULES = ('{alert: slow, expr: "t > 1", for: 5s}', '{alert: errors, expr: "increase(e_total[10s]) > 30"}')


def test_a_restart_keeps_what_is_pending_and_what_the_windows_hold() -> None:
    first = engine(*RULES)
    for second in range(1, 5):
        first.ingest([(labels("t"), 2.0), (labels("e_total"), second * 10.0)], [], second, second, publisher="p")
    content = Frozen(first, 4.0).encode()
    second_ = engine(*RULES)
    assert restore(second_, content, 4.5) == 2
    second_.ingest([(labels("t"), 2.0), (labels("e_total"), 50.0)], [], 5, 5, publisher="p")
    assert told(second_) == {("errors",)}
    second_.tick(6)
    assert told(second_) == {("errors",), ("slow",)}
    (alert,) = [alert for alert in second_.current("firing") if alert.rule.name == "slow"]
    assert alert.since == 1


def test_a_snapshot_that_is_damaged_or_old_is_refused_and_changes_nothing() -> None:
    first = engine(*RULES)
    first.ingest([(labels("t"), 2.0)], [], 1, 1)
    content = Frozen(first, 1.0).encode()
    for broken in (b"", b"\x00" * 50, content[:-3], content[:20] + b"\xff" + content[21:]):
        fresh = engine(*RULES)
        with pytest.raises(BadSnapshot):
            restore(fresh, broken, 2.0)
        assert len(fresh.store.numbers) == 0
    with pytest.raises(BadSnapshot, match="ago"):
        restore(engine(*RULES), content, 1000.0)


def test_other_rules_take_over_without_losing_the_state_of_those_that_stay() -> None:
    made = engine(*RULES)
    for second in range(1, 5):
        made.ingest([(labels("t"), 2.0), (labels("e_total"), second * 20.0)], [], second, second)
    assert told(made) == {("errors",)}
    text = f"groups: [{{name: other, rules: [{RULES[0]}, {{alert: new, expr: 't > 1'}}]}}]"
    moved = made.reload(parse_rules(text, file="g.yml"), 4.5)
    assert [(each.state, each.rule.name) for each in moved] == [("resolved", "errors"), ("firing", "new")]
    made.tick(6)
    (slow,) = [alert for alert in made.current("firing") if alert.rule.name == "slow"]
    assert slow.since == 1
    assert not any(isinstance(node, Windowed) for node in made._graph._nodes.values())


# --- pauses


def test_nothing_per_sample_stays_allocated() -> None:
    made = engine('{alert: bad, expr: "x > 1"}', '{alert: more, expr: "sum by (h) (x) > 100"}')
    ids = np.array([made.admit(labels("x", h=str(number % 10), n=str(number)), "p") for number in range(100)])
    made.bind()
    values = np.zeros(100)
    now = STARTUP_S
    for _ in range(50):
        now += 0.1
        made.apply([(ids, values, now, "p")], now)
        made.tick(now)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(200):
        now += 0.1
        made.apply([(ids, values, now, "p")], now)
        made.tick(now)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 50_000  # of 20,000 samples
