"""Probes against real programs: ones that are well, sick, silent, and gone."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from interlock.agents.instance import Health
from interlock.agents.probes import decode_answer, fill_ports, mismatches, probe
from interlock.broker.config import ProbeConfig
from interlock.broker.errors import ConfigError
from interlock.broker.sockets import Sockets, open_sockets

NOWHERE = "tcp://127.0.0.1:1"


@pytest.fixture
async def sockets() -> AsyncIterator[Sockets]:
    async with open_sockets() as opened:
        yield opened


async def check(sockets: Sockets, endpoint: str, **config: Any) -> Health:
    config.setdefault("timeout_s", 10.0)
    with trio.fail_after(20):
        return await probe(ProbeConfig(**config), request_endpoint=NOWHERE, health_endpoint=endpoint, sockets=sockets)


def serve_rep(sockets: Sockets, nursery: trio.Nursery, answer: Callable[[dict[str, Any]], bytes]) -> str:
    rep = sockets.open("rep", bind="tcp://127.0.0.1:*")

    async def serve() -> None:
        while True:
            await rep.send([answer(json.loads((await rep.receive())[0]))])

    nursery.start_soon(serve)
    return rep.endpoint


async def serve_tcp(nursery: trio.Nursery, handle: Callable[[trio.SocketStream], Awaitable[None]]) -> str:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            await handle(stream)
        except trio.BrokenResourceError:  # the probe left before the answer was out
            return
        finally:
            await trio.aclose_forcefully(stream)

    nursery.start_soon(trio.serve_listeners, guarded, [listener])
    return f"127.0.0.1:{listener.socket.getsockname()[1]}"


def http(response: bytes) -> Callable[[trio.SocketStream], Awaitable[None]]:
    async def handle(stream: trio.SocketStream) -> None:
        while not bytes(await stream.receive_some(4096)).endswith(b"\r\n\r\n"):
            pass
        await stream.send_all(response)

    return handle


# --- zmq


@pytest.mark.parametrize("encode", [lambda value: json.dumps(value).encode(), msgpack.packb])
async def test_a_zmq_probe_compares_what_is_expected(
    sockets: Sockets, nursery: trio.Nursery, encode: Callable[[Any], bytes]
) -> None:
    endpoint = serve_rep(
        sockets, nursery, lambda asked: encode({"asked": asked, "ready": True, "load": {"q": 2, "r": 3}})
    )
    health = await check(sockets, endpoint, kind="zmq", request={"op": "up?"}, expect={"asked": {"op": "up?"}})
    assert health.ok, health.detail
    assert health.latency_s > 0
    assert (await check(sockets, endpoint, kind="zmq", expect={"ready": True, "load": {"q": 2}})).ok
    health = await check(sockets, endpoint, kind="zmq", expect={"ready": False, "load": {"q": 4}, "extra": 1})
    assert not health.ok
    assert health.detail == "ready is 'True', expected 'False'; load.q is '2', expected '4'; extra is missing"


async def test_a_zmq_answer_that_says_error_fails_unless_expected(sockets: Sockets, nursery: trio.Nursery) -> None:
    endpoint = serve_rep(sockets, nursery, lambda _: b'{"status": "error", "error": {"code": "unhealthy"}}')
    health = await check(sockets, endpoint, kind="zmq")
    assert not health.ok
    assert "unhealthy" in health.detail
    assert (await check(sockets, endpoint, kind="zmq", expect={"status": "error"})).ok


async def test_a_plain_zmq_answer_will_do_where_nothing_is_expected(sockets: Sockets, nursery: trio.Nursery) -> None:
    endpoint = serve_rep(sockets, nursery, lambda _: b"OK")
    assert (await check(sockets, endpoint, kind="zmq")).ok
    health = await check(sockets, endpoint, kind="zmq", expect={"a": 1})
    assert "no JSON object or MessagePack map" in health.detail


async def test_silence_on_zmq_ends_at_the_deadline_and_leaves_no_socket(sockets: Sockets) -> None:
    silent = sockets.open("router", bind="tcp://127.0.0.1:*")
    for _ in range(3):
        health = await check(sockets, silent.endpoint, kind="zmq", timeout_s=0.1)
        assert (health.ok, health.detail) == (False, "no answer within 0.1 s")
    assert not (await check(sockets, NOWHERE, kind="zmq", timeout_s=0.1)).ok
    assert [one for one in sockets._open if not one.closed] == [silent]


async def test_the_request_port_is_probed_where_the_config_says_so(sockets: Sockets, nursery: trio.Nursery) -> None:
    endpoint = serve_rep(sockets, nursery, lambda _: b"{}")
    config = ProbeConfig(kind="zmq", port="request", timeout_s=10.0)
    assert (await probe(config, request_endpoint=endpoint, health_endpoint=NOWHERE, sockets=sockets)).ok


# --- http


@pytest.mark.parametrize(
    ("response", "ok", "detail"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", True, ""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True, ""),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", True, ""),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", False, "GET /health answered 503"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", False, "no HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n", False, "no HTTP answer"),
        (b"HTTP/1.1 2", False, "no HTTP answer"),
        (b"", False, "no HTTP answer"),
    ],
)
async def test_an_http_probe_takes_a_status_below_400(
    sockets: Sockets, nursery: trio.Nursery, response: bytes, ok: bool, detail: str
) -> None:
    place = await serve_tcp(nursery, http(response))
    for scheme in ("http", "tcp"):
        health = await check(sockets, f"{scheme}://{place}", kind="http")
        assert health.ok is ok, health.detail
        assert health.detail.startswith(detail)


async def test_an_http_probe_compares_a_json_body(sockets: Sockets, nursery: trio.Nursery) -> None:
    chunked = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n3\r\n 1}\r\n0\r\n\r\n'
    endpoint = "http://" + await serve_tcp(nursery, http(chunked))
    assert (await check(sockets, endpoint, kind="http", expect={"a": 1})).ok
    health = await check(sockets, endpoint, kind="http", expect={"a": 2})
    assert health.detail == "a is '1', expected '2'"
    page = "http://" + await serve_tcp(nursery, http(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"))
    assert not (await check(sockets, page, kind="http", expect={"a": 2})).ok
    huge = "http://" + await serve_tcp(nursery, http(b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 2_000_000))
    assert "more than" in (await check(sockets, huge, kind="http", expect={"a": 2})).detail


async def test_an_http_server_that_never_ends_its_answer_fails_at_the_deadline(
    sockets: Sockets, nursery: trio.Nursery
) -> None:
    async def drip(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True:
            await stream.send_all(b"x")
            await trio.sleep(0.01)

    endpoint = "http://" + await serve_tcp(nursery, drip)
    health = await check(sockets, endpoint, kind="http", timeout_s=0.2)
    assert not health.ok


async def test_an_http_path_that_is_none_is_a_failed_check(sockets: Sockets, nursery: trio.Nursery) -> None:
    endpoint = "http://" + await serve_tcp(nursery, http(b""))
    assert not (await check(sockets, endpoint, kind="http", path="/a b\r\nX: y")).ok


# --- tcp


async def test_a_tcp_probe_is_satisfied_by_an_accepted_connection(sockets: Sockets, nursery: trio.Nursery) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)

    place = await serve_tcp(nursery, handle)
    assert (await check(sockets, f"tcp://{place}", kind="tcp")).ok
    assert (await check(sockets, f"http://{place}", kind="tcp")).ok


async def test_a_refused_connection_is_a_failed_check(sockets: Sockets) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        for kind in ("tcp", "http"):
            health = await check(sockets, endpoint, kind=kind)
            assert not health.ok
            assert health.detail


async def test_an_endpoint_that_a_probe_can_not_use_is_a_config_error(sockets: Sockets) -> None:
    with pytest.raises(ConfigError, match="a zmq probe needs"):
        await check(sockets, "http://127.0.0.1:80", kind="zmq")
    with pytest.raises(ConfigError, match="no address and port"):
        await check(sockets, "tcp://127.0.0.1", kind="tcp")


# --- script


async def test_a_script_probe_is_its_exit_code(sockets: Sockets, tmp_path: Path) -> None:
    assert (await check(sockets, NOWHERE, kind="script", command=["true"])).ok
    health = await check(sockets, NOWHERE, kind="script", command=["sh", "-c", "echo first; echo no model >&2; exit 3"])
    assert (health.ok, health.detail) == (False, "sh exited with 3: no model")
    health = await check(sockets, NOWHERE, kind="script", command=[str(tmp_path / "missing")])
    assert not health.ok
    assert "missing" in health.detail
    health = await check(sockets, NOWHERE, kind="script", command=["sh", "-c", "head -c 2000000 /dev/zero; exit 1"])
    assert health.detail.startswith("sh exited with 1")


async def test_a_script_runs_in_its_folder_with_its_environment_and_ports(sockets: Sockets, tmp_path: Path) -> None:
    config = ProbeConfig(
        kind="script",
        command=["sh", "-c", 'test "$PWD $WORD $1" = "$2 w 12/13"', "-", "{port}/{health_port}", str(tmp_path)],
    )
    health = await probe(
        config,
        request_endpoint="http://127.0.0.1:12",
        health_endpoint="tcp://127.0.0.1:13",
        sockets=sockets,
        cwd=tmp_path,
        env={"WORD": "w"},
    )
    assert health.ok, health.detail


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(pid: int) -> None:
    with trio.fail_after(20):
        while alive(pid):  # noqa: ASYNC110  # only looking tells
            await trio.sleep(0.01)


SPAWNER = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
with open("pids.new", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename("pids.new", "pids")
time.sleep(float(sys.argv[1]))
"""


