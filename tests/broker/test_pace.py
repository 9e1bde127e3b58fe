"""How often the event plane beats: quickly while something happens, within a budget while nothing does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgpack
import pytest
import trio

from interlock.broker.config import PLACES, BrokerConfig
from interlock.broker.event_plane import serve_events
from interlock.broker.pace import AT_REST_PER_S, BUSY_PER_S, FRESH, Pace
from interlock.broker.protocol import BEAT_MEMORY, BEAT_S, BEAT_TOPIC, decode_beat
from interlock.broker.sockets import open_sockets

MANY = 5 * AT_REST_PER_S  # subscribers: 5 s between beats
BUSY_S = MANY / BUSY_PER_S
ANY = BrokerConfig(**dict.fromkeys(PLACES, "tcp://127.0.0.1:*"))


def at_rest() -> Pace:
    pace = Pace()
    for n in range(BEAT_MEMORY + 1):
        pace.beat(float(n), MANY)
    return pace


def test_a_fleet_that_is_not_large_always_hears_two_a_second() -> None:
    pace = Pace()
    for n in range(100):
        assert pace.beat(float(n), int(AT_REST_PER_S * BEAT_S)) == BEAT_S
        assert pace.due() == n + BEAT_S


def test_at_rest_a_large_fleet_hears_as_many_as_the_budget_allows() -> None:
    pace = at_rest()
    assert pace.beat(100.0, MANY) == 5.0
    assert pace.due() == 105.0


def test_each_event_is_followed_by_as_many_quick_beats_as_a_beat_remembers() -> None:
    pace = at_rest()
    pace.beat(100.0, MANY)
    pace.event()
    assert pace.due() == 100.0 + BUSY_S
    said = [pace.beat(101.0 + n, MANY) for n in range(BEAT_MEMORY + 1)]
    assert said == [BUSY_S] * (BEAT_MEMORY - 1) + [5.0, 5.0]


def test_who_joins_hears_one_soon() -> None:
    pace = at_rest()
    pace.beat(100.0, MANY)
    pace.joined()
    assert pace.due() == 100.0 + BUSY_S
    assert [pace.beat(101.0 + n, MANY) for n in range(FRESH)] == [BUSY_S] * (FRESH - 1) + [5.0]


async def test_an_event_ends_a_long_pause_between_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlock.broker.sockets.Socket.users", 1000 * AT_REST_PER_S)  # 1000 s
    monkeypatch.setattr("interlock.broker.pace.BUSY_PER_S", 10_000 * AT_REST_PER_S)
    async with trio.open_nursery() as nursery, open_sockets() as sockets:
        config = await nursery.start(partial(serve_events), ANY, tmp_path)
        feed = sockets.open("sub", connect=config.feed, subscribe=[BEAT_TOPIC])
        with trio.fail_after(20):
            while (beat := decode_beat((await feed.receive())[1])).next < 1000:
                pass
            assert beat.next == 1000
            events = sockets.open("dealer", connect=config.events)
            header, body = {"id": "x", "source": "test", "time": 1.5}, {"type": "host-down", "host": "alpha"}
            request, header, body = map(msgpack.packb, ({"op": "publish"}, header, body))
            await events.send([request, b"fact/host/alpha/", header, body])
            assert decode_beat((await feed.receive())[1]).seq == 1
        nursery.cancel_scope.cancel()
