"""PromQL text -> our tree. The only module that imports promql_parser.

The parser knows all of the language and its types; what the engine can't evaluate is refused here, by name, so that a
rule that loads is a rule that works.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, cast

import promql_parser as promql

from interlock.broker.errors import ConfigError
from interlock.broker.samples import NAME
from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Cardinality,
    Edges,
    Expression,
    Matcher,
    Matching,
    MatchOp,
    Moment,
    Negate,
    Number,
    Selector,
    Subquery,
    Text,
    Window,
)
from interlock.coordinator.rules.operators import (
    AGGREGATIONS,
    ARITHMETIC,
    COMPARISONS,
    ELEMENTWISE,
    OTHER_FUNCTIONS,
    SETS,
    WINDOWED,
)
from interlock.coordinator.rules.spelling import BEFORE_1970, EDGES, ONE_MOMENT, Span, respelled

_MATCH_OPS: dict[str, MatchOp] = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}
_CARDINALITIES: dict[str, Cardinality] = {
    "OneToOne": "one-to-one",
    "ManyToOne": "many-to-one",
    "OneToMany": "one-to-many",
    "ManyToMany": "many-to-many",
}
_NATIVE = ("histogram_count", "histogram_sum", "histogram_avg", "histogram_stddev", "histogram_stdvar")
_MATRIX, _VECTOR, _SCALAR = promql.ValueType.Matrix, promql.ValueType.Vector, promql.ValueType.Scalar
promql.register_extra_functions(
    [
        promql.Function("absent_each", [_MATRIX], _VECTOR),
        promql.Function("anomaly_score", [_MATRIX], _VECTOR),
        promql.Function("baseline", [_VECTOR], _VECTOR),
        promql.Function("holt_winters", [_MATRIX, _SCALAR, _SCALAR], _VECTOR),  # the older name of a function
    ]
)
MAX_EXPRESSION = 20_000  # characters: the longest of 1,093 public rules has some 2,000
MAX_PARTS = 1_000  # parentheses and operators: the parser recurses, and some 2,500 exhaust its stack, which is fatal
MAX_DEPTH = 100  # nested nodes; deeper ones would exhaust Python's stack in the evaluation


_STRING = re.compile(r""" "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | `[^`]*` """, re.VERBOSE)
_BYTES = re.compile(r"\\x[89a-fA-F]|\\[23][0-7]{2}")  # one that stands for itself and not for a character
_TRIMMED = re.compile(r"</|>/")
_PART = re.compile(r"[-+*/%^(]|[=!<>]=?|\b(?:and|or|unless|atan2)\b", re.IGNORECASE)


class NotSupported(ConfigError):
    """A construct that parses, and that we don't run. `what` names it."""


def parse(text: str, *, where: str = "expression", span: Span = ONE_MOMENT) -> Expression:
    """The tree of a PromQL expression. ConfigError where it is wrong; NotSupported names what we don't run.

    `span`: of the range that it is for, if its durations are to say `step()` or `range()`.
    """
    if len(text) > MAX_EXPRESSION:
        raise ConfigError(f"the expression has {len(text)} characters", where=where, hint=f"at most {MAX_EXPRESSION}")
    bare = _STRING.sub("", text)
    parts = len(_PART.findall(bare))
    if parts > MAX_PARTS:
        raise ConfigError(
            f"{_shown(text)} has {parts} operators and parentheses", where=where, hint=f"at most {MAX_PARTS}"
        )
    try:
        tree = promql.parse(respelled(text, span, where=where))
    except ValueError as error:
        if _TRIMMED.search(bare):
            raise NotSupported(
                f"native histograms are: the operators </ and >/ are not supported in {_shown(text)}", where=where
            ) from None
        raise ConfigError(f"{_shown(text)} is not PromQL: {error}", where=where) from None
    except BaseException as error:  # the parser is Rust: its panic is no Exception, and no end of ours
        if type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{_shown(text)} is not PromQL: the parser gives up on it", where=where) from None
    return _Reader(text, where).read(tree, 0)


def _shown(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 80 else flat[:77] + "...")


def _kind(value: Any) -> str:
    """The bare name of one of the parser's enumeration values."""
    return str(value).rsplit(".", 1)[-1]


