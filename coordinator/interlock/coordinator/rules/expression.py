"""The tree of an expression, as the engine sees it: small, typed, and without anything that isn't supported.

All durations are seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from interlock.broker.samples import NAME, Labels

MatchOp = Literal["=", "!=", "=~", "!~"]
Cardinality = Literal["one-to-one", "many-to-one", "one-to-many", "many-to-many"]


@dataclass(frozen=True)
class Matcher:
    """One condition of a selector. A label that a series lacks counts as empty, as in Prometheus."""

    label: str
    op: MatchOp
    value: str
    _test: Callable[[str], object] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.op in ("=", "!="):
            test: Callable[[str], object] = self.value.__eq__
        else:
            test = re.compile(python_pattern(self.value), re.DOTALL).fullmatch
        object.__setattr__(self, "_test", test)

    def matches(self, value: str) -> bool:
        return bool(self._test(value)) is (self.op in ("=", "=~"))


def python_pattern(pattern: str) -> str:
    """A pattern of RE2 for Python's `re`: a flag group such as `(?i)` inside holds up to the end of its group.

    ValueError for what Python would read differently without saying so.
    """
    if re.search(r"\[\[:|&&|~~|\(\?[imsU]*U", pattern):
        raise ValueError("named classes, set operations and the U flag of a regular expression are not supported")
    out: list[str] = []
    opened = [0]  # flag groups opened inside each open group, to close with it
    at, in_class = 0, False
    while at < len(pattern):
        char = pattern[at]
        flags = re.compile(r"\(\?([a-zA-Z-]+)\)").match(pattern, at) if char == "(" and not in_class else None
        if char == "\\":
            out.append(pattern[at : at + 2])
            at += 2
            continue
        if flags is not None:
            out.append(f"(?{flags[1]}:")
            opened[-1] += 1
            at = flags.end()
            continue
        if in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char == "(":
            opened.append(0)
        elif char == ")":
            out.append(")" * (opened.pop() if len(opened) > 1 else 0))
        out.append(char)
        at += 1
    return "".join(out) + ")" * opened[0]


@dataclass(frozen=True)
class Number:
    value: float


@dataclass(frozen=True)
class Text:
    """A string. `valid`: it is UTF-8; one that isn't is no label name."""

    value: str
    valid: bool = True


Moment = float | Literal["start", "end"]  # seconds, or an end of the range that is evaluated
Edges = Literal["", "anchored", "smoothed"]


@dataclass(frozen=True)
class Selector:
    """Series by their labels; the newest sample of each. The metric's name is a matcher on `__name__`.

    `alternatives`: of these groups of matchers, one must match too. `offset_s` is subtracted from `at`, or from the
    time of the evaluation. `edges`: what counts at the ends of a window beside the samples in it, the newest sample
    before it (anchored), or what a line through the samples on both sides gives (smoothed).
    """

    matchers: tuple[Matcher, ...]
    offset_s: float = 0.0
    at: Moment | None = None
    alternatives: tuple[tuple[Matcher, ...], ...] = ()
    edges: Edges = ""

    def matches(self, labels: Labels) -> bool:
        found = dict(labels)
        return all(matcher.matches(found.get(matcher.label, "")) for matcher in self.matchers) and (
            not self.alternatives
            or any(all(one.matches(found.get(one.label, "")) for one in group) for group in self.alternatives)
        )

    @property
    def metric(self) -> str | None:
        """The metric's name, where the selector asks for exactly one."""
        return next((m.value for m in self.matchers if m.label == NAME and m.op == "="), None)

    @property
    def shifted(self) -> bool:
        """It looks at other samples than those up to the time of the evaluation."""
        return self.offset_s != 0.0 or self.at is not None or bool(self.edges)


@dataclass(frozen=True)
class Window:
    """All samples of a selector's series in the last `seconds`; the oldest moment itself is outside."""

    selector: Selector
    seconds: float


@dataclass(frozen=True)
class Subquery:
    """The operand's values in the last `seconds`, at multiples of `step_s`; None: the default step."""

    operand: Expression
    seconds: float
    step_s: float | None = None
    offset_s: float = 0.0
    at: Moment | None = None


@dataclass(frozen=True)
class Negate:
    operand: Expression


@dataclass(frozen=True)
class Matching:
    """Which elements of two vectors belong together; `include`: labels copied from the one side of many-to-one.

    `fill_left`, `fill_right`: the value of an element that is missing on that side.
    """

    cardinality: Cardinality = "one-to-one"
    on: bool = False
    labels: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    fill_left: float | None = None
    fill_right: float | None = None


@dataclass(frozen=True)
class Binary:
    op: str
    left: Expression
    right: Expression
    matching: Matching = Matching()
    bool: bool = False


@dataclass(frozen=True)
class Aggregate:
    op: str
    operand: Expression
    labels: tuple[str, ...] = ()
    without: bool = False
    parameter: Expression | None = None


@dataclass(frozen=True)
class Call:
    function: str
    arguments: tuple[Expression, ...] = ()


Expression = Number | Text | Selector | Window | Subquery | Negate | Binary | Aggregate | Call

SCALAR_FUNCTIONS = ("time", "scalar", "pi", "start", "end", "step", "range", "max_of", "min_of")


def is_scalar(expression: Expression) -> bool:
    """Whether it gives a single number; a vector otherwise."""
    match expression:
        case Number():
            return True
        case Negate(operand):
            return is_scalar(operand)
        case Binary(left=left, right=right):
            return is_scalar(left) and is_scalar(right)
        case Call(function=function):
            return function in SCALAR_FUNCTIONS
        case _:
            return False


def parts(expression: Expression) -> Iterator[Expression]:
    """The expression and all that it is made of, outermost first."""
    yield expression
    match expression:
        case Window(selector):
            yield selector
        case Subquery(operand) | Negate(operand):
            yield from parts(operand)
        case Binary(left=left, right=right):
            yield from parts(left)
            yield from parts(right)
        case Aggregate(operand=operand, parameter=parameter):
            if parameter is not None:
                yield from parts(parameter)
            yield from parts(operand)
        case Call(arguments=arguments):
            for argument in arguments:
                yield from parts(argument)


def selectors(expression: Expression) -> Iterator[Selector]:
    return (part for part in parts(expression) if isinstance(part, Selector))
