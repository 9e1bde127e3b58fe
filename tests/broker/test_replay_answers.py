"""Events of a replay travel together where they are small, and alone where they are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.broker.errors import WireError
from interlock.broker.protocol import (
    PACK_BYTES,
    PAGE_EVENTS,
    ReplayEvent,
    ReplayEvents,
    answers,
    decode_answer,
    decode_events,
)

SIZES = st.one_of(st.integers(0, 300), st.integers(PACK_BYTES - 20, PACK_BYTES + 20))


@given(st.lists(SIZES, max_size=40))
def test_every_event_arrives_once_in_order_and_only_large_ones_travel_alone(sizes: list[int]) -> None:
    events = [(b"fact/%d/" % n, b"h", bytes(size)) for n, size in enumerate(sizes)]
    arrived = []
    for head, *frames in answers(7, events):
        match decode_answer(head):
            case ReplayEvents(request=7):
                assert len(frames) == 1
                pack = decode_events(frames[0])
                assert sum(len(part) for event in pack for part in event) <= PACK_BYTES
                arrived += pack
            case ReplayEvent(request=7):
                assert sum(map(len, frames)) > PACK_BYTES
                arrived.append((frames[0], frames[1], frames[2]))
            case other:
                pytest.fail(f"{other}")
    assert arrived == events


def test_a_page_of_usual_events_is_a_few_messages() -> None:
    events = [(b"fact/host/alpha/", bytes(120), bytes(150))] * PAGE_EVENTS
    assert len(list(answers(1, events))) == 3


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", b"\x80", b"\x91\x92\xc4\0\xc4\0", b"\x91\x93\1\2\3", bytes((1 << 20) + 1)]
)
def test_what_is_no_array_of_events_is_said_so(frame: bytes) -> None:
    with pytest.raises(WireError, match="array of events"):
        decode_events(frame)
