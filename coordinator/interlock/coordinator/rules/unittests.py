"""promtool's unit tests of rules: the file -> what it should give and what our evaluation gives. Pure.

As promtool does it: samples are at multiples of `interval`, all rules are evaluated at multiples of
`evaluation_interval` from 0 on, whatever interval their groups have, and only what is there by then can be seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from interlock.broker.errors import ConfigError
from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.evaluate import Evaluation
from interlock.coordinator.rules.labelsets import shown
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.promqltest import Points, points, series
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.sampled import Sampled
from interlock.coordinator.rules.source import History, milliseconds
from interlock.coordinator.rules.template import number
from interlock.coordinator.rules.values import EvaluationError
from interlock.coordinator.rules.yamltree import duration_of, known, load_yaml, mapping, sequence, text_of, texts

DEFAULT_S = 60.0  # promtool's evaluation_interval, and interval
MAX_EVALUATIONS = 1_000_000  # of all rules in one test: minutes of work
TOLERANCE = 1e-9  # relative: what adding up in another order may change

_FILE_KEYS = ("rule_files", "evaluation_interval", "group_eval_order", "tests", "fuzzy_compare")
_TEST_KEYS = (
    "interval",
    "input_series",
    "name",
    "alert_rule_test",
    "promql_expr_test",
    "external_labels",
    "external_url",
)


@dataclass(frozen=True)
class AlertCase:
    at: float
    name: str
    expected: list[tuple[Labels, Labels]]  # labels, annotations


@dataclass(frozen=True)
class ExpressionCase:
    at: float
    text: str
    expected: list[tuple[Labels, float]]


@dataclass(frozen=True)
class Test:
    name: str
    interval: float
    loads: list[tuple[Labels, Points]]
    alerts: list[AlertCase]
    expressions: list[ExpressionCase]
    external: dict[str, str] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return max([case.at for case in self.alerts] + [case.at for case in self.expressions], default=0.0)


@dataclass(frozen=True)
class TestFile:
    file: str
    rule_files: list[str]
    interval: float
    order: list[str]
    tests: list[Test]


@dataclass(frozen=True)
class Difference:
    """A case that gave something else. Pairs of labels and annotations, or of labels and a value: those expected that
    did not come, and those that came instead.
    """

    test: str
    case: str
    at: float
    expected: list[tuple[Labels, Labels | float]]
    got: list[tuple[Labels, Labels | float]]
    error: str = ""

    def lines(self) -> Iterator[str]:
        yield f"{self.test}: {self.case} at {self.at:g}s" + (f": {self.error}" if self.error else "")
        for each in self.expected:
            yield f"  - expected {_told(*each)}"
        for each in self.got:
            yield f"  + got      {_told(*each)}"


# --- reading


def parse_tests(text: str, *, file: str) -> TestFile:
    """The tests of a file's text. ConfigError, with the place, for the first thing that is wrong."""
    tree = load_yaml(text, file=file)
    root = mapping({} if tree is None else tree, file)
    known(root, _FILE_KEYS, file)
    interval = duration_of(root, "evaluation_interval", file) or DEFAULT_S
    names = sequence(root.get("rule_files") or [], f"{file}: rule_files")
    order = sequence(root.get("group_eval_order") or [], f"{file}: group_eval_order")
    tests = [
        _test(mapping(item, f"{file}: test {number}"), number, file)
        for number, item in enumerate(sequence(root.get("tests") or [], f"{file}: tests"), 1)
    ]
    for test in tests:
        if test.end / interval > MAX_EVALUATIONS:
            raise ConfigError(
                f"{test.name} asks for {test.end / interval:.0f} evaluations",
                where=file,
                hint=f"at most {MAX_EVALUATIONS}",
            )
    return TestFile(
        file,
        [text_of(name, f"{file}: rule_files") for name in names],
        interval,
        [text_of(name, f"{file}: group_eval_order") for name in order],
        tests,
    )


