"""Start-up lists: YAML that says which scripts run, on which ports, and what each needs. Pure.

An entry is a mapping with a script. Entries stand in lists or in mappings by name, in groups of any depth. Ports may
be sums with variables of the environment: `${PORT_OFFSET}+7200`, `${PORT:-7200}`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

SCRIPT = ("script_path", "script", "path", "file", "program")
NAME = ("name", "agent", "agent_name", "id")
PORT = ("port", "zmq_port", "request_port")
HEALTH = ("health_check_port", "health_port", "healthcheck_port", "health")
DEPENDS = ("dependencies", "depends_on", "depends", "requires", "needs")
REQUIRED = ("required",)
ARGUMENTS = ("args", "arguments")
ENVIRONMENT = ("env", "environment", "env_vars")
KNOWN = frozenset((*SCRIPT, *NAME, *PORT, *HEALTH, *DEPENDS, *REQUIRED, *ARGUMENTS, *ENVIRONMENT))
DEPTH = 12  # of groups in groups
MAX_ENTRIES = 10_000
MAX_NODES = 200_000  # that are looked at: aliases can make a small file endless

_VARIABLE = re.compile(r"\$\{(\w+)(?:(?::-|:|-)([^}]*))?\}|\$(\w+)")
_SUM = re.compile(r"[\d\s+()-]+")


@dataclass(frozen=True)
class Entry:
    """One script of the list. port, health: 0 if there is none. unknown: keys that are not understood."""

    name: str
    script: str
    group: str
    place: str  # in the file: "groups.core[2]"
    port: int = 0
    health: int = 0
    depends: tuple[str, ...] = ()
    required: bool | None = None
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    unknown: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class StartUp:
    """A list, and what in it is not understood, by its place."""

    entries: list[Entry] = field(default_factory=list)
    unknown: dict[str, Any] = field(default_factory=dict)


def read_startup(tree: Any, environment: Mapping[str, str]) -> StartUp:
    """Never fails: without entries it is no start-up list."""
    found = StartUp()
    _Reader(environment, found).walk(tree, "", "", "", 0)
    return found


class _Reader:
    def __init__(self, environment: Mapping[str, str], found: StartUp) -> None:
        self._environment = environment
        self._found = found
        self._left = MAX_NODES
        self._holding: dict[int, bool] = {}  # by a tree's id: aliases make one stand in many places

    def walk(self, tree: Any, place: str, key: str, group: str, depth: int) -> None:
        """key: its name in a mapping, "" in a list. group: the nearest name above it."""
        if depth and isinstance(tree, dict) and _script(tree):
            if len(self._found.entries) < MAX_ENTRIES:
                self._found.entries.append(self._entry(tree, place, key, group))
            return
        self._left -= 1
        if depth > DEPTH or self._left < 0 or not self._holds(tree, DEPTH):
            if place:
                self._found.unknown[place] = tree
            return
        for name, where, each in _inside(tree, place):
            self.walk(each, where, name, key or group, depth + 1)

    def _holds(self, tree: Any, depth: int) -> bool:
        """Is there an entry in it?"""
        if depth < 0 or not isinstance(tree, dict | list):
            return False
        if id(tree) not in self._holding:
            self._holding[id(tree)] = False  # an alias of itself holds nothing more
            inner = tree.values() if isinstance(tree, dict) else tree
            is_one = isinstance(tree, dict) and bool(_script(tree))
            self._holding[id(tree)] = is_one or any(self._holds(each, depth - 1) for each in inner)
        return self._holding[id(tree)]

    def _entry(self, tree: dict[Any, Any], place: str, key: str, group: str) -> Entry:
        script = _script(tree)
        unknown = {str(name): value for name, value in tree.items() if str(name) not in KNOWN}
        notes: list[str] = []

        def first(names: tuple[str, ...], kinds: type | tuple[type, ...]) -> Any:
            """The value of the first of these keys; what stands beside it, or is of another kind, is not understood."""
            taken = None
            for name in names:
                value = tree.get(name)
                if value is None or value == script:
                    continue
                if taken is None and isinstance(value, kinds):
                    taken = value
                else:
                    unknown[name] = value
            return taken

        def port(names: tuple[str, ...]) -> int:
            value = first(names, (int, str))
            number, note = port_of(value, self._environment)
            if note:
                notes.append(note)
            if value is not None and not number:
                unknown[next(name for name in names if tree.get(name) == value)] = value
            return number

        first(SCRIPT, ())
        named = first(NAME, (str, int))
        arguments = first(ARGUMENTS, (list, str))
        try:
            words = shlex.split(arguments) if isinstance(arguments, str) else [str(each) for each in arguments or ()]
        except ValueError:  # a quotation without an end
            words, unknown["args"] = [], arguments
        variables = first(ENVIRONMENT, dict) or {}
        return Entry(
            name=str(named).strip() if named is not None and str(named).strip() else key or PurePosixPath(script).stem,
            script=script,
            group=group,
            place=place,
            port=port(PORT),
            health=port(HEALTH),
            depends=_texts(first(DEPENDS, (list, str))),
            required=first(REQUIRED, bool),
            arguments=tuple(words),
            environment=tuple((str(name), filled(str(value), self._environment)) for name, value in variables.items()),
            unknown=unknown,
            notes=tuple(notes),
        )


def _inside(tree: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(tree, dict):
        for name, each in tree.items():
            yield str(name), f"{place}.{name}" if place else str(name), each
    elif isinstance(tree, list):
        for number, each in enumerate(tree):
            yield "", f"{place}[{number}]", each


def _script(tree: dict[Any, Any]) -> str:
    """A mapping is an entry if it names a Python script, or any script beside a port."""
    for key in SCRIPT:
        value = tree.get(key)
        if not isinstance(value, str) or not value.strip():
            continue
        if value.strip().endswith((".py", ".pyw")) or any(name in tree for name in PORT):
            return value.strip()
    return ""


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = re.split(r"[\s,]+", value.strip()) if value.strip() else []
    if not isinstance(value, list):
        return ()
    return tuple(str(each.get("name", "")) if isinstance(each, dict) else str(each) for each in value if each)


def filled(text: str, environment: Mapping[str, str]) -> str:
    """With the variables that are set; one that is not stays as it stands, or is its default."""
    return _VARIABLE.sub(lambda found: environment.get(found[1] or found[3], found[2] or found[0]), text)


def port_of(value: Any, environment: Mapping[str, str]) -> tuple[int, str]:
    """(port, what was assumed for it); 0 where the value is no port."""
    if isinstance(value, bool) or value is None:
        return 0, ""
    if isinstance(value, int):
        return (value, "") if 0 < value < 65_536 else (0, "")
    if not isinstance(value, str):
        return 0, ""
    assumed: list[str] = []

    def put(found: re.Match[str]) -> str:
        name = found[1] or found[3]
        if name in environment:
            return environment[name]
        if found[2] is None:
            assumed.append(name)
        return found[2] or "0"

    text = _VARIABLE.sub(put, value).strip().strip("'\"")
    if not _SUM.fullmatch(text) or len(text) > 60:
        return 0, ""
    total = sum(
        int(sign.replace(" ", "") or 0) for sign in re.findall(r"[+-]?\s*\d+", text.replace("(", "").replace(")", ""))
    )
    note = f"{', '.join(assumed)} is not set, and taken as 0" if assumed else ""
    return (total, note) if 0 < total < 65_536 else (0, note)
