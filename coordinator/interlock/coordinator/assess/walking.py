"""Which files there are below a path. Looks at folders only; reads no file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from interlock.broker.errors import ConfigError

SOURCES = (".py", ".pyw")
LISTS = (".yaml", ".yml")
MAX_FILES = 200_000  # a hundred times what the largest fleets have; beyond, the path is a mistake


@dataclass
class Tree:
    """What was found. Paths are relative to `root`, with `/`. left_out: by excludes. unread: (path, why)."""

    root: Path
    sources: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    left_out: int = 0
    unread: list[tuple[str, str]] = field(default_factory=list)


def walk(paths: Sequence[Path], excluded: Sequence[str]) -> Tree:
    """All of several paths as one tree. Each file and folder once, however many links lead to it."""
    for path in paths:
        if not path.exists():
            raise ConfigError("there is no such file or folder", where=str(path))
    whole = [Path(os.path.abspath(path)) for path in paths]
    folders = [path if path.is_dir() else path.parent for path in whole]
    tree = Tree(Path(os.path.commonpath(folders)))
    seen: set[tuple[int, int]] = set()
    for path in whole:
        for file in [path] if path.is_file() else _files(path, path, excluded, seen, tree):
            _take(file, seen, tree)
    tree.sources.sort()
    tree.lists.sort()
    return tree


def _take(file: Path, seen: set[tuple[int, int]], tree: Tree) -> None:
    name = file.relative_to(tree.root).as_posix()
    kind = tree.sources if file.suffix in SOURCES else tree.lists if file.suffix in LISTS else None
    if kind is None or not _is_new(file, seen, tree):
        return
    if not file.is_file():
        tree.unread.append((_shown(name), "is no ordinary file"))
        return
    if len(tree.sources) >= MAX_FILES:
        raise ConfigError(f"has more than {MAX_FILES} source files", where=str(tree.root), hint="name a part of it")
    if _shown(name) != name:
        tree.unread.append((_shown(name), "has a name that is no text"))
        return
    kind.append(name)


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _files(folder: Path, root: Path, excluded: Sequence[str], seen: set[tuple[int, int]], tree: Tree) -> Iterator[Path]:
    todo = [folder]
    links: list[Path] = []  # after all else: what they lead to has a name of its own, most often
    while todo or links:
        here = todo.pop() if todo else links.pop()
        if not here.is_dir():
            yield here
            continue
        if not _is_new(here, seen, tree):
            continue  # a link to what was looked at
        try:
            found = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            tree.unread.append((_shown(str(here)), error.strerror or "can't be read"))
            continue
        for entry in found:
            path = Path(entry.path)
            if _is_excluded(entry.name, path.relative_to(root).as_posix(), excluded):
                tree.left_out += path.suffix in SOURCES
            elif entry.is_symlink():
                links.append(path)
            elif entry.is_dir(follow_symlinks=False):
                todo.append(path)
            else:
                yield path


def _is_excluded(name: str, path: str, excluded: Sequence[str]) -> bool:
    return any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in excluded)


def _is_new(path: Path, seen: set[tuple[int, int]], tree: Tree) -> bool:
    try:
        found = path.stat()
    except OSError as error:  # a link that leads nowhere, or round in a circle
        tree.unread.append((_shown(path.name), error.strerror or "can't be read"))
        return False
    key = (found.st_dev, found.st_ino)
    if key in seen:
        return False
    seen.add(key)
    return True
