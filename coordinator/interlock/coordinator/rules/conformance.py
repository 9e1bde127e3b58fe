"""Prometheus' own test scripts (promqltest) against our evaluation: what agrees, what differs, what isn't supported.

The format: `load` blocks give series, `eval instant` and `eval range` blocks a query and its expected result. Pure: the
script's text goes in, a verdict for each evaluation comes out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from interlock.broker.errors import ConfigError
from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.cells import EvaluationError, shown
from interlock.coordinator.rules.durations import duration
from interlock.coordinator.rules.expression import Expression
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.program import Program
from interlock.coordinator.rules.series import SeriesStore

TOLERANCE = 1e-6  # relative; promqltest's own

Outcome = Literal["pass", "fail", "unsupported"]
Points = list[float | Literal["stale", "histogram"] | None]


@dataclass(frozen=True)
class Verdict:
    line: int
    query: str
    outcome: Outcome
    detail: str = ""


@dataclass
class _Evaluation:
    line: int
    times: list[float]
    query: str
    must_fail: bool
    expected: list[str]
    instant: bool


def check(script: str) -> Iterator[Verdict]:
    """A verdict for each `eval` of the script, in its order."""
    loaded: list[tuple[Labels, float, Points]] = []
    for line, block in _blocks(script):
        head = block[0].split()
        if head[0] == "clear":
            loaded = []
        elif head[0].startswith("load"):
            series = [_series(row) for row in block[1:]]
            if head[0] == "load_with_nhcb":
                series += [made for labels, _ in series for made in _native(labels)]
            loaded += [(labels, duration(head[1]), points) for labels, points in series]
        elif head[0].startswith("eval"):
            evaluation = _evaluation(line, block)
            outcome, detail = _judge(evaluation, loaded)
            yield Verdict(line, evaluation.query, outcome, detail)


def _blocks(script: str) -> Iterator[tuple[int, list[str]]]:
    block: list[str] = []
    start = 0
    for number, raw in enumerate(script.splitlines(), 1):
        text = raw.split("#", 1)[0].rstrip() if raw.lstrip().startswith("#") else raw.rstrip()
        if not text:
            continue
        if not text[0].isspace():
            if block:
                yield start, block
            block, start = [], number
        block.append(text.strip())
    if block:
        yield start, block


def _evaluation(line: int, block: Sequence[str]) -> _Evaluation:
    found = re.fullmatch(r"(eval\w*) instant at (\S+)\s+(.+)", block[0])
    if found is not None:
        times, query, kind = [_moment(found[2])], found[3], found[1]
    else:
        found = re.fullmatch(r"(eval\w*) range from (\S+) to (\S+) step (\S+)\s+(.+)", block[0])
        if found is None:
            raise ConfigError(f"line {line} is no eval: {block[0]!r}")
        first, last, step = (_moment(found[at]) for at in (2, 3, 4))
        times = [first + step * at for at in range(int((last - first) / step + 1e-9) + 1)]
        query, kind = found[5], found[1]
    fails = kind == "eval_fail" or any(row.startswith("expect fail") for row in block[1:])
    rows = [row for row in block[1:] if not re.match(r"expect (fail|warn|no_warn|info|no_info|ordered)\b", row)]
    return _Evaluation(line, times, query, fails, rows, " instant " in block[0])


def _moment(text: str) -> float:
    return float(text) if re.fullmatch(r"-?[\d.]+", text) else duration(text)


def _series(row: str) -> tuple[Labels, Points]:
    found = re.fullmatch(r"([a-zA-Z_:][\w:]*)?\s*(\{.*?\})?\s+(.+)", row)
    if found is None or not (found[1] or found[2]):
        raise ConfigError(f"{row!r} is no series")
    return _labels(found[1], found[2] or ""), _points(found[3])


def _native(labels: Labels) -> list[tuple[Labels, Points]]:
    """The native histogram that `load_with_nhcb` makes of a classic one's bucket."""
    pairs = dict(labels)
    if not pairs[NAME].endswith("_bucket"):
        return []
    pairs[NAME] = pairs[NAME].removesuffix("_bucket")
    return [(tuple(sorted((name, value) for name, value in pairs.items() if name != "le")), ["histogram"])]


