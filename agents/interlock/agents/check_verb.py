"""`interlock check AGENT|FILE:CLASS`: is a class agent ready to be moved? It is started for real, and stopped."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from interlock.agents.instance import HandlerContract
from interlock.agents.preflight import environment, interpreter, placeholders
from interlock.agents.process import StartFailed, run_to_end
from interlock.agents.readiness import Remark, judge
from interlock.agents.revisions import Revision
from interlock.agents.serving import Spec
from interlock.agents.trial import Subject, trial
from interlock.broker.agent_checks import near
from interlock.broker.config import FleetConfig, RevisionConfig, load_fleet, source_of
from interlock.broker.errors import ConfigError, InterlockError, Refused

EXIT_WRONG, EXIT_REFUSED, EXIT_NOT_READY = 2, 12, 13
IMPORT_S = 60.0  # for the old revision to be imported: torch takes 5 to 20 s from a cold disk


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="interlock check", description="Start a class agent in a sandbox, and say what is not ready to be moved."
    )
    top.add_argument("subject", metavar="AGENT|FILE:CLASS", help="an agent of the fleet file, or a class in a file")
    top.add_argument("--revision", metavar="NAME", help="of the agent (default: the last in the file)")
    whose = "whose contract it must cover (default: the revision that it serves)"
    top.add_argument("--against", metavar="NAME|FILE:CLASS", help=whose)
    top.add_argument("--config", type=Path, metavar="FILE", help="of FILE:CLASS: its configuration, TOML or JSON")
    top.add_argument("--strict", action="store_true", help="warnings count as errors")
    top.add_argument("--fleet", default="fleet.toml", metavar="FILE", help="the fleet file (default: fleet.toml)")
    top.add_argument("--json", action="store_true", help="the result as one JSON object")
    top.add_argument("--timeout", help=argparse.SUPPRESS)  # an option of every verb; the limits here are the agent's
    top.add_argument("--insecure", action="store_true", help=argparse.SUPPRESS)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        chosen = parser().parse_args(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_WRONG
    try:
        subject, old = subjects(chosen)
        remarks = trio.run(check, subject, old)
    except InterlockError as error:
        print(f"interlock: {error}", file=sys.stderr, flush=True)
        refused = isinstance(error, Refused)
        if chosen.json:
            outcome = "refused" if refused else "error"
            _say({"outcome": outcome, "reason": error.what, "where": error.where, "hint": error.hint})
        return EXIT_REFUSED if refused else EXIT_WRONG
    wrong = [each for each in remarks if each.verdict == "error" or (chosen.strict and each.verdict == "warning")]
    if chosen.json:
        ready = "not-ready" if wrong else "ready"
        _say({"agent": subject.agent, "revision": subject.name, "outcome": ready, "remarks": remarks})
    else:
        for line in lines(subject, remarks, ready=not wrong):
            print(line, flush=True)
    return EXIT_NOT_READY if wrong else 0


def _say(tree: Any) -> None:
    print(msgspec.json.encode(tree).decode(), flush=True)


def lines(subject: Subject, remarks: Sequence[Remark], *, ready: bool) -> list[str]:
    told = []
    for each in remarks:
        where = f" ({each.where})" if each.where else ""
        told.append(f"{each.verdict:<8} {each.check:<14} {each.text}{where}")
    counts = {kind: sum(each.verdict == kind for each in remarks) for kind in ("error", "warning")}
    said = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items())
    verdict = "READY" if ready else "NOT READY"
    return [*told, f"{verdict}: {subject.agent} {subject.name}: {said}"]


async def check(subject: Subject, old: Subject | None) -> list[Remark]:
    seen = await trial(subject)
    return judge(seen, await contract(old) if old is not None else None, old.name if old is not None else "")


async def contract(old: Subject) -> dict[str, HandlerContract]:
    """What a revision handles: it is imported in its own environment, not started. ConfigError if it is no agent."""
    where = f"{old.agent} {old.name}"
    revision = Revision(old.agent, old.name, "", old.source, old.config)
    env = environment(old.config.env, placeholders(revision, base=old.base))
    spec = Spec(agent=old.agent, entry=old.config.entry, source=str(old.source), revision=old.name)
    with tempfile.TemporaryDirectory(prefix="il-check-") as scratch:
        path = Path(scratch) / "spec.json"
        await trio.Path(path).write_bytes(msgspec.json.encode(spec))
        python = interpreter(old.config.python, old.base)
        command = [python, "-P", "-m", "interlock.agents.run", "--check", "--spec", str(path)]
        try:
            ended = await run_to_end(command, cwd=old.source, env=env, timeout_s=IMPORT_S)
        except StartFailed as error:
            raise ConfigError(str(error), where=where) from None
    for line in reversed(ended.output.splitlines()):
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and said.get("ok") is True:
            return msgspec.convert(said["handlers"], dict[str, HandlerContract])
        if isinstance(said, dict) and "error" in said:
            raise ConfigError(str(said["error"]), where=f"{said.get('file') or where}:{said.get('line') or 0}")
    raise ConfigError(f"could not be imported: {ended.output.strip()[-200:]}", where=where)


# --- what is named


def subjects(chosen: argparse.Namespace) -> tuple[Subject, Subject | None]:
    """What is tried, and what it is compared with, if anything is."""
    if ":" in chosen.subject:
        subject = of_class(chosen.subject, chosen.config)
        return subject, of_class(chosen.against, None) if chosen.against else None
    if chosen.config is not None:
        raise ConfigError("an agent has its configuration in the fleet file", where="--config", hint="leave it out")
    fleet = load_fleet(chosen.fleet)
    agent = fleet.agents.get(chosen.subject)
    if agent is None:
        hint = near(chosen.subject, dict(fleet.agents))
        raise Refused(f"there is no agent {chosen.subject!r}", where=str(chosen.fleet), hint=hint)
    subject = of_revision(fleet, chosen.subject, chosen.revision or next(reversed(agent.revisions)))
    if chosen.against and ":" in chosen.against:
        return subject, of_class(chosen.against, None)
    against = chosen.against or (agent.serve if agent.serve != subject.name else "")
    if not against or agent.revisions.get(against, subject.config).kind != "class":
        return subject, None
    return subject, of_revision(fleet, chosen.subject, against)


def of_class(text: str, config: Path | None) -> Subject:
    name, _, entry = text.rpartition(":")
    file = Path(name)
    if not file.is_file() or file.suffix != ".py" or not entry.isidentifier():
        raise ConfigError(f"{text!r} is not FILE.py:CLASS", hint="name a file that there is, and a class in it")
    given = _config(config) if config is not None else {}
    revision = RevisionConfig(source=str(file.parent), entry=f"{file.stem}:{entry}", config=given)
    return Subject(entry, file.name, revision, file.resolve().parent, Path.cwd())


def of_revision(fleet: FleetConfig, agent: str, name: str) -> Subject:
    revisions = fleet.agents[agent].revisions
    if name not in revisions:
        raise Refused(f"agent {agent} has no revision {name!r}", where=fleet.path, hint=near(name, dict(revisions)))
    config = revisions[name]
    if config.kind != "class":
        raise Refused(
            f"{agent} {name} is a program: it has no base class to go through", where=fleet.path,
            hint=f"interlock drill {agent} starts it for real, and measures its way back",
        )  # fmt: skip
    where = f"{fleet.path}: agents.{agent}.revisions.{name}"
    return Subject(agent, name, config, source_of(fleet, config, where=where), fleet.folder)


def _config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"can't be read: {error}", where=str(path)) from None
    if not isinstance(tree, dict):
        raise ConfigError("is not a table", where=str(path))
    return tree


if __name__ == "__main__":
    sys.exit(main())
