"""One who floods the event plane waits for itself, not the others for it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from interlock.broker import event_plane, replays, topics
from interlock.broker.config import PLACES, BrokerConfig
from interlock.broker.errors import LogError
from interlock.broker.log import Draft, EventLog, Excerpt, Record
from interlock.broker.planes import serve_planes
from interlock.broker.sockets import Socket, open_sockets

ANY = BrokerConfig(**dict.fromkeys(PLACES, "tcp://127.0.0.1:*"))
TOPIC = topics.host_fact("a").encode()
BODY: bytes = msgpack.packb({"type": "host-down", "host": "a"})
PATIENCE_S = 60.0


class Disk:
    """Holds up the broker's log, and writes down what was asked of it in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[str]] = []
        self.fails = False
        self._free = threading.Event()
        self._free.set()
        self._busy = threading.Event()
        disk, append, read = self, EventLog.append, EventLog.read

        def slow_append(log: EventLog, drafts: Sequence[Draft], *, now: float) -> list[Record]:
            disk._wait([draft.header.id for draft in drafts])
            if disk.fails:
                disk.fails = False
                raise LogError("full for a moment")
            return append(log, drafts, now=now)

        def slow_read(log: EventLog, after: int, prefixes: Sequence[str], **page: int) -> Excerpt:
            disk._wait([prefixes[0]])
            return read(log, after, prefixes, **page)

        monkeypatch.setattr(EventLog, "append", slow_append)
        monkeypatch.setattr(EventLog, "read", slow_read)

    def _wait(self, asked: list[str]) -> None:
        self.asked.append(asked)
        self._busy.set()
        assert self._free.wait(PATIENCE_S)

    def stop(self) -> None:
        self._free.clear()
        self._busy.clear()

    async def busy(self) -> None:
        assert await trio.to_thread.run_sync(self._busy.wait, PATIENCE_S)

    def go_on(self) -> None:
        self._free.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@asynccontextmanager
async def connection(config: BrokerConfig) -> AsyncIterator[Socket]:
    async with open_sockets() as sockets:
        yield sockets.open("dealer", connect=config.events, send_limit=0, receive_limit=0)


async def post(dealer: Socket, id: str, **publish: int) -> None:
    header = msgpack.packb({"id": id, "source": "test", "time": 1.5})
    await dealer.send([msgpack.packb({"op": "publish", **publish}), TOPIC, header, BODY])


async def replay(dealer: Socket, prefix: str) -> None:
    await dealer.send([msgpack.packb({"op": "replay", "request": 1, "after": 0, "prefixes": [prefix]})])


async def answer(dealer: Socket) -> dict[str, Any]:
    with trio.fail_after(PATIENCE_S):
        found: dict[str, Any] = msgpack.unpackb((await dealer.receive())[0])
    return found


async def heard(dealer: Socket) -> None:
    """Everything sent before has been taken in: a ping is answered at once, in its turn."""
    await dealer.send([msgpack.packb({"op": "ping", "request": 99})])
    assert (await answer(dealer))["op"] == "pong"


async def test_an_event_of_another_does_not_wait_behind_a_flood(
    folder: Path, nursery: trio.Nursery, disk: Disk
) -> None:
    config = await nursery.start(serve_planes, ANY, folder / "log")
    async with connection(config) as greedy, connection(config) as honest:
        disk.stop()
        await post(greedy, "first")
        await disk.busy()
        for n in range(2 * event_plane.COMMIT - 100):
            await post(greedy, f"g{n}")
        await heard(greedy)
        await post(honest, "mine")
        await heard(honest)
        disk.go_on()
        assert (await answer(honest)).items() >= {"op": "ack", "id": "mine"}.items()
    assert "mine" in disk.asked[1]


