"""A start-up list as a fleet file of exec agents. Pure: entries, and what their sources say, go in; text comes out.

Each agent keeps its port: the host listens there, and runs instances on ports of their own (`agents/fixed_ports.py`).
What of the list is not understood stands in the file as a comment beside its agent, and is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interlock.broker.strategies import Level
from interlock.broker.topics import MAX_NAME
from interlock.coordinator.assess.startup import Entry

CONTROL = 7180  # of the host; the next free port above is taken if an agent has it
BUS = {"events": 7171, "feed": 7172, "telemetry_in": 7173, "telemetry_out": 7174}
RUNNER = "interlock.agents.fixed_ports"
START_S = 60.0  # until a script is healthy: one that loads a model takes longer than the usual 30 s
MAX_COMMENT = 110  # characters of a line that was not understood

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PLACEHOLDER = re.compile(r"\{\w+\}")
_UNFIT = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Script:
    """What the source of an entry says. `source` is relative to the fleet file, other paths to `source`."""

    source: str
    script: str
    python_paths: tuple[str, ...] = ()  # within the folder, where imports start beside the script's own folder
    kind: str = "zmq"  # what it speaks at its port: zmq, http or stream
    health: str = "zmq"  # and at its health port: zmq, http or tcp
    level: Level = "medium"
    risk: str = ""  # score and factors, in words
    gpu: bool = False
    other_ports: tuple[int, ...] = ()  # that it binds too, and that no two instances can share
    problem: str = ""  # why it can't be migrated


@dataclass
class Imported:
    """The text of the fleet file, the names of its agents, and what an operator is to know."""

    text: str
    agents: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def fleet_file(
    entries: Sequence[Entry], scripts: Mapping[str, Script], unknown: Mapping[str, Any], *,
    name: str, host: str, address: str, origin: str,
) -> Imported:  # fmt: skip
    """scripts: by the place of their entry; an entry without one is named and left out."""
    taken = {port for entry in entries for port in (entry.port, entry.health) if port}
    made = Imported("")
    known, dropped = _known(entries, scripts)
    names = _names(known, made.notes)
    lines = [f"# Made by interlock import of {_line(origin)}.", f"name = {_text(name)}", "", "[broker]"]
    lines += [f'{key} = "tcp://127.0.0.1:{_free(port, taken)}"' for key, port in BUS.items()]
    lines += ["", f"[hosts.{_key(host)}]", f'control = "tcp://127.0.0.1:{_free(CONTROL, taken)}"']
    for place, value in unknown.items():
        made.notes.append(f"{place} is not understood; it stays as a comment")
        lines += ["", *_comment(place, value)]
    for entry, why in dropped:
        made.notes.append(f"{entry.name} is left out: {why}")
        lines += ["", f"# left out, {_line(why)}: {_line(entry.name)}"]
    for entry in known:
        lines += ["", *_agent(entry, scripts[entry.place], names, made, host=host, address=address)]
    made.text = "\n".join(lines) + "\n"
    made.agents = list(names.values())
    made.notes = list(dict.fromkeys(made.notes))
    return made


def _known(entries: Sequence[Entry], scripts: Mapping[str, Script]) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """Entries that become agents, and those that can't, with the reason."""
    known: list[Entry] = []
    dropped: list[tuple[Entry, str]] = []
    ports: dict[int, str] = {}
    for entry in entries:
        if entry.place not in scripts:
            dropped.append((entry, f"there is no script {entry.script}"))
        elif entry.port and entry.port in ports:
            dropped.append((entry, f"port {entry.port} is {ports[entry.port]}'s already"))
        else:
            ports[entry.port] = entry.name
            known.append(entry)
    return known, dropped


def _agent(
    entry: Entry, script: Script, names: Mapping[str, str], made: Imported, *,
    host: str, address: str,
) -> list[str]:  # fmt: skip
    name = names[entry.place]
    lines = [f"[agents.{_key(name)}]"]
    if script.risk:
        lines.append(f"# risk {_line(script.risk)}")
    if script.problem:
        made.notes.append(f"{name} can't be migrated before it is mended: {script.problem}")
        lines.append(f"# can't be migrated before it is mended: {_line(script.problem)}")
    for note in dict.fromkeys(entry.notes):
        made.notes.append(f"{name}: {note}")
        lines.append(f"# {_line(note)}")
    lines.append(f"host = {_text(host)}")
    if entry.port:
        lines.append(f'endpoint = "{_scheme(script)}://{address}:{entry.port}"')
    lines += ['serve = "v1"', f"level = {_text(script.level)}"]
    if script.gpu:
        lines.append('category = "gpu-model"')
    lines += _needs(entry, names, name, made)
    if entry.required is not None:
        lines.append(f"# required: {str(entry.required).lower()}")
    for port in script.other_ports:
        made.notes.append(f"{name} binds port {port} too, which the list does not have: two instances can't share it")
        lines.append(f"# binds port {port} too, which two instances can't share")
    for key, value in entry.unknown.items():
        made.notes.append(f"{name}: {key} is not understood; it stays as a comment")
        lines += _comment(key, value)
    return [*lines, "", f"[agents.{_key(name)}.revisions.v1]", *_revision(entry, script, name, made)]


