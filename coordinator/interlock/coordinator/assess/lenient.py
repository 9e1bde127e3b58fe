"""A syntax tree of source that is none, by an error-tolerant parser. The only module that imports tree_sitter.

What tree-sitter makes of the text is put into Python's own nodes, as far as names, calls, definitions and constants go,
so that one walk reads both. What it could not make sense of is left out, and what stands inside of that is kept.
Python 2's print and exec are statements to it, and `except A, e` is known.
"""

from __future__ import annotations

import ast
from functools import cache
from typing import Any, cast

import tree_sitter
import tree_sitter_python

DEPTH = 150  # of nested nodes: each level costs the stack three frames, and nobody nests code deeper
MAX_NODES = 400_000  # of a file: a source of 2 MiB has so many; beyond, the rest is left out
MAX_CHILDREN = 2000  # of one place that could not be read
_HEADERS = {"if_statement", "elif_clause", "while_statement", "for_statement", "with_statement", "try_statement"}


@cache
def _parser() -> tree_sitter.Parser:
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_python.language()))


def parse(text: str) -> ast.Module:
    """Never fails: of text that is no Python at all, an empty module."""
    raw = text.encode("utf-8", "replace")
    root = _parser().parse(raw).root_node
    return ast.Module(body=_Lenient(raw).statements(root, 0), type_ignores=[])


def _at(new: Any, node: Any) -> Any:
    new.lineno, new.col_offset = node.start_point[0] + 1, node.start_point[1]
    new.end_lineno, new.end_col_offset = node.end_point[0] + 1, node.end_point[1]
    return new


