"""The prepare stage on the host: is the revision sound, is it recorded and backed up, and how does the old one do?

Nothing that serves is touched. What is found out here is the evidence by which the coordinator goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import trio

from interlock.agents.backup import Backup, make_backup
from interlock.agents.comparer import Bench, check_functions, functions_of
from interlock.agents.figures import baseline, measured
from interlock.agents.gateway import Gateway
from interlock.agents.journal import Journal
from interlock.agents.launch import Instance, Place
from interlock.agents.preflight import first_failed, preflight
from interlock.agents.revisions import Revision, RevisionStore, check_name_free
from interlock.agents.slot_io import PrepareEnded, Row
from interlock.broker.commands import Prepare
from interlock.broker.config import AgentConfig, FleetConfig, source_of
from interlock.broker.errors import ConfigError, InterlockError, Refused
from interlock.broker.fields import Evidence

BACKUPS_KEPT = 5  # per agent; each holds the code of one revision


@dataclass
class Preparation:
    """What `prepare` needs, and what it leaves: the agent's settings as the fleet file has them now, and a baseline."""

    host: str
    command: Prepare
    row: Row
    permanent: Instance | None
    gateway: Gateway
    store: RevisionStore
    journal: Journal
    backups: Path
    place: Place
    load: Callable[[], FleetConfig]
    config: AgentConfig | None = None
    baseline: dict[str, float] | None = None


class _Failed(Exception):
    def __init__(self, check: str, reason: str, evidence: Evidence) -> None:
        super().__init__(reason)
        self.check, self.reason, self.evidence = check, reason, evidence


async def prepare(given: Preparation) -> PrepareEnded:
    """Run all checks; never raises for what is wrong with the revision."""
    migration = given.command.migration
    evidence: Evidence = {}
    ended = PrepareEnded(migration, True, evidence=evidence)
    try:
        fleet, recorded = await _record(given)
        evidence["digest"] = recorded.digest
        async with trio.open_nursery() as nursery:
            if given.permanent is not None:
                nursery.start_soon(_measure, given, evidence)
            await _check(given, fleet, recorded, evidence)
            backup = await _back_up(given)
            evidence["backup"] = {
                "path": str(backup.path),
                "files": len(backup.manifest.files),
                "bytes": sum(file.size for file in backup.manifest.files.values()),
            }
    except* _Failed as group:
        failed = group.exceptions[0]
        assert isinstance(failed, _Failed)
        ended = PrepareEnded(migration, False, check=failed.check, reason=failed.reason, evidence=failed.evidence)
    except* InterlockError as group:
        ended = PrepareEnded(migration, False, check="prepare", reason=str(group.exceptions[0]))
    return replace(ended, digest=evidence.get("digest", "")) if ended.ok else ended


async def _record(given: Preparation) -> tuple[FleetConfig, Revision]:
    """Read the fleet file as it is now, and keep the revision."""
    agent, name = given.command.agent, given.command.to
    try:
        fleet = await trio.to_thread.run_sync(given.load)
        config = fleet.agents.get(agent)
        if config is None or name not in config.revisions:
            raise ConfigError(f"has no revision {name!r} of {agent}", where=f"the fleet file of host {given.host}")
        revision = config.revisions[name]
        where = f"{fleet.path or 'fleet'}: agents.{agent}.revisions.{name}"
        source = source_of(fleet, revision, where=where) if revision.source else None
    except ConfigError as error:
        raise _Failed("fleet-file", str(error), {}) from None
    given.config = config
    recorded = await trio.to_thread.run_sync(given.store.record, agent, name, revision, source)
    try:
        check_name_free(name, recorded.digest, await trio.to_thread.run_sync(given.journal.names, agent))
    except Refused as error:
        raise _Failed("revision-name", str(error), {"digest": recorded.digest}) from None
    return fleet, recorded


async def _check(given: Preparation, fleet: FleetConfig, recorded: Revision, evidence: Evidence) -> None:
    findings = await preflight(recorded, base=fleet.folder, state_dir=fleet.state_dir, host=given.place.marker)
    failed = first_failed(findings)
    evidence["preflight"] = {finding.check: finding.reason for finding in findings}
    if failed is not None:
        raise _Failed(failed.check, failed.reason, failed.evidence)
    await _check_comparison(given, recorded, evidence)
    old = await trio.to_thread.run_sync(given.store.verify, given.row.permanent_digest)
    if old:
        reason = f"revision {given.row.permanent} in the store is damaged, there is nothing to go back to: {old[0]}"
        raise _Failed("permanent-revision", reason, {"problems": old})
    if given.permanent is None or not (await given.permanent.check()).ok:
        raise _Failed("permanent-health", f"revision {given.row.permanent} does not answer its health check", {})


async def _check_comparison(given: Preparation, recorded: Revision, evidence: Evidence) -> None:
    """Whether the comparison functions that the fleet file names are there, in the candidate's own environment."""
    functions = functions_of(given.config.compare) if given.config is not None else []
    if functions:
        place = given.place
        bench = Bench(recorded, place.base, place.marker, place.run_dir, place.log_dir, place.environment)
        finding = await check_functions(bench, functions)
        evidence["preflight"][finding.check] = finding.reason
        if not finding.ok:
            raise _Failed(finding.check, finding.reason, finding.evidence)


async def _back_up(given: Preparation) -> Backup:
    """Configuration, code and slot of what serves now, verified."""
    row = given.row
    revision = given.store.get(row.agent, row.permanent, row.permanent_digest)
    parts: dict[str, bytes | Path] = {
        "slot.json": msgspec.json.format(msgspec.json.encode(row)),
        "configuration.json": msgspec.json.format(msgspec.json.encode(revision.config)),
        "code": revision.folder,
    }
    return await trio.to_thread.run_sync(
        partial(make_backup, given.backups / row.agent, parts, now=time.time(), keep=BACKUPS_KEPT)
    )


async def _measure(given: Preparation, evidence: Evidence) -> None:
    """The latencies of the old revision while the checks run, and for `baseline_s` at least."""
    seconds = given.command.baseline_s
    await trio.sleep(seconds)
    assert given.permanent is not None
    latencies = given.gateway.latencies(given.permanent.name, seconds, trio.current_time())
    given.baseline = baseline(latencies)
    evidence["baseline"] = {"seconds": seconds, "response_s": given.baseline} | measured(latencies)
