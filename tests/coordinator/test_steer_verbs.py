"""Plan, status and the steering verbs over the bus in memory, with the coordinator itself and a host that obeys."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio

from interlock.broker import commands, facts, topics
from interlock.broker.config import FleetConfig
from interlock.broker.errors import Refused, Unreachable
from interlock.broker.memory import MemoryBroker
from interlock.coordinator import plan_verb, service, verbs
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.planning import Forecast
from interlock.coordinator.screen import Screen, span
from interlock.coordinator.steer_verbs import Answer, steer

LONG = {"baseline_s": 0.1, "canary": [{"share": 0.1, "seconds": 500.0}], "observation_s": 900.0}
WATCHED = {"baseline_s": 0.1, "canary": [], "observation_s": 900.0}
TIMEOUT = 5.0


class Scene:
    """A broker, the coordinator on it, and host alpha, which does at once what it is asked."""

    def __init__(self, fleet: FleetConfig) -> None:
        self.fleet = fleet
        self.broker = MemoryBroker()
        self.told: list[str] = []

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        core = Coordinator(lambda: self.fleet, self.fleet)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._host)
            bus = self.broker.bus("coordinator")
            ready = trio.Event()
            nursery.start_soon(service._serve, bus, core, ready.set)
            await ready.wait()
            task_status.started()

    async def _host(self, *, task_status: trio.TaskStatus[None]) -> None:
        bus = self.broker.bus("host/alpha")
        bus.post(topics.host_fact("alpha"), facts.HostUp(host="alpha", control="c", pid=1, boot="b", agents=["tutor"]))
        serving = facts.SlotChanged(host="alpha", agent="tutor", state="serving", permanent="r1")
        bus.post(topics.host_fact("alpha"), serving)
        async with bus.events([topics.command("alpha"), topics.rollback("alpha")]) as feed:
            task_status.started()
            async for event in feed:
                body: Any = event.body
                step = type(body).__struct_config__.tag
                common = {"host": "alpha", "agent": "tutor", "migration": body.migration, "epoch": body.epoch}
                if isinstance(body, commands.RollBack):
                    now = time.time()
                    done: Any = facts.RolledBack(
                        **common, revision="r1", level=1, breach=body.breach, received=now, routed=now, restored=now,
                        verified=True,
                    )  # fmt: skip
                else:
                    done = facts.StepDone(**common, step=step, command=event.header.id)
                bus.post(topics.host_fact("alpha"), done)

    async def migrate(self, **options: Any) -> verbs.Report:
        return await verbs.migrate(
            self.broker.bus("operator/ann"), self.fleet, "tutor", "r2", timeout=TIMEOUT, detach=True,
            tell=lambda event: None, note=lambda text: None, **options,
        )  # fmt: skip

    async def steer(self, action: Any, reason: str = "") -> Answer | verbs.Report:
        return await steer(
            self.broker.bus("operator/ann"), self.fleet, "tutor", action, reason=reason, timeout=TIMEOUT,
            tell=lambda event: self.told.append(type(event.body).__name__), note=lambda text: None,
        )  # fmt: skip

    async def until(self, phase: str, waits_for: str = "") -> dict[str, Any]:
        """What `status --json` says of the migration, once it is in this phase."""
        while True:
            core = await verbs.survey(self.broker.bus("operator/ann"), self.fleet, timeout=TIMEOUT)
            now = time.time()
            standings = {name: verbs.standing(m, now) for name, m in core.migrations.items()}
            tree: dict[str, Any] = verbs.Status(core.fleet, {}, now, standings).to_json()
            for migration in tree["migrations"].values():
                if migration["phase"] == phase and waits_for in str(migration.get("waits_for")):
                    found: dict[str, Any] = migration
                    return found
            await trio.sleep(0.01)


@pytest.fixture
async def scene(story: Any, nursery: trio.Nursery) -> Callable[..., Any]:
    async def make(**options: Any) -> Scene:
        made = Scene(story(**options).config)
        await nursery.start(made.run)
        return made

    return make


async def test_a_migration_is_led_from_its_approval_to_its_commit(scene: Any) -> None:
    play = await scene(strategy={**WATCHED, "approve": True})
    await play.migrate()
    with trio.fail_after(20):
        waiting = await play.until("waiting")
        assert (waiting["waits_for"], waiting["then"]) == (
            "interlock approve tutor (stage infrastructure)", "it is rolled back",
        )  # fmt: skip
        assert 3590 < waiting["left_s"] <= 3600
        assert (await play.steer("approve")).exit_code == 0
        await play.until("waiting", "observation")
        await play.steer("approve")
        await play.until("running", "time to watch")
        paused = await play.steer("pause", "lunch")
        assert (paused.outcome, paused.action, paused.reason) == ("steered", "pause", "lunch")
        assert paused.until > time.time()
        assert (await play.until("paused"))["waits_for"] == "interlock resume tutor"
        assert (await play.steer("resume")).outcome == "steered"
        refused = await play.steer("commit")
        assert (refused.outcome, refused.exit_code) == ("refused", 12)
        assert "--because" in refused.reason
        committed = await play.steer("commit", "seen enough")
    assert (committed.outcome, committed.decided_by, committed.exit_code) == ("committed", "operator commit", 0)
    assert committed.evidence["deviations"][0]["by"] == "operator/ann"


async def test_an_abort_is_followed_to_the_old_revision(scene: Any) -> None:
    play = await scene(strategy=LONG)
    await play.migrate()
    with trio.fail_after(20):
        await play.until("running", "time to watch")
        told = await play.steer("abort", "wrong one")
    assert (told.outcome, told.decided_by, told.reason) == ("rolled-back", "operator abort", "wrong one")
    assert "RolledBack" in play.told


async def test_a_held_one_goes_on_and_whoever_follows_it_learns_of_both(scene: Any) -> None:
    play = await scene(strategy=LONG)
    await play.migrate()
    with trio.fail_after(20):
        await play.until("running", "time to watch")
        await play.steer("hold", "odd answers")
        held = await play.until("held")
        assert (held["decided_by"], held["reason"]) == ("operator hold", "odd answers")
        await play.steer("resume")
        assert (await play.until("running"))["outcome"] == ""
    assert (await play.steer("approve")).reason == (
        "approve is not possible: tutor is running; possible is: pause, hold, abort"
    )


async def test_a_silent_coordinator_is_named_and_the_way_that_needs_none(story: Any) -> None:
    play = Scene(story().config)
    with pytest.raises(Unreachable, match=r"coordinator has not answered.*interlock rollback tutor"):
        await steer(
            play.broker.bus("operator/ann"), play.fleet, "tutor", "abort", reason="", timeout=0.1,
            tell=lambda event: None, note=lambda text: None,
        )  # fmt: skip


# --- plan


def options(**rest: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            "agent": "tutor",
            "to": "r2",
            "strategy": None,
            "level": None,
            "accept": "",
            "because": "",
            "host": "",
            **rest,
        }
    )


def plan(play: Any, **rest: Any) -> Forecast:
    return plan_verb.ask(play.core, play.config, options(**rest), now=play.now)


def shown(found: Forecast) -> str:
    stream = io.StringIO()
    Screen(stream).forecast(found)
    return stream.getvalue()


def test_a_plan_shows_what_the_coordinator_then_does(story: Any) -> None:
    play = story(strategy={"shadow_requests": 10, "baseline_s": 1.0})
    found = plan(play)
    assert [stage.stage for stage in found.stages] == [
        "prepare", "infrastructure", "core-logic", "integration", "observation", "commit",
    ]  # fmt: skip
    assert found.least_s == 1.0 + 20.0 + 60.0
    assert found.refused == []
    text = shown(found)
    assert "tutor on alpha: r1 -> r2" in text
    assert "rollback within 5 s: strategy staged says so; nobody has rehearsed it" in text
    assert "would begin now" in text
    entered = [stage.stage for stage in found.stages]
    play.migrate()
    while play.core.migrations:
        play.done()
        while play.core.migrations and not play.migration.under_way:
            play.later(1.0)
    assert [event.body.stage for event in play.events if isinstance(event.body, facts.StageEntered)] == entered


def test_a_plan_says_what_would_be_refused_and_in_which_order(story: Any) -> None:
    windows = [{"from": "Thu 00:00", "to": "Fri 00:00", "because": "night"}]
    play = story(freeze={"timezone": "UTC", "windows": windows})
    found = plan(play, strategy="rapid", to="r1")
    assert [reason.split(" (")[0] for reason in found.refused] == [
        "tutor serves revision r1 already",
        "the fleet is frozen from Thu 00:00 to Fri 00:00: night",
        "strategy rapid is less careful than staged, which is due",
    ]
    assert "would be REFUSED now: tutor serves revision r1 already" in shown(found)
    allowed = plan(play, strategy="rapid", because="it burns")
    assert (len(allowed.deviations), allowed.refused) == (2, [])
    with pytest.raises(Refused, match="no revision 'r9'"):
        plan(play, to="r9")


def test_a_plan_promises_what_was_measured(story: Any) -> None:
    play = story()
    for revision, problems, said, seconds in (
        ("r1", [], "measured in a drill of r1: level 1 took 0.04 s, level 2 took 1.50 s", 0.04),
        ("r1", ["level 2 timed out"], "strategy staged says so; the drill failed: level 2 timed out", 5.0),
        ("r0", [], "strategy staged says so; the drill was of r0", 5.0),
    ):
        took = {"1": 0.04, "2": 1.5}
        play.fact(facts.DrillDone(host="alpha", agent="tutor", revision=revision, seconds=took, problems=problems))
        found = plan(play).promise
        assert (found.source, found.seconds, found.rehearsed) == (said, seconds, seconds == 0.04)


def test_a_plan_names_the_risk_where_there_is_one(story: Any) -> None:
    play = story()
    assert "risk unknown: nobody scored it" in shown(plan(play))
    play.core.risk["tutor"] = "critical"
    found = plan(play)
    assert (found.risk, found.strategy, found.why) == ("critical", "custom", "its risk is critical")
    assert "infrastructure (after approval)" in shown(found)
    assert found.to_json()["most_s"] > found.to_json()["least_s"] == found.least_s


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (90, "90 s"), (600, "10 min"), (86_400, "24.0 h")])
def test_a_span_is_told_as_people_do(seconds: float, text: str) -> None:
    assert span(seconds) == text


# --- the screen


def test_status_tells_what_is_waited_for_how_long_and_whose_fault_a_hold_is(story: Any) -> None:
    play = story(coordinator={"hold_s": 300.0})
    play.migrate(strategy="rapid", because="it burns")
    play.done()
    play.done()
    play.done()
    alert = facts.AlertFiring(
        rule="late", labels={"agent": "tutor"}, value=9.0, action="rollback", sample_time=1.0, summary="9 s",
        migrations=list(play.core.migrations), blamed={play.migration.id: facts.Blame(who="host", why="so are others")},
    )  # fmt: skip
    play.say(topics.alert_fact("late"), alert)
    play.run()
    now = play.now + 60
    standings = {name: verbs.standing(m, now) for name, m in play.core.migrations.items()}
    stream = io.StringIO()
    Screen(stream).status(verbs.Status(play.core.fleet, {}, now, standings))
    text = stream.getvalue()
    assert "an operator (resume, abort, commit)" in text
    assert "4 min, then it is held on" in text
    assert "tutor is held by rule late (the fault of the host): 9 s; so are others" in text
    assert "tutor deviates: strategy rapid is less careful than staged" in text
