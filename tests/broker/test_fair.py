"""Who asks for much waits for itself."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from interlock.broker.fair import Fair, Unread


def queue(*, items: int = 100, cost: int = 1_000_000, quantum: int = 10, own: int | None = None) -> Fair[str]:
    return Fair(items=items, cost=cost, quantum=quantum, own=own)


def drain(fair: Fair[str]) -> str:
    return "".join(fair.take(len(fair), 1_000_000))


def test_keys_take_turns_and_each_keeps_its_order() -> None:
    fair = queue(quantum=2)
    for item in "abcdefg":
        fair.put("greedy", item)
    for item in "XY":
        fair.put("honest", item)
    assert drain(fair) == "abXYcdefg"
    assert len(fair) == 0


def test_turns_are_counted_in_cost_not_in_items() -> None:
    fair = queue(quantum=10)
    for item in "ab":
        fair.put("large", item, 25)
    for item in "UVWXYZ":
        fair.put("small", item, 5)
    assert drain(fair) == "UVWXaYZb"  # 10 of each turn: the large one saves up for three


def test_one_who_is_alone_need_not_save_up() -> None:
    fair = queue(quantum=1)
    fair.put("alone", "a", 1000)
    assert fair.take(1, 10) == ["a"]


def test_what_is_taken_ends_at_its_number_or_cost_and_goes_on_in_the_same_turn() -> None:
    fair = queue(quantum=3)
    for item in "abcdef":
        fair.put("one", item)
        fair.put("two", item.upper())
    assert [fair.take(2, 100), fair.take(100, 2), fair.take(100, 100)] == [
        ["a", "b"],
        ["c", "A"],
        ["B", "C", "d", "e", "f", "D", "E", "F"],
    ]
    assert fair.take(5, 5) == []


def test_of_one_key_no_more_is_taken_at_once_than_each_may_give() -> None:
    fair = queue(quantum=10)
    for item in "abcde":
        fair.put("one", item)
    assert fair.take(100, 100, each=2) == ["a", "b"]
    for item in "XYZ":
        fair.put("two", item)
    assert fair.take(100, 100, each=2) == ["c", "d", "X", "Y"]
    assert fair.take(100, 100, each=2) == ["e", "Z"]
    assert fair.take(100, 100, each=2) == []


def test_whoever_holds_nothing_finds_room_and_the_greedy_does_not() -> None:
    fair = queue(items=10)
    assert [fair.put("greedy", "g") for _ in range(7)] == [True] * 5 + [False] * 2
    assert [fair.put("second", "s") for _ in range(4)] == [True] * 3 + [False]
    assert [fair.put("honest", "h") for _ in range(2)] == [True, False]
    assert not fair.put("greedy", "g")


def test_room_is_counted_in_cost_too() -> None:
    fair = queue(cost=100)
    assert [fair.put("greedy", "g", 30) for _ in range(3)] == [True, True, False]
    assert fair.put("honest", "h", 30)


def test_a_key_has_its_own_limit_whatever_is_free() -> None:
    fair = queue(items=100, own=2)
    assert [fair.put("a", "x") for _ in range(3)] == [True, True, False]
    assert fair.take(1, 1) == ["x"]
    assert fair.put("a", "x")


def test_what_is_withdrawn_makes_room_and_leaves_the_rest_in_order() -> None:
    fair = queue(items=10)
    for item in "abcde":
        fair.put("one", item)
    fair.put("two", "X")
    assert not fair.put("one", "f")
    assert fair.withdraw("one", lambda item: item in "bd") == ["b", "d"]
    assert fair.put("one", "f")
    assert fair.withdraw("nobody", bool) == []
    assert fair.withdraw("two", bool) == ["X"]
    assert drain(fair) == "acef"


OPERATIONS = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 4), st.integers(1, 50)),
    st.tuples(st.just("take"), st.integers(0, 5), st.integers(1, 60)),
    st.tuples(st.just("withdraw"), st.integers(0, 4), st.integers(2, 4)),
)


@given(st.lists(OPERATIONS, max_size=80))
def test_nothing_is_lost_doubled_or_reordered_and_the_sums_stay_right(operations: list[tuple[str, int, int]]) -> None:
    fair: Fair[tuple[int, int]] = Fair(items=12, cost=200, quantum=7)
    model: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for n, (what, a, b) in enumerate(operations):
        if what == "put":
            if fair.put(a, (a, n), b):
                model[a].append((a, n))
        elif what == "take":
            each = b % 4 or None
            taken = fair.take(a, b, each)
            assert bool(taken) == bool(a and sum(map(len, model.values())))
            assert each is None or all(sum(key == k for k, _ in taken) <= each for key in range(5))
            for key, number in taken:
                assert model[key].pop(0) == (key, number)
        else:
            out = fair.withdraw(a, lambda item, each=b: item[1] % each == 0)  # type: ignore[misc]
            assert out == [item for item in model[a] if item[1] % b == 0]
            model[a] = [item for item in model[a] if item[1] % b]
        assert len(fair) == sum(map(len, model.values()))
    while rest := fair.take(100, 1000):
        for key, number in rest:
            assert model[key].pop(0) == (key, number)
    assert not any(model.values())
    assert fair.put(9, (9, 9), 199)  # all room is back


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=60))
def test_while_two_keys_wait_neither_gets_ahead_by_more_than_a_turn_and_an_item(puts: list[tuple[int, int]]) -> None:
    fair: Fair[tuple[int, int]] = Fair(items=1000, cost=100_000, quantum=10)
    left: dict[int, int] = defaultdict(int)
    for key, cost in puts:
        fair.put(key, (key, cost), cost)
        left[key] += 1
    got = dict.fromkeys(left, 0)
    while len(fair):
        ((key, cost),) = fair.take(1, 1)
        got[key] += cost
        left[key] -= 1
        waiting = [got[other] for other in left if left[other]]
        if left[key] and waiting:
            assert got[key] - min(waiting) <= 2 * 10 + 30


def test_unread_bytes_are_bounded_by_key_until_they_are_read() -> None:
    read: set[str] = set()
    unread = Unread(own=100, total=10_000)
    unread.add("slow", 60, lambda: "first" in read)
    assert unread.may("slow")
    unread.add("slow", 60, lambda: "second" in read)
    assert not unread.may("slow")
    assert unread.may("other")
    read.add("first")
    assert unread.may("slow")


def test_some_who_do_not_read_leave_room_for_one_who_does() -> None:
    gone: set[int] = set()
    unread = Unread(own=400, total=1000)
    for n in range(5):
        while unread.may(n):
            unread.add(n, 10, lambda n=n: n in gone)  # type: ignore[misc]
        assert unread.may("honest")
    gone |= set(range(5))
    unread.add("honest", 390, lambda: False)
    assert unread.may("honest")
    unread.add("honest", 10, lambda: False)
    assert not unread.may("honest")
