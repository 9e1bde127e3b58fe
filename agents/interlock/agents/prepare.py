"""The prepare stage on the host: is the revision sound, is it recorded and backed up, and how does the old one do?

Nothing that serves is touched. What is found out here is the evidence by which the coordinator goes on.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from msgspec.structs import replace

from interlock.agents.backup import Backup
from interlock.agents.comparer import Bench, check_functions, functions_of
from interlock.agents.figures import baseline, measured
from interlock.agents.findings import Finding, first_failed
from interlock.agents.gateway import Gateway
from interlock.agents.journal import Journal
from interlock.agents.launch import Instance, Place
from interlock.agents.levels import Whole, back_up
from interlock.agents.link import Link
from interlock.agents.measured import dependencies, folder_bytes, memory_available, tree_memory
from interlock.agents.preflight import preflight
from interlock.agents.resources import FRESH_S, Card, Judgement, Needs, Room, judge
from interlock.agents.revisions import Revision, RevisionStore, check_name_free
from interlock.agents.slot_io import PrepareEnded, Row
from interlock.broker.commands import Prepare
from interlock.broker.config import AgentConfig, FleetConfig, RevisionConfig, source_of
from interlock.broker.errors import ConfigError, InterlockError, Refused
from interlock.broker.fields import Evidence

READ_AGAIN_S = 0.25  # between looks at readings that lack the old one's share; a monitor reads a card once a second
LINK_S = 10.0  # for the other host to answer, its link to come up included
BACKUPS_KEPT = 5  # per agent, where the fleet file does not name the host; each holds the code of one revision

Cards = Callable[[str], Awaitable[list[Card] | None]]  # the GPUs of the host, and what an agent has there
Up = Callable[[str], bool | None]  # whether an agent is healthy; None if it is not of this host


@dataclass
class Preparation:
    """What `prepare` needs, and what it leaves: the agent's settings as the fleet file has them now, and a baseline."""

    host: str
    command: Prepare
    row: Row
    permanent: Instance | None
    gateway: Gateway | None
    store: RevisionStore
    journal: Journal
    backups: Path
    place: Place
    load: Callable[[], FleetConfig]
    cards: Cards
    up: Up
    config: AgentConfig | None = None
    baseline: dict[str, float] | None = None
    judgement: Judgement | None = None
    link_to: Callable[[str], Link] | None = None  # the way to another host


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
        if given.command.host:
            fleet = await _check_move(given, evidence)
        else:
            fleet, recorded = await _record(given)
            evidence["digest"] = recorded.digest
        async with trio.open_nursery() as nursery:
            if given.permanent is not None:
                nursery.start_soon(_measure, given, evidence)
            if not given.command.host:
                await _check(given, fleet, recorded, evidence)
            await _check_old(given, evidence)
            backup = await _back_up(given, fleet)
            evidence["backup"] = {
                "path": str(backup.path),
                "levels": backup.manifest.about.levels,
                "files": len(backup.manifest.files),
                "bytes": sum(file.size for file in backup.manifest.files.values()),
            }
    except* _Failed as group:
        failed = group.exceptions[0]
        assert isinstance(failed, _Failed)
        ended = PrepareEnded(migration, False, check=failed.check, reason=failed.reason, evidence=failed.evidence)
    except* InterlockError as group:
        ended = PrepareEnded(migration, False, check="prepare", reason=str(group.exceptions[0]))
    if not ended.ok:
        return ended
    judged = given.judgement
    exclusive = judged is not None and (judged.gpu or evidence["rollback_class"] == "cold")
    return replace(ended, digest=evidence["digest"], exclusive=exclusive)


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
    assert given.config is not None
    judged = await _judge(given, given.config.revisions[given.command.to])
    given.judgement = judged
    cold = _is_cold(judged, given.command.accept)
    room = [replace(one, ok=True) if cold and not one.ok else one for one in judged.findings]
    findings = await preflight(
        recorded, base=fleet.folder, state_dir=fleet.state_dir, host=given.place.marker, room=room,
        disk_bytes=await trio.to_thread.run_sync(_backup_bytes, given),
    )  # fmt: skip
    findings += await dependencies(given.config.depends, fleet.agents, given.up, given.place.sockets)
    failed = first_failed(findings)
    evidence["preflight"] = {finding.check: finding.reason for finding in findings}
    evidence["rollback_class"] = "cold" if cold else "warm"
    if failed is not None:
        raise _Failed(failed.check, failed.reason + _cold_hint(failed, judged), failed.evidence)
    _check_state(given, recorded.config, evidence, cold=cold)
    await _check_comparison(given, recorded, evidence)


