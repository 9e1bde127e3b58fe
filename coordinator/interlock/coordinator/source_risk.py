"""How risky a revision of the fleet file is by its source, for `interlock plan`. Reads the source, and runs nothing."""

from __future__ import annotations

from pathlib import Path

import trio

from interlock.broker.config import FleetConfig, RevisionConfig, source_of
from interlock.broker.errors import InterlockError
from interlock.coordinator.assess import agents, pool, walking
from interlock.coordinator.assess.agents import Agent
from interlock.coordinator.assess.project import Project, dotted
from interlock.coordinator.assess.report import Assessed, report
from interlock.coordinator.assess.settings import Settings
from interlock.coordinator.assess.startup import Entry
from interlock.coordinator.planning import SourceRisk

READ_S = 20.0  # for all files of a source; a plan can be read without it


async def read_project(root: Path, settings: Settings) -> Project:
    """The files below a folder, as `interlock assess` reads them."""
    tree = walking.walk([root], settings.excluded)
    modules, _ = await pool.read_all(tree.root, tree.sources, limit=settings.max_bytes)
    return Project(modules)


async def source_risk(fleet: FleetConfig, agent: str, revision: str) -> SourceRisk | None:
    """None where the source is not on this machine, holds no agent that is found, or takes too long to read."""
    config = fleet.agents[agent].revisions[revision]
    settings = Settings()
    with trio.move_on_after(READ_S):
        try:
            source = source_of(fleet, config, where=f"{agent} {revision}")
            project = await read_project(source, settings)
        except InterlockError:
            return None
        return judged(project, agent, config, settings)
    return None


def judged(project: Project, name: str, config: RevisionConfig, settings: Settings) -> SourceRisk | None:
    """Of a project that is read: the class that is its entry, or the script in its command."""
    script = next((word for word in config.command if word.endswith((".py", ".pyw"))), "")
    entries = [("", Entry(name, script, "", "fleet"))] if script else []
    found = agents.find(project, entries, settings)
    mine = [each for each in found[0] if _is_entry(each, config.entry) if config.entry]
    whole = report(project, entries, settings, uncompiled={}, found=found)
    places = {(each.file, each.line) for each in mine}
    for each in whole.agents:
        if each.listed or (each.file, each.line) in places:
            return _told(each)
    return None


def _is_entry(agent: Agent, entry: str) -> bool:
    module, _, name = entry.partition(":")
    return agent.kind == "class" and agent.name == name and ".".join(dotted(agent.file)) == module


def _told(each: Assessed) -> SourceRisk:
    problem = each.problem
    return SourceRisk(
        score=each.score,
        level=each.level,
        weighed=each.weighed.total,
        factors=[
            f"{factor.meaning} ({factor.places[0].file}:{factor.places[0].line})" for factor in each.factors
        ],
        problem=f"{problem.file}:{problem.line}:{problem.column}: {problem.message}" if problem is not None else "",
    )  # fmt: skip
