"""A role that is told to stop while it starts stops: in a process of its own, so that a hang is a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PATIENCE_S = 60  # a start and an end of Python on a busy machine

BUS = """
import sys, threading, trio
from pathlib import Path
from interlock.broker import client
from interlock.broker.config import BrokerConfig

opening, cancelled, real = threading.Event(), threading.Event(), client.OutboxFile

def slow(path):
    opening.set()
    cancelled.wait()
    return real(path)

client.OutboxFile = slow

async def role():
    async with client.open_bus(BrokerConfig(), "monitor/alpha", outbox=Path(sys.argv[1])):
        await trio.sleep_forever()

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(role)
        await trio.to_thread.run_sync(opening.wait)
        nursery.cancel_scope.cancel()
        cancelled.set()
    print("ended")

trio.run(main)
"""

HOST = """
import trio
from interlock.agents import host

async def main():
    with trio.CancelScope() as scope:
        scope.cancel()
        async with trio.open_nursery() as nursery:
            await nursery.start(host._shielded)
    print("ended")

trio.run(main)
"""

GUARD = """
import trio
from interlock.agents import process

async def main():
    with trio.CancelScope() as scope:
        scope.cancel()
        async with process.guarded("interlock-test-shielding"):
            await trio.sleep_forever()
    print("ended")

trio.run(main)
"""


@pytest.mark.parametrize("script", [BUS, HOST, GUARD], ids=["the bus", "a host's instances", "a host's guard"])
def test_a_service_whose_starter_was_cancelled_ends(script: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "outbox")],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (ran.returncode, ran.stdout) == (0, "ended\n"), ran.stderr
