"""One source file -> what it says. Pure: bytes go in, a `Module` comes out, whatever the bytes are.

One walk over the syntax tree binds names and collects the places that may matter; then each of these is looked at with
all bindings known. The walk has a stack of its own: generated code is nested deeper than Python's.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from typing import Any

from interlock.coordinator.assess import lenient, looking
from interlock.coordinator.assess.model import Klass, Module, Problem, Scope
from interlock.coordinator.assess.scopes import Binding, Names, Own, Parameter, Placed, Space
from interlock.coordinator.assess.source import code_lines, decode, digest, is_generated

MAX_SOURCE = (
    2 << 20
)  # bytes of a file that is read: a tree takes 60 times as much, and the largest by hand have 0.5 MiB
MAIN = "<main>"
_SKIPPED = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Constant, ast.Name)
_LEAVES = frozenset(kind for base in _SKIPPED for kind in (base, *base.__subclasses__()))
_WORDS = frozenset(
    ("annotation", "arg", "attr", "conversion", "ctx", "id", "is_async", "kind", "kwd_attrs", "level", "module", "name",
     "names", "op", "ops", "rest", "returns", "simple", "str", "tag", "type_comment")
)  # fmt: skip  # fields that hold no nodes, or none that could matter
_FIELDS: dict[type, tuple[str, ...]] = {
    kind: tuple(name for name in kind._fields if name not in _WORDS)
    for kind in vars(ast).values()
    if isinstance(kind, type) and issubclass(kind, ast.AST)
}


def read(raw: bytes, path: str, *, limit: int = MAX_SOURCE) -> Module:
    """What the file says. A file that does not parse has a problem, and what it seems to say."""
    if len(raw) > limit:
        return Module(path, len(raw), problem=Problem(f"has {len(raw)} bytes; more than {limit} are not read"))
    text, problem = decode(raw)
    try:
        if problem is not None:
            return _estimated(text, path, len(raw), problem)
        try:
            tree = parse(text)
        except SyntaxError as error:
            return _estimated(text, path, len(raw), _told(error))
        return Reader(text, path, len(raw)).module(tree)
    except (RecursionError, MemoryError):
        return Module(path, len(raw), problem=Problem("is nested too deeply for Python to read"))


def parse(text: str) -> ast.Module:
    """The tree. SyntaxError, with its line and column, for all that is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that are none, in the user's source
        try:
            return ast.parse(text)
        except ValueError as error:  # a lone surrogate
            raise SyntaxError(str(error)) from None


def compiles(raw: bytes, path: str) -> Problem | None:
    """Why a file that parses does not compile to bytecode, if so."""
    text, problem = decode(raw)
    if problem is not None:
        return problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, path, "exec", dont_inherit=True)
        except SyntaxError as error:
            return _told(error)
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:
            return Problem(str(error) or type(error).__name__)
    return None


def _told(error: SyntaxError) -> Problem:
    return Problem(f"{type(error).__name__}: {error.msg}", error.lineno or 0, error.offset or 0)


def _estimated(text: str, path: str, size: int, problem: Problem) -> Module:
    module = Reader(text, path, size).module(lenient.parse(text))
    module.problem, module.estimated = problem, True
    return module


