"""Real agent processes for the tests: written to a folder, started as a host starts them, asked as a gateway asks."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from interlock.agents.answers import MAX_BODY
from interlock.agents.instance import InstanceControl
from interlock.broker.sockets import Socket, Sockets, open_sockets


class LaunchedAgent:
    """A running instance. `ask` is one request as the gateway sends it; `log` is what it wrote to standard error."""

    def __init__(self, folder: Path, spec: dict[str, Any], sockets: Sockets, python: str) -> None:
        self.folder = folder
        self.spec = spec
        self.log_file = folder / "log"
        spec_file = folder / "spec.json"
        spec_file.write_text(json.dumps(spec))
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [python, "-m", "interlock.agents.run", "--spec", str(spec_file)], cwd=folder, stdout=log, stderr=log
            )
        self.control = InstanceControl(sockets, spec["control"])
        self.requests: Socket = sockets.open("dealer", connect=spec["requests"], max_message=MAX_BODY)
        self.raw_control: Socket = sockets.open("dealer", connect=spec["control"])

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    async def serving(self) -> LaunchedAgent:
        """Until it is healthy; its log if it ended instead."""
        with trio.fail_after(30):
            while not (await self.control.health(timeout=0.3)).ok:
                assert self.process.poll() is None, self.log
        return self

    async def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        with trio.fail_after(20):
            await self.requests.send([b"1", b"", json.dumps({"action": action, **arguments}).encode()])
            frames = await self.requests.receive()
        assert frames[:2] == [b"1", b""]
        reply: dict[str, Any] = json.loads(frames[2])
        return reply

    async def ended(self) -> int:
        with trio.fail_after(20):
            return await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)

    async def terminated(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()


LaunchAgent = Callable[..., Awaitable[LaunchedAgent]]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Under /tmp: the path of an ipc:// endpoint must stay below 100 characters."""
    folder = Path(tempfile.mkdtemp(prefix="il-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def launch_agent(short_folder: Path) -> AsyncIterator[LaunchAgent]:
    """`await launch_agent(source)`: an agent whose module is `source` (its class is called Subject), healthy.

    `wait=False` returns at once; the other arguments go into its spec.
    """
    launched: list[LaunchedAgent] = []
    async with open_sockets() as sockets:

        async def launch(
            source: str, /, *, wait: bool = True, python: str = sys.executable, **spec: Any
        ) -> LaunchedAgent:
            folder = short_folder / str(len(launched))
            (folder / "source").mkdir(parents=True)
            (folder / "source" / "subject.py").write_text(textwrap.dedent(source))
            whole = {
                "agent": "subject",
                "revision": "v1",
                "instance": f"subject-{len(launched)}",
                "entry": "subject:Subject",
                "source": str(folder / "source"),
                "config": {},
                "requests": f"ipc://{folder}/r",
                "control": f"ipc://{folder}/c",
                **spec,
            }
            launched.append(LaunchedAgent(folder, whole, sockets, python))
            return await launched[-1].serving() if wait else launched[-1]

        try:
            yield launch
        finally:
            for one in launched:
                if one.process.poll() is None:
                    one.process.kill()
                one.process.wait()
