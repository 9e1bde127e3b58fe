"""What an expression can be worth, and why it can give nothing: from its text alone. Pure.

Bounds are of the values of the elements that it gives. They are wide where nothing is known; where they are empty, or
two conditions exclude each other, the rule can never fire.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Expression,
    Matcher,
    Negate,
    Selector,
    Subquery,
    Window,
    is_scalar,
    parts,
)
from interlock.coordinator.rules.graph import constant
from interlock.coordinator.rules.operators import COMPARISONS

Bounds = tuple[float, float]
EVERYTHING: Bounds = (-math.inf, math.inf)
_AT_LEAST_0: Bounds = (0.0, math.inf)

_ALTERNATIVES = re.compile(r"[\w :./@-]*(?:\|[\w :./@-]*)*")  # a pattern that only lists texts
_SAME = ("max", "min", "avg", "quantile", "topk", "bottomk", "limitk", "limit_ratio")  # within their elements' bounds
_SAME_OVER_TIME = ("max_over_time", "min_over_time", "avg_over_time", "last_over_time", "first_over_time")
_SAME_CALLS = ("sort", "sort_desc", "sort_by_label", "sort_by_label_desc", "label_replace", "label_join", "scalar")
_FIXED: Mapping[str, Bounds] = {
    **dict.fromkeys(("absent", "absent_over_time", "absent_each", "present_over_time"), (1.0, 1.0)),
    **dict.fromkeys(("rate", "increase", "irate", "changes", "resets", "abs", "sqrt", "anomaly_score"), _AT_LEAST_0),
    **dict.fromkeys(("stddev_over_time", "stdvar_over_time", "mad_over_time", "time", "exp"), _AT_LEAST_0),
    "count_over_time": (1.0, math.inf),
    "sgn": (-1.0, 1.0),
    "sin": (-1.0, 1.0),
    "cos": (-1.0, 1.0),
    "hour": (0.0, 23.0),
    "minute": (0.0, 59.0),
    "month": (1.0, 12.0),
    "day_of_month": (1.0, 31.0),
    "day_of_week": (0.0, 6.0),
    "day_of_year": (1.0, 366.0),
    "days_in_month": (28.0, 31.0),
}

Known = Callable[[Selector], Bounds]


def impossible(expression: Expression, known: Known) -> list[str]:
    """Why it can never give an element; empty if nothing speaks against it."""
    return _Reach(known).reasons(expression)


def contradiction(selector: Selector) -> str:
    """Two matchers of one label that no series fulfils together; empty if there are none."""
    by_label: dict[str, list[Matcher]] = {}
    for matcher in selector.matchers:
        by_label.setdefault(matcher.label, []).append(matcher)
    for label, matchers in by_label.items():
        candidates = _candidates(matchers)
        if candidates is not None and not any(all(one.matches(text) for one in matchers) for text in candidates):
            said = ", ".join(f'{label}{one.op}"{one.value}"' for one in matchers)
            return f"no series fulfils {said} together"
    return ""


def _candidates(matchers: Sequence[Matcher]) -> list[str] | None:
    """All texts that one of the matchers lets through, if they are few."""
    for matcher in matchers:
        if matcher.op == "=":
            return [matcher.value]
    for matcher in matchers:
        if matcher.op == "=~" and _ALTERNATIVES.fullmatch(matcher.value) and "." not in matcher.value:
            return matcher.value.split("|")
    return None


class _Reach:
    def __init__(self, known: Known) -> None:
        self._known = known

    # --- can it give an element at all

    def reasons(self, tree: Expression) -> list[str]:
        match tree:
            case Selector():
                found = contradiction(tree)
                return [found] if found else []
            case Window(selector):
                return self.reasons(selector)
            case Subquery(operand) | Negate(operand):
                return self.reasons(operand)
            case Aggregate(operand=operand):
                return self.reasons(operand)
            case Binary():
                return self._of_binary(tree)
            case Call(function, arguments):
                if function in ("absent", "absent_over_time", "vector", "scalar", "time"):
                    return []  # these give something where their argument gives nothing
                return [reason for argument in arguments for reason in self.reasons(argument)]
        return []

    def _of_binary(self, tree: Binary) -> list[str]:
        filled = tree.matching.fill_left is not None or tree.matching.fill_right is not None
        left, right = self.reasons(tree.left), self.reasons(tree.right)
        if tree.op == "or":
            return [*left, *right] if left and right else []
        if tree.op == "unless":
            return left or self._unless(tree)
        inner = [] if filled else [*left, *right]
        if inner:
            return inner
        if tree.op == "and":
            return self._and(tree)
        if tree.op in COMPARISONS and not tree.bool and not is_scalar(tree):
            return self._compared(tree)
        return []

    def _compared(self, tree: Binary) -> list[str]:
        for side in (tree.left, tree.right):
            value = constant(side)
            if value is not None and math.isnan(value) and tree.op != "!=":
                return [f"nothing is {tree.op} NaN"]
        left, right = self.bounds(tree.left), self.bounds(tree.right)
        if _excludes(tree.op, left, right):
            return [f"its left side is {_said(left)}, its right side {_said(right)}: {tree.op} never holds"]
        return []

    def _and(self, tree: Binary) -> list[str]:
        """Conditions of one and the same operand that exclude each other: x > 5 and x < 3."""
        if not _whole(tree):
            return []
        found: dict[Expression, Bounds] = {}
        for operand, bounds in self._conditions(tree):
            before = found.get(operand, self.bounds(operand))
            both = max(before[0], bounds[0]), min(before[1], bounds[1])
            if both[0] > both[1] or (both[0] == both[1] and self._open_at(tree, operand, both[0])):
                return [f"its conditions exclude each other: one asks for {_said(before)}, another for {_said(bounds)}"]
            found[operand] = both
        return []

    def _unless(self, tree: Binary) -> list[str]:
        if not _whole(tree):
            return []
        right = dict(self._conditions(tree.right)) or {tree.right: EVERYTHING}
        if len(right) > 1:  # all of them must hold for an element to be taken away
            return []
        for operand, bounds in [*self._conditions(tree.left), (tree.left, EVERYTHING)]:
            taken = right.get(operand)
            if tree.left == tree.right or (taken is not None and _within(bounds, taken)):
                return ["what stands behind unless takes away all that stands before it"]
        return []

    def _conditions(self, tree: Expression) -> Iterable[tuple[Expression, Bounds]]:
        """(operand, what a comparison with a number leaves of it), of all that must hold together."""
        match tree:
            case Binary("and", left, right) if _whole(tree):
                yield from self._conditions(left)
                yield from self._conditions(right)
            case Binary(op, left, right) if op in COMPARISONS and not tree.bool:
                value = constant(right)
                if value is not None:
                    yield left, _left_by(op, value)
                    yield from self._conditions(left)

    def _open_at(self, tree: Expression, operand: Expression, value: float) -> bool:
        """Whether a strict comparison of the operand leaves this very value out."""
        return any(
            isinstance(part, Binary)
            and part.left == operand
            and part.op in ("<", ">")
            and constant(part.right) == value
            for part in parts(tree)
        )

    # --- what it can be worth

    def bounds(self, tree: Expression) -> Bounds:
        value = constant(tree)
        if value is not None:
            return (value, value)
        match tree:
            case Selector():
                return self._known(tree)
            case Window(selector):
                return self.bounds(selector)
            case Subquery(operand):
                return self.bounds(operand)
            case Negate(operand):
                low, high = self.bounds(operand)
                return (-high, -low)
            case Aggregate(op, operand):
                return self._of_aggregate(op, operand)
            case Binary():
                return self._of_operator(tree)
            case Call(function, arguments):
                return self._of_call(function, arguments)
        return EVERYTHING

    def _of_aggregate(self, op: str, operand: Expression) -> Bounds:
        if op in _SAME:
            return self.bounds(operand)
        if op == "group":
            return (1.0, 1.0)
        if op in ("count", "count_values"):
            return (1.0, math.inf)
        if op in ("stddev", "stdvar") or (op == "sum" and self.bounds(operand)[0] >= 0):
            return _AT_LEAST_0
        return EVERYTHING

    def _of_operator(self, tree: Binary) -> Bounds:
        left, right = self.bounds(tree.left), self.bounds(tree.right)
        if tree.bool:
            return (0.0, 1.0)
        if tree.op in COMPARISONS:
            value = constant(tree.right)
            if value is None:
                return left if not is_scalar(tree.left) else right
            kept = _left_by(tree.op, value)
            return max(left[0], kept[0]), min(left[1], kept[1])
        if tree.op in ("and", "unless"):
            return left
        if tree.op == "or":
            return min(left[0], right[0]), max(left[1], right[1])
        return _arithmetic(tree.op, left, right)

    def _of_call(self, function: str, arguments: tuple[Expression, ...]) -> Bounds:
        if function in ("clamp", "clamp_min", "clamp_max") and arguments:
            low, high = self.bounds(arguments[0])
            limits = [constant(argument) for argument in arguments[1:]]
            if None in limits:
                return EVERYTHING
            least = limits[0] if function != "clamp_max" else None
            most = limits[-1] if function != "clamp_min" else None
            low, high = (max(low, least), max(high, least)) if least is not None else (low, high)
            return (min(low, most), min(high, most)) if most is not None else (low, high)
        if function in _FIXED:
            return _FIXED[function]
        if function in _SAME_OVER_TIME or function in _SAME_CALLS or function in ("vector", "baseline"):
            return self.bounds(arguments[0])
        return EVERYTHING


def _within(inner: Bounds, outer: Bounds) -> bool:
    """Strictly, since bounds don't say whether they belong to it."""
    low = outer[0] < inner[0] or math.isinf(outer[0])
    return low and (inner[1] < outer[1] or math.isinf(outer[1]))


