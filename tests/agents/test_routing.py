"""The routing core, as transcripts: what comes in, and the commands that come out."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from interlock.agents.routing import Router
from interlock.agents.routing_types import Answered, Fail, Gone, Reply, Send
from interlock.agents.waiting import MAX_WAITING_PER_PEER, Shares, WaitingLine
from routing_parts import HOLD, TIMEOUT, as_it_is, ask, codes, may_repeat, only_send, route, router, sends

# --- plain


def test_an_answer_goes_to_the_client_that_asked() -> None:
    core = router("old")
    first, second = only_send(ask(core, "a")), only_send(ask(core, "b"))
    assert core.answer("old", second.copy, "for b", 0.1, error=False) == [Reply("b", "for b")]
    assert core.answer("old", first.copy, "for a", 0.2, error=False) == [Reply("a", "for a")]
    assert core.in_flight("old") == 0
    assert core.next_deadline() == float("inf")


def test_a_second_answer_to_the_same_request_is_dropped_and_counted() -> None:
    core = router("old")
    send = only_send(ask(core, "a"))
    core.answer("old", send.copy, "x", 0.1, error=False)
    assert core.answer("old", send.copy, "x", 0.2, error=False) == []
    assert core.answer("old", 999, "x", 0.2, error=False) == []
    assert core.answer("nobody", 1, "x", 0.2, error=False) == []
    assert core.late == 3


def test_beyond_the_window_requests_wait_here() -> None:
    core = router("old", window=1)
    send = only_send(ask(core, "a", "one"))
    assert ask(core, "b", "two") == []
    assert core.waiting == 1
    reply, following = core.answer("old", send.copy, "1", 0.1, error=False)
    assert reply == Reply("a", "1")
    assert following.body == "two"


def test_an_instance_out_of_reach_keeps_what_it_has_and_gets_nothing_until_it_is_within_reach() -> None:
    core = router("old")
    first = only_send(ask(core, "a"))
    assert core.reach("old", False, 0.1) == []
    assert ask(core, "b") == []
    assert core.answer("old", first.copy, "late", 0.2, error=False) == [Reply("a", "late")]
    assert core.waiting == 1
    [following] = sends(core.reach("old", True, 0.3))
    assert following.copy != first.copy
    assert core.reach("old", True, 0.3) == core.reach("nobody", False, 0.3) == []


def test_what_waits_for_one_out_of_reach_is_given_to_who_is_routed_next() -> None:
    core = router("old", "new")
    route(core, {"new": 1.0}, 0.0)
    core.reach("new", False, 0.1)
    assert ask(core, "a") == []
    [send] = sends(route(core, {"old": 1.0}, 0.2))
    assert send.instance == "old"


def test_a_share_of_one_out_of_reach_goes_to_who_has_the_largest() -> None:
    core = router("old", "new")
    route(core, {"old": 0.6, "new": 0.4}, 0.0)
    core.reach("new", False, 0.1)
    assert {only_send(ask(core, str(n))).instance for n in range(10)} == {"old"}


def test_peers_take_turns_so_that_one_with_many_requests_delays_no_other() -> None:
    core = router("old", window=1)
    send = only_send(ask(core, "greedy", "g0"))
    for number in range(1, 4):
        ask(core, "greedy", f"g{number}")
    ask(core, "modest", "m")
    order = []
    for _ in range(4):
        send = sends(core.answer("old", send.copy, "", 0.1, error=False))[0]
        order.append(send.body)
    assert order == ["g1", "m", "g2", "g3"]


def test_one_peer_can_not_fill_the_queue() -> None:
    core = router("old", shares={})
    for _ in range(MAX_WAITING_PER_PEER):
        assert ask(core, "greedy") == []
    assert codes(ask(core, "greedy")) == [("greedy", "overloaded")]
    assert ask(core, "modest") == []


def test_a_line_is_bounded_by_bytes_too() -> None:
    class Item:
        def __init__(self, size: int) -> None:
            self.peer, self.size = "p", size

    line: WaitingLine[Item] = WaitingLine()
    assert line.add(Item(200 << 20))
    assert not line.add(Item(100 << 20))
    line.take()
    assert (line.count, line.bytes) == (0, 0)


# --- shares


def test_a_share_of_a_tenth_is_exactly_one_of_ten_and_never_two_in_a_row() -> None:
    shares = Shares({"old": 0.9, "new": 0.1})
    picks = [shares.pick() for _ in range(1000)]
    assert all(picks[i : i + 10].count("new") == 1 for i in range(991))


def test_requests_follow_the_shares() -> None:
    core = router("old", "new", shares={"old": 0.9, "new": 0.1})
    counts = Counter(only_send(ask(core, f"c{n}")).instance for n in range(50))
    assert counts == {"old": 45, "new": 5}


def test_a_candidate_gets_no_more_than_its_share_because_the_old_one_is_busy() -> None:
    core = router("old", "new", window=1, shares={"old": 0.9, "new": 0.1})
    given: list[Send[str]] = []
    for number in range(40):
        given += sends(ask(core, f"c{number}"))
    assert Counter(send.instance for send in given)["new"] <= 1
    busy = next(send for send in given if send.instance == "old")
    answered = [send for send in given if send.instance == "new"]
    for _ in range(20):  # the old one works on; the new one never answers
        commands = core.answer("old", busy.copy, "", 0.1, error=False)
        answered += [send for send in sends(commands) if send.instance == "new"]
        busy = next(send for send in sends(commands) if send.instance == "old")
    assert len(answered) == 1
    assert core.waiting == 40 - 20 - 2


# --- hold


def test_without_a_route_requests_wait_and_go_out_when_it_is_there() -> None:
    core = router("old", shares={})
    assert ask(core, "a") == []
    assert only_send(route(core, {"old": 1.0}, 5.0)).instance == "old"


def test_a_hold_that_lasts_too_long_is_an_error() -> None:
    core = router("old", shares={})
    ask(core, "a", now=1.0)
    assert core.next_deadline() == 1.0 + HOLD
    assert core.expire(10.9) == []
    assert codes(core.expire(11.0)) == [("a", "no-instance")]
    assert core.next_deadline() == float("inf")


def test_a_hold_begins_when_the_route_ends() -> None:
    core = router("old", window=1)
    ask(core, "a", "get 1", 0.0)
    ask(core, "b", "get 2", 0.0)
    route(core, {}, 8.0)
    assert core.next_deadline() == 18.0
    assert codes(core.expire(18.0)) == [("b", "no-instance")]


def test_routes_to_unknown_or_dead_instances_are_left_out_and_named() -> None:
    core = router("old", "new")
    core.lost("new", 0.0)
    assert core.route({"old": 0.5, "new": 0.4, "ghost": 0.1}, 0.0) == ["new", "ghost"]
    assert {only_send(ask(core, f"c{n}")).instance for n in range(5)} == {"old"}


# --- time


def test_a_request_unanswered_for_too_long_is_an_error_and_frees_its_place() -> None:
    core = router("old", window=1)
    send = only_send(ask(core, "a", "one", 0.0))
    ask(core, "b", "two", 1.0)
    commands = core.expire(TIMEOUT)
    assert codes(commands) == [("a", "timeout")]
    assert sends(commands)[0].body == "two"
    assert core.answer("old", send.copy, "late", 30.1, error=False) == []
    figures = core.snapshot(30.1)["old"]
    assert (figures.requests, figures.errors) == (1, 1)


# --- what the host learns


def test_a_watch_tells_the_first_answer_to_a_request_given_later() -> None:
    core = router("old")
    before = only_send(ask(core, "a"))
    core.watch("old", "tag")
    after = only_send(ask(core, "b"))
    assert core.answer("old", before.copy, "x", 1.0, error=False) == [Reply("a", "x")]
    assert core.answer("old", after.copy, "x", 2.0, error=False) == [Reply("b", "x"), Answered("tag", 2.0)]
    third = only_send(ask(core, "c"))
    assert core.answer("old", third.copy, "x", 3.0, error=False) == [Reply("c", "x")]


def test_figures_need_twenty_answers_for_quantiles_of_the_last_second_or_else_of_the_last_ten() -> None:
    core = router("old")
    for number in range(20):
        send = only_send(ask(core, "a", now=10.0))
        assert core.snapshot(10.5)["old"].p95 is None
        core.answer("old", send.copy, "x", 10.0 + (number + 1) / 100, error=number == 0)
    figures = core.snapshot(10.5)["old"]
    assert (figures.requests, figures.errors, figures.in_flight) == (20, 1, 0)
    assert [round(q or 0, 9) for q in (figures.p50, figures.p95, figures.p99)] == [0.1, 0.19, 0.2]
    assert core.snapshot(12.0)["old"].p50 == figures.p50
    assert core.snapshot(21.0)["old"].p50 is None
    assert len(core.latencies("old", 5.0, 12.0)) == 20


def test_closing_answers_everybody() -> None:
    core = router("old", window=1)
    ask(core, "a")
    ask(core, "b")
    assert codes(core.close()) == [("a", "no-instance"), ("b", "no-instance")]


# --- any order of events


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, each request gets exactly one reply, and nothing is repeated that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.core: Router[str, str, str] = Router(request_timeout_s=TIMEOUT, hold_s=HOLD, key_of=as_it_is)
        self.now = 0.0
        self.clients = 0
        self.replies: Counter[str] = Counter()
        self.given: Counter[str] = Counter()
        self.open: list[Send[str]] = []  # sent to instances, not answered
        self.windows: dict[str, int] = {}
        self.cut: set[str] = set()
        self.names = 0

    def take(self, commands: list[Any]) -> None:
        for command in commands:
            if isinstance(command, Reply | Fail):
                self.replies[command.client] += 1
                assert self.replies[command.client] == 1
            elif isinstance(command, Send):
                assert command.instance in self.windows
                assert command.instance not in self.cut
                self.open.append(command)
                if not command.mirrored:
                    self.given[command.body] += 1
                if not may_repeat(command.body):
                    assert not command.mirrored
                    assert self.given[command.body] == 1
            elif isinstance(command, Gone):
                self.open = [send for send in self.open if send.instance != command.instance]
        assert self.core.next_deadline() >= 0

    @rule(window=st.integers(1, 3))
    def attach(self, window: int) -> None:
        if len(self.windows) < 4:
            self.names += 1
            name = f"i{self.names}"
            self.core.attach(name, window=window, idempotent=may_repeat)
            self.windows[name] = window

    @rule(kind=st.sampled_from(["get", "charge"]), peer=st.sampled_from(["p", "q"]))
    def request(self, kind: str, peer: str) -> None:
        self.clients += 1
        client = f"c{self.clients}"
        self.take(self.core.request(client, peer, f"{kind} {client}", 10, self.now))

    @rule(data=st.data(), error=st.booleans(), keep=st.booleans())
    def answer(self, data: st.DataObject, error: bool, keep: bool) -> None:
        if self.open:
            index = data.draw(st.integers(0, len(self.open) - 1))
            send = self.open[index] if keep else self.open.pop(index)
            self.take(self.core.answer(send.instance, send.copy, "x", self.now, error=error))

    @rule(data=st.data(), cut=st.booleans())
    def answer_in_two_parts(self, data: st.DataObject, cut: bool) -> None:
        if self.open:
            send = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            if self.core.begin(send.instance, send.copy, self.now):
                self.replies[f"{send.body.split()[1]}"] += 1
            self.take(self.core.finish(send.instance, send.copy, None if cut else "x", self.now, error=False))

    @rule(data=st.data(), sent=st.booleans())
    def fail(self, data: st.DataObject, sent: bool) -> None:
        if self.open:
            send = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            if not sent and not send.mirrored:
                self.given[send.body] -= 1
            self.take(self.core.failed(send.instance, send.copy, self.now, sent=sent))

    @rule(data=st.data())
    def route(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.windows)), max_size=2)) if self.windows else []
        self.core.route(dict(zip(names, (0.9, 0.1), strict=False)), self.now)
        self.take(self.core.settle(self.now))

    @rule(data=st.data(), how=st.sampled_from(["lost", "late", "detach", "rescue", "mirror", "watch"]))
    def act(self, data: st.DataObject, how: str) -> None:
        if not self.windows:
            return
        name = data.draw(st.sampled_from(sorted(self.windows)))
        if how == "lost":
            self.take(self.core.lost(name, self.now))
        elif how == "late":
            self.take(self.core.lost(name, self.now, grace=1.0))
        elif how == "detach":
            self.cut.discard(name)
            self.take(self.core.detach(name, self.now))
            del self.windows[name]
        elif how == "rescue":
            self.take(self.core.rescue(name, self.now))
        elif how == "mirror":
            self.core.mirror(name)
        else:
            self.core.watch(name, name)

    @rule(data=st.data(), reachable=st.booleans())
    def reach(self, data: st.DataObject, reachable: bool) -> None:
        if self.windows:
            name = data.draw(st.sampled_from(sorted(self.windows)))
            (self.cut.discard if reachable else self.cut.add)(name)
            self.take(self.core.reach(name, reachable, self.now))

    @rule(seconds=st.sampled_from([0.01, 0.06, 1.0, 5.0, 12.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.core.expire(self.now))

    @invariant()
    def windows_are_kept(self) -> None:
        for name, window in self.windows.items():
            assert self.core.in_flight(name) <= window
        assert self.core.waiting >= 0

    def teardown(self) -> None:
        self.now += TIMEOUT + 1
        self.take(self.core.expire(self.now))
        assert set(self.replies) == {f"c{n}" for n in range(1, self.clients + 1)}
        assert set(self.replies.values()) <= {1}
        assert self.core.waiting == 0
        assert self.core.next_deadline() == float("inf") or self.core.next_deadline() < self.now + 2


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
