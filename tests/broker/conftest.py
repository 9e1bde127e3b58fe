"""Brokers for the tests: both planes in this process, or the real role in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from interlock.broker.config import BrokerConfig, FleetConfig, load_fleet
from interlock.broker.planes import serve_planes

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
        endpoints = "".join(f'{name} = "ipc://{folder}/{name}"\n' for name in BrokerConfig.__struct_fields__)
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