def _whole(tree: Binary) -> bool:
    """Whether both sides are compared with all of their labels, and not with some."""
    return not tree.matching.on and not tree.matching.labels


def _arithmetic(op: str, left: Bounds, right: Bounds) -> Bounds:
    if op == "+":
        return _number(left[0] + right[0], -math.inf), _number(left[1] + right[1], math.inf)
    if op == "-":
        return _number(left[0] - right[1], -math.inf), _number(left[1] - right[0], math.inf)
    if op in ("*", "/") and left[0] >= 0 and right[0] >= 0:
        if op == "*" and math.isfinite(left[1]) and math.isfinite(right[1]):
            return left[0] * right[0], left[1] * right[1]
        if op == "/" and right[0] == right[1] != 0:
            return left[0] / right[0], left[1] / right[0]
        return _AT_LEAST_0
    return EVERYTHING


def _number(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


def _left_by(op: str, value: float) -> Bounds:
    if op in (">", ">="):
        return (value, math.inf)
    if op in ("<", "<="):
        return (-math.inf, value)
    return (value, value) if op == "==" else EVERYTHING


def _excludes(op: str, left: Bounds, right: Bounds) -> bool:
    match op:
        case ">":
            return left[1] <= right[0]
        case ">=":
            return left[1] < right[0]
        case "<":
            return left[0] >= right[1]
        case "<=":
            return left[0] > right[1]
        case "==":
            return left[1] < right[0] or left[0] > right[1]
        case "!=":
            return left[0] == left[1] == right[0] == right[1]
    return False


def _said(bounds: Bounds) -> str:
    low, high = bounds
    if low == high:
        return f"{low:g}"
    if math.isinf(low) and math.isinf(high):
        return "any number"
    if math.isinf(high):
        return f"at least {low:g}"
    return f"at most {high:g}" if math.isinf(low) else f"between {low:g} and {high:g}"