def _labels(name: str | None, braces: str) -> Labels:
    pairs = dict(re.findall(r'([\w.]+)\s*=\s*"((?:[^"\\]|\\.)*)"', braces))
    if name:
        pairs[NAME] = name
    return tuple(sorted((key, value) for key, value in pairs.items() if value))


def _points(text: str) -> Points:
    points: Points = []
    for word in re.findall(r"\{\{.*?\}\}\S*|\S+", text):
        times = re.fullmatch(r"(.+?)x(\d+)", word)
        body, count = (times[1], int(times[2])) if times else (word, 0)
        steps = re.fullmatch(r"([-+]?[\w.]+(?:e[-+]?\d+)?)([-+][\w.]+(?:e[-+]?\d+)?)", body) if times else None
        if body.startswith("{{"):
            points += ["histogram"] * (count + 1)
        elif body == "_":
            points += [None] * max(count, 1)
        elif body == "stale":
            points.append("stale")
        elif steps is not None:
            points += [float(steps[1]) + float(steps[2]) * at for at in range(count + 1)]
        else:
            points += [float(body)] * (count + 1)
    return points


def _judge(evaluation: _Evaluation, loaded: list[tuple[Labels, float, Points]]) -> tuple[Outcome, str]:
    try:
        expression = parse(evaluation.query, where=f"line {evaluation.line}")
    except ConfigError as error:
        return ("unsupported", error.what) if "not supported" in error.what else ("fail", error.what)
    if any("{{" in row for row in evaluation.expected) or _meets_histogram(expression, loaded):
        return "unsupported", "native histograms"
    results: list[dict[Labels, float]] = []
    try:
        results = [_run(expression, loaded, at) for at in evaluation.times]
    except EvaluationError as error:
        return ("pass", "") if evaluation.must_fail else ("fail", str(error))
    if evaluation.must_fail:
        return "fail", f"should fail, gave {_shown(results[0])}"
    wanted = _expected(evaluation)
    for at, result, expected in zip(evaluation.times, results, wanted, strict=True):
        if result.keys() != expected.keys() or not all(_near(result[key], expected[key]) for key in result):
            return "fail", f"at {at:g}: gave {_shown(result)}, not {_shown(expected)}"
    return "pass", ""


def _meets_histogram(expression: Expression, loaded: list[tuple[Labels, float, Points]]) -> bool:
    selectors = [watch.selector for watch in Program(expression, SeriesStore()).watches]
    return any(
        "histogram" in points and any(selector.matches(labels) for selector in selectors)
        for labels, _, points in loaded
    )


def _run(expression: Expression, loaded: list[tuple[Labels, float, Points]], at: float) -> dict[Labels, float]:
    """The value at one moment, from a store that saw everything up to then."""
    store = SeriesStore()
    program = Program(expression, store)
    for labels, step, points in loaded:
        for index, point in enumerate(points):
            if index * step > at:
                break
            if point == "stale":
                store.end(labels)
            elif isinstance(point, float):
                store.append(labels, point, index * step)
    program.update(at)
    cells = zip(program.root.labels, program.root.cells, strict=True)
    return {labels: cell for labels, cell in cells if isinstance(cell, float)}


def _expected(evaluation: _Evaluation) -> list[dict[Labels, float]]:
    results: list[dict[Labels, float]] = [{} for _ in evaluation.times]
    for row in evaluation.expected:
        found = re.fullmatch(r"([a-zA-Z_:][\w:]*)?\s*(\{.*\})?\s+(.+)", row)
        if found is None or not (found[1] or found[2]) or re.fullmatch(r"[-+]?(inf|nan)", found[1] or "", re.I):
            labels, values = _labels(None, ""), _points(row)
        else:
            labels, values = _labels(found[1], found[2] or ""), _points(found[3])
        for result, value in zip(results, values, strict=False):
            if isinstance(value, float):
                result[labels] = value
    return results


def _near(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or a == b or math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-12)


def _shown(result: dict[Labels, float]) -> str:
    return "; ".join(f"{shown(labels)} {value:g}" for labels, value in sorted(result.items())) or "nothing"
