"""The book of faults as transcripts: what was seen, and the edges that come of it. And what the kernel log says."""

from __future__ import annotations

import pytest

from interlock.monitors.gpu_faults import (
    CARD_STATES,
    DRIVER,
    DRIVER_STATES,
    KINDS,
    MAX_XIDS,
    MERGE_S,
    STEADY_S,
    XID_QUIET_S,
    Cleared,
    Edge,
    FaultBook,
    Raised,
)
from interlock.monitors.kernel_log import KernelXid, parse, place


def say(edges: list[Edge]) -> list[str]:
    return [
        f"{'+' if isinstance(edge, Raised) else '-'}{edge.kind}{f':{edge.xid}' if edge.xid else ''}@{edge.card}"
        for edge in edges
    ]


def card(book: FaultBook, kind: str, now: float, index: int = 0) -> list[str]:
    return say(book.state(index, kind, "words", now, of=CARD_STATES))


def test_a_state_is_raised_once_and_cleared_once() -> None:
    book = FaultBook()
    assert card(book, "", 0) == []
    assert card(book, "lost", 1) == ["+lost@0"]
    assert card(book, "lost", 2) == []
    assert book.stands(0, "lost")
    assert card(book, "", 3) == []
    assert card(book, "", 3 + STEADY_S) == ["-lost@0"]
    assert card(book, "", 9) == []


def test_one_that_comes_and_goes_is_one_fault() -> None:
    book = FaultBook()
    assert card(book, "card-error", 0) == ["+card-error@0"]
    for tick in range(1, 101):
        assert card(book, "card-error" if tick % 3 else "", tick / 10) == []
    assert card(book, "", 10.1) == []
    assert card(book, "", 11) == []
    assert card(book, "", 11.2) == ["-card-error@0"]


def test_one_state_of_a_card_takes_the_place_of_another() -> None:
    book = FaultBook()
    card(book, "hang", 1)
    assert card(book, "lost", 2) == ["-hang@0", "+lost@0"]


def test_cards_and_the_driver_have_faults_of_their_own() -> None:
    book = FaultBook()
    card(book, "lost", 1, index=0)
    assert card(book, "", 2, index=1) == []
    assert say(book.state(DRIVER, "driver-mismatch", "w", 3, of=DRIVER_STATES)) == ["+driver-mismatch@-1"]
    assert say(book.state(DRIVER, "", "", 4, of=DRIVER_STATES)) == []
    assert say(book.state(DRIVER, "", "", 5, of=DRIVER_STATES)) == ["-driver-mismatch@-1"]
    assert book.stands(0, "lost")


def test_the_end_says_since_when_it_stood() -> None:
    book = FaultBook()
    card(book, "lost", 10)
    card(book, "", 11)
    [edge] = book.state(0, "", "", 12.5, of=CARD_STATES)
    assert isinstance(edge, Cleared)
    assert (edge.since, edge.until, edge.detail) == (10, 12.5, "it answers again")


@pytest.mark.parametrize(("number", "kind"), [(79, "xid"), (48, "xid"), (31, "agent-xid"), (13, "agent-xid")])
def test_an_xid_is_a_programs_or_the_cards(number: int, kind: str) -> None:
    assert say(FaultBook().xid(0, number, "nvml", 0)) == [f"+{kind}:{number}@0"]


def test_those_of_programs_are_the_six() -> None:
    kinds = {number: FaultBook().xid(0, number, "nvml", 0)[0].kind for number in range(200)}
    assert {number for number, kind in kinds.items() if kind == "agent-xid"} == {13, 31, 43, 45, 68, 109}


def test_what_two_sources_tell_of_one_xid_is_one() -> None:
    book = FaultBook()
    assert say(book.xid(0, 79, "nvml", 1)) == ["+xid:79@0"]
    assert book.xid(0, 79, "kernel", 1.2) == []
    assert book.xids == {(0, "device"): 1}
    assert book.xid(0, 79, "kernel", 1.3) == [], "the same source again: another one, and the fault stands already"
    assert book.xids == {(0, "device"): 2}


def test_the_same_from_another_source_much_later_is_another() -> None:
    book = FaultBook()
    book.xid(0, 79, "nvml", 1)
    book.xid(0, 79, "kernel", 1 + MERGE_S + 0.1)
    assert book.xids == {(0, "device"): 2}


