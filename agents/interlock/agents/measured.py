"""What preflight asks the machine: memory, GPUs as the host's monitor tells them, whether dependencies answer."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import trio

from interlock.agents import guard
from interlock.agents.findings import Finding
from interlock.agents.probes import probe
from interlock.agents.resources import Card, cards_of
from interlock.broker import topics
from interlock.broker.bus import Bus
from interlock.broker.config import AgentConfig, ProbeConfig
from interlock.broker.samples import NAME, Batch, Labels, SeriesReader
from interlock.broker.sockets import Sockets

CARDS_S = 2.5  # for the newest readings: the broker has them at once, a monitor without one repeats them each second
DEPENDENCY_S = 2.0  # for a dependency to accept a connection, or to answer
PAGE = os.sysconf("SC_PAGE_SIZE")


def memory_available() -> int | None:
    """Bytes that programs can get without swapping; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text("ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def tree_memory(marker: str, pid: int) -> int | None:
    """Resident bytes of an instance and all that it started; None if nothing is there. Blocks for milliseconds."""
    pages = []
    for seen in guard.belonging(guard.INSTANCE_VARIABLE, marker, [pid]):
        try:
            pages.append(int(Path(f"/proc/{seen.pid}/statm").read_text("ascii").split()[1]))
        except (OSError, IndexError, ValueError):
            continue  # it ended in this moment
    return sum(pages) * PAGE if pages else None


def folder_bytes(folder: Path) -> int:
    """What the files of a folder take. Files that go away meanwhile don't count."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except OSError:
                continue
    return total


async def read_cards(bus: Bus, host: str, agent: str) -> list[Card] | None:
    """The GPUs of the host and what the agent has there, newest readings; empty: it has none; None: nobody tells."""
    reader = SeriesReader()
    seen: dict[Labels, tuple[float, float]] = {}
    with trio.move_on_after(CARDS_S):
        async with bus.samples([topics.telemetry(host, "monitor")]) as feed:
            async for batches in feed:
                for batch in batches:
                    samples, ended = reader.read(batch)
                    for key in ended:
                        seen.pop(key, None)
                    seen |= {key: (value, batch.time) for key, value in samples}
                if cards := cards_of(seen, agent, time.time()):
                    return cards
                if any(batch.whole and not _tells_of_gpus(batch) for batch in batches):
                    return []
    return None


def _tells_of_gpus(batch: Batch) -> bool:
    """Among all series that the monitor has, one is of a GPU, or says that there should be one."""
    return any(announced.labels.get(NAME, "").startswith("gpu_") for announced in batch.series)


async def dependencies(
    needed: Sequence[str], agents: Mapping[str, AgentConfig], up: Callable[[str], bool | None], sockets: Sockets
) -> list[Finding]:
    """Whether each dependency is there: an agent of the fleet, or an endpoint (tcp://, http://). All at once.

    `up`: whether an agent of this host is healthy; None if it is not of this host.
    """
    found: dict[str, Finding] = {}

    async def check(name: str) -> None:
        found[name] = await _dependency(name, agents, up, sockets)

    async with trio.open_nursery() as nursery:
        for name in needed:
            nursery.start_soon(check, name)
    return [found[name] for name in dict.fromkeys(needed)]


async def _dependency(
    name: str, agents: Mapping[str, AgentConfig], up: Callable[[str], bool | None], sockets: Sockets
) -> Finding:
    check = f"depends {name}"
    here = up(name)
    if here is not None:
        return Finding(check, here, f"{name} is healthy" if here else f"{name}, of this host, is not healthy")
    if name in agents:
        endpoint = agents[name].endpoint
    elif name.startswith(("tcp://", "http://")):
        endpoint = name
    else:
        return Finding(
            check, False, f"there is no agent {name!r} in this fleet, and it is no tcp:// or http:// endpoint"
        )
    http = endpoint.startswith("http://")
    place = urlsplit(endpoint)
    if not endpoint.startswith("ipc://") and (place.hostname is None or place.port is None):
        return Finding(check, False, f"{endpoint} names no address and port")
    asked = ProbeConfig(kind="http" if http else "tcp", port="request", path=place.path or "/", timeout_s=DEPENDENCY_S)
    health = await probe(asked, request_endpoint=endpoint, health_endpoint=endpoint, sockets=sockets)
    reached = health.ok or (http and name in agents and "answered" in health.detail)  # its / may be no page of it
    return Finding(check, reached, f"{endpoint} answers" if reached else f"{endpoint}: {health.detail}")
