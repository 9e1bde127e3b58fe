"""`interlock import`: a start-up list becomes a fleet file. Reads the list and the sources."""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import trio

from interlock.broker.config import parse_fleet
from interlock.broker.errors import ConfigError, Refused
from interlock.coordinator.assess import agents
from interlock.coordinator.assess.agents import Agent, script_file
from interlock.coordinator.assess.graph import port_of
from interlock.coordinator.assess.project import Project, dotted
from interlock.coordinator.assess.report import Assessed, report
from interlock.coordinator.assess.settings import Settings
from interlock.coordinator.assess.startup import Entry, StartUp, read_startup
from interlock.coordinator.importing import Imported, Script, fleet_file
from interlock.coordinator.rules.yamltree import load_yaml
from interlock.coordinator.source_risk import read_project
from interlock.coordinator.terminal import note, say_json

ABOVE = 3  # folders above the list, at most, in which its scripts are looked for
MAX_LIST = 4 << 20  # bytes
FOLLOWED = 2000  # files of the tree that one script imports
HTTP = frozenset(
    ("http", "flask", "bottle", "quart", "uvicorn", "aiohttp", "waitress", "hypercorn", "wsgiref", "tornado", "gevent",
     "xmlrpc", "BaseHTTPServer")
)  # fmt: skip  # libraries whose servers speak it
STREAMS = frozenset(("socket", "socketserver", "asyncio", "trio", "SocketServer", "anyio"))


def run(chosen: argparse.Namespace) -> int:
    """0. ConfigError for a list that is none, Refused where the file is there already."""
    if chosen.out is not None and chosen.out.exists() and not chosen.force:
        raise Refused("is there already", where=str(chosen.out), hint="name another, or overwrite it with --force")
    listed = read_list(chosen.list, variables(chosen.set))
    made = convert(listed, chosen)
    parse_fleet(tomllib.loads(made.text), path=str(chosen.out or "fleet.toml"))
    if chosen.out is not None:
        try:
            chosen.out.write_text(made.text, "utf-8")
        except OSError as error:
            raise ConfigError(f"can't be written: {error.strerror}", where=str(chosen.out)) from None
    if chosen.json:
        say_json({"agents": made.agents, "notes": made.notes, "file": str(chosen.out or ""), "text": made.text})
        return 0
    for each in made.notes:
        note(each)
    count = f"{len(made.agents)} agent{'' if len(made.agents) == 1 else 's'}"
    sys.stdout.write(made.text if chosen.out is None else f"{chosen.out}: {count} on host {chosen.host}\n")
    return 0


def variables(given: list[str]) -> dict[str, str]:
    """The environment, and what --set says of it."""
    found = dict(os.environ)
    for each in given:
        name, sign, value = each.partition("=")
        if not sign or not name:
            raise ConfigError(f"{each!r} is not NAME=VALUE", where="--set")
        found[name] = value
    return found


def read_list(path: Path, environment: dict[str, str]) -> StartUp:
    try:
        if path.stat().st_size > MAX_LIST:
            raise ConfigError(f"has more than {MAX_LIST} bytes", where=str(path), hint="is it a start-up list?")
        tree = load_yaml(path.read_text("utf-8"), file=str(path))
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't be read: {error}", where=str(path)) from None
    found = read_startup(tree, environment)
    if not found.entries:
        hint = "an entry is a mapping with script_path (or script, path), and a port; see docs/assessing.md"
        raise ConfigError("holds no entry of a start-up list", where=str(path), hint=hint)
    return found


def convert(listed: StartUp, chosen: argparse.Namespace) -> Imported:
    """The sources are read as `interlock assess` reads them, for level, ports and what each imports."""
    root = chosen.root.resolve() if chosen.root is not None else root_of(chosen.list.resolve().parent, listed.entries)
    settings = Settings()
    project = trio.run(read_project, root, settings)
    entries = [("", entry) for entry in listed.entries]
    found = agents.find(project, entries, settings)
    assessed = {each.listed: each for each in report(project, entries, settings, uncompiled={}, found=found).agents}
    by_place = {agent.entry.place: agent for agent in found[0] if agent.entry is not None}
    out = (chosen.out.resolve().parent if chosen.out is not None else Path.cwd()).resolve()
    scripts = {}
    for entry in listed.entries:
        path = script_file(project, "", entry.script)
        if path is not None:
            judged = assessed.get(entry.place)
            scripts[entry.place] = look(
                project, path, entry, agent=by_place.get(entry.place), judged=judged, root=os.path.relpath(root, out)
            )
    return fleet_file(
        listed.entries, scripts, listed.unknown, name=chosen.name, host=chosen.host, address=chosen.address,
        origin=chosen.list.name,
    )  # fmt: skip


