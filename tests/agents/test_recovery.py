"""Slots of one host with real processes: rollbacks at every level, and what can go wrong meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import zmq

from interlock.agents import guard, launch, slot_shell
from interlock.agents.slot_io import Ask, State
from interlock.broker import commands, facts
from interlock.broker.errors import LogError


async def test_level_1_the_old_process_answers_and_only_then_is_the_candidate_stopped(hosted: Any) -> None:
    shell = await hosted.add("tutor")
    await hosted.live(shell)
    assert (await hosted.answer(shell))["revision"] == "r2"
    shell.give(hosted.back(shell))
    done = await hosted.fact(facts.RolledBack)
    assert done.level == 1
    stopped = await hosted.fact(facts.InstanceStopped, revision="r2")
    assert hosted.told.index(done) < hosted.told.index(stopped)
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_level_2_an_old_process_that_is_deaf_is_started_again(hosted: Any) -> None:
    shell = await hosted.add("tutor", health_failures=1000)
    await hosted.live(shell)
    hosted.tell("r1", "deaf")
    old = shell.slot.permanent
    shell.give(hosted.back(shell))
    escalated = await hosted.fact(facts.RollBackEscalated, level=2)
    assert "did not answer" in escalated.reason
    hosted.untell("r1", "deaf")
    done = await hosted.fact(facts.RolledBack)
    assert done.level == 2
    assert shell.slot.permanent != old
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_an_old_revision_that_does_not_start_leaves_the_candidate_serving_until_it_does(hosted: Any) -> None:
    shell = await hosted.add("tutor")
    await hosted.live(shell)
    hosted.tell("r1", "stillborn")
    hosted.kill(shell, shell.slot.permanent)
    shell.give(hosted.back(shell))
    page = await hosted.fact(facts.RollBackFailed)
    assert (page.kept, shell.slot.row.state) == ("r2", State.KEPT)
    assert any("no heart" in note["what"] for note in page.evidence["levels"])
    assert (await hosted.answer(shell))["revision"] == "r2"
    hosted.untell("r1", "stillborn")
    assert (await hosted.fact(facts.RolledBack)).level == 2
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_level_3_returns_a_neighbour_that_is_on_trial_and_leaves_one_that_serves_alone(hosted: Any) -> None:
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


async def test_level_4_puts_code_and_state_back_from_the_newest_verified_backup(hosted: Any) -> None:
    hosted.tell("r1", "ruined")
    hosted.memory("sound")
    shell = await hosted.add("tutor")
    await hosted.live(shell, levels=["configuration", "code", "state"])
    hosted.memory("ruined")  # as the candidate might have
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


async def test_after_the_last_level_somebody_is_paged_and_it_is_tried_on_without_dropping_evidence(
    hosted: Any,
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


async def test_a_candidate_that_started_others_takes_them_along(hosted: Any) -> None:
    shell = await hosted.add("tutor")
    hosted.tell("r2", "family")
    await hosted.live(shell)
    child = int((hosted.tells / "child").read_text())
    assert guard.look(child) is not None
    shell.give(hosted.back(shell))
    await hosted.fact(facts.InstanceStopped, revision="r2")
    assert guard.look(child) is None


async def test_a_host_that_ends_in_the_middle_of_a_drill_leaves_nothing(hosted: Any) -> None:
    shell = await hosted.add("tutor")
    hosted.tell("r1", "deaf")  # so that the spare never becomes healthy
    shell.give(Ask(commands.Drill(**{**hosted.at(shell, promise_s=5.0), "migration": "", "epoch": 0}), "drill"))
    marker = hosted.around.place.marker
    await hosted.until(lambda: len(guard.belonging(guard.HOST_VARIABLE, marker)) >= 2)


async def test_a_port_that_somebody_took_is_no_end_for_a_permanent_instance(
    hosted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = await hosted.add("tutor")
    with zmq.Context() as context, context.socket(zmq.REP) as thief:
        taken = thief.bind_to_random_port("tcp://127.0.0.1")
        real, offered = launch.free_ports, iter([[taken, taken]])
        monkeypatch.setattr(launch, "free_ports", lambda count: next(offered, None) or real(count))
        killed = shell.slot.permanent
        hosted.kill(shell, killed)
        await hosted.until(lambda: next(offered, "none left") == "none left")
        await hosted.until(lambda: shell.slot.permanent != killed and shell.slot.permanent_up)
        assert (await hosted.answer(shell))["revision"] == "r1"


async def test_a_full_disk_stops_no_rollback_that_has_to_start_the_old_revision_again(
    hosted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = await hosted.add("tutor")
    await hosted.live(shell)

    def full(*_: object, **__: object) -> None:
        raise LogError("no space left on device", where="host.sqlite")

    with monkeypatch.context() as patched:
        patched.setattr(slot_shell, "JOURNAL_RETRY_S", 0.05)
        patched.setattr(hosted.around.journal, "save_slot", full)
        killed = shell.slot.permanent
        hosted.kill(shell, killed)
        hosted.kill(shell, shell.slot.candidate)
        await hosted.until(lambda: shell.slot.permanent != killed and shell.slot.permanent_up)
        assert (await hosted.answer(shell))["revision"] == "r1"
    assert (await hosted.fact(facts.RolledBack)).level == 2


async def test_a_backup_that_can_not_be_written_refuses_the_migration(hosted: Any) -> None:
    shell = await hosted.add("tutor")
    (hosted.folder / "backups").write_text("in the way")
    shell.give(Ask(commands.Prepare(**hosted.at(shell, to="r2", baseline_s=0.0)), "first"))
    failed = await hosted.fact(facts.StepFailed, command="first")
    assert (failed.check, "the backup failed" in failed.reason) == ("backup", True)
    assert shell.slot.row.state is State.SERVING
    assert (await hosted.answer(shell))["revision"] == "r1"
