"""`interlock rules check`: what is said of rules before they run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from interlock.coordinator.cli import main
from interlock.coordinator.rules.check import Checked, check
from interlock.coordinator.rules.rulefile import default_rules, parse_rules
from interlock.coordinator.rules.vocabulary import METRICS, Size

ROOT = Path(__file__).parents[2]
SIZE = Size(hosts=2, agents=10, gpus=2)


def verdict(rule: str, more: str = "") -> Checked:
    """Of the first rule, a YAML flow mapping, of a group."""
    return check(parse_rules(f"groups: [{{name: g, rules: [{rule}{more}]}}]", file="f"), SIZE)[0]


def of(expression: str, rest: str = "") -> list[tuple[str, str]]:
    return [(f.kind, f.text) for f in verdict(f"{{alert: a, expr: '{expression}'{rest}}}").findings]


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("gpu_memory_used_ratio > 95", "its left side is between 0 and 1, its right side 95"),
        ("host_load1 < 0", "its left side is at least 0, its right side 0: < never holds"),
        ("(host_load1 > 5) < 3", "its left side is at least 5"),
        ("host_load1 > 5 and host_load1 < 3", "exclude each other: one asks for at least 5, another for at most 3"),
        ("host_load1 > 5 and host_load1 == 5", "exclude each other"),
        ("host_load1 > 3 unless host_load1 > 2", "unless takes away all"),
        ("host_load1 unless host_load1", "unless takes away all"),
        ("host_load1 > NaN", "nothing is > NaN"),
        ('host_load1{host="a", host!="a"} > 1', 'no series fulfils host="a", host!="a" together'),
        ('host_load1{host=~"a|b", host="c"} > 1', "no series fulfils"),
        ('sum(host_load1{host="a", host=~"b.*"}) > 1', "no series fulfils"),
        ("absent(host_load1) > 1", "its left side is 1"),
        ("clamp_max(host_load1, 1) > 1", "its left side is between 0 and 1"),
        ("count(host_load1) < 1", "its left side is at least 1"),
        ("hour() > 23", "its left side is between 0 and 23"),
        ("rate(agent_requests_total[1m]) < 0", "its left side is at least 0"),
    ],
)
def test_a_rule_that_can_never_fire_is_named_with_the_reason(expression: str, says: str) -> None:
    found = of(expression)
    assert any(kind == "unreachable" and says in text for kind, text in found), found


@pytest.mark.parametrize(
    "expression",
    [
        "gpu_memory_used_ratio >= 1",
        "host_load1 >= 5 and host_load1 <= 5",
        "host_load1 >= 3 unless host_load1 > 3",
        "(host_load1 > 5 and host_cpus > 1) unless (host_load1 > 3 and host_cpus > 2)",
        "host_load1 > 5 or host_load1 < 3",
        'host_load1{host=~"a|b", host!="a"} > 1',
        'absent(host_load1{host="a", host="b"})',
        "host_load1 - host_cpus < 0",
        "gpu_temperature_celsius < 0",
        "host_load1 > 5 and on() host_load1 < 3",
        "agent_own_thing < -5",
        "delta(host_load1[1m]) < 0",
        "-host_load1 < 0",
        "host_load1 > bool 5 < 1",
    ],
)
def test_a_rule_that_may_fire_is_not_called_unreachable(expression: str) -> None:
    assert [text for kind, text in of(expression) if kind == "unreachable"] == []


@pytest.mark.parametrize(
    ("expression", "finding"),
    [
        (
            "agent_response_second > 1",
            (
                "unknown-metric",
                "nobody publishes agent_response_second, and no rule records it; did you mean agent_response_seconds?",
            ),
        ),
        ("node_load1 > 1", ("unknown-metric", "nobody publishes node_load1, and no rule records it")),
        ("agent_queue > 1", ("own-metric", "agent_queue: only an agent that reports it itself publishes it")),
        ('host_load1{hosts="a"} > 1', ("unknown-label", "host_load1 has no label hosts; did you mean host?")),
        ("sum by (gpu) (host_load1) > 1", ("unknown-label", "what sum is given has no label gpu (it has: host)")),
        (
            "agent_in_flight / host_load1 > 1",
            ("unmatched", "only one side of / has agent, revision, role: add on(...) or ignoring(...)"),
        ),
        (
            "agent_in_flight > on(gpu) group_left() gpu_up",
            ("unmatched", "on(gpu): the left side of > has no such label"),
        ),
    ],
)
def test_names_that_nobody_publishes_are_told(expression: str, finding: tuple[str, str]) -> None:
    assert finding in of(expression)


def test_what_a_rule_of_the_files_records_is_known_with_its_labels() -> None:
    record = ", {record: own, expr: sum by (host) (agent_in_flight), labels: {kind: x}}"
    assert verdict("{alert: a, expr: 'own{kind=\"x\"} > 1'}", record).findings == []
    (found,) = verdict("{alert: a, expr: 'own{agent=\"x\"} > 1'}", record).findings
    assert found.text == "own has no label agent (it has: host, kind)"


def test_an_action_that_no_migration_can_be_meant_by_is_told() -> None:
    (found,) = of("sum(agent_in_flight) > 50", ", x_action: rollback")
    assert found[0] == "about-nothing"
    assert "neither host nor agent" in found[1]
    (found,) = of('agent_in_flight{role="permanent"} > 50', ", x_action: rollback")
    assert found[0] == "about-nothing"
    assert of("sum by (host) (agent_in_flight) > 50", ", x_action: rollback") == []


def test_the_tier_is_told_with_its_reason_and_the_cost_counts_series_and_windows() -> None:
    plain = verdict('{alert: a, expr: \'agent_response_seconds{role="candidate", quantile="0.95"} > 1\'}')
    assert (plain.tier, plain.why) == ("incremental", "")
    assert plain.cost is not None
    assert (plain.cost.series, plain.cost.samples, plain.cost.looks) == (10, 0, 100.0)
    whole = verdict("{alert: a, expr: 'predict_linear(host_memory_available_bytes[1m], 60) < 0'}")
    assert whole.tier == "batch"
    assert "predict_linear" in whole.why
    assert whole.cost is not None
    assert (whole.cost.series, whole.cost.samples, whole.cost.bytes) == (2, 1200, 19200)


def test_nothing_is_wrong_with_the_rules_that_ship() -> None:
    assert [(each.where, each.findings) for each in check(default_rules(), SIZE) if each.findings] == []


def test_each_wrong_rule_of_a_file_is_named_and_the_exit_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yml").write_text(
        "groups: [{name: g, rules: [{alert: a, expr: 'x >'}, {alert: b, expr: histogram_count(x)},"
        " {record: c, expr: host_load1, x_action: hold}, {alert: d, expr: host_load1 > 1}]}]"
    )
    assert main(["rules", "check", "bad.yml", "--json"]) == 13
    told = json.loads(capsys.readouterr().out)
    assert [(each["rule"], [f["kind"] for f in each["findings"]]) for each in told["rules"]] == [
        ("", ["syntax"]),
        ("", ["not-supported"]),
        ("", ["syntax"]),
        ("d", []),
    ]
    assert (
        "unknown key 'x_action' (it is an alert's; a rule that records never fires"
        in told["rules"][2]["findings"][0]["text"]
    )
    Path("odd.yml").write_text("groups: [{name: g, rules: [{alert: a, expr: nothing > 1}]}]")
    assert main(["rules", "check", "odd.yml"]) == 0
    assert main(["rules", "check", "--strict", "odd.yml"]) == 13
    assert main(["rules", "check", "none.yml"]) == 13
    assert "there is no such file" in capsys.readouterr().out


def test_the_table_of_metrics_is_that_of_the_documentation_and_of_the_sources() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([a-z][a-z0-9_]+)`", row)}
    assert documented == set(METRICS)
    folders = ("broker", "agents", "monitors", "coordinator")
    files = [path for part in folders for path in (ROOT / part / "interlock").rglob("*.py")]
    sources = "".join(path.read_text("utf-8") for path in files if path.name != "vocabulary.py")
    assert [name for name in METRICS if f'"{name}"' not in sources] == []
