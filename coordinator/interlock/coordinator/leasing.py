"""Keeps the hosts that a migration touches sampled fast, for as long as this coordinator lives."""

from __future__ import annotations

import time

import trio

from interlock.broker import cadence
from interlock.broker.bus import Bus, TelemetryPublisher
from interlock.broker.samples import Labels
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.observers import hosts_of


async def lend(bus: Bus, core: Coordinator) -> None:
    """Renew the lease of each host that a migration in flight touches, until cancelled."""
    publisher: TelemetryPublisher | None = None  # only once there is something to say: every monitor hears it
    said: set[Labels] = set()
    while True:
        leases = leases_of(core)
        if leases or said:
            publisher = publisher or bus.telemetry(cadence.HOST, cadence.PUBLISHER)
            publisher.send(leases, time=time.time(), ended=list(said - leases.keys()))
            said = set(leases)
        await trio.sleep(cadence.RENEW_S)


def leases_of(core: Coordinator) -> dict[Labels, float]:
    """For how long, by host and migration. Pure."""
    lasts = core.lease_s + cadence.BEYOND_S
    return {
        cadence.lease(host, migration.id): lasts
        for migration in core.migrations.values()
        for host in hosts_of(migration)
    }
