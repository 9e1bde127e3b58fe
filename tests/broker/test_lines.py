"""Whose connection it is: descriptors are used again at once, and what is said of them arrives at different times."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from interlock.broker.lines import Line, Lines


def test_a_line_is_bound_by_its_first_message_and_ends_with_its_stream() -> None:
    lines = Lines()
    lines.accepted(7, 1.0)
    line = lines.let_in("ann", 1.1)
    assert (lines.open, list(lines.strangers()), lines.of("ann")) == (1, [(7, 1.0)], [line])
    assert lines.bind(line, 7)
    assert (lines.open, list(lines.strangers()), lines.bound(), lines.find(line.number)) == (1, [], [line], line)
    lines.end(7)
    assert (line.ended, lines.open, lines.of("ann"), lines.find(line.number)) == (True, 0, [], None)


def test_a_line_that_ended_before_its_first_message_was_read_is_not_taken_for_the_one_that_has_its_descriptor_now() -> (
    None
):
    lines = Lines()
    lines.accepted(7, 1.0)
    old = lines.let_in("ann", 1.1)
    lines.end(7)
    lines.accepted(7, 1.2)
    new = lines.let_in("eve", 1.3)
    assert not lines.bind(old, 7)
    assert old.ended
    assert lines.bind(new, 7)
    assert lines.bound() == [new]


def test_who_says_nothing_is_forgotten_and_its_stream_stays_a_stranger() -> None:
    lines = Lines()
    lines.accepted(7, 1.0)
    lines.accepted(8, 5.0)
    silent, spoken, late = lines.let_in("ann", 1.1), lines.let_in("ann", 1.2), lines.let_in("ann", 5.1)
    lines.bind(spoken, 9)
    lines.forget_unheard(before=5.0)
    assert (silent.ended, lines.of("ann")) == (True, [spoken, late])
    assert list(lines.strangers(before=5.0)) == [(7, 1.0)]
    assert lines.is_stranger(7, 1.0)
    assert not lines.is_stranger(7, 2.0)


@given(st.lists(st.tuples(st.sampled_from(["open", "let in", "say", "end"]), st.integers(0, 5)), max_size=60))
def test_whatever_happens_in_which_order_no_line_is_bound_to_the_stream_of_another(
    steps: list[tuple[str, int]],
) -> None:
    lines, free = Lines(), [3, 2, 1]
    streams: list[int] = []  # descriptors of open streams, each of one connection
    owners: dict[int, Line] = {}  # descriptor -> the line that truly has it
    said: list[tuple[Line, int]] = []  # what was sent and not read; a connection may have ended since
    for step, which in steps:
        match step:
            case "open" if free:
                streams.append(free.pop())
                lines.accepted(streams[-1], 0.0)
            case "let in" if fresh := [at for at in streams if at not in owners]:
                at = fresh[which % len(fresh)]
                owners[at] = lines.let_in("ann", 0.0)
                said.append((owners[at], at))
            case "say" if said:
                line, at = said.pop(which % len(said))
                assert lines.bind(line, at) == (owners.get(at) is line)
            case "end" if streams:
                at = streams.pop(which % len(streams))
                lines.end(at)
                owners.pop(at, None)
                free.append(at)
    assert all(owners.get(line.descriptor) is line for line in lines.bound())
    assert lines.open == len(streams)
