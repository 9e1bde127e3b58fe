"""The routing core when instances die, are rescued from, or are asked beside another: what comes in and out."""

from __future__ import annotations

from typing import Any

from interlock.agents.mirroring import MIRROR_WAITING
from interlock.agents.quarantine import DEATHS_OF_PEER, REFUSED_S
from interlock.agents.routing import Router
from interlock.agents.routing_types import Compare, Gone, Reply
from routing_parts import TIMEOUT, ask, codes, may_repeat, only_send, route, router, sends

# --- death


def test_what_died_with_an_instance_goes_elsewhere_if_asking_twice_is_harmless() -> None:
    core = router("old", "new", shares={"new": 1.0})
    ask(core, "a", "get")
    ask(core, "b", "charge")
    commands = core.lost("new", 1.0)
    assert codes(commands) == [("b", "instance-died")]
    assert Gone("new") in commands
    core.route({"old": 1.0}, 1.0)
    again = only_send(core.settle(1.0))
    assert (again.instance, again.body) == ("old", "get")
    assert core.answer("old", again.copy, "x", 1.1, error=False) == [Reply("a", "x")]


def test_answers_that_an_instance_gave_before_it_died_still_count() -> None:
    core = router("old")
    send = only_send(ask(core, "a", "charge"))
    assert core.lost("old", 1.0, grace=0.01) == []
    assert core.answer("old", send.copy, "done", 1.005, error=False) == [Reply("a", "done")]
    assert core.next_deadline() == 1.01
    assert core.expire(1.01) == [Gone("old")]


def test_a_request_that_kills_whoever_takes_it_is_given_up() -> None:
    core = router("i0", "i1", "i2", "i3")
    ask(core, "a", "get")
    ask(core, "b", "get other")  # so that nobody knows which one it was
    for number in range(3):
        commands = core.lost(f"i{number}", 1.0)
        core.route({f"i{number + 1}": 1.0}, 1.0)
        commands += core.settle(1.0)
    assert codes(commands) == [("a", "instance-died"), ("b", "instance-died")]
    assert sends(commands) == []


def deaths(core: Router[str, str, str], count: int, now: float = 1.0) -> list[Any]:
    """The routed instance dies and another takes its place, so often; what was said meanwhile."""
    said = []
    for _ in range(count):
        number = next(n for n in range(1000) if core.attached(f"i{n}"))
        said += core.detach(f"i{number}", now)
        core.attach(f"i{number + 1}", window=1, idempotent=may_repeat)
        said += route(core, {f"i{number + 1}": 1.0}, now)
    return said


def test_a_request_that_killed_two_instances_is_refused_and_so_are_equal_ones_that_wait() -> None:
    core = router("i0", window=1)
    for client in "abc":
        ask(core, client, "get poison")
    ask(core, "d", "get", now=0.0)
    said = deaths(core, 2)
    assert codes(said) == [("a", "quarantined"), ("b", "quarantined"), ("c", "quarantined")]
    assert sends(said)[-1].body == "get"
    assert codes(ask(core, "e", "get poison", now=1.0 + REFUSED_S - 1)) == [("e", "quarantined")]
    assert core.request("e", "e", "get poison", 1, 1.0 + REFUSED_S - 1)[0].message == (
        "2 instances died over equal requests: refused for another 1 s"
    )
    assert ask(core, "e", "get poison", now=1.0 + REFUSED_S + 1) == []


def test_what_may_not_be_repeated_and_is_asked_again_is_refused_too() -> None:
    core = router("i0", window=1)
    for _ in range(2):
        ask(core, "a", "charge poison")
        assert codes(deaths(core, 1)) == [("a", "instance-died")]
    assert codes(ask(core, "b", "charge poison", now=2.0)) == [("b", "quarantined")]
    only_send(ask(core, "a", "charge", now=2.0))


def test_a_client_that_sends_ever_new_requests_that_kill_is_refused() -> None:
    core = router("i0", window=1)
    for number in range(DEATHS_OF_PEER):
        only_send(ask(core, "a", f"charge {number}", now=1.0))
        deaths(core, 1)
    assert codes(ask(core, "a", "charge", now=2.0)) == [("a", "quarantined")]
    only_send(ask(core, "b", "charge", now=2.0))


def test_nobody_is_blamed_where_several_were_in_hand_or_who_was_answered() -> None:
    core = router("i0", window=2)
    for _ in range(3):
        ask(core, "a", "charge poison")
        ask(core, "b", "charge")
        core.detach(next(n for n in ("i0", "i1", "i2") if core.attached(n)), 1.0)
        core.attach(f"i{_ + 1}", window=2, idempotent=may_repeat)
        route(core, {f"i{_ + 1}": 1.0}, 1.0)
    send = only_send(ask(core, "a", "charge poison", now=1.0))
    core.answer("i3", send.copy, "x", 1.0, error=False)
    for _ in range(2):
        send = only_send(ask(core, "a", "charge poison", now=1.0))
        core.answer(send.instance, send.copy, "x", 1.0, error=False)
        only_send(ask(core, "a", "charge poison", now=1.0))
        deaths(core, 1)
    only_send(ask(core, "a", "charge poison", now=1.0))


def test_who_broke_the_way_to_an_instance_that_is_then_found_dead_is_to_blame() -> None:
    core = router("i0", window=1)
    for _ in range(2):
        send = only_send(ask(core, "a", "charge poison", now=1.0))
        core.failed(send.instance, send.copy, 1.0, sent=True)
        deaths(core, 1)
    assert codes(ask(core, "b", "charge poison", now=2.0)) == [("b", "quarantined")]


