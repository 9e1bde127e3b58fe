"""What an operator does over the bus: migrate, roll back, look. Prints nothing: `tell` takes each event as it comes."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import trio

from interlock.broker import commands, facts, topics
from interlock.broker.bus import Bus, EventFeed
from interlock.broker.config import FleetConfig
from interlock.broker.errors import InterlockError, Refused, Unreachable
from interlock.broker.wire import Event
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.fleet import Fleet, Host, Migration
from interlock.coordinator.ownership import places
from interlock.coordinator.placing import deviations
from interlock.coordinator.steering import Standing, standing
from interlock.coordinator.wording import concerns

EXITS = {"committed": 0, "started": 0, "rolled-back": 10, "held": 11, "refused": 12, "failed": 13}
TICK_S = 1.0  # how often a follower looks whether the broker still speaks
CLOSE_S = 10.0  # for the coordinator's last word once the host has settled it; then the host's word stands
ANSWER_MARGIN_S = 1.0  # a request expires at its deadline; an answer of the last moment still arrives
COORDINATOR_SILENT_S = 2.0  # a rollback waits no longer for the coordinator, and goes to the host itself
ROLLBACK_S = 90.0  # the slowest level of a rollback takes 60 s
FRESH_S = 5.0  # a host whose newest telemetry is older than this is silent; it sends about once a second
LISTEN_S = 2.0  # `status` listens so long for hosts; it ends sooner when all have spoken

Tell = Callable[[Event], None]
Note = Callable[[str], None]


@dataclass
class Report:
    """The outcome of a verb. `evidence`, `rollback` and `times` are as the fleet's fold has them."""

    outcome: str
    agent: str
    migration: str = ""
    host: str = ""
    previous: str = ""
    to: str = ""
    strategy: str = ""
    decided_by: str = ""
    reason: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    rollback: dict[str, Any] | None = None
    times: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return EXITS[self.outcome]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def report(migration: Migration, outcome: str = "") -> Report:
    names = ("agent", "host", "previous", "to", "strategy", "decided_by", "reason", "evidence", "rollback", "times")
    return Report(
        outcome=outcome or migration.outcome,
        migration=migration.id,
        **{name: getattr(migration, name) for name in names},
    )


# --- the event log, with deadlines


def broker_silent(fleet: FleetConfig, timeout: float) -> Unreachable:
    return Unreachable(
        f"the broker has not answered within {timeout:g} s",
        where=fleet.broker.events,
        hint="is it running? start the fleet with: interlock up, or the broker alone with: interlock broker",
    )


@asynccontextmanager
async def listening(
    bus: Bus, fleet: FleetConfig, prefixes: Sequence[str], *, timeout: float, after: int | None = None
) -> AsyncIterator[EventFeed]:
    """A feed that has its place in the log; Unreachable if the broker is silent for `timeout` seconds."""
    with trio.move_on_after(timeout) as scope:
        async with bus.events(prefixes, after=after) as feed:
            scope.deadline = math.inf
            yield feed
    if scope.cancelled_caught:
        raise broker_silent(fleet, timeout)


async def catch_up(feed: EventFeed, view: Fleet | Coordinator, fleet: FleetConfig, *, timeout: float) -> None:
    """Fold all that is in the log; Unreachable if nothing moves for `timeout` seconds."""

    async def fold() -> None:
        async for event in feed:
            view.apply(event)

    stuck = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fold)
        while not feed.caught_up.is_set() and not stuck:
            position = feed.position
            with trio.move_on_after(timeout) as waited:
                await feed.caught_up.wait()
            stuck = waited.cancelled_caught and feed.position == position
        nursery.cancel_scope.cancel()
    if stuck:
        raise broker_silent(fleet, timeout)


async def survey(bus: Bus, fleet: FleetConfig, *, timeout: float) -> Coordinator:
    """What the coordinator knows: the same fold over the same log. It is never asked to decide."""
    core = Coordinator(lambda: fleet, fleet)
    prefixes = [topics.FACTS, topics.SNAPSHOTS, topics.COMMANDS, topics.ROLLBACKS]
    async with listening(bus, fleet, prefixes, timeout=timeout, after=0) as feed:
        await catch_up(feed, core, fleet, timeout=timeout)
    return core


# --- migrate


