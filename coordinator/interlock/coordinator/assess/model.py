"""What one source file says, as plain values that travel between processes."""

from __future__ import annotations

from typing import Literal

import msgspec

Sign = Literal[
    "sockets", "threads", "health", "database", "config", "gpu", "gpu-complex", "gpu-memory", "async", "sync",
    "bind", "connect", "loop", "unknown-import",
]  # fmt: skip
MAX_CODE = 160  # characters of the line that shows a finding: a screen's width; generated lines have thousands


class Found(msgspec.Struct, frozen=True, array_like=True):
    """One sign in the source, with its place. `what`: the resolved name of the call; `detail`: a port or a file."""

    sign: Sign
    what: str
    line: int
    code: str
    detail: str = ""


class Scope(msgspec.Struct, array_like=True):
    """A module's body (""), its main part ("<main>"), a class, a function or a method ("Class.method").

    `refs`: the names it calls, resolved: ":name" is of this module, ".mod.name" is relative to it; "&" stands before a
    name that is only handed on, such as the target of a thread.
    """

    name: str
    line: int
    found: list[Found] = []
    refs: list[str] = []


class Klass(msgspec.Struct, frozen=True, array_like=True):
    """A class of the module's top level. `bases` are resolved; `methods` are those that it defines itself."""

    name: str
    line: int
    bases: list[str]
    methods: list[str]
    digest: str  # of its lines without blanks and comments: the same code has the same one


class Problem(msgspec.Struct, frozen=True, array_like=True):
    """Why a file can't be used: line and column count from 1, 0 where there is none."""

    message: str
    line: int = 0
    column: int = 0


class Module(msgspec.Struct, array_like=True):
    """One file. `estimated`: it does not parse, and an error-tolerant parser guessed what is in it."""

    path: str
    size: int  # bytes
    code_lines: int = 0  # neither blank nor comment alone
    problem: Problem | None = None
    estimated: bool = False
    generated: bool = False  # it says so in its first lines
    scopes: list[Scope] = []
    classes: list[Klass] = []
    names: dict[str, str] = {}  # what names of the module's top level stand for, as far as other files can ask for it
    stars: list[str] = []  # modules of which everything is imported
    imports: list[str] = []  # modules and names that are imported when the module is
    digest: str = ""
