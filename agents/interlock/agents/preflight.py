"""What is checked of a revision before anything of it is started, and what its processes are started with.

A finding is a check that was made, whether it passed, and why not: in the words of whoever can mend it, with file and
line where there are any. A check that could not be made has not passed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from interlock.agents.findings import Finding, mib
from interlock.agents.measured import memory_available
from interlock.agents.process import Ended, StartFailed, run_to_end
from interlock.agents.revisions import Revision
from interlock.agents.serving import Spec
from interlock.broker.bounds import PLACEHOLDERS
from interlock.broker.errors import ConfigError

PARSE_TIMEOUT_S = 60.0  # for all files of a source of the largest size
PYTHON_TIMEOUT_S = 10.0  # for an interpreter to say its version; a cold disk takes seconds
IMPORT_TIMEOUT_S = 60.0  # for an entry to import: torch takes 5 to 20 s from a cold disk
MIN_DISK_BYTES = 1 << 30  # free where the state is: logs and journals of the migration, and the backup
MIN_MEMORY_BYTES = 512 << 20  # available where nobody has judged what the two processes take
MAX_REPORTED = 5  # files that do not parse, named in a finding
CHECK_MODULE = "interlock.agents.run"
DISTRIBUTION = "interlock-agent"  # what an agent's own environment needs
INHERITED_DROPPED = re.compile(r"INTERLOCK_(?!LOG$).*|PYTHONPATH|PYTHONHOME|VIRTUAL_ENV|__PYVENV_LAUNCHER__")

_PARSE = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
found = []
for folder, folders, files in os.walk(sys.argv[1]):
    folders.sort()
    for name in sorted(files):
        if not name.endswith(".py"):
            continue
        path = os.path.join(folder, name)
        try:
            with open(path, "rb") as file:
                compile(file.read(), path, "exec", dont_inherit=True)
        except SyntaxError as error:
            found.append([os.path.relpath(path, sys.argv[1]), error.lineno or 0, str(error.msg)])
        except Exception as error:
            found.append([os.path.relpath(path, sys.argv[1]), 0, "%s: %s" % (type(error).__name__, error)])
print(json.dumps({"parsed": found}))
"""
_VERSION = 'import json, sys; print(json.dumps({"python": sys.version.split()[0], "at": sys.executable}))'


# --- what a process is started with


def interpreter(python: str, base: Path) -> str:
    """The interpreter that `python` of a revision names: a path (relative to `base`), a program, or the host's own.

    Not resolved: the interpreter of a virtual environment is a link that says which one it is.
    """
    if not python:
        return sys.executable
    if "/" in python:
        return os.path.normpath(base / Path(python).expanduser())
    return shutil.which(python) or python


def placeholders(
    revision: Revision, *, base: Path, port: int | None = None, health_port: int | None = None
) -> dict[str, str]:
    """What may be filled in. A port that is not known is not among them."""
    values = {
        "python": interpreter(revision.config.python, base),
        "source": str(revision.folder),
        "revision": revision.name,
        "agent": revision.agent,
    }
    ports = {"port": port, "health_port": health_port}
    return values | {name: str(number) for name, number in ports.items() if number is not None}


def fill(text: str, values: Mapping[str, str], *, where: str = "") -> str:
    """`text` with each {name} replaced; ConfigError for a name nobody knows. Other braces stay as they are."""

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name in values:
            return values[name]
        known = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
        if name in PLACEHOLDERS:
            raise ConfigError(f"there is no {{{name}}} here", where=where, hint="it is not known at this point")
        raise ConfigError(f"unknown placeholder {{{name}}}", where=where, hint=f"use one of {known}")

    return re.sub(r"\{([A-Za-z_][A-Za-z0-9_]*)\}", replace, text)


def fill_command(command: Sequence[str], values: Mapping[str, str], *, where: str = "") -> list[str]:
    return [fill(word, values, where=where) for word in command]


