"""Slots of one host with real processes: rollbacks at every level, drills, and a cold start, with what can go wrong."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio
import zmq

from interlock.agents import guard, ladder, launch, resources, slot_shell
from interlock.agents.gateway import ZmqGateway
from interlock.agents.journal import Journal
from interlock.agents.launch import Place
from interlock.agents.levels import Whole, back_up
from interlock.agents.process import guarded
from interlock.agents.resources import Card
from interlock.agents.revisions import RevisionStore
from interlock.agents.slot import Slot
from interlock.agents.slot_io import Ask, AskRollBack, Row, State
from interlock.agents.slot_shell import SlotShell, Surroundings
from interlock.broker import commands, facts
from interlock.broker.commands import Breach
from interlock.broker.config import AgentConfig, FleetConfig, HostConfig, parse_fleet
from interlock.broker.errors import LogError
from interlock.broker.facts import Fact
from interlock.broker.sockets import Sockets, open_sockets

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
        await self.ask(shell, commands.Prepare(**at(shell, to="r2", baseline_s=0.0, **prepare)))
        await self.ask(shell, commands.StartCandidate(**at(shell)))
        await self.ask(shell, commands.CutOver(**at(shell, share=1.0, lease_s=600.0)))

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


def at(shell: SlotShell, **rest: Any) -> dict[str, Any]:
    agent = shell.agent
    return {"migration": f"{agent}-7", "agent": agent, "epoch": E, "deadline": time.time() + 600, **rest}


def back(shell: SlotShell, by: str = "operator") -> AskRollBack:
    breach = Breach(by=by, reason="asked", sample_time=time.time())
    body = commands.RollBack(
        migration=f"{shell.agent}-7", agent=shell.agent, epoch=E, breach=breach, issued=time.time()
    )
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


async def test_level_1_the_old_process_answers_and_only_then_is_the_candidate_stopped(hosted: Hosted) -> None:
    shell = await hosted.add("tutor")
    await hosted.live(shell)
    assert (await hosted.answer(shell))["revision"] == "r2"
    shell.give(back(shell))
    done = await hosted.fact(facts.RolledBack)
    assert done.level == 1
    stopped = await hosted.fact(facts.InstanceStopped, revision="r2")
    assert hosted.told.index(done) < hosted.told.index(stopped)
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_level_2_an_old_process_that_is_deaf_is_started_again(hosted: Hosted) -> None:
    shell = await hosted.add("tutor", health_failures=1000)
    await hosted.live(shell)
    hosted.tell("r1", "deaf")
    old = shell.slot.permanent
    shell.give(back(shell))
    escalated = await hosted.fact(facts.RollBackEscalated, level=2)
    assert "did not answer" in escalated.reason
    hosted.untell("r1", "deaf")
    done = await hosted.fact(facts.RolledBack)
    assert done.level == 2
    assert shell.slot.permanent != old
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_an_old_revision_that_does_not_start_leaves_the_candidate_serving_until_it_does(hosted: Hosted) -> None:
    shell = await hosted.add("tutor")
    await hosted.live(shell)
    hosted.tell("r1", "stillborn")
    hosted.kill(shell, shell.slot.permanent)
    shell.give(back(shell))
    page = await hosted.fact(facts.RollBackFailed)
    assert (page.kept, shell.slot.row.state) == ("r2", State.KEPT)
    assert any("no heart" in note["what"] for note in page.evidence["levels"])
    assert (await hosted.answer(shell))["revision"] == "r2"
    hosted.untell("r1", "stillborn")
    assert (await hosted.fact(facts.RolledBack)).level == 2
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_level_3_returns_a_neighbour_that_is_on_trial_and_leaves_one_that_serves_alone(hosted: Hosted) -> None:
    shell, moving, serving = [await hosted.add(name) for name in ("tutor", "pilot", "quiet")]
    await hosted.live(moving)
    await hosted.live(shell)
    untouched = serving.slot.permanent
    hosted.tell("r1", "stillborn")
    hosted.kill(shell, shell.slot.permanent)
    hosted.kill(shell, shell.slot.candidate)
    await hosted.fact(facts.RollBackEscalated, agent="tutor", level=3)
    neighbour = await hosted.fact(facts.RolledBack, agent="pilot")
    assert (neighbour.level, neighbour.breach.by) == (1, "host level-3")
    assert serving.slot.permanent == untouched
    assert serving.slot.row.state is State.SERVING
    hosted.untell("r1", "stillborn")
    assert (await hosted.fact(facts.RolledBack, agent="tutor")).level >= 3


async def test_level_4_puts_code_and_state_back_from_the_newest_verified_backup(hosted: Hosted) -> None:
    hosted.tell("r1", "ruined")
    _memory(hosted, "sound")
    shell = await hosted.add("tutor")
    await hosted.live(shell, levels=["configuration", "code", "state"])
    _memory(hosted, "ruined")  # as the candidate might have
    code = hosted.around.store.folder / shell.slot.row.permanent_digest / "source" / "rep.py"
    code.parent.chmod(0o700)
    code.chmod(0o600)
    code.write_text("nonsense(")
    hosted.kill(shell, shell.slot.permanent)
    hosted.kill(shell, shell.slot.candidate)
    await hosted.fact(facts.RollBackEscalated, level=4)
    done = await hosted.fact(facts.RolledBack)
    assert done.level == 4
    assert (hosted.folder / "data" / "tutor" / "memory").read_text() == "sound"
    (kept,) = (hosted.folder / "data").glob(".replaced-tutor-*")
    assert (kept / "memory").read_text() == "ruined"
    assert any("restored from a backup" in note["what"] for note in done.evidence["levels"])
    assert (await hosted.answer(shell))["revision"] == "r1"


def _memory(hosted: Hosted, text: str) -> None:
    """What the agent keeps in its data folder."""
    folder = hosted.folder / "data" / "tutor"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory").write_text(text)


async def test_after_the_last_level_somebody_is_paged_and_it_is_tried_on_without_dropping_evidence(
    hosted: Hosted,
) -> None:
    shell = await hosted.add("tutor")
    await hosted.live(shell)
    hosted.tell("r1", "stillborn")
    hosted.kill(shell, shell.slot.permanent)
    hosted.kill(shell, shell.slot.candidate)
    page = await hosted.fact(facts.RollBackFailed)
    assert (page.level, page.kept) == (4, "")
    levels = [f.level for f in hosted.told if isinstance(f, facts.RollBackEscalated)]
    assert levels in ([3, 4], [2, 3, 4])  # by whose end was noticed first
    hosted.untell("r1", "stillborn")
    done = await hosted.fact(facts.RolledBack)
    assert len(done.evidence["levels"]) >= len(page.evidence["levels"])
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_a_candidate_that_started_others_takes_them_along(hosted: Hosted) -> None:
    shell = await hosted.add("tutor")
    hosted.tell("r2", "family")
    await hosted.live(shell)
    child = int((hosted.tells / "child").read_text())
    assert guard.look(child) is not None
    shell.give(back(shell))
    await hosted.fact(facts.InstanceStopped, revision="r2")
    assert guard.look(child) is None


async def test_a_host_that_ends_in_the_middle_of_a_drill_leaves_nothing(hosted: Hosted) -> None:
    shell = await hosted.add("tutor")
    hosted.tell("r1", "deaf")  # so that the spare never becomes healthy
    shell.give(Ask(commands.Drill(**{**at(shell, promise_s=5.0), "migration": "", "epoch": 0}), "drill"))
    marker = hosted.around.place.marker
    await hosted.until(lambda: len(guard.belonging(guard.HOST_VARIABLE, marker)) >= 2)


async def test_a_port_that_somebody_took_is_no_end_for_a_permanent_instance(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = await hosted.add("tutor")
    with zmq.Context() as context, context.socket(zmq.REP) as thief:
        taken = thief.bind_to_random_port("tcp://127.0.0.1")
        real, offered = launch.free_ports, iter([[taken, taken]])
        monkeypatch.setattr(launch, "free_ports", lambda count: next(offered, None) or real(count))
        hosted.kill(shell, shell.slot.permanent)
        await hosted.until(lambda: next(offered, "none left") == "none left")
        await hosted.until(lambda: shell.slot.permanent_up)
        assert (await hosted.answer(shell))["revision"] == "r1"


async def test_a_full_disk_stops_no_rollback_that_has_to_start_the_old_revision_again(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = await hosted.add("tutor")
    await hosted.live(shell)

    def full(*_: object, **__: object) -> None:
        raise LogError("no space left on device", where="host.sqlite")

    with monkeypatch.context() as patched:
        patched.setattr(slot_shell, "JOURNAL_RETRY_S", 0.05)
        patched.setattr(hosted.around.journal, "save_slot", full)
        hosted.kill(shell, shell.slot.permanent)
        hosted.kill(shell, shell.slot.candidate)
        await hosted.until(lambda: shell.slot.permanent_up)
        assert (await hosted.answer(shell))["revision"] == "r1"
    assert (await hosted.fact(facts.RolledBack)).level == 2


async def test_a_backup_that_can_not_be_written_refuses_the_migration(hosted: Hosted) -> None:
    shell = await hosted.add("tutor")
    (hosted.folder / "backups").write_text("in the way")
    shell.give(Ask(commands.Prepare(**at(shell, to="r2", baseline_s=0.0)), "first"))
    failed = await hosted.fact(facts.StepFailed, command="first")
    assert (failed.check, "the backup failed" in failed.reason) == ("backup", True)
    assert shell.slot.row.state is State.SERVING
    assert (await hosted.answer(shell))["revision"] == "r1"


# --- the cold class


GB = 1 << 30


async def test_where_both_do_not_fit_it_goes_on_only_as_cold_and_comes_back_cold(hosted: Hosted) -> None:
    shell = await hosted.add("tutor", r2={"needs": {"gpu_memory_mb": 16 * 1024}})
    hosted.cards = [Card("GPU-1", total=24 * GB, free=14 * GB, agent=10 * GB)]
    ask = Ask(commands.Prepare(**at(shell, to="r2", baseline_s=0.0)), "first")
    shell.give(ask)
    failed = await hosted.fact(facts.StepFailed, command="first")
    assert failed.check == "gpu-memory"
    assert "--accept cold" in failed.reason
    assert shell.slot.row.state is State.SERVING

    hosted.tell("r1", "stubborn")  # it does not listen to SIGTERM, and still is gone before the candidate starts
    hosted.kill(shell, shell.slot.permanent)
    await hosted.until(lambda: not shell.slot.permanent_up)
    await hosted.until(lambda: shell.slot.permanent_up)
    done = await hosted.ask(shell, commands.Prepare(**at(shell, to="r2", baseline_s=0.0, accept="cold")))
    assert done.evidence["rollback_class"] == "cold"
    await hosted.ask(shell, commands.StartCandidate(**at(shell, cold=True)))
    assert (await hosted.answer(shell))["revision"] == "r2"
    gone = [number for number, f in enumerate(hosted.told) if isinstance(f, facts.InstanceStopped)]
    begun = [number for number, f in enumerate(hosted.told) if isinstance(f, facts.InstanceStarted)]
    assert gone[-1] < begun[-1]  # one after the other, though it had to be killed
    shell.give(back(shell))
    assert (await hosted.fact(facts.RolledBack)).level == 2
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_what_does_not_fit_alone_is_refused_also_as_cold(hosted: Hosted) -> None:
    shell = await hosted.add("tutor", r2={"needs": {"gpu_memory_mb": 30 * 1024}})
    hosted.cards = [Card("GPU-1", total=24 * GB, free=14 * GB, agent=10 * GB)]
    shell.give(Ask(commands.Prepare(**at(shell, to="r2", baseline_s=0.0, accept="cold")), "first"))
    failed = await hosted.fact(facts.StepFailed, command="first")
    assert "would not fit either" in failed.reason


# --- drills


async def drilled(hosted: Hosted, shell: SlotShell, **rest: Any) -> facts.DrillDone:
    body = commands.Drill(**{**at(shell, promise_s=5.0), "migration": "", "epoch": shell.slot.row.epoch, **rest})
    shell.give(Ask(body, "drill"))
    return await hosted.fact(facts.DrillDone, command="drill")


async def test_a_drill_measures_the_levels_and_leaves_everything_as_it_was(hosted: Hosted) -> None:
    shell, other = [await hosted.add(name) for name in ("tutor", "pilot")]
    row = shell.slot.row
    whole = Whole(
        "alpha", row, hosted.around.store.get("tutor", "r1", row.permanent_digest), None,
        hosted.folder / "data" / "tutor", hosted.around.journal,
    )  # fmt: skip
    back_up(whole, hosted.folder / "backups", ["configuration", "code", "state"], now=time.time(), keep=3)
    before = (shell.slot.permanent, other.slot.permanent)
    told = await drilled(hosted, shell, whole_host=True)
    assert told.problems == []
    assert sorted(told.seconds) == ["1", "2", "3", "4"]
    assert told.skipped == {}
    assert told.evidence["live_requests"] is True  # all may be asked twice, and it keeps nothing
    assert (shell.slot.permanent, other.slot.permanent) == before
    assert shell.slot.row.state is State.SERVING
    assert sorted(shell.instances) == [before[0]]
    assert not list(hosted.folder.glob("drill-*"))
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_a_drill_uses_no_live_requests_where_asking_another_process_is_not_harmless(hosted: Hosted) -> None:
    shell = await hosted.add("tutor", idempotent=["other"])
    _memory(hosted, "mine")
    told = await drilled(hosted, shell)
    assert told.evidence["live_requests"] is False
    assert told.evidence["verified_by"] == "a probe"
    assert set(told.seconds) == {"1", "2"}
    assert "no backup" in told.skipped["4"]
    assert "not asked for" in told.skipped["3"]


async def test_a_drill_of_a_revision_that_does_not_start_any_more_says_so(hosted: Hosted) -> None:
    shell = await hosted.add("tutor")
    hosted.tell("r1", "stillborn")
    told = await drilled(hosted, shell)
    assert "no heart" in told.problems[0]
    assert await hosted.fact(facts.StepFailed, command="drill")
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_where_there_is_no_room_a_drill_leaves_out_what_needs_a_second_process(hosted: Hosted) -> None:
    shell = await hosted.add("tutor")
    hosted.cards = [Card("GPU-1", total=24 * GB, free=4 * GB, agent=20 * GB)]
    told = await drilled(hosted, shell)
    assert set(told.seconds) == {"1"}
    assert "no room" in told.skipped["2"]


async def test_a_drill_that_breaks_the_promise_ends_the_migration_unless_a_slower_class_is_accepted(
    hosted: Hosted,
) -> None:
    shell = await hosted.add("tutor")
    prepare = {"to": "r2", "baseline_s": 0.0}
    await hosted.ask(shell, commands.Prepare(**at(shell, **prepare)))
    shell.give(Ask(commands.Drill(**at(shell, promise_s=1e-9)), "strict"))
    failed = await hosted.fact(facts.StepFailed, command="strict")
    assert "1e-09 s are promised" in failed.reason
    assert shell.slot.row.state is State.SERVING
    await hosted.ask(shell, commands.Prepare(**at(shell, **prepare)))
    done = await hosted.ask(shell, commands.Drill(**at(shell, promise_s=1e-9, accept="cold")))
    assert done.evidence["rollback_class"] == "cold"
    assert "accepted as cold" in done.evidence["accepted"]
    assert shell.slot.row.state is State.PREPARED


async def test_a_drill_before_a_cold_start_promises_no_level_1(hosted: Hosted) -> None:
    shell = await hosted.add("tutor", r2={"needs": {"gpu_memory_mb": 16 * 1024}})
    hosted.cards = [Card("GPU-1", total=24 * GB, free=8 * GB, agent=10 * GB)]
    await hosted.ask(shell, commands.Prepare(**at(shell, to="r2", baseline_s=0.0, accept="cold")))
    done = await hosted.ask(shell, commands.Drill(**at(shell, promise_s=5.0, accept="cold", cold=True)))
    assert done.evidence["rollback_class"] == "cold"
    assert set(done.evidence["skipped"]) == {"1", "2", "3", "4"}
    assert "not rehearsed, but its last start took so long" in done.evidence["accepted"]


async def test_a_drill_is_called_off_when_the_permanent_instance_dies(hosted: Hosted) -> None:
    shell = await hosted.add("tutor", r1={"start_timeout_s": 30.0})
    body = commands.Drill(**{**at(shell, promise_s=5.0), "migration": "", "epoch": 0})
    shell.give(Ask(body, "drill"))
    await hosted.until(lambda: shell.slot.row.state is State.DRILLING)
    hosted.kill(shell, shell.slot.permanent)
    told = await hosted.fact(facts.DrillDone, command="drill")
    assert told.problems
    await hosted.until(lambda: shell.slot.permanent_up)
    assert shell.slot.row.state is State.SERVING


# --- a sick old one


async def test_a_sick_old_revision_is_replaced_if_somebody_says_why(hosted: Hosted) -> None:
    shell = await hosted.add("tutor", health_failures=1000)
    hosted.tell("r1", "deaf")
    shell.give(Ask(commands.Prepare(**at(shell, to="r2", baseline_s=0.0)), "first"))
    failed = await hosted.fact(facts.StepFailed, command="first")
    assert (failed.check, "--because" in failed.reason) == ("permanent-health", True)
    done = await hosted.ask(shell, commands.Prepare(**at(shell, to="r2", baseline_s=0.0, sick_ok=True)))
    assert "no verified way back" in done.evidence["old"]
    await hosted.ask(shell, commands.StartCandidate(**at(shell)))
    await hosted.ask(shell, commands.CutOver(**at(shell, share=1.0, lease_s=600.0)))
    assert (await hosted.answer(shell))["revision"] == "r2"
