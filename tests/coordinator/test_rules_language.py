"""Expressions: what parses, what is refused by name, and that the values are Prometheus'."""

from __future__ import annotations

import math

import pytest

from interlock.broker.errors import ConfigError
from interlock.broker.samples import NAME
from interlock.coordinator.rules.conformance import Verdict, check
from interlock.coordinator.rules.durations import duration
from interlock.coordinator.rules.expression import Binary, Matcher, Matching, Number, Selector, Window, python_pattern
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.operators import number
from interlock.coordinator.rules.template import expand


def test_an_expression_becomes_a_small_typed_tree() -> None:
    tree = parse('a{x="1", y!~"b.*"} > on(host) group_left(z) 2 * b')
    assert isinstance(tree, Binary)
    assert tree.left == Selector((Matcher(NAME, "=", "a"), Matcher("x", "=", "1"), Matcher("y", "!~", "b.*")))
    assert tree.matching == Matching("many-to-one", on=True, labels=("host",), include=("z",))
    assert isinstance(tree.right, Binary)
    assert tree.right.left == Number(2.0)


def test_a_window_keeps_its_length_in_seconds() -> None:
    tree = parse("avg_over_time(a[1m30s])")
    assert tree.arguments == (Window(Selector((Matcher(NAME, "=", "a"),)), 90.0),)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "construct"),
    [
        ("histogram_count(a)", "native histograms"),
        ("histogram_avg(a) > 1", "native histograms"),
        ('a{b=~"[[:alpha:]]"}', "the regular expression"),
    ],
)
def test_what_parses_but_cannot_be_evaluated_is_refused_by_name_with_its_place(text: str, construct: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, where="f.yml: group 'g': rule 'r'")
    assert construct in caught.value.what
    assert "not supported" in caught.value.what
    assert caught.value.where == "f.yml: group 'g': rule 'r'"


@pytest.mark.parametrize("text", ["", "a >", "1 > 2", "rate(a)", "nosuch(a)", 'a{b=~"("}', "sum(1)", "x" * 30_000])
def test_what_is_no_expression_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_an_expression_nested_too_deeply_is_refused_and_not_a_crash() -> None:
    with pytest.raises(ConfigError):
        parse("abs(" * 500 + "a" + ")" * 500)


def test_a_flag_inside_a_regular_expression_holds_to_the_end_of_its_group() -> None:
    assert Matcher("a", "=~", "((?i)pro).*").matches("PROduction")
    assert not Matcher("a", "=~", "((?i)pro)duction").matches("PRODUCTION")
    assert python_pattern("a(?i)b[(?i)]") == "a(?i:b[(?i)])"


def test_a_regular_expression_matches_the_whole_value_and_a_missing_label_is_empty() -> None:
    selector = parse('a{b=~"x|", c!="1"}')
    assert isinstance(selector, Selector)
    assert selector.matches(((NAME, "a"),))
    assert selector.matches(((NAME, "a"), ("b", "x")))
    assert not selector.matches(((NAME, "a"), ("b", "xx")))
    assert not selector.matches(((NAME, "a"), ("b", "x"), ("c", "1")))