def _test(tree: dict[str, Any], number: int, file: str) -> Test:
    where = f"{file}: test {number}"
    known(tree, _TEST_KEYS, where)
    loads = []
    for item in sequence(tree.get("input_series") or [], f"{where}: input_series"):
        row = mapping(item, f"{where}: input_series")
        known(row, ("series", "values"), f"{where}: input_series")
        name = text_of(row.get("series"), f"{where}: input_series: series")
        place = f"{where}: input_series {name}"
        loads.append((_labels(name, place), _points(text_of(row.get("values"), f"{place}: values"), place)))
    return Test(
        text_of(tree["name"], where) if tree.get("name") else f"test {number}",
        duration_of(tree, "interval", where) or DEFAULT_S,
        loads,
        [_alert_case(item, where) for item in sequence(tree.get("alert_rule_test") or [], f"{where}: alert_rule_test")],
        [_case(item, where) for item in sequence(tree.get("promql_expr_test") or [], f"{where}: promql_expr_test")],
        texts(tree, "external_labels", where),
    )


def _alert_case(item: Any, where: str) -> AlertCase:
    place = f"{where}: alert_rule_test"
    tree = mapping(item, place)
    known(tree, ("eval_time", "alertname", "exp_alerts"), place)
    name = text_of(tree.get("alertname"), f"{place}: alertname")
    expected = []
    for each in sequence(tree.get("exp_alerts") or [], f"{place}: exp_alerts"):
        alert = mapping(each, f"{place}: exp_alerts")
        known(alert, ("exp_labels", "exp_annotations"), f"{place}: exp_alerts")
        labels = {**texts(alert, "exp_labels", place), "alertname": name}
        annotations = texts(alert, "exp_annotations", place)
        expected.append((tuple(sorted(labels.items())), tuple(sorted(annotations.items()))))
    return AlertCase(duration_of(tree, "eval_time", place), name, expected)


def _case(item: Any, where: str) -> ExpressionCase:
    place = f"{where}: promql_expr_test"
    tree = mapping(item, place)
    known(tree, ("expr", "eval_time", "exp_samples"), place)
    text = text_of(tree.get("expr"), f"{place}: expr")
    expected = []
    for each in sequence(tree.get("exp_samples") or [], f"{place}: exp_samples"):
        sample = mapping(each, f"{place}: exp_samples")
        known(sample, ("labels", "value", "histogram"), f"{place}: exp_samples")
        if "histogram" in sample:
            raise ConfigError("native histograms are not supported", where=place)
        labels = sample.get("labels") or "{}"
        expected.append((_labels(text_of(labels, place), place), _value(sample.get("value"), place)))
    return ExpressionCase(duration_of(tree, "eval_time", place), text, expected)


def _labels(text: str, where: str) -> Labels:
    try:
        found, rest = series(text)
    except ConfigError as error:
        raise ConfigError(error.what, where=where, hint='such as up{host="a"}') from None
    if rest:
        raise ConfigError(f"{rest!r} behind the labels", where=where)
    return found


def _points(text: str, where: str) -> Points:
    try:
        made = points(text)
    except ConfigError as error:
        raise ConfigError(error.what, where=where, hint="such as 1 2+3x4 _ _x2 stale NaN") from None
    if "histogram" in made:
        raise ConfigError("native histograms are not supported", where=where)
    return made


def _value(value: Any, where: str) -> float:
    try:
        return float(text_of(value, f"{where}: value"))
    except ValueError:
        raise ConfigError(f"{value!r} is no number", where=f"{where}: value") from None


# --- running


def run(found: TestFile, rules: Sequence[Rule]) -> Iterator[tuple[Test, list[Difference]]]:
    """Each test with what differs."""
    place = {name: number for number, name in enumerate(found.order)}
    ordered = sorted(rules, key=lambda rule: place.get(rule.group, len(place)))  # stable: others keep their order
    for test in found.tests:
        yield test, list(_Run(test, [_with_external(rule, test.external) for rule in ordered], found.interval).run())


