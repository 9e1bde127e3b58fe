"""The rule engine's shell: telemetry and the log in, rollbacks and alerts out.

A rollback leaves on two ways at once, straight to the host and through the log; neither waits for the other, nor for
the broker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import trio

from interlock.broker import topics
from interlock.broker.client import Bus, open_bus
from interlock.broker.commands import RollBack
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError, InterlockError, Refused, WireError
from interlock.broker.facts import AlertFiring
from interlock.broker.role import held
from interlock.broker.samples import labels
from interlock.broker.security import load_security
from interlock.coordinator.ownership import Places, places
from interlock.coordinator.rules.decisions import RuleDecisions, Send
from interlock.coordinator.rules.intake import Intake
from interlock.coordinator.rules.reloading import RuleFiles, follow
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.rulefile import load_rules

TICK_S = 0.05  # between looks at deadlines: what `for` may be late by
TELEMETRY_S = 1.0  # between our own samples
TELEMETRY_HOST = "fleet"  # the rule engine belongs to no host
DIRECT_TIMEOUT_S = 1.0  # for one attempt at a host; the log delivers the same rollback anyway
FLUSH_S = 2.0  # for posts of an earlier life; a log that takes none must not keep rollbacks from leaving directly
DIRECT_ATTEMPTS = 3  # a host that restarts its endpoint is back within that

_log = logging.getLogger("interlock.rules")

Ready = Callable[[], None]


async def run_rules(fleet: FleetConfig, ready: Ready) -> None:
    """Serve until cancelled. ConfigError for a bad rule file, InUse if another rule engine holds the state folder."""
    rules = load_rules(fleet.rules.files, fleet.folder)
    state = fleet.state_dir / "rules"
    with held(state / "lock", "rules"):
        security = load_security(fleet, "rules")
        async with open_bus(fleet.broker, "rules", outbox=state / "outbox", security=security) as bus:
            controls = {name: host.control for name, host in fleet.hosts.items()}
            await RuleService(bus, rules, controls, places(fleet), RuleFiles(fleet)).run(ready)


class RuleService:
    """One bus, one engine."""

    def __init__(
        self,
        bus: Bus,
        rules: Sequence[Rule],
        controls: dict[str, str],
        placed: Places | None = None,
        files: RuleFiles | None = None,
    ) -> None:
        self._bus = bus
        self._rules = rules
        self._files = files
        self._refused_files = 0
        self._decisions = RuleDecisions(rules, controls)
        self._intake = Intake(placed)
        self._reported: dict[str, str] = {}
        # the wall clock may be set back; deadlines may not
        self._wall = time.time() - trio.current_time()

    async def run(self, ready: Ready) -> None:
        with trio.move_on_after(FLUSH_S):
            await self._bus.flushed()  # what an earlier life of this role still had to say belongs into the fold
        async with (
            self._bus.samples(["telemetry/"]) as feed,
            self._bus.events([topics.FACTS, topics.SNAPSHOTS], after=0) as log_feed,
            trio.open_nursery() as nursery,
        ):

            async def follow() -> None:
                async for event in log_feed:
                    self._send(nursery, self._decisions.follow(event, self._now()))
                    for claim in self._decisions.in_flight.claims.news():
                        _log.warning("%s", claim)

            async def take_in() -> None:
                async for batches in feed:
                    for batch in batches:
                        now = self._now()
                        samples, ended = self._intake.read(batch, now)
                        sends = self._decisions.ingest(samples, ended, batch.time, now, publisher=batch.source)
                        if sends:
                            self._send(nursery, sends)
                            await trio.lowlevel.checkpoint()  # a rollback leaves before the next batch is looked at

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
            nursery.start_soon(self._report)
            if self._files is not None:
                nursery.start_soon(self._follow_files, self._files, nursery)
            ready()

    async def _follow_files(self, files: RuleFiles, nursery: trio.Nursery) -> None:
        def take(rules: Sequence[Rule]) -> None:
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

    async def _tick(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.sleep(TICK_S)
            now = self._now()
            if now >= self._decisions.next_deadline():
                self._send(nursery, self._decisions.tick(now))

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

    async def _report(self) -> None:
        publisher = self._bus.telemetry(TELEMETRY_HOST, "rules")
        while True:
            engine, intake = self._decisions.engine, self._intake
            figures = {
                "rules_samples_total": engine.samples,
                "rules_evaluations_total": engine.evaluations,
                "rules_evaluation_errors_total": engine.evaluation_errors,
                "rules_unresolved_total": intake.unresolved,
                "rules_batches_lost_total": intake.lost,
                "rules_late_total": intake.late,
                "rules_series_refused_total": engine.refused + intake.oversized,
                "rules_reload_errors_total": self._refused_files,
                "rules_claims_total": intake.strange + self._decisions.in_flight.claims.total,
                "rules_alerts_firing": len(self._decisions.firing()),
            }
            samples = {labels(name, host=TELEMETRY_HOST): float(value) for name, value in figures.items()}
            publisher.send(samples, time=time.time())
            for where, error in engine.errors.items() - self._reported.items():
                _log.warning("can't be evaluated now: %s: %s", where, error)
            self._reported = dict(engine.errors)
            await trio.sleep(TELEMETRY_S)
