"""The fleet as the event log tells it: a fold over facts. Pure: the same events give the same state.

What an event mentions and nobody announced (a log that was cut, a host that never said it is up) is made up as far as
the event tells; an event that comes late changes nothing that a newer state has settled. What a host says of an agent
that it does not have changes nothing either; see ownership.py.
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from interlock.broker import facts
from interlock.broker.commands import Breach
from interlock.broker.fields import Evidence
from interlock.broker.wire import Event
from interlock.coordinator.ownership import Claims, Places, owner, speaker

SNAPSHOT_BYTES = 900_000  # of a packed fleet: it travels in one event, of 1 MiB at most
STATE_BYTES = 64 << 20  # of an unpacked one: whoever sends more is none of ours
KEPT_WAVES = 100  # ended ones that stay in memory, with their tables
KEPT_MIGRATIONS = 1000  # ended ones, and such as nobody began, that stay in memory; a coordinator folds for months

_log = logging.getLogger(__name__)

AlertKey = tuple[str, tuple[tuple[str, str], ...]]


@dataclass
class Host:
    """`up`: it said so and did not say goodbye. A host that was killed can't: see whether it still sends telemetry."""

    name: str
    up: bool = False
    control: str = ""
    pid: int = 0
    boot: str = ""
    since: float = 0.0
    agents: list[str] = field(default_factory=list)


@dataclass
class Instance:
    id: str
    revision: str
    role: str
    pid: int
    started: float


@dataclass
class Drill:
    """A rehearsed rollback to `revision`: seconds of each level, by its number; `time`: when, seconds since 1970."""

    revision: str
    seconds: dict[str, float]
    problems: list[str]
    time: float


@dataclass
class Agent:
    """An agent's slot as its host last told it. `migration`: the last one that touched it, in flight or not."""

    name: str
    host: str = ""
    state: str = "unknown"
    permanent: str = ""
    candidate: str | None = None
    share: float = 0.0
    endpoint: str = ""
    epoch: int = 0
    migration: str | None = None
    instances: dict[str, Instance] = field(default_factory=dict)
    drill: Drill | None = None
    hands_over: bool = False  # it keeps state in memory
    moved: bool = False  # a migration has brought it to this host: where it is, the fleet file may not know

    def move_to(self, host: str, revision: str, endpoint: str) -> None:
        self.host, self.moved, self.permanent, self.endpoint = host, True, revision, endpoint
        self.candidate, self.share, self.state = None, 0.0, "serving"
        self.instances.clear()


@dataclass
class Migration:
    """`outcome` is empty while nothing is settled; `ended`: the coordinator closed it (a host may settle it before).

    times: seconds since 1970 of "started", each stage by its name, "held", "rolled-back" and "ended".
    """

    id: str
    agent: str = ""
    host: str = ""
    epoch: int = 0
    previous: str = ""
    to: str = ""
    strategy: str = ""
    request: str = ""
    stage: str = ""
    note: str = ""
    outcome: str = ""
    ended: bool = False
    decided_by: str = ""
    reason: str = ""
    evidence: Evidence = field(default_factory=dict)
    rollback: dict[str, Any] | None = None
    times: dict[str, float] = field(default_factory=dict)
    target: str = ""  # the host that the agent moves to
    phase: str = "running"  # while it is in flight, as the coordinator says; see phases.py
    blame: str = ""  # of a held one: whose fault it is, if not the candidate's
    deviations: list[str] = field(default_factory=list)

    @property
    def in_flight(self) -> bool:
        """Nothing settled it yet, or it is held: it can still be rolled back."""
        return self.outcome in ("", "held")

    @property
    def announced(self) -> bool:
        """The coordinator has said that it began; of one that was not, a host may have made up the name."""
        return "started" in self.times


@dataclass
class Alert:
    rule: str
    labels: dict[str, str]
    value: float
    action: str
    summary: str
    dry_run: bool
    since: float
    migrations: list[str] = field(default_factory=list)
    sample_time: float = 0.0
    blamed: dict[str, facts.Blame] = field(default_factory=dict)


