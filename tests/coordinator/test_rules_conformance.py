"""Prometheus' newest grammar and functions, in the notation of its own test scripts; numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from interlock.broker.errors import ConfigError
from interlock.coordinator.rules.conformance import check, tally
from interlock.coordinator.rules.expression import Selector, Window
from interlock.coordinator.rules.language import NotSupported, parse
from interlock.coordinator.rules.notes import general
from interlock.coordinator.rules.spelling import Span, respelled

DURATIONS = """
load 1m
  g 0 10 20 30 40

eval instant at 4m count_over_time(g[1m + 1m])
  {} 2

eval instant at 4m g offset (2 ^ 1 * 1m)
  g 20

eval instant at 4m g offset -(1m - 3m)
  g 20

eval instant at 4m sum_over_time(g[max_of(30s, 2 * 1m):min_of(1m, 1h)])
  {} 70

eval range from 0 to 4m step 1m count_over_time(g[2 * step()])
  {} 1 2 2 2 2

eval range from 0 to 4m step 1m max_over_time(g[range() + 1s] @ end())
  {} 40 40 40 40 40

eval instant at 4m count_over_time(g[1m - 1m])
  expect fail

eval instant at 4m g @ -1

eval instant at 4m g + 1_000
  {} 1040
"""

FORCED = (  # the words of Prometheus' remark, which are longer than a line
    "PromQL info: input to histogram_quantile needed to be fixed for monotonicity (see "
    "https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile) for metric name "
    '"odd_bucket", from buckets 5 to 5, with a max diff of 2, over 1 samples from 1970-01-01T00:00:00Z to '
    "1970-01-01T00:00:00Z (1:25)"
)
OVERLAP = (
    'PromQL warning: sample has start time that overlaps with previous sample timestamp for metric "s_total" (1:10)'
)
ANCHORED = "anchored modifier can only be used with: changes, delta, increase, rate, resets - not with sum_over_time"

EDGES = f"""
load 1m
  c_total 0 10 20 5 15
  g 0 10 20 30 40

# The sample at 2m is before the window, and where it begins.
eval instant at 4m increase(c_total[2m] anchored)
  {{}} 15

eval instant at 4m rate(c_total[2m] anchored)
  {{}} 0.125

eval instant at 4m resets(c_total[2m] anchored)
  {{}} 1

eval instant at 4m resets(c_total[2m])
  {{}} 0

eval instant at 4m changes(g[1m] anchored)
  {{}} 1

# On the lines between the samples: 15 at 90 s, 25 at 150 s.
eval instant at 150s delta(g[1m] smoothed)
  {{}} 10

eval instant at 90s g smoothed
  g 15

eval instant at 5m g smoothed
  g 40

# 15 to 20, then anew from 0 to the middle of 5.
eval instant at 150s increase(c_total[1m] smoothed)
  {{}} 7.5

eval instant at 4m30s g[1m30s] anchored
  expect range vector from 3m to 5m step 30s
  g 30 _ 40 40

eval instant at 4m sum_over_time(g[1m] anchored)
  expect fail msg: {ANCHORED}

eval instant at 4m resets(g[1m] smoothed)
  expect fail
"""

STARTS = f"""
load 1m
  s_total@st _ -30s -90s -150s
  s_total    1 3 6 9
  plain_total 1 3 6 9

# The counter began at 30 s: its first three came since then.
eval instant at 3m increase(s_total[3m])
  {{}} 9

eval instant at 1m increase(s_total[1m])
  {{}} 3

eval instant at 1m increase(plain_total[1m])

eval instant at 1m irate(s_total[61s])
  {{}} 0.05

eval instant at 3m resets(s_total[4m])
  {{}} 1

eval instant at 3m start_timestamp(s_total)
  {{}} 30

eval instant at 3m start_timestamp(s_total + 0)

clear
load 1m
  s_total@st _ -30s -75s
  s_total    1 3 6

eval instant at 2m increase(s_total[2m])
  expect warn msg: {OVERLAP}
  {{}} 6
"""

LABELS = """
load 1m
  m{instance="a", job="j", l="1"} 1 2 3
  target_info{instance="a", job="j", data="x", l="1"} 1 1 1
  build_info{instance="a", job="j", version="2"} 1 1 1
  build_info{instance="b", job="j", version="1"} 1 1 1
  build_info{instance="b", job="j", version="3"} 1 1 1
  c_total 0 60 120

eval instant at 0 info(m)
  m{instance="a", job="j", l="1", data="x"} 1

# Only what isn't meant is named: any other info metric is.
eval instant at 0 info(m, {__name__!="target_info"})
  m{instance="a", job="j", l="1", version="2"} 1

eval instant at 0 info(m, {l="1"})
  m{instance="a", job="j", l="1"} 1

eval instant at 0 info(m, {data="y"})

eval instant at 9m info(m offset 8m)
  m{instance="a", job="j", l="1", data="x"} 2

# A name that is given, be it the one that was there, stays.
eval instant at 2m label_join(rate(c_total[2m]), "__name__", "", "__name__")
  c_total 1

eval instant at 2m label_replace(rate(c_total[2m]), "__name__", "$1", "__name__", "(c.*)")
  c_total 1

eval instant at 2m label_replace(rate(c_total[2m]), "__name__", "$1", "__name__", "(d.*)")
  {} 1
