"""Many agents moved together: the order, the failure budget, the way back, a coordinator that is killed anywhere."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.broker import commands, facts, topics, wire
from interlock.broker.config import parse_fleet
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.wave import TRANSITIONS, Phase

DEPENDS = {"gate": ["model"], "model": ["store"], "tool": ["store"], "store": [], "aside": []}
STEPS = {
    commands.Prepare: "prepare", commands.StartCandidate: "start-candidate", commands.CutOver: "cut-over",
    commands.Commit: "commit",
}  # fmt: skip


def config_of(depends: dict[str, list[str]], **rest: Any) -> Any:
    revision = {"entry": "a:A"}
    agents = {
        name: {
            "host": "beta" if name == "aside" else "alpha", "endpoint": f"tcp://127.0.0.1:{7800 + number}",
            "serve": "r1", "revisions": {"r1": revision, "r2": revision, "r3": revision}, "level": "low",
            "depends": needed, "category": "worker" if name == "tool" else "service",
        }
        for number, (name, needed) in enumerate(depends.items())
    }  # fmt: skip
    hosts = {name: {"control": f"tcp://127.0.0.1:{17900 + n}"} for n, name in enumerate(("alpha", "beta"))}
    rapid = {"observation_s": 10.0, "baseline_s": 0.1}
    return parse_fleet({"hosts": hosts, "strategies": {"rapid": rapid}, "agents": agents, **rest})


class Play:
    """A fleet whose hosts obey at once; `bad` agents fail to start, `stay` agents don't answer."""

    def __init__(self, depends: dict[str, list[str]] | None = None, **rest: Any) -> None:
        self.config = config_of(DEPENDS if depends is None else depends, **rest)
        self.now = 1000.0
        self.events: list[wire.Event] = []
        self.ids: set[str] = set()
        self.bad: set[str] = set()
        self.stay: set[str] = set()
        self.serving = dict.fromkeys(self.config.agents, "r1")
        self.to: dict[str, str] = {}
        self.moves: list[str] = []  # what began and ended, as short lines
        self.kill_every = 0
        self.restart()
        for host in self.config.hosts:
            names = [name for name, agent in self.config.agents.items() if agent.host == host]
            self.say(topics.host_fact(host), facts.HostUp(host=host, control="c", pid=1, boot="b", agents=names))
        for name in self.serving:
            self.slot(name)

    def restart(self) -> None:
        self.core = Coordinator(lambda: self.config, self.config)
        for event in self.events:
            self.core.apply(event)

    def say(self, topic: str, body: wire.Body, id: str = "") -> None:
        id = id or f"e{len(self.events)}"
        if id in self.ids:
            return
        self.ids.add(id)
        raw = wire.encode(body)
        header = wire.Header(id=id, source="operator/ann", time=self.now, seq=len(self.events) + 1, logged=self.now)
        event = wire.Event(topic, header, wire.decode_body(raw), raw)
        self.events.append(event)
        self.core.apply(event)
        if self.kill_every and len(self.events) % self.kill_every == 0:
            self.restart()
        self.host(event)

    def slot(self, agent: str, **rest: Any) -> None:
        host = self.config.agents[agent].host
        body = facts.SlotChanged(host=host, agent=agent, state="serving", permanent=self.serving[agent], **rest)
        self.say(topics.host_fact(host), body)

    def host(self, event: wire.Event) -> None:
        body: Any = event.body
        match body:
            case facts.MigrationStarted():
                self.to[body.migration] = body.to
                self.moves.append(f"{body.agent} to {body.to}")
            case facts.MigrationEnded():
                self.moves.append(f"{body.agent} {body.outcome}")
        agent = getattr(body, "agent", "")
        host = self.config.agents[agent].host if agent in self.config.agents else "alpha"
        common = {"host": host, "agent": agent, "migration": getattr(body, "migration", "")}
        if isinstance(body, commands.RollBack):
            done = facts.RolledBack(
                **common, epoch=body.epoch, revision=self.serving[agent], level=1, breach=body.breach,
                received=self.now, routed=self.now, restored=self.now, verified=True,
            )  # fmt: skip
            self.say(topics.host_fact(host), done, f"{event.header.id}/done")
        elif type(body) in STEPS and agent not in self.stay:
            step: Any = {"step": STEPS[type(body)], "command": event.header.id, "epoch": body.epoch}
            if agent in self.bad and self.to[body.migration] != "r1" and step["step"] == "start-candidate":
                failed = facts.StepFailed(**common, **step, check="start", reason="it is bad")
                self.say(topics.host_fact(host), failed, f"{event.header.id}/failed")
                return
            self.say(topics.host_fact(host), facts.StepDone(**common, **step), f"{event.header.id}/done")
            if step["step"] == "commit":
                self.serving[agent] = self.to[body.migration]
                self.slot(agent, epoch=body.epoch)

    def run(self, seconds: float = 0.0) -> Play:
        """Let the coordinator do what it will for so long."""
        end = self.now + seconds
        while True:
            for _ in range(500):
                emits = [emit for emit in self.core.decide(self.now) if not emit.direct]
                emits = [emit for emit in emits if emit.id not in self.ids]
                if not emits:
                    break
                for emit in emits:
                    self.say(emit.topic, emit.body, emit.id)
            if self.now >= end:
                return self
            self.now += 5.0
            for migration in list(self.core.migrations.values()):
                watched = migration.watched(self.now)
                if watched is not None and watched.share >= 1:
                    body = facts.ChecksMeasured(
                        migration=migration.id, agent=migration.started.agent, epoch=migration.started.epoch,
                        verdict="passed", reason="fine", checkpoint=1.0, final=True,
                    )  # fmt: skip
                    self.say(topics.migration_fact(body.agent), body, f"{migration.id}/checked")

    def start(self, seconds: float = 400.0, **rest: Any) -> Play:
        body = commands.StartWave(**{"deadline": self.now + 10, "to": "r2", **rest})
        self.say(topics.COORDINATOR, body)
        return self.run(seconds)

    def stop(self, seconds: float = 400.0, **rest: Any) -> Play:
        (name,) = list(self.core.waves.open) or ["wave-0"]
        self.say(topics.COORDINATOR, commands.StopWave(wave=name, deadline=self.now + 10, **rest))
        return self.run(seconds)

    def last(self, kind: type) -> Any:
        return next(event.body for event in reversed(self.events) if isinstance(event.body, kind))

    @property
    def table(self) -> dict[str, str]:
        return {each.agent: each.state for each in self.last(facts.WaveEnded).members}

    @property
    def began(self) -> list[str]:
        return [move for move in self.moves if " to " in move]


