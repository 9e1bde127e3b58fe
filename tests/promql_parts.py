"""Random series and expressions, and what Prometheus (promtool) and our evaluation say of them.

Samples are at multiples of `STEP_S`; evaluations and the edges of windows lie between them, since versions before 3.0
count a sample on a window's older edge, and we, as later ones, don't. What else differs from 2.42 is left out, too:
extrapolation over gaps, predict_linear behind @, names that go late, stddev of one infinity, and elements that a
comparison drops before they are counted.
"""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from interlock.broker.errors import ConfigError
from interlock.broker.samples import Labels
from interlock.coordinator.rules.evaluate import Evaluation
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.promqltest import series, series_row
from interlock.coordinator.rules.source import History
from interlock.coordinator.rules.values import EvaluationError

STEP_S = 10
TIMES = (105, 155, 205, 255, 285)  # seconds; within the lookback of the first sample
RELATIVE = 1e-6
TIMEOUT_S = 120.0

Result = dict[Labels, float] | str  # elements, or why there are none


@dataclass(frozen=True)
class Case:
    expression: str
    at: int


class Dice:
    """Expressions of a grammar, by one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def rows(self) -> list[str]:
        """Counters that are reset, gauges with gaps, NaN, infinities and ends; three metrics with shared labels."""
        made = []
        for a in ("1", "2", "3"):
            for b in ("x", "y"):
                made.append(f'c_total{{a="{a}",b="{b}"}} {self._values(counter=True, whole=True)}')
                made.append(f'd_total{{a="{a}",b="{b}"}} {self._values(counter=True)}')
                made.append(f'g{{a="{a}",b="{b}"}} {self._values(counter=False)}')
        made += [f'h{{a="{a}"}} {self._values(counter=False)}' for a in ("1", "2")]
        return made

    def _values(self, *, counter: bool, whole: bool = False) -> str:
        words, value = [], 5000.0
        gaps, odd = self.random.choice((0.0, 0.1, 0.4)), self.random.choice((0.0, 0.0, 0.05))
        for _ in range(30):
            if counter:
                value = 0.0 if self.random.random() < 0.08 else value + self.random.choice((0, 1, 7.5, 30))
            else:
                value = round(self.random.uniform(-50, 100), 3)
            chance = 1.0 if whole else self.random.random()
            if chance < gaps:
                words.append("_")
            elif chance < gaps + odd:
                words.append("stale" if counter else self.random.choice(("NaN", "Inf", "-Inf", "stale")))
            else:
                words.append(f"{value:g}")
        return " ".join(words)

    def pick(self, *of: str) -> str:
        return self.random.choice(of)

    def selector(self) -> str:
        name = self.pick("c_total", "d_total", "g", "h", "g")
        matchers = self.pick("", "", '{a="1"}', '{a=~"1|2"}', '{a!="2"}', '{b=""}', '{b=~"x.*"}')
        return name + matchers

    def shifted(self) -> str:
        return self.pick("", "", "", " offset 20s", " offset 1m", " @ 145")

    def window(self) -> str:
        return f"{self.selector()}[{self.pick('23s', '37s', '62s', '118s')}]{self.shifted()}"

    def vector(self, depth: int) -> str:
        if depth <= 0:
            return self.selector() + self.shifted()
        kind = self.random.randrange(9)
        inner = depth - 1
        if kind == 0:
            return self.selector() + self.shifted()
        if kind in (1, 2):
            return self.over_time()
        if kind == 3:
            return self.aggregation(inner)
        if kind == 4:
            return self.with_number(inner)
        if kind == 5:
            return self.pair(inner)
        if kind == 6:
            function = self.pick("abs", "ceil", "floor", "sqrt", "sgn", "-", "ln", "log2", "deg", "timestamp")
            return f"{function}({self.vector(inner)})"
        if kind == 7:
            return self.pick(
                f"clamp({self.vector(inner)}, -3, 40)",
                f"clamp_min({self.vector(inner)}, 2.5)",
                f"round({self.vector(inner)}, 0.5)",
                f"absent({self.selector()})",
                f"exp({self.vector(inner)} / 100)",
                f"sin(clamp({self.vector(inner)}, -100, 100))",
                f"({self.vector(inner)} ^ {self.pick('2', '0.5', '-1')})",
                f'label_replace({self.vector(inner)}, "z", "$1-", "a", "(.*)")',
                f"vector(scalar({self.vector(inner)}))",
                f'label_join({self.vector(inner)}, "z", "-", "a", "b")',
            )
        return f"{self.pick('max', 'min', 'sum', 'avg', 'count')}_over_time({self.vector(inner)}[70s:20s])"

    def over_time(self) -> str:
        function = self.pick(
            "delta", "irate", "idelta", "deriv", "changes", "resets", "avg_over_time",
            "min_over_time", "max_over_time", "sum_over_time", "count_over_time", "last_over_time", "present_over_time",
            "stddev_over_time", "stdvar_over_time",
        )  # fmt: skip
        return self.pick(
            f"{function}({self.window()})",
            f"{function}({self.window()})",
            f"{function}({self.window()})",
            f"quantile_over_time({self.pick('0', '0.3', '0.95', '1')}, {self.window()})",
            f"predict_linear({self.window().split(' @')[0]}, 30)",
            f"{self.pick('rate', 'increase')}({re.sub('^[a-z_]+', 'c_total', self.window())})",
            f"holt_winters({self.window()}, 0.5, 0.3)",
        )

    def aggregation(self, depth: int) -> str:
        by = self.pick("", " by (a)", " without (a)", " by (b)")
        if self.random.random() < 0.15:  # of numbers only
            return f"{self.pick('stddev', 'stdvar')}{by} (({self.vector(depth)} > -1e9) < 1e9)"
        function = self.pick("sum", "avg", "min", "max", "count", "group")
        if self.random.random() < 0.2:
            return f"quantile{by} ({self.pick('0.1', '0.5', '0.9')}, {self.vector(depth)})"
        return f"{function}{by} ({self.vector(depth)})"

    def with_number(self, depth: int) -> str:
        op = self.pick("+", "-", "*", "/", "%", ">", "<", ">=", "!=", "> bool", "<= bool")
        value = self.pick("2", "0.5", "-3", "10", "time()", "0")
        sides = [self.vector(depth), value]
        self.random.shuffle(sides)
        return f"({sides[0]} {op} {sides[1]})"

    def pair(self, depth: int) -> str:
        left, right = self.vector(depth), self.vector(depth)
        if self.random.random() < 0.4:
            return f"({left} {self.pick('and', 'unless', 'and on(a)', 'unless ignoring(b)')} {right})"
        if self.random.random() < 0.2:
            return f"max by (a, b) ({left} {self.pick('or', 'or on(a)')} {right})"
        if self.random.random() < 0.2:
            return f"({left} {self.pick('>', '<=')} {self.pick('', 'on(a, b)')} {right})"
        op = self.pick("+", "-", "*", "/", "== bool", "%")
        matching = self.pick("", "on(a)", "on(a, b)", "on(a) group_left()", "ignoring(b) group_right()")
        return f"({left} {op} {matching} {right})"


def cases(dice: Dice, count: int) -> list[Case]:
    made: dict[Case, None] = {}
    while len(made) < count:
        text = " ".join(dice.vector(3).split())
        try:
            parse(text)
        except ConfigError:  # the grammar makes what isn't typed well, too
            continue
        made[Case(text, dice.random.choice(TIMES))] = None
    return list(made)


def ours(rows: list[str], asked: list[Case]) -> list[Result]:
    history = History()
    for row in rows:
        labels, points = series_row(row)
        for index, point in enumerate(points):
            if point == "stale":
                history.end(labels, index * STEP_S * 1000)
            elif isinstance(point, float):
                history.append(labels, point, index * STEP_S * 1000)
    made: list[Result] = []
    for case in asked:
        try:
            made.append(Evaluation(history, case.at, default_step=STEP_S).elements(parse(case.expression)))
        except EvaluationError as error:
            made.append(error.what)
    return made


def promtools(rows: list[str], asked: list[Case], folder: Path) -> list[Result]:
    """What promtool says: all cases in one unit test that expects nothing of any."""
    split = [row.split(" ", 1) for row in rows]
    tests = {
        "evaluation_interval": f"{STEP_S}s",
        "tests": [
            {
                "interval": f"{STEP_S}s",
                "input_series": [{"series": name, "values": values} for name, values in split],
                "promql_expr_test": [{"expr": case.expression, "eval_time": f"{case.at}s"} for case in asked],
            }
        ],
    }
    path = folder / "cases.yml"
    path.write_text(json.dumps(tests))  # YAML reads JSON
    told = subprocess.run(
        ["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    found: dict[Case, Result] = {}
    for block in re.split(r"\n    expr: ", told.stderr + told.stdout)[1:]:
        head = re.match(r'("(?:[^"\\]|\\.)*"), time: ([\w.]+),(?: err: (.*))?', block)
        assert head is not None, block
        case = Case(json.loads(head[1]), _seconds(head[2]))
        if head[3] is not None:
            found[case] = head[3]
        else:
            got = re.search(r"\n\s+got: ?(.*)", block)
            assert got is not None, block
            found[case] = _elements(got[1])
    return [found.get(case, {}) for case in asked]


def _seconds(text: str) -> int:
    minutes = re.match(r"(\d+)m(?!s)", text)
    seconds = re.search(r"(\d+)s", text)
    return 60 * int(minutes[1] if minutes else 0) + int(seconds[1] if seconds else 0)


def _elements(text: str) -> dict[Labels, float]:
    made: dict[Labels, float] = {}
    while text and text != "nil":
        labels, rest = series(text)
        value, _, text = rest.partition(", ")
        made[labels] = float(value)
    return made


def differ(a: Result, b: Result) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return isinstance(a, str) is not isinstance(b, str)
    return a.keys() != b.keys() or any(not near(a[key], b[key]) for key in a)


def near(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=RELATIVE, abs_tol=1e-9)
