"""`interlock backup list|verify|restore`: the backups of this machine's hosts, without the broker and without keys.

It works on the state folder. What a restore replaces may be in use, so it holds the lock of the host meanwhile: a host
that runs must be stopped first, and can't start before the restore is done.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from interlock.agents.backup import About, Manifest, list_backups, restore_backup, verify_backup
from interlock.agents.journal import Journal
from interlock.agents.levels import (
    LEVELS,
    Lost,
    levels_of,
    newest_verified,
    restore_code,
    restore_journal,
    restore_state,
    saved_row,
)
from interlock.agents.revisions import RevisionStore
from interlock.agents.slot_io import Row
from interlock.agents.trees import Damaged
from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.errors import ConfigError, InterlockError, InUse, Refused
from interlock.broker.role import held

EXIT_WRONG, EXIT_REFUSED, EXIT_DAMAGED = 2, 12, 13


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="interlock backup", description="The backups of this machine's hosts: list them, read them back, use them."
    )
    acts = top.add_subparsers(dest="act", metavar="ACTION", required=True)
    for name, help in {
        "list": "what there is, newest first",
        "verify": "read all of it back, and compare with what was written",
        "restore": "put levels of a backup back in place; the host must be stopped",
    }.items():
        act = acts.add_parser(name, help=help, description=help)
        act.add_argument("agent", metavar="AGENT", nargs=None if name == "restore" else "?")
        act.add_argument("--from", dest="name", default="", metavar="TIME", help="only the backup of this name")
        act.add_argument("--host", default="", metavar="HOST", help="only of this host")
        act.add_argument("--fleet", default="fleet.toml", metavar="FILE", help="the fleet file (default: fleet.toml)")
        act.add_argument("--json", action="store_true", help="the result as one JSON object")
        act.add_argument("--timeout", help=argparse.SUPPRESS)  # an option of every verb; nothing is waited for here
        act.add_argument("--insecure", action="store_true", help=argparse.SUPPRESS)
        if name == "restore":
            act.add_argument(
                "--level", action="append", choices=LEVELS, default=[], help="what to put back (default: code)"
            )
            act.add_argument("--into", type=Path, metavar="FOLDER", help="all of it, into a new folder instead")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        chosen = parser().parse_args(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_WRONG
    try:
        fleet = load_fleet(chosen.fleet)
        tree, lines, code = {"list": _list, "verify": _verify, "restore": _restore}[chosen.act](fleet, chosen)
    except InterlockError as error:
        refused = isinstance(error, InUse | Refused)
        print(f"interlock: {error}", file=sys.stderr, flush=True)
        outcome = {"outcome": "refused" if refused else "error", "reason": error.what, "where": error.where}
        tree, lines, code = outcome | {"hint": error.hint}, [], EXIT_REFUSED if refused else EXIT_WRONG
        if isinstance(error, Damaged):
            code = EXIT_DAMAGED
    if chosen.json:
        print(msgspec.json.encode(tree).decode(), flush=True)
    elif lines:
        print("\n".join(lines), flush=True)
    return code


_Told = tuple[dict[str, Any], list[str], int]


# --- list and verify


def _folders(fleet: FleetConfig, chosen: argparse.Namespace) -> dict[str, Path]:
    """The state folder of each host that has one here. ConfigError if none is meant."""
    hosts = {name: fleet.state_dir / f"host-{name}" for name in fleet.hosts}
    if chosen.host and chosen.host not in hosts:
        raise ConfigError(f"there is no host {chosen.host!r}", hint=f"known: {', '.join(sorted(hosts)) or 'none'}")
    return {name: path for name, path in hosts.items() if path.is_dir() and chosen.host in ("", name)}


def _found(fleet: FleetConfig, chosen: argparse.Namespace) -> list[tuple[str, str, Path]]:
    """(host, agent, folder) of each backup that is meant."""
    return [
        (host, agent.name, path)
        for host, state in sorted(_folders(fleet, chosen).items())
        for agent in sorted((state / "backups").glob("*"))
        if agent.is_dir() and chosen.agent in (None, agent.name)
        for path in list_backups(agent)
        if chosen.name in ("", path.name)
    ]


def _list(fleet: FleetConfig, chosen: argparse.Namespace) -> _Told:
    entries: list[dict[str, Any]] = []
    for host, agent, path in _found(fleet, chosen):
        try:
            manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
            entries.append(_entry(host, agent, path, manifest))
        except (OSError, msgspec.MsgspecError) as error:
            entries.append({"host": host, "agent": agent, "name": path.name, "path": str(path), "error": str(error)})
    lines = [_row(entry) for entry in entries] or ["there is no backup yet: one is made whenever a migration begins"]
    return {"backups": entries}, lines, 0


def _entry(host: str, agent: str, path: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "host": host, "agent": agent, "name": path.name, "path": str(path), "made": manifest.made,
        "revision": manifest.about.revision or saved_row(path).permanent,
        "levels": levels_of(manifest.about, manifest.parts), "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files.values()),
    }  # fmt: skip


def _row(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"{entry['name']}  {entry['agent']} on {entry['host']}: DAMAGED: {entry['error']}"
    made = datetime.fromtimestamp(entry["made"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    held = ", ".join(entry["levels"])
    return (
        f"{entry['name']}  {made}  {entry['agent']} {entry['revision']} on {entry['host']}: {held}; "
        f"{entry['files']} files, {entry['bytes'] / 1e6:.1f} MB"
    )


def _verify(fleet: FleetConfig, chosen: argparse.Namespace) -> _Told:
    entries: list[dict[str, Any]] = []
    for host, agent, path in _found(fleet, chosen):
        entry = {"host": host, "agent": agent, "name": path.name, "path": str(path), "problem": ""}
        try:
            verify_backup(path)
        except Damaged as error:
            entry["problem"] = error.what
        entries.append(entry)
    bad = [entry for entry in entries if entry["problem"]]
    lines = [
        f"{entry['name']}  {entry['agent']} on {entry['host']}: "
        + (f"DAMAGED: {entry['problem']}" if entry["problem"] else "as it was made")
        for entry in entries
    ]
    lines.append(f"{len(entries)} backups, {len(bad)} damaged")
    return {"backups": entries, "damaged": len(bad)}, lines, EXIT_DAMAGED if bad else 0


# --- restore


def _restore(fleet: FleetConfig, chosen: argparse.Namespace) -> _Told:
    found = [(name, state) for name, state in _folders(fleet, chosen).items() if (state / "backups").is_dir()]
    having = [(name, state) for name, state in found if (state / "backups" / chosen.agent).is_dir()]
    if not having:
        raise ConfigError(
            f"there is no backup of {chosen.agent!r} here", where=str(fleet.state_dir),
            hint="see: interlock backup list; one is made whenever a migration of an agent begins",
        )  # fmt: skip
    if len(having) > 1:
        names = ", ".join(name for name, _ in having)
        raise ConfigError(f"{chosen.agent} has backups of several hosts", hint=f"say which: --host, one of {names}")
    host, state = having[0]
    levels = [level for level in LEVELS if level in (chosen.level or ["code"])]
    if chosen.into is not None:
        return _into(state, chosen)
    with ExitStack() as holding:
        try:
            holding.enter_context(held(state / "lock", f"interlock backup restore {chosen.agent}"))
        except InUse as error:
            raise InUse(
                f"host {host} runs ({error.what}): what an agent uses can't be replaced under it", where=error.where,
                hint="stop the host, restore, and start it again; or look at a copy first: --into FOLDER",
            ) from None  # fmt: skip
        return _in_place(host, state, levels, chosen)


def _into(state: Path, chosen: argparse.Namespace) -> _Told:
    path = _pick(state, chosen, [], None)
    if chosen.into.exists():
        raise ConfigError("is there already", where=str(chosen.into), hint="name a folder that is not there yet")
    restore_backup(path, chosen.into)
    told = {"outcome": "restored", "backup": str(path), "into": str(chosen.into)}
    return told, [f"restored {path.name} into {chosen.into}; nothing else was changed"], 0


def _in_place(host: str, state: Path, levels: list[str], chosen: argparse.Namespace) -> _Told:
    now = time.time()
    row = None if "host" in levels else _permanent(state, chosen.agent)
    path = _pick(state, chosen, levels, row)
    lines = [f"restoring {', '.join(levels)} of {chosen.agent} on {host} from {path.name}"]
    costs: dict[str, Lost] = {}
    if "configuration" in levels:
        lines.append(
            f"configuration: the settings of then are in {path / 'agent.json'}; the fleet file is yours to edit"
        )
    if "code" in levels or "configuration" in levels:
        recorded = restore_code(path, RevisionStore(state / "revisions"))
        lines.append(f"code: revision {recorded.name} ({recorded.digest[:12]}) is recorded, and as it was")
    if "state" in levels:
        costs["state"] = restore_state(path, state / "data" / chosen.agent, now=now)
    if "host" in levels:
        costs["host"] = restore_journal(path, state / "host.sqlite", now=now)
    for level, lost in costs.items():
        lines.append(f"{level}: {lost.words()}" + (f"; what was there is kept in {lost.kept}" if lost.kept else ""))
    told = {
        "outcome": "restored", "backup": str(path), "levels": levels,
        "lost": {level: msgspec.to_builtins(lost) for level, lost in costs.items()},
    }  # fmt: skip
    return told, [*lines, f"RESTORED; now start host {host} again"], 0


def _permanent(state: Path, agent: str) -> Row | None:
    """What the journal says is permanent; None if it has no such agent. LogError if it is damaged."""
    if not (state / "host.sqlite").exists():
        return None
    journal = Journal.open(state / "host.sqlite")
    try:
        return journal.slot(agent)
    finally:
        journal.close()


def _pick(state: Path, chosen: argparse.Namespace, levels: list[str], row: Row | None) -> Path:
    """The backup that is named, else the newest one that is whole and has all that is asked for."""
    folder = state / "backups" / chosen.agent
    if chosen.name:
        path: Path = folder / chosen.name
        if path not in list_backups(folder):
            raise ConfigError(
                f"there is no backup {chosen.name!r}", where=str(folder), hint="see: interlock backup list"
            )
        manifest = verify_backup(path)
        lacking = sorted(set(levels) - set(levels_of(manifest.about, manifest.parts)))
        if lacking:
            raise ConfigError(f"the backup does not have the level {lacking[0]}", where=str(path))
        return path
    want_code = row is not None and ("code" in levels or "configuration" in levels)

    def fits(saved: Row, about: About) -> bool:
        whole = set(levels) <= set(about.levels) if about.levels else set(levels) <= {"configuration", "code"}
        return whole and (not want_code or (row is not None and saved.permanent_digest == row.permanent_digest))

    return newest_verified(folder, fits)


if __name__ == "__main__":
    sys.exit(main())
