"""The drill: a rollback rehearsed with real processes, before it is needed. Seconds by level, as they were measured.

All of it is done with *spares*: further instances of the permanent revision, which get no share of anything but the
route switch. The candidate gets no live request from a drill; it has not been judged fit for any yet.

1. The route goes from the permanent instance to the spare and back; measured is the way back, until the permanent
   instance has answered. Live requests take part only where asking another process of the same revision is harmless:
   everything may be asked twice, and the agent keeps nothing in its data folder. Elsewhere a probe verifies.
2. The spare is started from the store, until it answers.
3. Only if asked for: every agent of the host at once as in 2, until the last one answers.
4. The newest backup is restored into a scratch folder, and a spare is started from it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec
import trio

from interlock.agents.backup import About, copy_live, verify_backup
from interlock.agents.figures import InstanceView
from interlock.agents.front import admit
from interlock.agents.gateway import Gateway
from interlock.agents.launch import Instance, Place
from interlock.agents.levels import CODE, STATE, newest_verified, restore_code, restore_state
from interlock.agents.measured import folder_bytes, memory_available, tree_memory
from interlock.agents.resources import Card, Judgement, Needs, Room, judge
from interlock.agents.revisions import Revision, RevisionStore
from interlock.agents.slot_io import DrillEnded, Gone, Healthy, Row, Start
from interlock.agents.trees import remove_tree
from interlock.broker.commands import Drill
from interlock.broker.config import AgentConfig
from interlock.broker.errors import InterlockError
from interlock.broker.fields import Evidence

ROUTE_S = 5.0  # for an answer on either side of the switch: level 1 may take no longer
HOLD_S = 0.05  # live requests go to the spare for at least so long, or until it has answered one
POLL_S = 0.002
COPY_BYTES = 1 << 30  # of a data folder that a spare gets a copy of: some seconds on a disk


@dataclass
class Stage:
    """What a drill plays with. `spare_number` numbers the processes of the host, `back` routes as the slot has it."""

    host: str
    command: Drill
    row: Row
    config: AgentConfig
    permanent: Instance
    gateway: Gateway
    store: RevisionStore
    backups: Path
    place: Place
    nursery: trio.Nursery
    spare_number: Callable[[], int]
    back: Callable[[], None]
    cards: Callable[[str], Awaitable[list[Card] | None]]
    neighbours: Callable[[], list[Stage]]  # the same of each other agent of the host that is up


@dataclass
class _Findings:
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    evidence: Evidence = field(default_factory=dict)


class Sick(InterlockError):
    """A spare did not come to life, or did not answer."""


class TooLarge(InterlockError):
    """The agent keeps more than is copied for a rehearsal."""


async def drill(stage: Stage) -> DrillEnded:
    """Rehearse all levels that can be. It leaves nothing, also when it is cancelled."""
    found = _Findings()
    judged = await _room([stage])
    if judged.together == "yes":
        await _with_spare(stage, found)
    else:
        found.skipped["2"] = f"no room for a second process: {_lacking(judged)}"
        await _route(stage, None, found)
    if stage.command.cold:
        found.seconds.pop("1", None)
        found.skipped["1"] = "cold: the old process is stopped before the candidate starts"
    await _whole_host(stage, found)
    await _from_backup(stage, found, judged)
    return _cold_verdict(stage, found) if stage.command.cold else _verdict(stage.command, found)


def _cold_verdict(stage: Stage, found: _Findings) -> DrillEnded:
    """The old process will not run any more: what counts is how long it takes to start, which somebody accepted."""
    took, last = found.seconds.get("2"), stage.permanent.start_s
    words = "it is not known how long level 2 takes"
    if took is not None:
        words = f"level 2 takes {took:.2f} s, as rehearsed"
    elif last is not None:
        words = f"level 2 takes some {last:.2f} s: not rehearsed, but its last start took so long"
    found.evidence |= {"promise_s": stage.command.promise_s, "rollback_class": "cold", "accepted": f"cold: {words}"}
    return DrillEnded(
        not found.problems, "; ".join(found.problems), found.seconds, found.skipped, tuple(found.problems),
        found.evidence,
    )  # fmt: skip


def _verdict(command: Drill, found: _Findings) -> DrillEnded:
    """Within the promise at level 1; a slower one, where the operator accepts it and it is known how much slower."""
    first, second = found.seconds.get("1"), found.seconds.get("2")
    kept = first is not None and first <= command.promise_s
    found.evidence |= {"promise_s": command.promise_s, "rollback_class": "warm" if kept else "cold"}
    reason = ""
    if not kept:
        took = "could not be rehearsed" if first is None else f"took {first:.2f} s"
        reason = f"level 1 {took}, {command.promise_s:g} s are promised"
        if command.accept == "cold" and second is not None:
            found.evidence["accepted"] = f"{reason}; accepted as cold: {second:.2f} s at level 2"
    ok = (kept or "accepted" in found.evidence) and not found.problems
    if found.problems:
        reason = "; ".join(found.problems)
    return DrillEnded(ok, reason, found.seconds, found.skipped, tuple(found.problems), found.evidence)


# --- levels 1 and 2


async def _with_spare(stage: Stage, found: _Findings) -> None:
    try:
        revision = await _recorded(stage)
        async with scratch_place(stage) as place, spare(stage, revision, place) as (instance, took):
            found.seconds["2"] = took
            await _route(stage, instance, found)
    except TooLarge as error:
        found.skipped["2"] = str(error)
        await _route(stage, None, found)
    except InterlockError as error:
        found.problems.append(f"level 2: {error}")
    if "1" not in found.seconds and not found.problems:
        found.problems.append(f"level 1: no answer within {ROUTE_S:g} s")


async def _recorded(stage: Stage) -> Revision:
    row = stage.row
    return await trio.to_thread.run_sync(stage.store.get, row.agent, row.permanent, row.permanent_digest)


@asynccontextmanager
async def spare(stage: Stage, revision: Revision, place: Place) -> AsyncIterator[tuple[Instance, float]]:
    """A further instance, healthy, and the seconds that took; it is gone at the end. Sick or another InterlockError."""
    number = stage.spare_number()
    name = f"{stage.row.agent}-{stage.row.permanent}-drill{number}"
    view = InstanceView(stage.row.permanent, "permanent")
    instance = Instance(name, stage.row.agent, stage.config, revision, place, view)
    came: list[Healthy | Gone] = []
    heard = trio.Event()

    def report(given: Healthy | Gone) -> None:
        came.append(given)
        heard.set()

    began = trio.current_time()
    try:
        await instance.start(stage.nursery, number)
        start = Start(name, stage.row.permanent, stage.row.permanent_digest, "permanent")
        stage.nursery.start_soon(instance.watch, start, stage.permanent.handlers, report)  # ends with the process
        await heard.wait()
        if isinstance(came[0], Gone):
            raise Sick(came[0].reason, where=f"a spare of {stage.row.agent} {stage.row.permanent}")
        yield instance, trio.current_time() - began
    finally:
        with trio.CancelScope(shield=True):
            await instance.end()


@asynccontextmanager
async def scratch_place(stage: Stage) -> AsyncIterator[Place]:
    """Where a spare may write: a copy of the agent's data folder, since the permanent instance works in that."""
    data = stage.place.data_dir / stage.row.agent
    if await trio.to_thread.run_sync(folder_bytes, data) > COPY_BYTES:
        raise TooLarge(f"its data folder has more than {COPY_BYTES >> 20} MiB, which a spare would need a copy of")
    scratch = Path(await trio.to_thread.run_sync(partial(tempfile.mkdtemp, prefix="drill-", dir=stage.backups.parent)))
    try:
        copy = scratch / "data" / stage.row.agent
        await trio.to_thread.run_sync(copy_live, data, copy)
        yield replace(stage.place, data_dir=scratch / "data")
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(remove_tree, scratch)


