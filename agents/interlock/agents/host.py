"""A host: the process that supervises the agents of one machine (or part of one), and decides alone where it must.

It needs the broker for telemetry and commands, but not to serve, to notice that a candidate died, or to roll back:
those are decided here, and a rollback also arrives directly at the control endpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from interlock.agents import gpu_lease
from interlock.agents.arrivals import FROM, here
from interlock.agents.cgroup import with_cgroups
from interlock.agents.folders import finish_folders
from interlock.agents.front import open_gateway
from interlock.agents.journal import Journal
from interlock.agents.launch import Place
from interlock.agents.moves import Moves
from interlock.agents.process import guarded, host_marker, kill_marked
from interlock.agents.revisions import RevisionStore
from interlock.agents.slot import Slot
from interlock.agents.slot_io import Ask, AskRollBack, Renew, Row, State
from interlock.agents.slot_shell import SlotShell, import_rest
from interlock.agents.surroundings import Surroundings
from interlock.agents.vram_desk import Desk
from interlock.broker import commands, facts, signing, topics
from interlock.broker.client import Bus, open_bus
from interlock.broker.config import AgentConfig, FleetConfig, load_fleet, source_of
from interlock.broker.direct import serve_direct
from interlock.broker.errors import ConfigError, Refused
from interlock.broker.facts import Fact
from interlock.broker.gate import Gate
from interlock.broker.role import Ready, held
from interlock.broker.samples import Labels
from interlock.broker.security import Security, load_security
from interlock.broker.shielding import start_shielded
from interlock.broker.sockets import open_sockets
from interlock.broker.wire import Event, decode_body, encode

if TYPE_CHECKING:
    from interlock.agents.resources import Card

log = logging.getLogger("interlock.host")

MAX_TROUBLE = 500  # characters of why an agent doesn't serve, where many are listed
FIRST_NEWS_S = 15.0  # a host says ready once every agent is healthy or has failed to start, or this much later
SETTLE_S = 5.0  # a command is marked as taken once its slot has written it, or this much later
GIVEN_KEPT = 10_000  # ids of commands that this process gave to a slot: as many as the journal has results
POSITION = "events"  # mark in the journal: up to where commands were taken


class Host:
    """The agents of one host, and what speaks to them."""

    def __init__(
        self, name: str, fleet: FleetConfig, bus: Bus, journal: Journal, security: Security | None = None
    ) -> None:
        self.name = name
        self.fleet = fleet
        self.bus = bus
        self.journal = journal
        self.security = security
        self.gate = None if security is None else Gate(security, f"host {name}")
        self.slots: dict[str, SlotShell] = {}
        self.moves: Moves | None = None
        self.desk: Desk | None = None
        self._began = time.time()
        self._given: dict[str, None] = {}  # by id, the oldest first
        self._refusals: dict[str, facts.CommandRefused] = {}  # not in the journal yet

    def publish(self, fact: Fact) -> None:
        if isinstance(fact, facts.CommandRefused):
            self._refusals[fact.command] = fact
        self.bus.post(topics.host_fact(self.name), fact)

    # --- commands

    async def follow_commands(self) -> None:
        """Take commands and rollbacks from the log, each once, from where the last run of this host stopped."""
        after = int(await trio.to_thread.run_sync(self.journal.mark, POSITION) or 0)
        prefixes = [topics.command(self.name), topics.rollback(self.name), topics.ALL_HOSTS]
        async with self.bus.events(prefixes, after=after) as feed:
            async for event in feed:
                await self._take(event)
                slot = self.slots.get(getattr(event.body, "agent", ""))
                if slot is not None:
                    with trio.move_on_after(SETTLE_S):
                        await slot.settled()
                await self._keep_refusals()
                await trio.to_thread.run_sync(self.journal.set_mark, POSITION, event.header.seq)

    async def _keep_refusals(self) -> None:
        """A refused command is not done later, although its state fits then: whoever repeats it is told the same."""
        for id, refusal in list(self._refusals.items()):
            await trio.to_thread.run_sync(self.journal.remember_refused, id, encode(refusal))
            del self._refusals[id]

    def _check(self, event: Event) -> None:
        """Whoever asked proves it to this host itself, not to the broker. Refused otherwise."""
        if self.security is not None:
            own = event.topic in (topics.command(self.name), topics.rollback(self.name))
            if not own and not (event.topic == topics.ALL_HOSTS and isinstance(event.body, commands.RollCall)):
                raise Refused(f"{event.topic} is not for host {self.name}")
            signing.check(event, self.security.roll, now=time.time())

    async def _take(self, event: Event) -> None:
        try:
            self._check(event)
        except Refused as refused:
            log.warning("refused event %d of the log, %s: %s", event.header.seq, type(event.body).__name__, refused)
            self.bus.receipt(event, str(refused))
            return
        body = event.body
        if isinstance(body, commands.RollCall):
            late = time.time() - body.deadline
            self.bus.receipt(event, f"its deadline passed {late:.0f} s ago" if late > 0 else "")
            return
        self.bus.receipt(event)
        slot = self.slots.get(getattr(body, "agent", ""))
        match body:
            case commands.RollBack() if slot is not None:
                slot.give(AskRollBack(body))
            case (
                commands.Receive()
                | commands.Prepare()
                | commands.Drill()
                | commands.StartCandidate()
                | commands.Shadow()
                | commands.HandOver()
                | commands.CutOver()
                | commands.Commit()
            ):
                await self._take_command(body, event.header.id)
            case _:
                log.warning("%s is no command for a host", type(body).__name__)

    async def _take_command(self, body: commands.HostCommand, id: str) -> None:
        """Once: a repeated one is answered with its result, or with nothing while it is under way."""
        await self._keep_refusals()
        done = await trio.to_thread.run_sync(self.journal.done, id)
        slot = self.slots.get(body.agent)
        if done is not None:
            self.bus.post(topics.host_fact(self.name), decode_body(done), id=f"{id}/done")
        elif isinstance(body, commands.Receive) and self.moves is not None:
            if self._is_new(id):
                self.moves.begin_to_receive(body, id)
        elif slot is None:
            self._refuse(body, id, f"there is no agent {body.agent!r} on host {self.name}")
        elif self._is_new(id):
            slot.give(Ask(body, id))

    def _is_new(self, id: str) -> bool:
        """Whether this process has not been given the command yet."""
        if id in self._given:
            return False
        self._given[id] = None
        if len(self._given) > GIVEN_KEPT:
            del self._given[next(iter(self._given))]
        return True

    def _refuse(self, body: commands.HostCommand, asked: str, reason: str) -> None:
        refused = facts.CommandRefused(
            host=self.name, agent=body.agent, migration=body.migration, command=asked, reason=reason
        )
        self.publish(refused)

    def accept(self, event: Event) -> None:
        """What comes directly: rollbacks and leases, nothing else."""
        self._check(event)
        body = event.body
        if not isinstance(body, commands.RollBack | commands.RenewLease):
            raise Refused(f"{type(body).__name__} does not come this way", hint="publish it through the broker")
        if self.security is not None and isinstance(body, commands.RenewLease) and event.header.time < self._began:
            raise Refused("it was sent before this host started, and may have been taken then")
        slot = self.slots.get(body.agent)
        if slot is None:
            raise Refused(f"there is no agent {body.agent!r} on host {self.name}")
        slot.give(AskRollBack(body) if isinstance(body, commands.RollBack) else Renew(body))

    # --- telemetry

    async def report(self) -> None:
        """Samples of all agents, faster while one of them is on trial."""
        publisher = self.bus.telemetry(self.name, "host")
        while True:
            found: dict[Labels, float] = {}
            ended: list[Labels] = []
            for slot in self.slots.values():
                some, gone = slot.samples()
                found |= some
                ended += gone
            if self.desk is not None:
                some, gone = self.desk.samples()
                found |= some
                ended += gone
            publisher.send(found, time=time.time(), ended=ended)
            fast = any(slot.on_trial for slot in self.slots.values())
            await trio.sleep(self.fleet.monitor.migrating_s if fast else self.fleet.monitor.idle_s)


# --- start and end


async def run_host(fleet: FleetConfig, name: str, ready: Ready) -> None:
    """Serve the agents of host `name` until cancelled. ConfigError or InUse if it can't begin."""
    config = fleet.hosts.get(name)
    if config is None:
        known = ", ".join(sorted(fleet.hosts)) or "none"
        raise ConfigError(f"there is no host {name!r}", where=fleet.path or "fleet", hint=f"known: {known}")
    state = fleet.state_dir / f"host-{name}"
    security = load_security(fleet, f"host/{name}")
    with held(state / "lock", f"host {name}"):
        marker = host_marker(state)
        left = await kill_marked(marker)
        if left:
            log.warning("%d processes of an earlier run of this host were still there; they are ended now", left)
        for agent in await trio.to_thread.run_sync(finish_folders, state / "data"):
            log.info("%s: its data had come from another host, and is in place now", agent)
        journal = await trio.to_thread.run_sync(Journal.open, state / "host.sqlite")
        try:
            with run_folder(state) as run_dir:
                wanted = config.cgroups == "auto"
                async with with_cgroups(marker, wanted=wanted) as lacking, guarded(marker), open_sockets() as sockets:
                    if lacking:
                        log.info("instances get no cgroups of their own: %s", lacking)
                    environment = _environment(fleet) | {gpu_lease.ENVIRONMENT: str(run_dir / "gpu")}
                    place = Place(sockets, marker, run_dir, state / "log", state / "data", fleet.folder, environment)
                    outbox = state / "outbox"
                    async with open_bus(fleet.broker, f"host/{name}", security=security, outbox=outbox) as bus:
                        await _serve(Host(name, fleet, bus, journal, security), state, place, ready)
        finally:
            await trio.to_thread.run_sync(journal.close)