async def receive(given: Preparation) -> PrepareEnded:
    """What the host finds out that an agent is to move to: is the revision sound there, and is there room for it?"""
    migration = given.command.migration
    evidence: Evidence = {}
    try:
        fleet, recorded = await _record(given)
        evidence |= {"digest": recorded.digest, "host": given.host}
        _place_in(fleet, given, given.host)
        await _check(given, fleet, recorded, evidence)
    except _Failed as failed:
        return PrepareEnded(
            migration, False, check=failed.check, reason=f"on host {given.host}: {failed}", evidence=failed.evidence
        )
    except InterlockError as error:
        return PrepareEnded(migration, False, check="receive", reason=f"on host {given.host}: {error}")
    return PrepareEnded(migration, True, digest=recorded.digest, evidence=evidence)


def _place_in(fleet: FleetConfig, given: Preparation, host: str) -> None:
    """Both hosts must be reachable for each other, and clients must be told where the agent is then."""
    config, agent = given.config, given.command.agent
    assert config is not None
    where = f"the fleet file of host {given.host}"
    if config.serves == "nothing":
        raise _Failed("place", f"{agent} has no endpoint: an agent without a port can't move to another host yet", {})
    if not config.endpoint_at(host):
        hint = f'agents.{agent}.endpoints = {{ {host} = "..." }}'
        raise _Failed("place", f"{where} does not say where clients find {agent} on {host}: add {hint}", {})
    for name in (given.host, host):
        if name not in fleet.hosts or not fleet.hosts[name].link:
            raise _Failed("place", f"{where} does not say where other hosts reach {name}: add hosts.{name}.link", {})


async def _check_move(given: Preparation, evidence: Evidence) -> FleetConfig:
    """The other host has looked at the revision already; is there a way to it, and what is to travel?"""
    command = given.command
    try:
        fleet = await trio.to_thread.run_sync(given.load)
        config = given.config = fleet.agents.get(command.agent)
        if config is None or command.to not in config.revisions:
            raise ConfigError(f"has no revision {command.to!r}", where=f"the fleet file of host {given.host}")
    except ConfigError as error:
        raise _Failed("fleet-file", str(error), {}) from None
    _place_in(fleet, given, command.host)
    about = {"agent": command.agent, "migration": command.migration, "epoch": command.epoch}
    try:
        if given.link_to is None:
            raise ConfigError("this host has no link")
        said = await given.link_to(command.host).ask("invited", about, LINK_S)
    except InterlockError as error:
        raise _Failed("link", f"host {command.host} can't be asked: {error}", {}) from None
    evidence |= {"digest": str(said.get("digest", "")), "rollback_class": "warm", "host": command.host}
    if functions_of(config.compare):  # they run here, beside the old one
        _, recorded = await _record(given)
        await _check_comparison(given, recorded, evidence)
        evidence["digest"] = recorded.digest
    _check_state(given, config.revisions[command.to], evidence, cold=False)
    kept = await trio.to_thread.run_sync(folder_bytes, given.place.data_dir / command.agent)
    if kept:
        evidence |= {"hands_over": True, "data_bytes": kept}
    return fleet


def _check_state(given: Preparation, config: RevisionConfig, evidence: Evidence, *, cold: bool) -> None:
    """Whether state in memory is to be handed over, and whether it can be."""
    old = given.permanent
    if old is None or old.state_port is None:
        return
    evidence["hands_over"] = True
    if cold:
        reason = "it keeps state in memory, and to hand that over both must run at once: there is no room for both"
        raise _Failed("state", reason, {})
    if config.kind == "exec" and config.state is None:
        to = given.command.to
        reason = f"revision {given.row.permanent} keeps state in memory, and {to} has no table `state` to take it"
        raise _Failed("state", reason, {})


def _is_cold(judged: Judgement, accept: str) -> bool:
    """Old and new don't fit together, one after the other does, and the operator accepts what that means."""
    return accept in ("cold", "hand-over") and judged.together != "yes" and judged.apart