async def _route(stage: Stage, instance: Instance | None, found: _Findings) -> None:
    """Level 1. Without a spare the route stays where it is, and only the verification is measured."""
    live = instance is not None and await trio.to_thread.run_sync(_harmless, stage)
    found.evidence["live_requests"] = live
    if instance is None:
        found.evidence["route"] = "no spare: the route was set to the permanent instance again, and a probe verified it"
    elif not live:
        found.evidence["route"] = "without live requests, as not all may be asked twice of another process"
    gateway, permanent = stage.gateway, stage.permanent
    try:
        if live and instance is not None:
            admit(gateway, instance)
            gateway.route({instance.name: 1.0})
            await _answered(gateway, instance, at_least=HOLD_S)
        began = trio.current_time()
        stage.back()
        by = await _answered(gateway, permanent)
        if by:
            found.seconds["1"] = trio.current_time() - began
            found.evidence["verified_by"] = by
    finally:
        stage.back()
        if live and instance is not None:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(stage.permanent.revision.stop_timeout_s):
                    await gateway.drained(instance.name)
            gateway.detach(instance.name)


def _harmless(stage: Stage) -> bool:
    """Asking another process of the same revision can't be told from asking this one.

    Not so of connections, which stay with whom they began with, of a worker, of which only one may work, and of
    state in memory, which the other one does not have.
    """
    config, permanent = stage.config, stage.permanent
    if config.serves != "requests" or permanent.state_port is not None:
        return False
    if permanent.revision.kind == "class":
        twice = bool(permanent.handlers) and all(handler.idempotent for handler in permanent.handlers.values())
    else:
        twice = config.idempotent is True
    return twice and folder_bytes(stage.place.data_dir / stage.row.agent) == 0


