"""Brokers for the tests: both planes in this process, or the real role in processes of its own."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from interlock.broker import client, crypto, keys, topics
from interlock.broker.bus import Bus, new_event
from interlock.broker.config import PLACES, BrokerConfig, FleetConfig, load_fleet
from interlock.broker.facts import HostDown
from interlock.broker.keyring import Keyring
from interlock.broker.planes import serve_planes
from interlock.broker.security import Security
from interlock.broker.sockets import Sockets, open_sockets
from interlock.broker.tuning import Curve
from interlock.broker.wire import Body, Event

ANY = BrokerConfig(
    events="tcp://127.0.0.1:*",
    feed="tcp://127.0.0.1:*",
    telemetry_in="tcp://127.0.0.1:*",
    telemetry_out="tcp://127.0.0.1:*",
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for ipc:// endpoints."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="il-") as made:
        yield Path(made)


@pytest.fixture
async def planes(folder: Path, nursery: trio.Nursery) -> BrokerConfig:
    """Both planes in this process; their endpoints."""
    config: BrokerConfig = await nursery.start(serve_planes, ANY, folder / "log")
    return config


class BrokerRole:
    """The broker as `python -m interlock.broker` on ipc:// endpoints; `kill` is SIGKILL."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "fleet.toml"
        endpoints = "".join(f'{name} = "ipc://{folder}/{name}"\n' for name in PLACES)
        self.path.write_text(f'state = "{folder}/state"\nsecurity = {{ mode = "insecure" }}\n[broker]\n{endpoints}')
        self.process: trio.Process | None = None

    @property
    def fleet(self) -> FleetConfig:
        return load_fleet(self.path)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        reading, writing = os.pipe()
        self.process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "interlock.broker", "--fleet", str(self.path)],
            pass_fds=[writing],
            env={**os.environ, "INTERLOCK_READY_FD": str(writing), "INTERLOCK_LOG": "WARNING"},
            stdin=subprocess.DEVNULL,
        )
        os.close(writing)
        async with trio.lowlevel.FdStream(reading) as said:
            assert await said.receive_some() == b"ready\n"

    async def kill(self) -> None:
        await self.end(signal.SIGKILL)

    async def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return await self.process.wait()


@pytest.fixture
async def broker_role(folder: Path) -> AsyncIterator[BrokerRole]:
    role = BrokerRole(folder)
    try:
        yield role
    finally:
        if role.process is not None and role.process.returncode is None:
            with trio.CancelScope(shield=True), trio.fail_after(20):
                await role.end()


WHO = ["broker", "coordinator", "rules", "host/alpha", "host/beta", "monitor/alpha", "operator/local"]


class Fleet:
    """A broker with keys, in this process, and the keys of everybody."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "keys"
        self.ring = Keyring(self.folder, "f")
        self.ring.ensure(WHO, now=1.0)
        self.config = ANY

    def security(self, identity: str) -> Security:
        return Security(
            keys.read_private(self.folder, identity), keys.Roll(keys.read_authority(self.folder)), self.folder
        )

    @asynccontextmanager
    async def bus(self, identity: str) -> AsyncIterator[Bus]:
        async with client.open_bus(self.config, "", security=self.security(identity)) as bus:
            yield bus

    @asynccontextmanager
    async def sockets(self, identity: str) -> AsyncIterator[Sockets]:
        async with open_sockets(self.security(identity).curve()) as sockets:
            yield sockets

    def event(self, who: str, topic: str, body: Body) -> Event:
        return new_event(topic, body, source=who, time=1.0)

    def stranger(self) -> Curve:
        return Curve(*crypto.new_curve_pair(), self.security("rules").key_of("broker"))

    async def works(self) -> None:
        """An honest host is served as ever."""
        with trio.fail_after(25):
            async with self.bus("host/alpha") as bus, self.bus("operator/local") as operator:
                seq = await bus.publish(topics.host_fact("alpha"), HostDown(host="alpha"), timeout=20)
                async with operator.events(["fact/"], after=seq - 1) as feed:
                    assert (await anext(feed)).header.source == "host/alpha"

    @asynccontextmanager
    async def unnoticed(self) -> AsyncIterator[list[float]]:
        """Round trips of an honest host go on meanwhile on connections that stay; the seconds that each took."""
        took: list[float] = []
        async with self.bus("host/alpha") as bus, trio.open_nursery() as nursery:

            async def ask() -> None:
                while True:
                    began = trio.current_time()
                    await bus.publish(topics.host_fact("alpha"), HostDown(host="alpha"), timeout=20)
                    took.append(trio.current_time() - began)
                    await trio.sleep(0.01)

            nursery.start_soon(ask)
            await until(lambda: len(took) > 2)
            yield took
            before = len(took)
            await until(lambda: len(took) > before + 2)
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(25):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


@pytest.fixture
async def fleet(folder: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> Fleet:
    caplog.set_level(logging.WARNING)
    fleet = Fleet(folder)
    serve = partial(serve_planes, security=fleet.security("broker"))
    fleet.config = await nursery.start(serve, ANY, folder / "log")
    return fleet