async def migrate(
    bus: Bus,
    fleet: FleetConfig,
    agent: str,
    to: str,
    *,
    strategy: str | None = None,
    level: str | None = None,
    accept: str = "",
    because: str = "",
    host: str = "",
    timeout: float,
    detach: bool = False,
    tell: Tell,
    note: Note,
    begun: Callable[[str], None] = lambda migration: None,
) -> Report:
    """Ask the coordinator, and follow the migration to its outcome; with `detach`, only until it has begun.

    `begun` gets the migration's id as soon as there is one.
    """
    request = uuid.uuid4().hex
    view = Fleet(places(fleet))
    async with listening(bus, fleet, [topics.FACTS], timeout=timeout) as feed:
        asked = commands.Migrate(
            agent=agent,
            to=to,
            strategy=strategy,
            level=level,
            accept=accept,
            because=because,
            host=host or None,
            deadline=time.time() + timeout,
        )
        await bus.publish(topics.COORDINATOR, asked, id=request, timeout=timeout)
        answer: Event | None = None
        with trio.move_on_after(timeout + ANSWER_MARGIN_S):
            answer = await _answer(feed, view, request)
        if answer is None:
            raise Unreachable(
                f"the broker has the request, but the coordinator has not answered within {timeout:g} s",
                where="coordinator",
                hint="is it running? the request has expired, nothing was started; start it with: interlock "
                "coordinator, then ask again",
            )
        tell(answer)
        if isinstance(answer.body, facts.MigrationRefused):
            return Report("refused", agent, to=to, decided_by="coordinator", reason=answer.body.reason)
        assert isinstance(answer.body, facts.MigrationStarted)
        number = answer.body.migration
        begun(number)
        if detach:
            return report(view.migrations[number], "started")
        return report(await follow(feed, view, number, tell=tell, note=note))


async def _answer(feed: EventFeed, view: Fleet, request: str) -> Event:
    async for event in feed:
        view.apply(event)
        if isinstance(event.body, facts.MigrationStarted | facts.MigrationRefused) and event.body.request == request:
            return event
    raise AssertionError("a feed does not end")


async def follow(feed: EventFeed, view: Fleet, number: str, *, tell: Tell, note: Note) -> Migration:
    """Until the coordinator has ended or held it, or the host has settled it and the coordinator says no more."""
    give_up = math.inf
    lost = False
    migration = view.migrations[number]
    while not migration.ended and migration.outcome != "held":
        if migration.outcome and give_up == math.inf:
            give_up = trio.current_time() + CLOSE_S
        with trio.move_on_after(TICK_S):
            event = await anext(feed)
            if view.apply(event) and concerns(event, number):
                tell(event)
            continue
        if trio.current_time() > give_up:
            note("the coordinator has not closed it; this is what the host did")
            break
        if feed.lost != lost:
            lost = feed.lost
            note(
                "the broker is silent; the migration goes on, hosts decide alone meanwhile"
                if lost
                else "the broker is back"
            )
    return migration


# --- roll back


async def roll_back(
    bus: Bus, fleet: FleetConfig, agent: str, *, reason: str, timeout: float, tell: Tell, note: Note
) -> Report:
    """Undo the agent's migration in flight. A silent coordinator is passed over: the host is asked itself."""
    request = uuid.uuid4().hex
    view = Fleet(places(fleet))
    async with listening(
        bus, fleet, [topics.FACTS, topics.ROLLBACKS, topics.SNAPSHOTS], timeout=timeout, after=0
    ) as feed:
        await catch_up(feed, view, fleet, timeout=timeout)
        target = next(reversed(view.in_flight(agent)), None)
        now = time.time()
        asked = commands.RollBackAgent(agent=agent, reason=reason, deadline=now + timeout)
        await bus.publish(topics.COORDINATOR, asked, id=request, timeout=timeout)
        taken: Event | None = None
        with trio.move_on_after(COORDINATOR_SILENT_S if target is not None else timeout + ANSWER_MARGIN_S):
            taken = await _taken(feed, view, request, agent, tell)
        if taken is not None and isinstance(taken.body, facts.MigrationRefused):
            return Report("refused", agent, decided_by="coordinator", reason=taken.body.reason)
        if taken is None:
            if target is None:
                raise Unreachable(
                    f"no migration of {agent} is in flight in the log, and the coordinator has not answered within "
                    f"{timeout:g} s",
                    where="coordinator",
                    hint="is it running? see: interlock status",
                )
            note(f"the coordinator is silent; asking host {target.host} itself")
            await _ask_host(bus, view, target, reason=reason, now=now, timeout=timeout, note=note)
        number = target.id if target is not None else getattr(taken.body, "migration", "") if taken else ""
        return await _rolled_back(feed, view, number, tell=tell, note=note)


