"""State in memory goes from a real process to the next one, and back, while clients ask; or nothing changes."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import trio
from tests.agents.conftest import Hosted

from interlock.agents.slot_io import Ask, State
from interlock.agents.slot_shell import SlotShell
from interlock.broker import commands, facts

KEEPER = """
import pathlib, threading, time

from interlock.agents.agent import Agent, background, handler, while_active


class Keeper(Agent):
    def setup(self):
        self.tells = pathlib.Path(self.config["tells"])
        self.notes = []
        self.turns = 0

    def told(self, what):
        return (self.tells / f"{self.revision}.{what}").exists()

    @handler("note")
    def note(self, text: str) -> dict:
        self.notes.append(text)
        return self.ask()

    @handler("ask", idempotent=True)
    def ask(self, n: int = 0) -> dict:
        return {"revision": self.revision, "notes": list(self.notes), "active": self.active}

    @while_active
    def tick(self, stop: threading.Event) -> None:
        while not stop.wait(0.01):
            self.turns += 1

    def snapshot(self):
        if self.told("raises"):
            raise ValueError("the disk is gone")
        if self.told("slow"):
            time.sleep(60)
        before = self.turns
        time.sleep(0.03)
        assert self.turns == before, "its thread works while its state leaves"
        return self.give()

    def give(self):
        for note in self.notes:
            yield note.encode() + b"\\n"
        if self.told("breaks"):
            raise ValueError("half of it is enough")
        for _ in range(self.config.get("ballast", 0)):
            yield bytes(1 << 20)
        if self.told("dies"):
            import os
            os._exit(3)

    def restore(self, state):
        whole = b"".join(state).split(b"\\0")[0]
        if self.told("refuses"):
            raise ValueError("I don't want it")
        self.notes = whole.decode().splitlines()
