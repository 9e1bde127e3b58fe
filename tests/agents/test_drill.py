"""Drills with real processes, the cold class, and an old revision that is sick."""

from __future__ import annotations

import time
from typing import Any

from interlock.agents.levels import Whole, back_up
from interlock.agents.resources import Card
from interlock.agents.slot_io import Ask, State
from interlock.broker import commands, facts

# --- the cold class


GB = 1 << 30


async def test_where_both_do_not_fit_it_goes_on_only_as_cold_and_comes_back_cold(hosted: Any) -> None:
    shell = await hosted.add("tutor", r2={"needs": {"gpu_memory_mb": 16 * 1024}})
    hosted.cards = [Card("GPU-1", total=24 * GB, free=14 * GB, agent=10 * GB)]
    ask = Ask(commands.Prepare(**hosted.at(shell, to="r2", baseline_s=0.0)), "first")
    shell.give(ask)
    failed = await hosted.fact(facts.StepFailed, command="first")
    assert failed.check == "gpu-memory"
    assert "--accept cold" in failed.reason
    assert shell.slot.row.state is State.SERVING

    hosted.tell("r1", "stubborn")  # it does not listen to SIGTERM, and still is gone before the candidate starts
    hosted.kill(shell, shell.slot.permanent)
    await hosted.until(lambda: not shell.slot.permanent_up)
    await hosted.until(lambda: shell.slot.permanent_up)
    done = await hosted.ask(shell, commands.Prepare(**hosted.at(shell, to="r2", baseline_s=0.0, accept="cold")))
    assert done.evidence["rollback_class"] == "cold"
    await hosted.ask(shell, commands.StartCandidate(**hosted.at(shell, cold=True)))
    assert (await hosted.answer(shell))["revision"] == "r2"
    gone = [number for number, f in enumerate(hosted.told) if isinstance(f, facts.InstanceStopped)]
    begun = [number for number, f in enumerate(hosted.told) if isinstance(f, facts.InstanceStarted)]
    assert gone[-1] < begun[-1]  # one after the other, though it had to be killed
    shell.give(hosted.back(shell))
    assert (await hosted.fact(facts.RolledBack)).level == 2
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_what_does_not_fit_alone_is_refused_also_as_cold(hosted: Any) -> None:
    shell = await hosted.add("tutor", r2={"needs": {"gpu_memory_mb": 30 * 1024}})
    hosted.cards = [Card("GPU-1", total=24 * GB, free=14 * GB, agent=10 * GB)]
    shell.give(Ask(commands.Prepare(**hosted.at(shell, to="r2", baseline_s=0.0, accept="cold")), "first"))
    failed = await hosted.fact(facts.StepFailed, command="first")
    assert "would not fit either" in failed.reason


async def test_a_card_is_read_again_until_it_shows_what_the_old_one_took(hosted: Any, monkeypatch: Any) -> None:
    shell = await hosted.add("tutor", r2={"needs": {"gpu_memory_mb": 16 * 1024}})
    readings = iter([Card("GPU-1", total=24 * GB, free=14 * GB), Card("GPU-1", 24 * GB, 14 * GB, agent=10 * GB)])

    async def read(agent: str) -> list[Card]:
        return [next(readings)]

    monkeypatch.setattr(shell.around, "cards", read)
    done = await hosted.ask(shell, commands.Prepare(**hosted.at(shell, to="r2", baseline_s=0.0, accept="cold")))
    assert done.evidence["rollback_class"] == "cold"


# --- drills


async def drilled(hosted: Any, shell: Any, **rest: Any) -> facts.DrillDone:
    body = commands.Drill(**{**hosted.at(shell, promise_s=5.0), "migration": "", "epoch": shell.slot.row.epoch, **rest})
    shell.give(Ask(body, "drill"))
    return await hosted.fact(facts.DrillDone, command="drill")


async def test_a_drill_measures_the_levels_and_leaves_everything_as_it_was(hosted: Any) -> None:
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


async def test_a_drill_uses_no_live_requests_where_asking_another_process_is_not_harmless(hosted: Any) -> None:
    shell = await hosted.add("tutor", idempotent=["other"])
    hosted.memory("mine")
    told = await drilled(hosted, shell)
    assert told.evidence["live_requests"] is False
    assert told.evidence["verified_by"] == "a probe"
    assert set(told.seconds) == {"1", "2"}
    assert "no backup" in told.skipped["4"]
    assert "not asked for" in told.skipped["3"]


