"""Reserved GPU memory: the ledger by itself, and the desk with real connections from real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from interlock.agents import gpu_lease, guard
from interlock.agents.agent import Agent
from interlock.agents.gpu_lease import GpuMemoryRefused
from interlock.agents.resources import Card
from interlock.agents.vram import CONTEXT_BYTES, LEAK_S, Ledger
from interlock.agents.vram_desk import Desk
from interlock.broker.errors import Refused
from interlock.broker.memory import MemoryBroker
from interlock.broker.samples import Labels, labels

GIB = 1 << 30
TUTOR, OTHER = ("tutor", "v1"), ("other", "v1")


def card(free: float, *, uuid: str = "GPU-0", index: str = "0", total: float = 24) -> dict[Labels, float]:
    of = {"host": "alpha", "gpu": index, "uuid": uuid}
    return {
        labels("gpu_memory_total_bytes", **of): total * GIB,
        labels("gpu_memory_free_bytes", **of): free * GIB,
    }


def taken(size: float, holder: tuple[str, str] = TUTOR, role: str = "permanent") -> dict[Labels, float]:
    of = {"host": "alpha", "gpu": "0", "uuid": "GPU-0", "agent": holder[0], "revision": holder[1], "role": role}
    return {labels("gpu_process_memory_bytes", **of): size * GIB}


def ledger(*readings: dict[Labels, float], time: float = 0.0) -> Ledger:
    made = Ledger()
    for reading in readings:
        made.see(reading.items(), [], time)
    return made


def test_what_is_free_is_granted_and_reserved_for_nobody_else() -> None:
    book = ledger(card(20))
    lease = book.grant(TUTOR, 12 * GIB, "", 0.0)
    assert (lease.uuid, lease.bytes) == ("GPU-0", 12 * GIB)
    assert book.available("GPU-0") == 8 * GIB
    with pytest.raises(Refused, match=r"on GPU-0, and of that is reserved: 12\.00 GiB for tutor v1"):
        book.grant(OTHER, 9 * GIB, "", 0.0)
    book.release(lease)
    book.release(lease)
    assert book.grant(OTHER, 20 * GIB, "", 0.0).bytes == 20 * GIB


def test_what_a_holder_has_taken_is_not_counted_twice() -> None:
    book = ledger(card(20))
    book.grant(TUTOR, 12 * GIB, "", 0.0)
    book.see({**card(10), **taken(10)}.items(), [], 1.0)
    assert book.outstanding("GPU-0") == 2 * GIB
    assert book.available("GPU-0") == 8 * GIB


def test_what_is_not_physically_there_is_not_granted_whoever_has_it() -> None:
    book = ledger(card(3))  # a stranger has the rest, and has reserved nothing
    with pytest.raises(Refused, match=r"4\.00 GiB asked for; 3\.00 GiB are free of 24"):
        book.grant(TUTOR, 4 * GIB, "", 0.0)


def test_the_card_with_most_room_is_taken_or_the_one_that_is_named() -> None:
    book = ledger(card(4), card(9, uuid="GPU-1", index="1"))
    assert book.grant(TUTOR, GIB, "", 0.0).uuid == "GPU-1"
    assert book.grant(TUTOR, GIB, "0", 0.0).uuid == "GPU-0"
    assert book.grant(TUTOR, GIB, "GPU-0", 0.0).uuid == "GPU-0"
    with pytest.raises(Refused, match="there is no card '7' here"):
        book.grant(TUTOR, GIB, "7", 0.0)


def test_old_readings_and_none_grant_nothing() -> None:
    with pytest.raises(Refused, match="is its monitor running"):
        Ledger().grant(TUTOR, 1, "", 0.0)
    with pytest.raises(Refused, match="nothing is known"):
        ledger(card(20), time=100.0).grant(TUTOR, 1, "", 106.0)


def test_a_card_that_fails_grants_nothing_and_what_is_reserved_on_it_stays() -> None:
    book = ledger(card(20))
    book.grant(TUTOR, GIB, "", 0.0)
    book.see([], list(card(20)), 1.0)
    assert not book.knows(1.0)
    assert book.leased() == {("GPU-0", TUTOR): GIB}
    book.see(card(19).items(), [], 2.0)
    assert book.available("GPU-0") == 18 * GIB


def test_preflight_finds_what_is_reserved_not_free_and_the_old_one_as_large_as_it_reserved() -> None:
    book = ledger(card(20), taken(2))
    book.grant(TUTOR, 8 * GIB, "", 0.0)
    book.grant(OTHER, 3 * GIB, "", 0.0)
    seen = [Card("GPU-0", 24 * GIB, 20 * GIB, 2 * GIB), Card("GPU-1", GIB, GIB)]
    assert book.in_preflight(seen, "tutor") == [
        Card("GPU-0", 24 * GIB, (20 - 6 - 3) * GIB, 8 * GIB),
        Card("GPU-1", GIB, GIB, 0),
    ]


def test_who_has_more_than_it_reserved_for_some_seconds_is_a_leak_with_a_name() -> None:
    book = ledger(card(20))
    lease = book.grant(TUTOR, 4 * GIB, "", 0.0)
    context = CONTEXT_BYTES / GIB
    book.see(taken(4 + context).items(), [], 0.0)
    assert book.leaks(0.0) == [], "what its libraries take is no leak"
    book.release(lease)
    assert book.leaks(1.0) == []
    assert book.leaks(1.0 + LEAK_S - 0.1) == []
    [leak] = book.leaks(1.0 + LEAK_S)
    assert (leak.holder, leak.uuid, leak.bytes, leak.since) == (TUTOR, "GPU-0", 4 * GIB, 1.0)
    book.see(taken(context).items(), [], 9.0)
    assert book.leaks(9.0) == []
    book.see(taken(9).items(), [], 10.0)
    assert book.leaks(10.0) == [], "a new one begins anew"


def test_who_never_reserved_anything_is_not_blamed() -> None:
    book = ledger(card(20), taken(15, OTHER))
    book.leaks(0.0)
    assert book.leaks(100.0) == []


# --- the desk

MARKER = "feedfacecafe"
CLIENT = """
import json, sys
from interlock.agents.gpu_lease import Gpu, GpuMemoryRefused
size, wait_s = int(sys.argv[1]), float(sys.argv[2])
try:
    with Gpu().reserve(size, wait_s=wait_s) as held:
        print(json.dumps({"uuid": held.uuid}), flush=True)
        sys.stdin.read()