def test_detaching_answers_what_was_in_flight() -> None:
    core = router("old")
    ask(core, "a", "charge")
    ask(core, "b", "get")
    assert codes(core.detach("old", 1.0)) == [("a", "instance-died")]
    assert codes(core.expire(11.0)) == [("b", "no-instance")]
    assert core.snapshot(1.0) == {}


def test_what_an_instance_never_saw_is_sent_again_even_if_it_may_not_be_repeated() -> None:
    core = router("old")
    send = only_send(ask(core, "a", "charge", 1.0))
    assert core.failed("old", send.copy, 1.0, sent=False) == []
    assert core.next_deadline() < 1.2
    assert only_send(core.expire(core.next_deadline())).body == "charge"


# --- rescue


def test_a_rescue_asks_the_routed_instance_too_and_the_first_answer_wins() -> None:
    core = router("old", "new", shares={"new": 1.0})
    hung = only_send(ask(core, "a", "get"))
    ask(core, "b", "charge")
    route(core, {"old": 1.0}, 1.0)
    hedge = only_send(core.rescue("new", 1.0))
    assert (hedge.instance, hedge.body) == ("old", "get")
    assert core.rescue("new", 1.0) == []  # two are enough
    assert core.answer("old", hedge.copy, "x", 1.1, error=False) == [Reply("a", "x")]
    assert core.answer("new", hung.copy, "y", 1.2, error=False) == []
    assert core.in_flight("new") == 1  # b's may finish there


def test_a_rescued_instance_may_still_be_the_first() -> None:
    core = router("old", "new", shares={"new": 1.0})
    slow = only_send(ask(core, "a", "get"))
    route(core, {"old": 1.0}, 1.0)
    hedge = only_send(core.rescue("new", 1.0))
    assert core.answer("new", slow.copy, "y", 1.1, error=False) == [Reply("a", "y")]
    assert core.answer("old", hedge.copy, "x", 1.2, error=False) == []
    assert core.in_flight("old") == 0


def test_a_rescue_waits_for_room_and_never_asks_the_same_instance_twice() -> None:
    core = router("old", "new", window=1, shares={"new": 1.0})
    ask(core, "a", "get a")
    assert core.rescue("new", 0.5) == []  # only the hung one is routed
    route(core, {"old": 0.5, "new": 0.5}, 1.0)
    commands = core.settle(1.0)
    assert sends(commands) == []  # given already
    assert core.in_flight("old") == 1


def test_a_rescued_instance_that_dies_changes_nothing_for_who_was_rescued() -> None:
    core = router("old", "new", shares={"new": 1.0})
    ask(core, "a", "get")
    route(core, {"old": 1.0}, 1.0)
    hedge = only_send(core.rescue("new", 1.0))
    assert core.lost("new", 1.1) == [Gone("new")]
    assert core.answer("old", hedge.copy, "x", 1.2, error=False) == [Reply("a", "x")]


# --- mirror


def mirrored(window: int = 64) -> Router[str, str, str]:
    core = router("old", "new", window=window)
    core.mirror("new")
    return core


def test_a_mirrored_request_is_compared_and_only_the_old_answer_is_sent() -> None:
    core = mirrored()
    live, copy = ask(core, "a", "get")
    assert (live.instance, live.mirrored) == ("old", False)
    assert (copy.instance, copy.mirrored) == ("new", True)
    assert core.answer("new", copy.copy, "new", 0.3, error=False) == []
    assert core.answer("old", live.copy, "old", 0.5, error=False) == [
        Reply("a", "old"),
        Compare("new", "get", "old", "new", 0.5, 0.3),
    ]
    assert core.next_deadline() == float("inf")
    assert core.snapshot(0.5)["new"].requests == 0  # no client asked it


def test_what_may_not_be_asked_twice_is_not_mirrored() -> None:
    assert len(ask(mirrored(), "a", "charge")) == 1


def test_a_slow_candidate_loses_mirrored_requests_and_no_client_waits() -> None:
    core = mirrored(window=1)
    live, *_ = ask(core, "a", "get")
    for number in range(200):
        commands = core.answer("old", live.copy, "x", 0.1, error=False) + ask(core, f"c{number}", "get")
        live = next(send for send in sends(commands) if not send.mirrored)
    assert core.snapshot(1.0)["new"].dropped == 200 - MIRROR_WAITING


def test_a_candidate_that_never_answers_a_copy_is_told_apart() -> None:
    core = mirrored()
    live, _copy = ask(core, "a", "get")
    assert core.answer("old", live.copy, "x", 0.1, error=False) == [Reply("a", "x")]
    assert core.expire(TIMEOUT) == [Compare("new", "get", "x", None, 0.1, None)]


def test_a_candidate_that_dies_owes_its_copies() -> None:
    core = mirrored()
    live, _copy = ask(core, "a", "get")
    core.answer("old", live.copy, "x", 0.1, error=False)
    assert core.lost("new", 0.2) == [Compare("new", "get", "x", None, 0.1, None), Gone("new")]
    assert len(ask(core, "b", "get")) == 1


def test_ending_the_mirror_drops_open_pairs() -> None:
    core = mirrored()
    live, copy = ask(core, "a", "get")
    core.mirror(None)
    assert core.answer("old", live.copy, "x", 0.1, error=False) == [Reply("a", "x")]
    assert core.answer("new", copy.copy, "y", 0.1, error=False) == []
    assert core.next_deadline() == float("inf")
