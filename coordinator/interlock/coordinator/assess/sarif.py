"""A report as SARIF 2.1.0, which editors and code hosts show beside the source. Pure."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from interlock.coordinator.assess.report import Assessed, Broken, Report
from interlock.coordinator.assess.scoring import FACTORS, Factor, Place

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
MAX_PLACES = 50  # of one factor of one agent: each is a mark in somebody's editor
LEVELS = {"low": "note", "medium": "note", "high": "warning", "critical": "warning"}
RULES = {
    **FACTORS,
    "does-not-parse": "Python can't read it, so it can't be migrated",
    "port-clash": "two agents bind the same port",
    "cycle": "agents that need each other in a circle can't be moved in the order of their dependencies",
}


def sarif(report: Report, root: str) -> dict[str, Any]:
    """root: the URI of the folder that paths are relative to."""
    results = [_broken(broken) for broken in report.broken]
    for agent in report.agents:
        for factor in agent.factors:
            results += [_shown(agent, factor, place) for place in factor.places[:MAX_PLACES]]
    by_name = {agent.name: agent for agent in report.agents}
    for clash in report.graph.clashes:
        what = f"port {clash.port} is bound by {', '.join(clash.agents)}"
        results += [_result("port-clash", "error", what, by_name[name].file, 1) for name in clash.agents]
    for cycle in report.graph.cycles:
        what = f"{', '.join(cycle)} need each other in a circle"
        results += [_result("cycle", "warning", what, by_name[name].file, 1) for name in cycle]
    rules = [{"id": name, "shortDescription": {"text": f"{text[0].upper()}{text[1:]}"}} for name, text in RULES.items()]
    driver = {"name": "interlock assess", "version": version("interlock"), "rules": rules}
    run = {
        "tool": {"driver": driver},
        "originalUriBaseIds": {"ROOT": {"uri": root.rstrip("/") + "/"}},
        "columnKind": "unicodeCodePoints",
        "results": results,
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _broken(broken: Broken) -> dict[str, Any]:
    return _result("does-not-parse", "error", broken.message, broken.file, broken.line, column=broken.column)


def _shown(agent: Assessed, factor: Factor, place: Place) -> dict[str, Any]:
    guess = "; estimated, the source does not parse" if agent.estimated else ""
    what = (
        f"{agent.name} {factor.meaning} ({factor.points} of its {agent.score} points, level {agent.level}): "
        f"{place.what}{guess}"
    )
    return _result(factor.factor, LEVELS[agent.level], what, place.file, place.line, code=place.code)


def _result(
    rule: str, level: str, text: str, file: str, line: int, *, column: int = 0, code: str = ""
) -> dict[str, Any]:
    region: dict[str, Any] = {"startLine": max(line, 1)}
    if column > 0:
        region["startColumn"] = column
    if code:
        region["snippet"] = {"text": code}
    place = {"artifactLocation": {"uri": _uri(file), "uriBaseId": "ROOT"}, "region": region}
    return {
        "ruleId": rule,
        "ruleIndex": list(RULES).index(rule),
        "level": level,
        "message": {"text": text},
        "locations": [{"physicalLocation": place}],
    }


def _uri(path: str) -> str:
    return quote(path)
