"""Two hosts and a link between them, over real sockets with real keys."""

from __future__ import annotations

import socket as sockets_of_the_system
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from interlock.agents import session as sessions
from interlock.agents.link import Link, LinkDoor
from interlock.agents.session import Stream
from interlock.broker import keys
from interlock.broker.errors import InterlockError, Refused, Unreachable
from interlock.broker.gate import Gate
from interlock.broker.keyring import Keyring
from interlock.broker.security import Security
from interlock.broker.sockets import open_sockets


class Place:
    """Host beta with a door, and whoever dials it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "keys"
        Keyring(self.folder, "f").ensure(["host/alpha", "host/beta", "monitor/alpha", "broker"], now=1.0)
        with sockets_of_the_system.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self.asked: list[tuple[str, str]] = []
        self.served: list[str] = []

    def security(self, identity: str) -> Security:
        return Security(
            keys.read_private(self.folder, identity), keys.Roll(keys.read_authority(self.folder)), self.folder
        )

    async def answer(self, host: str, what: str, about: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((host, what))
        if what == "hang":
            await trio.sleep_forever()
        if what == "no":
            raise Refused("not you")
        return {**about, "host": host}

    async def serve(self, host: str, stream: Stream, whom: str, port: str) -> None:
        """An echo, but for the port `sink`, which takes nothing."""
        self.served.append(f"{host} {whom} {port}")
        if port == "sink":
            await trio.sleep_forever()
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.send_eof()

    @asynccontextmanager
    async def door(self) -> AsyncIterator[None]:
        security = self.security("host/beta")
        async with open_sockets(security.curve()) as sockets, trio.open_nursery() as nursery:
            gate = Gate(security, "host beta")
            await nursery.start(gate.serve, sockets)
            door = LinkDoor("beta", self.answer, self.serve, gate)
            await nursery.start(door.run, sockets, self.endpoint)
            yield
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def link(self, identity: str = "host/alpha") -> AsyncIterator[Link]:
        security = self.security(identity)
        async with open_sockets(security.curve()) as sockets, trio.open_nursery() as nursery:
            server = security.key_of("host/beta")
            link = Link(sockets, self.endpoint, own="alpha", there="host/beta", server=server)
            nursery.start_soon(link.run)
            yield link
            nursery.cancel_scope.cancel()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_a_question_is_answered_to_whom_the_key_names(place: Place) -> None:
    async with place.door(), place.link() as link:
        assert await link.ask("who", {"n": 1}, 20.0) == {"n": 1, "host": "alpha"}
        with pytest.raises(Refused, match="not you"):
            await link.ask("no", {}, 20.0)
        with pytest.raises(Unreachable, match="are over"):
            await link.ask("hang", {}, 0.1)


async def test_many_streams_pass_at_once_and_whole(place: Place) -> None:
    sizes = [0, 1, 70_000, 3_000_000, 3_000_000]
    found: dict[int, int] = {}

    async def one(number: int, size: int, link: Link) -> None:
        stream = link.open("tutor", "echo")
        data = bytes([number]) * size

        async def say() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(say)
            came = b""
            while part := await stream.receive_some():
                came += part
        assert came == data
        found[number] = len(came)

    async with place.door(), place.link() as link:
        await link.until_up(20.0)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number, size in enumerate(sizes):
                    nursery.start_soon(one, number, size, link)
    assert [found[number] for number in range(len(sizes))] == sizes


async def test_who_takes_nothing_holds_up_its_own_stream_and_no_other(place: Place) -> None:
    async with place.door(), place.link() as link:
        await link.until_up(20.0)
        stuck = link.open("tutor", "sink")
        with trio.move_on_after(0.3) as waited:
            await stuck.send_all(bytes(2 << 20))
        assert waited.cancelled_caught
        other = link.open("tutor", "echo")
        await other.send_all(b"hello")
        with trio.fail_after(20):
            assert await other.receive_some() == b"hello"


async def test_a_key_that_is_no_hosts_gets_no_session(place: Place) -> None:
    async with place.door(), place.link("monitor/alpha") as link:
        with pytest.raises(Unreachable):
            await link.ask("who", {}, 1.0)
    assert place.asked == []


async def test_with_the_other_host_go_its_streams_and_a_new_session_comes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "SILENT_S", 0.5)
    monkeypatch.setattr("interlock.agents.link.SILENT_S", 0.5)
    monkeypatch.setattr("interlock.agents.link.PING_S", 0.1)
    async with place.link() as link:
        async with place.door():
            await link.until_up(20.0)
            stream = link.open("tutor", "echo")
            await stream.send_all(b"one")
            assert await stream.receive_some() == b"one"
        with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        with pytest.raises(InterlockError):
            await link.ask("who", {}, 0.2)
        async with place.door():
            assert await link.ask("who", {}, 20.0) == {"host": "alpha"}


async def test_what_was_begun_for_a_host_that_is_gone_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlock.agents.link.SILENT_S", 0.5)
    ended = trio.Event()

    async def serve(host: str, stream: Stream, whom: str, port: str) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    monkeypatch.setattr(place, "serve", serve)
    async with place.door():
        async with place.link() as link:
            await link.until_up(20.0)
            link.open("tutor", "requests")
            await link.ask("who", {}, 20.0)
        with trio.fail_after(20):
            await ended.wait()
