"""The program in docs/wire.md runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import trio

from interlock.broker import client, topics
from interlock.broker.config import BrokerConfig
from interlock.broker.facts import HostDown

DOC = Path(__file__).parents[2] / "docs" / "wire.md"


async def test_the_program_in_the_document_publishes_replays_and_subscribes(planes: BrokerConfig) -> None:
    programs = re.findall(r"```python\n(.*?)```", DOC.read_text("utf-8"), re.DOTALL)
    assert len(programs) == 1
    said = b""
    with trio.fail_after(60):
        async with client.open_bus(planes, "host/beta") as bus, trio.open_nursery() as nursery:
            await bus.publish(topics.host_fact("beta"), HostDown(host="beta"))
            process = await trio.lowlevel.open_process(
                [sys.executable, "-c", programs[0], planes.events, planes.feed], stdout=subprocess.PIPE
            )
            assert process.stdout is not None

            async def publish() -> None:
                while True:
                    await bus.publish(topics.host_fact("beta"), HostDown(host="live"))
                    await trio.sleep(0.1)

            try:
                while b"'host': 'live'" not in said:
                    said += await process.stdout.receive_some()
                    if b"the log ends at 2" in said and not nursery.child_tasks:
                        nursery.start_soon(publish)  # its subscription may take a moment more
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
                    await process.stdout.aclose()
            nursery.cancel_scope.cancel()
    assert said.decode().splitlines()[1:4] == [
        "fact/host/beta/ 1 {'type': 'host-down', 'host': 'beta'}",
        "fact/host/alpha/ 2 {'type': 'host-down', 'host': 'alpha'}",
        "the log ends at 2",
    ]
