"""The directions of import, read from the syntax of every module: what is below never knows what is above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("broker", "agents", "monitors", "coordinator")

# A foreign library, and the only files that may import it: whatever it does wrong has one place to be mended.
ONLY_IN = {
    "zmq": {"broker/sockets.py", "agents/fixed_ports.py", "agents/sandbox.py"},  # the last two: a user's own
    "pynvml": {"monitors/nvml.py"},
    "promql_parser": {"coordinator/rules/language.py"},
    "yaml": {"coordinator/rules/yamltree.py"},
    "rich": {"coordinator/screen.py", "coordinator/top_screen.py"},
    "h11": {"agents/http1.py", "agents/probes.py"},  # a server's side and a client's
    "nacl": {"broker/crypto.py"},
    "sqlite3": {"broker/log.py", "agents/journal.py"},
    "psutil": {"monitors/machine.py"},
    "tree_sitter": {"coordinator/assess/lenient.py"},
    "tree_sitter_python": {"coordinator/assess/lenient.py"},
}
# The demo renders its own screen, and the agents it ships stand for a user's programs.
FREE = ("coordinator/demo/",)
SHIPPED = "coordinator/demo/sources/"


def modules() -> list[Path]:
    return [path for part in PARTS for path in sorted((ROOT / part / "interlock").rglob("*.py"))]


def short(path: Path) -> str:
    """ "broker/wire.py" of broker/interlock/broker/wire.py."""
    return path.relative_to(ROOT).as_posix().split("/interlock/", 1)[1]


@cache
def imported(path: Path) -> frozenset[str]:
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours() -> list[Path]:
    return [path for path in modules() if not short(path).startswith(SHIPPED)]


def test_there_is_something_to_look_at() -> None:
    assert {short(path).split("/")[0] for path in modules()} == set(PARTS)


def test_each_part_imports_only_itself_and_the_broker() -> None:
    wrong = []
    for path in ours():
        part = short(path).split("/")[0]
        for name in imported(path):
            pieces = name.split(".")
            if pieces[0] == "interlock" and len(pieces) > 1 and pieces[1] not in {"broker", part}:
                wrong.append(f"{short(path)} imports {name}")
    assert wrong == []


def test_the_namespace_belongs_to_no_part() -> None:
    assert [part for part in PARTS if (ROOT / part / "interlock" / "__init__.py").exists()] == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_foreign_library_is_imported_in_its_own_files_only(library: str) -> None:
    found = {short(path) for path in ours() if library in {name.split(".")[0] for name in imported(path)}}
    assert {path for path in found if not path.startswith(FREE)} <= ONLY_IN[library]


def test_every_part_says_that_it_is_typed() -> None:
    assert [part for part in PARTS if not (ROOT / part / "interlock" / part / "py.typed").exists()] == []