# --- what is chosen, and in which order


def test_a_dependency_is_moved_before_its_dependents() -> None:
    play = Play().start()
    assert play.began == ["aside to r2", "store to r2", "model to r2", "gate to r2", "tool to r2"]
    assert play.last(facts.WaveEnded).outcome == "committed"
    assert set(play.serving.values()) == {"r2"}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"category": "worker"}, ["tool"]),
        ({"host": "beta"}, ["aside"]),
        ({"agents": ["gate", "store"]}, ["store", "gate"]),
        ({"order": "host"}, ["gate", "model", "store", "tool", "aside"]),
        ({"order": "name"}, ["aside", "gate", "model", "store", "tool"]),
        ({"to": "", "revisions": {"tool": "r3", "store": "r2"}}, ["store", "tool"]),
    ],
)
def test_who_is_in_a_wave(chosen: dict[str, Any], expected: list[str]) -> None:
    play = Play().start(0.0, **chosen)
    assert [member.agent for member in play.last(facts.WaveStarted).members] == expected


def test_an_order_also_follows_dependencies_through_agents_that_stay() -> None:
    play = Play().start(0.0, agents=["gate", "store"])
    assert play.last(facts.WaveStarted).members[1].after == ["store"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"agents": ["sotre"]}, "there is no agent 'sotre' (did you mean 'store'?)"),
        ({"agents": ["store"], "to": "r9"}, "agent store has no revision 'r9'"),
        ({"to": "r9"}, "no agent has a revision 'r9'"),
        ({"to": ""}, "it takes either one revision for all, or one for each agent"),
        ({"to": "r1"}, "there is nobody to move: gate serves r1 already"),
        ({"host": "gamma"}, "there is no host 'gamma'"),
        ({"parallel": 0}, "0 at once"),
        ({"budget": -1}, "a failure budget is a number"),
        ({"strategy": "rapd"}, "there is no strategy 'rapd' (did you mean 'rapid'?)"),
        ({"strategy": "rapid", "level": "low"}, "both a level and a strategy"),
        ({"deadline": 1.0}, "the request's deadline has passed"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(asked: dict[str, Any], said: str) -> None:
    play = Play().start(**asked)
    assert said in play.last(facts.WaveRefused).reason
    assert play.core.waves.open == {}
    assert play.began == []


def test_a_circle_is_refused_with_its_names_and_another_order_goes() -> None:
    circle = {"a": ["b"], "b": ["c"], "c": ["a"], "d": []}
    play = Play(circle).start()
    assert "in a circle: a -> b -> c -> a" in play.last(facts.WaveRefused).reason
    assert Play(circle).start(order="name").last(facts.WaveEnded).outcome == "committed"


def test_an_agent_is_in_one_wave_at_a_time() -> None:
    play = Play().start(0.0)
    play.start(0.0, agents=["tool"], to="r3")
    assert "already moved by another wave: tool in wave-" in play.last(facts.WaveRefused).reason


def test_two_waves_asked_for_at_once_are_answered_one_after_the_other() -> None:
    play = Play()
    for _ in range(2):
        play.say(topics.COORDINATOR, commands.StartWave(to="r2", agents=["tool"], deadline=play.now + 10))
    play.run()
    assert sum(isinstance(event.body, facts.WaveStarted) for event in play.events) == 1
    assert sum(isinstance(event.body, facts.WaveRefused) for event in play.events) == 1


def test_a_long_chain_is_planned_and_judged_without_long_thought() -> None:
    names = [f"a{number:03d}" for number in range(300)]
    chain = {name: [after] for name, after in pairwise(names)} | {names[-1]: []}
    play = Play(chain).start(0.0)
    assert [member.agent for member in play.last(facts.WaveStarted).members] == names[::-1]
    play.bad = {names[-2]}
    play.run(60)
    assert play.table[names[0]] == "left-out"
    assert play.last(facts.WaveEnded).outcome == "rolled-back"


# --- how many at once


def test_no_more_than_so_many_are_in_flight_and_what_does_not_depend_goes_beside() -> None:
    play = Play().start(0.0, parallel=2)
    assert sorted(m.started.agent for m in play.core.migrations.values()) == ["aside", "store"]
    play.run(400)
    assert play.last(facts.WaveEnded).outcome == "committed"


def test_a_member_that_an_operator_holds_or_pauses_holds_the_wave() -> None:
    for action in ("hold", "pause"):
        play = Play().start(0.0, parallel=2, order="name")
        play.say(topics.COORDINATOR, commands.Steer(agent="aside", action=action, deadline=play.now + 9))  # type: ignore[arg-type]
        play.run(100)
        assert len(play.began) == 2
        (wave,) = play.core.waves.open.values()
        assert "aside held or paused" in wave.waits_for(play.core.migrations)
        play.say(topics.COORDINATOR, commands.Steer(agent="aside", action="resume", deadline=play.now + 9))
        assert play.run(400).last(facts.WaveEnded).outcome == "committed"


# --- the failure budget


def test_one_failure_more_than_the_budget_moves_everything_back_in_reverse() -> None:
    play = Play()
    play.bad = {"gate"}
    play.start()
    assert play.moves == [
        "aside to r2", "aside committed", "store to r2", "store committed", "model to r2", "model committed",
        "gate to r2", "gate rolled-back",
        "model to r1", "model committed", "store to r1", "store committed", "aside to r1", "aside committed",
    ]  # fmt: skip
    ended = play.last(facts.WaveEnded)
    assert ended.outcome == "rolled-back"
    assert "failure budget: gate failed, and the budget is 0" in ended.reason
    assert play.table == {
        "aside": "gone-back", "store": "gone-back", "model": "gone-back", "gate": "rolled-back", "tool": "left-out",
    }  # fmt: skip
    assert set(play.serving.values()) == {"r1"}


def test_within_the_budget_the_rest_goes_on_but_nobody_whose_dependency_failed() -> None:
    play = Play()
    play.bad = {"model"}
    play.start(budget=1)
    assert play.last(facts.WaveEnded).outcome == "committed"
    assert play.table == {
        "aside": "committed", "store": "committed", "model": "rolled-back", "gate": "left-out", "tool": "committed",
    }  # fmt: skip
    reason = {each.agent: each.reason for each in play.last(facts.WaveEnded).members}["gate"]
    assert reason == "model, which it depends on, did not get there"


def test_a_budget_may_be_a_share() -> None:
    assert Play().start(0.0, budget_share=0.5).last(facts.WaveStarted).budget == 2


def test_a_refused_member_counts_against_the_budget() -> None:
    play = Play()
    play.stay = {"store"}
    play.say(topics.COORDINATOR, commands.Migrate(agent="store", to="r3", deadline=play.now + 10))
    play.run().start(20.0)
    assert play.table["store"] == "refused"
    assert play.last(facts.WaveEnded).outcome == "rolled-back"


def test_what_is_in_flight_is_rolled_back_when_the_budget_is_spent() -> None:
    play = Play()
    play.bad, play.stay = {"store"}, {"aside"}
    play.start(20.0, parallel=2)
    assert play.moves == ["aside to r2", "store to r2", "store rolled-back", "aside rolled-back"]
    back = next(e.body for e in play.events if isinstance(e.body, commands.RollBack) and e.body.agent == "aside")
    assert isinstance(back, commands.RollBack)
    assert back.breach.by.startswith("wave wave-")


def test_a_rule_that_fires_stops_who_goes_on_and_nobody_who_goes_back() -> None:
    play = Play().start(15.0)
    alert = facts.AlertFiring(rule="hot", labels={"host": "alpha"}, value=1.0, action="rollback", sample_time=1.0)
    play.say(topics.alert_fact("hot"), alert)
    play.run(400)
    assert play.table["model"] == "refused"
    assert play.table["store"] == "gone-back"
    assert set(play.serving.values()) == {"r1"}


def test_what_cannot_be_moved_back_keeps_what_it_depends_on_and_the_wave_has_failed() -> None:
    play = Play()
    del play.config.agents["model"].revisions["r1"]  # somebody took it out of the fleet file
    play.bad = {"gate"}
    play.start()
    assert play.last(facts.WaveEnded).outcome == "failed"
    found = {each.agent: (each.state, each.reason) for each in play.last(facts.WaveEnded).members}
    assert found["model"][0] == "stuck"
    assert "has no revision 'r1'" in found["model"][1]
    assert found["store"] == ("stuck", "model could not be moved back, and depends on it")
    assert found["aside"][0] == "gone-back"


# --- freeze and stop


FREEZE = {"windows": [{"from": "1970-01-01T00:00", "to": "1970-01-01T12:00", "because": "feast"}]}


def test_a_freeze_refuses_a_wave_without_a_reason() -> None:
    play = Play(freeze=FREEZE).start()
    assert "the fleet is frozen" in play.last(facts.WaveRefused).reason
    assert Play(freeze=FREEZE).start(because="it must").last(facts.WaveEnded).outcome == "committed"


def test_a_freeze_that_begins_meanwhile_is_waited_for() -> None:
    play = Play(
        freeze={"windows": [{"from": "1970-01-01T00:17", "to": "1970-01-01T00:30", "because": "x"}], "timezone": "UTC"}
    )
    play.start(60.0)  # it is 16:40 past midnight, and soon 17
    before = list(play.began)
    assert 0 < len(before) < 5
    (wave,) = play.core.waves.open.values()
    assert wave.waits_for(play.core.migrations) == "the end of the freeze"
    assert play.core.next_deadline(play.now) <= play.now + 60
    assert play.run(200).began == before
    assert play.run(1000).last(facts.WaveEnded).outcome == "committed"


def test_a_freeze_does_not_hold_up_the_way_back() -> None:
    frozen = {"windows": [{"from": "1970-01-01T00:17", "to": "1970-01-01T00:30", "because": "x"}], "timezone": "UTC"}
    play = Play(freeze=frozen).start(60.0)
    play.stop(120.0, undo=True)
    assert play.now < 1800 - 60
    assert play.last(facts.WaveEnded).outcome == "rolled-back"
    assert set(play.serving.values()) == {"r1"}


def test_a_stopped_wave_lets_what_is_in_flight_go_on_and_leaves_what_was_moved() -> None:
    play = Play().start(15.0)
    play.stop(reason="enough")
    assert play.last(facts.WaveEnded).outcome == "stopped"
    assert play.table == {
        "aside": "committed", "store": "committed", "model": "left-out", "gate": "left-out", "tool": "left-out",
    }  # fmt: skip
    play.say(topics.COORDINATOR, commands.StopWave(wave="wave-9", deadline=play.now + 10))
    play.run()
    assert "no wave 'wave-9' is in flight" in play.last(facts.WaveRefused).reason


def test_an_operator_can_have_everything_moved_back_also_after_a_stop() -> None:
    play = Play().start(15.0)
    play.stop(0.0, undo=False)
    play.stop(400.0, undo=True)
    assert play.last(facts.WaveEnded).outcome == "rolled-back"
    assert set(play.serving.values()) == {"r1"}


# --- the table, and a fold over the log


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", ["stopping", "rolling-back", "ended"])
def test_the_table_is_total_and_nothing_leads_out_of_the_end(phase: Phase, event: str) -> None:
    to = TRANSITIONS[phase, event]
    assert (to is None) if phase is Phase.ENDED else (event == "ended") <= (to is Phase.ENDED)


def test_the_fleets_fold_knows_waves_also_from_a_snapshot() -> None:
    play = Play().start()
    view = Fleet()
    for event in play.events:
        view.apply(event)
    (wave,) = view.waves.values()
    assert (wave.outcome, wave.by, len(wave.results)) == ("committed", "operator/ann", 5)
    again = Fleet()
    again._restore(view.snapshot(view.position))
    assert again.waves == view.waves


def test_a_snapshot_keeps_the_log_from_where_an_open_wave_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlock.coordinator.decisions.SNAPSHOT_EVENTS", 1)
    play = Play().start(30.0)
    begun = next(event.header.seq for event in play.events if isinstance(event.body, facts.WaveStarted))
    emit = play.core.snapshot()
    assert emit is not None
    assert isinstance(emit.body, facts.FleetSnapshot)
    assert emit.body.start < begun


BAD = st.sets(st.sampled_from(sorted(DEPENDS)), max_size=3)


@settings(max_examples=40, deadline=None)
@given(bad=BAD, budget=st.integers(0, 2), parallel=st.integers(1, 3), kill=st.integers(1, 9), cut=st.floats(0, 1))
def test_a_coordinator_killed_at_every_point_ends_a_wave_as_one_that_lives(
    bad: set[str], budget: int, parallel: int, kill: int, cut: float
) -> None:
    whole, killed = Play(), Play()
    for play in (whole, killed):
        play.bad = bad
        play.kill_every = kill if play is killed else 0
        play.start(600.0, budget=budget, parallel=parallel)
    assert killed.table == whole.table
    assert killed.serving == whole.serving
    assert killed.last(facts.WaveEnded).outcome == whole.last(facts.WaveEnded).outcome
    moved = {agent for agent, state in whole.table.items() if state == "committed"}
    assert {agent for agent, revision in whole.serving.items() if revision == "r2"} == moved
    prefix = whole.events[: int(cut * len(whole.events))]
    parted, folded = (Coordinator(lambda: whole.config, whole.config) for _ in range(2))
    for core in (parted, folded):
        for event in prefix:
            core.apply(event)
        if core is parted:
            core.decide(prefix[-1].header.time if prefix else 0.0)
    for event in whole.events[len(prefix) :]:
        parted.apply(event)
        folded.apply(event)
    assert list(parted.waves.open) == list(folded.waves.open) == []
