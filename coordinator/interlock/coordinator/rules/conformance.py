"""Prometheus' own test scripts against our evaluation: what agrees, what differs, what isn't supported.

Pure: the script's text goes in, a verdict for each evaluation comes out. A range is a sequence of instants.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from interlock.broker.errors import ConfigError
from interlock.broker.samples import Labels
from interlock.coordinator.rules.evaluate import Evaluation
from interlock.coordinator.rules.expression import Expression, selectors
from interlock.coordinator.rules.labelsets import shown
from interlock.coordinator.rules.language import NotSupported, parse
from interlock.coordinator.rules.notes import Kind, Notes
from interlock.coordinator.rules.promqltest import Clear, Eval, Expect, Load, Strange, commands, moment
from interlock.coordinator.rules.source import History, milliseconds
from interlock.coordinator.rules.spelling import ONE_MOMENT, Span
from interlock.coordinator.rules.values import EvaluationError, Matrix, Value, Vector

TOLERANCE = 1e-6  # relative; promqltest's own

Outcome = Literal["pass", "fail", "unsupported"]
_PLACE = re.compile(r" \(\d+:\d+\)")  # where in the expression a note points to: the parser doesn't say


@dataclass(frozen=True)
class Verdict:
    line: int
    query: str
    outcome: Outcome
    detail: str = ""


class Loaded:
    """What the script loaded so far."""

    def __init__(self) -> None:
        self.history = History()
        self.histograms: list[Labels] = []
        self.strange = ""  # what wasn't understood of what is to be loaded

    def load(self, command: Load) -> None:
        for labels, points in command.series:
            starts = command.starts.get(labels, [])
            for index, point in enumerate(points):
                at = milliseconds(index * command.step)
                if point == "stale":
                    self.history.end(labels, at)
                elif isinstance(point, float):
                    before = starts[index] if index < len(starts) else None
                    start = at + milliseconds(before) if isinstance(before, float) else None
                    self.history.append(labels, point, at, start=start)
            if "histogram" in points:
                self.histograms.append(labels)

    def meets_histogram(self, expression: Expression) -> bool:
        return any(selector.matches(labels) for selector in selectors(expression) for labels in self.histograms)


def check(script: str) -> Iterator[Verdict]:
    """A verdict for each `eval` of the script, in its order."""
    loaded = Loaded()
    for command in commands(script):
        match command:
            case Clear():
                loaded = Loaded()
            case Load():
                loaded.load(command)
            case Strange():
                if command.loads:
                    loaded.strange = command.why
                yield Verdict(command.line, command.text, "unsupported", command.why)
            case Eval():
                outcome, detail = _judge(command, loaded)
                yield Verdict(command.line, command.query, outcome, detail)


def report(files: Mapping[str, Mapping[str, int]]) -> dict[str, object]:
    """The counts of each file, and of all, as `interlock rules conformance` prints them."""
    counts = ("passed", "failed", "unsupported", "total")
    return {"files": dict(files), **{key: sum(each[key] for each in files.values()) for key in counts}}


def tally(verdicts: Iterable[Verdict]) -> dict[str, int]:
    outcomes = [verdict.outcome for verdict in verdicts]
    return {
        "passed": outcomes.count("pass"),
        "failed": outcomes.count("fail"),
        "unsupported": outcomes.count("unsupported"),
        "total": len(outcomes),
    }


def _judge(command: Eval, loaded: Loaded) -> tuple[Outcome, str]:
    fails = command.of("fail")
    if loaded.strange:
        return "unsupported", f"the series before it: {loaded.strange}"
    try:
        expression = parse(command.query, where=f"line {command.line}", span=_span(command))
    except NotSupported as error:
        return "unsupported", error.what
    except ConfigError as error:  # what the parser refuses is right to fail, and otherwise newer than it
        return ("pass", "") if fails else ("unsupported", error.what)
    if any("histogram" in points for _, points in command.rows) or loaded.meets_histogram(expression):
        return "unsupported", "native histograms"
    notes = Notes()
    try:
        results = [_evaluation(command, loaded, at, notes).result(expression) for at in command.times]
    except EvaluationError as error:
        if not fails:
            return "fail", error.what
        said = all(_says(expect, error.what) for expect in fails)
        return ("pass", "") if said else ("fail", f"failed otherwise: {error.what}")
    if fails:
        return "fail", f"should fail, gave {_shown(results[0], loaded)}"
    for problem in (*_compare(command, results, loaded), *_compare_notes(command, notes)):
        return "fail", problem
    return "pass", ""


def _span(command: Eval) -> Span:
    return ONE_MOMENT if command.instant else Span(command.step, command.times[-1] - command.times[0])


def _evaluation(command: Eval, loaded: Loaded, at: float, notes: Notes) -> Evaluation:
    if command.instant:
        return Evaluation(loaded.history, at, notes=notes)
    first, last = command.times[0], command.times[-1]
    return Evaluation(loaded.history, at, start=first, end=last, step=command.step, notes=notes)


# --- what was given against what was wanted


def _compare(command: Eval, results: list[Value], loaded: Loaded) -> Iterator[str]:
    strings = command.of("string")
    if strings:
        wanted = strings[0].text
        quoted = wanted[1:-1] if wanted[:1] in "\"'`" and len(wanted) > 1 else wanted
        if results[0] != quoted:
            yield f"gave {results[0]!r}, not {wanted}"
        return
    ranges = command.of("range vector")
    if ranges or isinstance(results[0], Matrix):
        yield from _compare_matrix(command, results[0], ranges, loaded)
        return
    sets = loaded.history.table.sets
    for place, (at, result) in enumerate(zip(command.times, results, strict=True)):
        expected = _expected(command, place)
        if isinstance(result, float):
            given: dict[Labels | None, float] = {None if command.instant else (): result}
        elif isinstance(result, Vector):
            given = {sets[key]: value for key, value in zip(result.keys.tolist(), result.values.tolist(), strict=True)}
        else:
            yield f"gave {result!r}"
            return
        same = given.keys() == expected.keys() and all(near(given[key], expected[key]) for key in given)
        if not same:
            yield f"at {at:g}: gave {_told(given)}, not {_told(expected)}"
        elif command.of("ordered") and list(given) != [labels for labels, _ in command.rows]:
            yield f"at {at:g}: gave another order: {_told(given)}"


def _expected(command: Eval, place: int) -> dict[Labels | None, float]:
    made: dict[Labels | None, float] = {}
    for labels, points in command.rows:
        value = points[place] if place < len(points) else None
        if isinstance(value, float):
            made[() if labels is None and not command.instant else labels] = value
    return made


def _compare_matrix(command: Eval, result: Value, ranges: list[Expect], loaded: Loaded) -> Iterator[str]:
    if not isinstance(result, Matrix):
        yield "gave no range of samples"
        return
    found = re.fullmatch(r"from\s+(\S+)\s+to\s+(\S+)\s+step\s+(\S+)", ranges[0].text) if ranges else None
    if found is None:
        yield "gave a range of samples"
        return
    first, step = moment(found[1]), moment(found[3])
    wanted = {
        labels: [
            (milliseconds(first + step * at), point) for at, point in enumerate(points) if isinstance(point, float)
        ]
        for labels, points in command.rows
    }
    given: dict[Labels | None, list[tuple[float, float]]] = {}
    for place, key in enumerate(result.keys.tolist()):
        low, high = result.runs.bounds[place : place + 2].tolist()
        pairs = zip(result.times[low:high].tolist(), result.runs.values[low:high].tolist(), strict=True)
        given[loaded.history.table.sets[key]] = list(pairs)
    if given.keys() != wanted.keys():
        yield f"gave the series {sorted(map(str, given))}"
        return
    for key, pairs_given in given.items():
        if len(pairs_given) != len(wanted[key]) or not all(
            time == moment_due and near(value, expected)
            for (time, value), (moment_due, expected) in zip(pairs_given, wanted[key], strict=True)
        ):
            yield f"gave {pairs_given}, not {wanted[key]}"


def _compare_notes(command: Eval, notes: Notes) -> Iterator[str]:
    kinds: tuple[Kind, ...] = ("warn", "info")
    for kind in kinds:
        found = notes.texts(kind)
        expects = command.of(kind)
        if command.of(f"no_{kind}") and found:
            yield f"unexpected {kind}: {found[0]}"
        if expects and not found:
            yield f"no {kind}"
        for expect in expects:
            if expect.match and not any(_says(expect, text) for text in found):
                yield f"{kind} says otherwise: {found}"
        if expects and all(expect.match for expect in expects):
            for text in found:
                if not any(_says(expect, text) for expect in expects):
                    yield f"unexpected {kind}: {text}"


def _says(expect: Expect, text: str) -> bool:
    if expect.match == "regex":
        return re.search(expect.text, text) is not None
    return not expect.match or _PLACE.sub("", expect.text) == _PLACE.sub("", text)


def near(a: float, b: float) -> bool:
    """Equal within `TOLERANCE`, as promqltest compares."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    total, apart = abs(a) + abs(b), abs(a - b)
    if a == 0 or b == 0 or total < sys.float_info.min:
        return apart < TOLERANCE * sys.float_info.min
    return apart / min(total, sys.float_info.max) < TOLERANCE


def _shown(result: Value, loaded: Loaded) -> str:
    if not isinstance(result, Vector):
        return repr(result)
    sets = loaded.history.table.sets
    return _told({sets[key]: value for key, value in zip(result.keys.tolist(), result.values.tolist(), strict=True)})


def _told(result: dict[Labels | None, float]) -> str:
    return (
        "; ".join(f"{'' if labels is None else shown(labels)} {value!r}" for labels, value in result.items())
        or "nothing"
    )
