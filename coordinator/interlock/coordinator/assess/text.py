"""A report as lines and rows for a terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from interlock.coordinator.assess.report import Assessed, Report
from interlock.coordinator.assess.scoring import Place
from interlock.coordinator.wording import Tone

COLUMNS = ["agent", "where", "score", "level", "strategy", "weighed", "factors", "binds", "needs"]
BROKEN = 20  # files that do not parse, in the short form
PLACES = 5  # of a factor, in the details
TONES: dict[str, Tone] = {"low": "good", "medium": "plain", "high": "warn", "critical": "bad"}

_Line = tuple[str, Tone]


def head(found: Report) -> Iterator[_Line]:
    levels = ", ".join(f"{count} {level}" for level, count in found.levels.items() if count)
    yield (
        f"{_count(len(found.agents), 'agent')} in {_count(found.files, 'file')}{': ' if levels else ''}{levels}",
        "plain",
    )
    if found.agents:
        yield (
            f"{found.derive} of {len(found.agents)} derive from an agent base class; total risk {found.total_risk}",
            "plain",
        )


def rows(found: Report) -> list[list[str]]:
    """The riskiest first; before them what can't be migrated."""
    ordered = sorted(found.agents, key=lambda agent: (agent.migratable, -agent.score, agent.name))
    return [
        [
            agent.name,
            f"{agent.file}:{agent.line}",
            f"{'about ' if agent.estimated else ''}{agent.score}",
            agent.level if agent.migratable else "can't be migrated",
            agent.strategy if agent.migratable else "",
            f"{agent.weighed.total:g}",
            " ".join(factor.factor for factor in agent.factors),
            " ".join(each.endpoint for each in agent.binds),
            " ".join(agent.depends),
        ]
        for agent in ordered
    ]


def rest(found: Report, *, details: bool) -> Iterator[_Line]:
    for agent in found.agents:
        if agent.problem is not None:
            place = f"{agent.problem.file}:{agent.problem.line}:{agent.problem.column}"
            yield f"{agent.name} can't be migrated: {place}: {agent.problem.message}", "bad"
    if details:
        for agent in found.agents:
            yield from _details(agent)
    for clash in found.graph.clashes:
        yield f"port {clash.port} is bound by {', '.join(clash.agents)}", "bad"
    for cycle in found.graph.cycles:
        yield f"need each other in a circle: {', '.join(cycle)}", "warn"
    for twice in found.duplicates:
        yield f"{twice.why}: {', '.join(twice.agents)}", "warn"
    shown = found.broken if details else found.broken[:BROKEN]
    for broken in shown:
        yield f"does not parse: {broken.file}:{broken.line}:{broken.column}: {broken.message}", "warn"
    if len(found.broken) > len(shown):
        yield f"and {len(found.broken) - len(shown)} more files that do not parse", "warn"
    for note in found.notes:
        yield note, "dim"


def _details(agent: Assessed) -> Iterator[_Line]:
    guess = ", estimated: the source does not parse" if agent.estimated else ""
    yield f"{agent.name}: {agent.score}, {agent.level}{guess}", TONES[agent.level]
    for factor in agent.factors:
        yield f"  {factor.points:>2}  {factor.meaning}", "plain"
        yield from _places(factor.places)
    said = ", ".join(f"{name} {word}" for name, word in agent.weighed.found.items())
    yield f"  weighed {agent.weighed.total:g}: {said}", "plain"
    for what, places in (("GPU", agent.gpu), ("import that can't be told", agent.unknown_imports)):
        if places:
            yield f"  {what}", "plain"
            yield from _places(places)
    ends = [("binds", agent.binds), ("connects to", agent.connects)]
    for what, endpoints in ends:
        for each in endpoints:
            yield f"  {what} {each.endpoint} ({each.file}:{each.line})", "dim"
    for what, names in (("needs", agent.depends), ("reads", agent.config_files), ("database", agent.databases)):
        if names:
            yield f"  {what} {', '.join(names)}", "dim"


def _places(places: list[Place]) -> Iterator[_Line]:
    for place in places[:PLACES]:
        yield f"      {place.file}:{place.line}: {place.code or place.what}", "dim"
    if len(places) > PLACES:
        yield f"      and {len(places) - PLACES} more", "dim"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
