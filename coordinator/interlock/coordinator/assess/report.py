"""The report on a tree: every agent with its risk, and what concerns all of them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from interlock.broker.strategies import Level, StrategyName
from interlock.coordinator.assess import agents as found_agents
from interlock.coordinator.assess import graph, scoring
from interlock.coordinator.assess.agents import Agent, Sighting
from interlock.coordinator.assess.model import Module, Problem, Sign
from interlock.coordinator.assess.project import Project
from interlock.coordinator.assess.scoring import Factor, Place, Weighed
from interlock.coordinator.assess.settings import LEVELS, Settings
from interlock.coordinator.assess.startup import Entry

FORMAT = 1  # of the JSON: raised when a key changes its meaning


class Broken(msgspec.Struct, frozen=True):
    """A file that Python can't read."""

    file: str
    line: int
    column: int
    message: str


class Endpoint(msgspec.Struct, frozen=True):
    endpoint: str
    file: str
    line: int


class Assessed(msgspec.Struct, frozen=True, kw_only=True):
    """One agent. `migratable`: its source, and all that it imports of the tree, parses and compiles.

    `estimated`: an error-tolerant parser guessed the factors, because the source does not parse.
    """

    name: str
    kind: str  # class, module or listed
    file: str
    line: int
    base: str  # the base class that it derives from; "" if it does not
    through: list[str]  # classes of the tree in between, as file:Class
    migratable: bool
    problem: Broken | None
    estimated: bool
    score: int
    level: Level
    strategy: StrategyName
    factors: list[Factor]
    weighed: Weighed
    code_lines: int
    bytes: int
    generated: bool
    binds: list[Endpoint]
    connects: list[Endpoint]
    depends: list[str]
    needed_by: list[str]
    gpu: list[Place]
    threading: list[Place]
    databases: list[str]
    config_files: list[str]
    health: list[Place]
    unknown_imports: list[Place]
    listed: str = ""  # where the start-up list has it
    required: bool | None = None


class Duplicate(msgspec.Struct, frozen=True):
    """Agents that are the same: by their code, or only by their name."""

    why: str  # "same code" or "same name"
    agents: list[str]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    files: int
    bytes: int
    agents: list[Assessed]
    broken: list[Broken]  # every file that does not parse, whether it holds an agent or not
    notes: list[str]  # what was left out, and what is wrong with start-up lists
    base_classes: list[str]
    derive: int  # of the agents, so many derive from a base class
    total_risk: int
    levels: dict[str, int]  # agents by level; "unmigratable" beside them
    graph: graph.Graph
    duplicates: list[Duplicate]

    def above(self, level: Level) -> list[Assessed]:
        """The agents of a higher level, and those that can't be migrated at all."""
        bound = LEVELS.index(level)
        return [each for each in self.agents if not each.migratable or LEVELS.index(each.level) > bound]


def report(
    project: Project,
    entries: Sequence[tuple[str, Entry]],
    settings: Settings,
    *,
    uncompiled: Mapping[str, Problem],
    notes: Sequence[str] = (),
    found: tuple[list[Agent], list[str]] | None = None,
) -> Report:
    """uncompiled: why agents' files that parse do not compile. found: what `agents.find` gave, if it was asked."""
    all_agents, wrong = found if found is not None else found_agents.find(project, entries, settings)
    names = _names(all_agents)
    binds = {name: _binds(agent) for name, agent in names.items()}
    connects = {name: _endpoints(agent, "connect") for name, agent in names.items()}
    said = {name: agent.entry.depends if agent.entry is not None else () for name, agent in names.items()}
    edges = graph.connect(
        {name: [each.endpoint for each in ends] for name, ends in binds.items()},
        {name: [each.endpoint for each in ends] for name, ends in connects.items()},
        said,
    )
    needs, needed_by = graph.neighbours(edges.edges)
    assessed = [
        _assessed(
            name,
            agent,
            project.modules[agent.file],
            settings,
            depends=sorted(needs.get(name, ())),
            needed_by=sorted(needed_by.get(name, ())),
            uncompiled=uncompiled.get(agent.file),
            binds=binds[name],
            connects=connects[name],
        )
        for name, agent in names.items()
    ]
    levels = Counter("unmigratable" if not each.migratable else each.level for each in assessed)
    folded = {name.casefold() for name in names}
    unknown = [
        f"{name}: its start-up list says that it needs {other}, which is no agent here"
        for name, others in said.items()
        for other in others
        if other.casefold() not in folded
    ]
    return Report(
        format=FORMAT,
        files=len(project.modules),
        bytes=sum(module.size for module in project.modules.values()),
        agents=assessed,
        broken=[_broken(module) for module in project.modules.values() if module.problem is not None],
        notes=[*notes, *wrong, *unknown],
        base_classes=[f"{spot.path}:{spot.name}" for spot in found_agents.base_classes(project, settings)],
        derive=sum(bool(each.base) for each in assessed),
        total_risk=sum(each.score for each in assessed),
        levels={level: levels[level] for level in (*LEVELS, "unmigratable")},
        graph=edges,
        duplicates=_duplicates(project, names),
    )


