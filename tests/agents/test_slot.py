"""The slot machine as transcripts: what goes in, what comes out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec.structs import replace

from interlock.agents.slot import ON_TRIAL, STANDBY_LEASE_S, STEPS, Slot
from interlock.agents.slot_io import (
    Action,
    Ask,
    AskHostLevel,
    AskRollBack,
    DrillEnded,
    Forward,
    Gone,
    HandedBack,
    HandedOver,
    Healthy,
    HostRestored,
    Input,
    Moment,
    Owned,
    Persist,
    PrepareEnded,
    Publish,
    Renew,
    Rescue,
    Restored,
    Route,
    Row,
    ShadowEnded,
    Start,
    State,
    Stop,
    Tick,
    Verified,
    Verify,
)
from interlock.broker import commands, facts
from interlock.broker.commands import Breach

M, E = "tutor-7", 7


class Play:
    """Plays inputs to a slot at a clock that only moves when told."""

    def __init__(self, row: Row | None = None) -> None:
        self.slot = Slot("alpha", row or Row("tutor", "r1", "d1"))
        self.clock = 1000.0
        self.actions: list[Action] = self.slot.begin(self.now)

    @property
    def now(self) -> Moment:
        return Moment(self.clock, self.clock + 1e9)

    def __call__(self, given: Input) -> list[Action]:
        self.actions = self.slot.handle(given, self.now)
        return self.actions

    def ask(self, command: commands.HostCommand, id: str = "") -> list[Action]:
        return self(Ask(command, id or f"c-{type(command).__name__}"))

    def facts(self) -> list[Any]:
        return [a.fact for a in self.actions if isinstance(a, Publish) and not isinstance(a.fact, facts.SlotChanged)]

    def to(self, state: State) -> Play:
        """Bring a fresh slot to a state in the ordinary way."""
        self(Healthy(self.slot.permanent or ""))
        walk = [State.SERVING, State.PREPARING, State.PREPARED, State.STARTING, State.STANDBY]
        steps = [
            lambda: self.ask(prepare()),
            lambda: self(PrepareEnded(M, True, "d2")),
            lambda: self.ask(start()),
            lambda: self(Healthy(self.slot.candidate or "")),
        ]
        after = {
            State.SHADOWING: [lambda: self.ask(shadow())],
            State.HANDING_OVER: [lambda: self.ask(hand_over())],
            State.LIVE: [lambda: self.ask(cut_over(0.5))],
        }
        played = [*steps[:2], lambda: self.ask(drill())] if state is State.DRILLING else []
        for step in played or (steps[: walk.index(state)] if state in walk else steps + after[state]):
            step()
        assert self.slot.row.state is state
        return self


def at(**rest: Any) -> dict[str, Any]:
    return {"migration": M, "agent": "tutor", "epoch": E, "deadline": 1e9 + 5000, **rest}


def prepare(**rest: Any) -> commands.Prepare:
    return commands.Prepare(**{**at(to="r2", baseline_s=1.0), **rest})


def start() -> commands.StartCandidate:
    return commands.StartCandidate(**at())


def drill(**rest: Any) -> commands.Drill:
    return commands.Drill(**{**at(promise_s=5.0), **rest})


def shadow() -> commands.Shadow:
    return commands.Shadow(**at(requests=10, seconds=5.0, min_requests=1, max_mismatches=0))


def hand_over(**rest: Any) -> commands.HandOver:
    return commands.HandOver(**{**at(route=True, promise_s=5.0, lease_s=6.0), **rest})


def cut_over(share: float) -> commands.CutOver:
    return commands.CutOver(**at(share=share, lease_s=6.0))


def roll_back(by: str = "rule response-time") -> AskRollBack:
    breach = Breach(by=by, reason="97 %", sample_time=1e9 + 999)
    return AskRollBack(commands.RollBack(migration=M, agent="tutor", epoch=E, breach=breach, issued=1e9 + 1000))


@pytest.mark.parametrize("epoch", [E - 1, E + 1])
def test_a_rollback_of_another_epoch_changes_nothing(epoch: int) -> None:
    play = Play().to(State.LIVE)
    other = msgspec.structs.replace(roll_back().command, epoch=epoch)
    assert play(AskRollBack(other)) == []
    assert play.slot.row.state is State.LIVE
    assert play(roll_back())


def test_a_good_candidate_goes_through_every_step_and_becomes_permanent() -> None:
    play = Play().to(State.STANDBY)
    play.ask(shadow())
    assert play.slot.row.state is State.SHADOWING
    play(ShadowEnded(M, True, "", {"compared": 10}))
    assert [type(f) for f in play.facts()] == [facts.StepDone]
    play.ask(cut_over(0.25))
    old, new = play.slot.permanent, play.slot.candidate
    assert Route(((old, 0.75), (new, 0.25))) in play.actions
    play.ask(cut_over(1.0))
    assert Route(((new, 1.0),)) in play.actions
    play.ask(commands.Commit(**at()))
    assert play.slot.row == Row("tutor", "r2", "d2", epoch=E)
    assert isinstance(play.actions[0], Persist)
    assert play.actions[0].row == play.slot.row
    assert Stop(old) in play.actions
    assert Route(((new, 1.0),)) in play.actions


def test_everything_but_a_rollback_is_written_before_it_is_done() -> None:
    play = Play().to(State.STANDBY)
    for command in (shadow(), None, cut_over(0.5), cut_over(1.0), commands.Commit(**at())):
        actions = play(ShadowEnded(M, True, "")) if command is None else play.ask(command)
        first = next(type(a) for a in actions if isinstance(a, Persist | Route | Start | Stop))
        assert first is Persist


def test_a_rollback_routes_first_and_writes_afterwards() -> None:
    play = Play().to(State.LIVE)
    candidate, permanent = play.slot.candidate, play.slot.permanent
    actions = play(roll_back())
    assert actions[0] == Route(((permanent, 1.0),), urgent=True)
    assert actions[1:3] == [Verify(M, permanent or ""), Rescue(candidate or "")]
    assert isinstance(actions[3], Persist)
    assert Stop(candidate or "") not in actions  # the old one is not verified yet: it may be the sick one
    actions = play(Verified(M, True, restored=1e9 + 1000.002, routed=1e9 + 1000.001))
    assert [type(a) for a in actions[:2]] == [Persist, Publish]
    assert Stop(candidate or "") in actions
    (done,) = play.facts()
    assert (done.level, done.revision, done.verified, done.breach.by) == (1, "r1", True, "rule response-time")
    assert play.slot.row == Row("tutor", "r1", "d1", epoch=E)


def test_a_candidate_that_eats_memory_is_stopped_at_once() -> None:
    play = Play().to(State.LIVE)
    candidate = play.slot.candidate or ""
    actions = play(roll_back("rule gpu-memory"))
    assert isinstance(actions[0], Route)
    assert Stop(candidate) in actions


def test_a_second_rollback_of_the_same_migration_does_nothing() -> None:
    play = Play().to(State.LIVE)
    play(roll_back())
    assert play(roll_back()) == []
    play(Verified(M, True, 0.0, 0.0))
    assert play(roll_back()) == []


@pytest.mark.parametrize("state", sorted(ON_TRIAL))
def test_from_every_state_on_trial_a_rollback_leads_back_to_the_permanent_revision(state: State) -> None:
    play = Play().to(state)
    play(roll_back())
    assert play.slot.row.state is State.ROLLING_BACK
    play(Verified(M, True, 0.0, 0.0))
    assert play.slot.row == Row("tutor", "r1", "d1", epoch=E)


def test_a_candidate_that_dies_is_rolled_back_without_anybody_asking() -> None:
    play = Play().to(State.LIVE)
    actions = play(Gone(play.slot.candidate or "", "process-died", "SIGABRT", 1e9 + 1000))
    assert isinstance(actions[0], Route)
    assert actions[0].urgent
    play(Verified(M, True, 0.0, 0.0))
    assert play.facts()[0].breach.by == "host process-died"


def test_an_expired_lease_rolls_back_and_a_renewed_one_does_not() -> None:
    play = Play().to(State.LIVE)
    play.clock += 5
    play(Renew(commands.RenewLease(migration=M, agent="tutor", epoch=E, lease_s=6.0)))
    play.clock += 5
    assert play(Tick()) == []
    play(Renew(commands.RenewLease(migration=M, agent="tutor", epoch=E - 1, lease_s=600.0)))  # stale epoch
    play.clock += 1.1
    assert play(Tick())[0] == Route(((play.slot.permanent or "", 1.0),), urgent=True)


def test_a_candidate_on_standby_is_not_kept_for_ever_either() -> None:
    play = Play().to(State.STANDBY)
    assert play.slot.next_deadline() == play.clock + STANDBY_LEASE_S
    play.clock += STANDBY_LEASE_S
    assert play(Tick()) != []


def test_if_both_are_gone_requests_wait_until_the_old_revision_is_back() -> None:
    play = Play().to(State.LIVE)
    old = play.slot.permanent or ""
    actions = play(Gone(old, "process-died", "SIGKILL", 0.0))
    assert actions[0] == Route(((play.slot.candidate or "", 1.0),), urgent=True)  # whoever is healthy serves
    actions = play(Gone(play.slot.candidate or "", "process-died", "SIGKILL", 0.0))
    assert actions[0] == Route((), urgent=True)
    assert not any(isinstance(a, Verify) for a in actions)
    assert Stop(play.slot.candidate or "") not in actions
    actions = play(Healthy(play.slot.permanent or ""))
    name = play.slot.permanent or ""
    assert actions[:2] == [Route(((name, 1.0),), urgent=True), Verify(M, name)]
    play(Verified(M, True, 0.0, 0.0))
    assert play.facts()[0].level == 2


def test_an_old_revision_that_does_not_answer_is_started_again() -> None:
    play = Play().to(State.LIVE)
    old = play.slot.permanent
    play(roll_back())
    actions = play(Verified(M, False, 0.0, 0.0, "no answer in 2 s"))
    assert [(type(f), f.level) for f in play.facts()] == [(facts.RollBackEscalated, 2)]
    assert Stop(old or "") in actions
    assert any(isinstance(a, Start) and a.revision == "r1" for a in actions)
    play(Healthy(play.slot.permanent or ""))
    play(Verified(M, True, 0.0, 0.0))
    assert play.facts()[0].level == 2


def test_an_old_revision_that_dies_while_it_is_verified_is_started_again_once_and_nothing_else_is_waited_for() -> None:
    play = Play().to(State.LIVE)
    old = play.slot.permanent or ""
    play(roll_back())  # both died at once; of the candidate it was heard first
    play(Gone(old, "process-died", "SIGKILL", 0.0))
    again = play.slot.permanent or ""
    assert play(Verified(M, False, 0.0, 0.0, "no answer in 2 s", instance=old)) == []
    assert play(Verified(M, True, 0.0, 0.0, instance=old)) == []
    assert play.slot.permanent == again
    assert Verify(M, again) in play(Healthy(again))
    play(Verified(M, True, 0.0, 0.0, instance=again))
    assert play.facts()[0].level == 2


ELSEWHERE = {State.ARRIVING, State.FORWARDING}


@pytest.mark.parametrize("state", [s for s in State if s is not State.SERVING and s not in ELSEWHERE])
def test_a_restarted_host_undoes_whatever_was_not_made_permanent(state: State) -> None:
    play = Play(Row("tutor", "r1", "d1", "r2", "d2", state, M, E))
    assert any(isinstance(a, Start) and (a.revision, a.role) == ("r1", "permanent") for a in play.actions)
    play(Healthy(play.slot.permanent or ""))
    play(Verified(M, True, 0.0, 0.0))
    (done,) = play.facts()
    assert (done.migration, done.breach.by, done.level) == (M, "host restarted", 2)
    assert play.slot.row == Row("tutor", "r1", "d1", epoch=E)


def test_a_restarted_host_starts_nothing_of_an_agent_that_is_another_hosts() -> None:
    moved = Play(Row("tutor", "r1", "d1", state=State.FORWARDING, migration=M, epoch=E, place="beta"))
    assert [a for a in moved.actions if not isinstance(a, Publish)] == [Forward("beta")]
    moved.ask(prepare(epoch=E + 1, migration="tutor-8"))
    assert "it was moved to host beta" in moved.facts()[0].reason
    arriving = Play(Row("tutor", "r2", "d2", state=State.ARRIVING, migration=M, epoch=E, place="alpha"))
    assert [a for a in arriving.actions if not isinstance(a, Publish)] == []
    assert any(isinstance(a, Start) for a in arriving(Owned()))
    assert arriving.slot.row == Row("tutor", "r2", "d2", epoch=E)


def test_what_can_not_be_taken_is_refused_with_the_reason() -> None:
    play = Play()
    play.ask(prepare())
    assert "not healthy" in play.facts()[0].reason
    play.to(State.SERVING)
    play.ask(prepare(deadline=1.0))
    assert "deadline" in play.facts()[0].reason
    play.ask(cut_over(1.0))
    assert "not in flight" in play.facts()[0].reason
    play.ask(prepare())
    play.ask(prepare(migration="tutor-9", epoch=9))
    assert f"{M} is in flight" in play.facts()[0].reason
    play(roll_back())
    play(Verified(M, True, 0.0, 0.0))
    play.ask(prepare(migration="tutor-3", epoch=3))
    assert "older than 7" in play.facts()[0].reason


def test_a_revision_that_fails_its_checks_changes_nothing() -> None:
    play = Play().to(State.PREPARING)
    play(PrepareEnded(M, False, check="parse", reason="tutor.py:3: invalid syntax"))
    assert [type(f) for f in play.facts()] == [facts.StepFailed]
    assert play.slot.row == Row("tutor", "r1", "d1", epoch=E)
    assert not any(isinstance(a, Start | Stop | Route) for a in play.actions)


@pytest.mark.parametrize("state", list(State))
def test_each_state_takes_exactly_the_steps_of_the_table(state: State) -> None:
    row = Row("tutor", "r1", "d1", "r2", "d2", state, M, E)
    for command in (prepare(), drill(), start(), shadow(), cut_over(1.0), commands.Commit(**at())):
        slot = Slot("alpha", replace(row))
        slot.permanent, slot.permanent_up, slot.candidate = "p", True, "c"
        actions = slot.handle(Ask(command, "c"), Moment(0.0, 1e9))
        refused = any(isinstance(a, Publish) and isinstance(a.fact, facts.CommandRefused) for a in actions)
        from interlock.agents.slot import step_of

        assert refused is ((state, step_of(command)) not in STEPS)


class AnyOrder(RuleBasedStateMachine):
    """Whatever comes in whatever order, live requests go only to instances that are up, and the row stays sound."""

    @initialize()
    def begin(self) -> None:
        self.play = Play()
        self.routed: tuple[tuple[str, float], ...] = ()
        self.started: dict[str, str] = {}
        self.up: set[str] = set()
        self.epoch = E
        self.take(self.play.actions)

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Route(shares):
                    self.routed = shares
                case Start():
                    assert action.instance not in self.started
                    self.started[action.instance] = action.role
                case Stop(instance):
                    self.up.discard(instance)

    def command(self, command: commands.HostCommand) -> None:
        self.take(self.play.ask(command))

    @rule(which=st.sampled_from(
        ["prepare", "drill", "start", "cold", "shadow", "copy", "hand-over", "cut", "all", "commit", "next"]
    ))  # fmt: skip
    def ask(self, which: str) -> None:
        if which == "next":
            self.epoch += 1
        rest = {"migration": f"tutor-{self.epoch}", "epoch": self.epoch}
        made = {
            "prepare": lambda: prepare(**rest),
            "drill": lambda: drill(**rest),
            "cold": lambda: commands.StartCandidate(**{**at(), **rest}, cold=True),
            "start": lambda: commands.StartCandidate(**{**at(), **rest}),
            "shadow": lambda: commands.Shadow(
                **{**at(requests=1, seconds=1.0, min_requests=1, max_mismatches=0), **rest}
            ),
            "copy": lambda: hand_over(route=False, **rest),
            "hand-over": lambda: hand_over(**rest),
            "cut": lambda: commands.CutOver(**{**at(share=0.5, lease_s=6.0), **rest}),
            "all": lambda: commands.CutOver(**{**at(share=1.0, lease_s=6.0), **rest}),
            "commit": lambda: commands.Commit(**{**at(), **rest}),
        }.get(which)
        if made is not None:
            self.command(made())

    @rule(ok=st.booleans(), exclusive=st.booleans())
    def prepared(self, ok: bool, exclusive: bool) -> None:
        self.take(self.play(PrepareEnded(f"tutor-{self.epoch}", ok, "d2", exclusive, "parse", "bad")))

    @rule(ok=st.booleans())
    def drilled(self, ok: bool) -> None:
        self.take(self.play(DrillEnded(ok, "slow", {"1": 0.1})))

    @rule()
    def a_neighbour_needs_the_host(self) -> None:
        self.take(self.play(AskHostLevel("pilot", "it does not start")))

    @rule()
    def the_host_is_back(self) -> None:
        self.take(self.play(HostRestored(self.play.slot.row.migration or "")))

    @rule(ok=st.booleans())
    def restored(self, ok: bool) -> None:
        self.take(self.play(Restored(self.play.slot.row.migration or "", ok, "no backup")))

    @rule(data=st.data())
    def healthy(self, data: st.DataObject) -> None:
        waiting = sorted({self.play.slot.permanent, self.play.slot.candidate} & set(self.started) - self.up)
        if waiting:
            name = data.draw(st.sampled_from(waiting))
            self.up.add(name)
            self.take(self.play(Healthy(name)))

    @rule(data=st.data())
    def gone(self, data: st.DataObject) -> None:
        if self.started:
            name = data.draw(st.sampled_from(sorted(self.started)))
            self.up.discard(name)
            self.take(self.play(Gone(name, "process-died", "", 0.0)))

    @rule(ok=st.booleans())
    def shadow_ended(self, ok: bool) -> None:
        self.take(self.play(ShadowEnded(f"tutor-{self.epoch}", ok, "")))

    @rule(ok=st.booleans(), data=st.data())
    def handed(self, ok: bool, data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from([HandedOver, HandedBack]))
        self.take(self.play(kind(f"tutor-{self.epoch}", ok, "cut off")))

    @rule(ok=st.booleans())
    def verified(self, ok: bool) -> None:
        self.take(self.play(Verified(self.play.slot.row.migration or "", ok, 0.0, 0.0)))

    @rule()
    def asked_back(self) -> None:
        body = commands.RollBack(
            migration=f"tutor-{self.epoch}", agent="tutor", epoch=self.epoch, breach=Breach(by="x", reason=""), issued=0
        )
        self.take(self.play(AskRollBack(body)))

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.play.clock += seconds
        self.take(self.play(Tick()))

    @invariant()
    def sound(self) -> None:
        slot = self.play.slot
        assert slot.row.permanent in ("r1", "r2")
        if slot.row.state is State.SERVING:
            assert slot.row.candidate is None
            assert slot.row.migration is None
        for instance, share in self.routed:
            assert instance in (slot.permanent, slot.candidate)
            assert instance in self.up
            assert 0 < share <= 1
        assert not self.routed or sum(share for _, share in self.routed) == pytest.approx(1.0)
        moving = slot.row.state is State.HANDING_OVER or slot.handed.returning
        assert not (moving and self.routed), "somebody may change the state while it is moved"
        assert not moving or slot.next_deadline() is not None, "requests would wait for ever"
        if slot.permanent in self.up and not moving:
            assert self.routed, "somebody is up and nobody serves"


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
