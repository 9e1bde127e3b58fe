"""Which agents there are in a tree, and the signs of each with their places. Pure.

An agent is a class that derives from an agent base class, a module whose main part has a loop and sockets, or an entry
of a start-up list. Its source is its file, the classes of the tree that it derives from (without the base class), and
what these call of the tree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from interlock.coordinator.assess.model import Found, Module, Problem
from interlock.coordinator.assess.project import Lineage, Project, Roots, Spot
from interlock.coordinator.assess.reading import MAIN
from interlock.coordinator.assess.settings import Settings
from interlock.coordinator.assess.startup import Entry

MAX_SCOPES = 3000  # that are followed for one agent
IMPORTS = 200  # files that one agent imports, and these in turn
SHADOWED = frozenset(("sockets", "threads", "database", "config", "gpu", "gpu-complex", "gpu-memory"))


@dataclass(frozen=True)
class Sighting:
    """A sign with its file."""

    file: str
    found: Found


@dataclass
class Agent:
    """One agent as it was found. kind: "class", "module", or "listed" (only a start-up list names it)."""

    name: str
    kind: str
    file: str
    line: int
    lineage: Lineage | None = None
    entry: Entry | None = None
    sightings: list[Sighting] = field(default_factory=list)
    problem: Problem | None = None  # why it can't be migrated
    problem_file: str = ""
    estimated: bool = False

    @property
    def spot(self) -> Spot:
        return Spot(self.file, self.name if self.kind == "class" else "")


def find(project: Project, entries: Sequence[tuple[str, Entry]], settings: Settings) -> tuple[list[Agent], list[str]]:
    """The agents, and what is wrong with start-up lists. entries: the folder of each list, and what stands in it."""
    roots = Roots(settings.base_classes)
    agents = list(_classes(project, roots))
    taken = {agent.file for agent in agents}
    classes = {agent.spot for agent in agents}
    for path, module in project.modules.items():
        if path not in taken and (agent := _by_loop(project, module, classes)) is not None:
            agents.append(agent)
    wrong = _listed(project, entries, agents)
    blocked = classes | {spot for spot in project.classes if spot.name in roots}
    by_file: dict[str, set[str]] = {}
    for spot in classes:
        by_file.setdefault(spot.path, set()).add(spot.name)
    for agent in agents:
        starts = _starts(project, agent, by_file.get(agent.file, set()))
        agent.sightings = list(_sightings(project, agent, starts, blocked, settings))
        _blame(project, agent)
    agents.sort(key=lambda agent: (agent.file, agent.line, agent.name))
    return agents, wrong


def base_classes(project: Project, settings: Settings) -> list[Spot]:
    """The agent base classes that are defined in the tree."""
    roots = Roots(settings.base_classes)
    return sorted((spot for spot in project.classes if spot.name in roots), key=lambda spot: (spot.path, spot.name))


def _classes(project: Project, roots: Roots) -> Iterator[Agent]:
    lineages: dict[Spot, Lineage] = {}
    for spot, klass in project.classes.items():
        if klass.bases and spot.name not in roots and (lineage := project.lineage(spot, roots)) is not None:
            lineages[spot] = lineage
    between = {above for lineage in lineages.values() for above in lineage.between}
    used = _used(project) if between else set()
    for spot, lineage in lineages.items():
        if spot in between and spot.name not in used:
            continue  # it is there to be derived from
        yield Agent(spot.name, "class", spot.path, project.classes[spot].line, lineage=lineage)


def _used(project: Project) -> set[str]:
    """The last parts of all names that are called or handed on."""
    return {
        ref.rpartition(".")[2].lstrip("&:")
        for module in project.modules.values()
        for scope in module.scopes
        for ref in scope.refs
    }


def _by_loop(project: Project, module: Module, classes: set[Spot]) -> Agent | None:
    """The module as an agent, if what it runs by itself loops and has sockets."""
    if not any(found.sign in ("loop", "sockets", "bind") for scope in module.scopes for found in scope.found):
        return None
    starts = [Spot(module.path, name) for name in ("", MAIN) if name in project.scopes[module.path]]
    signs = {found.sign for spot in _reach(project, starts, classes, strict=True) for found in _found(project, spot)}
    if "loop" not in signs or not signs & {"sockets", "bind"}:
        return None
    path = PurePosixPath(module.path)
    name = path.parent.name if path.stem in ("__main__", "__init__", "main", "app") and path.parent.name else path.stem
    return Agent(name, "module", module.path, 1)


def _listed(project: Project, entries: Sequence[tuple[str, Entry]], agents: list[Agent]) -> list[str]:
    """Give each agent its entry; make agents of entries whose script holds none."""
    wrong = []
    for folder, entry in entries:
        path = script_file(project, folder, entry.script)
        if path is None:
            wrong.append(f"{entry.place}: {entry.name}: there is no script {entry.script}")
            continue
        mine = [agent for agent in agents if agent.file == path and agent.entry is None]
        if mine:
            mine[0].entry = entry
            if mine[0].kind == "module":
                mine[0].name = entry.name
        else:
            agents.append(Agent(entry.name, "listed", path, 1, entry=entry))
    return wrong


def script_file(project: Project, folder: str, script: str) -> str | None:
    """The file of a script, from its list's folder upwards; else the nearest whose path ends so."""
    parts = [part for part in PurePosixPath(script.replace("\\", "/")).parts if part not in (".", "/", "..")]
    if not parts:
        return None
    above = [part for part in folder.split("/") if part]
    for count in range(len(above), -1, -1):
        path = "/".join([*above[:count], *parts])
        if path in project.modules:
            return path
    tail = "/" + "/".join(parts)
    fitting = [path for path in project.modules if path.endswith(tail)]
    return min(fitting, key=lambda path: (len(path), path), default=None)


