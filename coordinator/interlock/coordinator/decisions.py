"""What the coordinator decides about the whole fleet: which requests begin a migration, which are refused, which
migrations go on. Pure: a fold over the log, and `decide(now)`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import msgspec

from interlock.broker import commands, facts, topics
from interlock.broker.commands import Breach
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError
from interlock.broker.strategies import Level
from interlock.broker.wire import Event
from interlock.coordinator import steering
from interlock.coordinator.admission import Case, Settings, busy, consider, near
from interlock.coordinator.emit import Emit
from interlock.coordinator.fleet import SNAPSHOT_BYTES, Fleet
from interlock.coordinator.migration import Migration
from interlock.coordinator.ownership import places
from interlock.coordinator.placing import placed
from interlock.coordinator.steps import DRILL_S, Terms, plan
from interlock.coordinator.waves import Waves

DRILL_ID = "/drill"  # a host's command to rehearse has the id of the operator's request, and this
SNAPSHOT_EVENTS = 1000  # between snapshots of the fleet: a joiner folds at most so many events and those in flight


class Coordinator:
    """`load` reads the fleet file anew (ConfigError if it is wrong), so that a new revision needs no restart."""

    def __init__(self, load: Callable[[], FleetConfig], config: FleetConfig) -> None:
        self.fleet = Fleet(places(config))
        self.migrations: dict[str, Migration] = {}  # those whose end is not in the log yet
        self._read_file = load
        self.waves = Waves(self._load)
        self.risk: dict[str, Level] = {}  # by agent; an agent that nobody scored is not in it
        self._config = config
        self._waiting: dict[str, Event] = {}  # requests nobody has answered, by event id
        self._answered: set[str] = set()  # answered by us, the answer is not in the log yet
        self._starting: dict[str, tuple[str, str]] = {}  # of those: (agent, migration) by request
        self._holds: list[Emit] = []
        self._begun: dict[str, int] = {}  # of the migrations: where each begins in the log
        self._snapshot_at = 0  # what the newest snapshot in the log stands for
        self._deciding = False  # the log was read to its end once

    @property
    def lease_s(self) -> float:
        """For how long a host believes in a coordinator that it does not hear, in seconds."""
        return self._config.coordinator.lease_s

    def _load(self) -> FleetConfig:
        """The fleet file as it is now; who has an agent is as it says from here on."""
        config = self._read_file()
        self.fleet.placed = places(config)
        return config

    # --- folding

    def apply(self, event: Event) -> None:
        body = event.body
        if isinstance(body, facts.HostUp):
            self._look_for(body)
        believed = self.fleet.apply(event)
        if isinstance(body, facts.FleetSnapshot):
            self._snapshot_at = max(self._snapshot_at, body.through)
        elif believed:
            self._take(event)

    def _take(self, event: Event) -> None:
        self.waves.apply(event)
        body = event.body
        match body:
            case (
                commands.Migrate()
                | commands.RollBackAgent()
                | commands.Steer()
                | commands.StartWave()
                | commands.StopWave()
                | commands.RunDrill()
            ):
                self._waiting[event.header.id] = event
            case facts.WaveStarted() | facts.WaveRefused() | facts.WaveChanged():
                self._answer_logged(body.request)
            case facts.MigrationStarted():
                self._answer_logged(body.request)
                self._begin(body, event)
            case facts.MigrationRefused() | facts.Steered():
                self._answer_logged(body.request)
            case facts.AlertFiring() if not body.dry_run and (body.action == "hold" or body.blamed):
                self._hold(body, event.header.logged or event.header.time)
            case commands.Drill() if event.header.id.endswith(DRILL_ID):
                self._answer_logged(event.header.id.removesuffix(DRILL_ID))
            case commands.RollBack():
                for request, waiting in list(self._waiting.items()):
                    if isinstance(waiting.body, commands.RollBackAgent) and waiting.body.agent == body.agent:
                        self._answer_logged(request)
        for migration in [m for m in self.migrations.values() if m.started.agent == getattr(body, "agent", None)]:
            migration.apply(event)
            if migration.closed:
                del self.migrations[migration.id]
                self._begun.pop(migration.id, None)

    def _look_for(self, body: facts.HostUp) -> None:
        """A host that starts with an agent that is not its own so far may have it by a newer fleet file."""
        if self._deciding and not all(self.fleet.owns(body.host, name) for name in body.agents):
            with suppress(ConfigError):  # who asks for something is told of it
                self._load()

    def _answer_logged(self, request: str) -> None:
        self._waiting.pop(request, None)
        self._answered.discard(request)
        self._starting.pop(request, None)

    def _begin(self, body: facts.MigrationStarted, event: Event) -> None:
        try:
            settings = msgspec.convert(body.settings, Settings)
        except msgspec.ValidationError:  # of another version: the defaults bring it to a safe end
            settings = Settings(strategy=self._config.strategy("staged"), start_timeout_s=30.0)
        self._begun[body.migration] = event.header.seq
        self.migrations[body.migration] = Migration(
            body,
            at=event.header.logged or event.header.time,
            steps=plan(settings.strategy, start_timeout_s=settings.start_timeout_s, moves=bool(body.target)),
            config=self._config.coordinator,
            strategy=settings.strategy,
            terms=Terms(accept=settings.accept, sick_ok=settings.sick_ok, hand_over_s=settings.hand_over_s),
        )

    def _hold(self, body: facts.AlertFiring, at: float) -> None:
        for name in body.migrations if body.action == "hold" else body.blamed:
            if name not in self.migrations:
                continue
            blame = body.blamed.get(name)
            breach = Breach(
                by=f"rule {body.rule}", reason=body.summary + (f"; {blame.why}" if blame else ""),
                labels=body.labels, value=body.value, sample_time=body.sample_time,
            )  # fmt: skip
            self._holds += self.migrations[name].hold(breach, at, blame.who if blame else "")

    # --- deciding

    def decide(self, now: float) -> list[Emit]:
        """All that is to be sent now. To be asked once the log has been folded to its end, never before."""
        self._deciding = True
        wanted, self._holds = self._holds, []
        for request, event in list(self._waiting.items()):
            if request not in self._answered and not self._is_steered(event):
                self._answered.add(request)
                wanted += self._answer(event, now)
        wanted += self.waves.decide(now, self.migrations)
        for migration in self.migrations.values():
            wanted += migration.decide(now)
        return wanted

    def snapshot(self) -> Emit | None:
        """What is folded so far, for the log, once that is worth it. What is in flight is read from the log itself."""
        if self.fleet.position - self._snapshot_at < SNAPSHOT_EVENTS:
            return None
        self._snapshot_at = self.fleet.position
        needed = [self._begun.get(name, 1) for name in self.migrations] + self.waves.begun
        needed += [event.header.seq for event in self._waiting.values()]
        body = self.fleet.snapshot(min(needed, default=self.fleet.position + 1) - 1)
        if len(body.state) > SNAPSHOT_BYTES:  # thousands of agents in flight at once: the log stays as long as it is
            return None
        return Emit(topics.FLEET_SNAPSHOT, body, f"snapshot/{body.through}")

    def next_deadline(self, now: float) -> float:
        times = [m.next_deadline(now) for m in self.migrations.values()]
        return min([self.waves.next_deadline(now), *times])

    def _is_steered(self, event: Event) -> bool:
        """One request after the other: what the one before did is not in the log yet."""
        if isinstance(event.body, commands.StartWave | commands.StopWave):
            asked = (self._waiting[request].body for request in self._answered if request in self._waiting)
            return any(isinstance(body, commands.StartWave | commands.StopWave) for body in asked)
        if not isinstance(event.body, commands.Steer):
            return False
        migration = self._flying(event.body.agent)
        return migration is not None and bool(migration.steering)

    def _answer(self, event: Event, now: float) -> list[Emit]:
        body = event.body
        if isinstance(body, commands.RollBackAgent):
            return self._answer_rollback(body, event.header.id, now)
        if isinstance(body, commands.Steer):
            return self._answer_steer(event, now)
        if isinstance(body, commands.StartWave):
            return [self.waves.start(body, event, self.fleet, now)]
        if isinstance(body, commands.StopWave):
            return [self.waves.stop(body, event, now)]
        if isinstance(body, commands.RunDrill):
            return [self._answer_drill(body, event.header.id, now)]
        assert isinstance(body, commands.Migrate)
        try:
            return self._start(body, event, now)
        except ConfigError as error:
            return [self._refuse(event.header.id, body.agent, body.to, str(error))]

    def _answer_rollback(self, body: commands.RollBackAgent, request: str, now: float) -> list[Emit]:
        breach = Breach(by="operator", reason=body.reason, sample_time=now)
        found = [m for m in self.migrations.values() if m.started.agent == body.agent]
        if now > body.deadline:
            return [self._refuse(request, body.agent, "", "the request's deadline has passed")]
        if not found:
            return [self._refuse(request, body.agent, "", self._nothing(body.agent))]
        emits = [emit for migration in found for emit in migration.roll_back(breach, now)]
        if not emits:
            return [self._refuse(request, body.agent, "", "the migration has just ended")]
        return emits

    def _answer_steer(self, event: Event, now: float) -> list[Emit]:
        body, request = event.body, event.header.id
        assert isinstance(body, commands.Steer)
        migration = self._flying(body.agent)
        if now > body.deadline:
            reason: str | None = "the request's deadline has passed"
        elif migration is None:
            reason = self._nothing(body.agent, f"nothing to {body.action}: ")
        else:
            reason = steering.refusal(migration, body.action, body.reason, now)
        if migration is None or reason is not None:
            return [self._refuse(request, body.agent, "", reason or "")]
        return steering.steer(migration, body, request, event.header.source, now)

    def _flying(self, agent: str) -> Migration | None:
        return next((m for m in self.migrations.values() if m.started.agent == agent), None)

    def _nothing(self, agent: str, what: str = "") -> str:
        if agent in self.fleet.agents:
            return f"{what}no migration of {agent} is in flight; to go back: interlock migrate {agent} --to REVISION"
        return f"there is no agent {agent!r}; {near(agent, self.fleet.agents)}"

    def _answer_drill(self, body: commands.RunDrill, request: str, now: float) -> Emit:
        """The host's command, or why there is none."""
        try:
            if now > body.deadline:
                raise ConfigError("the request's deadline has passed")
            config = self._load()
            agent, slot = config.agents.get(body.agent), self.fleet.agents.get(body.agent)
            agent = agent and placed(body.agent, config, self.fleet)
            if agent is None or slot is None:
                known = config.agents if agent is None else self.fleet.agents
                raise ConfigError(f"there is no agent {body.agent!r}", hint=near(body.agent, known))
            for objection in busy(body.agent, agent, self.fleet, self._in_flight(body.agent)):
                raise objection
        except ConfigError as error:
            return self._refuse(request, body.agent, "", str(error))
        slowest = max(revision.start_timeout_s for revision in agent.revisions.values())
        asked = commands.Drill(
            migration="", agent=body.agent, epoch=slot.epoch, deadline=now + DRILL_S + 2 * slowest,
            whole_host=body.whole_host, promise_s=config.strategy(agent.strategy_name).promise_s,
        )  # fmt: skip
        return Emit(topics.command(agent.host), asked, f"{request}{DRILL_ID}")

    def _in_flight(self, agent: str) -> str:
        """The migration that the agent is in, or is about to be in."""
        flying = [m.id for m in self.migrations.values() if m.started.agent == agent]
        flying += [migration for name, migration in self._starting.values() if name == agent]
        return flying[0] if flying else ""

    def consider(self, asked: commands.Migrate, now: float, *, undo: bool = False) -> Case:
        """What speaks for and against this request; ConfigError if it names nothing there is."""
        in_flight = self._in_flight(asked.agent)
        return consider(asked, self._load(), self.fleet, in_flight=in_flight, risk=self.risk, now=now, undo=undo)

    def _start(self, body: commands.Migrate, event: Event, now: float) -> list[Emit]:
        """MigrationStarted, and what of it is not the rule; ConfigError with the reason if it can't be."""
        if now > body.deadline:
            raise ConfigError("the request's deadline has passed", hint="is the coordinator overloaded? ask again")
        case = self.consider(body, now, undo=self.waves.undoes(event.header.id))
        if case.objections:
            raise case.objections[0]
        # A log that began anew numbers from 1: never an epoch, or a migration's name, that the host has seen before.
        epoch = max(event.header.seq, self.fleet.agents[body.agent].epoch + 1)
        migration, topic = f"{body.agent}-{epoch}", topics.migration_fact(body.agent)
        started = facts.MigrationStarted(
            migration=migration, epoch=epoch, agent=body.agent, host=case.agent.host, previous=case.previous,
            to=body.to, strategy=case.choice.strategy, request=event.header.id,
            settings=msgspec.to_builtins(case.settings), wave=body.wave, target=case.target,
        )  # fmt: skip
        self._starting[event.header.id] = (body.agent, migration)
        emits = [Emit(topic, started, f"{migration}/started")]
        for number, what in enumerate(case.deviations):
            deviation = facts.Deviation(
                migration=migration, agent=body.agent, what=what, because=body.because, by=event.header.source
            )
            emits.append(Emit(topic, deviation, f"{migration}/deviation/{number}"))
        return emits

    @staticmethod
    def _refuse(request: str, agent: str, to: str, reason: str) -> Emit:
        refused = facts.MigrationRefused(request=request, agent=agent, to=to, reason=reason)
        return Emit(topics.migration_fact(agent if _plain(agent) else "unknown"), refused, f"{request}/refused")


def _plain(name: str) -> bool:
    try:
        topics.check_name(name, where="")
    except ConfigError:
        return False
    return True