@dataclass
class Wave:
    """Many agents that are moved together. `outcome` is empty while it is in flight; `results` are of its end."""

    id: str
    by: str
    to: dict[str, str]  # revisions by agent
    because: str = ""
    started: float = 0.0
    phase: str = "moving"
    outcome: str = ""
    reason: str = ""
    ended: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)


class _State(msgspec.Struct):
    hosts: list[Host]
    agents: list[Agent]
    migrations: list[Migration]
    alerts: list[Alert]
    waves: list[Wave] = []


# what an operator's word makes of a migration
_LED = {
    "approve": "running", "pause": "paused", "resume": "running", "hold": "held", "abort": "rolling-back",
    "commit": "running",
}  # fmt: skip
_states = msgspec.msgpack.Decoder(_State)


class Fleet:
    """`apply` takes any event; what is no fact about hosts, agents, migrations or alerts is passed over.

    placed: where the fleet file has each agent; None: no file is known, and an agent belongs to whoever speaks first.
    """

    def __init__(self, placed: Places | None = None) -> None:
        self.placed = placed
        self.claims = Claims()  # of hosts, on what is not theirs
        self.hosts: dict[str, Host] = {}
        self.agents: dict[str, Agent] = {}
        self.migrations: dict[str, Migration] = {}
        self.alerts: dict[AlertKey, Alert] = {}
        self.waves: dict[str, Wave] = {}
        self.position = 0  # the largest sequence number seen
        self._restored = 0  # what a snapshot stood for

    def apply(self, event: Event) -> bool:
        """False: a host said it of what is not its own, and nobody should believe it."""
        if isinstance(event.body, facts.FleetSnapshot):
            self._restore(event.body)
            return True
        believed = self._is_believed(event)
        if 0 < event.header.seq <= self._restored:
            return believed  # the snapshot stands for it
        self.position = max(self.position, event.header.seq)
        if believed:
            self._take(event)
        return believed

    def _take(self, event: Event) -> None:
        body, time = event.body, event.header.time
        match body:
            case facts.HostUp() | facts.HostDown():
                self._host_changed(body, time)
            case facts.InstanceStarted() | facts.InstanceStopped():
                self._instance_changed(body)
            case facts.SlotChanged():
                self._slot_changed(body)
            case facts.MigrationStarted() | facts.StageEntered():
                self._advanced(body, time)
            case facts.MigrationHeld() | facts.MigrationEnded():
                self._decided(body, time)
            case facts.MigrationWaiting() | facts.Steered() | facts.Deviation():
                self._steered(body, time)
            case facts.StepDone() | facts.DrillDone():
                self._did(body, time)
            case facts.RolledBack() | facts.RollBackFailed():
                self._rolled_back(body, time)
            case facts.AlertFiring() | facts.AlertResolved():
                self._alert_changed(body, time)
            case facts.WaveStarted() | facts.WaveChanged() | facts.WaveEnded():
                self._wave_changed(body, time)

    def in_flight(self, agent: str | None = None) -> list[Migration]:
        """Migrations that nothing settled yet, the oldest first; of one agent or of all."""
        return [m for m in self.migrations.values() if m.in_flight and agent in (None, m.agent)]

    def last_migration(self, agent: str) -> Migration | None:
        return next((m for m in reversed(self.migrations.values()) if m.agent == agent), None)

    def snapshot(self, start: int) -> facts.FleetSnapshot:
        """All of this in one event. `start`: the number up to which nobody needs the events themselves any more.

        The oldest ended migrations are left out where it would be too large.
        """
        ended = [number for number, migration in self.migrations.items() if migration.ended]
        left_out: set[str] = set()
        while True:
            kept = [migration for number, migration in self.migrations.items() if number not in left_out]
            state = _State(
                hosts=list(self.hosts.values()), agents=list(self.agents.values()), migrations=kept,
                alerts=list(self.alerts.values()), waves=list(self.waves.values()),
            )  # fmt: skip
            packed = zlib.compress(msgspec.msgpack.encode(state))
            if len(packed) <= SNAPSHOT_BYTES or not ended:
                return facts.FleetSnapshot(through=self.position, start=min(start, self.position), state=packed)
            half = len(ended) // 2 + 1
            left_out |= set(ended[:half])
            ended = ended[half:]

    def _restore(self, snapshot: facts.FleetSnapshot) -> None:
        """Take over a snapshot that stands for events not seen; one that can't be read changes nothing."""
        if snapshot.start <= self.position:
            return
        try:
            state = _states.decode(zlib.decompressobj().decompress(snapshot.state, STATE_BYTES))
        except (zlib.error, msgspec.DecodeError, RecursionError, ValueError) as error:
            _log.error("a snapshot of the fleet can't be read: %s", error)
            return
        self.hosts = {host.name: host for host in state.hosts}
        self.agents = {agent.name: agent for agent in state.agents}
        self.migrations = {migration.id: migration for migration in state.migrations}
        self.alerts = {(alert.rule, tuple(sorted(alert.labels.items()))): alert for alert in state.alerts}
        self.waves = {wave.id: wave for wave in state.waves}
        self.position = self._restored = snapshot.through

    def to_json(self) -> dict[str, Any]:
        """Plain values, fit for `json.dumps`."""
        return {
            "position": self.position,
            "hosts": {name: asdict(host) for name, host in sorted(self.hosts.items())},
            "agents": {name: asdict(agent) for name, agent in sorted(self.agents.items())},
            "migrations": {
                name: asdict(migration) | {"in_flight": migration.in_flight}
                for name, migration in self.migrations.items()
            },
            "waves": {name: asdict(wave) for name, wave in self.waves.items()},
            "alerts": [msgspec.to_builtins(alert) for alert in self.alerts.values()],
            "claims": self.claims.to_json(),
        }

    # --- whose word counts

    def _is_believed(self, event: Event) -> bool:
        host = speaker(event)
        if host is None:
            return True
        agent = getattr(event.body, "agent", "")
        if host and (not agent or self._speaks_for(host, agent, getattr(event.body, "migration", None) or "")):
            return True
        moves = self.migrations.get(self._last(agent))
        if not (moves is not None and moves.target and moves.target == host):
            self.claims.count(event, agent)
            return False
        # of the candidate that it runs; only what it was asked itself is the agent's affair
        return getattr(event.body, "step", "") == "receive" or isinstance(event.body, facts.CommandRefused)

    def _speaks_for(self, host: str, agent: str, number: str) -> bool:
        """A migration that began is its own host's affair, also if the agent has another place in the file by now."""
        named = self.migrations.get(number)
        if named is not None and named.agent not in ("", agent):
            return False
        if named is not None and named.announced:
            return named.host == host
        flying = self.migrations.get(self._last(agent))
        if not number and flying is not None and flying.in_flight and (flying.agent, flying.host) == (agent, host):
            return True
        return self.owns(host, agent)

    def _last(self, agent: str) -> str:
        known = self.agents.get(agent)
        return (known.migration if known is not None else None) or ""

    def owns(self, host: str, agent: str) -> bool:
        """The host has the agent, as far as anybody knows."""
        known = self.agents.get(agent)
        if known is not None and known.moved:  # the coordinator's order holds before the file
            return known.host == host
        return owner(agent, self.placed, known.host if known is not None else "") in (host, None)

    # --- inside

    def _host(self, name: str) -> Host:
        return self.hosts.setdefault(name, Host(name))

    def _agent(self, name: str, host: str = "") -> Agent:
        agent = self.agents.setdefault(name, Agent(name))
        if agent.moved:
            return agent  # only a commit that the coordinator ordered takes it elsewhere
        if host and agent.host not in ("", host):  # nothing that it was there holds here
            agent = self.agents[name] = Agent(name, migration=agent.migration)
        agent.host = host or agent.host
        return agent

    def _migration(self, number: str, agent: str) -> Migration:
        migration = self.migrations.get(number)
        if migration is None:
            migration = self.migrations[number] = Migration(number, agent)
            self._forget()
        migration.agent = migration.agent or agent
        if agent:
            self._agent(agent).migration = number
        return migration

    def _forget(self) -> None:
        ended = [number for number, each in self.migrations.items() if each.ended or not each.announced]
        for number in ended[: max(0, len(ended) - KEPT_MIGRATIONS)]:
            del self.migrations[number]

    def _host_changed(self, body: facts.HostUp | facts.HostDown, time: float) -> None:
        host = self._host(body.host)
        if isinstance(body, facts.HostUp):
            if (body.pid, body.boot) != (host.pid, host.boot):
                self._instances_gone(body.host)
            host.up, host.control, host.pid, host.boot = True, body.control, body.pid, body.boot
            host.agents = [name for name in body.agents if self.owns(body.host, name)]
            for name in host.agents:
                self._agent(name, body.host)
        else:
            host.up = False
            self._instances_gone(body.host)
        host.since = time

    def _instances_gone(self, host: str) -> None:
        """Instances die with their host process."""
        for agent in self.agents.values():
            if agent.host == host:
                agent.instances.clear()

    def _instance_changed(self, body: facts.InstanceStarted | facts.InstanceStopped) -> None:
        instances = self._agent(body.agent, body.host).instances
        if isinstance(body, facts.InstanceStarted):
            instances[body.instance] = Instance(body.instance, body.revision, body.role, body.pid, body.started)
        else:
            instances.pop(body.instance, None)

    def _slot_changed(self, body: facts.SlotChanged) -> None:
        agent = self._agent(body.agent, body.host)
        if agent.host != body.host:
            return  # it was moved away from there
        if body.epoch < agent.epoch and body.migration is not None:
            return  # of a migration that a newer one has followed
        committed = agent.permanent not in ("", body.permanent)
        agent.state, agent.permanent, agent.candidate = body.state, body.permanent, body.candidate
        agent.share, agent.epoch = body.share, max(agent.epoch, body.epoch)
        agent.endpoint = body.endpoint or agent.endpoint
        agent.hands_over = body.hands_over or (agent.hands_over and body.state == "starting")
        if body.migration is not None:
            self._migration(body.migration, body.agent).host = body.host
        if committed and body.candidate is None:
            for instance in agent.instances.values():
                if instance.revision == body.permanent:
                    instance.role = "permanent"

    def _advanced(self, body: facts.MigrationStarted | facts.StageEntered, time: float) -> None:
        if isinstance(body, facts.MigrationStarted) and self._is_made_up(body):
            del self.migrations[body.migration]
        migration = self._migration(body.migration, body.agent)
        if isinstance(body, facts.MigrationStarted):
            migration.host, migration.epoch, migration.strategy = body.host, body.epoch, body.strategy
            migration.previous, migration.to, migration.request = body.previous, body.to, body.request
            migration.target = body.target
            migration.times["started"] = time
            self._agent(body.agent, body.host)
            return
        migration.times.setdefault(body.stage, time)
        if migration.in_flight:
            migration.stage, migration.note = body.stage, body.note

    def _is_made_up(self, body: facts.MigrationStarted) -> bool:
        """A host spoke of a migration by this name before there was one."""
        known = self.migrations.get(body.migration)
        return known is not None and (known.agent, known.host) not in ((body.agent, body.host), (body.agent, ""))

    def _decided(self, body: facts.MigrationHeld | facts.MigrationEnded, time: float) -> None:
        migration = self._migration(body.migration, body.agent)
        if isinstance(body, facts.MigrationEnded):
            migration.ended, migration.outcome = True, body.outcome
            migration.epoch = body.epoch or migration.epoch
            migration.decided_by, migration.reason, migration.evidence = body.decided_by, body.reason, body.evidence
            migration.times["ended"] = time
        elif migration.in_flight:
            migration.outcome = migration.phase = "held"
            migration.blame = body.blame
            self._blame(migration, body.breach)
            migration.times["held"] = time

    def _steered(self, body: facts.MigrationWaiting | facts.Steered | facts.Deviation, time: float) -> None:
        migration = self._migration(body.migration, body.agent)
        if isinstance(body, facts.Deviation):
            migration.deviations.append(f"{body.what}; because: {body.because} ({body.by})")
            return
        if not migration.in_flight:
            return
        if isinstance(body, facts.MigrationWaiting):
            migration.phase = "waiting"
            migration.times["waiting"] = time
            return
        migration.phase = _LED[body.action]
        migration.blame = ""
        if body.action == "hold":
            migration.outcome, migration.decided_by, migration.reason = "held", "operator hold", body.reason
        elif migration.outcome == "held":  # whatever else was said, it is held no more
            migration.outcome, migration.decided_by, migration.reason = "", "", ""
        migration.times[migration.phase] = time

    def _did(self, body: facts.StepDone | facts.DrillDone, time: float) -> None:
        """A commit settles it, whether or not a coordinator lives to say so."""
        if isinstance(body, facts.DrillDone):
            drill = Drill(body.revision, dict(body.seconds), list(body.problems), time)
            self._agent(body.agent, body.host).drill = drill
            return
        migration = self._migration(body.migration, body.agent)
        if body.step == "receive":
            return
        if body.step == "commit" and migration.target and body.host == migration.host:
            agent = self._agent(body.agent)  # the coordinator ordered it, and the host that had it gave it away
            agent.move_to(migration.target, migration.to, str(body.evidence.get("endpoint", "")))
        migration.host = migration.host or body.host
        if body.step == "commit" and migration.in_flight:
            migration.outcome = "committed"
            migration.times["committed"] = time

    def _rolled_back(self, body: facts.RolledBack | facts.RollBackFailed, time: float) -> None:
        migration = self._migration(body.migration, body.agent)
        migration.host = body.host
        if isinstance(body, facts.RolledBack):
            migration.rollback = msgspec.to_builtins(body)
            migration.times["rolled-back"] = time
        if migration.ended:
            return
        migration.outcome = "rolled-back" if isinstance(body, facts.RolledBack) else "held" if body.kept else "failed"
        self._blame(migration, body.breach)
        if isinstance(body, facts.RollBackFailed):
            migration.reason = f"the roll back failed: {body.reason} (it was to undo: {body.breach.reason})"

    @staticmethod
    def _blame(migration: Migration, breach: Breach) -> None:
        migration.decided_by, migration.reason = breach.by, breach.reason

    def _wave_changed(self, body: facts.WaveStarted | facts.WaveChanged | facts.WaveEnded, time: float) -> None:
        if isinstance(body, facts.WaveStarted):
            to = {member.agent: member.to for member in body.members}
            self.waves[body.wave] = Wave(body.wave, body.by, to, body.because, time)
            ended = [wave.id for wave in self.waves.values() if wave.outcome]
            for gone in ended[: max(0, len(ended) - KEPT_WAVES)]:
                del self.waves[gone]
            return
        wave = self.waves.setdefault(body.wave, Wave(body.wave, "", {}))
        if isinstance(body, facts.WaveChanged):
            if wave.outcome or wave.phase == "rolling-back":
                return
            wave.phase, wave.reason = body.phase, f"{body.by}: {body.reason}"
        else:
            wave.phase, wave.outcome, wave.reason, wave.ended = "ended", body.outcome, body.reason, time
            wave.results = [msgspec.to_builtins(result) for result in body.members]

    def _alert_changed(self, body: facts.AlertFiring | facts.AlertResolved, time: float) -> None:
        key = (body.rule, tuple(sorted(body.labels.items())))
        if isinstance(body, facts.AlertResolved):
            self.alerts.pop(key, None)
            return
        before = self.alerts.get(key)
        self.alerts[key] = Alert(
            body.rule,
            dict(body.labels),
            body.value,
            body.action,
            body.summary,
            body.dry_run,
            before.since if before else time,
            list(body.migrations),
            body.sample_time,
            dict(body.blamed),
        )