"""


def keeper(hosted: Hosted, **config: Any) -> dict[str, Any]:
    revision = {
        "command": [], "probe": None, "entry": "keeper:Keeper", "config": {"tells": str(hosted.tells), **config},
        "stop_timeout_s": 1.0, "start_timeout_s": 20.0,
    }  # fmt: skip
    return {"r1": revision, "r2": revision}


async def ask(hosted: Hosted, shell: SlotShell, action: str = "ask", **arguments: Any) -> dict[str, Any]:
    socket = hosted.sockets.open("req", connect=shell.gateway.endpoint, label="client")
    try:
        with trio.fail_after(20):
            await socket.send([json.dumps({"action": action, **arguments}).encode()])
            found: dict[str, Any] = json.loads((await socket.receive())[0])
            return found
    finally:
        socket.close(linger_ms=0)


async def working(hosted: Hosted, shell: SlotShell) -> dict[str, Any]:
    """The answer of an instance whose turn it is."""
    with trio.fail_after(20):
        while True:
            answer = await ask(hosted, shell)
            if answer["active"]:
                return answer


async def standby(hosted: Hosted, **settings: Any) -> SlotShell:
    """A keeper with two notes, and a candidate beside it."""
    (hosted.folder / "source" / "keeper.py").write_text(KEEPER)
    config = settings.pop("config", {})
    shell = await hosted.add("tutor", **{**keeper(hosted, **config), "idempotent": False, **settings})
    for text in ("one", "two"):
        await ask(hosted, shell, "note", text=text)
    done = await hosted.ask(shell, commands.Prepare(**hosted.at(shell, to="r2", baseline_s=0.0)))
    assert done.evidence["hands_over"] is True
    await hosted.ask(shell, commands.StartCandidate(**hosted.at(shell)))
    return shell


def command(hosted: Hosted, shell: SlotShell, **rest: Any) -> commands.HandOver:
    return commands.HandOver(**hosted.at(shell, **{"route": True, "promise_s": 5.0, "lease_s": 600.0, **rest}))


async def failing(hosted: Hosted, shell: SlotShell, **rest: Any) -> facts.StepFailed:
    shell.give(Ask(command(hosted, shell, **rest), "failing"))
    return await hosted.fact(facts.StepFailed, command="failing")


@pytest.mark.parametrize("ballast", [0, 20])
async def test_the_candidate_goes_on_with_the_state_and_only_one_works(hosted: Hosted, ballast: int) -> None:
    shell = await standby(hosted, config={"ballast": ballast}, hand_over_s=20.0, hold_s=30.0)
    done = await hosted.ask(shell, command(hosted, shell, accept="hand-over"))
    assert done.evidence["bytes"] == 8 + (ballast << 20)
    answer = await ask(hosted, shell)
    assert (answer["revision"], answer["notes"]) == ("r2", ["one", "two"])
    await working(hosted, shell)
    await hosted.ask(shell, commands.CutOver(**hosted.at(shell, share=1.0, lease_s=600.0)))
    await hosted.ask(shell, commands.Commit(**hosted.at(shell)))
    assert (await ask(hosted, shell))["notes"] == ["one", "two"]


async def test_a_copy_leaves_the_requests_with_the_old_one_which_goes_on_working(hosted: Hosted) -> None:
    shell = await standby(hosted)
    await hosted.ask(shell, command(hosted, shell, route=False))
    assert shell.slot.row.state is State.STANDBY
    assert (await working(hosted, shell))["revision"] == "r1"


async def test_a_rollback_hands_the_newer_state_back(hosted: Hosted) -> None:
    shell = await standby(hosted)
    await hosted.ask(shell, command(hosted, shell))
    await ask(hosted, shell, "note", text="three")
    shell.give(hosted.back(shell))
    rolled = await hosted.fact(facts.RolledBack)
    assert rolled.level == 1
    assert rolled.evidence["state"]["handed_back"] is True
    answer = await ask(hosted, shell)
    assert (answer["revision"], answer["notes"]) == ("r1", ["one", "two", "three"])


async def test_a_candidate_that_died_takes_its_state_along_and_the_report_says_how_much(hosted: Hosted) -> None:
    shell = await standby(hosted)
    await hosted.ask(shell, command(hosted, shell))
    await ask(hosted, shell, "note", text="three")
    hosted.kill(shell, shell.slot.candidate)
    rolled = await hosted.fact(facts.RolledBack)
    state = rolled.evidence["state"]
    assert state["handed_back"] is False
    assert "process-died" in state["why"]
    assert 0 < state["lost_s"] < 20
    answer = await ask(hosted, shell)
    assert (answer["revision"], answer["notes"]) == ("r1", ["one", "two"])


async def test_the_newer_state_goes_to_the_old_revision_although_its_process_had_died(hosted: Hosted) -> None:
    shell = await standby(hosted)
    await hosted.ask(shell, command(hosted, shell))
    await ask(hosted, shell, "note", text="three")
    hosted.tell("r1", "away")
    hosted.kill(shell, shell.slot.permanent)
    await hosted.fact(facts.InstanceStopped, role="permanent")
    shell.give(hosted.back(shell))
    rolled = await hosted.fact(facts.RolledBack)
    assert rolled.evidence["state"]["handed_back"] is True, rolled
    assert (await ask(hosted, shell))["notes"] == ["one", "two", "three"]


@pytest.mark.parametrize(("revision", "what", "why"), [
    ("r1", "raises", "the disk is gone"),
    ("r1", "breaks", "half of it is enough"),
    ("r1", "slow", "within 1 s"),
    ("r2", "refuses", "I don't want it"),
])  # fmt: skip
async def test_where_it_fails_the_old_one_goes_on_at_once(hosted: Hosted, revision: str, what: str, why: str) -> None:
    limits = {"hand_over_s": 1.0} if what == "slow" else {"hand_over_s": 30.0, "hold_s": 60.0}
    shell = await standby(hosted, **limits)
    hosted.tell(revision, what)
    failed = await failing(hosted, shell)
    assert why in failed.reason
    answer = await ask(hosted, shell, "note", text="three")
    assert (answer["revision"], answer["notes"]) == ("r1", ["one", "two", "three"])
    shell.give(hosted.back(shell))
    await hosted.fact(facts.RolledBack)
    await working(hosted, shell)


async def test_an_old_one_that_dies_while_it_gives_its_state_is_started_again(hosted: Hosted) -> None:
    shell = await standby(hosted)
    hosted.tell("r1", "dies")
    failed = await failing(hosted, shell)
    assert failed.reason
    assert (await ask(hosted, shell))["revision"] == "r1"


async def test_a_rollback_in_the_middle_calls_it_off(hosted: Hosted) -> None:
    shell = await standby(hosted, hand_over_s=60.0, hold_s=90.0)
    hosted.tell("r1", "slow")
    shell.give(Ask(command(hosted, shell), "slow"))
    await hosted.until(lambda: shell.slot.row.state is State.HANDING_OVER)
    began = time.monotonic()
    shell.give(hosted.back(shell))
    answer = await ask(hosted, shell)
    assert time.monotonic() - began < 20
    assert answer["revision"] == "r1"
    await hosted.fact(facts.RolledBack)


async def test_one_that_takes_longer_than_is_promised_must_be_accepted(hosted: Hosted) -> None:
    shell = await standby(hosted)
    failed = await failing(hosted, shell, promise_s=0.001)
    assert "--accept hand-over" in failed.reason
    done = await hosted.ask(shell, command(hosted, shell, promise_s=0.001, accept="hand-over"))
    assert done.evidence["rollback_class"] == "hand-over"


async def test_requests_wait_meanwhile_and_none_is_lost(hosted: Hosted) -> None:
    shell = await standby(hosted)
    answers: list[dict[str, Any]] = []
    stop = trio.Event()

    async def client(number: int) -> None:
        while not stop.is_set():
            answers.append(await ask(hosted, shell, "note", text=f"{number}"))

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(client, number)
        await hosted.until(lambda: len(answers) > 20)
        await hosted.ask(shell, command(hosted, shell))
        seen = len(answers)
        await hosted.until(lambda: len(answers) > seen + 20)
        shell.give(hosted.back(shell))
        await hosted.fact(facts.RolledBack)
        seen = len(answers)
        await hosted.until(lambda: len(answers) > seen + 20)
        stop.set()
    assert all(answer["status"] == "ok" for answer in answers)
    final = (await ask(hosted, shell))["notes"]
    assert len(final) == 2 + len(answers), "a note that was acknowledged is lost, or there twice"


# --- a program

PROGRAM = """
import json, os, pathlib, sys, zmq