async def test_the_one_whose_events_find_no_room_is_the_one_who_floods(
    folder: Path, nursery: trio.Nursery, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_plane, "QUEUE", 10)
    config = await nursery.start(serve_planes, ANY, folder / "log")
    async with connection(config) as greedy, connection(config) as honest:
        disk.stop()
        await post(greedy, "first")
        await disk.busy()
        for n in range(12):
            await post(greedy, f"g{n}")
        for n in range(5, 12):
            assert (await answer(greedy)).items() >= {"op": "nack", "kind": "log", "id": f"g{n}"}.items()
        for n in range(2):
            await post(honest, f"h{n}")
        await heard(honest)
        disk.go_on()
        assert [(await answer(honest))["op"] for _ in range(2)] == ["ack"] * 2
        assert [(await answer(greedy))["op"] for _ in range(6)] == ["ack"] * 6


async def test_a_replay_of_another_does_not_wait_behind_a_flood_of_them(
    folder: Path, nursery: trio.Nursery, disk: Disk
) -> None:
    config = await nursery.start(serve_planes, ANY, folder / "log")
    async with connection(config) as greedy, connection(config) as honest:
        await post(honest, "one")
        assert (await answer(honest))["op"] == "ack"
        disk.stop()
        await replay(greedy, "greedy/0/")
        await disk.busy()
        for n in range(1, 300):
            await replay(greedy, f"greedy/{n}/")
        await greedy.send([msgpack.packb({"op": "ping", "request": 99})])
        refused = 0
        while (told := await answer(greedy))["op"] != "pong":
            assert "too many" in told["reason"]
            refused += 1
        await replay(honest, "honest/")
        await heard(honest)
        disk.go_on()
        assert (await answer(honest))["op"] == "replayed"
        assert ["honest/"] in disk.asked[:5]
        for _ in range(300 - refused):
            assert (await answer(greedy))["op"] == "replayed"
    assert refused > 200


async def test_after_a_failed_write_nothing_overtakes_what_failed(
    folder: Path, nursery: trio.Nursery, disk: Disk
) -> None:
    config = await nursery.start(serve_planes, ANY, folder / "log")
    async with connection(config) as dealer, connection(config) as other:
        disk.stop()
        disk.fails = True
        await post(dealer, "1", n=1, oldest=1)
        await disk.busy()
        for n in (2, 3):
            await post(dealer, f"{n}", n=n, oldest=1)
        await post(dealer, "unordered")
        await heard(dealer)
        await post(other, "of another", n=7, oldest=7)
        await heard(other)
        disk.go_on()
        told = [await answer(dealer) for _ in range(4)]
        assert [(one["op"], one.get("kind"), one["id"]) for one in told] == [
            ("nack", "log", "1"),
            ("nack", "order", "2"),
            ("nack", "order", "3"),
            ("ack", None, "unordered"),
        ]
        assert (await answer(other))["op"] == "ack"
        for n in (1, 2, 3):
            await post(dealer, f"{n}", n=n, oldest=1)
            assert (await answer(dealer)).items() >= {"op": "ack", "seq": n + 2}.items()


async def test_who_does_not_read_its_replays_gets_no_more_of_them_and_others_do(
    folder: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "KEY_UNREAD", 1 << 20)
    config = await nursery.start(serve_planes, ANY, folder / "log")
    body = msgpack.packb({"type": "host-down", "host": "x" * 1_000_000})
    asked = 25
    async with connection(config) as honest, open_sockets() as sockets:
        for n in range(4):
            header = msgpack.packb({"id": f"{n}", "source": "test", "time": 1.5})
            await honest.send([msgpack.packb({"op": "publish"}), TOPIC, header, body])
            assert (await answer(honest))["op"] == "ack"
        lazy = sockets.open("dealer", connect=config.events, receive_limit=1)
        for _ in range(asked):
            await replay(lazy, "fact/")
        for _ in range(3):
            await replay(honest, "fact/")
            assert [(await answer(honest))["op"] for _ in range(5)] == ["event"] * 4 + ["replayed"]
        told = []
        while told.count("replayed") + told.count("failed") < asked:
            told.append((await answer(lazy))["op"])
        assert told.count("replayed") >= 1
        assert told.count("failed") >= 5  # the kernel's buffers hold some pages too
        await replay(lazy, "fact/")  # it has read all: it is served again
        assert [(await answer(lazy))["op"] for _ in range(5)] == ["event"] * 4 + ["replayed"]