class Reader:
    """The walk over one tree."""

    def __init__(self, text: str, path: str, size: int) -> None:
        self.lines = text.split("\n")
        self.names = Names()
        self._spaces: list[Space] = []
        self.top = self._space("module", "", None)
        self.body = Scope("", 1)
        self.result = Module(path, size, generated=is_generated(text), scopes=[self.body])
        self._text = text
        self._stack: list[tuple[ast.AST, Space, Scope]] = []
        self._places: list[tuple[ast.AST, Space, Scope]] = []  # that may be a sign
        self._spans: list[tuple[int, int]] = []  # of texts over several lines
        self._classes: list[tuple[ast.ClassDef, Space]] = []
        self.targets: dict[int, str] = {}  # of an assigned call, by its id: the name it is given

    def module(self, tree: ast.Module) -> Module:
        self._push(tree.body, self.top, self.body)
        while self._stack:
            node, space, scope = self._stack.pop()
            visit = _VISIT.get(type(node))
            if visit is None:
                self._children(node, space, scope)
            else:
                visit(self, node, space, scope)
        found = self.result
        found.code_lines = code_lines(self._text, self._spans)
        found.digest = digest(self.lines)
        found.stars = self.names.stars
        found.names = self._exported()
        for node, space in self._classes:
            found.classes.append(self._klass(node, space))
        look = looking.Look(self.names, self.lines, self.targets)
        for node, space, scope in self._places:
            look.at(node, space, scope)
        for scope in found.scopes:
            scope.refs = sorted(set(scope.refs))
        for space in self._spaces:  # they hold each other, and the tree
            space.bound.clear()
            space.attributes.clear()
            space.known.clear()
        return found

    def _space(self, kind: str, name: str, outer: Space | None) -> Space:
        space = Space(kind, name, outer)
        self._spaces.append(space)
        return space

    def _exported(self) -> dict[str, str]:
        """Aliases of the top level, for other files that import them from here."""
        kept = {}
        for name, bindings in self.top.bound.items():
            for binding in bindings:
                said = binding if isinstance(binding, str) else None
                if isinstance(binding, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
                    said = self.names.name(binding, self.top)
                if said and said != f":{name}":
                    kept[name] = said
                    break
        return kept

    def _klass(self, node: ast.ClassDef, space: Space) -> Klass:
        bases = [said for base in node.bases if (said := self.names.name(base, space)) is not None]
        methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
        lines = self.lines[node.lineno : node.end_lineno or node.lineno]  # without the line that names it
        return Klass(node.name, node.lineno, bases, methods, digest(lines))

    # --- the walk

    def _push(self, nodes: list[ast.stmt] | list[ast.expr], space: Space, scope: Scope) -> None:
        self._stack += [(node, space, scope) for node in reversed(nodes) if type(node) not in _LEAVES]

    def _children(self, node: ast.AST, space: Space, scope: Scope) -> None:
        stack = self._stack
        for name in _FIELDS.get(type(node), ()):  # some fields hold plain values
            value = getattr(node, name, None)
            if value is None:
                continue
            if type(value) is not list:
                if type(value) not in _LEAVES:
                    stack.append((value, space, scope))
                continue
            for each in reversed(value):
                if each is not None and type(each) not in _LEAVES:
                    stack.append((each, space, scope))

    def _place(self, node: ast.AST, space: Space, scope: Scope) -> None:
        self._places.append((node, space, scope))
        self._children(node, space, scope)

    def _new_scope(self, name: str, line: int) -> Scope:
        scope = Scope(name, line)
        self.result.scopes.append(scope)
        return scope

    def _import(self, node: ast.Import, space: Space, scope: Scope) -> None:
        for alias in node.names:
            if alias.asname:
                space.bind(alias.asname, alias.name)
            else:
                space.bind(alias.name.split(".")[0], alias.name.split(".")[0])
            self._imported(alias.name, scope)

    def _import_from(self, node: ast.ImportFrom, space: Space, scope: Scope) -> None:
        base = "." * node.level + (node.module or "")
        for alias in node.names:
            if alias.name == "*":
                self.names.stars.append(base)
                self._imported(base, scope)
                continue
            whole = base + alias.name if base.endswith(".") else f"{base}.{alias.name}"
            space.bind(alias.asname or alias.name, whole)
            self._imported(whole, scope)

    def _imported(self, name: str, scope: Scope) -> None:
        if scope is self.body:
            self.result.imports.append(name)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, space: Space, scope: Scope) -> None:
        inner = scope
        method = space.kind == "class"
        if scope is self.body or scope.name == MAIN:
            inner = self._new_scope(node.name, node.lineno)
            space.bind(node.name, f":{node.name}")
        elif method and "." not in scope.name and scope.name == space.name[1:]:
            inner = self._new_scope(f"{scope.name}.{node.name}", node.lineno)
        else:
            space.bind(node.name, None)
        self._places.append((node, space, inner))
        own = self._space("function", "", space)
        self._parameters(node.args, own, space, scope)
        given = [*node.args.posonlyargs, *node.args.args]
        if method and given and not _is_static(node):
            own.bound[given[0].arg] = [Own(space)]
        self._push(node.decorator_list, space, scope)
        self._push(node.body, own, inner)

    def _parameters(self, arguments: ast.arguments, own: Space, outer: Space, scope: Scope) -> None:
        positional = [*arguments.posonlyargs, *arguments.args]
        defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
        pairs = [
            *zip(positional, defaults, strict=False),
            *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=False),
        ]
        for argument, default in pairs:
            own.bind(argument.arg, Parameter(default, argument.annotation))
        for rest in (arguments.vararg, arguments.kwarg):
            if rest is not None:
                own.bind(rest.arg, None)
        self._push([default for _, default in pairs if default is not None], outer, scope)

    def _lambda(self, node: ast.Lambda, space: Space, scope: Scope) -> None:
        own = self._space("function", "", space)
        self._parameters(node.args, own, space, scope)
        self._push([node.body], own, scope)

    def _class(self, node: ast.ClassDef, space: Space, scope: Scope) -> None:
        top = scope is self.body or scope.name == MAIN
        inner = self._new_scope(node.name, node.lineno) if top else scope
        own = self._space("class", f":{node.name}" if top else "", space)
        space.bind(node.name, f":{node.name}" if top else None)
        if top:
            self._classes.append((node, space))
        self._places.append((node, space, inner))
        self._push(node.decorator_list, space, scope)
        self._push([*node.bases, *(each.value for each in node.keywords)], space, inner)
        self._push(node.body, own, inner)

    def _comprehension(self, node: ast.AST, space: Space, scope: Scope) -> None:
        own = self._space("function", "", space)
        for each in getattr(node, "generators", ()):
            for name in _names_in(each.target):
                own.bind(name, None)
        self._children(node, own, scope)

    def _if(self, node: ast.If, space: Space, scope: Scope) -> None:
        if scope is self.body and _is_main_guard(node.test):
            main = next((each for each in self.result.scopes if each.name == MAIN), None)
            self._push(node.orelse, space, scope)
            self._push(node.body, space, main or self._new_scope(MAIN, node.lineno))
        else:
            self._children(node, space, scope)

    def _assign(self, node: ast.Assign, space: Space, scope: Scope) -> None:
        if isinstance(node.value, ast.Constant):
            self._span(node.value)
        for target in node.targets:
            self._bind(target, node.value, space)
        self._children(node, space, scope)

    def _assign_one(self, node: ast.AnnAssign | ast.NamedExpr, space: Space, scope: Scope) -> None:
        annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
        if node.value is not None:
            self._bind(node.target, node.value, space)
        if annotation is not None:
            self._bind(node.target, Parameter(node.value, annotation), space)
        self._children(node, space, scope)

    def _bind(self, target: ast.expr, value: Binding, space: Space) -> None:
        if isinstance(target, ast.Name):
            space.bind(target.id, value)
            if isinstance(value, ast.AST):
                self.targets[id(value)] = target.id
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
            found = space.look_up(target.value.id)
            klass = next((each.klass for each in found[1] if isinstance(each, Own)), None) if found else None
            if klass is not None:
                kept = Placed(value, space) if isinstance(value, ast.expr) else value
                klass.attributes.setdefault(target.attr, []).append(kept)
            if isinstance(value, ast.AST):
                self.targets[id(value)] = target.attr
        elif isinstance(target, ast.Tuple | ast.List):
            values = value.elts if isinstance(value, ast.Tuple | ast.List) else []
            same = len(values) == len(target.elts)
            for number, each in enumerate(target.elts):
                self._bind(each, values[number] if same else None, space)

    def _for(self, node: ast.For | ast.AsyncFor, space: Space, scope: Scope) -> None:
        for name in _names_in(node.target):
            space.bind(name, None)
        self._children(node, space, scope)

    def _with(self, node: ast.With | ast.AsyncWith, space: Space, scope: Scope) -> None:
        for item in node.items:
            if item.optional_vars is not None:
                self._bind(item.optional_vars, item.context_expr, space)
        self._children(node, space, scope)

    def _handler(self, node: ast.ExceptHandler, space: Space, scope: Scope) -> None:
        if node.name:
            space.bind(node.name, None)
        self._children(node, space, scope)

    def _declared(self, node: ast.Global | ast.Nonlocal, space: Space, scope: Scope) -> None:
        if isinstance(node, ast.Global):
            space.declared.update(node.names)

    def _text_lines(self, node: ast.Expr, space: Space, scope: Scope) -> None:
        if isinstance(node.value, ast.Constant):
            self._span(node.value)
        elif type(node.value) not in _LEAVES:
            self._stack.append((node.value, space, scope))

    def _span(self, node: ast.Constant | ast.JoinedStr) -> None:
        if node.end_lineno is not None and node.end_lineno > node.lineno:
            self._spans.append((node.lineno, node.end_lineno))

    def _joined(self, node: ast.JoinedStr, space: Space, scope: Scope) -> None:
        self._span(node)
        self._children(node, space, scope)


