"""The rules that ship: each fires where it should and not where it shouldn't, by unit tests of promtool's form."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.broker.samples import labels
from interlock.coordinator.cli import main
from interlock.coordinator.rules.check import check
from interlock.coordinator.rules.engine import Engine
from interlock.coordinator.rules.rulefile import SHIPPED, parse_rules, shipped_rules
from interlock.coordinator.rules.unittests import parse_tests
from interlock.coordinator.rules.vocabulary import Size

FOLDER = Path(__file__).parents[1] / "rules"
TESTS = {"default": FOLDER / "default_tests.yml", "categories": FOLDER / "category_tests.yml"}


@pytest.mark.parametrize("name", SHIPPED)
def test_each_rule_that_ships_does_what_its_unit_test_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "test", str(TESTS[name])]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", SHIPPED)
def test_each_alert_that_ships_has_a_case_where_it_fires_and_one_where_it_does_not(name: str) -> None:
    found = parse_tests(TESTS[name].read_text("utf-8"), file=name)
    cases = [case for test in found.tests for case in test.alerts]
    alerts = {rule.name for rule in shipped_rules(name) if rule.kind == "alert"}
    assert {case.name for case in cases if case.expected} == alerts
    assert {case.name for case in cases if not case.expected} == alerts


@pytest.mark.parametrize("name", SHIPPED)
def test_a_check_finds_nothing_in_what_ships(name: str) -> None:
    assert [each.findings for each in check(shipped_rules(name), Size(2, 10, 2)) if each.findings] == []


def test_a_threshold_of_a_category_is_changed_while_the_engine_runs() -> None:
    text = (Path(__file__).parents[2] / "coordinator/interlock/coordinator/rules/category_rules.yaml").read_text(
        "utf-8"
    )
    engine = Engine(parse_rules(text, file="mine.yml"))
    of = {"host": "a", "agent": "b", "revision": "v2", "role": "candidate"}
    samples = {
        labels("agent_category", host="a", agent="b", category="voice"): 1.0,
        labels("agent_response_seconds", quantile="0.95", **of): 0.4,
    }

    def run(since: float) -> list[tuple[str, str]]:
        made = []
        for tenth in range(40):
            now = since + tenth / 10
            made += engine.ingest(samples.items(), [], now, now, publisher="a/host") + engine.tick(now)
        return [(each.rule.name, each.state) for each in made]

    assert run(100.0) == []
    stricter = text.replace("vector(0.5), labels: {category: voice}", "vector(0.3), labels: {category: voice}")
    assert stricter != text
    made = engine.reload(parse_rules(stricter, file="mine.yml"), 104.0)
    found = [(each.rule.name, each.state) for each in made] + run(104.0)
    assert found == [("category-response-time", "pending"), ("category-response-time", "firing")]