async def _serve(host: Host, state: Path, place: Place, ready: Ready) -> None:
    """Gateways and instances outlive the cancellation that ends the rest: what is in flight is answered first."""
    async with trio.open_nursery() as outer:
        living: trio.Nursery = await outer.start(_shielded)
        try:
            around = _surroundings(host, state, place, living)
            host.desk = Desk(host.bus, host.name, place.run_dir / "gpu", partial(_holder, host, place.marker))
            host.moves = Moves(host, host.bus.sockets, around)
            await trio.to_thread.run_sync(_collect_revisions, host, around.store)
            for agent, config in sorted((await trio.to_thread.run_sync(agents_here, host)).items()):
                await _open_slot(host, around, agent, config)
            known = list(host.slots.values())  # others may arrive meanwhile, and run by themselves
            async with trio.open_nursery() as nursery:
                if host.gate is not None:
                    await nursery.start(host.gate.serve, host.bus.sockets)
                direct = partial(serve_direct, gate=host.gate)
                control = await nursery.start(
                    direct, host.bus.sockets, host.fleet.hosts[host.name].control, host.accept
                )
                await nursery.start(host.moves.run)
                await nursery.start(host.desk.run)
                host.publish(
                    facts.HostUp(host=host.name, control=control, pid=os.getpid(), boot=boot_id(), agents=_own(host))
                )
                # first those whose migration is to be undone: they are promised back within 5 s
                for slot in sorted(known, key=lambda slot: slot.slot.row.state is State.SERVING):
                    nursery.start_soon(slot.run)
                    slot.begin()
                nursery.start_soon(host.follow_commands)
                nursery.start_soon(host.report)
                with trio.move_on_after(FIRST_NEWS_S):
                    for slot in known:
                        await slot.first_news.wait()
                ready(_lacking(host))
                up = [name for name, slot in sorted(host.slots.items()) if slot.slot.permanent_up]
                log.info("host %s serves %s", host.name, ", ".join(up) or "no agent yet")
                await trio.to_thread.run_sync(import_rest)
        finally:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as ending:
                    for slot in host.slots.values():
                        ending.start_soon(slot.end)
                    if host.moves is not None:
                        ending.start_soon(host.moves.guests.end)
                living.cancel_scope.cancel()
            host.publish(facts.HostDown(host=host.name))


