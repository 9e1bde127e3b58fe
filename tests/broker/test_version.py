"""Programs of other versions of the wire format: understood where they can be, and otherwise told so clearly."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from interlock.broker import client, topics, version, wire
from interlock.broker.bus import Bus
from interlock.broker.config import BrokerConfig
from interlock.broker.direct import serve_direct
from interlock.broker.errors import Refused, UnknownVersion
from interlock.broker.facts import HostDown
from interlock.broker.protocol import REFUSALS, Why, decode_request
from interlock.broker.sockets import Socket, open_sockets
from interlock.broker.telemetry_protocol import decode_ask

A = topics.host_fact("a")
BODY: bytes = msgpack.packb({"type": "host-down", "host": "a"})
TELEMETRY = b"telemetry/a/host/"
NAMES_BOTH = ["version 99", "known here: version 1"]


def pack(**message: Any) -> bytes:
    packed: bytes = msgpack.packb(message)
    return packed


def header(id: str, **more: Any) -> bytes:
    return pack(id=id, source="test", time=1.5, **more)


async def ask(dealer: Socket, *frames: bytes) -> list[Any]:
    with trio.fail_after(20):
        await dealer.send(frames)
        return [msgpack.unpackb(frame) for frame in await dealer.receive()]


def names_both(reason: str) -> bool:
    return all(text in reason for text in NAMES_BOTH)


@pytest.fixture
async def dealer(planes: BrokerConfig) -> AsyncIterator[Socket]:
    async with open_sockets() as sockets:
        yield sockets.open("dealer", connect=planes.events)


# --- the broker and hosts, asked by others


@pytest.mark.parametrize(
    "frames",
    [
        [pack(op="publish", v=99), A.encode(), header("1"), BODY],
        [pack(op="publish"), A.encode(), header("1", v=99), BODY],
        [pack(op="publish"), A.encode(), header("1", v=99), pack(kind="of another world")],
        [pack(op="publish", v=99, n="twelve"), A.encode(), header("1", v=99), b"\xc1"],
    ],
)
async def test_an_event_of_an_unknown_version_is_refused_with_both_versions_and_not_logged(
    dealer: Socket, frames: list[bytes]
) -> None:
    (nack,) = await ask(dealer, *frames)
    assert (nack["op"], nack["kind"], nack["id"]) == ("nack", "version", "1")
    assert names_both(nack["reason"])
    assert (await ask(dealer, pack(op="publish"), A.encode(), header("1"), BODY))[0]["seq"] == 1


async def test_requests_of_an_unknown_version_are_answered_each_in_its_way(dealer: Socket) -> None:
    (failed,) = await ask(dealer, pack(op="replay", request=7, v=99, since="yesterday"))
    assert (failed["op"], failed["request"], failed["kind"]) == ("failed", 7, "version")
    assert names_both(failed["reason"])
    for op in ("watch", "conjure"):
        (nack,) = await ask(dealer, pack(op=op, command="x", v=99))
        assert (nack["op"], nack["kind"]) == ("nack", "version")
        assert names_both(nack["reason"])
    (pong,) = await ask(dealer, pack(op="ping", request=8, v=99))
    assert (pong["op"], pong["request"], pong["speaks"]) == ("pong", 8, [version.OLDEST_WIRE, version.WIRE_VERSION])


async def test_an_event_of_an_unknown_version_is_not_overtaken_by_what_its_publisher_sends_next(
    dealer: Socket,
) -> None:
    (nack,) = await ask(dealer, pack(op="publish", n=1, oldest=1), A.encode(), header("1", v=99), BODY)
    assert nack["kind"] == "version"
    (nack,) = await ask(dealer, pack(op="publish", n=2, oldest=1), A.encode(), header("2"), BODY)
    assert nack["kind"] == "order"


async def test_a_program_that_names_no_version_works_on_both_planes(planes: BrokerConfig, dealer: Socket) -> None:
    assert await ask(dealer, pack(op="publish"), A.encode(), header("1"), BODY) == [{"op": "ack", "id": "1", "seq": 1}]
    async with open_sockets() as sockets:
        feed = sockets.open("sub", connect=planes.telemetry_out, subscribe=[""])
        telemetry = sockets.open("dealer", connect=planes.telemetry_in)
        with trio.fail_after(20):
            while (await feed.receive())[0] != b"beat/":
                pass
            old = pack(source="a/host", epoch=1, seq=2, time=1.0)
            await telemetry.send([TELEMETRY, pack(source="a/host", epoch=1, seq=1, time=1.0, v=99)])
            await telemetry.send([TELEMETRY, old])
            while (frames := await feed.receive())[0] != TELEMETRY:
                pass
            assert frames[1] == old  # the other one was not passed on,
            while True:  # but counted
                text = b"".join(await feed.receive())
                if b"a batch of an unknown version" in text:
                    break
            (failed,) = await ask(telemetry, pack(op="last", request=5, v=99))
            assert (failed["op"], failed["request"], failed["kind"]) == ("failed", 5, "version")
            assert names_both(failed["reason"])
            page = await telemetry_page(telemetry, pack(op="last", request=6, prefixes=["telemetry/a/"]))
            assert page == {"op": "page", "request": 6, "page": 1, "more": False}


async def telemetry_page(dealer: Socket, request: bytes) -> Any:
    await dealer.send([request])
    return msgpack.unpackb((await dealer.receive())[0])


async def test_a_host_refuses_an_unknown_version_and_takes_an_event_without_one() -> None:
    taken: list[str] = []
    async with open_sockets() as sockets, trio.open_nursery() as nursery:
        endpoint = await nursery.start(serve_direct, sockets, "tcp://127.0.0.1:*", lambda e: taken.append(e.header.id))
        dealer = sockets.open("dealer", connect=endpoint)
        (reply,) = await ask(dealer, A.encode(), header("1", v=99), pack(type="of another world"))
        assert (reply["ok"], reply["id"], reply["kind"]) == (False, "1", "version")
        assert names_both(reply["reason"])
        assert (await ask(dealer, A.encode(), header("2"), BODY))[0]["ok"]
        nursery.cancel_scope.cancel()
    assert taken == ["2"]


# --- our own roles, at a broker of another version


class OtherBroker:
    """A broker that understands versions 2 and 3 only, as those may look one day."""

    speaks = (2, 3)
    reason = "request of version 1 of the wire format; known here: versions 2 to 3 (update who sends it)"

    def __init__(self, events: Socket, feed: Socket) -> None:
        self._events = events
        self._feed = feed
        self.updated = False  # or its clients are

    async def answer(self) -> None:
        while True:
            peer, frame, *rest = await self._events.receive()
            request = msgpack.unpackb(frame)
            match request["op"]:
                case "publish" if self.updated:
                    answer = pack(op="ack", id=msgpack.unpackb(rest[1])["id"], seq=6)
                case "ping":
                    answer = pack(op="pong", request=request["request"], seq=5, log="l", speaks=self.speaks)
                case "replay":
                    answer = pack(op="failed", request=request["request"], kind="version", reason=self.reason)
                case _:
                    id = msgpack.unpackb(rest[1])["id"] if len(rest) == 3 else ""
                    answer = pack(op="nack", kind="version", reason=self.reason, id=id)
            await self._events.send([peer, answer])

    async def beat(self) -> None:
        while True:
            await self._feed.send([b"beat/", pack(beat=1, epoch=1, seq=5, since=0, topics={}, log="l", speaks=[2, 3])])
            await trio.sleep(0.05)


@asynccontextmanager
async def other_broker() -> AsyncIterator[tuple[OtherBroker, BrokerConfig, trio.Nursery]]:
    async with open_sockets() as sockets, trio.open_nursery() as nursery:
        kinds = {"events": "router", "feed": "xpub", "telemetry_in": "router", "telemetry_out": "xpub"}
        opened = {name: sockets.open(kind, bind="tcp://127.0.0.1:*") for name, kind in kinds.items()}
        config = BrokerConfig(**{name: socket.endpoint for name, socket in opened.items()})
        yield OtherBroker(opened["events"], opened["feed"]), config, nursery
        nursery.cancel_scope.cancel()


async def test_a_publication_is_refused_at_once_and_a_post_waits_until_somebody_has_updated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with other_broker() as (broker, config, nursery):
        nursery.start_soon(broker.answer)
        async with client.open_bus(config, "host/a") as bus:
            with pytest.raises(Refused, match="known here: versions 2 to 3"), trio.fail_after(20):
                await bus.publish(A, HostDown(host="a"), timeout=20)
            bus.post(A, HostDown(host="a"), id="kept")
            with trio.fail_after(20):
                assert "versions 2 to 3" in await bus.mismatch()
            broker.updated = True
            with trio.fail_after(20):
                await bus.flushed()
    said = [record.getMessage() for record in caplog.records if "understand each other" in record.getMessage()]
    assert len(said) == 2  # when it began, and when it was over
    assert "versions 2 to 3" in said[0]


@pytest.mark.parametrize("after", [None, 0])
async def test_a_subscriber_of_a_broker_of_another_version_learns_it_from_its_first_answer(after: int | None) -> None:
    async with other_broker() as (broker, config, nursery):
        nursery.start_soon(broker.answer)
        async with client.open_bus(config, "host/a") as bus, trio.open_nursery() as inner:
            inner.start_soon(subscribe, bus, after)
            with trio.fail_after(20):
                said = await bus.mismatch()
            inner.cancel_scope.cancel()
    assert "versions 2 to 3" in said


async def test_a_subscriber_learns_it_from_a_beat_too() -> None:
    async with other_broker() as (broker, config, nursery):
        nursery.start_soon(broker.beat)
        async with client.open_bus(config, "host/a") as bus, trio.open_nursery() as inner:
            inner.start_soon(subscribe, bus, 0)
            with trio.fail_after(20):
                said = await bus.mismatch()
            inner.cancel_scope.cancel()
    assert said == (
        "the broker understands versions 2 to 3 of the wire format, this program version 1 (update this program)"
    )


async def subscribe(bus: Bus, after: int | None) -> None:
    async with bus.events(["fact/"], after=after) as feed:
        async for _ in feed:
            pass


async def test_an_event_of_an_unknown_version_on_the_feed_keeps_its_place_and_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    async with open_sockets() as sockets:
        kinds = {"events": "router", "feed": "xpub", "telemetry_in": "router", "telemetry_out": "xpub"}
        opened = {name: sockets.open(kind, bind="tcp://127.0.0.1:*") for name, kind in kinds.items()}
        config = BrokerConfig(**{name: socket.endpoint for name, socket in opened.items()})
        async with client.open_bus(config, "host/a") as bus, trio.open_nursery() as nursery:

            async def broker() -> None:
                while await opened["feed"].receive() != [b"\x01beat/"]:
                    pass
                peer, request = await opened["events"].receive()
                number = msgpack.unpackb(request)["request"]
                replayed = pack(op="replayed", request=number, through=0, more=False, count=0, log="l")
                await opened["events"].send([peer, replayed])
                for n, more in ((1, {"v": 99}), (2, {})):
                    live = header(str(n), seq=n, since=0, recent={A: n - 1} if n > 1 else {}, **more)
                    body = BODY if n == 2 else pack(what="nobody knows")
                    await opened["feed"].send([A.encode(), live, body])

            nursery.start_soon(broker)
            with trio.fail_after(20):
                async with bus.events(["fact/"], after=0) as feed:
                    event = await anext(feed)
                    assert (event.header.seq, feed.undecodable) == (2, 1)
            nursery.cancel_scope.cancel()
    assert "an event of an unknown version" in caplog.text


# --- the codecs

VALUES = st.one_of(st.none(), st.integers(-(2**63), 2**64 - 1), st.text(max_size=5), st.lists(st.integers(0, 9)))
UNKNOWN = st.one_of(st.integers(2, 2**63 - 1), st.integers(-(2**63), 0))


@given(rest=st.dictionaries(st.text(max_size=6), VALUES, max_size=5), v=UNKNOWN)
def test_whatever_else_a_message_of_an_unknown_version_holds_it_is_known_as_that(rest: dict[str, Any], v: int) -> None:
    frame = pack(**(rest | {"v": v}))
    for decode in (
        lambda: wire.decode_event([A.encode(), frame, BODY]),
        lambda: wire.decode_batch([TELEMETRY, frame]),
        lambda: decode_request(frame),
        lambda: decode_ask(frame),
    ):
        with pytest.raises(UnknownVersion, match=f"version {v} "):
            decode()


def test_versions_meet_where_they_have_one_in_common() -> None:
    for speaks in ((1, 1), (0, 1), (1, 9), (0, 9)):
        version.check_meets(speaks, "the broker")
    with pytest.raises(UnknownVersion, match=r"versions 2 to 9 .*update this program"):
        version.check_meets((2, 9), "the broker")
    with pytest.raises(UnknownVersion, match=r"version 0 .*update the broker"):
        version.check_meets((0, 0), "the broker")


def test_every_kind_of_refusal_says_what_to_do() -> None:
    assert set(REFUSALS) == set(Why.__args__)
    assert all(REFUSALS.values())