def test_the_process_that_only_the_kernel_names_is_told_afterwards() -> None:
    book = FaultBook()
    book.xid(0, 31, "nvml", 1)
    [more] = book.xid(0, 31, "kernel", 1.1, pid=4711, text="pid=4711, MMU fault")
    assert isinstance(more, Raised)
    assert (more.pid, more.again, more.since) == (4711, True, 1)
    assert "MMU fault" in more.detail
    assert book.xids == {(0, "agent"): 1}


def test_an_xid_ends_by_quiet_but_only_at_a_card_that_answers() -> None:
    book = FaultBook()
    book.xid(0, 79, "nvml", 0)
    book.xid(1, 31, "nvml", 0)
    book.xid(1, 31, "nvml", 30)
    assert say(book.quiet(frozenset({0, 1}), XID_QUIET_S - 1)) == []
    assert say(book.quiet(frozenset({1}), XID_QUIET_S + 1)) == []
    assert say(book.quiet(frozenset({0, 1}), XID_QUIET_S + 1)) == ["-xid:79@0"]
    assert say(book.quiet(frozenset({0, 1}), XID_QUIET_S + 30)) == ["-agent-xid:31@1"]


def test_a_reading_that_answers_does_not_end_an_xid() -> None:
    book = FaultBook()
    book.xid(0, 79, "nvml", 0)
    assert card(book, "", 1) == []
    assert book.stands(0, "xid")


def test_other_events_of_the_card_are_faults_by_their_kind() -> None:
    book = FaultBook()
    assert say(book.event(0, 0x2, 0, 1)) == ["+ecc@0"]
    assert say(book.event(0, 0x4000, 0, 2)) == ["+lost@0"]
    card(book, "", 3)
    assert card(book, "", 4) == ["-lost@0"], "the next readings show that it is there"
    assert say(book.event(0, 0x8, 79, 5)) == ["+xid:79@0"]


def test_limits_are_told_with_their_readings_and_again_when_these_change() -> None:
    book = FaultBook()
    assert say(book.lacking(0, {"a": "not-supported", "b": "no-permission", "c": "not-supported"}, 1)) == [
        "+not-supported@0",
        "+no-permission@0",
    ]
    assert book.lacking(0, {"a": "not-supported", "b": "no-permission", "c": "not-supported"}, 2) == []
    [more] = book.lacking(0, {"a": "not-supported", "b": "no-permission"}, 3)
    assert (more.kind, more.detail) == ("not-supported", "a")
    assert say(book.lacking(0, {"a": "not-supported"}, 4)) == ["-no-permission@0"]


def test_what_one_card_can_make_it_remember_is_bounded() -> None:
    book = FaultBook()
    for number in range(1000, 1000 + 3 * MAX_XIDS):
        book.xid(0, number, "nvml", 1)
    assert len(book.standing) == MAX_XIDS
    assert book.xids == {(0, "device"): 3 * MAX_XIDS}, "they are counted all the same"


def test_every_kind_says_what_ends_it() -> None:
    assert [name for name, kind in KINDS.items() if not kind.recovery] == []
    assert KINDS.keys() >= CARD_STATES


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "6,1234,5678901,-;NVRM: Xid (PCI:0000:41:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off.",
            KernelXid("0000:41:00", 79, 0, "pid='<unknown>', name=<unknown>, GPU has fallen off."),
        ),
        (
            "NVRM: Xid (PCI:0000:C1:00): 31, pid=4711, name=python3, Ch 00000008, intr 00000000. MMU Fault: ENGINE",
            KernelXid("0000:c1:00", 31, 4711, "pid=4711, name=python3, Ch 00000008, intr 00000000. MMU Fault: ENGINE"),
        ),
        ("NVRM: Xid (PCI:0001:02:00): 48", KernelXid("0001:02:00", 48, 0, "")),
        ("NVRM: loading NVIDIA UNIX x86_64 Kernel Module", None),
        ("an agent prints: Xid (PCI:0000:41:00): 79", None),
        ("", None),
    ],
)
def test_lines_of_the_kernel_log(line: str, found: KernelXid | None) -> None:
    assert parse(line) == found


def test_a_place_on_the_bus_is_the_same_however_it_is_written() -> None:
    assert place("00000000:41:00.0") == place("0000:41:00") == "0000:41:00"
