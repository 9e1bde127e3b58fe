"""The gateway of connections: a real server process that speaks a protocol of its own, and real clients."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from interlock.agents.front import open_gateway
from interlock.agents.stream_gateway import StreamGateway
from interlock.broker.config import AgentConfig, ProbeConfig, RevisionConfig
from interlock.broker.errors import ConfigError, InUse
from interlock.broker.sockets import open_sockets

# An agent as users have them: it says its name, then a line for each line; "count" counts what comes until the end.
LINE_PROGRAM = """
import os, socketserver, struct, socket, sys
name = sys.argv[1]
class Lines(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(f"hello from {name}\\n".encode())
        for line in self.rfile:
            word = line.strip().decode()
            if word == "die": os.kill(os.getpid(), 9)
            if word == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            if word == "count":
                size = 0
                while piece := self.rfile.read(1 << 16): size += len(piece)
                self.wfile.write(f"{size}\\n".encode())
                return
            if word.startswith("big"):
                for _ in range(int(word[3:])): self.wfile.write(b"x" * (1 << 20))
                return
            self.wfile.write(f"{name} {word}\\n".encode())
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    def handle_error(self, *_): pass
server = Server(("127.0.0.1", 0), Lines)
print("tcp://127.0.0.1:%d" % server.server_address[1], flush=True)
server.serve_forever()
"""


class Program:
    def __init__(self, name: str, process: trio.Process, endpoint: str) -> None:
        self.name, self.process, self.endpoint = name, process, endpoint


@asynccontextmanager
async def program(name: str) -> AsyncIterator[Program]:
    process = await trio.lowlevel.open_process([sys.executable, "-c", LINE_PROGRAM, name], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        with trio.fail_after(30):
            line = b""
            while not line.endswith(b"\n"):
                line += await process.stdout.receive_some(100)
        yield Program(name, process, line.decode().strip())
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            await process.stdout.aclose()


class Client:
    """One connection, from its greeting on."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._rest = b""

    async def line(self) -> str:
        """The next line; empty at the end of the connection."""
        while b"\n" not in self._rest:
            try:
                piece = await self.stream.receive_some(1000)
            except trio.BrokenResourceError:
                return ""
            if not piece:
                return ""
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    async def ask(self, word: str) -> str:
        await self.stream.send_all(f"{word}\n".encode())
        return await self.line()


class Bench:
    def __init__(self, gateway: StreamGateway) -> None:
        self.gateway = gateway
        self.clients: list[Client] = []

    def attach(self, *instances: Program) -> None:
        for instance in instances:
            self.gateway.attach(instance.name, instance.endpoint, window=1, idempotent=lambda _: False)

    async def client(self) -> Client:
        host, _, port = self.gateway.endpoint.removeprefix("stream://").partition(":")
        self.clients.append(Client(await trio.open_tcp_stream(host, int(port))))
        return self.clients[-1]

    async def greeted(self) -> tuple[Client, str]:
        client = await self.client()
        return client, (await client.line()).removeprefix("hello from ")


@asynccontextmanager
async def bench(**times: float) -> AsyncIterator[Bench]:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            gateway = StreamGateway("alpha", "stream://127.0.0.1:0", **times)
            await nursery.start(gateway.run)
            b = Bench(gateway)
            try:
                yield b
            finally:
                for client in b.clients:
                    await trio.aclose_forcefully(client.stream)
                nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110  # counters inside the gateway ring no bell
        await trio.sleep(0.002)


async def test_new_connections_go_to_who_is_routed_and_open_ones_stay_where_they_are() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 1.0})
        first, by = await b.greeted()
        assert by == "old"
        b.gateway.route({"new": 1.0})
        second, by = await b.greeted()
        assert by == "new"
        assert [await client.ask("a") for client in (first, second, first)] == ["old a", "new a", "old a"]
        assert (b.gateway.in_flight("old"), b.gateway.in_flight("new")) == (1, 1)
        await first.stream.aclose()
        await b.gateway.drained("old")
        seen = b.gateway.snapshot(trio.current_time())["old"]
        assert (seen.connections, seen.connections_total, seen.errors) == (0, 1, 0)
        assert (seen.bytes_in, seen.bytes_out) == (4, len("hello from old\nold a\nold a\n"))


async def test_a_quarter_of_the_connections_goes_to_the_candidate() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 0.75, "new": 0.25})
        assert Counter([(await b.greeted())[1] for _ in range(40)]) == {"old": 30, "new": 10}


async def test_a_rollback_ends_the_candidate_s_connections_and_no_other() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"old": 1.0})
        stays, _ = await b.greeted()
        b.gateway.route({"new": 1.0})
        ended, by = await b.greeted()
        assert by == "new"
        b.gateway.route({"old": 1.0})
        b.gateway.rescue("new")
        assert await ended.line() == ""
        assert (await b.greeted())[1] == "old"
        assert await stays.ask("a") == "old a"
        await b.gateway.drained("new")


