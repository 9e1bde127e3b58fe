"""What the coordinator decides about the whole fleet: which requests begin a migration, which are refused, which
migrations go on. Pure: a fold over the log, and `decide(now)`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

import msgspec

from interlock.broker import commands, facts, topics
from interlock.broker.commands import Breach
from interlock.broker.config import AgentConfig, FleetConfig, StrategyConfig
from interlock.broker.errors import ConfigError
from interlock.broker.wire import Event
from interlock.coordinator.fleet import SNAPSHOT_BYTES, Alert, Fleet
from interlock.coordinator.migration import DRILL_S, PROMISE_S, Emit, Migration, plan

DRILL_ID = "/drill"  # a host's command to rehearse has the id of the operator's request, and this
SNAPSHOT_EVENTS = 1000  # between snapshots of the fleet: a joiner folds at most so many events and those in flight


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a migration keeps from the fleet file of the moment it began; it travels in MigrationStarted."""

    strategy: StrategyConfig
    start_timeout_s: float
    accept: str = ""
    sick_ok: bool = False


class Coordinator:
    """`load` reads the fleet file anew (ConfigError if it is wrong), so that a new revision needs no restart."""

    def __init__(self, load: Callable[[], FleetConfig], config: FleetConfig) -> None:
        self.fleet = Fleet()
        self.migrations: dict[str, Migration] = {}  # those whose end is not in the log yet
        self._load = load
        self._config = config
        self._waiting: dict[str, Event] = {}  # requests nobody has answered, by event id
        self._answered: set[str] = set()  # answered by us, the answer is not in the log yet
        self._starting: dict[str, tuple[str, str]] = {}  # of those: (agent, migration) by request
        self._holds: list[Emit] = []
        self._begun: dict[str, int] = {}  # of the migrations: where each begins in the log
        self._snapshot_at = 0  # what the newest snapshot in the log stands for

    # --- folding

    def apply(self, event: Event) -> None:
        self.fleet.apply(event)
        body = event.body
        if isinstance(body, facts.FleetSnapshot):
            self._snapshot_at = max(self._snapshot_at, body.through)
            return
        match body:
            case commands.Migrate() | commands.RollBackAgent() | commands.RunDrill():
                self._waiting[event.header.id] = event
            case facts.MigrationStarted():
                self._answer_logged(body.request)
                self._begin(body, event)
            case facts.MigrationRefused():
                self._answer_logged(body.request)
            case facts.AlertFiring() if body.action == "hold" and not body.dry_run:
                self._hold(body)
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
            steps=plan(settings.strategy, start_timeout_s=settings.start_timeout_s),
            config=self._config.coordinator,
            strategy=settings.strategy,
            accept=settings.accept,
            sick_ok=settings.sick_ok,
        )

    def _hold(self, body: facts.AlertFiring) -> None:
        breach = Breach(
            by=f"rule {body.rule}", reason=body.summary, labels=body.labels, value=body.value,
            sample_time=body.sample_time,
        )  # fmt: skip
        for name in body.migrations:
            if name in self.migrations:
                self._holds += self.migrations[name].hold(breach)

    # --- deciding

    def decide(self, now: float) -> list[Emit]:
        """All that is to be sent now. To be asked once the log has been folded to its end, never before."""
        wanted, self._holds = self._holds, []
        for request, event in list(self._waiting.items()):
            if request not in self._answered:
                self._answered.add(request)
                wanted += self._answer(event, now)
        for migration in self.migrations.values():
            wanted += migration.decide(now)
        return wanted

    def snapshot(self) -> Emit | None:
        """What is folded so far, for the log, once that is worth it. What is in flight is read from the log itself."""
        if self.fleet.position - self._snapshot_at < SNAPSHOT_EVENTS:
            return None
        self._snapshot_at = self.fleet.position
        needed = [self._begun.get(name, 1) for name in self.migrations]
        needed += [event.header.seq for event in self._waiting.values()]
        body = self.fleet.snapshot(min(needed, default=self.fleet.position + 1) - 1)
        if len(body.state) > SNAPSHOT_BYTES:  # thousands of agents in flight at once: the log stays as long as it is
            return None
        return Emit(topics.FLEET_SNAPSHOT, body, f"snapshot/{body.through}")

    def next_deadline(self, now: float) -> float:
        return min((m.next_deadline(now) for m in self.migrations.values()), default=float("inf"))

    def _answer(self, event: Event, now: float) -> list[Emit]:
        body = event.body
        if isinstance(body, commands.RollBackAgent):
            return self._answer_rollback(body, event.header.id, now)
        if isinstance(body, commands.RunDrill):
            return [self._answer_drill(body, event.header.id, now)]
        assert isinstance(body, commands.Migrate)
        try:
            return [self._start(body, event, now)]
        except ConfigError as error:
            return [self._refuse(event.header.id, body.agent, body.to, str(error))]

    def _answer_rollback(self, body: commands.RollBackAgent, request: str, now: float) -> list[Emit]:
        breach = Breach(by="operator", reason=body.reason, sample_time=now)
        found = [m for m in self.migrations.values() if m.started.agent == body.agent]
        if now > body.deadline:
            return [self._refuse(request, body.agent, "", "the request's deadline has passed")]
        if not found:
            current = self.fleet.agents.get(body.agent)
            reason = (
                f"no migration of {body.agent} is in flight; to go back: interlock migrate {body.agent} --to REVISION"
                if current
                else f"there is no agent {body.agent!r}; {near(body.agent, self.fleet.agents)}"
            )
            return [self._refuse(request, body.agent, "", reason)]
        emits = [emit for migration in found for emit in migration.roll_back(breach, now)]
        if not emits:
            return [self._refuse(request, body.agent, "", "the migration has just ended")]
        return emits

    def _answer_drill(self, body: commands.RunDrill, request: str, now: float) -> Emit:
        """The host's command, or why there is none."""
        try:
            if now > body.deadline:
                raise ConfigError("the request's deadline has passed")
            config = self._load()
            agent = config.agents.get(body.agent)
            slot = self.fleet.agents.get(body.agent)
            if agent is None or slot is None:
                known = config.agents if agent is None else self.fleet.agents
                raise ConfigError(f"there is no agent {body.agent!r}", hint=near(body.agent, known))
            self._admit_host(agent)
            self._admit_alone(body.agent)
        except ConfigError as error:
            return self._refuse(request, body.agent, "", str(error))
        strategy = config.strategy(agent.strategy_name)
        slowest = max(revision.start_timeout_s for revision in agent.revisions.values())
        asked = commands.Drill(
            migration="", agent=body.agent, epoch=slot.epoch, deadline=now + DRILL_S + 2 * slowest,
            whole_host=body.whole_host,
            promise_s=getattr(strategy, "promise_s", PROMISE_S),
        )  # fmt: skip
        return Emit(topics.command(agent.host), asked, f"{request}{DRILL_ID}")

    def _start(self, body: commands.Migrate, event: Event, now: float) -> Emit:
        """MigrationStarted; ConfigError with the reason if it can't be."""
        if now > body.deadline:
            raise ConfigError("the request's deadline has passed", hint="is the coordinator overloaded? ask again")
        config = self._load()
        agent = config.agents.get(body.agent)
        if agent is None:
            raise ConfigError(f"there is no agent {body.agent!r}", hint=near(body.agent, config.agents))
        revision = agent.revisions.get(body.to)
        if revision is None:
            raise ConfigError(f"agent {body.agent} has no revision {body.to!r}", hint=near(body.to, agent.revisions))
        strategy = body.strategy or agent.strategy_name
        if strategy not in ("rapid", "staged"):
            raise ConfigError(f"there is no strategy {strategy!r}", hint="rapid or staged")
        permanent = self._admit(body, agent)
        # A log that began anew numbers from 1: never an epoch, or a migration's name, that the host has seen before.
        epoch = max(event.header.seq, self.fleet.agents[body.agent].epoch + 1)
        if body.accept not in ("", "cold", "hand-over"):
            raise ConfigError(f"there is no class of rollback {body.accept!r}", hint="cold or hand-over")
        settings = Settings(
            strategy=config.strategy(strategy), start_timeout_s=revision.start_timeout_s, accept=body.accept,
            sick_ok=bool(body.because),
        )  # fmt: skip
        migration = f"{body.agent}-{epoch}"
        started = facts.MigrationStarted(
            migration=migration, epoch=epoch, agent=body.agent, host=agent.host, previous=permanent,
            to=body.to, strategy=strategy, request=event.header.id, settings=msgspec.to_builtins(settings),
        )  # fmt: skip
        self._starting[event.header.id] = (body.agent, migration)
        return Emit(topics.migration_fact(body.agent), started, f"{migration}/started")

    def _admit(self, body: commands.Migrate, agent: AgentConfig) -> str:
        """The permanent revision, if the fleet is in a state to move this agent."""
        self._admit_host(agent)
        slot = self.fleet.agents.get(body.agent)
        if slot is None or not slot.permanent:
            raise ConfigError(
                f"host {agent.host} does not serve {body.agent} yet", hint="restart the host to add an agent"
            )
        self._admit_alone(body.agent)
        if slot.permanent == body.to:
            raise ConfigError(f"{body.agent} serves revision {body.to} already")
        for alert in self.fleet.alerts.values():
            if body.because and alert.labels.get("agent") == body.agent:
                continue  # it is about the sick old one, which is to be replaced
            if alert.action == "rollback" and not alert.dry_run and concerns(alert, body.agent, agent.host):
                raise ConfigError(
                    f"rule {alert.rule} fires already ({alert.summary or alert.labels})",
                    hint="mend that first: a bad candidate could not be told from it",
                )
        return slot.permanent

    def _admit_host(self, agent: AgentConfig) -> None:
        host = self.fleet.hosts.get(agent.host)
        if host is None or not host.up:
            raise ConfigError(f"host {agent.host} is not up", hint=f"start it: interlock host --name {agent.host}")

    def _admit_alone(self, name: str) -> None:
        """Nothing else moves the agent."""
        in_flight = [m.id for m in self.migrations.values() if m.started.agent == name]
        in_flight += [migration for agent, migration in self._starting.values() if agent == name]
        if in_flight:
            raise ConfigError(
                f"migration {in_flight[0]} of {name} is in flight",
                hint=f"wait for it, or: interlock rollback {name}",
            )

    @staticmethod
    def _refuse(request: str, agent: str, to: str, reason: str) -> Emit:
        refused = facts.MigrationRefused(request=request, agent=agent, to=to, reason=reason)
        return Emit(topics.migration_fact(agent if _plain(agent) else "unknown"), refused, f"{request}/refused")


def concerns(alert: Alert, agent: str, host: str) -> bool:
    """The alert is about this agent's permanent revision, or about its host as a whole."""
    labels = alert.labels
    if labels.get("role") == "candidate" or not ({"agent", "host"} & set(labels)):
        return False
    return labels.get("agent", agent) == agent and labels.get("host", host) == host


def near(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"


def _plain(name: str) -> bool:
    try:
        topics.check_name(name, where="")
    except ConfigError:
        return False
    return True
