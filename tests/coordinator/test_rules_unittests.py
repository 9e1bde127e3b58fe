"""`interlock rules test`: promtool's unit-test files, with what promtool itself says of them where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from interlock.broker.errors import ConfigError
from interlock.coordinator.cli import main
from interlock.coordinator.rules.rulefile import parse_rules
from interlock.coordinator.rules.unittests import parse_tests, run

RULES = """
groups:
- name: first
  rules:
  - record: x:double
    expr: x * 2
    labels: {made: here}
  - alert: plain
    expr: x > 5
    labels: {severity: page, name: "{{ $labels.a }}!"}
    annotations: {summary: "{{ $labels.a }} is {{ $value }}", where: "{{ $externalLabels.cluster }}"}
  - alert: waits
    expr: x > 5
    for: 20s
  - alert: stays
    expr: x > 5
    keep_firing_for: 20s
  - alert: waits-and-stays
    expr: x > 5
    for: 10s
    keep_firing_for: 30s
- name: second
  interval: 1h
  rules:
  - alert: gone
    expr: absent(x{a="b"})
    for: 10s
  - alert: doubled
    expr: x:double > 10
  - alert: follows
    expr: ALERTS{alertname="waits", alertstate="firing"}
  - alert: slow
    expr: rate(c_total[45s]) < 0.5
