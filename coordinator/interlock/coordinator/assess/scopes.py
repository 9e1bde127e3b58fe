"""What a name stands for in its scope: import aliases, assignments, attributes of self, and constants. Pure.

A name resolves to a dotted text: "zmq.Context().socket" for `ctx.socket` after `import zmq as z; ctx = z.Context()`,
":name" for what this module defines, ".name" for what is relative to its package. Bindings are looked up only when
somebody asks; what can't be told is None.
"""

from __future__ import annotations

import ast
import builtins
from typing import Any, NamedTuple

DEPTH = 24  # aliases of aliases: nobody writes more, and generated code must not cost the stack
SURE = 4  # what is found with no more aliases than these before it is remembered: no limit cut it short
CHAIN = 40  # attributes and calls in one expression
STEPS = 400  # looks at bindings for one question: names that are bound to each other would cost any number
LENGTH = 300  # characters of a resolved name or text
BUILTINS = frozenset(dir(builtins))
ENVIRONMENT = frozenset(("os.environ.get", "os.getenv", "environ.get", "os.environ.setdefault"))
TEXTS = frozenset(("str", "int", "float", "pathlib.Path", "pathlib.PurePath", "os.fspath", "os.path.expanduser",
                   "os.path.abspath", "os.path.expandvars"))  # fmt: skip


class Parameter(NamedTuple):
    default: ast.expr | None
    annotation: ast.expr | None


class Own(NamedTuple):
    """`self` or `cls` in a method of this class."""

    klass: Space


class Placed(NamedTuple):
    """What a method assigns to self: to be read in the method's scope."""

    value: ast.expr
    space: Space


Binding = ast.expr | str | Parameter | Own | Placed | None


class Space:
    """One lexical scope, and what its names are bound to, in order."""

    __slots__ = ("attributes", "bound", "declared", "kind", "known", "name", "outer")

    def __init__(self, kind: str, name: str, outer: Space | None) -> None:
        self.kind = kind  # "module", "class" or "function"
        self.name = name  # ":Class" of a class
        self.outer = outer
        self.bound: dict[str, list[Binding]] = {}
        self.attributes: dict[str, list[Binding]] = {}  # of a class: what methods assign to self
        self.declared: set[str] = set()  # global or nonlocal
        self.known: dict[str, str | None] = {}  # what its names, and ".attribute" of self, were found to stand for

    def bind(self, name: str, value: Binding) -> None:
        space = self
        if name in self.declared:
            while space.outer is not None:
                space = space.outer
        space.bound.setdefault(name, []).append(value)

    def look_up(self, name: str) -> tuple[Space, list[Binding]] | None:
        space: Space | None = self
        while space is not None:
            if name in space.bound and (space.kind != "class" or space is self):
                return space, space.bound[name]
            space = space.outer
        return None