def _names_in(target: ast.expr) -> Iterator[str]:
    for node in ast.walk(target):
        if isinstance(node, ast.Name):
            yield node.id


def _is_static(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in node.decorator_list)


def _is_main_guard(test: ast.expr) -> bool:
    if not isinstance(test, ast.Compare) or len(test.comparators) != 1 or not isinstance(test.ops[0], ast.Eq):
        return False
    sides = [test.left, test.comparators[0]]
    named = any(isinstance(side, ast.Name) and side.id == "__name__" for side in sides)
    return named and any(isinstance(side, ast.Constant) and side.value == "__main__" for side in sides)


_VISIT: dict[type, Any] = {
    ast.Import: Reader._import, ast.ImportFrom: Reader._import_from, ast.FunctionDef: Reader._function,
    ast.AsyncFunctionDef: Reader._function, ast.Lambda: Reader._lambda, ast.ClassDef: Reader._class,
    ast.If: Reader._if, ast.Assign: Reader._assign, ast.AnnAssign: Reader._assign_one,
    ast.NamedExpr: Reader._assign_one, ast.For: Reader._for, ast.AsyncFor: Reader._for, ast.With: Reader._with,
    ast.AsyncWith: Reader._with, ast.ExceptHandler: Reader._handler, ast.Global: Reader._declared,
    ast.Nonlocal: Reader._declared, ast.Expr: Reader._text_lines, ast.JoinedStr: Reader._joined,
    ast.ListComp: Reader._comprehension, ast.SetComp: Reader._comprehension, ast.DictComp: Reader._comprehension,
    ast.GeneratorExp: Reader._comprehension, ast.Call: Reader._place, ast.Compare: Reader._place,
    ast.While: Reader._place, ast.Dict: Reader._place, ast.match_case: Reader._place,
}  # fmt: skip
