"""Expressions -> the nodes of the incremental tier. What is the same in two rules is there once. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules import relabel
from interlock.coordinator.rules.calls import absent_labels
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
    is_scalar,
)
from interlock.coordinator.rules.groups import INCREMENTAL_AGGREGATIONS, Aggregated
from interlock.coordinator.rules.nodes import Compared, Each, Leaf, Node, Nothing, Relabelled, Silent
from interlock.coordinator.rules.operators import ARITHMETIC, CALENDAR, COMPARISONS, ELEMENTWISE, SETS, number
from interlock.coordinator.rules.pairs import Combined, Paired
from interlock.coordinator.rules.rolling import INCREMENTAL_WINDOWS, Windowed
from interlock.coordinator.rules.series import SeriesStore
from interlock.coordinator.rules.values import EvaluationError

BASELINE_DROPS = (NAME, "role", "revision")  # a baseline is compared with another revision's value


class NotIncremental(Exception):
    """The expression belongs to the batch tier. The text says why."""


def constant(expression: Expression) -> float | None:
    """The number that it is, whatever the time; None if it isn't one."""
    match expression:
        case Number(value):
            return value
        case Negate(operand):
            found = constant(operand)
            return None if found is None else -found
        case Binary(op, left, right) if is_scalar(expression):
            sides = constant(left), constant(right)
            return None if sides[0] is None or sides[1] is None else number(op, sides[0], sides[1])
        case Call("pi"):
            return math.pi
    return None


class Graph:
    """All nodes there are, by their expressions. `clock`: milliseconds, of the evaluation that is going on."""

    def __init__(self, store: SeriesStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._nodes: dict[Any, Node] = {}

    def build(self, expression: Expression) -> Node:
        """The node that gives the expression's value. NotIncremental names what can't be had sample by sample."""
        known = self._nodes.get(expression)
        if known is None:
            known = self._nodes[expression] = self._make(expression)
        return known

    def timed(self) -> Iterator[Node]:
        """Nodes to be told that time passes."""
        return (node for node in self._nodes.values() if node.timed or isinstance(node, Aggregated))

    def keep_only(self, roots: Iterable[Node]) -> None:
        """Take apart what no root needs."""
        kept = {id(node) for root in roots for node in reachable(root)}
        for expression, node in list(self._nodes.items()):
            if id(node) in kept:
                continue
            del self._nodes[expression]
            for child in node.children:
                child.outs = [(listener, port) for listener, port in child.outs if id(listener) != id(node)]
            for part in reachable(node):
                if id(part) not in kept and isinstance(part, Leaf) and part in part.members.listeners:
                    part.members.listeners.remove(part)

    # --- inside

    def _make(self, expression: Expression) -> Node:
        match expression:
            case Selector():
                _refuse_shifted(expression)
                return Leaf(self._store, self._store.watch(expression))
            case Negate(operand) if not is_scalar(operand):
                return Each(self.build(operand), np.negative)
            case Binary() if not is_scalar(expression):
                return self._binary(expression)
            case Aggregate(op, operand, names, without):
                if op not in INCREMENTAL_AGGREGATIONS:
                    raise NotIncremental(f"{op} looks at all elements together")
                if NAME in names:
                    raise NotIncremental("it groups by the metric's name")
                return Aggregated(self.build(operand), op, names, without=without)
            case Call(function, arguments):
                return self._call(function, arguments)
        raise NotIncremental("it is a number, or a range of samples")

    def _binary(self, expression: Binary) -> Node:
        op, matching = expression.op, expression.matching
        if matching.fill_left is not None or matching.fill_right is not None:
            raise NotIncremental("fill makes elements that no series has")
        if NAME in matching.labels or NAME in matching.include:
            raise NotIncremental("it matches on the metric's name")
        scalars = is_scalar(expression.left), is_scalar(expression.right)
        if not any(scalars):
            left, right = self.build(expression.left), self.build(expression.right)
            if op in SETS:
                return Combined(left, right, op, matching)
            return Paired(left, right, op, matching, returns_bool=expression.bool)
        side, other = (expression.left, expression.right) if scalars[0] else (expression.right, expression.left)
        value = constant(side)
        if value is None:
            raise NotIncremental("it compares with a number that changes")
        child = self.build(other)
        if op in COMPARISONS and not expression.bool:
            return Compared(child, op, value, mirrored=scalars[0])
        function = ARITHMETIC.get(op) or _as_number(COMPARISONS[op])
        fixed = np.float64(value)
        if scalars[0]:
            return Each(child, lambda values: function(fixed, values))
        return Each(child, lambda values: function(values, fixed))

    def _call(self, name: str, arguments: tuple[Expression, ...]) -> Node:
        match name, arguments:
            case "absent", (inner,):
                return Nothing(self.build(inner), absent_labels(inner))
            case "absent_over_time", (Window() as window,):
                return Nothing(self.build(Call("present_over_time", (window,))), absent_labels(window))
            case "absent_each", (Window(selector, seconds),) if not selector.shifted:
                leaf = self.build(selector)
                assert isinstance(leaf, Leaf)
                return Silent(leaf, seconds * 1000, self._clock)
            case "baseline", (Selector() as selector,):
                leaf = Leaf(self._store, self._store.watch(selector, recorded=True))
                return Relabelled(leaf, lambda labels: tuple(p for p in labels if p[0] not in BASELINE_DROPS))
            case "label_replace" | "label_join", (inner, *texts):
                return self._relabelled(name, inner, [text for text in texts if isinstance(text, Text)])
        if name in INCREMENTAL_WINDOWS and len(arguments) == 1 and isinstance(arguments[0], Window):
            window = arguments[0]
            _refuse_shifted(window.selector)
            self._store.watch(window.selector, window.seconds * 1000)
            leaf = self.build(window.selector)
            assert isinstance(leaf, Leaf)
            return Windowed(leaf, name, window.seconds * 1000, self._clock)
        if any(isinstance(argument, Subquery) for argument in arguments):
            raise NotIncremental("a subquery evaluates the past anew")
        parameters = [constant(argument) for argument in arguments[1:]]
        if name in ELEMENTWISE and arguments and None not in parameters and (name not in CALENDAR or arguments):
            if name == "clamp" and parameters[1] < parameters[0]:  # type: ignore[operator]
                raise NotIncremental("clamp with its limits the wrong way round gives nothing")
            function, fixed = ELEMENTWISE[name], [np.float64(parameter) for parameter in parameters]
            return Each(self.build(arguments[0]), lambda values: function(values, *fixed))
        raise NotIncremental(f"{name}() needs all that it looks at, each time")

    def _relabelled(self, name: str, inner: Expression, texts: list[Text]) -> Node:
        if any(text.value == NAME for text in texts):
            raise NotIncremental("it looks at the metric's name, or changes it")
        try:
            function: Callable[[Labels], Labels] = (
                relabel.replacer(*texts) if name == "label_replace" else relabel.joiner(texts[0], texts[1], texts[2:])
            )
        except EvaluationError as error:
            raise NotIncremental(error.what) from None
        return Relabelled(self.build(inner), function)


def _refuse_shifted(selector: Selector) -> None:
    if selector.edges:
        raise NotIncremental(f"it looks beyond its window ({selector.edges})")
    if selector.shifted:
        raise NotIncremental("it looks at another time (offset or @)")


def reachable(root: Node) -> Iterator[Node]:
    yield root
    for child in root.children:
        yield from reachable(child)


def _as_number(test: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda left, right: test(left, right).astype(float)