def root_of(folder: Path, entries: list[Entry]) -> Path:
    """The nearest folder above the list, itself included, from which most of the scripts are found."""
    best, most = folder, 0
    for above in [folder, *folder.parents][: ABOVE + 1]:
        count = sum((above / entry.script).is_file() for entry in entries)
        if count > most:
            best, most = above, count
    return best


def look(
    project: Project, path: str, entry: Entry, *, agent: Agent | None, judged: Assessed | None, root: str
) -> Script:  # fmt: skip
    """What the source at `path` says of its entry. root: of all paths, from the folder of the fleet file."""
    here = str(PurePosixPath(path).parent)
    roots, folders = imported_from(project, path)
    source = os.path.commonpath([f"/{each}" for each in {here, *roots, *folders} if each != "."] or ["/"])[1:] or "."
    if "." in {here, *roots, *folders}:
        source = "."
    factors = ", ".join(factor.factor for factor in judged.factors) if judged is not None else ""
    ports = {entry.port, entry.health, 0}
    return Script(
        source=os.path.normpath(os.path.join(root, source)),
        script=os.path.relpath(path, source),
        python_paths=tuple(os.path.relpath(each, source) for each in sorted(roots - {here})),
        kind=spoken(agent, entry.port),
        health="http" if spoken(agent, entry.health) == "http" else "zmq",
        level=judged.level if judged is not None else "medium",
        risk=f"{judged.score}: {factors}" if judged is not None else "",
        gpu=bool(judged is not None and judged.gpu),
        other_ports=tuple(sorted({port_of(each.endpoint) for each in judged.binds} - ports)) if judged else (),
        problem=_problem(judged),
    )


def _problem(judged: Assessed | None) -> str:
    broken = judged.problem if judged is not None else None
    return f"{broken.file}:{broken.line}:{broken.column}: {broken.message}" if broken is not None else ""


def imported_from(project: Project, path: str) -> tuple[set[str], set[str]]:
    """Folders where the absolute imports of a script, and of what it imports, start; and the folders of these files."""
    roots: set[str] = set()
    todo, seen = [path], {path}
    while todo and len(seen) < FOLLOWED:
        here = todo.pop()
        module = project.modules[here]
        names = dict.fromkeys([*module.imports, *(ref for scope in module.scopes for ref in scope.refs)])
        for name in names:
            bare = name.removeprefix("&")
            target = project.find(bare, here)
            if target is None or bare[:1] == ":":
                continue
            if bare[:1] != ".":
                roots.add(_start(project, bare, here))
            if target.path not in seen:
                seen.add(target.path)
                todo.append(target.path)
    return roots, {str(PurePosixPath(each).parent) for each in seen}


def _start(project: Project, name: str, asker: str) -> str:
    """The folder in which the first part of an absolute name stands."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = project.module(tuple(parts[:count]), asker)
        if path is not None:
            return "/".join(dotted(path)[:-count]) or "."
    return str(PurePosixPath(asker).parent)


def spoken(agent: Agent | None, port: int) -> str:
    """zmq, http or stream: by what binds the port, else by what sockets there are."""
    kinds: list[str] = []
    sightings = agent.sightings if agent is not None else []
    lines: dict[tuple[str, int], Any] = {}
    for each in sightings:
        if each.found.sign == "sockets":
            lines.setdefault((each.file, each.found.line), []).append(each.found.what)
    for each in sightings:
        if each.found.sign == "bind" and port and port_of(each.found.detail) == port:
            kinds += [_kind(what) for what in (each.found.what, *lines.get((each.file, each.found.line), []))]
    kinds = kinds or [_kind(what) for whats in lines.values() for what in whats]
    return next((kind for kind in ("zmq", "http", "stream") if kind in kinds), "zmq")


def _kind(what: str) -> str:
    head = what.partition(".")[0]
    return "zmq" if head == "zmq" else "http" if head in HTTP else "stream" if head in STREAMS else ""