"""
HEAD = """
rule_files: [rules.yml]
evaluation_interval: 10s
group_eval_order: [first, second]  # without it, promtool's order is another one each time
tests:
"""
# name -> values of x{a="b"}, and of c_total
SCENARIOS = {
    "a breach that lasts": "1 6x10",
    "flapping": "1 6 1 6 1 6 6 1 6 6 6 1 6 6 6 6 1 1",
    "it ends": "6 6 6 6 6 1 1 1 1 1 1 1",
    "gaps": "6 _ _ 6 6 _x4 1 _x3 6",
    "it goes stale": "6 6 6 6 stale _x5 6 6 6 6",
    "never there": "_x15",
    "NaN": "6 NaN 6 6 6 NaN NaN 6 6",
    "just the limit": "5 5.000001 5 6 6 6",
    "back within keep_firing_for": "6 6 1 6 1 6 1 1 1 1 1 1 6",
    "long": "6x6 1x6 6x6 1x12",
}
ALERTS = ("plain", "waits", "stays", "waits-and-stays", "gone", "doubled", "follows", "slow")
EXPRESSIONS = ("x:double", "sum by (alertname, alertstate) (ALERTS)", "ALERTS_FOR_STATE", "count_over_time(x[34s])")


def written(expected: dict[tuple[str, str, int], str]) -> str:
    """A test file with all scenarios; `expected` by scenario, alert or expression, and seconds."""
    lines = [HEAD]
    for name, values in SCENARIOS.items():
        lines.append(f"- name: {name}\n  interval: 10s\n  external_labels: {{cluster: one}}\n  input_series:")
        lines.append(f"  - {{series: 'x{{a=\"b\"}}', values: '{values}'}}")
        lines.append("  - {series: 'c_total{c=\"d\"}', values: '0+10x4 40x4 0+10x9'}\n  alert_rule_test:")
        for at in range(5, 180, 10):
            for alert in ALERTS:
                lines.append(
                    f"  - {{eval_time: {at}s, alertname: {alert}, exp_alerts: {expected.get((name, alert, at), '[]')}}}"
                )
        lines.append("  promql_expr_test:")
        for expression in EXPRESSIONS:
            samples = expected.get((name, expression, 175), "[]")
            lines.append(f"  - {{eval_time: 175s, expr: '{expression}', exp_samples: {samples}}}")
    return "\n".join(lines)


@cache
def given() -> dict[tuple[str, str, int], str]:
    """What our evaluation gives, as a test file would expect it."""
    made: dict[tuple[str, str, int], list[object]] = {}
    found = parse_tests(written({}), file="tests.yml")
    for test, differences in run(found, parse_rules(RULES, file="rules.yml")):
        for difference in differences:
            assert not difference.error, difference
            rows: list[object] = []
            for labels, rest in difference.got:
                if isinstance(rest, float):
                    pairs = ", ".join(f'{name}="{value}"' for name, value in labels)
                    rows.append({"labels": f"{{{pairs}}}", "value": rest})
                else:
                    own = {name: value for name, value in labels if name != "alertname"}
                    rows.append({"exp_labels": own, "exp_annotations": dict(rest)})
            made[test.name, difference.case.removeprefix("alert "), int(difference.at)] = rows
    return {key: json.dumps(rows) for key, rows in made.items()}


def test_what_our_evaluation_gives_passes_as_what_is_expected(tmp_path: Path) -> None:
    expected = given()
    assert len(expected) > 300
    for _, differences in run(parse_tests(written(expected), file="t"), parse_rules(RULES, file="rules.yml")):
        assert differences == []


def promtool(folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["promtool", "test", "rules", "tests.yml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_gives_the_same_in_all_scenarios(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(RULES)
    (tmp_path / "tests.yml").write_text(written(given()))
    told = promtool(tmp_path)
    assert told.returncode == 0, told.stdout + told.stderr
    wrong = dict(list(given().items())[1:])
    (tmp_path / "tests.yml").write_text(written(wrong))
    assert promtool(tmp_path).returncode


def test_for_counts_from_the_first_breach_and_keep_firing_for_from_the_last() -> None:
    times: dict[str, list[int]] = {}
    for name, alert, at in given():
        if name == "it ends":
            times.setdefault(alert, []).append(at)
    assert times["plain"] == [5, 15, 25, 35, 45]
    assert times["waits"] == [25, 35, 45]
    assert times["stays"] == [5, 15, 25, 35, 45, 55, 65]
    assert times["waits-and-stays"] == [15, 25, 35, 45, 55, 65, 75]


def test_a_difference_names_what_is_missing_and_what_is_too_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rules.yml").write_text(RULES)
    Path("tests.yml").write_text(
        HEAD + "- interval: 10s\n"
        "  input_series: [{series: 'x{a=\"b\"}', values: 1 7}]\n"
        "  alert_rule_test:\n"
        "  - {eval_time: 10s, alertname: waits, exp_alerts: [{exp_labels: {a: b}}]}\n"
        "  - {eval_time: 10s, alertname: plain}\n"
        "  promql_expr_test:\n"
        "  - {eval_time: 10s, expr: x, exp_samples: [{labels: 'x{a=\"b\"}', value: 8}]}\n"
        "  - {eval_time: 10s, expr: 'x + on(a) group_left() {a=~\"b\"}', exp_samples: []}\n"
    )
    assert main(["rules", "test", "tests.yml"]) == 13
    told = capsys.readouterr().out
    assert '- expected {a="b", alertname="waits"}' in told
    assert '+ got      {a="b", alertname="plain", name="b!", severity="page"} with {summary="b is 7", where=""}' in told
    assert '- expected x{a="b"} 8\n  ' in told
    assert '+ got      x{a="b"} 7' in told
    assert "many-to-many" in told or "duplicate" in told
    assert "1 tests, 1 failed" in told
    assert main(["rules", "test", "--json", "tests.yml"]) == 13
    assert json.loads(capsys.readouterr().out)["failed"] == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tests: [{input_serie: []}]", "test 1: unknown key 'input_serie' (did you mean 'input_series'?)"),
        ("tests: [{input_series: [{series: '{', values: 1}]}]", "is no series"),
        ("tests: [{input_series: [{series: x, values: one}]}]", "'one' is no value"),
        ("tests: [{promql_expr_test: [{expr: x, exp_samples: [{value: x}]}]}]", "'x' is no number"),
        ("tests: [{alert_rule_test: [{eval_time: soon, alertname: x}]}]", "'soon' is not a duration"),
        ("tests: [{alert_rule_test: [{eval_time: 100y, alertname: x}]}]", "evaluations (at most"),
        ("tests: [{input_series: [{series: x, values: '{{schema:1}}'}]}]", "native histograms are not supported"),
        ("[]", "a mapping belongs here"),
    ],
)
def test_a_mistake_in_a_test_file_names_its_place(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_tests(text, file="t.yml")
    assert says in str(error.value)
    assert "t.yml" in str(error.value)