class _Lenient:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._left = MAX_NODES

    def _text(self, node: Any) -> str:
        return self._raw[node.start_byte : node.end_byte].decode("utf-8", "replace")

    # --- statements

    def statements(self, node: Any, depth: int) -> list[ast.stmt]:
        """What stands in a block, or in what could not be read, as statements."""
        made: list[ast.stmt] = []
        if depth > DEPTH:
            return made
        for child in node.named_children:
            self._left -= 1
            if self._left < 0:
                return made
            made += self._statement(child, depth + 1)
        return made

    def _statement(self, node: Any, depth: int) -> list[ast.stmt]:
        kind = node.type
        special = _STATEMENTS.get(kind)
        if special is not None:
            found = special(self, node, depth)
            return found if isinstance(found, list) else [_at(found, node)]
        if kind in ("comment", "identifier") or depth > DEPTH:
            return []
        if kind == "ERROR":
            return [*self._begun_calls(node, depth), *self._inside(node, depth)]
        if kind in ("block", "else_clause", "finally_clause", "expression_statement", "decorated_definition",
                    *_HEADERS, "except_clause", "match_statement", "case_clause", "module"):  # fmt: skip
            return self._inside(node, depth)
        value = self.expression(node, depth)
        return [_at(ast.Expr(value=value), node)] if value is not None else []

    def _begun_calls(self, node: Any, depth: int) -> list[ast.stmt]:
        """Calls whose parenthesis was never closed, with their first argument."""
        made: list[ast.stmt] = []
        children = node.children[:MAX_CHILDREN]
        for before, sign, after in zip(children, children[1:], [*children[2:], None], strict=False):
            if sign.type != "(" or before.type not in ("attribute", "identifier", "call"):
                continue
            called = self.expression(before, depth)
            given = self.expression(after, depth) if after is not None and after.is_named else None
            if isinstance(given, ast.Call) and isinstance(given.func, ast.Constant):
                given = given.func  # what follows on the next lines looks like its arguments
            if called is not None:
                call = _at(ast.Call(func=called, args=[given] if given is not None else [], keywords=[]), before)
                made.append(_at(ast.Expr(value=call), before))
        return made

    def _inside(self, node: Any, depth: int) -> list[ast.stmt]:
        return self.statements(node, depth)

    def _function(self, node: Any, depth: int) -> ast.stmt:
        name = node.child_by_field_name("name")
        body = node.child_by_field_name("body")
        made = ast.FunctionDef(
            name=self._text(name) if name is not None else "_",
            args=self._parameters(node.child_by_field_name("parameters"), depth),
            body=self.statements(body, depth) if body is not None else [],
            decorator_list=[],
            returns=None,
            type_comment=None,
        )
        return cast(ast.stmt, made)

    def _parameters(self, node: Any, depth: int) -> ast.arguments:
        made: list[ast.arg] = []
        defaults: list[ast.expr] = []
        for child in node.named_children if node is not None else []:
            named = child if child.type == "identifier" else child.child_by_field_name("name")
            if named is None and child.named_children and child.type == "typed_parameter":
                named = child.named_children[0]
            if named is None or named.type != "identifier":
                continue
            kind = child.child_by_field_name("type")
            annotation = self.expression(kind, depth) if kind is not None else None
            made.append(_at(ast.arg(arg=self._text(named), annotation=annotation, type_comment=None), child))
            value = child.child_by_field_name("value")
            default = self.expression(value, depth) if value is not None else None
            if default is not None:
                defaults.append(default)
            elif defaults:
                defaults.append(_at(ast.Constant(value=None), child))
        return ast.arguments(
            posonlyargs=[], args=made, vararg=None, kwonlyargs=[], kw_defaults=[], kwarg=None, defaults=defaults
        )

    def _class(self, node: Any, depth: int) -> ast.stmt:
        name, body = node.child_by_field_name("name"), node.child_by_field_name("body")
        listed = node.child_by_field_name("superclasses")
        bases = [self.expression(each, depth) for each in (listed.named_children if listed is not None else [])]
        made = ast.ClassDef(
            name=self._text(name) if name is not None else "_",
            bases=[base for base in bases if base is not None],
            keywords=[],
            body=self.statements(body, depth) if body is not None else [],
            decorator_list=[],
        )
        return cast(ast.stmt, made)

    def _import(self, node: Any, depth: int) -> ast.stmt:
        return ast.Import(names=self._aliases(node.named_children))

    def _aliases(self, nodes: Any) -> list[ast.alias]:
        made = []
        for each in nodes:
            if each.type == "aliased_import":
                name, alias = each.child_by_field_name("name"), each.child_by_field_name("alias")
                if name is not None and alias is not None:
                    made.append(ast.alias(name=self._dotted(name), asname=self._text(alias)))
            elif each.type in ("dotted_name", "identifier"):
                made.append(ast.alias(name=self._dotted(each), asname=None))
            elif each.type == "wildcard_import":
                made.append(ast.alias(name="*", asname=None))
        return made

    def _dotted(self, node: Any) -> str:
        return "".join(self._text(node).split())

    def _import_from(self, node: Any, depth: int) -> ast.stmt | list[ast.stmt]:
        source = node.child_by_field_name("module_name")
        if source is None:
            return []
        name = self._dotted(source)
        level = len(name) - len(name.lstrip("."))
        aliases = self._aliases([each for each in node.named_children if each.start_byte != source.start_byte])
        return ast.ImportFrom(module=name[level:] or None, names=aliases, level=level)

    def _if(self, node: Any, depth: int) -> ast.stmt:
        condition, body = node.child_by_field_name("condition"), node.child_by_field_name("consequence")
        rest: list[ast.stmt] = []
        for child in node.named_children:
            if child.type in ("elif_clause", "else_clause", "ERROR"):
                rest += self._inside(child, depth)
        return ast.If(
            test=self._or_nothing(condition, node, depth),
            body=self.statements(body, depth) if body is not None else [],
            orelse=rest,
        )

    def _while(self, node: Any, depth: int) -> ast.stmt:
        condition, body = node.child_by_field_name("condition"), node.child_by_field_name("body")
        return ast.While(
            test=self._or_nothing(condition, node, depth),
            body=self.statements(body, depth) if body is not None else [],
            orelse=[],
        )

    def _or_nothing(self, node: Any, place: Any, depth: int) -> ast.expr:
        made = self.expression(node, depth) if node is not None else None
        return made if made is not None else cast(ast.expr, _at(ast.Constant(value=None), place))

    def _assigned(self, node: Any, depth: int) -> ast.stmt | list[ast.stmt]:
        left, right = node.child_by_field_name("left"), node.child_by_field_name("right")
        target = self.expression(left, depth) if left is not None else None
        value = self._value(right, depth) if right is not None else None
        if target is None or value is None:
            return self._inside(node, depth)
        return ast.Assign(targets=[target], value=value, type_comment=None)

    def _value(self, node: Any, depth: int) -> ast.expr | None:
        if node.type == "assignment":  # a = b = value
            inner = node.child_by_field_name("right")
            return self._value(inner, depth + 1) if inner is not None and depth < DEPTH else None
        return self.expression(node, depth)

    def _with_item(self, node: Any, depth: int) -> list[ast.stmt]:
        """`with value as name` binds as `name = value` does."""
        value = node.child_by_field_name("value") or (node.named_children or [None])[0]
        if value is None:
            return []
        if value.type == "as_pattern" and len(value.named_children) == 2:
            made, target = (self.expression(each, depth) for each in value.named_children)
            if made is not None and isinstance(target, ast.Name):
                return [_at(ast.Assign(targets=[target], value=made, type_comment=None), node)]
        return self._statement(value, depth + 1)

    # --- expressions

    def expression(self, node: Any, depth: int) -> ast.expr | None:
        """The expression, or a tuple of what in it could be read."""
        self._left -= 1
        if depth > DEPTH or self._left < 0:
            return None
        ask = _EXPRESSIONS.get(node.type)
        if ask is not None:
            made = ask(self, node, depth + 1)
            return cast(ast.expr, _at(made, node)) if made is not None else None
        parts = [self.expression(each, depth + 1) for each in node.named_children if each.type != "comment"]
        kept = [part for part in parts if part is not None]
        if not kept:
            return None
        if len(kept) == 1:
            return kept[0]
        return cast(ast.expr, _at(ast.Tuple(elts=kept, ctx=ast.Load()), node))

    def _name(self, node: Any, depth: int) -> ast.expr:
        return ast.Name(id=self._text(node), ctx=ast.Load())

    def _attribute(self, node: Any, depth: int) -> ast.expr | None:
        value, name = node.child_by_field_name("object"), node.child_by_field_name("attribute")
        made = self.expression(value, depth) if value is not None else None
        return ast.Attribute(value=made, attr=self._text(name), ctx=ast.Load()) if made and name is not None else made

    def _call(self, node: Any, depth: int) -> ast.expr | None:
        function, listed = node.child_by_field_name("function"), node.child_by_field_name("arguments")
        called = self.expression(function, depth) if function is not None else None
        if called is None:
            return None
        made = ast.Call(func=called, args=[], keywords=[])
        for each in listed.named_children if listed is not None else []:
            if each.type == "keyword_argument":
                name, value = each.child_by_field_name("name"), each.child_by_field_name("value")
                given = self.expression(value, depth) if value is not None else None
                if given is not None and name is not None:
                    made.keywords.append(_at(ast.keyword(arg=self._text(name), value=given), each))
            elif (argument := self.expression(each, depth)) is not None:
                made.args.append(argument)
        return made

    def _string(self, node: Any, depth: int) -> ast.expr:
        if any(each.type == "interpolation" for each in node.named_children):
            values: list[ast.expr] = []
            for each in node.named_children:
                if each.type == "interpolation":
                    inner = self._or_nothing(each.child_by_field_name("expression"), each, depth)
                    values.append(_at(ast.FormattedValue(value=inner, conversion=-1, format_spec=None), each))
                elif each.type == "string_content":
                    values.append(_at(ast.Constant(value=self._text(each)), each))
            return ast.JoinedStr(values=values)
        return ast.Constant(
            value="".join(self._text(each) for each in node.named_children if each.type == "string_content")
        )

    def _number(self, node: Any, depth: int) -> ast.expr:
        text = self._text(node).replace("_", "").rstrip("lL")
        return ast.Constant(value=int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0.0)

    def _truth(self, node: Any, depth: int) -> ast.expr:
        return ast.Constant(value={"true": True, "false": False}.get(node.type))

    def _tuple(self, node: Any, depth: int) -> ast.expr:
        parts = [self.expression(each, depth) for each in node.named_children]
        return ast.Tuple(elts=[part for part in parts if part is not None], ctx=ast.Load())

    def _binary(self, node: Any, depth: int) -> ast.expr | None:
        left, right = (node.child_by_field_name(side) for side in ("left", "right"))
        made = [self.expression(each, depth) if each is not None else None for each in (left, right)]
        sign = node.child_by_field_name("operator")
        if made[0] is None or made[1] is None or sign is None:
            return made[0] or made[1]
        kind = {"+": ast.Add, "%": ast.Mod, "/": ast.Div}.get(self._text(sign), ast.Sub)
        return ast.BinOp(left=made[0], op=kind(), right=made[1])

    def _comparison(self, node: Any, depth: int) -> ast.expr | None:
        parts = [part for each in node.named_children if (part := self.expression(each, depth)) is not None]
        if len(parts) < 2:
            return parts[0] if parts else None
        return ast.Compare(left=parts[0], ops=[ast.Eq() for _ in parts[1:]], comparators=parts[1:])

    def _table(self, node: Any, depth: int) -> ast.expr:
        keys: list[ast.expr | None] = []
        values: list[ast.expr] = []
        for pair in node.named_children:
            key, value = pair.child_by_field_name("key"), pair.child_by_field_name("value")
            made = self.expression(value, depth) if value is not None else None
            if key is not None and made is not None:
                keys.append(self.expression(key, depth))
                values.append(made)
        return ast.Dict(keys=keys, values=values)


_STATEMENTS: dict[str, Any] = {
    "function_definition": _Lenient._function, "class_definition": _Lenient._class,
    "import_statement": _Lenient._import, "import_from_statement": _Lenient._import_from,
    "if_statement": _Lenient._if, "while_statement": _Lenient._while, "assignment": _Lenient._assigned,
    "with_item": _Lenient._with_item, "with_clause": _Lenient._inside,
}  # fmt: skip
_EXPRESSIONS: dict[str, Any] = {
    "identifier": _Lenient._name, "attribute": _Lenient._attribute, "call": _Lenient._call,
    "string": _Lenient._string, "integer": _Lenient._number, "float": _Lenient._number, "true": _Lenient._truth,
    "false": _Lenient._truth, "none": _Lenient._truth, "tuple": _Lenient._tuple, "list": _Lenient._tuple,
    "set": _Lenient._tuple, "binary_operator": _Lenient._binary, "comparison_operator": _Lenient._comparison,
    "dictionary": _Lenient._table, "pattern_list": _Lenient._tuple, "tuple_pattern": _Lenient._tuple,
}  # fmt: skip