class _Reader:
    """One walk over the parser's tree; knows the text and the place for its errors."""

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.where = where

    def unsupported(self, construct: str) -> NotSupported:
        return NotSupported(f"{construct} not supported in {_shown(self.text)}", where=self.where)

    def read(self, tree: Any, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise ConfigError(
                f"{_shown(self.text)} is nested too deeply", where=self.where, hint=f"at most {MAX_DEPTH}"
            )
        depth += 1
        match tree:
            case promql.NumberLiteral():
                return Number(float(tree.val))
            case promql.ParenExpr():
                return self.read(tree.expr, depth)
            case promql.VectorSelector():
                return self.selector(tree)
            case promql.MatrixSelector():
                return Window(self.selector(tree.vector_selector), _seconds(tree.range))
            case promql.UnaryExpr():
                return Negate(self.read(tree.expr, depth))
            case promql.BinaryExpr():
                return self.binary(tree, depth)
            case promql.AggregateExpr():
                return self.aggregate(tree, depth)
            case promql.Call():
                return self.call(tree, depth)
            case promql.SubqueryExpr():
                step = None if tree.step is None else _seconds(tree.step)
                operand = self.read(tree.expr, depth)
                return Subquery(operand, _seconds(tree.range), step, _offset(tree), self.moment(tree))
            case promql.StringLiteral():
                return Text(tree.val, valid=_BYTES.search(self.text) is None)
        raise self.unsupported(f"{type(tree).__name__} is")

    def selector(self, tree: Any) -> Selector:
        name = () if tree.name is None else (Matcher(NAME, "=", tree.name),)
        groups = [self.matchers(group) for group in (tree.matchers.matchers, *tree.matchers.or_matchers)]
        edges = next((one.value for group in groups for one in group if one.label == EDGES), "none")
        first, *others = (tuple(one for one in group if one.label != EDGES) for group in groups)
        return Selector(
            (*name, *first),
            _offset(tree),
            self.moment(tree),
            tuple(others),
            cast(Edges, edges if edges != "none" else ""),
        )

    def matchers(self, found: Any) -> tuple[Matcher, ...]:
        made = []
        for each in found:
            try:
                made.append(Matcher(each.name, _MATCH_OPS[_kind(each.op)], each.value))
            except ValueError as error:  # re.error among them
                raise self.unsupported(f"the regular expression {each.value!r} ({error}) is") from None
        return tuple(made)

    def moment(self, tree: Any) -> Moment | None:
        """What stands behind @."""
        if tree.at is None:
            return None
        kind = _kind(tree.at.type)
        if kind in ("Start", "End"):
            return "start" if kind == "Start" else "end"
        seconds = float(tree.at.at.timestamp())
        return BEFORE_1970 - seconds if seconds >= BEFORE_1970 else seconds

    def binary(self, tree: Any, depth: int) -> Binary:
        op = str(tree.op)
        if op not in ARITHMETIC and op not in COMPARISONS and op not in SETS:
            raise self.unsupported(f"the operator {op!r} is")
        left, right = self.read(tree.lhs, depth), self.read(tree.rhs, depth)
        modifier = tree.modifier
        if modifier is None:
            return Binary(op, left, right, Matching("many-to-many" if op in SETS else "one-to-one"))
        fill = modifier.fill_values
        matching = Matching(
            cardinality=_CARDINALITIES[_kind(modifier.card)],
            on=modifier.matching is not None and _kind(modifier.matching.type) == "Include",
            labels=() if modifier.matching is None else tuple(modifier.matching.labels),
            include=tuple(modifier.group_labels or ()),
            fill_left=None if fill is None else fill.lhs,
            fill_right=None if fill is None else fill.rhs,
        )
        return Binary(op, left, right, matching, bool(modifier.return_bool))

    def aggregate(self, tree: Any, depth: int) -> Aggregate:
        op = str(tree.op)
        if op not in AGGREGATIONS:
            raise self.unsupported(f"the aggregation {op!r} is")
        return Aggregate(
            op,
            self.read(tree.expr, depth),
            labels=() if tree.modifier is None else tuple(tree.modifier.labels),
            without=tree.modifier is not None and _kind(tree.modifier.type) == "Without",
            parameter=None if tree.param is None else self.read(tree.param, depth),
        )

    def call(self, tree: Any, depth: int) -> Call:
        name = cast(str, tree.func.name)
        if name in _NATIVE:
            raise self.unsupported(f"native histograms are: {name}() is")
        if name not in ELEMENTWISE and name not in WINDOWED and name not in OTHER_FUNCTIONS:
            raise self.unsupported(f"the function {name}() is")
        arguments = tuple(self.read(argument, depth) for argument in tree.args)
        if name == "info" and len(arguments) > 1 and not isinstance(arguments[1], Selector):
            raise ConfigError("info() takes label matchers in braces as its second argument", where=self.where)
        if name == "baseline" and not (isinstance(arguments[0], Selector) and not arguments[0].shifted):
            raise ConfigError("baseline() takes a plain selector", where=self.where)
        if name in ("absent_each", "anomaly_score") and not isinstance(arguments[0], Window):
            raise ConfigError(f"{name}() takes a selector with a window, such as x[3s]", where=self.where)
        return Call(name, arguments)


def _seconds(length: timedelta | None) -> float:
    return 0.0 if length is None else round(length.total_seconds() * 1000) / 1000


def _offset(tree: Any) -> float:
    return 0.0 if tree.offset is None else _seconds(tree.offset)