def environment(
    config_env: Mapping[str, str],
    values: Mapping[str, str],
    *,
    where: str = "",
    inherited: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of an instance: the host's without what is about the host's own Python, and the revision's.

    No bytecode is written, since the revision's folder must stay as it was recorded. No PYTHONPATH is set: a class
    agent's interpreter has interlock-agent installed.
    """
    result = {
        name: value
        for name, value in (os.environ if inherited is None else inherited).items()
        if not INHERITED_DROPPED.fullmatch(name)
    }
    result |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return result | {name: fill(value, values, where=f"{where} env.{name}") for name, value in config_env.items()}


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that are free now, all different. Somebody else may take one before it is used."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


# --- the checks


class _Bench(msgspec.Struct, frozen=True):
    """Where the checks of one revision run."""

    revision: Revision
    base: Path
    python: str
    env: dict[str, str]
    host: str

    @property
    def where(self) -> str:
        return f"{self.revision.agent} {self.revision.name}"

    async def ask(self, *argv: str, key: str, timeout_s: float) -> tuple[dict[str, Any] | None, Ended]:
        """Run Python code that prints a JSON object with `key`; what it printed around it does not matter."""
        ended = await run_to_end(
            [self.python, *argv], cwd=self.revision.folder, env=self.env, timeout_s=timeout_s, host=self.host
        )
        for line in reversed(ended.output.splitlines()):
            if line.startswith("{"):
                try:
                    answer = json.loads(line)
                except ValueError:
                    continue
                if key in answer:
                    return answer, ended
        return None, ended


async def preflight(
    revision: Revision,
    *,
    base: Path,
    state_dir: Path,
    host: str = "",
    room: Sequence[Finding] | None = None,
    disk_bytes: int = 0,
) -> list[Finding]:
    """All checks of a recorded revision, cheapest first; the later ones are left out where they rest on a failed one.

    `base`: the folder of the fleet file. `host`: the host's marker, so that nothing of a check survives the host.
    `room`: what was found of memory for old and new together. `disk_bytes`: what the backup will write.
    """
    config = revision.config
    findings = [_disk(state_dir, disk_bytes), *([_memory()] if room is None else room)]
    if config.kind == "exec":
        findings.append(_ports())
    try:
        values = placeholders(revision, base=base, port=1, health_port=1)
        env = environment(config.env, values, where=f"{revision.agent} {revision.name}")
    except ConfigError as error:
        return [*findings, Finding("environment", False, str(error))]
    bench = _Bench(revision, base, interpreter(config.python, base), env, host)
    findings.append(await _python(bench))
    if findings[-1].ok:
        findings.append(await _parse(bench))
    if config.kind == "exec":
        findings.append(_command(bench))
    elif all(finding.ok for finding in findings):
        findings.append(await _entry(bench))
    return findings


def _disk(state_dir: Path, wanted: int) -> Finding:
    try:
        free = shutil.disk_usage(state_dir).free
    except OSError as error:
        return Finding("disk", False, f"{state_dir} can't be looked at: {error.strerror}")
    needed = MIN_DISK_BYTES + wanted
    seen = {"free_bytes": free, "needed_bytes": needed}
    if free < needed:
        return Finding("disk", False, f"{mib(free)} free at {state_dir}, {mib(needed)} needed", seen)
    return Finding("disk", True, f"{mib(free)} free", seen)


def _memory() -> Finding:
    available = memory_available()
    if available is None:
        return Finding("memory", False, "the memory available is not known")
    seen = {"available_bytes": available}
    if available < MIN_MEMORY_BYTES:
        return Finding("memory", False, f"{mib(available)} available, {mib(MIN_MEMORY_BYTES)} needed", seen)
    return Finding("memory", True, f"{mib(available)} available", seen)


def _ports() -> Finding:
    """Whether a program can be given ports of its own beside the old one's."""
    try:
        free_ports(2)
    except OSError as error:
        return Finding("ports", False, f"no port of 127.0.0.1 can be had: {error.strerror}")
    return Finding("ports", True, "two ports can be had")


def _silence(ended: Ended, timeout_s: float) -> str:
    """Why there was no answer."""
    if ended.returncode is None:
        return f"no answer within {timeout_s:g} s"
    last = ended.output.strip().splitlines()[-1:] or ["it printed nothing"]
    return f"ended with code {ended.returncode}: {last[0]}"


async def _python(bench: _Bench) -> Finding:
    try:
        answer, ended = await bench.ask("-I", "-c", _VERSION, key="python", timeout_s=PYTHON_TIMEOUT_S)
    except StartFailed as error:
        return Finding("interpreter", False, str(error))
    if answer is None:
        return Finding("interpreter", False, f"{bench.python}: {_silence(ended, PYTHON_TIMEOUT_S)}")
    return Finding("interpreter", True, f"Python {answer['python']} at {bench.python}", answer)


async def _parse(bench: _Bench) -> Finding:
    source = str(bench.revision.folder)
    try:
        answer, ended = await bench.ask("-I", "-c", _PARSE, source, key="parsed", timeout_s=PARSE_TIMEOUT_S)
    except StartFailed as error:
        return Finding("parse", False, str(error))
    if answer is None:
        return Finding("parse", False, f"the source could not be read: {_silence(ended, PARSE_TIMEOUT_S)}")
    bad = [f"{file}:{line}: {message}" for file, line, message in answer["parsed"]]
    if bad:
        more = f"; and {len(bad) - MAX_REPORTED} more" if len(bad) > MAX_REPORTED else ""
        return Finding("parse", False, "; ".join(bad[:MAX_REPORTED]) + more, {"files": bad})
    return Finding("parse", True, "every Python file parses")


def _command(bench: _Bench) -> Finding:
    """Whether the program of a command, its placeholders filled in, is there and may be run."""
    revision = bench.revision
    values = placeholders(revision, base=bench.base, port=1, health_port=1)
    try:
        program = fill_command(revision.config.command, values, where=f"{bench.where} command")[0]
        probe = revision.config.probe
        fill_command(probe.command if probe else [], values, where=f"{bench.where} probe.command")
    except ConfigError as error:
        return Finding("command", False, str(error))
    if "/" in program:
        path = revision.folder / program  # an absolute one stays as it is
        found = str(path) if path.is_file() and os.access(path, os.X_OK) else None
        reason = f"{program} is not executable" if path.is_file() else f"there is no {program}"
        reason += "" if os.path.isabs(program) else f" in the source of {bench.where}"
    else:
        found = shutil.which(program, path=bench.env.get("PATH", os.defpath))
        reason = f"there is no program {program!r} on the PATH"
    return Finding("command", True, found) if found else Finding("command", False, reason)


async def _entry(bench: _Bench) -> Finding:
    """Whether the class imports in its own environment and is an agent; the evidence has its handlers."""
    revision, config = bench.revision, bench.revision.config
    spec = Spec(
        agent=revision.agent,
        entry=config.entry,
        source=str(revision.folder),
        revision=revision.name,
        config=config.config,
        stop_timeout_s=config.stop_timeout_s,
    )
    with tempfile.TemporaryDirectory(prefix="interlock-spec-") as scratch:
        path = Path(scratch) / "spec.json"
        await trio.Path(path).write_bytes(msgspec.json.encode(spec))
        argv = ("-m", CHECK_MODULE, "--check", "--spec", str(path))
        try:
            answer, ended = await bench.ask(*argv, key="ok", timeout_s=IMPORT_TIMEOUT_S)
        except StartFailed as error:
            return Finding("import", False, str(error))
    if answer is None:
        if re.search(r"No module named '?interlock|while finding module specification for 'interlock", ended.output):
            return Finding("import", False, f"{bench.python} has no {CHECK_MODULE}: install {DISTRIBUTION} there")
        return Finding("import", False, f"{config.entry}: {_silence(ended, IMPORT_TIMEOUT_S)}")
    if answer["ok"] is True and ended.returncode == 0:
        return Finding("import", True, f"{config.entry} imports", {"handlers": answer.get("handlers", {})})
    file = str(answer.get("file") or "").removeprefix(f"{revision.folder}/")
    place = f"{file}:{answer.get('line') or 0}: " if file else ""
    return Finding("import", False, f"{place}{answer.get('error') or _silence(ended, IMPORT_TIMEOUT_S)}", answer)