async def _answered(gateway: Gateway, instance: Instance, *, at_least: float = 0.0) -> str:
    """By whom it was first seen to answer: a client's request, or a probe; empty if not at all within ROUTE_S."""
    came = trio.Event()
    by: list[str] = []

    def note(whose: str) -> None:
        by.append(whose)
        came.set()

    async def ask() -> None:
        while True:
            if gateway.serves(instance.name) and (await instance.check()).ok:
                note("a probe")
                return
            await trio.sleep(POLL_S)

    gateway.on_answer(instance.name, lambda _: note("a client's request"))
    with trio.move_on_after(ROUTE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(at_least)
            await came.wait()
            nursery.cancel_scope.cancel()
    return by[0] if by else ""


# --- levels 3 and 4


async def start_spare(stage: Stage) -> float:
    """Level 2 alone: seconds until a spare answers. InterlockError if it does not."""
    async with scratch_place(stage) as place, spare(stage, await _recorded(stage), place) as (_, took):
        return took
    raise AssertionError("a spare is there or an error says why not")


async def _whole_host(stage: Stage, found: _Findings) -> None:
    if not stage.command.whole_host:
        found.skipped["3"] = "not asked for: it starts a second process of every agent of the host (--host)"
        return
    stages = [stage, *stage.neighbours()]
    judged = await _room(stages)
    if judged.together != "yes":
        found.skipped["3"] = f"no room for a second process of every agent: {_lacking(judged)}"
        return
    took: list[float] = []

    async def one(each: Stage) -> None:
        try:
            took.append(await start_spare(each))
        except InterlockError as error:
            found.problems.append(f"level 3: {error}")

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for each in stages:
            nursery.start_soon(one, each)
    if len(took) == len(stages):
        found.seconds["3"] = max(took)
    found.evidence["level_3"] = {"agents": len(stages), "all_over_s": trio.current_time() - began}


async def _from_backup(stage: Stage, found: _Findings, judged: Judgement) -> None:
    def ours(row: Row, _: About) -> bool:
        return row.permanent_digest == stage.row.permanent_digest

    if judged.together != "yes":
        found.skipped["4"] = "no room for a second process"
        return
    began = trio.current_time()
    scratch = Path(await trio.to_thread.run_sync(partial(tempfile.mkdtemp, prefix="drill-", dir=stage.backups.parent)))
    try:
        try:
            path = await trio.to_thread.run_sync(
                partial(newest_verified, stage.backups / stage.row.agent, ours, level="code")
            )
        except InterlockError as error:
            found.skipped["4"] = str(error)
            return
        revision = await trio.to_thread.run_sync(_restore, path, scratch, stage.row.agent)
        async with spare(stage, revision, replace(stage.place, data_dir=scratch / "data")):
            found.seconds["4"] = trio.current_time() - began
            found.evidence["backup"] = str(path)
    except InterlockError as error:
        found.problems.append(f"level 4: {error}")
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(remove_tree, scratch)


def _restore(path: Path, scratch: Path, agent: str) -> Revision:
    """The backup's revision and state, in a place of their own."""
    manifest = verify_backup(path)
    assert CODE in manifest.parts
    if STATE in manifest.parts:
        restore_state(path, scratch / "data" / agent, now=time.time())
    return restore_code(path, RevisionStore(scratch / "revisions"))


async def _room(stages: Sequence[Stage]) -> Judgement:
    """Whether a second process of each of them fits, all at once."""
    held = 0
    cards: dict[str, Card] = {}
    for each in stages:
        process = each.permanent.process
        if process is not None:
            mine: int | None = await trio.to_thread.run_sync(tree_memory, process.marker, process.pid)
            held += mine or 0
        for card in await each.cards(each.row.agent) or ():
            before = cards[card.uuid].agent if card.uuid in cards else 0
            cards[card.uuid] = msgspec.structs.replace(card, agent=before + card.agent)
    gpu = any(each.config.category == "gpu-model" for each in stages)
    return judge(Room(memory_available(), held, list(cards.values())), Needs(gpu=gpu))


def _lacking(judged: Judgement) -> str:
    return "; ".join(finding.reason for finding in judged.findings if not finding.ok)