async def test_a_drill_of_a_revision_that_does_not_start_any_more_says_so(hosted: Any) -> None:
    shell = await hosted.add("tutor")
    hosted.tell("r1", "stillborn")
    told = await drilled(hosted, shell)
    assert "no heart" in told.problems[0]
    assert await hosted.fact(facts.StepFailed, command="drill")
    assert (await hosted.answer(shell))["revision"] == "r1"


async def test_where_there_is_no_room_a_drill_leaves_out_what_needs_a_second_process(hosted: Any) -> None:
    shell = await hosted.add("tutor")
    hosted.cards = [Card("GPU-1", total=24 * GB, free=4 * GB, agent=20 * GB)]
    told = await drilled(hosted, shell)
    assert set(told.seconds) == {"1"}
    assert "no room" in told.skipped["2"]


async def test_a_drill_that_breaks_the_promise_ends_the_migration_unless_a_slower_class_is_accepted(
    hosted: Any,
) -> None:
    shell = await hosted.add("tutor")
    prepare = {"to": "r2", "baseline_s": 0.0}
    await hosted.ask(shell, commands.Prepare(**hosted.at(shell, **prepare)))
    shell.give(Ask(commands.Drill(**hosted.at(shell, promise_s=1e-9)), "strict"))
    failed = await hosted.fact(facts.StepFailed, command="strict")
    assert "1e-09 s are promised" in failed.reason
    assert shell.slot.row.state is State.SERVING
    await hosted.ask(shell, commands.Prepare(**hosted.at(shell, **prepare)))
    done = await hosted.ask(shell, commands.Drill(**hosted.at(shell, promise_s=1e-9, accept="cold")))
    assert done.evidence["rollback_class"] == "cold"
    assert "accepted as cold" in done.evidence["accepted"]
    assert shell.slot.row.state is State.PREPARED


async def test_a_drill_before_a_cold_start_promises_no_level_1(hosted: Any) -> None:
    shell = await hosted.add("tutor", r2={"needs": {"gpu_memory_mb": 16 * 1024}})
    hosted.cards = [Card("GPU-1", total=24 * GB, free=8 * GB, agent=10 * GB)]
    await hosted.ask(shell, commands.Prepare(**hosted.at(shell, to="r2", baseline_s=0.0, accept="cold")))
    done = await hosted.ask(shell, commands.Drill(**hosted.at(shell, promise_s=5.0, accept="cold", cold=True)))
    assert done.evidence["rollback_class"] == "cold"
    assert set(done.evidence["skipped"]) == {"1", "2", "3", "4"}
    assert "not rehearsed, but its last start took so long" in done.evidence["accepted"]


async def test_a_drill_is_called_off_when_the_permanent_instance_dies(hosted: Any) -> None:
    shell = await hosted.add("tutor", r1={"start_timeout_s": 30.0})
    body = commands.Drill(**{**hosted.at(shell, promise_s=5.0), "migration": "", "epoch": 0})
    shell.give(Ask(body, "drill"))
    await hosted.until(lambda: shell.slot.row.state is State.DRILLING)
    hosted.kill(shell, shell.slot.permanent)
    told = await hosted.fact(facts.DrillDone, command="drill")
    assert told.problems
    await hosted.until(lambda: shell.slot.permanent_up)
    assert shell.slot.row.state is State.SERVING


# --- a sick old one


async def test_a_sick_old_revision_is_replaced_if_somebody_says_why(hosted: Any) -> None:
    shell = await hosted.add("tutor", health_failures=1000)
    hosted.tell("r1", "deaf")
    shell.give(Ask(commands.Prepare(**hosted.at(shell, to="r2", baseline_s=0.0)), "first"))
    failed = await hosted.fact(facts.StepFailed, command="first")
    assert (failed.check, "--because" in failed.reason) == ("permanent-health", True)
    done = await hosted.ask(shell, commands.Prepare(**hosted.at(shell, to="r2", baseline_s=0.0, sick_ok=True)))
    assert "no verified way back" in done.evidence["old"]
    await hosted.ask(shell, commands.StartCandidate(**hosted.at(shell)))
    await hosted.ask(shell, commands.CutOver(**hosted.at(shell, share=1.0, lease_s=600.0)))
    assert (await hosted.answer(shell))["revision"] == "r2"