SCRIPT = r"""
load 10s
  used{host="a", gpu="0"} 9
  used{host="a", gpu="1"} 5
  used{host="b", gpu="0"} 2
  total{host="a", gpu="0"} 10
  total{host="a", gpu="1"} 10
  total{host="b", gpu="0"} 10
  limit{host="a"} 8
  limit{host="b"} 8
  count_total{host="a"} 0+10x12
  reset_total{host="a"} 0 10 20 0 10 20 30
  ended{host="a"} 1 stale
  odd{host="a"} NaN

# Arithmetic drops the name, a comparison keeps the left side with its name.
eval instant at 0 used / total
  {host="a", gpu="0"} 0.9
  {host="a", gpu="1"} 0.5
  {host="b", gpu="0"} 0.2

eval instant at 0 used > 4
  used{host="a", gpu="0"} 9
  used{host="a", gpu="1"} 5

eval instant at 0 4 < bool used
  {host="a", gpu="0"} 1
  {host="a", gpu="1"} 1
  {host="b", gpu="0"} 0

eval instant at 0 used / total > 0.8 and used > 8
  {host="a", gpu="0"} 0.9

# Many to one needs to be said.
eval instant at 0 used > on(host) limit
  expect fail

eval instant at 0 used > on(host) group_left() limit
  used{host="a", gpu="0"} 9

eval instant at 0 limit < on(host) group_right() used
  used{host="a", gpu="0"} 8

eval instant at 0 sum by (host) (used) unless on(host) limit > 100
  {host="a"} 14
  {host="b"} 2

eval instant at 0 max(used) + scalar(limit{host="a"})
  {} 17

# NaN compares false, and is a value all the same.
eval instant at 0 odd > 0

eval instant at 0 odd != 0
  odd{host="a"} NaN

eval instant at 0 absent(nothing{host="a", x=~"b.*"})
  {host="a"} 1

eval instant at 0 absent(used)

# A sample counts for five minutes, and one that ended not at all.
eval instant at 299s limit{host="a"}
  limit{host="a"} 8

eval instant at 300s limit{host="a"}

eval instant at 10s ended

# Windows are open on the left; rates are extrapolated and survive a reset.
eval instant at 60s count_over_time(count_total[30s])
  {host="a"} 3

eval instant at 60s rate(count_total[30s])
  {host="a"} 1

eval instant at 60s increase(reset_total[60s])
  {host="a"} 48

eval instant at 60s last_over_time(reset_total[60s])
  reset_total{host="a"} 30

eval instant at 60s irate(count_total[60s]) + deriv(count_total[60s]) + predict_linear(count_total[60s], 10)
  {host="a"} 72

eval instant at 60s resets(reset_total[70s]) + changes(reset_total[70s])
  {host="a"} 7

eval instant at 60s vector(time()) - 60
  {} 0

eval instant at 30s timestamp(count_total)
  {host="a"} 30

eval instant at 0 topk by (host) (1, used)
  used{host="a", gpu="0"} 9
  used{host="b", gpu="0"} 2

eval instant at 0 quantile(0.5, used) + clamp_max(vector(9), 1) + round(vector(2.6))
  {} 9

# Two series with one label set once the name is gone.
eval instant at 0 -{__name__=~"used|total"}
  expect fail
"""


@pytest.mark.parametrize("verdict", list(check(SCRIPT)), ids=lambda verdict: verdict.query)
def test_the_value_is_the_one_prometheus_gives(verdict: Verdict) -> None:
    assert verdict.outcome == "pass", verdict.detail


def test_results_that_are_not_finite_are_as_in_go() -> None:
    assert number("/", 1.0, -0.0) == -math.inf
    assert math.isnan(number("/", 0.0, 0.0))
    assert number("^", 0.0, -1.0) == math.inf
    assert number("^", -2.0, 10001.0) == -math.inf
    assert math.isnan(number("^", -8.0, 0.5))
    assert math.isnan(number("%", 1.0, 0.0))


def test_a_duration_has_units_from_large_to_small() -> None:
    assert duration("1h30m250ms") == 5400.25
    assert duration("0") == duration("0s") == 0.0
    for wrong in ("", "5", "30m1h", "1.5h", "-1s", "s"):
        with pytest.raises(ConfigError):
            duration(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ $labels.host }} at {{ $value }}", "alpha at 0.975"),
        ("{{$value | humanizePercentage}}", "97.5%"),
        ('{{ printf "%.1f%%" $value }}', "1.0%"),
        ('{{ $value | printf "%.2f" }}', "0.97"),
        ("{{ $labels.none }}.", "."),
        ("{{ humanize $value }} {{ $value | humanizeDuration }}", "0.975 975ms"),
        ("{{ range query }}", "{{ range query }}"),
    ],
)
def test_a_text_is_filled_in_and_what_nobody_knows_stays(text: str, expected: str) -> None:
    assert expand(text, {"host": "alpha"}, 0.975) == expected
