"""The verbs at a broker whose versions of the wire format have none in common with ours: as a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from interlock.broker.sockets import Socket, open_sockets

SPEAKS = [2, 3]
REASON = "request of version 1 of the wire format; known here: versions 2 to 3 (update who sends it)"
MAIN = "import sys; from interlock.coordinator.cli import main; sys.exit(main())"
AGENT = """
[hosts.alpha]
control = "tcp://127.0.0.1:*"
[agents.echo]
host = "alpha"
endpoint = "tcp://127.0.0.1:7201"
serve = "v1"
[agents.echo.revisions]
v1 = { entry = "echo:Echo" }
v2 = { entry = "echo:Echo" }
"""


async def answer(events: Socket) -> None:
    while True:
        peer, frame, *event = await events.receive()
        request = msgpack.unpackb(frame)
        said: dict[str, Any] = {"op": "nack", "kind": "version", "reason": REASON, "id": ""}
        if request["op"] == "ping":
            said = {"op": "pong", "request": request["request"], "seq": 5, "log": "l", "speaks": SPEAKS}
        elif request["op"] == "replay":
            said = {"op": "failed", "request": request["request"], "kind": "version", "reason": REASON}
        elif event:
            said["id"] = msgpack.unpackb(event[1])["id"]
        await events.send([peer, msgpack.packb(said)])


async def beat(telemetry: Socket) -> None:
    while True:
        await telemetry.send([b"beat/", msgpack.packb({"beat": 1, "epoch": 1, "clock": 1.0, "speaks": SPEAKS})])
        await trio.sleep(0.05)


@pytest.mark.parametrize(
    "argv",
    [
        ["status"],
        ["migrate", "echo", "--to", "v2"],
        ["rollback", "echo"],
        ["ping"],
        ["watch", "fact/"],
        ["watch", "telemetry/"],
        ["log"],
    ],
)
async def test_a_verb_ends_at_once_and_says_which_versions_there_are_and_what_to_update(
    argv: list[str], tmp_path: Path
) -> None:
    async with open_sockets() as sockets, trio.open_nursery() as nursery:
        kinds = {"events": "router", "feed": "xpub", "telemetry_in": "router", "telemetry_out": "xpub"}
        opened = {name: sockets.open(kind, bind="tcp://127.0.0.1:*") for name, kind in kinds.items()}
        nursery.start_soon(answer, opened["events"])
        nursery.start_soon(beat, opened["telemetry_out"])
        lines = [f'{name} = "{socket.endpoint}"' for name, socket in opened.items()]
        fleet = tmp_path / "fleet.toml"
        fleet.write_text("security.mode = 'insecure'\n[broker]\n" + "\n".join(lines) + AGENT)
        command = [sys.executable, "-c", MAIN, *argv, "--fleet", str(fleet), "--timeout", "60", "--json"]
        with trio.fail_after(50):
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        nursery.cancel_scope.cancel()
    assert done.returncode == 12, done.stderr
    said = done.stderr.decode()
    assert "versions 2 to 3" in said
    assert "version 1" in said
    assert "update" in said
    assert json.loads(done.stdout)["outcome"] == "refused"