def _needs(entry: Entry, names: Mapping[str, str], name: str, made: Imported) -> list[str]:
    by_name = {listed.casefold(): listed for listed in names.values()}
    needs, lines = [], []
    for said in entry.depends:
        found = by_name.get(_fit(said).casefold())
        if found is not None and found != name:
            needs.append(found)
            continue
        made.notes.append(f"{name}: it needs {said}, which is no agent of the list; it stays as a comment")
        lines.append(f"# needs {_line(said)}, which is no agent here")
    return [f"depends = [{', '.join(map(_text, dict.fromkeys(needs)))}]", *lines] if needs else lines


def _revision(entry: Entry, script: Script, name: str, made: Imported) -> list[str]:
    lines = []
    for text in (*entry.arguments, *(value for _, value in entry.environment)):
        if not _is_literal(text):
            made.notes.append(f"{name}: {text!r} has braces, which stand for something else in a fleet file: left out")
            lines.append(f"# left out, braces stand for something else here: {_line(text)}")
    pairs = [f"{entry.port}={{port}}"] if entry.port else []
    if entry.health and entry.health != entry.port:
        pairs.append(f"{entry.health}={{health_port}}")
    runner = ["-P", "-m", RUNNER, *pairs] if pairs else []
    command = ["{python}", *runner, script.script, *filter(_is_literal, entry.arguments)]
    lines += [f"source = {_text(script.source)}", f"command = [{', '.join(map(_text, command))}]"]
    variables = {key: value for key, value in entry.environment if _is_literal(value)}
    if script.python_paths:
        there = ["{source}" + ("" if path == "." else f"/{path}") for path in script.python_paths]
        variables["PYTHONPATH"] = ":".join([*there, *filter(None, [variables.get("PYTHONPATH", "")])])
    if variables:
        lines.append(f"env = {{ {', '.join(f'{_key(key)} = {_text(value)}' for key, value in variables.items())} }}")
    return [*lines, f"probe = {_probe(entry, script)}", f"start_timeout_s = {START_S:g}"]


def _probe(entry: Entry, script: Script) -> str:
    if not entry.port and not entry.health:
        return '{ kind = "script", command = ["test", "-d", "/proc/self"] }  # no port: only that its process lives'
    separate = entry.health and entry.health != entry.port
    kind = script.health if separate else {"zmq": "zmq", "http": "http"}.get(script.kind, "tcp")
    port = "health" if separate else "request"
    expect = ', expect = { status = "ok" }' if kind == "zmq" else ""
    return f'{{ kind = "{kind}", port = "{port}"{expect} }}'


def _scheme(script: Script) -> str:
    return {"http": "http", "stream": "stream"}.get(script.kind, "tcp")


def _names(entries: Sequence[Entry], notes: list[str]) -> dict[str, str]:
    """By the place of the entry: a name that may stand in a fleet file, and stands there once."""
    names: dict[str, str] = {}
    for entry in entries:
        name = base = _fit(entry.name)
        number = 1
        while name.casefold() in {each.casefold() for each in names.values()}:
            number += 1
            name = f"{base[: MAX_NAME - 6]}-{number}"
        names[entry.place] = name
        if name != entry.name:
            notes.append(f"{entry.name} is called {name} here")
    return names


def _fit(name: str) -> str:
    return _UNFIT.sub("-", name).strip("-_")[:MAX_NAME] or "agent"


def _free(port: int, taken: set[int]) -> int:
    while port in taken:
        port += 1
    taken.add(port)
    return port


def _is_literal(text: str) -> bool:
    """In commands and environments a word in braces is a placeholder, and can't stand for itself."""
    return _PLACEHOLDER.search(text) is None


def _text(text: str) -> str:
    """A text of TOML: JSON's escapes are TOML's, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _line(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _comment(key: str, value: Any) -> list[str]:
    try:
        said = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # an alias of itself
        said = "..."
    whole = f"{key}: {said}"
    if len(whole) > MAX_COMMENT * 40:
        whole = whole[: MAX_COMMENT * 40] + " ..."
    return [f"# not understood: {_line(whole[at : at + MAX_COMMENT])}" for at in range(0, len(whole), MAX_COMMENT)]