async def _taken(feed: EventFeed, view: Fleet, request: str, agent: str, tell: Tell) -> Event:
    """The first sign that the request was heard: refused, passed on to the host, or done."""
    async for event in feed:
        if not view.apply(event):
            continue
        body = event.body
        match body:
            case facts.MigrationRefused(request=refused) if refused == request:
                tell(event)
                return event
            case commands.RollBack() | facts.RolledBack() | facts.RollBackFailed() | facts.MigrationEnded():
                if body.agent == agent:
                    tell(event)
                    return event
    raise AssertionError("a feed does not end")


async def _ask_host(
    bus: Bus, view: Fleet, target: Migration, *, reason: str, now: float, timeout: float, note: Note
) -> None:
    """Both ways at once, under one id: through the log, and straight to the host's control endpoint."""
    breach = commands.Breach(by="operator", reason=reason, sample_time=now)
    body = commands.RollBack(
        migration=target.id, agent=target.agent, epoch=target.epoch, breach=breach, issued=time.time()
    )
    topic, id = topics.rollback(target.host), uuid.uuid4().hex
    host = view.hosts.get(target.host)

    async def directly() -> None:
        try:
            if host is not None and host.control:
                await bus.direct(host.control, topic, body, id=id, timeout=timeout)
        except (Refused, Unreachable) as error:
            note(f"host {target.host}: {error}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(directly)
        try:
            await bus.publish(topic, body, id=id, timeout=timeout)
        except InterlockError as error:
            note(str(error))


async def _rolled_back(feed: EventFeed, view: Fleet, number: str, *, tell: Tell, note: Note) -> Report:
    failed = False  # the host could not: it is held, or goes on trying

    async def until(done: Callable[[], bool]) -> None:
        nonlocal failed
        while not done():
            event = await anext(feed)
            if view.apply(event) and concerns(event, number):
                failed = failed or isinstance(event.body, facts.RollBackFailed)
                tell(event)

    def settled() -> bool:
        return failed or (number in view.migrations and not view.migrations[number].in_flight)

    with trio.move_on_after(ROLLBACK_S):
        await until(settled)
    if not settled():
        host = view.migrations[number].host if number in view.migrations else "?"
        raise Unreachable(
            f"host {host} has not reported the rollback within {ROLLBACK_S:g} s",
            where=number,
            hint="is the host up? see: interlock status; a host that lost its coordinator rolls back by itself",
        )
    migration = view.migrations[number]
    with trio.move_on_after(CLOSE_S):
        await until(lambda: migration.ended or migration.outcome == "held")
    if not migration.ended and migration.outcome != "held":
        note("the coordinator has not closed it; this is what the host did")
    told = report(migration)
    if migration.outcome == "committed":
        told.outcome = "refused"
        told.reason = f"it was committed before; to go back: interlock migrate {told.agent} --to {told.previous}"
    return told


# --- status


@dataclass
class Status:
    """The fold, and when each host last sent telemetry (seconds since 1970; 0: nothing was heard).

    standings: where each migration in flight stands, by its id. places: by agent, what the fleet file says of its place
    that is not so any more.
    """

    view: Fleet
    heard: dict[str, float]
    now: float
    standings: dict[str, Standing] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def condition(self, host: Host) -> str:
        """ "down", "up", or "silent": it never said goodbye, but sends nothing either."""
        if not host.up:
            return "down"
        return "up" if self.now - self.heard.get(host.name, 0.0) <= FRESH_S else "silent"

    def to_json(self) -> dict[str, Any]:
        tree = self.view.to_json()
        for name, host in self.view.hosts.items():
            tree["hosts"][name] |= {"condition": self.condition(host), "heard": self.heard.get(name)}
        for name, found in self.standings.items():
            if name in tree["migrations"]:
                left = max(0.0, found.until - self.now) if found.until else None
                tree["migrations"][name] |= asdict(found) | {"left_s": left}
        return tree | {"time": self.now, "deviations": self.places}


async def status(bus: Bus, fleet: FleetConfig, *, timeout: float) -> Status:
    """What the log says, and which hosts speak. Needs the broker only."""
    heard: dict[str, float] = {}
    async with bus.samples([topics.TELEMETRY]) as samples:
        core = await survey(bus, fleet, timeout=timeout)
        view = core.fleet
        expected = {host.name for host in view.hosts.values() if host.up}
        with trio.move_on_after(LISTEN_S):
            while not all(time.time() - heard.get(name, 0.0) <= FRESH_S for name in expected):
                for batch in await anext(samples):
                    name, _, publisher = batch.source.rpartition("/")
                    if publisher == "host":  # a monitor outlives the host process
                        heard[name] = max(heard.get(name, 0.0), batch.time)
    now = time.time()
    standings = {migration.id: standing(migration, now) for migration in core.migrations.values()}
    return Status(view, heard, now, standings, deviations(fleet, view))