class Names:
    """Answers of one module. `stars`: modules of which everything is imported."""

    def __init__(self) -> None:
        self.stars: list[str] = []
        self._left = STEPS

    def name(self, node: ast.AST | None, space: Space) -> str | None:
        """What an expression stands for: `resolve`, as a question of its own."""
        self._left = STEPS
        return self.resolve(node, space)

    def constant(self, node: ast.AST | None, space: Space) -> str | None:
        """`text`, as a question of its own."""
        self._left = STEPS
        return self.text(node, space)

    # --- names

    def resolve(self, node: ast.AST | None, space: Space, depth: int = 0) -> str | None:
        """The dotted text that an expression stands for."""
        tail: list[str] = []
        self._left -= 1
        if self._left < 0:
            return None
        for _ in range(CHAIN):
            if isinstance(node, ast.Attribute):
                own = self._own(node, space)
                if own is not None:
                    return self._joined(self._attribute(own, node.attr, depth), tail)
                tail.append("." + node.attr)
                node = node.value
            elif isinstance(node, ast.Call):
                said = self._special(node, space, depth)
                if said is not None:
                    return self._joined(said, tail)
                tail.append("()")
                node = node.func
            elif isinstance(node, ast.Await | ast.NamedExpr | ast.Starred):
                node = node.value
            else:
                break
        if isinstance(node, ast.Name):
            return self._joined(self._name(node.id, space, depth), tail)
        if isinstance(node, ast.Subscript):
            return self._joined(self._subscript(node, space, depth), tail)
        if isinstance(node, ast.BoolOp | ast.IfExp) and depth < DEPTH:
            choices = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
            return self._joined(self._first(choices, space, depth), tail)
        return None

    def _first(self, choices: list[ast.expr], space: Space, depth: int) -> str | None:
        return next((said for each in choices if (said := self.resolve(each, space, depth + 1)) is not None), None)

    @staticmethod
    def _joined(head: str | None, tail: list[str]) -> str | None:
        if head is None:
            return None
        whole = head + "".join(reversed(tail))
        return whole if len(whole) <= LENGTH else None

    def _subscript(self, node: ast.Subscript, space: Space, depth: int) -> str | None:
        """A generic class without its arguments; a module out of sys.modules."""
        head = self.resolve(node.value, space, depth + 1) if depth < DEPTH else None
        if head == "sys.modules":
            return self.text(node.slice, space, depth + 1)
        return head if head is not None and "()" not in head else None

    def _name(self, name: str, space: Space, depth: int) -> str | None:
        if name in space.known:
            return space.known[name]
        said = self._looked_up(name, space, depth)
        if depth < SURE and self._left >= 0:
            space.known[name] = said
        return said

    def _looked_up(self, name: str, space: Space, depth: int) -> str | None:
        found = space.look_up(name)
        if found is None:
            if name in BUILTINS:
                return name
            return f"{self.stars[0]}.{name}" if self.stars else None
        if depth >= DEPTH:
            return None
        where, bindings = found
        return self._of(bindings, where, depth)

    def _of(self, bindings: list[Binding], where: Space, depth: int) -> str | None:
        for binding in bindings:
            if isinstance(binding, str):
                return binding
            if isinstance(binding, Own):
                return f"{binding.klass.name}()"
            said = None
            if isinstance(binding, Parameter):
                said = self._annotated(binding.annotation, where, depth)
                if said is None and isinstance(binding.default, ast.Attribute | ast.Name):
                    said = self.resolve(binding.default, where, depth + 1)
            elif isinstance(binding, Placed):
                said = self.resolve(binding.value, binding.space, depth + 1)
            elif binding is not None:
                said = self.resolve(binding, where, depth + 1)
            if said is not None:
                return said
        return None

    def _annotated(self, annotation: ast.expr | None, where: Space, depth: int) -> str | None:
        """An instance of the class that an annotation names."""
        if isinstance(annotation, ast.BinOp):  # Socket | None
            annotation = annotation.left
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            try:
                annotation = ast.parse(annotation.value, mode="eval").body
            except (SyntaxError, ValueError, MemoryError, RecursionError):
                return None
        if not isinstance(annotation, ast.Name | ast.Attribute):
            return None
        said = self.resolve(annotation, where, depth + 1)
        return f"{said}()" if said is not None and said not in BUILTINS else None

    def _own(self, node: ast.Attribute, space: Space) -> Space | None:
        """The class whose attribute this is, if it is one of self."""
        if not isinstance(node.value, ast.Name):
            return None
        found = space.look_up(node.value.id)
        if found is None:
            return None
        return next((each.klass for each in found[1] if isinstance(each, Own)), None)

    def _attribute(self, klass: Space, name: str, depth: int) -> str | None:
        key = f".{name}"
        if key in klass.known:
            return klass.known[key]
        said = None
        if depth < DEPTH:
            said = self._of(klass.attributes.get(name, []), klass, depth + 1)
            said = said or self._of(klass.bound.get(name, []), klass, depth + 1)
        said = said or f"{klass.name}.{name}"
        if depth < SURE and self._left >= 0:
            klass.known[key] = said
        return said

    def _special(self, node: ast.Call, space: Space, depth: int) -> str | None:
        """Imports at run time, and attributes that are named by a text."""
        if not node.args or not isinstance(node.func, ast.Name | ast.Attribute) or depth >= DEPTH:
            return None
        last = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        if last == "getattr" or (last == "cast" and len(node.args) > 1):
            return self._got(node, last, space, depth)
        found = space.look_up(last) if isinstance(node.func, ast.Name) else None
        if last in ("import_module", "__import__") or found is not None:
            called = self.resolve(node.func, space, depth + 1)
            if called in ("importlib.import_module", "__import__", "importlib.__import__", "builtins.__import__"):
                return self.text(node.args[0], space, depth + 1)
        return None

    def _got(self, node: ast.Call, last: str, space: Space, depth: int) -> str | None:
        if last == "cast":
            called = self.resolve(node.func, space, depth + 1)
            return self.resolve(node.args[1], space, depth + 1) if called == "typing.cast" else None
        if len(node.args) < 2 or self.resolve(node.func, space, depth + 1) != "getattr":
            return None
        head, name = self.resolve(node.args[0], space, depth + 1), self.text(node.args[1], space, depth + 1)
        return f"{head}.{name}" if head and name and name.isidentifier() else None

    # --- texts

    def text(self, node: ast.AST | None, space: Space, depth: int = 0) -> str | None:
        """A text or whole number that an expression has, as far as can be told; "{name}" for the parts that can't."""
        self._left -= 1
        if depth >= DEPTH or node is None or self._left < 0:
            return None
        if isinstance(node, ast.Constant):
            value = node.value
            if isinstance(value, bool) or not isinstance(value, str | int):
                return None
            try:
                return str(value)[:LENGTH]
            except ValueError:  # a number of more digits than Python writes
                return None
        ask = _TEXTS.get(type(node))
        said = ask(self, node, space, depth + 1) if ask is not None else None
        return said[:LENGTH] if said is not None else None

    def _joined_text(self, node: ast.JoinedStr, space: Space, depth: int) -> str:
        parts = []
        for each in node.values[:CHAIN]:
            inner = each.value if isinstance(each, ast.FormattedValue) else each
            parts.append(self.text(inner, space, depth) or f"{{{_label(inner)}}}")
        return "".join(parts)

    def _sum(self, node: ast.BinOp, space: Space, depth: int) -> str | None:
        left, right = self.text(node.left, space, depth), self.text(node.right, space, depth)
        if isinstance(node.op, ast.Mod) and left is not None:
            values = node.right.elts if isinstance(node.right, ast.Tuple) else [node.right]
            for value in values:
                left = _filled(left, self.text(value, space, depth) or f"{{{_label(value)}}}")
            return left
        if not isinstance(node.op, ast.Add | ast.Div) or (left is None and right is None):
            return None
        if isinstance(node.op, ast.Div):
            return f"{left or '{}'}/{right or '{}'}"
        if left is not None and right is not None and _digits(left) and _digits(right):
            return str(int(left) + int(right))
        return f"{left or '{' + _label(node.left) + '}'}{right or '{' + _label(node.right) + '}'}"

    def _called(self, node: ast.Call, space: Space, depth: int) -> str | None:
        called = self.resolve(node.func, space, depth)
        if called in ENVIRONMENT:
            default = node.args[1] if len(node.args) > 1 else None
            said = self.text(default, space, depth)
            return said if said is not None else f"{{{self.text(node.args[0], space, depth)}}}" if node.args else None
        if called in TEXTS and node.args:
            return self.text(node.args[0], space, depth)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            said = self.text(node.func.value, space, depth)
            for value in node.args if said is not None else ():
                assert said is not None
                said = _filled(said, self.text(value, space, depth) or f"<{_label(value)}>")
            return said
        if called is not None and called.endswith(".get") and len(node.args) > 1:  # config.get("port", 5555)
            return self.text(node.args[1], space, depth)
        return None

    def _named(self, node: ast.Name, space: Space, depth: int) -> str | None:
        found = space.look_up(node.id)
        return self._bound_text(found[1], found[0], depth) if found is not None else None

    def _own_text(self, node: ast.Attribute, space: Space, depth: int) -> str | None:
        klass = self._own(node, space)
        if klass is None:
            return None
        said = self._bound_text(klass.attributes.get(node.attr, []), klass, depth)
        return said if said is not None else self._bound_text(klass.bound.get(node.attr, []), klass, depth)

    def _bound_text(self, bindings: list[Binding], where: Space, depth: int) -> str | None:
        for binding in bindings:
            node = binding.default if isinstance(binding, Parameter) else binding
            if isinstance(binding, Placed):
                node, where = binding.value, binding.space
            said = self.text(node, where, depth) if isinstance(node, ast.expr) else None
            if said is not None:
                return said
        return None

    def _either(self, node: ast.BoolOp | ast.IfExp, space: Space, depth: int) -> str | None:
        choices = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
        return next((said for each in choices if (said := self.text(each, space, depth)) is not None), None)

    def _item(self, node: ast.Subscript, space: Space, depth: int) -> str | None:
        if self.resolve(node.value, space, depth) != "os.environ":
            return None
        return f"{{{self.text(node.slice, space, depth)}}}"


_TEXTS: dict[type, Any] = {
    ast.JoinedStr: Names._joined_text, ast.BinOp: Names._sum, ast.Call: Names._called, ast.Name: Names._named,
    ast.Attribute: Names._own_text, ast.BoolOp: Names._either, ast.IfExp: Names._either, ast.Subscript: Names._item,
}  # fmt: skip


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _filled(pattern: str, value: str) -> str:
    for mark in ("%s", "%d", "%r", "%i", "{}", "{0}", "{1}"):
        if mark in pattern:
            return pattern.replace(mark, value, 1)
    return pattern


def _label(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else "?"