except GpuMemoryRefused as refused:
    print(json.dumps({"refused": str(refused)}), flush=True)
"""


class Room:
    """A desk on a bus where the test is the monitor."""

    def __init__(self, broker: MemoryBroker, path: Path) -> None:
        self.path = path
        self.desk = Desk(broker.bus("host/alpha"), "alpha", path, self.who)
        self._monitor = broker.bus("monitor/alpha").telemetry("alpha", "monitor")
        self.running: list[trio.Process] = []

    @staticmethod
    def who(marker: str) -> tuple[str, str] | None:
        host, _, name = marker.partition(":")
        return (name, "v1") if host == MARKER else None

    def tell(self, samples: dict[Labels, float]) -> None:
        self._monitor.send(samples, time=time.time())

    async def start(
        self, size: int, *, agent: str = "tutor", marker: str = MARKER, wait_s: float = 0.0
    ) -> trio.Process:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", CLIENT, str(size), str(wait_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, gpu_lease.ENVIRONMENT: str(self.path), guard.INSTANCE_VARIABLE: f"{marker}:{agent}"},
        )  # fmt: skip
        self.running.append(process)
        return process

    @staticmethod
    async def said(process: trio.Process) -> dict[str, str]:
        assert process.stdout is not None
        with trio.fail_after(30):
            text = b""
            while not text.endswith(b"\n"):
                text += await process.stdout.receive_some()
        found: dict[str, str] = json.loads(text)
        return found

    async def until_reserved(self, size: int) -> None:
        with trio.fail_after(30):
            while sum(self.desk.ledger.leased().values()) != size:
                await self.desk._changed.park()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="il-", dir="/tmp") as made:  # a socket's path must be short
        yield Path(made)


@asynccontextmanager
async def open_room(folder: Path) -> AsyncIterator[Room]:
    room = Room(MemoryBroker(), folder / "gpu")
    async with trio.open_nursery() as nursery:
        await nursery.start(room.desk.run)
        try:
            yield room
        finally:
            with trio.CancelScope(shield=True):
                for process in room.running:
                    process.kill()
                    await process.wait()
        nursery.cancel_scope.cancel()


async def test_an_agent_holds_what_it_was_granted_until_it_dies_however_it_dies(folder: Path) -> None:
    async with open_room(folder) as room:
        room.tell(card(20))
        first = await room.start(12 * GIB)
        assert await room.said(first) == {"uuid": "GPU-0"}
        assert room.desk.samples()[0] == {
            labels("agent_gpu_reserved_bytes", host="alpha", agent="tutor", revision="v1", uuid="GPU-0"): 12 * GIB
        }
        second = await room.start(9 * GIB, agent="other")
        assert "12.00 GiB for tutor v1" in (await room.said(second))["refused"]
        first.kill()
        await room.until_reserved(0)
        assert room.desk.samples()[1] != [], "its series has ended"


async def test_one_that_waits_is_granted_what_another_gives_back(folder: Path) -> None:
    async with open_room(folder) as room:
        room.tell(card(20))
        first = await room.start(12 * GIB)
        await room.said(first)
        second = await room.start(9 * GIB, agent="other", wait_s=60.0)
        while not room.desk._waiting:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert first.stdin is not None
        await first.stdin.aclose()
        assert await room.said(second) == {"uuid": "GPU-0"}


async def test_a_process_of_no_agent_of_this_host_is_refused(folder: Path) -> None:
    async with open_room(folder) as room:
        room.tell(card(20))
        stranger = await room.start(GIB, marker="deadbeef")
        assert "belongs to no agent of host alpha" in (await room.said(stranger))["refused"]


@pytest.mark.parametrize(
    "line", [b"{}\n", b'{"bytes": 0}\n', b'{"bytes": 1, "wait_s": -1}\n', b"[" * 4000 + b"\n", b"\xff\n"]
)
async def test_what_is_no_request_is_told_so_and_ends_nothing(folder: Path, line: bytes) -> None:
    async with open_room(folder) as room:
        async with await trio.open_unix_socket(str(room.path)) as stream:
            await stream.send_all(line)
            with trio.fail_after(10):
                assert b"that is no request for GPU memory" in await stream.receive_some(4096)
        room.tell(card(20))
        assert await room.said(await room.start(GIB)) == {"uuid": "GPU-0"}


async def test_an_agent_awaits_its_reservation_and_may_be_cancelled_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpu_lease.ENVIRONMENT, str(folder / "gpu"))
    monkeypatch.setattr("interlock.agents.vram_desk._marker_of", lambda pid: f"{MARKER}:tutor")
    agent = Agent(name="tutor")
    async with open_room(folder) as room:
        room.tell(card(20))
        async with agent.gpu.reserve(12 * GIB) as held:
            assert held.uuid == "GPU-0"
            with pytest.raises(GpuMemoryRefused, match=r"9\.00 GiB asked for"):
                async with agent.gpu.reserve(9 * GIB):
                    pass
            with trio.move_on_after(0.1) as scope:
                async with agent.gpu.reserve(9 * GIB, wait_s=60):
                    pass
            assert scope.cancelled_caught
        await room.until_reserved(0)


def test_where_there_is_no_host_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpu_lease.ENVIRONMENT, raising=False)
    with Agent().gpu.reserve(1) as held:
        assert held.uuid == ""
    with pytest.raises(ValueError, match="no number of bytes"):
        Agent().gpu.reserve(0)


def test_a_host_that_is_gone_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(gpu_lease.ENVIRONMENT, str(tmp_path / "none"))
    with pytest.raises(GpuMemoryRefused, match="gives no answer"):
        with Agent().gpu.reserve(1):
            pass
