"""The token of an agent without a port: whatever happens in whatever order, at most one instance may work."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from interlock.agents.token_machine import HURRY_S, TRANSITIONS, Give, Kill, Phase, Take, Token

NAMES = ["a", "b", "c"]


def token(*names: str, limit_s: float = 5.0) -> Token:
    made = Token()
    for name in names:
        assert made.attach(name, limit_s, 0.0) == []
    return made


def test_it_goes_to_the_next_only_once_the_first_has_stopped() -> None:
    one = token("a", "b")
    assert one.want("a", 0.0) == [Give("a")]
    assert one.given("a", 0.1) == []
    assert one.phase is Phase.ACTIVE
    assert one.want("b", 1.0) == [Take("a")]
    assert one.given("a", 1.1) == []  # said before it heard
    assert one.released("a", 1.2) == [Give("b")]
    assert one.holder == "b"


def test_one_that_does_not_stop_in_its_time_is_killed_before_another_begins() -> None:
    one = token("a", "b")
    one.want("a", 0.0)
    one.given("a", 0.0)
    assert one.want("b", 10.0) == [Take("a")]
    assert one.next_deadline() == 15.0
    assert one.expire(14.9) == []
    assert one.expire(15.0) == [Kill("a")]
    assert one.released("a", 15.1) == []  # too late to be believed: its end is waited for
    assert one.gone("a", 15.2) == [Give("b")]


def test_one_that_is_rolled_back_has_a_second() -> None:
    one = token("a", "b")
    one.want("a", 0.0)
    assert one.want("b", 10.0) == [Take("a")]
    one.hurry("a", 10.0)
    one.hurry("b", 10.0)
    assert one.next_deadline() == 10.0 + HURRY_S


def test_one_that_says_that_it_can_t_stop_is_killed_at_once() -> None:
    one = token("a", "b")
    one.want("a", 0.0)
    one.want("b", 10.0)
    assert one.refused("a", 10.1) == [Kill("a")]


def test_one_that_died_frees_it_and_what_is_wanted_but_not_there_gets_it_when_it_comes() -> None:
    one = token("a")
    one.want("a", 0.0)
    assert one.gone("a", 1.0) == []
    assert one.want("b", 1.0) == []
    assert one.attach("b", 5.0, 2.0) == [Give("b")]


def test_a_rollback_while_it_changes_hands_gives_it_back() -> None:
    one = token("a", "b")
    one.want("a", 0.0)
    one.given("a", 0.0)
    one.want("b", 1.0)
    assert one.want("a", 1.1) == []  # it was told to stop, and must say so first
    assert one.released("a", 1.2) == [Give("a")]


def test_nobody_has_it_when_nobody_is_wanted() -> None:
    one = token("a")
    one.want("a", 0.0)
    assert one.want(None, 1.0) == [Take("a")]
    assert one.released("a", 1.1) == []
    assert (one.phase, one.holder) == (Phase.FREE, None)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("what", ["given", "released", "gone", "refused", "want", "expire", "hurry", "attach"])
def test_every_phase_takes_everything_and_has_a_holder_unless_it_is_free(phase: Phase, what: str) -> None:
    one = token("a", "b")
    one.phase, one.wanted = phase, "a"
    one.holder = None if phase is Phase.FREE else "a"
    match what:
        case "want":
            one.want("b", 1.0)
        case "expire":
            one.expire(1.0)
        case "attach":
            one.attach("c", 5.0, 1.0)
        case _:
            getattr(one, what)("a", 1.0)
    assert (one.holder is None) == (one.phase is Phase.FREE)


def test_the_table_leads_from_everywhere_to_free() -> None:
    assert {before for before, _ in TRANSITIONS} == set(Phase)
    for phase in set(Phase) - {Phase.FREE}:
        assert TRANSITIONS[phase, "gone"] is Phase.FREE


class AnyOrder(RuleBasedStateMachine):
    """Instances that obey or not, die, and say things late, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.token = Token()
        self.alive: set[str] = set()
        self.working: set[str] = set()  # told to begin, and neither said that they stopped nor dead

    def do(self, orders: list[Give | Take | Kill]) -> None:
        for order in orders:
            if isinstance(order, Give):
                assert order.instance in self.alive
                assert not self.working
                self.working.add(order.instance)

    @rule(name=st.sampled_from(NAMES))
    def comes(self, name: str) -> None:
        if name not in self.alive:
            self.alive.add(name)
            self.do(self.token.attach(name, 5.0, self.now))

    @rule(name=st.sampled_from([*NAMES, None]))
    def wants(self, name: str | None) -> None:
        self.do(self.token.want(name, self.now))

    @rule(name=st.sampled_from(NAMES))
    def says_that_it_works(self, name: str) -> None:
        if name in self.working:
            self.do(self.token.given(name, self.now))

    @rule()
    def stops(self) -> None:
        if self.token.phase in (Phase.TAKING, Phase.ENDING) and self.token.holder in self.working:
            name = self.token.holder
            self.working.discard(name)
            self.do(self.token.released(name, self.now))

    @rule(name=st.sampled_from(NAMES))
    def dies(self, name: str) -> None:
        if name in self.alive:
            self.alive.discard(name)
            self.working.discard(name)
            self.do(self.token.gone(name, self.now))

    @rule(seconds=st.sampled_from([0.5, 3.0]), name=st.sampled_from(NAMES), hurry=st.booleans())
    def passes(self, seconds: float, name: str, hurry: bool) -> None:
        if hurry:
            self.do(self.token.hurry(name, self.now))
        self.now += seconds
        self.do(self.token.expire(self.now))

    @invariant()
    def at_most_one_works_and_the_token_knows_who(self) -> None:
        assert len(self.working) <= 1
        if self.working:
            assert self.token.holder in self.working

    @invariant()
    def it_is_never_withheld(self) -> None:
        if self.token.phase is Phase.FREE:
            assert self.token.wanted not in self.alive


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
