"""The broker role: the event plane in this process, the telemetry plane in a child that lives and dies with it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from interlock.broker import descriptors
from interlock.broker.config import BrokerConfig, FleetConfig
from interlock.broker.errors import InterlockError, InUse
from interlock.broker.event_plane import serve_events
from interlock.broker.role import READY_FD, Ready, held
from interlock.broker.security import Security, load_security
from interlock.broker.telemetry_plane import serve_telemetry

TAKEOVER_S = 3.0  # the telemetry process of a killed broker ends within milliseconds, on a busy machine within these
RETRY_S = 0.05
RESTART_S = 0.2  # before the telemetry process is started again, doubled each time it fails at once
RESTART_MAX_S = 5.0
LASTING_S = 10.0  # a process that lived for so long did not fail at once
TERM_S = 2.0  # from SIGTERM to SIGKILL: it has nothing to save

_log = logging.getLogger(__name__)


async def serve_planes(
    config: BrokerConfig,
    folder: Path,
    *,
    security: Security | None = None,
    task_status: trio.TaskStatus[BrokerConfig] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Both planes in this process, until cancelled: for tests and tools. Started with the real endpoints filled in."""
    async with trio.open_nursery() as nursery:
        if security is not None:
            nursery.start_soon(security.watch)
        config = await nursery.start(partial(serve_events, security=security), config, folder)
        config = await nursery.start(partial(serve_telemetry, security=security), config)
        task_status.started(config)


async def run_broker(fleet: FleetConfig, ready: Ready) -> None:
    """The broker role, until cancelled. InUse if another broker holds the state folder, or somebody a port."""
    folder = fleet.state_dir / "broker"
    with held(folder / "lock", "broker"):
        security = load_security(fleet, "broker")
        descriptors.provide("event plane", len(security.roll.keys()) if security else 0)
        async with trio.open_nursery() as nursery:
            if security is not None:
                nursery.start_soon(security.watch)
            await nursery.start(partial(serve_events, security=security, keep=fleet.log), fleet.broker, folder)
            await nursery.start(_keep_telemetry, Path(fleet.path))
            ready()


async def run_telemetry(fleet: FleetConfig, ready: Ready) -> None:
    """The telemetry plane, until cancelled or until the broker process that holds our standard input is gone."""
    with ExitStack() as stack:
        deadline = trio.current_time() + TAKEOVER_S
        while True:
            try:
                stack.enter_context(held(fleet.state_dir / "broker" / "telemetry.lock", "telemetry plane"))
                break
            except InUse:
                if trio.current_time() >= deadline:
                    raise
                await trio.sleep(RETRY_S)
        security = load_security(fleet, "broker")
        descriptors.provide("telemetry plane", len(security.roll.keys()) if security else 0)
        async with trio.open_nursery() as nursery:
            if security is not None:
                nursery.start_soon(security.watch)
            await nursery.start(partial(serve_telemetry, security=security), fleet.broker)
            ready()
            async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as parent:
                while await parent.receive_some():
                    pass
            _log.info("telemetry plane: the broker is gone")
            nursery.cancel_scope.cancel()


async def _keep_telemetry(path: Path, *, task_status: trio.TaskStatus[None]) -> None:
    """Run the telemetry process, and run it again when it ends; started once it serves for the first time."""
    pause = RESTART_S
    served = False
    while True:
        began = trio.current_time()
        async with _telemetry_process(path) as (process, said):
            if b"ready" in await said.receive_some() and not served:
                served = True
                task_status.started()
            await process.wait()
        if not served:
            raise InterlockError(
                f"the telemetry plane ended with exit code {process.returncode}", hint="its own message says why"
            )
        if trio.current_time() - began > LASTING_S:
            pause = RESTART_S
        _log.error("the telemetry plane ended (%s); starting it again in %.1f s", process.returncode, pause)
        await trio.sleep(pause)
        pause = min(pause * 2, RESTART_MAX_S)


@asynccontextmanager
async def _telemetry_process(path: Path) -> AsyncIterator[tuple[trio.Process, trio.lowlevel.FdStream]]:
    """The child, and what it says on its readiness pipe. It ends with this, and with the end of its standard input."""
    reading, writing = os.pipe()
    said = trio.lowlevel.FdStream(reading)
    try:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-P", "-m", "interlock.broker", "--fleet", str(path), "--plane", "telemetry"],
            stdin=subprocess.PIPE,
            pass_fds=[writing],
            env={**os.environ, READY_FD: str(writing)},
        )
    finally:
        os.close(writing)
    try:
        yield process, said
    finally:
        with trio.CancelScope(shield=True):
            await said.aclose()
            if process.returncode is None:
                process.terminate()
                with trio.move_on_after(TERM_S):
                    await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
            assert process.stdin is not None
            await process.stdin.aclose()
