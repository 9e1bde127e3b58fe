"""Names over the files of a tree: which module, class or function a resolved name of one file means. Pure."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from interlock.coordinator.assess.model import Klass, Module, Scope

HOPS = 12  # aliases from file to file
ANCESTORS = 40  # classes above one


@dataclass(frozen=True)
class Spot:
    """A place that a name leads to: a scope of a file, "" for the file itself."""

    path: str
    name: str


@dataclass(frozen=True)
class Lineage:
    """How a class derives from an agent base class: the root's name, and the classes of the tree in between."""

    root: str
    between: tuple[Spot, ...]
    root_spot: Spot | None


class Project:
    """Files by their paths, relative to one root and with `/`."""

    def __init__(self, modules: Iterable[Module]) -> None:
        self.modules = {module.path: module for module in modules}
        self.scopes: dict[str, dict[str, Scope]] = {}
        self.classes: dict[Spot, Klass] = {}
        self._members: dict[Spot, list[Spot]] = {}
        self._by_end: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        self._known: dict[tuple[tuple[str, ...], str], str | None] = {}
        for path, module in self.modules.items():
            parts = dotted(path)
            if parts:
                self._by_end.setdefault(parts[-1], []).append((parts, path))
            self.scopes[path] = {scope.name: scope for scope in module.scopes}
            for scope in module.scopes:
                self._members.setdefault(Spot(path, scope.name.partition(".")[0]), []).append(Spot(path, scope.name))
            for klass in module.classes:
                self.classes[Spot(path, klass.name)] = klass

    # --- modules

    def module(self, parts: tuple[str, ...], asker: str) -> str | None:
        """The file of an absolute name: of those whose path ends so, the nearest to who asks."""
        folder = asker.rpartition("/")[0]
        key = (parts, folder)
        if len(parts) == 1 and parts[0] in sys.stdlib_module_names and not self.beside(parts[0], asker):
            return None
        if key not in self._known:
            fitting = [
                path
                for whole, path in self._by_end.get(parts[-1], ())
                if whole[-len(parts) :] == parts and path != asker
            ]
            self._known[key] = max(fitting, key=lambda path: (_shared(path, folder), -len(path), path), default=None)
        return self._known[key]

    def beside(self, name: str, asker: str) -> bool:
        """Is there a file of this name in the folder of who asks? Then `import name` means that, and no library."""
        folder = asker.rpartition("/")[0]
        base = f"{folder}/{name}" if folder else name
        return any(each in self.modules and each != asker for each in (f"{base}.py", f"{base}/__init__.py"))

    # --- names

    def chase(self, name: str, asker: str) -> tuple[list[str], Spot | None]:
        """All names that it is known by on the way, and where it ends in this tree, if it does."""
        seen = [name]
        for _ in range(HOPS):
            spot, alias = self._step(name, asker)
            if alias is None:
                return seen, spot
            name, asker = alias
            if name in seen and spot is None:
                return seen, None
            seen.append(name)
        return seen, None

    def find(self, name: str, asker: str) -> Spot | None:
        return self.chase(name, asker)[1]

    def _step(self, name: str, asker: str, stars: set[str] | None = None) -> tuple[Spot | None, tuple[str, str] | None]:
        """Where a name leads: a place, or (another name, the file in which that holds)."""
        if name.startswith(":"):
            return self._inside(asker, name[1:].split("."), stars)
        level = len(name) - len(name.lstrip("."))
        parts = [part for part in name[level:].split(".") if part]
        if level:
            return self._relative(level, parts, asker, stars)
        for count in range(len(parts), 0, -1):
            path = self.module(tuple(parts[:count]), asker)
            if path is not None:
                return self._inside(path, parts[count:], stars)
        return None, None

    def _relative(
        self, level: int, parts: list[str], asker: str, stars: set[str] | None
    ) -> tuple[Spot | None, tuple[str, str] | None]:
        folder = PurePosixPath(asker).parent
        for _ in range(level - 1):
            folder = folder.parent
        for count in range(len(parts), -1, -1):
            base = str(folder.joinpath(*parts[:count]))
            for path in (f"{base}.py", f"{base}/__init__.py" if base != "." else "__init__.py"):
                if path in self.modules and (count or path != asker):
                    return self._inside(path, parts[count:], stars)
        return None, None

    def _inside(self, path: str, rest: list[str], stars: set[str] | None) -> tuple[Spot | None, tuple[str, str] | None]:
        if not rest:
            return Spot(path, ""), None
        module, scopes = self.modules[path], self.scopes[path]
        first = rest[0]
        if first in scopes:
            whole = ".".join(rest[:2])
            return Spot(path, whole if whole in scopes else first), None
        if first in module.names and module.names[first] != ":" + ".".join(rest):
            target = module.names[first].partition("(")[0]
            return None, (".".join([target, *rest[1:]]), path)
        package = path.removesuffix("__init__.py")
        if package != path:  # a submodule, asked for as an attribute of its package
            for inner in (f"{package}{first}.py", f"{package}{first}/__init__.py"):
                if inner in self.modules:
                    return self._inside(inner, rest[1:], stars)
        stars = set() if stars is None else stars  # files whose star imports this question has followed
        followed = path in stars
        stars.add(path)
        for star in () if followed else module.stars:
            target = star + ".".join(rest) if star.endswith(".") else ".".join([star, *rest])
            spot, alias = self._step(target, path, stars)
            if alias is not None or (spot is not None and spot.name):
                return spot, alias
        return Spot(path, ""), None

    # --- classes

    def members(self, spot: Spot) -> list[Spot]:
        """A class and its methods."""
        return self._members.get(spot, [])

    def lineage(self, spot: Spot, roots: Roots) -> Lineage | None:
        """The nearest agent base class above a class; None if there is none."""
        todo: list[tuple[Spot, tuple[Spot, ...]]] = [(spot, ())]
        seen = {spot}
        for _ in range(ANCESTORS):
            if not todo:
                return None
            where, between = todo.pop(0)
            for base in self.classes[where].bases:
                names, above = self.chase(base.partition("(")[0], where.path)
                known = next((name for name in names if name in roots), None)
                if above is not None and above.name in roots and above in self.classes:
                    known = known or above.name
                if known is not None:
                    return Lineage(known.lstrip(":."), between, above if above in self.classes else None)
                if above in self.classes and above not in seen:
                    seen.add(above)
                    todo.append((above, (*between, above)))
        return None

    def ancestors(self, spot: Spot) -> Iterator[Spot]:
        """The class, and all classes of this tree that it derives from."""
        todo, seen = [spot], {spot}
        while todo and len(seen) < ANCESTORS:
            where = todo.pop(0)
            yield where
            klass = self.classes.get(where)
            for base in klass.bases if klass is not None else ():
                above = self.find(base.partition("(")[0], where.path)
                if above is not None and above in self.classes and above not in seen:
                    seen.add(above)
                    todo.append(above)


class Roots:
    """The names of agent base classes: one without dots is any class of that name."""

    def __init__(self, names: Iterable[str]) -> None:
        self._plain = {name for name in names if "." not in name}
        self._dotted = tuple(name for name in names if "." in name)

    def __contains__(self, name: str) -> bool:
        bare = name.lstrip(":.")
        if bare.rpartition(".")[2] in self._plain:
            return True
        return any(bare == each or bare.endswith(f".{each}") for each in self._dotted)


def dotted(path: str) -> tuple[str, ...]:
    """("pkg", "mod") of pkg/mod.py, and ("pkg",) of pkg/__init__.py."""
    parts = path.removesuffix(".py").removesuffix(".pyw").split("/")
    return tuple(parts[:-1] if parts[-1] == "__init__" else parts)


def _shared(path: str, folder: str) -> int:
    """So many folders do a file and a folder have in common, from the root."""
    count = 0
    for one, other in zip(path.split("/")[:-1], folder.split("/") if folder else [], strict=False):
        if one != other:
            break
        count += 1
    return count
