"""Whether a place in the tree is a sign: a call, a comparison, a loop, a definition. Pure.

Everything is asked by resolved names (`signs.py`); a text in the source matters only where it is an argument of such a
call: the endpoint that is bound, the file that is opened.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from interlock.coordinator.assess import signs
from interlock.coordinator.assess.model import MAX_CODE, Found, Scope, Sign
from interlock.coordinator.assess.scopes import BUILTINS, Names, Placed, Space

WITHIN = 400  # nodes of a loop or an argument that are looked at
_ENDPOINT = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_CLIENTS = re.compile(r"connect|Client$|channel$|Req0$|Sub0$|open_tcp_stream|WebSocketApp|_connection$")
_ROUTES = frozenset(
    (
        "route",
        "get",
        "post",
        "head",
        "api_route",
        "websocket",
        "add_get",
        "add_route",
        "add_url_rule",
        "handler",
        "action",
    )
)
_FILE = re.compile(r"[\w./\\{}~$-]+\.[A-Za-z0-9]{2,6}")
_HOSTS, _PORTS = ("host", "address", "bind", "addr", "hostname", "server"), ("port",)


class Look:
    """Writes what it finds into the scopes."""

    def __init__(self, names: Names, lines: list[str], targets: dict[int, str]) -> None:
        self._names = names
        self._lines = lines
        self._targets = targets

    def at(self, node: ast.AST, space: Space, scope: Scope) -> None:
        _LOOK[type(node)](self, node, space, scope)

    def _add(self, scope: Scope, sign: Sign, what: str, node: Any, detail: str = "") -> None:
        line = node.lineno
        code = self._lines[line - 1].strip()[:MAX_CODE] if 0 < line <= len(self._lines) else ""
        found = Found(sign, what, line, code, detail)
        if found not in scope.found[-8:]:
            scope.found.append(found)

    # --- definitions

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, space: Space, scope: Scope) -> None:
        if signs.HEALTH_NAME.fullmatch(node.name) and not node.name.startswith("__"):
            self._add(scope, "health", f"def {node.name}", node, "method" if space.kind == "class" else "")
        for decorator in node.decorator_list:
            name = self._names.name(decorator, space)
            if name in ("numba.cuda.jit", "numba.cuda.jit()", "triton.jit", "cupyx.jit.rawkernel()"):
                self._add(scope, "gpu-complex", name, decorator)
            if name and name[0] in ":.":
                scope.refs.append(_entry(name))

    def klass(self, node: ast.ClassDef, space: Space, scope: Scope) -> None:
        for base in node.bases:
            name = self._names.name(base, space)
            if name is None:
                continue
            if name in signs.SOCKET_BASES:
                self._add(scope, "sockets", name, node)
            elif name in signs.THREAD_BASES:
                self._add(scope, "threads", name, node)

    # --- words that ask for health

    def compare(self, node: ast.Compare, space: Space, scope: Scope) -> None:
        for side in (node.left, *node.comparators):
            said = [side] if isinstance(side, ast.Constant) else getattr(side, "elts", [])
            for each in said[:WITHIN]:
                if isinstance(each, ast.Constant) and _asks_health(each.value):
                    self._add(scope, "health", f"asked for {each.value!r}", node, str(each.value))

    def case(self, node: ast.match_case, space: Space, scope: Scope) -> None:
        for each in islice(ast.walk(node.pattern), WITHIN):
            if isinstance(each, ast.Constant) and _asks_health(each.value):
                self._add(scope, "health", f"asked for {each.value!r}", each, str(each.value))

    def table(self, node: ast.Dict, space: Space, scope: Scope) -> None:
        """{"health": self.on_health}: what is called by the name that is asked for."""
        for key, value in zip(node.keys, node.values, strict=False):
            if isinstance(key, ast.Constant) and _asks_health(key.value):
                called = self._names.name(value, space) if isinstance(value, ast.Attribute | ast.Name) else None
                if (called is not None and called[:1] == ":") or isinstance(value, ast.Lambda):
                    self._add(scope, "health", f"asked for {key.value!r}", key, str(key.value))

    # --- loops

    def loop(self, node: ast.While, space: Space, scope: Scope) -> None:
        endless = isinstance(node.test, ast.Constant) and bool(node.test.value)
        for each in islice(ast.walk(node), WITHIN):
            if isinstance(each, ast.Call):
                last = _last(each.func)
                if last and signs.RECEIVING.fullmatch(last):
                    self._add(scope, "loop", "while", node, last)
                    return
        if endless and "." not in scope.name:
            self._add(scope, "loop", "while", node)

    # --- calls

    def call(self, node: ast.Call, space: Space, scope: Scope) -> None:
        name = self._names.name(node.func, space)
        last = _last(node.func)
        if name is not None:
            if name not in BUILTINS:
                scope.refs.append(_entry(name))
            self._named(node, name, last, space, scope)
        if last:
            self._by_end(node, name or "", last, space, scope)
        for argument in (*node.args, *(each.value for each in node.keywords)):
            if isinstance(argument, ast.Name | ast.Attribute):
                passed = self._names.name(argument, space)
                if passed and passed[0] in ":.":
                    scope.refs.append("&" + _entry(passed))

    def _named(self, node: ast.Call, name: str, last: str, space: Space, scope: Scope) -> None:
        sign = signs.call_sign(name)
        if sign is not None:
            self._add(scope, sign, name, node, "processes" if name in signs.PROCESSES else "")
            if sign in ("sockets", "database"):
                self._place_of(node, name, sign, space, scope)
        if name in signs.SERVING:
            self._add(scope, "loop", name, node)
        if name in signs.CONFIG_LOADS or name in signs.JSON_LOADS:
            self._config(node, name, space, scope)
        if name in ("importlib.import_module", "__import__", "importlib.__import__"):
            if node.args and (said := self._names.constant(node.args[0], space)) is not None and "{" not in said:
                scope.refs.append(said)
            else:
                self._add(scope, "unknown-import", name, node)
        if name.partition(".")[0] in signs.HTTP_HEADS and last in signs.HTTP_CALLS:
            self._endpoint(node, "connect", space, scope)

    def _by_end(self, node: ast.Call, name: str, last: str, space: Space, scope: Scope) -> None:
        """Signs of a method whatever it is called on: what arguments it has tells."""
        match last:
            case "socket" if node.args and self._is_zmq_type(node.args[0], space):
                if not name.startswith("zmq"):
                    self._add(scope, "sockets", name or "socket", node)
            case "bind" | "bind_to_random_port" | "add_insecure_port" | "add_secure_port":
                if self._endpoint(node, "bind", space, scope):
                    self._add(scope, "sockets", name or last, node)
            case "connect" | "connect_ex":
                self._endpoint(node, "connect", space, scope)
            case "cuda" if not node.args and isinstance(node.func, ast.Attribute) and not name.startswith("torch.cuda"):
                self._add(scope, "gpu", name or last, node)
            case "to" | "device" if node.args and self._is_cuda(node.args[0], space):
                self._add(scope, "gpu", name or last, node)
            case "run" if name.endswith("().run") and name.startswith(("flask.", "bottle.", "quart.")):
                self._add(scope, "sockets", name, node)
                self._add(scope, "loop", name, node)
                self._place_of(node, name, "sockets", space, scope)
            case _ if last in signs.SERVING_ENDS:
                self._add(scope, "loop", name or last, node)
            case _ if last in _ROUTES and node.args and isinstance(node.func, ast.Attribute | ast.Name):
                said = self._names.constant(node.args[0], space)
                if said and _asks_health(said) and (said.startswith("/") or last in ("handler", "action")):
                    self._add(scope, "health", f"{last} {said}", node, said)

    def _is_zmq_type(self, node: ast.expr, space: Space) -> bool:
        name = self._names.name(node, space) or ""
        return name.startswith("zmq.") and name.rpartition(".")[2] in signs.ZMQ_TYPES

    def _is_cuda(self, node: ast.expr, space: Space) -> bool:
        return (self._names.constant(node, space) or "").split(":")[0] == "cuda"

    # --- endpoints

    def _endpoint(self, node: ast.Call, sign: Sign, space: Space, scope: Scope) -> bool:
        """An endpoint in the first argument: a text with a scheme, or (host, port)."""
        first = node.args[0] if node.args else next((k.value for k in node.keywords if k.arg in ("url", "addr")), None)
        if isinstance(first, ast.Tuple) and len(first.elts) == 2:
            host, port = (self._names.constant(each, space) for each in first.elts)
            if host is None and port is None:
                return False
            self._add(scope, sign, _last(node.func), node, f"tcp://{host or '*'}:{port or '{port}'}")
            return True
        said = self._names.constant(first, space)
        if said and _ENDPOINT.match(said):
            self._add(scope, sign, _last(node.func), node, said)
            return True
        if said and sign == "bind" and _last(node.func).endswith("_port") and ":" in said:  # gRPC's "[::]:50051"
            self._add(scope, sign, _last(node.func), node, f"tcp://{said}")
            return True
        return False

    def _place_of(self, node: ast.Call, name: str, sign: Sign, space: Space, scope: Scope) -> None:
        """Host and port of a server, a client or a database, from its arguments."""
        host = port = None
        for keyword in node.keywords:
            if keyword.arg in _PORTS:
                port = self._names.constant(keyword.value, space)
            elif keyword.arg in _HOSTS:
                host = self._names.constant(keyword.value, space)
        for argument in node.args[:4]:
            if isinstance(argument, ast.Tuple) and len(argument.elts) == 2:
                host, port = (self._names.constant(each, space) for each in argument.elts)
            elif port is None and sign == "sockets":
                said = self._names.constant(argument, space)
                if said and said.isascii() and said.isdigit():
                    port = said
                elif said and host is None and "://" not in said:
                    host = said
        if port and (port.isdigit() or "{" in port):
            head = name.partition(".")[0] if sign == "database" else "tcp"
            kind: Sign = "connect" if sign == "database" or _CLIENTS.search(name) else "bind"
            self._add(scope, kind, name, node, f"{head}://{host or '*'}:{port}")

    # --- configuration

    def _config(self, node: ast.Call, name: str, space: Space, scope: Scope) -> None:
        words = [self._targets.get(id(node), ""), scope.name, *self._words(node, space)]
        if any("recv" in word for word in words):
            return
        if name in signs.JSON_LOADS and not any(signs.CONFIG_NAME.search(word) for word in words if word):
            return
        file = next((word for word in words if _FILE.fullmatch(word) and "/" not in word[-5:]), "")
        self._add(scope, "config", name, node, file)

    def _words(self, call: ast.Call, space: Space) -> Iterator[str]:
        """Names and texts in the arguments of a call, and in what the names there are bound to."""
        todo: list[tuple[ast.AST, Space]] = [(each, space) for each in call.args]
        todo += [(each.value, space) for each in call.keywords]
        for _ in range(WITHIN):
            if not todo:
                return
            node, where = todo.pop(0)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value[:MAX_CODE]
            elif isinstance(node, ast.Name):
                yield node.id
                found = where.look_up(node.id)
                if found is not None and len(todo) < WITHIN:
                    todo += [(each, found[0]) for each in found[1][:2] if isinstance(each, ast.Call | ast.Constant)]
            elif isinstance(node, ast.Attribute):
                yield node.attr
                todo.append((node.value, where))
                for each in self._assigned(node, where):
                    todo.append((each.value, each.space))
            else:
                todo += [(each, where) for each in islice(ast.iter_child_nodes(node), 20)]

    def _assigned(self, node: ast.Attribute, space: Space) -> list[Placed]:
        klass = self._names._own(node, space)
        kept = klass.attributes.get(node.attr, [])[:2] if klass is not None else []
        return [each for each in kept if isinstance(each, Placed) and isinstance(each.value, ast.Call | ast.Constant)]


def _asks_health(value: object) -> bool:
    return isinstance(value, str) and len(value) < 60 and signs.HEALTH.fullmatch(value) is not None


def _last(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _entry(name: str) -> str:
    """What of a name another file can define: up to the first call."""
    return name.partition("(")[0]


_LOOK: dict[type, Any] = {
    ast.FunctionDef: Look.function, ast.AsyncFunctionDef: Look.function, ast.ClassDef: Look.klass,
    ast.Compare: Look.compare, ast.match_case: Look.case, ast.Dict: Look.table, ast.While: Look.loop,
    ast.Call: Look.call,
}  # fmt: skip
