"""Watches candidates that have live requests: the telemetry of their hosts in, measurements into the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from interlock.broker import topics
from interlock.broker.client import Bus
from interlock.broker.samples import SeriesReader
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.emit import Emit
from interlock.coordinator.migration import Migration
from interlock.coordinator.observation import Observation

log = logging.getLogger("interlock.coordinator")

LOOK_S = 0.25  # between measurements: the bounds cost some 0.1 ms a candidate


@dataclass
class _Observer:
    observation: Observation
    scope: trio.CancelScope


async def observe(bus: Bus, core: Coordinator, send: Callable[[Emit], None]) -> None:
    """Measure each migration whose candidate has live requests, until cancelled."""
    observers: dict[str, _Observer] = {}
    async with trio.open_nursery() as nursery:
        while True:
            now = time.time()
            watched = {number: m for number, m in core.migrations.items() if m.watched(now) is not None}
            for number in [number for number in observers if number not in watched]:
                observers.pop(number).scope.cancel()
            for number, migration in watched.items():
                if number not in observers:
                    observers[number] = _Observer(_observation(migration), trio.CancelScope())
                    nursery.start_soon(_listen, bus, hosts_of(migration), observers[number])
                progress = migration.watched(now)
                assert progress is not None
                measured = observers[number].observation.measure(now, checkpoint=progress.share if progress.ends else 0)
                for emit in migration.observe(measured, now):
                    log.info("%s: %s at %.0f %%: %s", number, measured.verdict, progress.share * 100, measured.reason)
                    send(emit)
            await trio.sleep(LOOK_S)


def _observation(migration: Migration) -> Observation:
    started = migration.started
    return Observation(started.agent, started.previous, started.to, migration.strategy.observe, migration.baseline)


def hosts_of(migration: Migration) -> list[str]:
    """Where something of it is measured: the agent's host, and the one that it moves to."""
    started = migration.started
    return [started.host, *([started.target] if started.target else [])]


async def _listen(bus: Bus, hosts: list[str], observer: _Observer) -> None:
    """Feed what the hosts and their monitors publish, from the newest values that the broker remembers on."""
    reader = SeriesReader()
    with observer.scope:
        wanted = [topics.telemetry(host, publisher) for host in hosts for publisher in ("host", "monitor")]
        async with bus.samples(wanted) as feed:
            async for batches in feed:
                for batch in batches:
                    samples, _ = reader.read(batch)
                    for labels, value in samples:
                        observer.observation.take(labels, value, batch.time)
