"""Streams in a session: what one end says the other hears, in order, and never more than was credited."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from interlock.agents.link_protocol import WINDOW, Bytes, Credit, Open, Shut, StreamMessage
from interlock.agents.tunnel import TRANSITIONS, Phase, Sign, Tunnel, TunnelBroken


def pair() -> tuple[Tunnel, Tunnel, int]:
    """Two ends with one stream, opened by the first."""
    here, there = Tunnel(dials=True), Tunnel(dials=False)
    asked = here.open("tutor", "requests")
    there.take(asked)
    return here, there, asked.stream


def test_the_table_leads_every_open_stream_to_its_end() -> None:
    assert {phase for phase, _ in TRANSITIONS} == set(Phase) - {Phase.CLOSED}
    assert all(TRANSITIONS[phase, Sign.RESET] is Phase.CLOSED for phase in set(Phase) - {Phase.CLOSED})


def test_nothing_is_sent_beyond_the_credit_which_comes_back_as_it_is_taken() -> None:
    here, there, stream = pair()
    there.take(here.send(stream, bytes(WINDOW)))
    assert here.room(stream) == 0
    with pytest.raises(ValueError, match="room for 0"):
        here.send(stream, b"x")
    assert there.took(stream, 1) == []
    assert there.took(stream, WINDOW - 1) == [Credit(stream, WINDOW)]
    here.take(Credit(stream, WINDOW))
    assert here.room(stream) == WINDOW


def test_an_end_of_one_direction_leaves_the_other() -> None:
    here, there, stream = pair()
    assert here.shut(stream) == [Shut(stream)]
    assert there.take(Shut(stream))
    assert here.room(stream) == 0
    here.take(there.send(stream, b"late"))
    assert there.shut(stream) == [Shut(stream)]
    assert here.take(Shut(stream))
    assert not here.has(stream)
    assert not there.has(stream)
    assert here.take(Bytes(stream, b"still on its way")) is False


@pytest.mark.parametrize("message", [
    Bytes(4, b"x"), Shut(1), Open(0, "t", "p"), Open(2, "t", "p"), Credit(0, 1),
])  # fmt: skip
def test_what_breaks_the_rules_breaks_the_session(message: StreamMessage) -> None:
    here, _, _ = pair()
    with pytest.raises(TunnelBroken):
        here.take(message)


def test_bytes_after_the_end_or_beyond_the_credit_break_the_session() -> None:
    here, there, stream = pair()
    there.take(Bytes(stream, bytes(WINDOW)))
    with pytest.raises(TunnelBroken):
        there.take(Bytes(stream, b"x"))
    here.take(Shut(stream))
    with pytest.raises(TunnelBroken):
        here.take(Bytes(stream, b"x"))


class Streams(RuleBasedStateMachine):
    """Both ends open, send, take, shut and reset as they like; messages arrive late, but in order."""

    @initialize()
    def begin(self) -> None:
        self.ends = [Tunnel(dials=True), Tunnel(dials=False)]
        self.way: list[deque[StreamMessage]] = [deque(), deque()]  # to each end
        self.sent: dict[tuple[int, int], bytes] = {}  # by receiving end and stream
        self.came: dict[tuple[int, int], bytes] = {}
        self.held: dict[tuple[int, int], int] = {}
        self.over: set[int] = set()
        self.known: set[int] = set()

    def say(self, end: int, messages: list[StreamMessage]) -> None:
        self.way[1 - end].extend(messages)

    @rule(end=st.integers(0, 1))
    def open(self, end: int) -> None:
        if len(self.known) < 6:
            asked = self.ends[end].open("tutor", "requests")
            self.known.add(asked.stream)
            self.say(end, [asked])

    @precondition(lambda self: self.known)
    @rule(data=st.data(), end=st.integers(0, 1), size=st.integers(1, WINDOW))
    def send(self, data: st.DataObject, end: int, size: int) -> None:
        stream = data.draw(st.sampled_from(sorted(self.known)))
        size = min(size, self.ends[end].room(stream))
        if size:
            self.say(end, [self.ends[end].send(stream, bytes([size % 251]) * size)])
            key = (1 - end, stream)
            self.sent[key] = self.sent.get(key, b"") + bytes([size % 251]) * size

    @rule(end=st.integers(0, 1))
    def deliver(self, end: int) -> None:
        if not self.way[end]:
            return
        message = self.way[end].popleft()
        if self.ends[end].take(message) and isinstance(message, Bytes):
            key = (end, message.stream)
            self.came[key] = self.came.get(key, b"") + message.data
            self.held[key] = self.held.get(key, 0) + len(message.data)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        end, stream = data.draw(st.sampled_from(sorted(key for key, count in self.held.items() if count)))
        count = data.draw(st.integers(1, self.held[end, stream]))
        self.held[end, stream] -= count
        self.say(end, self.ends[end].took(stream, count))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), end=st.integers(0, 1), hard=st.booleans())
    def finish(self, data: st.DataObject, end: int, hard: bool) -> None:
        stream = data.draw(st.sampled_from(sorted(self.known)))
        if hard:
            self.over.add(stream)
        self.say(end, self.ends[end].reset(stream) if hard else self.ends[end].shut(stream))

    @invariant()
    def in_order_and_within_the_credit(self) -> None:
        if not hasattr(self, "ends"):
            return
        for key, data in self.came.items():
            assert self.sent[key].startswith(data)
            under_way = sum(len(m.data) for m in self.way[key[0]] if isinstance(m, Bytes) and m.stream == key[1])
            assert under_way + self.held[key] <= WINDOW

    def teardown(self) -> None:
        """All that was said of a stream that nobody reset arrives."""
        if not hasattr(self, "ends"):
            return
        while any(self.way):
            self.deliver(0)
            self.deliver(1)
        for key, data in self.sent.items():
            assert key[1] in self.over or self.came.get(key) == data


Streams.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestStreams = Streams.TestCase