def _own(host: Host) -> list[str]:
    """The agents that are here, and not only on their way to or from here."""
    elsewhere = (State.ARRIVING, State.FORWARDING)
    return [name for name, slot in sorted(host.slots.items()) if slot.slot.row.state not in elsewhere]


def agents_here(host: Host) -> dict[str, AgentConfig]:
    """By the fleet file, and by the journal, which holds before it: who was moved here, or away and is forwarded to.

    Forwarding ends once the fleet file says that the agent is elsewhere, and names no endpoint of it here any more.
    """
    found = host.fleet.agents_of(host.name)
    for agent, row in host.journal.slots().items():
        config = host.fleet.agents.get(agent)
        if config is None or config.host == host.name:
            continue
        if row.state is State.FORWARDING and host.name not in config.endpoints:
            host.journal.drop_slot(agent, f"the fleet file says that it is on {config.host}: no more forwarding")
            log.info("%s: it is on host %s, and nothing is forwarded there any more", agent, config.host)
        elif row.state is State.FORWARDING or host.journal.mark(f"{FROM}{agent}"):
            found[agent] = here(config, host.name)
    return found


def _lacking(host: Host) -> dict[str, str]:
    """The agents that don't serve, and why."""
    return {
        name: f"revision {slot.slot.row.permanent}: {slot.trouble}"[:MAX_TROUBLE]
        for name, slot in sorted(host.slots.items())
        if not slot.slot.permanent_up and name in _own(host)
    }


