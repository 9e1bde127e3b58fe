"""The role: one host's monitor on the bus, and the lock that keeps it the only one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

from interlock.broker import streams
from interlock.broker.client import open_bus
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError
from interlock.broker.role import held
from interlock.broker.security import load_security
from interlock.monitors import control
from interlock.monitors.monitor import Monitor


async def run_monitor(fleet: FleetConfig, host: str, ready: Callable[[], None]) -> None:
    """Monitor `host` until cancelled. InUse if another monitor does so already."""
    streams.raise_descriptor_limit()  # each agent has some ten files that stay open
    with held(place(fleet, host) / "lock", f"monitor {host}"):
        async with open_bus(fleet.broker, f"monitor/{host}", security=load_security(fleet, f"monitor/{host}")) as bus:
            categories = {name: agent.category for name, agent in fleet.agents.items()}
            monitor = Monitor(bus, fleet.monitor, host, fleet.state_dir, categories=categories)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(control.serve, place(fleet, host), monitor.gpus)
                await monitor.run(ready)
                nursery.cancel_scope.cancel()


def place(fleet: FleetConfig, host: str) -> Path:
    """The folder of the host's monitor. ConfigError for a host that is not in the fleet file."""
    if host not in fleet.hosts:
        raise ConfigError(
            f"unknown host {host!r}", where=fleet.path, hint=f"known: {', '.join(sorted(fleet.hosts)) or 'none'}"
        )
    return fleet.state_dir / f"monitor-{host}"