def _cold_hint(failed: Finding, judged: Judgement) -> str:
    if failed.check not in {finding.check for finding in judged.findings}:
        return ""
    if judged.apart:
        return "; one after the other fits: --accept cold stops the old one first, and a rollback starts it again"
    if not judged.known:
        return "; what the old one has there is not known, so nor is whether it would fit without it"
    return "; without the old one it would not fit either"


async def _judge(given: Preparation, revision: RevisionConfig) -> Judgement:
    old = given.permanent
    process = old.process if old is not None else None
    held = None
    if process is not None:
        held = await trio.to_thread.run_sync(tree_memory, process.marker, process.pid)
    needs = Needs(
        memory=int(revision.needs.memory_mb * (1 << 20)),
        gpu_memory=int(revision.needs.gpu_memory_mb * (1 << 20)),
        gpu=given.config is not None and given.config.category == "gpu-model",
    )
    until = trio.current_time() + FRESH_S
    while True:
        judged = judge(Room(memory_available(), held, await given.cards(given.command.agent)), needs)
        if judged.known or process is None or trio.current_time() > until:
            return judged
        await trio.sleep(READ_AGAIN_S)  # a monitor may not have read its card since the old one took its memory


def _backup_bytes(given: Preparation) -> int:
    levels = given.command.levels
    state = folder_bytes(given.place.data_dir / given.row.agent) if "state" in levels else 0
    code = folder_bytes(given.store.folder / given.row.permanent_digest) if "code" in levels else 0
    return state + code


async def _check_old(given: Preparation, evidence: Evidence) -> None:
    """The way back: recorded whole, and healthy; a sick one is said, and only goes if somebody asked for that."""
    old = await trio.to_thread.run_sync(given.store.verify, given.row.permanent_digest)
    if old:
        reason = f"revision {given.row.permanent} in the store is damaged, there is nothing to go back to: {old[0]}"
        hint = f"; mend it with: interlock backup restore {given.row.agent}"
        raise _Failed("permanent-revision", reason + hint, {"problems": old})
    if given.permanent is not None and (await given.permanent.check()).ok:
        return
    reason = f"revision {given.row.permanent} does not answer its health check"
    if not given.command.sick_ok:
        raise _Failed("permanent-health", f"{reason}; to replace it all the same, say why: --because TEXT", {})
    evidence["old"] = f"sick: {reason}. It is no verified way back: on a breach whoever is healthy serves"


async def _check_comparison(given: Preparation, recorded: Revision, evidence: Evidence) -> None:
    """Whether the comparison functions that the fleet file names are there, in the candidate's own environment."""
    functions = functions_of(given.config.compare) if given.config is not None else []
    if functions:
        place = given.place
        bench = Bench(recorded, place.base, place.marker, place.run_dir, place.log_dir, place.environment)
        finding = await check_functions(bench, functions)
        evidence.setdefault("preflight", {})[finding.check] = finding.reason
        if not finding.ok:
            raise _Failed(finding.check, finding.reason, finding.evidence)


async def _back_up(given: Preparation, fleet: FleetConfig) -> Backup:
    """The levels that the command names, of what serves now, verified."""
    row, levels = given.row, given.command.levels
    revision = await trio.to_thread.run_sync(given.store.get, row.agent, row.permanent, row.permanent_digest)
    whole = Whole(given.host, row, revision, given.config, given.place.data_dir / row.agent, given.journal)
    host = fleet.hosts.get(given.host)
    keep = BACKUPS_KEPT if host is None else host.backups
    try:
        return await trio.to_thread.run_sync(partial(back_up, whole, given.backups, levels, now=time.time(), keep=keep))
    except InterlockError as error:
        raise _Failed("backup", str(error), {"levels": list(levels)}) from None


async def _measure(given: Preparation, evidence: Evidence) -> None:
    """The latencies of the old revision while the checks run, and for `baseline_s` at least."""
    seconds = given.command.baseline_s
    await trio.sleep(seconds)
    assert given.permanent is not None
    assert given.gateway is not None
    latencies = given.gateway.latencies(given.permanent.name, seconds, trio.current_time())
    given.baseline = baseline(latencies)
    evidence["baseline"] = {"seconds": seconds, "response_s": given.baseline} | measured(latencies)
