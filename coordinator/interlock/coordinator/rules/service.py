"""The rule engine's shell: telemetry and the log in, rollbacks and alerts out.

A rollback leaves on two ways at once, straight to the host and through the log; neither waits for the other, nor for
the broker.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from interlock.broker import questions, topics
from interlock.broker.bus import TelemetryPublisher
from interlock.broker.client import Bus, open_bus
from interlock.broker.commands import RollBack
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError, InterlockError, Refused, WireError
from interlock.broker.facts import AlertFiring
from interlock.broker.gate import Gate
from interlock.broker.questions import Question, serve_questions
from interlock.broker.role import held
from interlock.broker.samples import Batch, Labels, labels
from interlock.broker.security import Security, load_security
from interlock.coordinator.ownership import Places, places
from interlock.coordinator.rules import answering
from interlock.coordinator.rules.decisions import RuleDecisions, Send
from interlock.coordinator.rules.engine import Columns
from interlock.coordinator.rules.intake import Intake
from interlock.coordinator.rules.reloading import RuleFiles, follow
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.rulefile import load_rules
from interlock.coordinator.rules.sharing import WHOLE, Part, share
from interlock.coordinator.rules.snapshot import BadSnapshot, Frozen, restore

TICK_S = 0.05  # between looks at deadlines: what `for` may be late by
TURN_S = 0.01  # at most without a look at what else there is: a queue of ZeroMQ that is full ends its link
TELEMETRY_S = 1.0  # between our own samples
PARTIAL_S = 0.05  # between looks at partial results, where engines share a fleet: what a rule over all hosts is late by
PARTIALS_S = 0.5  # and at most between two of the same: who hears none for 10 s takes the engine for silent
TELEMETRY_HOST = "fleet"  # the rule engine belongs to no host
DIRECT_TIMEOUT_S = 1.0  # for one attempt at a host; the log delivers the same rollback anyway
FLUSH_S = 2.0  # for posts of an earlier life; a log that takes none must not keep rollbacks from leaving directly
STALL_S = 1.0  # a tick that is so late found the process held up
SNAPSHOT_S = 30.0  # between snapshots: what a killed engine forgets at most of its windows
SNAPSHOT = "snapshot"  # in the role's state folder
DIRECT_ATTEMPTS = 3  # a host that restarts its endpoint is back within that

_log = logging.getLogger("interlock.rules")

Ready = Callable[[], None]


async def run_rules(fleet: FleetConfig, ready: Ready, number: int = 0) -> None:
    """Serve until cancelled. ConfigError for a bad rule file, InUse if another rule engine holds the state folder.

    number: which of the engines that share the fleet this one is; 0: the only one.
    """
    part = part_of_fleet(fleet, number)
    rules = load_rules(fleet.rules.files, fleet.folder)
    state = fleet.state_dir / part.publisher
    with held(state / "lock", part.publisher):
        security = load_security(fleet, "rules")
        async with open_bus(fleet.broker, "rules", outbox=state / "outbox", security=security) as bus:
            controls = {name: host.control for name, host in fleet.hosts.items()}
            service = RuleService(bus, rules, controls, places(fleet), part=part, hosts=list(fleet.hosts))
            # what another number of engines shared, this one has no use for
            service.keep(state / (f"{SNAPSHOT}-of-{part.count}" if part.shared else SNAPSHOT))
            service.watch_files(RuleFiles(fleet))
            service.answer_at(questions.place(fleet, part.number), security)
            await service.run(ready)


def part_of_fleet(fleet: FleetConfig, number: int) -> Part:
    """Which part of the fleet the engine of this number has. ConfigError if there is none of that number."""
    count = fleet.rules.partitions
    if count == 1 and number in (0, 1):
        return WHOLE
    if not 1 <= number <= count:
        raise ConfigError(
            f"{count} rule engines share this fleet, and none is number {number}" if number else "which one?",
            where=f"{fleet.path or 'fleet'}: rules.partitions",
            hint=f"--partition 1 to {count}",
        )
    return Part(number, count)


class RuleService:
    """One bus, one engine."""

    def __init__(
        self,
        bus: Bus,
        rules: Sequence[Rule],
        controls: dict[str, str],
        placed: Places | None = None,
        *,
        part: Part = WHOLE,
        hosts: Sequence[str] = (),
    ) -> None:
        self._bus = bus
        self._rules = rules
        self._part = part
        self._hears = part.hears(hosts)
        self._refused_files = 0
        self._decisions = RuleDecisions(rules, controls, part)
        self._intake = Intake(placed)
        self._reported: dict[str, str] = {}
        self._snapshot: Path | None = None
        self._files: RuleFiles | None = None
        self._answers = ""
        self._security: Security | None = None
        self._ticked = 0.0
        # the wall clock may be set back; deadlines may not
        self._wall = time.time() - trio.current_time()

    def keep(self, path: Path) -> None:
        """Keep what the engine knows in this file, and take up what an earlier life kept there."""
        self._snapshot = path
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("%s can't be read: %s", path, error)
            return
        try:
            count = restore(self._decisions.engine, content, self._now())
        except BadSnapshot as error:
            _log.warning("%s is not taken up: %s", path, error)
        else:
            _log.info("%d series taken up from %s", count, path)

    def watch_files(self, files: RuleFiles) -> None:
        """Read these rule files again when they change."""
        self._files = files

    def answer_at(self, endpoint: str, security: Security | None) -> None:
        """Answer questions there."""
        self._answers, self._security = endpoint, security

    async def _answer_at(self, endpoint: str, nursery: trio.Nursery) -> None:
        """Where that fails, rules are evaluated all the same: silence tells who asks, and the log has the reason."""
        gate = None if self._security is None else Gate(self._security, "rules")
        if gate is not None:
            await nursery.start(gate.serve, self._bus.sockets)
        serve = partial(serve_questions, self._bus.sockets, endpoint, self._respond, gate=gate)
        try:
            await nursery.start(serve)
        except InterlockError as error:
            _log.error("no questions are answered: %s", error)

    def _respond(self, question: Question) -> dict[str, Any]:
        decisions = self._decisions
        return answering.answer(decisions.engine, question, self._now(), silent=decisions.silent)

    async def run(self, ready: Ready) -> None:
        with trio.move_on_after(FLUSH_S):
            await self._bus.flushed()  # what an earlier life of this role still had to say belongs into the fold
        async with (
            self._bus.samples(self._hears) as feed,
            self._bus.events([topics.FACTS, topics.SNAPSHOTS], after=0) as log_feed,
            trio.open_nursery() as nursery,
        ):

            async def follow() -> None:
                async for event in log_feed:
                    self._send(nursery, self._decisions.follow(event, self._now()))
                    for claim in self._decisions.in_flight.claims.news():
                        _log.warning("%s", claim)

            async def take_in() -> None:
                turn = trio.current_time()
                async for batches in feed:
                    for group in apart(batches):
                        sends = self._take(group)
                        if sends:
                            self._send(nursery, sends)
                        # a rollback leaves before the next batch is looked at, and what comes meanwhile is read
                        if sends or trio.current_time() - turn > TURN_S:
                            await trio.lowlevel.checkpoint()
                            turn = trio.current_time()
                    if self._decisions.engine.backlog:  # a slice at a time: new series hold nobody up
                        await trio.lowlevel.checkpoint()
                        self._decisions.engine.bind()
                        gc.freeze()  # what was made for them stays: the collector would walk it again and again

            nursery.start_soon(follow)
            await log_feed.caught_up.wait()
            self._send(nursery, self._decisions.go_live(self._now()))
            migrations = len(self._decisions.in_flight.migrations)
            _log.info(
                "%d rules; the log is read up to event %d; %d migrations in flight",
                len(self._rules),
                log_feed.position,
                migrations,
            )
            nursery.start_soon(take_in)
            nursery.start_soon(self._tick, nursery)
            publisher = self._bus.telemetry(TELEMETRY_HOST, self._part.publisher)
            nursery.start_soon(self._report, publisher)
            if self._part.shared:
                nursery.start_soon(self._tell_partials, self._bus.telemetry(TELEMETRY_HOST, self._part.partials))
            if self._files is not None:
                nursery.start_soon(self._follow_files, self._files, nursery)
            if self._answers:
                await self._answer_at(self._answers, nursery)
            nursery.start_soon(self._keep)
            gc.collect()
            gc.freeze()  # what lives as long as the engine is not looked at again and again
            ready()
            try:
                await trio.sleep_forever()
            finally:
                if self._snapshot is not None:
                    _write(self._snapshot, Frozen(self._decisions.engine, self._now()))

    async def _follow_files(self, files: RuleFiles, nursery: trio.Nursery) -> None:
        def take(rules: Sequence[Rule]) -> None:
            try:
                share(rules, self._part)
            except ConfigError as error:
                refuse(error)
                return
            before = {rule.hash for rule in self._rules}
            same = sum(rule.hash in before for rule in rules)
            self._rules = rules
            self._send(nursery, self._decisions.reload(rules, self._now()))
            _log.info("rule files read again: %d rules, %d of them as before", len(rules), same)

        def refuse(error: ConfigError) -> None:
            self._refused_files += 1
            _log.error(
                "rule files changed and can't be read; the %d rules from before go on: %s", len(self._rules), error
            )

        await follow(files, take, refuse)

    def _now(self) -> float:
        return self._wall + trio.current_time()

    def _take(self, group: Sequence[Batch]) -> list[Send]:
        """Batches of different publishers, as if they were one."""
        now, engine = self._now(), self._decisions.engine
        columns: list[Columns] = []
        for batch in group:
            if not self._part.takes(batch.source):
                continue
            found = self._intake.columns(batch, now, admit=engine.admit, version=engine.store.version, end=engine.end)
            if found is not None:
                columns.append((*found, batch.time, batch.source))
        return self._decisions.take(columns, now)

    async def _tick(self, nursery: trio.Nursery) -> None:
        self._ticked = self._now()
        while True:
            await trio.sleep(TICK_S)
            now = self._now()
            late = now - self._ticked > TICK_S + STALL_S  # we were held up: samples wait that nobody has seen
            self._ticked = now
            if now >= self._decisions.next_deadline():
                self._send(nursery, self._decisions.tick(now, backlog=late))

    async def _keep(self) -> None:
        """The snapshot, once in a while."""
        if self._snapshot is None:
            return
        while True:
            await trio.sleep(SNAPSHOT_S)
            frozen = Frozen(self._decisions.engine, self._now())
            await trio.to_thread.run_sync(_write, self._snapshot, frozen)

    def _send(self, nursery: trio.Nursery, sends: Sequence[Send]) -> None:
        for send in sends:
            if send.direct:
                nursery.start_soon(self._direct, send)
        for send in sends:
            try:
                self._bus.post(send.topic, send.body, id=send.id)
            except WireError as error:  # labels of strangers may be of any length
                _log.error("can't be sent: %s", error)
            match send.body:
                case RollBack(agent=agent, migration=migration, breach=breach):
                    _log.warning("rolls back %s (%s): %s: %s", agent, migration, breach.by, breach.reason)
                case AlertFiring(rule=rule, summary=summary, labels=found):
                    _log.warning("%s fires: %s %s", rule, summary, found)

    async def _direct(self, send: Send) -> None:
        for attempt in range(1, DIRECT_ATTEMPTS + 1):
            try:
                await self._bus.direct(send.direct, send.topic, send.body, id=send.id, timeout=DIRECT_TIMEOUT_S)
                return
            except Refused as error:
                _log.warning("rollback to %s: %s", send.direct, error)
                return
            except InterlockError as error:
                _log.warning("rollback to %s, attempt %d: %s", send.direct, attempt, error)

    async def _tell_partials(self, publisher: TelemetryPublisher) -> None:
        """What the aggregations over hosts come to over ours, when it changes and once in a while."""
        said: dict[Labels, float] = {}
        due = -math.inf
        while True:
            found, now = self._decisions.partials(), trio.current_time()
            gone = [labels for labels in said if labels not in found]
            if found != said or now >= due:
                publisher.send(found, time=time.time(), ended=gone)
                said, due = found, now + PARTIALS_S
            await trio.sleep(PARTIAL_S)

    async def _report(self, publisher: TelemetryPublisher) -> None:
        whose = {"partition": str(self._part.number)} if self._part.shared else {}
        while True:
            engine, intake = self._decisions.engine, self._intake
            figures = {
                "rules_samples_total": engine.samples,
                "rules_evaluations_total": engine.evaluations,
                "rules_evaluation_errors_total": engine.evaluation_errors,
                "rules_unresolved_total": intake.unresolved,
                "rules_batches_lost_total": intake.lost,
                "rules_late_total": intake.late,
                "rules_malformed_total": intake.malformed,
                "rules_series_refused_total": engine.refused + intake.oversized,
                "rules_reload_errors_total": self._refused_files,
                "rules_claims_total": intake.strange + self._decisions.in_flight.claims.total,
                "rules_alerts_firing": len(self._decisions.firing()),
            }
            samples = {labels(name, host=TELEMETRY_HOST, **whose): float(value) for name, value in figures.items()}
            publisher.send(samples, time=time.time())
            for where, error in engine.errors.items() - self._reported.items():
                _log.warning("can't be evaluated now: %s: %s", where, error)
            self._reported = dict(engine.errors)
            await trio.sleep(TELEMETRY_S)


def apart(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Groups of batches, in their order, in which each publisher is there once."""
    group: list[Batch] = []
    sources: set[str] = set()
    for batch in batches:
        if batch.source in sources:
            yield group
            group, sources = [], set()
        group.append(batch)
        sources.add(batch.source)
    if group:
        yield group


def _write(path: Path, frozen: Frozen) -> None:
    """Whole or not at all."""
    fresh = path.with_suffix(".new")
    try:
        fresh.write_bytes(frozen.encode())
        fresh.replace(path)
    except OSError as error:
        _log.warning("no snapshot: %s", error)
