"""The coordinator's shell: follows the event log, asks `decisions` what to do, and sends it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import trio

from interlock.broker import signing, topics
from interlock.broker.client import Bus, open_bus
from interlock.broker.commands import Migrate, RollBackAgent, StartWave, Steer, StopWave
from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.errors import ConfigError, InterlockError, Refused
from interlock.broker.role import held
from interlock.broker.security import Security, load_security
from interlock.broker.wire import Event
from interlock.coordinator.archive import Archive
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.emit import Emit
from interlock.coordinator.leasing import lend
from interlock.coordinator.observers import observe

log = logging.getLogger("interlock.coordinator")

FOLLOWED = ["command/", "rollback/", "fact/", topics.SNAPSHOTS]


async def run_coordinator(fleet: FleetConfig, ready: Callable[[], None]) -> None:
    """Serve until cancelled. InUse if another coordinator holds the state directory."""
    state = fleet.state_dir / "coordinator"
    with held(state / "lock", "coordinator"):
        security = load_security(fleet, "coordinator")
        async with open_bus(fleet.broker, "coordinator", outbox=state / "outbox", security=security) as bus:
            await _serve(bus, Coordinator(_loader(fleet), fleet), ready, security, state / "records")


def _loader(fleet: FleetConfig) -> Callable[[], FleetConfig]:
    """Reads the fleet file, if it has changed; ConfigError if it is wrong."""
    known: dict[tuple[int, int, int], FleetConfig] = {}

    def load() -> FleetConfig:
        stamp = _stamp(fleet.path)
        if stamp is None:
            return load_fleet(fleet.path)  # which says what is wrong
        if stamp not in known:
            config = load_fleet(fleet.path)
            known.clear()
            known[stamp] = config
        return known[stamp]

    return load if fleet.path else (lambda: fleet)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def is_genuine(event: Event, security: Security | None) -> bool:
    """False of a request that no operator signed: whatever the broker says, it was not asked for."""
    if security is None or not isinstance(event.body, Migrate | RollBackAgent | Steer | StartWave | StopWave):
        return True
    try:
        signing.check(event, security.roll, now=time.time())
    except Refused as refused:
        if event.body.deadline > time.time():  # of an old one it was said, and it is not done any more anyway
            log.warning("refused event %d of the log: %s", event.header.seq, refused)
        return False
    return True


def _is_open(event: Event) -> bool:
    """Whether it may still be done: at a start, the log tells of all that were ever asked for."""
    return bool(getattr(event.body, "deadline", 0.0) > time.time())


async def _serve(
    bus: Bus,
    core: Coordinator,
    ready: Callable[[], None],
    security: Security | None = None,
    records: Path | None = None,
) -> None:
    archive = Archive(bus, core, records)
    changed = trio.Event()
    await bus.flushed()  # answers of an earlier life that are not in the log yet: nothing is to be decided twice

    async with trio.open_nursery() as nursery, bus.events(FOLLOWED, after=0) as feed:

        async def follow() -> None:
            nonlocal changed
            async for event in feed:
                if is_genuine(event, security):
                    core.apply(event)
                    archive.see(event)
                    for claim in core.fleet.claims.news():
                        log.warning("%s", claim)
                    if event.topic == topics.COORDINATOR and _is_open(event):
                        bus.receipt(event)
                changed.set()

        nursery.start_soon(follow)
        bus.telemetry("fleet", "coordinator")  # it has nothing to tell but its pulse
        await feed.caught_up.wait()
        log.info("the log is read up to event %d; %d migrations in flight", feed.position, len(core.migrations))
        ready()
        nursery.start_soon(observe, bus, core, lambda emit: _send(bus, core, nursery, emit))
        nursery.start_soon(archive.run)
        nursery.start_soon(lend, bus, core)
        while True:
            changed = trio.Event()
            now = time.time()
            for emit in core.decide(now):
                if (series := archive.recorded(emit)) is not None:
                    _send(bus, core, nursery, series)
                _send(bus, core, nursery, emit)
            if (snapshot := core.snapshot()) is not None:
                _send(bus, core, nursery, snapshot)
            with trio.move_on_after(min(max(core.next_deadline(time.time()) - time.time(), 0.0), 3600.0)):
                await changed.wait()


def _send(bus: Bus, core: Coordinator, nursery: trio.Nursery, emit: Emit) -> None:
    if not emit.direct:
        bus.post(emit.topic, emit.body, id=emit.id)
    if emit.direct or emit.also_direct:
        nursery.start_soon(_send_direct, bus, core, emit)


async def _send_direct(bus: Bus, core: Coordinator, emit: Emit) -> None:
    """To the host itself. Silence is no error: what matters is in the log as well; a lease is renewed again."""
    host = core.fleet.hosts.get(emit.topic.split("/")[1])
    if host is None or not host.control:
        return
    try:
        await bus.direct(host.control, emit.topic, emit.body, id=emit.id)
    except ConfigError as error:
        log.warning("the control endpoint of host %s is wrong: %s", host.name, error)
    except InterlockError as error:
        log.info("host %s did not take %s: %s", host.name, type(emit.body).__name__, error)
