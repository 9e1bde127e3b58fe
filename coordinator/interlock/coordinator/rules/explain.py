"""Why an alert fires or doesn't: each part of its expression with its value at a moment, and the samples. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.evaluate import Evaluation
from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Expression,
    Negate,
    Number,
    Selector,
    Subquery,
    Text,
    Window,
)
from interlock.coordinator.rules.values import EvaluationError, Matrix, Vector

MAX_ELEMENTS = 8  # shown of each part
MAX_SAMPLES = 5  # shown of each window, the newest


@dataclass(frozen=True)
class Part:
    """`depth`: how far inside. `samples`: of a selector, (labels, time in seconds, value)."""

    depth: int
    text: str
    elements: dict[Labels, float] = field(default_factory=dict)
    samples: list[tuple[Labels, float, float]] = field(default_factory=list)
    error: str = ""
    number: float | None = None
    more: int = 0  # elements that are not told

    def to_json(self, most: int | None = None) -> dict[str, Any]:
        """`most`: elements and samples that are told; `more` counts the others."""
        elements = [{"labels": dict(labels), "value": value} for labels, value in self.elements.items()]
        samples = [{"labels": dict(labels), "time": at, "value": value} for labels, at, value in self.samples]
        tree = {
            "depth": self.depth,
            "expr": self.text,
            "elements": elements[:most],
            "samples": samples[:most],
            "number": self.number,
            "error": self.error,
        }
        return tree if most is None else {**tree, "more": max(0, max(len(elements), len(samples)) - most)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Part:
        def key(found: Mapping[str, Any]) -> Labels:
            return tuple(sorted(found["labels"].items()))

        return cls(
            tree["depth"],
            tree["expr"],
            {key(each): each["value"] for each in tree["elements"]},
            [(key(each), each["time"], each["value"]) for each in tree["samples"]],
            tree["error"],
            tree["number"],
            tree.get("more", 0),
        )


def explain(expression: Expression, begin: Callable[[], Evaluation]) -> Iterator[Part]:
    """The expression and its parts, outermost first; `begin` makes the evaluation of each."""
    yield from _parts(expression, begin, 0)


def _parts(tree: Expression, begin: Callable[[], Evaluation], depth: int) -> Iterator[Part]:
    if isinstance(tree, (Number, Text)):
        return
    text, evaluation = written(tree), begin()
    try:
        value = evaluation.result(tree)
    except EvaluationError as error:
        yield Part(depth, text, error=error.what)
    else:
        sets = evaluation.source.table.sets
        if isinstance(value, Vector):
            found = {sets[key]: worth for key, worth in zip(value.keys.tolist(), value.values.tolist(), strict=True)}
            samples = []
            if value.times is not None and isinstance(tree, Selector):
                times = (value.times / 1000).tolist()
                samples = [(key, when, found[key]) for key, when in zip(found, times, strict=True)]
            yield Part(depth, text, found, samples)
        elif isinstance(value, Matrix):
            yield Part(depth, text, samples=_samples(value, sets))
        elif isinstance(value, float):
            yield Part(depth, text, number=value)
    for child in _children(tree):
        yield from _parts(child, begin, depth + 1)


def _samples(matrix: Matrix, sets: list[Labels]) -> list[tuple[Labels, float, float]]:
    made = []
    for place, key in enumerate(matrix.keys.tolist()):
        low, high = matrix.runs.bounds[place : place + 2].tolist()
        low = max(low, high - MAX_SAMPLES)
        times, values = (matrix.times[low:high] / 1000).tolist(), matrix.runs.values[low:high].tolist()
        made += [(sets[key], when, value) for when, value in zip(times, values, strict=True)]
    return made


def _children(tree: Expression) -> tuple[Expression, ...]:
    match tree:
        case Negate(operand) | Aggregate(operand=operand):
            return (operand,)
        case Binary(left=left, right=right):
            return (left, right)
        case Call(arguments=arguments):
            return arguments
    return ()


def written(tree: Expression) -> str:
    """The expression as text again."""
    match tree:
        case Number(value):
            return f"{value:g}"
        case Text(value):
            return f'"{value}"'
        case Selector():
            return _chosen(tree) + _shifted(tree)
        case Window(selector, seconds):
            return f"{_chosen(selector)}[{seconds:g}s]{_shifted(selector)}"
        case Subquery(operand, seconds, step_s):
            return f"({written(operand)})[{seconds:g}s:{'' if step_s is None else f'{step_s:g}s'}]{_shifted(tree)}"
        case Negate(operand):
            return f"-({written(operand)})"
        case Binary():
            return f"{_side(tree.left)} {tree.op}{_modifiers(tree)} {_side(tree.right)}"
        case Aggregate(op, operand, labels, without, parameter):
            by = f" {'without' if without else 'by'} ({', '.join(labels)})" if labels or without else ""
            first = "" if parameter is None else f"{written(parameter)}, "
            return f"{op}{by} ({first}{written(operand)})"
        case Call(function, arguments):
            return f"{function}({', '.join(map(written, arguments))})"


def _chosen(selector: Selector) -> str:
    name = selector.metric or ""
    rest = [one for one in selector.matchers if not (one.label == NAME and one.op == "=")]
    inside = ",".join(f'{one.label}{one.op}"{one.value}"' for one in rest)
    return name + (f"{{{inside}}}" if inside or not name else "")


def _shifted(tree: Selector | Subquery) -> str:
    """What stands behind a selector, or the window of one."""
    moment = "" if tree.at is None else f" @ {tree.at}{'()' if isinstance(tree.at, str) else ''}"
    edges = f" {tree.edges}" if isinstance(tree, Selector) and tree.edges else ""
    return moment + (f" offset {tree.offset_s:g}s" if tree.offset_s else "") + edges


def _side(tree: Expression) -> str:
    return f"({written(tree)})" if isinstance(tree, Binary) else written(tree)


def _modifiers(tree: Binary) -> str:
    matching = tree.matching
    text = " bool" if tree.bool else ""
    if matching.on or matching.labels:
        text += f" {'on' if matching.on else 'ignoring'}({', '.join(matching.labels)})"
    group = {"many-to-one": "group_left", "one-to-many": "group_right"}.get(matching.cardinality)
    return text + (f" {group}({', '.join(matching.include)})" if group else "")
