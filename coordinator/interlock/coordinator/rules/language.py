"""PromQL text -> our tree. The only module that imports promql_parser.

The parser knows all of the language and its types; what the engine can't evaluate is refused here, by name, so that a
rule that loads is a rule that works.
"""

from __future__ import annotations

import re
from typing import Any, cast

import promql_parser as promql

from interlock.broker.errors import ConfigError
from interlock.broker.samples import NAME
from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Cardinality,
    Expression,
    Matcher,
    Matching,
    MatchOp,
    Negate,
    Number,
    Selector,
    Window,
)
from interlock.coordinator.rules.operators import AGGREGATIONS, ARITHMETIC, COMPARISONS, ELEMENTWISE, SETS, WINDOWED

_MATCH_OPS: dict[str, MatchOp] = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}
_CARDINALITIES: dict[str, Cardinality] = {
    "OneToOne": "one-to-one",
    "ManyToOne": "many-to-one",
    "OneToMany": "one-to-many",
    "ManyToMany": "many-to-many",
}
_OTHER_CALLS = ("absent", "absent_over_time", "scalar", "vector", "time", "timestamp")
MAX_EXPRESSION = 20_000  # characters: the longest of 1,093 public rules has some 2,000
MAX_PARTS = 1_000  # parentheses and operators: the parser recurses, and some 2,500 exhaust its stack, which is fatal
MAX_DEPTH = 100  # nested nodes; deeper ones would exhaust Python's stack in the evaluation


_STRING = re.compile(r""" "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | `[^`]*` """, re.VERBOSE)
_PART = re.compile(r"[-+*/%^(]|[=!<>]=?|\b(?:and|or|unless|atan2)\b", re.IGNORECASE)


def parse(text: str, *, where: str = "expression") -> Expression:
    """The tree of a PromQL expression. ConfigError where it is wrong, or names a construct that isn't supported."""
    if len(text) > MAX_EXPRESSION:
        raise ConfigError(f"the expression has {len(text)} characters", where=where, hint=f"at most {MAX_EXPRESSION}")
    parts = len(_PART.findall(_STRING.sub("", text)))
    if parts > MAX_PARTS:
        raise ConfigError(
            f"{_shown(text)} has {parts} operators and parentheses", where=where, hint=f"at most {MAX_PARTS}"
        )
    try:
        tree = promql.parse(text)
    except ValueError as error:
        raise ConfigError(f"{_shown(text)} is not PromQL: {error}", where=where) from None
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

    def unsupported(self, construct: str) -> ConfigError:
        return ConfigError(f"{construct} not supported in {_shown(self.text)}", where=self.where)

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
                return Window(self.selector(tree.vector_selector), tree.range.total_seconds())
            case promql.UnaryExpr():
                return Negate(self.read(tree.expr, depth))
            case promql.BinaryExpr():
                return self.binary(tree, depth)
            case promql.AggregateExpr():
                return self.aggregate(tree, depth)
            case promql.Call():
                return self.call(tree, depth)
            case promql.SubqueryExpr():
                raise self.unsupported("subqueries are")
            case promql.StringLiteral():
                raise self.unsupported("string values are")
        raise self.unsupported(f"{type(tree).__name__} is")

    def selector(self, tree: Any) -> Selector:
        if tree.offset is not None:
            raise self.unsupported("the offset modifier is")
        if tree.at is not None:
            raise self.unsupported("the @ modifier is")
        if tree.matchers.or_matchers:
            raise self.unsupported("'or' between label matchers is")
        matchers = [] if tree.name is None else [Matcher(NAME, "=", tree.name)]
        for found in tree.matchers.matchers:
            try:
                matchers.append(Matcher(found.name, _MATCH_OPS[_kind(found.op)], found.value))
            except ValueError as error:  # re.error among them
                raise self.unsupported(f"the regular expression {found.value!r} ({error}) is") from None
        return Selector(tuple(matchers))

    def binary(self, tree: Any, depth: int) -> Binary:
        op = str(tree.op)
        if op not in ARITHMETIC and op not in COMPARISONS and op not in SETS:
            raise self.unsupported(f"the operator {op!r} is")
        left, right = self.read(tree.lhs, depth), self.read(tree.rhs, depth)
        modifier = tree.modifier
        if modifier is None:
            return Binary(op, left, right, Matching("many-to-many" if op in SETS else "one-to-one"))
        fill = modifier.fill_values
        if fill is not None and (fill.lhs is not None or fill.rhs is not None):
            raise self.unsupported("the fill modifier is")
        matching = Matching(
            cardinality=_CARDINALITIES[_kind(modifier.card)],
            on=modifier.matching is not None and _kind(modifier.matching.type) == "Include",
            labels=() if modifier.matching is None else tuple(modifier.matching.labels),
            include=tuple(modifier.group_labels or ()),
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
        if name not in ELEMENTWISE and name not in WINDOWED and name not in _OTHER_CALLS:
            raise self.unsupported(f"the function {name}() is")
        arguments = tuple(self.read(argument, depth) for argument in tree.args)
        if name == "timestamp" and not isinstance(arguments[0], Selector):
            raise self.unsupported("timestamp() of anything but a selector is")
        return Call(name, arguments)
