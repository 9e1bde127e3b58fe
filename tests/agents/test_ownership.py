"""An agent changes hosts while either dies at any point, and messages are lost: never two owners, and one at last.

Both hosts are the real slot machines, each with a journal that survives; what is queued and in memory does not.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from interlock.agents.ownership import DECISIONS, Turn, Word, word_of
from interlock.agents.slot import Slot
from interlock.agents.slot_io import (
    Action,
    Arrived,
    Ask,
    AskRollBack,
    BeginCommit,
    Forward,
    Healthy,
    Moment,
    Owned,
    Persist,
    Row,
    State,
    Verified,
)
from interlock.broker import commands
from interlock.broker.commands import Breach

M, E = "tutor-7", 7
LIVE = Row("tutor", "r1", "d1", "r2", "d2", State.LIVE, M, E, "beta")
NOW = Moment(100.0, 1e9)


@pytest.mark.parametrize(("row", "word"), [
    (None, Word.MINE),
    (LIVE, Word.UNDECIDED),
    (replace(LIVE, migration="tutor-8"), Word.MINE),
    (replace(LIVE, place="gamma"), Word.MINE),
    (replace(LIVE, state=State.ROLLING_BACK), Word.MINE),
    (replace(LIVE, state=State.SERVING, migration=None, place=""), Word.MINE),
    (replace(LIVE, state=State.FORWARDING), Word.MOVED),
    (replace(LIVE, state=State.FORWARDING, place="gamma"), Word.MINE),
])  # fmt: skip
def test_the_sources_journal_says_whose_it_is(row: Row | None, word: Word) -> None:
    assert word_of(row, M, "beta") is word


def commit() -> Ask:
    return Ask(commands.Commit(migration=M, agent="tutor", epoch=E, deadline=2e9), "c")


class Source:
    """Alpha: its slot is live, the candidate runs on beta."""

    def __init__(self) -> None:
        self.journal = LIVE
        self.slot = Slot("alpha", LIVE)
        self.slot.permanent, self.slot.permanent_up = "old", True
        self.slot.candidate, self.slot.candidate_up, self.slot.share = "guest", True, 1.0
        self.queue: deque[Action] = deque()
        self.forwards = False

    def give(self, given: Any) -> None:
        self.queue.extend(self.slot.handle(given, NOW))

    def crash(self) -> None:
        self.slot = Slot("alpha", self.journal)
        self.forwards = False
        self.queue = deque(self.slot.begin(NOW))

    @property
    def owns(self) -> bool:
        """By what is written: what it comes back to after any crash."""
        return self.journal.state is not State.FORWARDING


class Hosts(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.alpha = Source()
        self.beta: Row | None = None  # its journal
        self.guest = True  # the candidate's process lives
        self.to_beta: list[str] = []
        self.to_alpha: list[bool] = []

    # --- alpha

    @rule()
    def commit_is_asked(self) -> None:
        self.alpha.give(commit())

    @rule()
    def a_rule_fires(self) -> None:
        breach = Breach(by="rule x", reason="bad", sample_time=1e9)
        body = commands.RollBack(migration=M, agent="tutor", epoch=E, breach=breach, issued=1e9)
        self.alpha.give(AskRollBack(body))

    @precondition(lambda self: self.alpha.queue)
    @rule()
    def alpha_does_one_thing(self) -> None:
        action = self.alpha.queue.popleft()
        if isinstance(action, Persist):
            self.alpha.journal = action.row
        elif isinstance(action, BeginCommit):
            self.to_beta.append("arrive")
        elif isinstance(action, Forward):
            self.alpha.forwards = True

    @precondition(lambda self: self.alpha.forwards)
    @rule()
    def alpha_tells_that_it_moved(self) -> None:
        self.to_beta.append("serve")

    @precondition(lambda self: self.to_alpha)
    @rule(lost=st.booleans())
    def alpha_hears(self, lost: bool) -> None:
        ok = self.to_alpha.pop(0)
        self.alpha.give(Arrived(M, ok and not lost, "no answer"))

    @precondition(lambda self: self.alpha.slot.row.state is State.ROLLING_BACK)
    @rule()
    def the_old_one_answers(self) -> None:
        if not self.alpha.slot.permanent_up and self.alpha.slot.permanent:
            self.alpha.give(Healthy(self.alpha.slot.permanent))
        self.alpha.give(Verified(M, True, 1e9, 1e9))

    @rule()
    def alpha_dies(self) -> None:
        self.alpha.crash()

    # --- beta

    @precondition(lambda self: self.to_beta)
    @rule(data=st.data(), lost=st.booleans())
    def beta_hears(self, data: st.DataObject, lost: bool) -> None:
        said = data.draw(st.sampled_from(self.to_beta))
        self.to_beta.remove(said)
        if lost:
            return
        if said == "arrive":
            if self.guest and self.beta is None:
                self.beta = Row("tutor", "r2", "d2", state=State.ARRIVING, migration=M, epoch=E, place="alpha")
            self.to_alpha.append(self.beta is not None)
        elif self.beta is not None and self.beta.state is State.ARRIVING:
            self.own()

    @precondition(lambda self: self.beta is not None and self.beta.state is State.ARRIVING)
    @rule(reached=st.booleans())
    def beta_asks_whose_it_is(self, reached: bool) -> None:
        word = word_of(self.alpha.journal, M, "beta") if reached else None
        match DECISIONS[word]:
            case Turn.SERVE:
                self.own()
            case Turn.DROP:
                self.beta, self.guest = None, False

    def own(self) -> None:
        assert self.beta is not None
        slot = Slot("beta", self.beta)
        written = next(a for a in slot.handle(Owned("guest" if self.guest else ""), NOW) if isinstance(a, Persist))
        self.beta = written.row
        assert self.beta == Row("tutor", "r2", "d2", epoch=E)

    @rule()
    def beta_dies(self) -> None:
        self.guest = False

    # --- what must hold

    @invariant()
    def never_two_owners(self) -> None:
        if not hasattr(self, "alpha"):
            return
        beta_owns = self.beta is not None and self.beta.state is State.SERVING
        assert not (self.alpha.owns and beta_owns)
        if self.alpha.forwards:
            assert not self.alpha.owns, "it forwards before it is written"

    def teardown(self) -> None:
        """Both are back, and can reach each other."""
        if not hasattr(self, "alpha"):
            return
        self.to_alpha, self.to_beta = [], []
        for _ in range(3):
            while self.alpha.queue:
                self.alpha_does_one_thing()
            if self.alpha.slot.row.state is State.ROLLING_BACK:
                self.the_old_one_answers()
        if self.alpha.journal.state is State.LIVE:  # a commit that nobody asks for again is rolled back in the end
            self.a_rule_fires()
            self.teardown()
            return
        if self.beta is not None and self.beta.state is State.ARRIVING:
            self.beta_asks_whose_it_is(True)
        beta_owns = self.beta is not None and self.beta.state is State.SERVING
        assert self.alpha.owns is not beta_owns
        assert self.beta is None or beta_owns


Hosts.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestHosts = Hosts.TestCase
