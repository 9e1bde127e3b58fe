"""Real agent processes for the tests: written to a folder, started as a host starts them, asked as a gateway asks."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio

from interlock.agents import guard, ladder, resources, slot_shell
from interlock.agents.answers import MAX_BODY
from interlock.agents.gateway import ZmqGateway
from interlock.agents.instance import InstanceControl
from interlock.agents.journal import Journal
from interlock.agents.launch import Place
from interlock.agents.process import guarded
from interlock.agents.resources import Card
from interlock.agents.revisions import RevisionStore
from interlock.agents.slot import Slot
from interlock.agents.slot_io import Ask, AskRollBack, Row
from interlock.agents.slot_shell import SlotShell
from interlock.agents.surroundings import Surroundings
from interlock.broker import commands, facts
from interlock.broker.commands import Breach
from interlock.broker.config import AgentConfig, FleetConfig, HostConfig, parse_fleet
from interlock.broker.facts import Fact
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


# --- slots of a host, without a bus

PROGRAM = """
import json, os, pathlib, signal, subprocess, sys, zmq

port, tells, revision = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
data = pathlib.Path(os.environ["INTERLOCK_DATA"])

def told(what):
    return (tells / f"{revision}.{what}").exists()

if told("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if told("family"):
    idle = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", idle], start_new_session=True)
    (tells / "child").write_text(str(child.pid))
if told("stillborn"):
    sys.exit("no heart")
if told("ruined") and (data / "memory").read_text() == "ruined":
    sys.exit("the memory is ruined")
sock = zmq.Context().socket(zmq.REP)
sock.bind(f"tcp://127.0.0.1:{port}")
while True:
    request = sock.recv_json()
    if told("deaf"):
        signal.pause()  # it owes an answer for ever
    answer = {"status": "ok", "revision": revision, "pid": os.getpid(), "n": request.get("n")}
    sock.send_json(answer)
"""
E = 7
T = TypeVar("T")


class Hosted:
    """The slots of a host, without a bus: what they would publish is in `told`."""

    def __init__(self, folder: Path, place: Place, sockets: Sockets, nursery: trio.Nursery) -> None:
        self.folder = folder
        self.tells = folder / "tells"
        self.tells.mkdir()
        (folder / "source").mkdir()
        (folder / "source" / "rep.py").write_text(PROGRAM)
        self.told: list[Fact] = []
        self.slots: dict[str, SlotShell] = {}
        self.cards: list[Card] = []
        self.config: dict[str, AgentConfig] = {}
        self.sockets = sockets
        self.nursery = nursery
        self.changed = trio.Event()
        numbers = iter(range(1, 1000))
        self.around = Surroundings(
            host="alpha",
            place=place,
            store=RevisionStore(folder / "revisions"),
            journal=Journal.open(folder / "host.sqlite"),
            publish=self.publish,
            load=self.load,
            backups=folder / "backups",
            next_number=lambda: next(numbers),
            nursery=nursery,
            cards=self.read_cards,
            neighbours=lambda: list(self.slots.values()),
        )

    def publish(self, fact: Fact) -> None:
        self.told.append(fact)
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    def load(self) -> FleetConfig:
        return msgspec.structs.replace(
            parse_fleet({}), path=str(self.folder / "fleet.toml"), agents=self.config,
            hosts={"alpha": HostConfig(control="tcp://127.0.0.1:1")}, state="state",
        )  # fmt: skip

    async def read_cards(self, agent: str) -> list[Card] | None:
        return self.cards

    async def add(self, agent: str, **settings: Any) -> SlotShell:
        """An agent that serves revision r1, and has r2."""
        revisions = {
            name: {
                "source": "source",
                "command": ["{python}", "rep.py", "{port}", str(self.tells), name],
                "probe": {"kind": "zmq", "port": "request", "expect": {"status": "ok"}, "timeout_s": 0.5},
                "start_timeout_s": 5.0,
                "stop_timeout_s": 0.3,
                **settings.pop(name, {}),
            }
            for name in ("r1", "r2")
        }
        tree = {"host": "alpha", "endpoint": "tcp://127.0.0.1:*", "serve": "r1", "revisions": revisions}
        config = msgspec.convert({**tree, "health_period_s": 0.2, "idempotent": True, **settings}, AgentConfig)
        self.config[agent] = config
        recorded = self.around.store.record(agent, "r1", config.revisions["r1"], self.folder / "source")
        row = Row(agent, "r1", recorded.digest)
        self.around.journal.save_slot(row, "first")
        gateway = ZmqGateway(agent, config.endpoint, self.sockets)
        endpoint = await self.nursery.start(gateway.run)
        shell = SlotShell(Slot("alpha", row, endpoint=endpoint), config, gateway, self.around)
        self.slots[agent] = shell
        self.nursery.start_soon(shell.run)
        shell.begin()
        await self.until(lambda: shell.slot.permanent_up)
        return shell

    # --- telling and waiting

    def tell(self, revision: str, what: str) -> None:
        (self.tells / f"{revision}.{what}").touch()

    def untell(self, revision: str, what: str) -> None:
        (self.tells / f"{revision}.{what}").unlink()

    async def until(self, found: Callable[[], T], seconds: float = 30.0) -> T:
        with trio.move_on_after(seconds):
            while not (value := found()):
                with trio.move_on_after(0.02):
                    await self.changed.wait()
            return value
        pytest.fail(f"not within {seconds:g} s; told: {self.told[-12:]}")

    async def fact(self, kind: type[T], **fields: Any) -> T:
        def find() -> T | None:
            for fact in self.told:
                if isinstance(fact, kind) and all(getattr(fact, name) == value for name, value in fields.items()):
                    return fact
            return None

        found = await self.until(find)
        assert found is not None
        return found

    async def ask(self, shell: SlotShell, body: commands.HostCommand) -> facts.StepDone:
        """Give a command, and wait until it is done."""
        id = f"c{len(self.told)}-{time.monotonic_ns()}"
        shell.give(Ask(body, id))

        def answer() -> Fact | None:
            return next(
                (
                    fact
                    for fact in self.told
                    if getattr(fact, "command", "") == id and not isinstance(fact, facts.DrillDone)
                ),
                None,
            )

        done = await self.until(answer)
        assert isinstance(done, facts.StepDone), done
        return done

    async def live(self, shell: SlotShell, **prepare: Any) -> None:
        """Bring r2 to where it has all live requests."""
        await self.ask(shell, commands.Prepare(**self.at(shell, to="r2", baseline_s=0.0, **prepare)))
        await self.ask(shell, commands.StartCandidate(**self.at(shell)))
        await self.ask(shell, commands.CutOver(**self.at(shell, share=1.0, lease_s=600.0)))

    async def answer(self, shell: SlotShell) -> dict[str, Any]:
        """What a client gets."""
        socket = self.sockets.open("req", connect=shell.gateway.endpoint, label="client")
        try:
            with trio.fail_after(20):
                await socket.send([json.dumps({"action": "ask", "n": 1}).encode()])
                found: dict[str, Any] = json.loads((await socket.receive())[0])
                return found
        finally:
            socket.close(linger_ms=0)

    def kill(self, shell: SlotShell, instance: str | None) -> None:
        process = shell.instances[instance or ""].process
        assert process is not None
        process.kill()

    def memory(self, text: str) -> None:
        """What the agent `tutor` keeps in its data folder."""
        folder = self.folder / "data" / "tutor"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory").write_text(text)

    def at(self, shell: SlotShell, **rest: Any) -> dict[str, Any]:
        """What every command of the slot's migration has."""
        agent = shell.agent
        return {"migration": f"{agent}-7", "agent": agent, "epoch": E, "deadline": time.time() + 600, **rest}

    def back(self, shell: SlotShell, by: str = "operator") -> AskRollBack:
        now = time.time()
        breach = Breach(by=by, reason="asked", sample_time=now)
        body = commands.RollBack(migration=f"{shell.agent}-7", agent=shell.agent, epoch=E, breach=breach, issued=now)
        return AskRollBack(body)


@pytest.fixture
async def hosted(tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hosted]:
    within = {ladder.Rung.ROUTE: 1.0, ladder.Rung.CODE: 2.0, ladder.Rung.HOST: 3.0, ladder.Rung.BACKUP: 6.0}
    for rung, seconds in within.items():
        monkeypatch.setitem(ladder.WITHIN_S, rung, seconds)
        monkeypatch.setitem(ladder.LEAST_S, rung, 1.5)
    monkeypatch.setattr("interlock.agents.rolling_back.SLOW_S", 0.5)
    monkeypatch.setattr(slot_shell, "VERIFY_S", 0.7)
    monkeypatch.setattr(resources, "SPARE_BYTES", 1 << 20)
    marker = f"recovery-{tmp_path.name}-{time.monotonic_ns()}"
    (tmp_path / "state").mkdir()
    async with guarded(marker), open_sockets() as sockets, trio.open_nursery() as nursery:
        place = Place(sockets, marker, short_folder, tmp_path / "log", tmp_path / "data", tmp_path, {})
        made = Hosted(tmp_path, place, sockets, nursery)
        try:
            yield made
        finally:
            with trio.CancelScope(shield=True):
                for shell in made.slots.values():
                    await shell.end()
            nursery.cancel_scope.cancel()
            made.around.journal.close()
    assert guard.belonging(guard.HOST_VARIABLE, marker) == []