# --- signs


def _sightings(
    project: Project, agent: Agent, starts: Sequence[Spot], blocked: set[Spot], settings: Settings
) -> Iterator[Sighting]:
    """starts: what is its own; blocked: all agents and base classes, which it does not answer for."""
    hooks = _hooks(project, agent, settings)
    root = agent.lineage.root_spot if agent.lineage is not None else None
    own = {agent.spot, *(agent.lineage.between if agent.lineage is not None else ())}
    seen: set[tuple[str, Found]] = set()
    for spot in _reach(project, starts, blocked, own, without=root.path if root is not None else ""):
        for found in _found(project, spot):
            if found.sign == "health" and found.detail == "method" and found.what.removeprefix("def ") in hooks:
                continue
            if (spot.path, found) not in seen:
                seen.add((spot.path, found))
                yield Sighting(spot.path, found)


def _starts(project: Project, agent: Agent, classes: set[str]) -> list[Spot]:
    """The whole file without other agents; of a file with several, the agent's class and what runs for all.

    classes: the agents in its file.
    """
    here = project.scopes[agent.file]
    if agent.kind == "class":
        own = [scope for above in project.ancestors(agent.spot) for scope in project.members(above)]
        roots = {agent.lineage.root_spot} if agent.lineage is not None else set()
        own = [spot for spot in own if not any(root is not None and _is_in(spot, root) for root in roots)]
        others = classes - {agent.name}
        if others:
            return [*own, *(Spot(agent.file, name) for name in ("", MAIN) if name in here)]
    else:
        own, others = [], classes
    return [*own, *(Spot(agent.file, name) for name in here if name.partition(".")[0] not in others)]


def _is_in(spot: Spot, root: Spot) -> bool:
    return spot.path == root.path and spot.name.partition(".")[0] == root.name


def _hooks(project: Project, agent: Agent, settings: Settings) -> set[str]:
    """Methods by which the base class asks: to override them is no logic of one's own."""
    if agent.lineage is None:
        return set()
    root = agent.lineage.root_spot
    return set(settings.hooks if root is None else project.classes[root].methods)


def _reach(
    project: Project, starts: Sequence[Spot], blocked: set[Spot], own: Collection[Spot] = (), *,
    without: str = "", strict: bool = False,
) -> Iterator[Spot]:  # fmt: skip
    """The scopes that run when these do, as far as names tell; none of a class that is blocked, unless it is its own.

    without: a file whose own body is left out.

    strict: the body of a file runs only what it calls itself, and of a class that it makes only `__init__`.
    """
    todo = list(starts)
    seen = set(todo)
    for _ in range(MAX_SCOPES):
        if not todo:
            return
        spot = todo.pop(0)
        yield spot
        scope = project.scopes[spot.path].get(spot.name)
        import_only = strict and not spot.name
        for ref in scope.refs if scope is not None else ():
            if import_only and ref[0] == "&":
                continue
            target = project.find(ref.removeprefix("&"), spot.path)
            top = Spot(target.path, target.name.partition(".")[0]) if target is not None else None
            if target is None or top is None or (top in blocked and top not in own):
                continue
            if import_only and target.name and not ref.endswith(target.name.rpartition(".")[2]):
                continue  # an attribute of a class, which makes no object of it
            found = [target]
            if target in project.classes:
                found = [each for above in project.ancestors(target) if above not in blocked or above in own
                         for each in project.members(above)
                         if not import_only or each.name.endswith(".__init__")]  # fmt: skip
            if target.path not in (spot.path, without):
                found.append(Spot(target.path, ""))
            for each in found:
                if each not in seen:
                    seen.add(each)
                    todo.append(each)


def _found(project: Project, spot: Spot) -> Iterator[Found]:
    """Without those whose library is a file of the same folder."""
    scope = project.scopes[spot.path].get(spot.name)
    for found in scope.found if scope is not None else ():
        head = found.what.partition(".")[0]
        if found.sign in SHADOWED and head and head[0] not in ":(" and project.beside(head, spot.path):
            continue
        yield found


def _blame(project: Project, agent: Agent) -> None:
    """Why it can't be migrated: its file, or one that it imports, does not parse."""
    todo, seen = [agent.file, *(s.path for s in (agent.lineage.between if agent.lineage else ()))], {agent.file}
    while todo and len(seen) < IMPORTS:
        path = todo.pop(0)
        module = project.modules[path]
        agent.estimated = agent.estimated or (
            module.estimated and path in {each.file for each in agent.sightings} | {agent.file}
        )
        if module.problem is not None and agent.problem is None:
            agent.problem, agent.problem_file = module.problem, path
        for name in module.imports:
            target = project.find(name, path)
            if target is not None and target.path not in seen:
                seen.add(target.path)
                todo.append(target.path)