async def test_a_late_script_is_killed_with_its_children(sockets: Sockets, tmp_path: Path) -> None:
    config = ProbeConfig(kind="script", command=[sys.executable, "-c", SPAWNER, "60"], timeout_s=60)
    pids: list[int] = []
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await probe(config, request_endpoint=NOWHERE, health_endpoint=NOWHERE, sockets=sockets, cwd=tmp_path)

        nursery.start_soon(run)
        with trio.fail_after(20):
            while not (tmp_path / "pids").exists():  # noqa: ASYNC110  # only looking tells
                await trio.sleep(0.01)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        nursery.cancel_scope.cancel()
    for pid in pids:
        await gone(pid)
    health = await check(sockets, NOWHERE, kind="script", command=["sleep", "60"], timeout_s=0.1)
    assert (health.ok, health.detail) == (False, "no answer within 0.1 s")


async def test_children_that_a_script_leaves_behind_end_with_it(sockets: Sockets, tmp_path: Path) -> None:
    config = ProbeConfig(kind="script", command=[sys.executable, "-c", SPAWNER, "0"], timeout_s=20)
    health = await probe(config, request_endpoint=NOWHERE, health_endpoint=NOWHERE, sockets=sockets, cwd=tmp_path)
    assert health.ok, health.detail
    for pid in (tmp_path / "pids").read_text().split():
        await gone(int(pid))