def _with_external(rule: Rule, external: Mapping[str, str]) -> Rule:
    def filled(given: dict[str, str]) -> dict[str, str]:
        return {name: _filled_in(text, external) for name, text in given.items()}

    return replace(rule, labels=filled(rule.labels), annotations=filled(rule.annotations))


def _filled_in(text: str, external: Mapping[str, str]) -> str:
    """`{{ $externalLabels.NAME }}` as its text."""
    return re.sub(
        r"\{\{\s*(?:\$externalLabels|\.ExternalLabels)\.(\w+)\s*\}\}", lambda found: external.get(found[1], ""), text
    )


class _Run:
    def __init__(self, test: Test, rules: Sequence[Rule], interval: float) -> None:
        self._test = test
        self._interval = interval
        self._history = History()
        self._sampled = Sampled(rules, self._history, default_step=interval)
        self._loaded = 0  # so many points of each series

    def run(self) -> Iterator[Difference]:
        test, step = self._test, milliseconds(self._interval)
        cases = sorted(test.alerts, key=lambda case: case.at)
        for turn in range(int(milliseconds(test.end) // step) + 1):
            at = turn * step / 1000
            self._load(at)
            try:
                self._sampled.evaluate(at)
            except EvaluationError as error:
                yield Difference(test.name, error.where, at, [], [], error.what)
                return
            while cases and milliseconds(cases[0].at) < (turn + 1) * step:
                yield from self._alerts(cases.pop(0))
        self._load(test.end)
        for case in test.expressions:
            yield from self._expression(case)

    def _load(self, at: float) -> None:
        """All points up to this moment."""
        step = milliseconds(self._test.interval)
        until = int(milliseconds(at) // step) + 1
        for index in range(self._loaded, until):
            for labels, found in self._test.loads:
                point = found[index] if index < len(found) else None
                if point == "stale":
                    self._history.end(labels, index * step)
                elif isinstance(point, float):
                    self._history.append(labels, point, index * step)
        self._loaded = max(self._loaded, until)

    def _alerts(self, case: AlertCase) -> Iterator[Difference]:
        given = [(alert.labels, alert.annotations) for alert in self._sampled.firing(case.name)]
        missing, extra = _without(case.expected, given), _without(given, case.expected)
        if missing or extra:
            yield Difference(self._test.name, f"alert {case.name}", case.at, [*missing], [*extra])

    def _expression(self, case: ExpressionCase) -> Iterator[Difference]:
        try:
            tree = parse(case.text)
            found = Evaluation(self._history, case.at, default_step=self._interval).elements(tree)
        except (ConfigError, EvaluationError) as error:
            yield Difference(self._test.name, case.text, case.at, [], [], error.what)
            return
        given, expected = list(found.items()), list(case.expected)
        for element in list(given):
            fitting = [each for each in expected if each[0] == element[0] and same(each[1], element[1])]
            if fitting:
                expected.remove(fitting[0])
                given.remove(element)
        if given or expected:
            yield Difference(self._test.name, case.text, case.at, [*expected], [*given])


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=0.0)


def _without(
    some: Sequence[tuple[Labels, Labels]], others: Sequence[tuple[Labels, Labels]]
) -> list[tuple[Labels, Labels]]:
    rest = list(others)
    left = []
    for each in some:
        if each in rest:
            rest.remove(each)
        else:
            left.append(each)
    return left


def _told(labels: Labels, rest: Labels | float) -> str:
    if not isinstance(rest, float):
        return shown(labels) + (f" with {shown(rest)}" if rest else "")
    name = dict(labels).get(NAME, "")
    return f"{name}{shown(tuple(pair for pair in labels if pair[0] != NAME))} {number(rest)}"
