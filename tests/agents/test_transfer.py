"""State in numbered pieces over a way that loses, repeats, delays and swaps them: it arrives whole, or not at all."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from interlock.agents.transfer import AGAIN_S, PIECE, WINDOW, End, Incoming, Outgoing, Piece, TransferError, parts


def piece(number: int, data: bytes = b"x") -> Piece:
    return Piece(number=number, data=data, sha256=hashlib.sha256(data).digest())


def end(*data: bytes) -> End:
    whole = b"".join(data)
    return End(pieces=len(data), size=len(whole), sha256=hashlib.sha256(whole).digest())


def test_pieces_that_come_out_of_order_are_passed_on_in_order() -> None:
    incoming = Incoming()
    assert incoming.asks(0.0) == [0, 1, 2, 3]
    assert incoming.take(piece(1, b"b")) == []
    assert incoming.take(piece(0, b"a")) == [b"a", b"b"]
    assert incoming.asks(0.1) == [4, 5]  # so many were passed on
    assert incoming.take(end(b"a", b"b")) == []
    assert incoming.complete
    assert incoming.asks(99.0) == []


def test_a_piece_that_does_not_come_is_asked_for_again_and_does_no_harm_if_it_comes_twice() -> None:
    incoming = Incoming()
    incoming.asks(0.0)
    assert incoming.deadline() == AGAIN_S
    incoming.take(piece(0))
    assert incoming.asks(AGAIN_S) == [1, 2, 3, 4]
    assert incoming.take(piece(1)) == [b"x"]
    assert incoming.take(piece(1)) == []


@pytest.mark.parametrize("came", [
    Piece(number=0, data=b"a", sha256=hashlib.sha256(b"b").digest()),
    piece(WINDOW),
    piece(0, b""),
    piece(0, bytes(PIECE + 1)),
])  # fmt: skip
def test_what_was_not_sent_or_not_asked_for_is_an_error(came: Piece) -> None:
    with pytest.raises(TransferError):
        Incoming().take(came)


def test_an_end_that_does_not_fit_what_came_is_an_error() -> None:
    for before, last in (([], end()), ([], end(b"b")), ([end(b"x", b"y")], end(b"x"))):
        incoming = Incoming()
        incoming.take(piece(0))
        for one in before:
            incoming.take(one)
        with pytest.raises(TransferError):
            incoming.take(last)


def test_the_sender_keeps_no_more_than_the_window() -> None:
    outgoing = Outgoing()
    for number in range(WINDOW * 2):
        outgoing.add(bytes([number]))
    assert outgoing.get(WINDOW) == piece(WINDOW, bytes([WINDOW]))
    with pytest.raises(TransferError):
        outgoing.get(WINDOW - 1)
    assert outgoing.wants(WINDOW * 2)
    outgoing.finish()
    assert isinstance(outgoing.get(WINDOW * 2), End)


@given(st.binary(max_size=1000))
def test_bytes_are_cut_and_joined_again(data: bytes) -> None:
    assert b"".join(parts(data)) == data


class BadWay(RuleBasedStateMachine):
    """One sender, one receiver, and between them a way that does what it likes with questions and answers."""

    @initialize(data=st.lists(st.binary(min_size=1, max_size=8), max_size=12))
    def begin(self, data: list[bytes]) -> None:
        self.data, self.outgoing, self.incoming, self.clock = data, Outgoing(), Incoming(), 0.0
        self.questions: list[int] = []
        self.answers: list[Piece | End] = []
        self.got: list[bytes] = []
        self.failed = False

    @rule(seconds=st.floats(0, 3))
    def ask(self, seconds: float) -> None:
        self.clock += seconds
        self.questions += self.incoming.asks(self.clock)

    @precondition(lambda self: self.questions)
    @rule(data=st.data(), keep=st.booleans())
    def answer(self, data: st.DataObject, keep: bool) -> None:
        number = data.draw(st.sampled_from(self.questions))
        if not keep:
            self.questions.remove(number)
        while self.outgoing.wants(number):
            if self.outgoing.next < len(self.data):
                self.outgoing.add(self.data[self.outgoing.next])
            else:
                self.outgoing.finish()
        try:
            self.answers.append(self.outgoing.get(number))
        except TransferError:
            assert number < self.incoming.next, "what may still be asked for is not kept"

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), lost=st.booleans(), again=st.booleans())
    def deliver(self, data: st.DataObject, lost: bool, again: bool) -> None:
        came = data.draw(st.sampled_from(self.answers))
        if not again:
            self.answers.remove(came)
        if not lost:
            self.got += self.incoming.take(came)

    @precondition(lambda self: any(isinstance(each, Piece) for each in self.answers))
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        came = data.draw(st.sampled_from([each for each in self.answers if isinstance(each, Piece)]))
        if came.number >= self.incoming.next and came.number not in self.incoming._early:
            with pytest.raises(TransferError):
                self.incoming.take(msgspec.structs.replace(came, data=came.data + b"!"))

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "got"):
            return
        assert self.got == self.data[: len(self.got)], "nothing is passed on but what was sent, in order"
        assert self.incoming.complete is (self.incoming.end is not None and self.got == self.data)
        assert len(self.incoming._early) < WINDOW
        assert len(self.outgoing._kept) <= WINDOW

    def teardown(self) -> None:
        """Once nothing is lost any more, it arrives."""
        if not hasattr(self, "got"):
            return
        for _ in range(len(self.data) + 2):
            self.clock += 2 * AGAIN_S
            for number in self.incoming.asks(self.clock):
                while self.outgoing.wants(number):
                    if self.outgoing.next < len(self.data):
                        self.outgoing.add(self.data[self.outgoing.next])
                    else:
                        self.outgoing.finish()
                self.got += self.incoming.take(self.outgoing.get(number))
        assert self.incoming.complete
        assert self.got == self.data


BadWay.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestBadWay = BadWay.TestCase