async def test_a_child_that_left_the_group_does_not_hold_the_probe(sockets: Sockets, tmp_path: Path) -> None:
    source = SPAWNER.replace('["sleep", "60"]', '["sleep", "60"], start_new_session=True')
    config = ProbeConfig(kind="script", command=[sys.executable, "-c", source, "0"], timeout_s=20)
    health = await probe(config, request_endpoint=NOWHERE, health_endpoint=NOWHERE, sockets=sockets, cwd=tmp_path)
    assert health.ok, health.detail
    os.kill(int((tmp_path / "pids").read_text().split()[1]), 9)


# --- the pure parts


def test_booleans_are_not_numbers_to_a_probe() -> None:
    assert mismatches({"a": 1}, {"a": True}) == ["a is 'True', expected '1'"]
    assert mismatches({"a": 1}, {"a": 1.0}) == []
    assert mismatches({"a": {}}, {"a": 3}) == ["a is '3', expected '{}'"]


def test_ports_are_filled_in() -> None:
    assert fill_ports(["x{port}", "{health_port}", "{other}"], "tcp://[::1]:5", "ipc:///tmp/s") == [
        "x5",
        "/tmp/s",
        "{other}",
    ]


def test_an_answer_is_json_or_messagepack_or_none() -> None:
    assert decode_answer(b' {"a": 1}') == decode_answer(msgpack.packb({"a": 1})) == {"a": 1}
    for body in (b"", b"[]", b"{", b"\x81", b"\x81\xa1a" * 50_000, b'{"a":' * 50_000):
        with pytest.raises(ValueError, match=r"."):
            decode_answer(body)
