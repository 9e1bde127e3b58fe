"""The outbox sends in order and repeats until acknowledged, whatever the connection loses."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.broker.outbox import ACK_TIMEOUT_S, LOG_PAUSE_S, WINDOW, Entry, Outbox
from interlock.broker.protocol import Nack, Publish


def entry(n: int) -> Entry:
    return Entry(str(n), [b"t/", b"h", b"b"])


def send(outbox: Outbox, now: float) -> list[tuple[Publish, str]]:
    out = []
    for request, item in outbox.due(now):
        outbox.sent(item.id, now)
        out.append((request, item.id))
    return out


def test_no_more_than_a_window_is_under_way_and_each_ack_lets_the_next_out() -> None:
    outbox = Outbox()
    for n in range(WINDOW + 2):
        outbox.add(entry(n))
    assert len(send(outbox, 0.0)) == WINDOW
    assert send(outbox, 0.1) == []
    assert outbox.acked("0", 0.2)
    assert send(outbox, 0.2) == [(Publish(n=WINDOW + 1, oldest=2), str(WINDOW))]


def test_without_an_ack_it_asks_for_a_sign_of_life_and_repeats_all_in_order_when_it_hears_one() -> None:
    outbox = Outbox()
    for n in range(3):
        outbox.add(entry(n))
    send(outbox, 0.0)
    outbox.acked("0", 0.5)
    assert outbox.deadline() == 0.5 + ACK_TIMEOUT_S
    assert not outbox.tick(1.4)
    assert outbox.tick(1.5)
    outbox.add(entry(3))
    assert send(outbox, 1.6) == []  # nothing into the void
    assert outbox.tick(2.5)  # asked again
    outbox.heard()
    assert [id for _, id in send(outbox, 2.6)] == ["1", "2", "3"]


def test_what_was_refused_is_in_doubt_while_an_attempt_has_no_answer_or_failed_late() -> None:
    outbox = Outbox()
    outbox.add(entry(0))
    full, late = Nack("log", "full", "0"), Nack("log", "sync", "0", unsure=True)
    now = 0.0

    def again() -> None:
        nonlocal now
        now += 2 * LOG_PAUSE_S
        assert [id for _, id in send(outbox, now)] == ["0"]

    again()
    assert not outbox.in_doubt(full)
    assert outbox.in_doubt(late)
    outbox.nacked(full, now)
    again()
    assert not outbox.in_doubt(full)
    outbox.nacked(late, now)
    again()
    assert outbox.in_doubt(full)  # the late one may have been written
    outbox.acked("0", now)
    outbox.add(entry(0))
    send(outbox, now)
    assert outbox.tick(now + ACK_TIMEOUT_S)  # the connection breaks, and is repaired
    outbox.heard()
    again()
    assert outbox.in_doubt(full)
    assert outbox.in_doubt(Nack("refused", "no", "0"))


def test_a_log_that_can_not_be_written_is_tried_again_later_in_order() -> None:
    outbox = Outbox()
    for n in range(3):
        outbox.add(entry(n))
    send(outbox, 0.0)
    assert not outbox.nacked(Nack("log", "full", "0"), 0.1)
    assert send(outbox, 0.2) == []
    assert outbox.deadline() == 0.1 + LOG_PAUSE_S
    assert [id for _, id in send(outbox, 0.1 + LOG_PAUSE_S)] == ["0", "1", "2"]


def test_what_is_invalid_is_given_up_and_the_rest_goes_on() -> None:
    outbox = Outbox()
    outbox.add(entry(0))
    outbox.add(entry(1))
    send(outbox, 0.0)
    assert outbox.nacked(Nack("invalid", "no event", "0"), 0.1)
    assert "0" not in outbox
    assert outbox.ids() == ["1"]
    assert not outbox.nacked(Nack("invalid", "who?", "77"), 0.1)


@dataclass
class Intake:
    """The broker's side, as `EventPlane._expect` keeps it, for one connection after another."""

    log: list[str] = field(default_factory=list)
    expected: int | None = None

    def take(self, request: Publish, id: str) -> str:
        expected = max(self.expected if self.expected is not None else request.oldest, request.oldest)
        if request.n > expected:
            return "order"
        self.expected = max(expected, request.n + 1)
        if id not in self.log:
            self.log.append(id)
        return "ack"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["add", "add", "add", "carry", "carry", "lose", "lose-ack", "reconnect", "time"])))
def test_whatever_is_lost_every_event_is_logged_once_and_in_the_order_of_adding(acts: list[str]) -> None:
    outbox, intake, now, added = Outbox(), Intake(), 0.0, 0
    wire: list[tuple[Publish, str]] = []

    def carry(*, answers: bool) -> None:
        for request, id in wire:
            said = intake.take(request, id)
            if answers:
                outbox.heard()
                if said == "ack":
                    outbox.acked(id, now)
                else:
                    outbox.nacked(Nack("order", "", id), now)
        wire.clear()

    for act in acts:
        now += 0.03
        match act:
            case "add":
                outbox.add(entry(added))
                added += 1
            case "carry":
                carry(answers=True)
            case "lose":
                wire.clear()
                intake.expected = None  # what is lost, is lost with its connection
            case "lose-ack":
                carry(answers=False)
            case "reconnect":
                intake.expected = None
            case "time":
                now += ACK_TIMEOUT_S
        if outbox.tick(now):
            outbox.heard()
        wire += send(outbox, now)
        assert intake.log == [str(n) for n in range(len(intake.log))]
    for _ in range(20):
        now += ACK_TIMEOUT_S
        if outbox.tick(now):
            outbox.heard()
        wire += send(outbox, now)
        carry(answers=True)
    assert len(outbox) == 0
    assert intake.log == [str(n) for n in range(added)]