"""

BUCKETS = f"""
load 1m
  low_bucket{{le="-1"}} 2
  low_bucket{{le="1"}} 4
  low_bucket{{le="+Inf"}} 4
  odd_bucket{{le="1"}} 10
  odd_bucket{{le="5"}} 8
  odd_bucket{{le="+Inf"}} 12
  some NaN
  some 1

# A bucket without a lower end can't be cut.
eval instant at 0 histogram_fraction(-Inf, -2, low_bucket)
  {{}} 0.5

eval instant at 0 histogram_quantile(0.5, odd_bucket)
  expect info msg: {FORCED}
  {{}} 0.6

eval range from 0 to 2m step 1m histogram_quantile(0.5, odd_bucket)
  expect info regex: over 3 samples from 1970-01-01T00:00:00Z to 1970-01-01T00:02:00Z
  {{}} 0.6 0.6 0.6

eval instant at 0 quantile(1234567.5, some)
  expect warn msg: PromQL warning: quantile value should be between 0 and 1, got 1.2345675e+06 (1:10)
  {{}} +Inf

clear
load 1m
  some 1 NaN 3
eval instant at 2m mad_over_time(some[3m])
  {{}} NaN
"""


NAMES = """
load 20s
  a{x="1"} 1 1 0 0 1 1
  b{x="1"} 5 5 5 5 5 5

# Of one group, in a subquery: now of an element whose name is to go, now of one whose name is to stay.
eval instant at 100s count_over_time(sum by (x) (a > 0 or b + 0)[100s:20s])
  {x="1"} 5
"""


@pytest.mark.parametrize("script", [DURATIONS, EDGES, STARTS, LABELS, BUCKETS, NAMES])
def test_what_prometheus_3_has_and_the_parser_lacks_is_evaluated_as_there(script: str) -> None:
    wrong = [verdict for verdict in check(script) if verdict.outcome != "pass"]
    assert wrong == []


def test_a_command_that_is_not_understood_costs_only_what_depends_on_it() -> None:
    script = """
load 1m
  a 1
evaluate instant at 0 a
frobnicate
eval instant at 0 a
  a 1
clear
load 1m
  a 1 2 ?
eval instant at 0 a
  a 1
clear
load 1m
  a 3
  eval instant at 0 a
    a 3
"""
    verdicts = [(verdict.line, verdict.outcome) for verdict in check(script)]
    assert verdicts == [
        (4, "unsupported"),
        (6, "pass"),
        (9, "unsupported"),
        (11, "unsupported"),
        (14, "unsupported"),
    ]


def test_an_indented_command_behind_an_empty_line_is_one() -> None:
    script = "load 1m\n  a 3\n\n  eval instant at 0 a\n    a 3\n\n\teval instant at 0 b\n"
    assert tally(check(script)) == {"passed": 2, "failed": 0, "unsupported": 0, "total": 2}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a </ b", "native histograms"),
        ("a >/ b", "native histograms"),
        ("histogram_stddev(a)", "native histograms"),
    ],
)
def test_what_needs_native_histograms_is_refused_by_that_name(text: str, told: str) -> None:
    with pytest.raises(NotSupported, match=told):
        parse(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a[1m / 0]", "division by zero"),
        ("a[5m % 0s]", "modulo by zero"),
        ("a[-5m + 1m]", "greater than 0"),
        ("a[step()]", "greater than 0"),  # of one moment it is none
        ("a[10 ^ 400]", "NaN or infinite"),
        ("a offset (1y * 1000)", "out of range"),
        ("a[5m +]", "in a duration"),
        ("a[(5m]", "in a duration"),
        ("a[" + "(" * 200 + "1m" + ")" * 200 + "]", "parts"),
        ("a[" + "-" * 5000 + "1m]", "greater than 0|operators"),
        ("a[5m:1m] anchored", "not supported for subqueries"),
        ("a[5m] anchored smoothed", "cannot be used together"),
    ],
)
def test_a_duration_that_is_none_says_why(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        'a{b="[5m*2] anchored"}',
        "sum(offset)",
        "offset - 1",
        "anchored + smoothed",
        "sum by (anchored) (a)",
        "a[5m",
        "a @ ",
    ],
)
def test_what_only_looks_like_it_stays_as_it_is(text: str) -> None:
    assert respelled(text) == text


def test_what_the_parser_can_not_read_is_said_in_what_it_can() -> None:
    assert respelled("a[2 * step()] offset (1h / 2)", Span(30, 300)) == "a[60000ms] offset 1800000ms"
    tree = parse("a{} @ -1.5 anchored")
    assert isinstance(tree, Selector)
    assert (tree.at, tree.edges, len(tree.matchers)) == (-1.5, "anchored", 1)
    window = parse('a{b="1",}[5m] offset 1m smoothed')
    assert isinstance(window, Window)
    assert (window.selector.edges, window.selector.offset_s, len(window.selector.matchers)) == ("smoothed", 60.0, 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.0, "5"), (0.25, "0.25"), (1e6, "1e+06"), (123456.5, "123456.5"), (-1e-5, "-1e-05"), (0.0, "0"),
     (math.inf, "+Inf"), (math.nan, "NaN"), (1e300, "1e+300")],
)  # fmt: skip
def test_numbers_in_remarks_are_written_as_go_writes_them(value: float, text: str) -> None:
    assert general(value) == text