port, revision = int(sys.argv[1]), sys.argv[2]
sock = zmq.Context().socket(zmq.REP)
sock.bind(f"tcp://127.0.0.1:{port}")
notes = []
while True:
    request = sock.recv_json()
    if request["action"] == "note":
        notes.append(request["text"])
    elif request["action"] == "give":
        sock.send_json(notes)
        continue
    elif request["action"] == "take":
        notes = request["notes"]
    sock.send_json({"status": "ok", "revision": revision, "notes": notes})
"""
MOVE = """
import json, sys, zmq

sock = zmq.Context().socket(zmq.REQ)
sock.connect(f"tcp://127.0.0.1:{sys.argv[2]}")
if sys.argv[1] == "give":
    sock.send_json({"action": "give"})
    sys.stdout.write(sock.recv().decode())
else:
    sock.send_json({"action": "take", "notes": json.load(sys.stdin)})
    sock.recv()
"""


async def program(hosted: Hosted, **state: Any) -> SlotShell:
    source = hosted.folder / "source"
    (source / "keep.py").write_text(PROGRAM)
    (source / "move.py").write_text(MOVE)
    moved = {
        "give": ["{python}", "move.py", "give", "{port}"], "take": ["{python}", "move.py", "take", "{port}"], **state,
    }  # fmt: skip
    revisions = {
        name: {"command": ["{python}", "keep.py", "{port}", name], "state": moved, "stop_timeout_s": 1.0}
        for name in ("r1", "r2")
    }
    shell = await hosted.add("tutor", **revisions, idempotent=["ask"])
    for text in ("one", "two"):
        await ask(hosted, shell, "note", text=text)
    await hosted.ask(shell, commands.Prepare(**hosted.at(shell, to="r2", baseline_s=0.0)))
    await hosted.ask(shell, commands.StartCandidate(**hosted.at(shell)))
    return shell


async def test_a_program_hands_over_by_its_commands_and_back(hosted: Hosted) -> None:
    shell = await program(hosted)
    await hosted.ask(shell, command(hosted, shell))
    answer = await ask(hosted, shell, "note", text="three")
    assert (answer["revision"], answer["notes"]) == ("r2", ["one", "two", "three"])
    shell.give(hosted.back(shell))
    await hosted.fact(facts.RolledBack)
    answer = await ask(hosted, shell)
    assert (answer["revision"], answer["notes"]) == ("r1", ["one", "two", "three"])


@pytest.mark.parametrize(("state", "why"), [
    ({"give": ["sh", "-c", "echo half; echo broken pipe dreams >&2; exit 3"]}, "exited with 3: broken pipe dreams"),
    ({"take": ["sh", "-c", "exit 4"]}, "exited with 4"),
    ({"quiesce": ["false"]}, "`quiesce` exited with 1"),
    ({"give": ["/no/such/program"]}, "can't be started"),
])  # fmt: skip
async def test_a_command_that_fails_fails_the_hand_over(hosted: Hosted, state: dict[str, Any], why: str) -> None:
    shell = await program(hosted, **state)
    failed = await failing(hosted, shell)
    assert why in failed.reason
    assert (await ask(hosted, shell, "note", text="three"))["notes"] == ["one", "two", "three"]
