"""The two risk matrices: from an agent's signs to its score, level and strategy. Pure.

The first adds up points, and picks the strategy. The second weighs what the first does not see, and stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from interlock.broker.strategies import STRATEGY_OF, Level, StrategyName
from interlock.coordinator.assess import signs
from interlock.coordinator.assess.agents import Agent, Sighting
from interlock.coordinator.assess.model import Sign
from interlock.coordinator.assess.settings import KB, Settings

FACTORS: dict[str, str] = {
    "no_base": "does not derive from an agent base class",
    "sockets": "manages its own sockets",
    "threads": "starts threads or processes of its own",
    "health": "has health-check logic of its own",
    "long": "has many lines of code",
    "large": "is a large source",
    "database": "talks to a database",
    "config": "loads its own configuration",
}
WEIGHTS = {"size": 0.30, "gpu": 0.25, "threading": 0.20, "databases": 0.15, "criticality": 0.10}
SIZES = ((50 * KB, 5), (100 * KB, 15), (200 * KB, 25))  # bytes below which, and what; above: 35
SIZE_ABOVE = 35
GPU = {"none": 0, "plain": 10, "complex": 20, "memory": 30}
THREADING = {"one": 5, "simple": 10, "async": 20, "advanced": 25}
DATABASES = {"none": 0, "one": 5, "several": 15, "complex": 20}
CRITICALITY = {"utility": 5, "standard": 10, "important": 15, "mission-critical": 20}
NEEDED_BY = 3  # agents that need one: without it a good part of a fleet stands still


class Place(msgspec.Struct, frozen=True):
    """Where a factor shows."""

    file: str
    line: int
    code: str
    what: str


class Factor(msgspec.Struct, frozen=True):
    """A factor that holds, and every place that shows it."""

    factor: str
    points: int
    meaning: str
    places: list[Place]


class Weighed(msgspec.Struct, frozen=True):
    """The second matrix: what was found for each weight, its value, and the weighted sum (0 to 28)."""

    found: dict[str, str]
    values: dict[str, int]
    total: float


class Score(msgspec.Struct, frozen=True):
    points: int
    level: Level
    strategy: StrategyName
    factors: list[Factor]
    weighed: Weighed


def score(agent: Agent, *, size: int, lines: int, needed_by: int, settings: Settings) -> Score:
    """needed_by: so many other agents depend on it."""
    points = settings.points
    factors = []
    if agent.lineage is None:
        place = Place(agent.file, agent.line, "", f"no class of it derives from {', '.join(settings.base_classes)}")
        factors.append(Factor("no_base", points.no_base, FACTORS["no_base"], [place]))
    factors += list(_shown(agent.sightings, settings))
    if lines > settings.long_lines:
        place = Place(agent.file, 1, "", f"{lines} lines of code, more than {settings.long_lines}")
        factors.append(Factor("long", points.long, FACTORS["long"], [place]))
    if size > settings.large_bytes:
        place = Place(agent.file, 1, "", f"{size} bytes, more than {settings.large_bytes}")
        factors.append(Factor("large", points.large, FACTORS["large"], [place]))
    factors.sort(key=lambda factor: list(FACTORS).index(factor.factor))
    total = sum(factor.points for factor in factors)
    level = settings.level(total)
    return Score(total, level, STRATEGY_OF[level], factors, weigh(agent, size=size, needed_by=needed_by))


def _shown(sightings: Sequence[Sighting], settings: Settings) -> list[Factor]:
    made = []
    shown: tuple[Sign, ...] = ("sockets", "threads", "health", "database", "config")
    for sign in shown:
        places = [
            Place(each.file, each.found.line, each.found.code, each.found.what)
            for each in sightings
            if each.found.sign == sign
        ]
        if places:
            places.sort(key=lambda place: (place.file, place.line))
            made.append(Factor(sign, getattr(settings.points, sign), FACTORS[sign], places))
    return made


def weigh(agent: Agent, *, size: int, needed_by: int) -> Weighed:
    found = {
        "size": f"{size} bytes",
        "gpu": gpu_use(agent.sightings),
        "threading": threading_of(agent.sightings),
        "databases": databases_of(agent.sightings)[0],
        "criticality": criticality(agent, needed_by),
    }
    values = {
        "size": next((value for bound, value in SIZES if size < bound), SIZE_ABOVE),
        "gpu": GPU[found["gpu"]],
        "threading": THREADING[found["threading"]],
        "databases": DATABASES[found["databases"]],
        "criticality": CRITICALITY[found["criticality"]],
    }
    return Weighed(found, values, round(sum(WEIGHTS[name] * value for name, value in values.items()), 2))


def gpu_use(sightings: Sequence[Sighting]) -> str:
    seen = {each.found.sign for each in sightings}
    return (
        "memory"
        if "gpu-memory" in seen
        else "complex"
        if "gpu-complex" in seen
        else "plain"
        if "gpu" in seen
        else "none"
    )


def threading_of(sightings: Sequence[Sighting]) -> str:
    """advanced: processes, or threads beside tasks or with conditions and semaphores. async: concurrent tasks."""
    seen = {each.found.sign for each in sightings}
    processes = any(each.found.sign == "threads" and each.found.detail == "processes" for each in sightings)
    if processes or "sync" in seen or {"threads", "async"} <= seen:
        return "advanced"
    return "async" if "async" in seen else "simple" if "threads" in seen else "one"


def databases_of(sightings: Sequence[Sighting]) -> tuple[str, list[str]]:
    """complex: three kinds and more, or two of which one is an object-relational mapper."""
    kinds = sorted({each.found.what.partition(".")[0] for each in sightings if each.found.sign == "database"})
    if len(kinds) > 2 or (len(kinds) == 2 and signs.ORMS & set(kinds)):
        return "complex", kinds
    return ("none", "one", "several")[len(kinds)], kinds


def criticality(agent: Agent, needed_by: int) -> str:
    """By the start-up list and by how many need it; without either it is standard."""
    required = agent.entry.required if agent.entry is not None else None
    if needed_by >= NEEDED_BY and required is not False:
        return "mission-critical"
    if required or needed_by:
        return "important"
    return "utility" if required is False else "standard"
