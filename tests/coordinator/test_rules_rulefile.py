"""Rule files: read as Prometheus reads them, with our keys; a mistake names its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.broker.errors import ConfigError
from interlock.coordinator.rules.rulefile import default_rules, load_rules, parse_rules

FULL = """
groups:
  - name: gpu
    interval: 30s
    labels: {team: night}
    rules:
      - record: gpu:used:ratio
        expr: gpu_used / gpu_total
      - alert: gpu-memory
        expr: gpu:used:ratio > 0.95
        for: 1m30s
        keep_firing_for: 10s
        labels: {severity: critical}
        annotations: {summary: "{{ $labels.host }} is full"}
        x_action: rollback
        x_dry_run: true
        x_no_data: fire
"""


def one(rule: str) -> str:
    """A file with one group "g" whose one rule is this YAML flow mapping."""
    return f"groups: [{{name: g, rules: [{rule}]}}]"


def test_every_key_of_a_rule_is_read() -> None:
    record, alert = parse_rules(FULL, file="f.yml")
    assert (record.kind, record.name, record.labels) == ("record", "gpu:used:ratio", {"team": "night"})
    assert (alert.kind, alert.name, alert.for_s, alert.keep_firing_for_s) == ("alert", "gpu-memory", 90.0, 10.0)
    assert alert.labels == {"team": "night", "severity": "critical"}
    assert (alert.action, alert.dry_run, alert.no_data) == ("rollback", True, "fire")


def test_a_rollback_rule_keeps_its_alert_where_data_is_missing_and_another_resolves() -> None:
    rules = parse_rules(
        "groups: [{name: g, rules: [{alert: a, expr: b > 1, x_action: rollback}, {alert: c, expr: b > 1}]}]", file="f"
    )
    assert [(rule.action, rule.no_data) for rule in rules] == [("rollback", "keep"), ("notify", "resolve")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (one("{alert: a, expr: b, x_acton: hold}"), "unknown key 'x_acton' (did you mean 'x_action'?)"),
        (one("{alert: a, expr: b, x_action: explode}"), "x_action: 'explode' is none of rollback, hold, notify"),
        (one("{alert: a, expr: b, x_resolve_expr: 'c >'}"), "x_resolve_expr: 'c >' is not PromQL"),
        (one("{alert: a, expr: b, limit: 3}"), "the key 'limit' is not supported yet (leave it out)"),
        (one("{alert: a, expr: b, x_dry_run: maybe}"), "x_dry_run: 'maybe' is not true or false"),
        (one("{alert: a, expr: b, for: soon}"), "for: 'soon' is not a duration (for example 30s, 5m, 1h30m, 250ms)"),
        (one("{alert: a}"), "expr: is missing"),
        (one("{record: a, expr: b, for: 1s}"), "unknown key 'for'"),
        (one("{alert: a, expr: histogram_sum(b)}"), "native histograms are: histogram_sum() is not supported"),
        (one("{alert: a, expr: b}, {alert: a, expr: c}"), "there is already a rule with this name and these labels"),
    ],
)
def test_a_mistake_is_told_with_file_group_rule_and_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rules(text, file="f.yml")
    assert str(caught.value).startswith(f"f.yml: group 'g': rule 'a': {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (one("{expr: b}"), "f.yml: group 'g': rule 1: needs alert or record, and not both"),
        ("groups: [{name: g, rules: []}, {name: g, rules: []}]", "f.yml: there are two groups 'g'"),
        ("groops: []", "f.yml: unknown key 'groops' (did you mean 'groups'?)"),
        ("groups: {}", "f.yml: groups: a list belongs here, not dict"),
    ],
)
def test_a_mistake_outside_a_rule_is_told_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rules(text, file="f.yml")
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["groups: [", "a: 1\na: 2", "- 1", one("{alert: a, alert: b, expr: c}"), "\x00"])
def test_what_is_no_rule_file_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"f\.yml"):
        parse_rules(text, file="f.yml")


def test_an_empty_file_has_no_rules() -> None:
    assert parse_rules("", file="f.yml") == []
    assert parse_rules("groups: []", file="f.yml") == []


def test_files_are_read_relative_to_the_fleet_file_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "one.yml").write_text(one("{alert: a, expr: b}"))
    (tmp_path / "two.yml").write_text(one("{alert: a, expr: b}"))
    assert [rule.file for rule in load_rules(["one.yml", "two.yml"], tmp_path)] == [
        str(tmp_path / "one.yml"),
        str(tmp_path / "two.yml"),
    ]
    with pytest.raises(ConfigError, match="there is no such file"):
        load_rules(["three.yml"], tmp_path)


def test_rules_of_ones_own_may_stand_beside_the_default_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text(one("{alert: a, expr: b}"))
    rules = load_rules(["default", "mine.yml"], tmp_path)
    assert rules[:-1] == default_rules()
    assert rules[-1].name == "a"


def test_without_files_the_default_rules_hold_and_roll_back_at_the_critical_limits() -> None:
    rules = {rule.name: rule for rule in load_rules([], Path())}
    assert rules == {rule.name: rule for rule in default_rules()}
    rollback = {name for name, rule in rules.items() if rule.action == "rollback"}
    assert {"gpu-memory", "gpu-temperature", "response-time", "error-rate", "health", "load", "host-memory"} <= rollback
    assert all(rule.annotations.get("summary") for rule in rules.values())