def _names(agents: Sequence[Agent]) -> dict[str, Agent]:
    """Each by a name of its own: with its file where a name stands twice."""
    count = Counter(agent.name for agent in agents)
    named: dict[str, Agent] = {}
    for agent in agents:
        name = agent.name if count[agent.name] == 1 else f"{agent.name} ({agent.file})"
        while name in named:
            name += "'"
        named[name] = agent
    return named


def _assessed(
    name: str, agent: Agent, module: Module, settings: Settings, *, depends: list[str], needed_by: list[str],
    uncompiled: Problem | None, binds: list[Endpoint], connects: list[Endpoint],
) -> Assessed:  # fmt: skip
    scored = scoring.score(
        agent, size=module.size, lines=module.code_lines, needed_by=len(needed_by), settings=settings
    )
    said = agent.problem or uncompiled
    problem = Broken(agent.problem_file or agent.file, said.line, said.column, said.message) if said else None
    lineage, entry = agent.lineage, agent.entry
    return Assessed(
        name=name,
        kind=agent.kind,
        file=agent.file,
        line=agent.line,
        base=lineage.root if lineage is not None else "",
        through=[f"{spot.path}:{spot.name}" for spot in lineage.between] if lineage is not None else [],
        migratable=problem is None,
        problem=problem,
        estimated=agent.estimated,
        score=scored.points,
        level=scored.level,
        strategy=scored.strategy,
        factors=scored.factors,
        weighed=scored.weighed,
        code_lines=module.code_lines,
        bytes=module.size,
        generated=module.generated,
        binds=binds,
        connects=connects,
        depends=depends,
        needed_by=needed_by,
        gpu=_places(agent, "gpu", "gpu-complex", "gpu-memory"),
        threading=_places(agent, "threads", "async", "sync"),
        databases=scoring.databases_of(agent.sightings)[1],
        config_files=sorted({s.found.detail for s in agent.sightings if s.found.sign == "config" and s.found.detail}),
        health=_places(agent, "health"),
        unknown_imports=_places(agent, "unknown-import"),
        listed=entry.place if entry is not None else "",
        required=entry.required if entry is not None else None,
    )


def _places(agent: Agent, *kinds: Sign) -> list[Place]:
    found = [each for each in agent.sightings if each.found.sign in kinds]
    found.sort(key=lambda each: (each.file, each.found.line))
    return [Place(each.file, each.found.line, each.found.code, each.found.what) for each in found]


def _endpoints(agent: Agent, sign: Sign) -> list[Endpoint]:
    found: dict[str, Sighting] = {}
    for each in agent.sightings:
        if each.found.sign == sign:
            found.setdefault(each.found.detail, each)
    return [Endpoint(text, each.file, each.found.line) for text, each in found.items()]


def _binds(agent: Agent) -> list[Endpoint]:
    """What the source binds, and the ports of the start-up list that are not among them."""
    ends = _endpoints(agent, "bind")
    known = {graph.port_of(each.endpoint) for each in ends}
    for port in (agent.entry.port, agent.entry.health) if agent.entry is not None else ():
        if port and port not in known:
            ends.append(Endpoint(f"tcp://*:{port}", agent.file, 0))
    return ends


def _broken(module: Module) -> Broken:
    assert module.problem is not None
    return Broken(module.path, module.problem.line, module.problem.column, module.problem.message)


def _duplicates(project: Project, names: Mapping[str, Agent]) -> list[Duplicate]:
    by_code: dict[str, list[str]] = {}
    by_name: dict[str, list[str]] = {}
    for name, agent in names.items():
        klass = project.classes.get(agent.spot)
        code = klass.digest if klass is not None else project.modules[agent.file].digest
        if code:
            by_code.setdefault(code, []).append(name)
        by_name.setdefault(agent.name.replace("_", "").casefold(), []).append(name)
    found = [Duplicate("same code", group) for group in by_code.values() if len(group) > 1]
    same = [set(each.agents) for each in found]
    for group in by_name.values():
        if len(group) > 1 and not any(set(group) <= each for each in same):
            found.append(Duplicate("same name", group))
    return found
