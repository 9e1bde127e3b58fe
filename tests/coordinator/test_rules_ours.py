"""What our rules have beside Prometheus' own: absent_each, baseline, anomaly_score, thresholds as series, intervals."""

from __future__ import annotations

from interlock.broker.samples import labels
from interlock.coordinator.rules.engine import Engine
from interlock.coordinator.rules.rulefile import parse_rules


def engine(*rules: str, group: str = "") -> Engine:
    return Engine(parse_rules(f"groups: [{{name: g, {group} rules: [{', '.join(rules)}]}}]", file="f.yml"))


def told(made: Engine) -> set[tuple[str, ...]]:
    return {(alert.rule.name, *alert.labels.values()) for alert in made.current("firing")}


def test_a_baseline_is_what_the_series_were_worth_when_the_migration_began() -> None:
    before = 'baseline(took{role=\\"permanent\\"})'
    made = engine(f'{{alert: slower, expr: "took{{role=\\"candidate\\"}} > on(agent) group_left() 2 * {before}"}}')
    old = labels("took", host="h", agent="a", revision="v1", role="permanent")
    new = labels("took", host="h", agent="a", revision="v2", role="candidate")
    made.ingest([(old, 1.0)], [], 1, 1)
    made.record_baseline({"host": "h", "agent": "a"}, 1.5)
    made.ingest([(old, 9.0), (new, 1.9)], [], 2, 2)
    assert told(made) == set()
    made.ingest([(new, 2.1)], [], 3, 3)
    assert {alert.labels["revision"] for alert in made.current("firing")} == {"v2"}
    made.forget_baseline({"host": "h", "agent": "a"})
    made.ingest([(new, 2.2)], [], 4, 4)
    assert told(made) == set()


def test_a_value_far_from_what_was_expected_scores_high() -> None:
    made = engine('{alert: odd, expr: "anomaly_score(x[1m]) > 8"}')
    for second in range(50):
        made.ingest([(labels("x"), 10.0 + (second % 3) * 0.1)], [], second, second)
        made.tick(second + 0.3)
    assert told(made) == set()
    made.ingest([(labels("x"), 20.0)], [], 50, 50)
    made.tick(50.3)
    assert told(made) == {("odd",)}


def test_a_threshold_of_each_category_is_a_recorded_constant() -> None:
    made = engine(
        '{record: threshold, expr: "vector(5)", labels: {category: worker}}',
        '{record: threshold, expr: "vector(50)", labels: {category: utility}}',
        '{alert: high, expr: "x > on(category) group_left() threshold"}',
    )
    batch = [(labels("x", category="worker", n="1"), 6.0), (labels("x", category="utility", n="2"), 6.0)]
    made.ingest(batch, [], 1, 1)
    made.tick(1.3)
    made.ingest(batch, [], 2, 2)
    assert told(made) == {("high", "worker", "1")}
    for second in range(3, 40):
        made.ingest(batch, [], second, second)
        made.tick(second)
    assert told(made) == {("high", "worker", "1")}  # a constant never falls silent


def test_a_group_with_an_interval_sees_only_what_is_there_at_its_multiples() -> None:
    made = engine('{alert: bad, expr: "x > 1", for: 20s}', group="interval: 10s,")
    assert made.running[0].tier == "sampled"
    fires = []
    for second in range(100, 161):
        spike = second == 114 or second >= 128
        made.ingest([(labels("x"), 2.0 if spike else 0.0)], [], second, second)
        made.tick(second)
        fires.append((second, bool(told(made))))
    assert next(second for second, fired in fires if fired) == 150  # pending at 130, 140, and 20 s later
