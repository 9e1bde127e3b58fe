"""How far back an expression looks at each of its selectors: what the rings must keep. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from interlock.coordinator.rules.evaluate import LOOKBACK_S, SUBQUERY_STEP_S
from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Expression,
    Negate,
    Selector,
    Subquery,
    Window,
)
from interlock.coordinator.rules.rule import Rule

AT_KEEP_S = 3600.0  # behind a fixed moment (@ 1700000000) there is no saying how long ago that will be
SAMPLED_KEEP_S = 5.0  # a rule with an interval looks at a moment that is a little past: one tick, or a long pause

Wanted = tuple[Selector, float, bool]  # a plain selector, seconds, whether it is of what was recorded as a baseline


def wanted(rule: Rule, *, lookback_s: float = LOOKBACK_S) -> list[Wanted]:
    """The selectors of a rule; 0 seconds where only the newest sample counts.

    `lookback_s`: how long a sample of the past counts for, where none followed.
    """
    least = SAMPLED_KEEP_S if rule.interval_s else 0.0
    found: dict[tuple[Selector, bool], float] = {}
    expressions = [rule.expression, *([rule.resolve] if rule.resolve is not None else [])]
    for expression in expressions:
        for selector, keep_s, recorded in _wanted(expression, 0.0, lookback_s):
            found[selector, recorded] = max(found.get((selector, recorded), least), keep_s)
    return [(selector, keep_s, recorded) for (selector, recorded), keep_s in found.items()]


def _wanted(expression: Expression, back_s: float, lookback_s: float) -> Iterator[Wanted]:
    match expression:
        case Selector():
            shifted = _shift(expression, back_s)
            around = shifted > 0 or expression.edges
            yield _plain(expression), shifted + lookback_s if around else 0.0, False
        case Window(selector, seconds):
            before = lookback_s if selector.edges else 0.0
            yield _plain(selector), _shift(selector, back_s) + before + seconds, False
        case Subquery(operand, seconds, step_s):
            step = SUBQUERY_STEP_S if step_s is None else step_s
            yield from _wanted(operand, _shift(expression, back_s) + seconds + step, lookback_s)
        case Call("baseline", (Selector() as selector,)):
            yield _plain(selector), 0.0, True
        case Call(arguments=arguments):
            for argument in arguments:
                yield from _wanted(argument, back_s, lookback_s)
        case Negate(operand):
            yield from _wanted(operand, back_s, lookback_s)
        case Binary(left=left, right=right):
            yield from _wanted(left, back_s, lookback_s)
            yield from _wanted(right, back_s, lookback_s)
        case Aggregate(operand=operand, parameter=parameter):
            yield from _wanted(operand, back_s, lookback_s)
            if parameter is not None:
                yield from _wanted(parameter, back_s, lookback_s)


def _shift(shifted: Selector | Subquery, back_s: float) -> float:
    if isinstance(shifted.at, float):
        return max(0.0, shifted.offset_s) + AT_KEEP_S
    return max(0.0, back_s + shifted.offset_s)


def _plain(selector: Selector) -> Selector:
    return Selector(selector.matchers, alternatives=selector.alternatives)
