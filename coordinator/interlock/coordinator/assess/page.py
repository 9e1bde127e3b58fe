"""A report as one HTML page that needs nothing else: no script, no other file. Pure.

Names and code come from outside: everything is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from interlock.coordinator.assess.report import Assessed, Report
from interlock.coordinator.assess.scoring import WEIGHTS, Place
from interlock.coordinator.report_page import STYLE

MAX_PLACES = 40  # of one factor on the page
COLOURS = {"low": "good", "medium": "dim", "high": "warn", "critical": "bad"}
MORE_STYLE = "details{border-top:1px solid #eceff2;padding:.4rem 0}summary{cursor:pointer;font-weight:600}"


def page(report: Report, root: str) -> str:
    """The whole page."""
    title = f"Agents of {root}"
    parts = [_head(report, title), _table_of(report), _graph(report), _broken(report), *map(_agent, report.agents)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{MORE_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _head(report: Report, title: str) -> str:
    levels = ", ".join(f"{count} {level}" for level, count in report.levels.items() if count)
    rows = [
        ("agents", f"{len(report.agents)}: {levels}" if report.agents else "none"),
        ("base class", f"{report.derive} of {len(report.agents)} derive from one"),
        ("base classes", ", ".join(report.base_classes) or "none in this tree"),
        ("total risk", f"{report.total_risk} points"),
        ("read", f"{report.files} files, {report.bytes} bytes; {len(report.broken)} do not parse"),
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f"<h1>{escape(title)}</h1>{_table((), rows)}" + (f"<ul>{notes}</ul>" if notes else "")


def _table_of(report: Report) -> str:
    rows = []
    for agent in sorted(report.agents, key=lambda agent: (agent.migratable, -agent.score, agent.name)):
        level = agent.level if agent.migratable else "can't be migrated"
        rows.append(
            (
                agent.name,
                f"{agent.file}:{agent.line}",
                f"{agent.score}{' (estimated)' if agent.estimated else ''}",
                level,
                agent.strategy if agent.migratable else "",
                f"{agent.weighed.total:g}",
                ", ".join(factor.factor for factor in agent.factors),
            )
        )
    head = ("agent", "where", "score", "level", "strategy", "weighed", "factors")
    return _section("Agents", _table(head, rows)) if rows else ""


def _graph(report: Report) -> str:
    graph = report.graph
    parts = []
    if graph.clashes:
        parts.append(_table(("port", "bound by"), [(str(each.port), ", ".join(each.agents)) for each in graph.clashes]))
    parts += [f'<p class="bad">need each other in a circle: {escape(", ".join(each))}</p>' for each in graph.cycles]
    needs: dict[str, list[str]] = {}
    for one, other in graph.edges:
        needs.setdefault(one, []).append(other)
    if needs:
        parts.append(_table(("agent", "needs"), [(name, ", ".join(others)) for name, others in needs.items()]))
    if report.duplicates:
        rows = [(each.why, ", ".join(each.agents)) for each in report.duplicates]
        parts.append(_table(("twice", "agents"), rows))
    return _section("Ports, dependencies, duplicates", "".join(parts)) if parts else ""


def _broken(report: Report) -> str:
    rows = [(f"{each.file}:{each.line}:{each.column}", each.message) for each in report.broken]
    return _section("Files that do not parse", _table(("where", "why"), rows)) if rows else ""


def _agent(agent: Assessed) -> str:
    level = agent.level if agent.migratable else "can't be migrated"
    colour = COLOURS[agent.level] if agent.migratable else "bad"
    guess = ", estimated" if agent.estimated else ""
    parts = []
    if agent.problem is not None:
        where = f"{agent.problem.file}:{agent.problem.line}:{agent.problem.column}"
        parts.append(f'<p class="bad">can\'t be migrated: {escape(where)}: {escape(agent.problem.message)}</p>')
    for factor in agent.factors:
        parts.append(f"<p>{escape(factor.meaning)}: {factor.points} points</p>{_places(factor.places)}")
    weighed = [(name, f"{WEIGHTS[name]:g}", said, str(agent.weighed.values[name]))
               for name, said in agent.weighed.found.items()]  # fmt: skip
    parts.append(_table(("weight", "of", "found", "value"), weighed))
    rows = [
        ("derives from", " through ".join([agent.base, *agent.through]) if agent.base else "no base class"),
        ("start-up list", agent.listed),
        ("binds", ", ".join(each.endpoint for each in agent.binds)),
        ("connects to", ", ".join(each.endpoint for each in agent.connects)),
        ("needs", ", ".join(agent.depends)),
        ("is needed by", ", ".join(agent.needed_by)),
        ("databases", ", ".join(agent.databases)),
        ("configuration files", ", ".join(agent.config_files)),
        ("size", f"{agent.code_lines} lines of code, {agent.bytes} bytes{', generated' if agent.generated else ''}"),
    ]
    parts.append(_table((), [(what, said) for what, said in rows if said]))
    for what, places in (
        ("GPU", agent.gpu), ("threading", agent.threading), ("imports that can't be told", agent.unknown_imports)
    ):  # fmt: skip
        if places:
            parts.append(f"<p>{what}</p>{_places(places)}")
    head = f'{escape(agent.name)}: {agent.score}{guess}, <span class="{colour}">{escape(level)}</span>'
    return f"<details><summary>{head}</summary>{''.join(parts)}</details>"


def _places(places: Sequence[Place]) -> str:
    rows = [(f"{place.file}:{place.line}", place.what, place.code) for place in places[:MAX_PLACES]]
    if len(places) > MAX_PLACES:
        rows.append(("", f"and {len(places) - MAX_PLACES} more", ""))
    return _table((), rows)


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "<tr>" + "".join(f"<th>{escape(each)}</th>" for each in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>'
