"""The tables of the slot machine, walked: every state with every event, every level of a rollback with every sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from interlock.agents.ladder import LADDER, LEAST_S, NEXT, SLOW_S, WITHIN_S, Rung, Sign, Turn
from interlock.agents.slot import ON_TRIAL, STEPS, Slot
from interlock.agents.slot_io import (
    Action,
    Arrived,
    Ask,
    AskHostLevel,
    AskRollBack,
    DrillEnded,
    EndDrill,
    Gone,
    HandedBack,
    HandedOver,
    Healthy,
    HostRestored,
    Input,
    Moment,
    Owned,
    PrepareEnded,
    Publish,
    Renew,
    Rescue,
    Restore,
    Restored,
    RestoreHost,
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

M, E, WALL = "tutor-7", 7, 1e9


def at(**rest: Any) -> dict[str, Any]:
    return {"migration": M, "agent": "tutor", "epoch": E, "deadline": WALL + 1e6, **rest}


def breach(by: str = "rule response-time", sample_time: float | None = None) -> Breach:
    return Breach(by=by, reason="slow", sample_time=sample_time)


def asked_back(by: str = "rule response-time", issued: float = WALL, sample_time: float | None = None) -> AskRollBack:
    body = breach(by, sample_time)
    return AskRollBack(commands.RollBack(migration=M, agent="tutor", epoch=E, breach=body, issued=issued))


class Play:
    """A slot whose candidate has half of the live requests, at a clock that only moves when told."""

    def __init__(self, state: State = State.LIVE, *, exclusive: bool = False) -> None:
        verb = state in (State.SERVING, State.DRILLING)
        row = Row("tutor", "r1", "d1", None if verb else "r2", None if verb else "d2", state, None if verb else M, E)
        self.slot = Slot("alpha", row)
        self.slot.permanent, self.slot.permanent_up = "old", True
        self.slot.exclusive = exclusive
        if state in (State.STARTING, State.STANDBY, State.SHADOWING, State.HANDING_OVER, State.LIVE):
            self.slot.candidate, self.slot.candidate_up = "new", state is not State.STARTING
        self.slot.share = 0.5 if state is State.LIVE else 0.0
        self.clock = 100.0
        self.actions: list[Action] = []

    def __call__(self, given: Input) -> list[Action]:
        self.actions = self.slot.handle(given, self.now)
        return self.actions

    @property
    def now(self) -> Moment:
        return Moment(self.clock, WALL + self.clock)

    @property
    def rung(self) -> Rung | None:
        return None if self.slot.ascent is None else self.slot.ascent.rung

    def wait(self, seconds: float) -> list[Action]:
        self.clock += seconds
        return self(Tick())

    def facts(self, kind: type) -> list[Any]:
        return [a.fact for a in self.actions if isinstance(a, Publish) and isinstance(a.fact, kind)]

    def to(self, rung: Rung) -> Play:
        """Roll back, and let everything fail up to there."""
        self(asked_back())
        if rung is Rung.KEPT:
            self(Verified(M, False, 0.0, 0.0))
            self.wait(WITHIN_S[Rung.CODE])
        elif rung is not Rung.ROUTE:
            self(Gone("new", "process-died", "", 0.0))
            self(Verified(M, False, 0.0, 0.0))
        if rung in (Rung.HOST, Rung.BACKUP, Rung.LOST):
            self.wait(WITHIN_S[Rung.CODE])
        if rung in (Rung.BACKUP, Rung.LOST):
            self.wait(WITHIN_S[Rung.HOST])
            self.died()
        if rung is Rung.LOST:
            self(Restored(M, False, "there is no backup yet"))
        assert self.rung is rung
        return self

    def died(self) -> list[Action]:
        return self(Gone(self.slot.permanent or "", "start-failed", "it does not start", 0.0))

    def came_back(self) -> list[Action]:
        self(Healthy(self.slot.permanent or ""))
        return self(Verified(M, True, 0.0, 0.0, instance=self.slot.permanent or ""))


def elsewhere(state: State) -> Play:
    """A slot whose agent goes to another host, or comes from there."""
    play = Play(state)
    play.slot.row = replace(play.slot.row, place="beta")
    if state is not State.LIVE:
        play.slot.row = replace(play.slot.row, candidate=None, candidate_digest=None)
        play.slot.permanent, play.slot.permanent_up = None, False
    return play


EVENTS: dict[str, Callable[[], Input]] = {
    **{
        name: (lambda body=body: Ask(body, "c"))  # type: ignore[misc]
        for name, body in {
            "prepare": commands.Prepare(**at(to="r2", baseline_s=0.0)),
            "drill": commands.Drill(**at(promise_s=5.0)),
            "drill, alone": commands.Drill(**{**at(promise_s=5.0), "migration": ""}),
            "start-candidate": commands.StartCandidate(**at()),
            "start-candidate, cold": commands.StartCandidate(**at(), cold=True),
            "shadow": commands.Shadow(**at(requests=1, seconds=1.0, min_requests=1, max_mismatches=0)),
            "hand-over": commands.HandOver(**at(route=True, promise_s=5.0, lease_s=6.0)),
            "cut-over": commands.CutOver(**at(share=1.0, lease_s=6.0)),
            "commit": commands.Commit(**at()),
        }.items()
    },
    "roll back": asked_back,
    "roll back, by an operator": lambda: asked_back("operator", WALL + 1e6),
    "renewed": lambda: Renew(commands.RenewLease(migration=M, agent="tutor", epoch=E, lease_s=6.0)),
    "prepared": lambda: PrepareEnded(M, True, "d2"),
    "not prepared": lambda: PrepareEnded(M, False, check="parse", reason="bad"),
    "drilled": lambda: DrillEnded(True, seconds={"1": 0.1}),
    "drill failed": lambda: DrillEnded(False, "slow"),
    "old healthy": lambda: Healthy("old"),
    "candidate healthy": lambda: Healthy("new"),
    "stranger healthy": lambda: Healthy("stranger"),
    "old gone": lambda: Gone("old", "process-died", "SIGKILL", WALL),
    "candidate gone": lambda: Gone("new", "process-died", "SIGKILL", WALL),
    "stranger gone": lambda: Gone("stranger", "process-died", "SIGKILL", WALL),
    "shadow passed": lambda: ShadowEnded(M, True, ""),
    "shadow failed": lambda: ShadowEnded(M, False, "3 differ"),
    "handed over": lambda: HandedOver(M, True, limit_s=4.0),
    "not handed over": lambda: HandedOver(M, False, "cut off"),
    "handed back": lambda: HandedBack(M, True),
    "not handed back": lambda: HandedBack(M, False, "cut off"),
    "arrived there": lambda: Arrived(M, True, endpoint="tcp://10.0.0.2:1"),
    "not arrived there": lambda: Arrived(M, False, "no room"),
    "ours, with its process": lambda: Owned("new"),
    "ours, without": Owned,
    "verified": lambda: Verified(M, True, WALL, WALL),
    "not verified": lambda: Verified(M, False, WALL, WALL, "silent"),
    "verified, of a former instance": lambda: Verified(M, False, WALL, WALL, "silent", instance="former"),
    "a neighbour needs the host": lambda: AskHostLevel("pilot", "it does not start"),
    "the host is back": lambda: HostRestored(M),
    "restored": lambda: Restored(M, True),
    "not restored": lambda: Restored(M, False, "none"),
    "tick": Tick,
}
STATES: dict[str, Callable[[], Play]] = {
    **{str(state): (lambda state=state: Play(state)) for state in (State.SERVING, *sorted(ON_TRIAL))},  # type: ignore[misc]
    **{f"rolling back, {rung.name.lower()}": (lambda rung=rung: Play().to(rung)) for rung in Rung},  # type: ignore[misc]
    "rolling back, exclusive": lambda: Play(exclusive=True).to(Rung.ROUTE),
    "live, elsewhere": lambda: elsewhere(State.LIVE),
    "arriving": lambda: elsewhere(State.ARRIVING),
    "forwarding": lambda: elsewhere(State.FORWARDING),
}


def test_every_input_of_the_machine_is_among_the_events() -> None:
    assert {type(made()) for made in EVENTS.values()} == set(Input.__args__)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_every_state_takes_every_event(state: str, event: str) -> None:
    play = STATES[state]()
    actions = play(EVENTS[event]())
    slot = play.slot
    assert slot.row.state in State
    assert (slot.ascent is not None) is (slot.row.state in (State.ROLLING_BACK, State.KEPT))
    assert slot.row.permanent in ("r1", "r2")
    if slot.row.state is State.SERVING:
        assert slot.row.candidate is None
        assert slot.row.migration is None
    routes = [action for action in actions if isinstance(action, Route)]
    for name, share in routes[-1].shares if routes else ():
        assert name in (slot.permanent, slot.candidate, "tutor@beta")
        assert 0 < share <= 1
    if slot.permanent is None and not slot.row.place:  # it will be brought back, or it was stopped for the candidate
        restoring = slot.ascent is not None and slot.ascent.restoring
        assert restoring or slot.exclusive


def test_no_row_of_the_ladder_is_missing_and_each_level_leads_on() -> None:
    assert set(LADDER) == {(rung, sign) for rung in Rung for sign in Sign}
    assert all(LADDER[rung, Sign.VERIFIED] is Turn.FINISH for rung in Rung)
    climbing = {rung for (rung, _), turn in LADDER.items() if turn is Turn.CLIMB}
    assert climbing == set(NEXT)
    assert set(WITHIN_S) == set(LEAST_S) == set(Rung) - {Rung.LOST, Rung.KEPT}
    assert list(WITHIN_S.values()) == [5.0, 10.0, 30.0, 60.0]


@pytest.mark.parametrize("sign", Sign)
@pytest.mark.parametrize("rung", Rung)
def test_every_level_does_with_every_sign_what_the_table_says(rung: Rung, sign: Sign) -> None:
    play = Play().to(rung)
    given: Verified | None = Verified(M, True, WALL, WALL) if sign is Sign.VERIFIED else None
    play.actions = play.slot._heard(sign, "why", play.now, given)
    match LADDER[rung, sign]:
        case Turn.FINISH:
            assert play.slot.row == Row("tutor", "r1", "d1", epoch=E)
            assert play.facts(facts.RolledBack)
        case Turn.START:
            assert any(isinstance(a, Start) and a.revision == "r1" for a in play.actions)
            assert play.rung is rung
        case Turn.CLIMB:
            kept = rung is Rung.CODE and play.slot.candidate is not None
            assert play.rung is (Rung.KEPT if kept else NEXT[rung])
        case Turn.WAIT:
            assert play.actions == []
            assert play.rung is rung


def test_the_steps_of_the_table_begin_and_end_in_states() -> None:
    assert {state for state, _ in STEPS} | set(STEPS.values()) <= set(State)
    assert set(commands.Step.__args__) - {"receive"} == {step for _, step in STEPS}


# --- transcripts of bad rollbacks


def test_level_1_fails_so_level_2_starts_the_old_revision_while_requests_wait() -> None:
    play = Play()
    play(asked_back())
    actions = play(Verified(M, False, 0.0, 0.0, "no answer in 2 s", instance="old"))
    assert actions[:3] == [Route((), urgent=True), Rescue("old"), Stop("old")]
    assert isinstance(actions[3], Start)
    (told,) = play.facts(facts.RollBackEscalated)
    assert (told.level, told.reason) == (2, "no answer in 2 s")
    assert Stop("new") not in actions  # it may be the healthy one
    actions = play.came_back()
    (done,) = play.facts(facts.RolledBack)
    assert done.level == 2
    assert Stop("new") in actions


def test_the_time_of_a_level_runs_from_the_sample_that_showed_the_breach() -> None:
    play = Play()
    play(asked_back(sample_time=WALL + play.clock - 1.0))
    assert play.slot.next_deadline() == play.clock + 4.0
    late = Play()
    late(
        asked_back(sample_time=WALL + late.clock - 60.0)
    )  # the sample is old: the level has its least time all the same
    assert late.slot.next_deadline() == late.clock + LEAST_S[Rung.ROUTE]
    fast = Play()
    fast(asked_back(sample_time=WALL + fast.clock + 50.0))  # another clock, which is ahead
    assert fast.slot.next_deadline() == fast.clock + 5.0


def test_a_healthy_candidate_is_kept_if_the_old_one_can_not_be_started() -> None:
    play = Play()
    play(asked_back())
    play(Verified(M, False, 0.0, 0.0, "silent"))
    play.died()  # and is started again: the time is not up
    actions = play.wait(10.0)
    assert play.slot.row.state is State.KEPT
    assert actions[0] == Route((("new", 1.0),), urgent=True)
    (page,) = play.facts(facts.RollBackFailed)
    assert page.kept == "r2"
    assert [note["what"] for note in page.evidence["levels"]][:2] == ["level 1", "unverified: silent"]
    starts = [a for a in play.died() if isinstance(a, Start)]
    assert [start.delay_s for start in starts] == [SLOW_S]  # it goes on trying, slowly
    assert Route((("new", 1.0),), urgent=True) in play.actions
    play.came_back()
    assert play.facts(facts.RolledBack)
    assert Stop("new") in play.actions


def test_a_rule_that_goes_on_firing_does_not_end_the_candidate_that_is_kept_and_an_operator_may() -> None:
    play = Play().to(Rung.KEPT)
    assert play(asked_back("rule response-time", WALL + play.clock + 5.0)) == []
    assert play(asked_back("operator", WALL)) == []  # a straggler of before
    actions = play(asked_back("operator", WALL + play.clock + 5.0))
    assert Stop("new") in actions
    assert any(isinstance(a, RestoreHost) for a in actions)
    assert play.rung is Rung.HOST


def test_an_operator_may_commit_the_candidate_that_is_kept() -> None:
    play = Play().to(Rung.KEPT)
    pending = play.slot.permanent
    actions = play(Ask(commands.Commit(**at()), "c"))
    assert play.slot.row == Row("tutor", "r2", "d2", epoch=E)
    assert Route((("new", 1.0),)) in actions
    assert Stop(pending or "") in actions


def test_a_kept_candidate_that_dies_leads_on_to_the_host_level() -> None:
    play = Play().to(Rung.KEPT)
    actions = play(Gone("new", "process-died", "SIGSEGV", WALL))
    assert play.rung is Rung.HOST
    assert actions[0] == Route((), urgent=True)
    assert any(isinstance(a, RestoreHost) for a in actions)


@pytest.mark.parametrize("state", [State.STANDBY, State.SHADOWING])
def test_a_candidate_that_was_never_live_is_not_kept(state: State) -> None:
    play = Play(state)
    play(asked_back("check shadow"))
    play(Verified(M, False, 0.0, 0.0))
    play.wait(10.0)
    assert play.rung is Rung.HOST
    assert Stop("new") in play.actions


def test_where_there_is_no_room_for_two_the_candidate_goes_before_the_old_one_is_started_again() -> None:
    play = Play(exclusive=True)
    actions = play(asked_back())
    assert Stop("new") not in actions
    actions = play(Verified(M, False, 0.0, 0.0, "silent"))
    (start,) = [a for a in actions if isinstance(a, Start)]
    assert set(start.after) == {"old", "new"}
    assert all(stop in actions for stop in (Stop("old"), Stop("new")))


def test_all_levels_in_a_row_and_then_somebody_is_paged_with_all_that_was_tried() -> None:
    play = Play()
    play(asked_back())
    play(Gone("new", "process-died", "SIGKILL", WALL))
    play(Verified(M, False, 0.0, 0.0, "silent"))
    for _ in range(3):
        play.died()
    play.wait(10.0)
    assert play.rung is Rung.HOST
    assert RestoreHost(M, "its 10 s are over") in play.actions
    play(HostRestored(M, ("pilot",)))
    play.wait(20.0)
    assert play.rung is Rung.HOST  # a start is in hand, and is let come to its end
    actions = play.died()
    assert play.rung is Rung.BACKUP
    assert Restore(M) in actions
    assert not any(isinstance(a, Start) for a in actions)  # not while files are put in place
    actions = play(Restored(M, True, evidence={"backup": "b1"}))
    assert any(isinstance(a, Start) for a in actions)
    play.died()
    play.wait(30.0)
    assert play.rung is Rung.LOST
    (page,) = play.facts(facts.RollBackFailed)
    assert (page.level, page.kept) == (4, "")
    told = [note["what"] for note in page.evidence["levels"]]
    assert [what for what in told if what.startswith("level")] == ["level 1", "level 2", "level 3", "level 4"]
    assert "host-back: the host's slots are back: pilot" in told
    (start,) = [a for a in play.died() if isinstance(a, Start)]
    assert start.delay_s == SLOW_S
    play.came_back()
    (done,) = play.facts(facts.RolledBack)
    assert done.level == 4
    assert len(done.evidence["levels"]) >= len(told)


def test_a_restore_that_outlasts_the_time_still_leads_to_a_start() -> None:
    play = Play().to(Rung.HOST)
    play.wait(30.0)
    play.died()
    actions = play.wait(60.0)
    assert play.rung is Rung.LOST
    assert not any(isinstance(a, Start) for a in actions)  # the files are not in place yet
    (start,) = [a for a in play(Restored(M, True)) if isinstance(a, Start)]
    assert start.delay_s < SLOW_S


def test_what_an_instance_of_before_did_not_answer_says_nothing_of_the_one_that_was_started() -> None:
    play = Play()
    play(asked_back())
    play(Gone("old", "process-died", "SIGKILL", WALL))
    assert play.rung is Rung.CODE
    assert play(Verified(M, False, 0.0, 0.0, "silent", instance="old")) == []


# --- level 3 as a neighbour sees it


def test_a_slot_that_serves_is_not_touched_by_level_3_of_another() -> None:
    play = Play(State.SERVING)
    assert play(AskHostLevel("pilot", "it does not start")) == []
    assert play.slot.row.state is State.SERVING


@pytest.mark.parametrize("state", sorted(ON_TRIAL - {State.DRILLING}))
def test_a_slot_with_a_migration_in_flight_rolls_back_for_level_3_of_another(state: State) -> None:
    play = Play(state)
    play(AskHostLevel("pilot", "it does not start"))
    assert play.slot.row.state is State.ROLLING_BACK
    play(Verified(M, True, 0.0, 0.0))
    (done,) = play.facts(facts.RolledBack)
    assert done.breach.by == "host level-3"
    assert "pilot" in done.breach.reason


@pytest.mark.parametrize("rung", Rung)
def test_a_slot_that_rolls_back_already_goes_on_as_it_is(rung: Rung) -> None:
    play = Play().to(rung)
    assert play(AskHostLevel("pilot", "it does not start")) == []
    assert play.rung is rung


# --- the drill, the cold class, a sick old one


def test_a_drill_without_a_migration_comes_back_to_serving_whatever_it_found() -> None:
    for ended in (DrillEnded(True, seconds={"1": 0.01}), DrillEnded(False, "slow", problems=("slow",))):
        play = Play(State.SERVING)
        play(Ask(commands.Drill(**{**at(promise_s=5.0), "migration": ""}), "c"))
        assert play.slot.row.state is State.DRILLING
        play(ended)
        assert play.slot.row == Row("tutor", "r1", "d1", epoch=E)
        (told,) = play.facts(facts.DrillDone)
        assert told.command == "c"
        assert play.facts(facts.StepDone if ended.ok else facts.StepFailed)


def test_a_drill_that_fails_ends_the_migration_before_anything_was_started() -> None:
    play = Play(State.PREPARED)
    play(Ask(commands.Drill(**at(promise_s=5.0)), "c"))
    play(DrillEnded(False, "level 1 took 7.00 s, 5 s are promised"))
    assert play.slot.row == Row("tutor", "r1", "d1", epoch=E)
    (failed,) = play.facts(facts.StepFailed)
    assert (failed.migration, failed.step, failed.check) == (M, "drill", "drill")


def test_a_permanent_instance_that_dies_in_a_drill_ends_it_and_is_started_again() -> None:
    play = Play(State.DRILLING)
    actions = play(Gone("old", "process-died", "SIGKILL", WALL))
    assert actions[:2] == [Route((), urgent=True), EndDrill()]
    assert any(isinstance(a, Start) for a in actions)


def test_a_host_that_was_restarted_in_a_drill_has_nothing_to_undo() -> None:
    slot = Slot("alpha", Row("tutor", "r1", "d1", state=State.DRILLING, epoch=E))
    actions = slot.begin(Moment(0.0, WALL))
    assert slot.row.state is State.SERVING
    assert not any(isinstance(a, Verify) for a in actions)


def test_a_cold_candidate_starts_once_the_old_one_is_gone_and_gets_all_requests_that_waited() -> None:
    play = Play(State.PREPARED, exclusive=True)
    actions = play(Ask(commands.StartCandidate(**at(), cold=True), "c"))
    (start,) = [a for a in actions if isinstance(a, Start)]
    assert start.after == ("old",)
    assert actions.index(Route(())) < actions.index(start)
    assert Stop("old") in actions
    actions = play(Healthy(start.instance))
    assert play.slot.row.state is State.LIVE
    assert Route(((start.instance, 1.0),)) in actions
    play(Ask(commands.CutOver(**at(share=1.0, lease_s=6.0)), "c2"))
    play(Ask(commands.Commit(**at()), "c3"))
    assert play.slot.row == Row("tutor", "r2", "d2", epoch=E)


@pytest.mark.parametrize("healthy", [False, True])
def test_a_cold_rollback_starts_the_old_revision_again_once_the_candidate_is_gone(healthy: bool) -> None:
    play = Play(State.PREPARED, exclusive=True)
    play(Ask(commands.StartCandidate(**at(), cold=True), "c"))
    candidate = play.slot.candidate or ""
    if healthy:
        play(Healthy(candidate))
    actions = play(asked_back() if healthy else Gone(candidate, "start-failed", "no heart", WALL))
    (start,) = [a for a in actions if isinstance(a, Start)]
    assert (start.revision, start.after) == ("r1", (candidate,))
    assert Stop(candidate) in actions
    play.came_back()
    (done,) = play.facts(facts.RolledBack)
    assert done.level == 2


def test_a_sick_old_revision_is_migrated_away_from_only_if_somebody_asks_for_that() -> None:
    play = Play(State.SERVING)
    play.slot.permanent_up = False
    play(Ask(commands.Prepare(**at(to="r2", baseline_s=0.0)), "c"))
    assert "not healthy" in play.facts(facts.CommandRefused)[0].reason
    play(Ask(commands.Prepare(**at(to="r2", baseline_s=0.0), sick_ok=True), "c"))
    assert play.slot.row.state is State.PREPARING


def test_of_a_sick_old_one_and_a_candidate_that_a_rule_condemns_the_healthy_one_serves() -> None:
    play = Play()
    play.slot.permanent_up = False  # it was sick before, and is being started
    actions = play(asked_back())
    assert actions[0] == Route((), urgent=True)
    assert Stop("new") not in actions
    play.died()
    actions = play.wait(10.0)
    assert play.slot.row.state is State.KEPT
    assert actions[0] == Route((("new", 1.0),), urgent=True)
