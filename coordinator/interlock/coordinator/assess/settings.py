"""What of an assessment can be set: one TOML file, all keys of which may be left out. Pure."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence

import msgspec

from interlock.broker.errors import ConfigError
from interlock.broker.strategies import Level
from interlock.coordinator.assess.reading import MAX_SOURCE

KB = 1024
LEVELS: tuple[Level, ...] = ("low", "medium", "high", "critical")
EXCLUDED = (
    ".*", "__pycache__", "venv", "env", "node_modules", "site-packages", "dist-packages", "build", "dist", "*.egg-info",
    "test", "tests", "test_*.py", "*_test.py", "conftest.py",
)  # fmt: skip  # folders and files by name: what is not written here, or is no agent that serves
BASES = ("interlock.agents.agent.Agent", "Agent", "BaseAgent", "AgentBase", "AbstractAgent")


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Points(_Table, frozen=True, kw_only=True):
    """What each factor adds to the score."""

    no_base: int = 10  # does not derive from an agent base class
    sockets: int = 8  # manages its own sockets
    threads: int = 7  # own threads or processes
    health: int = 6  # own health-check logic
    long: int = 5  # more lines of code than `long_lines`
    large: int = 4  # source larger than `large_bytes`
    database: int = 3  # talks to a database
    config: int = 2  # loads its own configuration


class Bounds(_Table, frozen=True, kw_only=True):
    """The highest score of each level; beyond the last it is critical."""

    low: int = 15
    medium: int = 25
    high: int = 35


class Settings(_Table, frozen=True, kw_only=True):
    """All of it."""

    exclude: tuple[str, ...] = ()  # beside those that ship: names, or paths from the root, with * and ?
    shipped_excludes: bool = True  # false: only `exclude` counts
    base_classes: tuple[str, ...] = BASES  # names of agent base classes; one with dots is an end of the dotted name
    hooks: tuple[str, ...] = ("health",)  # methods that a base class outside of the tree calls by itself
    points: Points = Points()
    levels: Bounds = Bounds()
    long_lines: int = 500  # lines of code, neither blank nor comment
    large_bytes: int = 50 * KB
    max_bytes: int = MAX_SOURCE  # larger files are named, and not read

    @property
    def excluded(self) -> tuple[str, ...]:
        return (*(EXCLUDED if self.shipped_excludes else ()), *self.exclude)

    def level(self, score: int) -> Level:
        bounds = (self.levels.low, self.levels.medium, self.levels.high)
        return next((level for level, bound in zip(LEVELS, bounds, strict=False) if score <= bound), "critical")


def parse_settings(text: str, *, where: str) -> Settings:
    """ConfigError names the key that is wrong."""
    try:
        found = msgspec.convert(tomllib.loads(text), Settings)
    except (ValueError, RecursionError) as error:  # msgspec's ValidationError is one
        raise ConfigError(str(error) or "is nested too deeply", where=where) from None
    if not found.levels.low < found.levels.medium < found.levels.high:
        raise ConfigError("the levels' bounds must rise: low < medium < high", where=f"{where}: levels")
    if any(points < 0 for points in msgspec.structs.astuple(found.points)):
        raise ConfigError("points can't be negative", where=f"{where}: points")
    return found


def with_options(settings: Settings, *, exclude: Sequence[str], bases: Sequence[str]) -> Settings:
    return msgspec.structs.replace(
        settings, exclude=(*settings.exclude, *exclude), base_classes=(*settings.base_classes, *bases)
    )