async def _shielded(*, task_status: trio.TaskStatus[trio.Nursery]) -> None:
    async with trio.open_nursery() as nursery:
        await start_shielded(nursery.cancel_scope, task_status, nursery)
        await trio.sleep_forever()


def _surroundings(host: Host, state: Path, place: Place, nursery: trio.Nursery) -> Surroundings:
    numbers = itertools.count(1)
    fleet = host.fleet
    return Surroundings(
        host=host.name,
        place=place,
        store=RevisionStore(state / "revisions"),
        journal=host.journal,
        publish=host.publish,
        load=(lambda: load_fleet(fleet.path)) if fleet.path else (lambda: fleet),
        backups=state / "backups",
        next_number=lambda: next(numbers),
        nursery=nursery,
        cards=lambda agent: _read_cards(host, agent),
        neighbours=lambda: list(host.slots.values()),
    )


async def _read_cards(host: Host, agent: str) -> list[Card] | None:
    from interlock.agents.measured import read_cards

    cards = await read_cards(host.bus, host.name, agent)
    return cards if host.desk is None else host.desk.in_preflight(cards, agent)


def _holder(host: Host, own: str, marker: str) -> tuple[str, str] | None:
    """Agent and revision of an instance of this host by the marker in its environment."""
    of, _, name = marker.partition(":")
    if of != own:
        return None
    running = [instance for slot in host.slots.values() for instance in slot.instances.values()]
    if host.moves is not None:
        running += [guest.instance for guest in host.moves.guests.running.values()]
    found = [instance for instance in running if instance.name == name]
    return (found[0].agent, found[0].view.revision) if found else None


async def _open_slot(host: Host, around: Surroundings, agent: str, config: AgentConfig) -> None:
    """The slot as the journal has it; a new agent's first revision is recorded. The gateway binds at once."""
    row = await trio.to_thread.run_sync(host.journal.slot, agent)
    if row is None:
        row = await trio.to_thread.run_sync(_first_row, host, around.store, agent, config)
    gateway = open_gateway(agent, config, around.place.sockets)
    endpoint = await around.nursery.start(gateway.run)
    host.slots[agent] = shell = SlotShell(Slot(host.name, row, endpoint=endpoint), config, gateway, around)
    if row.state in (State.ARRIVING, State.FORWARDING):
        shell.first_news.set()


def _collect_revisions(host: Host, store: RevisionStore) -> None:
    """Remove what was recorded for migrations that came to nothing; whatever was permanent once stays."""
    keep: set[str] = set()
    for agent, row in host.journal.slots().items():
        keep |= {row.permanent_digest, row.candidate_digest or "", *host.journal.names(agent).values()}
    for digest in store.collect(keep):
        log.info("revision %s is removed: it was never permanent", digest[:12])


def _first_row(host: Host, store: RevisionStore, agent: str, config: AgentConfig) -> Row:
    revision = config.revisions[config.serve]
    where = f"{host.fleet.path or 'fleet'}: agents.{agent}.revisions.{config.serve}"
    source = source_of(host.fleet, revision, where=where) if revision.source else None
    recorded = store.record(agent, config.serve, revision, source)
    row = Row(agent, config.serve, recorded.digest, state=State.SERVING)
    host.journal.save_slot(row, f"first revision {config.serve}")
    return row


def _environment(fleet: FleetConfig) -> dict[str, str]:
    """What every instance finds in its environment besides its own: where the simulated GPUs are, if there are any."""
    if fleet.monitor.gpu != "simulated":
        return {}
    from interlock.broker.simgpu import create_cards

    folder = fleet.state_dir / "simgpu"
    create_cards(folder, fleet.monitor.simulated)
    return {"INTERLOCK_SIMGPU": str(folder)}


class run_folder:
    """A short, private folder for sockets, the same after each restart of the host; removed at the end."""

    def __init__(self, state: Path) -> None:
        digest = hashlib.sha256(str(state.resolve()).encode()).hexdigest()[:12]
        self.path = Path(tempfile.gettempdir()) / f"interlock-{os.getuid()}-{digest}"

    def __enter__(self) -> Path:
        if self.path.is_symlink() or (self.path.exists() and self.path.stat().st_uid != os.getuid()):
            raise ConfigError("somebody else made this folder", where=str(self.path), hint="remove it, or set TMPDIR")
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(mode=0o700)
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def boot_id() -> str:
    """Changes with each boot of the machine: monotonic times before and after it can't be compared."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return "unknown"
