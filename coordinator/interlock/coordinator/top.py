"""`interlock top`: hosts, GPUs and agents as they are now, from the bus."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import msgspec
import trio

from interlock.broker import cadence, topics
from interlock.broker.bus import Bus
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError
from interlock.coordinator.overview import Overview, Sort, View
from interlock.coordinator.terminal import on_bus, say_json
from interlock.coordinator.watch import broker_speaks, end_with_reader

ONCE_S = 2.2  # listened to before one answer: two samples of everybody, so that there are rates
REFRESH_S = 0.5  # between pictures: a person reads no faster


def run(chosen: argparse.Namespace) -> int:
    once = chosen.once or not (chosen.json or sys.stdout.isatty())

    async def verb(bus: Bus, fleet: FleetConfig) -> int:
        hosts = chosen.host or list(fleet.hosts)
        for host in chosen.host:
            if host not in fleet.hosts:
                known = ", ".join(sorted(fleet.hosts)) or "none"
                raise ConfigError(f"unknown host {host!r}", where="interlock top", hint=f"known: {known}")
        await broker_speaks(bus, fleet, chosen.timeout)
        if chosen.json:
            await follow(bus, hosts, lambda view: say_json(msgspec.to_builtins(view)), sort=chosen.sort, once=once)
            return 0
        from interlock.coordinator.top_screen import TopScreen

        with TopScreen(sys.stdout, live=not once) as screen:
            await follow(bus, hosts, screen.show, sort=chosen.sort, once=once)
        return 0

    return on_bus(chosen, verb, on_interrupt=lambda: None)


async def follow(bus: Bus, hosts: Sequence[str], show: Callable[[View], None], *, sort: Sort, once: bool) -> None:
    """Show what the bus tells of these hosts; `once`: one picture, else until cancelled."""
    overview = Overview(hosts)
    wanted = [topics.telemetry(host, publisher) for host in hosts for publisher in ("host", "monitor")]
    async with trio.open_nursery() as nursery:

        async def listen() -> None:
            async with bus.samples([*wanted, cadence.TOPIC]) as feed:
                async for batches in feed:
                    now = trio.current_time()
                    for batch in batches:
                        overview.take(batch, now)

        nursery.start_soon(listen)
        nursery.start_soon(end_with_reader)
        await trio.sleep(ONCE_S if once else REFRESH_S)
        while True:
            show(overview.view(trio.current_time(), sort=sort))
            if once:
                nursery.cancel_scope.cancel()
            await trio.sleep(REFRESH_S)
