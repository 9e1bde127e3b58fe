"""Publishing, subscribing and replaying through a real broker, over real sockets."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
import trio.testing

from interlock.broker import client, event_plane, topics
from interlock.broker import log as event_log
from interlock.broker.bus import Bus, EventFeed
from interlock.broker.config import PLACES, BrokerConfig
from interlock.broker.errors import InUse, LogError, Refused, Unreachable, UnsureWrite
from interlock.broker.facts import HostDown, HostUp
from interlock.broker.link import Link
from interlock.broker.log import Draft, EventLog, Record
from interlock.broker.planes import serve_planes
from interlock.broker.protocol import PAGE_EVENTS, decode_answer
from interlock.broker.sockets import Socket, open_sockets

A, B = topics.host_fact("a"), topics.host_fact("b")


@pytest.fixture
async def bus(planes: BrokerConfig) -> AsyncIterator[Bus]:
    async with client.open_bus(planes, "host/a") as opened:
        yield opened


@pytest.fixture
async def dealer(planes: BrokerConfig) -> AsyncIterator[Socket]:
    """A plain connection to the ingress, as a program in another language has it."""
    async with open_sockets() as sockets:
        yield sockets.open("dealer", connect=planes.events)


async def take(feed: EventFeed, count: int) -> list[tuple[int, str]]:
    taken: list[tuple[int, str]] = []
    with trio.fail_after(30):
        while len(taken) < count:
            event = await feed.__anext__()
            assert isinstance(event.body, HostDown)
            taken.append((event.header.seq, event.body.host))
    return taken


async def ask(dealer: Socket, request: dict[str, object], *frames: bytes) -> list[bytes]:
    with trio.fail_after(20):
        await dealer.send([msgpack.packb(request), *frames])
        return await dealer.receive()


def header(id: str, **more: object) -> bytes:
    packed: bytes = msgpack.packb({"id": id, "source": "test", "time": 1.5} | more)
    return packed


BODY: bytes = msgpack.packb({"type": "host-down", "host": "a"})


async def test_a_published_event_returns_its_number_and_a_repeated_id_the_same(bus: Bus) -> None:
    assert await bus.publish(A, HostDown(host="1"), id="x") == 1
    assert await bus.publish(A, HostDown(host="1"), id="x") == 1
    assert await bus.publish(B, HostDown(host="2")) == 2


async def test_a_subscriber_sees_what_comes_from_now_on_of_its_topics_only(bus: Bus) -> None:
    await bus.publish(A, HostDown(host="before"))
    async with bus.events([A]) as feed:
        assert feed.caught_up.is_set()
        assert feed.position == 1
        bus.post(B, HostDown(host="other"))
        bus.post(A, HostDown(host="mine"))
        assert await take(feed, 1) == [(3, "mine")]


async def test_a_late_subscriber_sees_the_log_and_then_what_comes_without_hole_or_repetition(bus: Bus) -> None:
    for n in range(1200):  # three pages
        bus.post(A if n % 2 else B, HostDown(host=str(n)))
    await bus.flushed()
    async with bus.events(["fact/"], after=100) as feed, bus.events([B], after=0) as half:
        assert not feed.caught_up.is_set()
        for n in range(1200, 1300):
            bus.post(A, HostDown(host=str(n)))
        assert await take(feed, 1200) == [(n + 1, str(n)) for n in range(100, 1300)]
        assert await take(half, 600) == [(n + 1, str(n)) for n in range(0, 1200, 2)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed.__anext__)  # caught up once the consumer comes back for more
            with trio.fail_after(20):
                await feed.caught_up.wait()
            nursery.cancel_scope.cancel()


async def test_an_empty_log_is_caught_up_with_at_once(bus: Bus) -> None:
    async with bus.events(["fact/"], after=0) as feed:
        with trio.fail_after(20):
            await feed.caught_up.wait()


async def test_the_position_moves_on_with_events_of_others(bus: Bus) -> None:
    async with bus.events([A]) as feed, trio.open_nursery() as nursery:
        nursery.start_soon(feed.__anext__)
        for _ in range(3):
            await bus.publish(B, HostDown(host="b"))
        with trio.fail_after(20):
            while feed.position < 3:  # noqa: ASYNC110
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()


async def test_a_consumer_that_does_not_read_loses_nothing(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlock.broker.bus.FEED_QUEUE", 10)
    async with bus.events(["fact/"], after=0) as feed:
        for n in range(1500):
            bus.post(A, HostDown(host=str(n)))
        await bus.flushed()
        assert await take(feed, 1500) == [(n + 1, str(n)) for n in range(1500)]


async def test_without_a_broker_publishing_is_unreachable_and_posts_wait(folder: Path, nursery: trio.Nursery) -> None:
    config = BrokerConfig(**{name: f"ipc://{folder}/{name}" for name in PLACES})
    async with client.open_bus(config, "host/a") as bus:
        bus.post(A, HostDown(host="1"))
        with pytest.raises(Unreachable, match="is the broker running"):
            await bus.publish(A, HostDown(host="never"), timeout=0.1)
        bus.post(A, HostDown(host="2"))
        await nursery.start(serve_planes, config, folder / "log")
        with trio.fail_after(20):
            await bus.flushed()
        async with bus.events(["fact/"], after=0) as feed:
            # the one given up may still have been under way: at most once, and in its place
            seen = [host for _, host in await take(feed, 2)]
            if "never" in seen:
                seen += [host for _, host in await take(feed, 1)]
            assert [host for host in seen if host != "never"] == ["1", "2"]


async def test_posts_still_leave_when_the_role_is_being_cancelled(planes: BrokerConfig) -> None:
    with trio.CancelScope() as scope:
        async with client.open_bus(planes, "rules") as bus:
            scope.cancel()
            bus.post(A, HostDown(host="last"))
    async with client.open_bus(planes, "cli/1") as bus, bus.events(["fact/"], after=0) as feed:
        assert await take(feed, 1) == [(1, "last")]


async def test_a_full_disk_refuses_events_and_serves_replays_until_there_is_room(
    folder: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logs: list[EventLog] = []

    class Watched(EventLog):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            logs.append(self)

    def pages(count: int) -> None:
        logs[0]._writer.execute(f"PRAGMA max_page_count = {count}")

    monkeypatch.setattr(event_log, "EventLog", Watched)
    config = BrokerConfig(**dict.fromkeys(PLACES, "tcp://127.0.0.1:*"))
    config = await nursery.start(serve_planes, config, folder / "log")
    async with client.open_bus(config, "host/a") as bus:
        await bus.publish(A, HostDown(host="1"))
        pages(1)  # SQLite takes the number there are now
        with pytest.raises(Refused, match="full"), caplog.at_level(logging.ERROR):
            await bus.publish(A, HostDown(host="x" * 500_000))
        assert "refuses events" in caplog.text
        bus.post(A, HostDown(host="y" * 500_000))
        bus.post(A, HostDown(host="3"))
        async with bus.events(["fact/"], after=0) as feed:
            assert await take(feed, 1) == [(1, "1")]
            pages(1_000_000)
            assert [host[0] for _, host in await take(feed, 2)] == ["y", "3"]  # the small one did not overtake


async def test_what_may_be_in_the_log_is_never_said_to_be_refused(
    bus: Bus, planes: BrokerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.broker.outbox.LOG_PAUSE_S", 0.05)
    append, failures = EventLog.append, [UnsureWrite("sync"), LogError("full"), None]

    def late(log: EventLog, drafts: list[Draft], *, now: float) -> list[Record]:
        records = append(log, drafts, now=now)
        if failures and (failure := failures.pop(0)):
            raise failure
        return records

    monkeypatch.setattr(EventLog, "append", late)
    assert await bus.publish(A, HostDown(host="1"), timeout=20) == 1
    failures += [UnsureWrite("sync"), *[LogError("full")] * 1000]
    with pytest.raises(Unreachable):
        await bus.publish(A, HostDown(host="2"), timeout=0.3)
    failures.clear()
    async with bus.events(["fact/"], after=0) as feed:
        assert await take(feed, 2) == [(1, "1"), (2, "2")]


async def test_a_port_that_is_taken_is_an_error_that_names_it(planes: BrokerConfig, folder: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_planes, planes, folder / "other")
    assert caught.group_contains(InUse, match=re.escape(planes.events), depth=None)


async def test_an_error_inside_leaves_as_it_was_raised(bus: Bus, planes: BrokerConfig) -> None:
    with pytest.raises(Refused, match="mine"):
        async with client.open_bus(planes, "cli/1") as other, other.events(["fact/"]), other.samples([""]):
            raise Refused("mine")


async def test_too_many_events_at_once_are_held_back_and_all_arrive_in_order(
    folder: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_plane, "QUEUE", 6)
    monkeypatch.setattr("interlock.broker.outbox.LOG_PAUSE_S", 0.05)
    config = BrokerConfig(**dict.fromkeys(PLACES, "tcp://127.0.0.1:*"))
    config = await nursery.start(serve_planes, config, folder / "log")
    async with client.open_bus(config, "host/a") as bus, bus.events(["fact/"], after=0) as feed:
        for n in range(100):
            bus.post(A, HostDown(host=str(n)))
        assert await take(feed, 100) == [(n + 1, str(n)) for n in range(100)]


async def test_the_next_page_is_asked_for_before_this_one_is_consumed_unless_the_consumer_is_slow(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    ask = Link.ask

    def noted(link: Link, after: int | None, *rest: Any) -> int:
        asked.append(after)
        return ask(link, after, *rest)

    for n in range(5 * PAGE_EVENTS):
        bus.post(A, HostDown(host=str(n)))
    await bus.flushed()
    monkeypatch.setattr(Link, "ask", noted)
    monkeypatch.setattr("interlock.broker.bus.FEED_QUEUE", PAGE_EVENTS)
    async with bus.events([A], after=0) as feed:
        with trio.fail_after(20):
            while len(asked) < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)  # not without a pause: the thread that reads the log needs its turns
        assert asked == [0, PAGE_EVENTS]  # nothing was consumed yet, and what it holds is full
        assert await take(feed, 5 * PAGE_EVENTS) == [(n + 1, str(n)) for n in range(5 * PAGE_EVENTS)]
    assert asked == [n * PAGE_EVENTS for n in range(5)]


# --- the protocol, as `docs/wire.md` tells it


async def test_a_plain_program_publishes_and_gets_an_ack(dealer: Socket) -> None:
    answer = await ask(dealer, {"op": "publish"}, A.encode(), header("1"), BODY)
    assert [msgpack.unpackb(frame) for frame in answer] == [{"op": "ack", "id": "1", "seq": 1}]
    answer = await ask(dealer, {"op": "ping", "request": 7}, b"ignored")
    assert msgpack.unpackb(answer[0]).items() >= {"op": "pong", "request": 7, "seq": 1}.items()


async def test_a_plain_program_replays_page_by_page(dealer: Socket) -> None:
    for n in range(3):
        await ask(dealer, {"op": "publish"}, A.encode(), header(str(n)), BODY)
    request = {"op": "replay", "request": 5, "after": 0, "prefixes": ["fact/"], "limit": 2}
    answer, events = await ask(dealer, request)
    assert msgpack.unpackb(answer) == {"op": "events", "request": 5}
    first, second = msgpack.unpackb(events)
    assert first[0] == A.encode()
    assert msgpack.unpackb(first[1]).items() >= {"id": "0", "source": "test", "time": 1.5, "seq": 1, "prev": 0}.items()
    assert first[2] == BODY
    assert msgpack.unpackb(second[1])["prev"] == 1
    with trio.fail_after(20):
        end = msgpack.unpackb((await dealer.receive())[0])
    assert end.items() >= {"op": "replayed", "request": 5, "through": 2, "more": True, "count": 2}.items()


async def test_a_plain_program_subscribes_and_sees_events_and_beats(planes: BrokerConfig, dealer: Socket) -> None:
    async with open_sockets() as sockets:
        sub = sockets.open("sub", connect=planes.feed, subscribe=[""])
        with trio.fail_after(20):
            topic, beat = await sub.receive()
            assert topic == b"beat/"
            assert msgpack.unpackb(beat).keys() == {"beat", "epoch", "seq", "since", "topics", "log", "speaks", "next"}
            await ask(dealer, {"op": "publish"}, A.encode(), header("1"), BODY)
            while (frames := await sub.receive())[0] == b"beat/":
                pass
    assert frames[0] == A.encode()
    assert msgpack.unpackb(frames[1]).items() >= {"id": "1", "seq": 1, "since": 0, "recent": {}}.items()
    assert frames[2] == BODY


async def test_an_event_that_overtakes_a_lost_one_is_sent_back(dealer: Socket) -> None:
    first = await ask(dealer, {"op": "publish", "n": 5, "oldest": 4}, A.encode(), header("5"), BODY)
    assert msgpack.unpackb(first[0]).items() >= {"op": "nack", "kind": "order", "id": "5"}.items()
    for n in (4, 5):
        answer = await ask(dealer, {"op": "publish", "n": n, "oldest": 4}, A.encode(), header(str(n)), BODY)
        assert msgpack.unpackb(answer[0]) == {"op": "ack", "id": str(n), "seq": n - 3}


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "3 frames"),
        ([b"t/", b"h"], "3 frames"),
        ([b"\xff/", header("1"), BODY], "ASCII"),
        ([b"fact/host/a", header("1"), BODY], "ends with a slash"),
        ([b"beat/", header("1"), BODY], "not a topic"),
        ([b"fact/\n/", header("1"), BODY], "not a topic"),
        ([b"x" * 300 + b"/", header("1"), BODY], "topic of 301 bytes"),
        ([b"fact/", b"\xc1", BODY], "event header"),
        ([b"fact/", header(""), BODY], "no id"),
        ([b"fact/", header("x" * 300), BODY], "no id, or one too long"),
        ([b"fact/", header("1", time=float("nan")), BODY], "time"),
        ([b"fact/", header("1", sig=bytes(5000)), BODY], "header of 50"),
        ([b"fact/", header("1", sig=bytes(65)), BODY], "signature of 65 bytes"),
        ([b"fact/", header("1"), b"\x80"], "event body"),
        ([b"fact/", header("1"), msgpack.packb({"type": "no-such"})], "event body"),
        ([b"fact/", header("1"), b"\x81\xa1a" * 100_000], "event body"),
        ([b"fact/", header("1"), b"\xc0" * ((1 << 20) + 1)], "event body of 1048577 bytes"),
    ],
)
async def test_what_is_not_an_event_gets_a_nack_with_the_reason(
    dealer: Socket, frames: list[bytes], reason: str
) -> None:
    answer = msgpack.unpackb((await ask(dealer, {"op": "publish"}, *frames))[0])
    assert answer["op"] == "nack"
    assert answer["kind"] == "invalid"
    assert reason in answer["reason"]


async def test_no_answer_of_the_broker_is_unknown_to_the_client(dealer: Socket) -> None:
    assert decode_answer((await ask(dealer, {"op": "replay", "request": 1, "after": 0, "prefixes": ["x"] * 65}))[0])


async def test_events_up_to_the_type_of_a_newer_sender_keep_their_place(bus: Bus, planes: BrokerConfig) -> None:
    async with bus.events(["fact/"], after=0) as feed:
        await bus.publish(A, HostUp(host="a", control="tcp://a:1", pid=1, boot="b"))
        event = await feed.__anext__()
        assert isinstance(event.body, HostUp)
        assert event.header.source == "host/a"
        assert event.header.logged >= event.header.time - 1