async def test_the_end_of_one_direction_is_passed_on_and_the_other_goes_on() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client, _ = await b.greeted()
        await client.stream.send_all(b"count\n")
        await client.stream.send_all(b"x" * 1_000_000)
        await client.stream.send_eof()
        assert await client.line() == "1000000"
        assert await client.line() == ""
        await b.gateway.drained("old")


async def test_a_client_that_does_not_read_slows_down_only_its_own_instance_s_sending() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        slow, _ = await b.greeted()
        await slow.stream.send_all(b"big200\n")
        passed = -1

        def stuck() -> bool:
            nonlocal passed
            before, passed = passed, b.gateway.snapshot(trio.current_time())["old"].bytes_out
            return before == passed > 1 << 16

        while not stuck():  # noqa: ASYNC110  # nothing moves for so long: it is held back
            await trio.sleep(0.3)
        assert passed < 100 << 20  # what sockets hold, not what was sent
        other, _ = await b.greeted()
        assert await other.ask("a") == "old a"
        total = 0
        while piece := await slow.stream.receive_some(1 << 20):
            total += len(piece)
        assert total == 200 << 20


async def test_who_connects_while_nobody_serves_waits_and_then_is_served_or_let_go() -> None:
    async with program("old") as old, bench(hold_s=0.3) as b:
        gone = await b.client()
        assert await gone.line() == ""
        assert b.gateway.refused == 1
        waiting = await b.client()
        b.attach(old)
        b.gateway.route({"old": 1.0})
        assert await waiting.line() == "hello from old"


async def test_new_connections_wait_for_one_that_is_out_of_reach_or_go_to_another_and_open_ones_stay() -> None:
    async with program("old") as old, program("new") as new, bench(hold_s=30.0) as b:
        b.attach(old, new)
        b.gateway.route({"old": 0.5, "new": 0.5})
        there = {name: client for client, name in [await b.greeted() for _ in range(4)]}
        b.gateway.reach("new", False)
        assert [(await b.greeted())[1] for _ in range(3)] == ["old"] * 3
        assert await there["new"].ask("still") == "new still"
        b.gateway.route({"new": 1.0})
        client = await b.client()
        with trio.move_on_after(0.05) as waited:
            await client.line()
        assert waited.cancelled_caught
        b.gateway.reach("new", True)
        assert await client.line() == "hello from new"
        b.gateway.lost("new")
        b.gateway.reach("new", True)
        assert b.gateway.snapshot(0.0)["old"].connections_total == 5
        b.gateway.route({"old": 1.0})
        assert (await b.greeted())[1] == "old"


async def test_kill_9_ends_its_connections_and_new_ones_reach_the_other() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        b.gateway.route({"new": 1.0})
        clients = [(await b.greeted())[0] for _ in range(3)]
        new.process.send_signal(signal.SIGKILL)
        await new.process.wait()
        b.gateway.lost("new")
        b.gateway.route({"old": 1.0})
        for client in clients:
            assert await client.line() == ""
        assert (await b.greeted())[1] == "old"


async def test_an_instance_that_takes_no_connection_is_an_error_and_the_client_reaches_the_next_that_does() -> None:
    async with program("old") as old, program("new") as new, bench() as b:
        b.attach(old, new)
        new.process.kill()
        await new.process.wait()
        b.gateway.route({"new": 1.0})
        client = await b.client()
        await until(lambda: b.gateway.snapshot(trio.current_time())["new"].errors)
        b.gateway.route({"old": 1.0})
        assert await client.line() == "hello from old"


async def test_a_reset_by_the_instance_is_an_error_and_one_by_the_client_is_not() -> None:
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        client, _ = await b.greeted()
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(client.stream)
        await b.gateway.drained("old")
        assert b.gateway.snapshot(trio.current_time())["old"].errors == 0
        client, _ = await b.greeted()
        await client.stream.send_all(b"reset\nand more that is never read")
        assert await client.line() == ""
        await b.gateway.drained("old")
        assert b.gateway.snapshot(trio.current_time())["old"].errors == 1


async def test_the_first_answer_after_a_rollback_is_one_on_a_new_connection() -> None:
    answers: list[float] = []
    async with program("old") as old, bench() as b:
        b.attach(old)
        b.gateway.route({"old": 1.0})
        before, _ = await b.greeted()
        b.gateway.on_answer("old", answers.append)
        assert await before.ask("a") == "old a"
        assert answers == []
        await b.greeted()
        assert len(answers) == 1


async def test_the_endpoint_s_scheme_picks_this_gateway_and_an_address_in_use_is_said_so() -> None:
    revision = RevisionConfig(command=["x"], probe=ProbeConfig(kind="tcp"))
    async with bench() as b, open_sockets() as sockets:
        config = AgentConfig(host="h", endpoint=b.gateway.endpoint, serve="r1", revisions={"r1": revision})
        gateway = open_gateway("beta", config, sockets)
        assert isinstance(gateway, StreamGateway)
        with pytest.raises(InUse):
            await gateway.run()
    with pytest.raises(ConfigError):
        await StreamGateway("beta", "stream://127.0.0.1").run()
