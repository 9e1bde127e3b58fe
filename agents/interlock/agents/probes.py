"""Is a program well that knows nothing of Interlock? Asked over ZeroMQ, HTTP or TCP, or by a script.

A probe never raises for what the program does: a refused connection, garbage or silence is a failed check, with the
reason in `Health.detail`. Each ends at its deadline and leaves no socket and no process behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
import trio

from interlock.agents.instance import Health
from interlock.broker.config import ProbeConfig
from interlock.broker.errors import ConfigError
from interlock.broker.sockets import Sockets

if TYPE_CHECKING:
    import h11

MAX_BODY = 1 << 20  # bytes of an HTTP answer that are read; a health page is smaller
MAX_OUTPUT = 4096  # bytes of a script's output kept for the report: its last line says why
CHUNK = 16384
OUTPUT_GRACE_S = 0.1  # for the rest of a script's output; whoever left its group may hold the pipe open for ever


class _Failed(Exception):
    """The check failed; the text is for the operator."""


async def probe(
    config: ProbeConfig,
    *,
    request_endpoint: str,
    health_endpoint: str,
    sockets: Sockets,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Health:
    """One check. `config.port` picks the endpoint; a script runs in `cwd` with `env` added to the environment, and
    {port} and {health_port} in its command are filled in. ConfigError for an endpoint that no such probe can use.
    """
    endpoint = request_endpoint if config.port == "request" else health_endpoint
    checks: dict[str, Callable[[], Awaitable[None]]] = {
        "zmq": lambda: _ask_zmq(config, endpoint, sockets),
        "http": lambda: _get_http(config, endpoint),
        "tcp": lambda: _connect_tcp(endpoint),
        "script": lambda: _run_script(fill_ports(config.command, request_endpoint, health_endpoint), cwd, env),
    }
    start = trio.current_time()
    ok, detail = True, ""
    try:
        with trio.fail_after(config.timeout_s):
            await checks[config.kind]()
    except trio.TooSlowError:
        ok, detail = False, f"no answer within {config.timeout_s:g} s"
    except (_Failed, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        ok, detail = False, str(error) or type(error).__name__
    return Health(ok, detail, trio.current_time() - start)


def fill_ports(command: list[str], request_endpoint: str, health_endpoint: str) -> list[str]:
    """{port} and {health_port} become the ports (for ipc the paths) of the two endpoints."""
    ports = {"{port}": _last_part(request_endpoint), "{health_port}": _last_part(health_endpoint)}
    filled = list(command)
    for name, value in ports.items():
        filled = [word.replace(name, value) for word in filled]
    return filled


def _last_part(endpoint: str) -> str:
    scheme, _, place = endpoint.partition("://")
    return place if scheme == "ipc" else place.rpartition(":")[2]


def mismatches(expect: Mapping[str, Any], answer: Mapping[str, Any], *, path: str = "") -> list[str]:
    """What of `expect` the answer doesn't hold, one line each. A map in a map is compared by its own keys."""
    found: list[str] = []
    for key, wanted in expect.items():
        if key not in answer:
            found.append(f"{path}{key} is missing")
        elif isinstance(wanted, dict) and isinstance(answer[key], dict):
            found += mismatches(wanted, answer[key], path=f"{path}{key}.")
        elif answer[key] != wanted or isinstance(answer[key], bool) != isinstance(wanted, bool):
            found.append(f"{path}{key} is {str(answer[key])[:100]!r}, expected {str(wanted)[:100]!r}")
    return found


def judge(config: ProbeConfig, body: bytes) -> None:
    """_Failed if the answer lacks something expected, or says {"status": "error"} where no status is expected.

    Where nothing is expected, an answer that is neither JSON nor MessagePack is an answer too.
    """
    try:
        answer = decode_answer(body)
    except ValueError as error:
        if config.expect:
            raise _Failed(f"the answer is no JSON object or MessagePack map: {error}") from None
        return
    wrong = mismatches(config.expect, answer)
    if wrong:
        raise _Failed("; ".join(wrong))
    if answer.get("status") == "error" and "status" not in config.expect:
        raise _Failed(f"the answer is an error: {str(answer.get('error', answer))[:500]}")


def decode_answer(body: bytes) -> dict[str, Any]:
    """The JSON object or MessagePack map; ValueError if it is neither."""
    try:
        if body.lstrip()[:1] == b"{":
            return msgspec.json.decode(body, type=dict[str, Any])
        return msgspec.msgpack.decode(body, type=dict[str, Any])
    except RecursionError:
        raise ValueError("nested too deeply") from None


# --- the four kinds


async def _ask_zmq(config: ProbeConfig, endpoint: str, sockets: Sockets) -> None:
    if not endpoint.startswith(("tcp://", "ipc://")):
        raise ConfigError("a zmq probe needs a tcp:// or ipc:// endpoint", where=endpoint)
    socket = sockets.open("req", connect=endpoint, starting=True, label=f"probe {endpoint}")
    try:
        await socket.send([msgspec.json.encode(config.request)])
        judge(config, b"".join(await socket.receive()))
    finally:
        socket.close(linger_ms=0)


async def _get_http(config: ProbeConfig, endpoint: str) -> None:
    import h11  # not every host asks over HTTP, and its start is waited for

    place = urlsplit(endpoint)
    async with await _open(endpoint) as stream:
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", place.netloc or "localhost"), ("Accept", "application/json, */*"), ("Connection", "close")]
        try:
            request = h11.Request(method="GET", target=config.path, headers=headers)
            await stream.send_all((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
            status, body = await _read_answer(connection, stream, want_body=bool(config.expect))
        except h11.ProtocolError as error:
            raise _Failed(f"no HTTP answer: {error}") from None
    if status >= 400:
        raise _Failed(f"GET {config.path} answered {status}")
    if config.expect:
        judge(config, body)


async def _read_answer(connection: h11.Connection, stream: trio.abc.Stream, *, want_body: bool) -> tuple[int, bytes]:
    import h11

    status = 0
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(CHUNK)))
        elif isinstance(event, h11.Response):
            status = event.status_code
            if not want_body:
                return status, body
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
            if len(body) > MAX_BODY:
                raise _Failed(f"the answer has more than {MAX_BODY} bytes")
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            return status, body


async def _connect_tcp(endpoint: str) -> None:
    async with await _open(endpoint):
        pass


async def _open(endpoint: str) -> trio.abc.Stream:
    if endpoint.startswith("ipc://"):
        return await trio.open_unix_socket(endpoint.removeprefix("ipc://"))
    place = urlsplit(endpoint)
    if place.hostname is None or place.port is None:
        raise ConfigError("no address and port to connect to", where=endpoint)
    return await trio.open_tcp_stream(place.hostname, place.port)


async def _run_script(command: list[str], cwd: Path | None, env: Mapping[str, str] | None) -> None:
    """In a process group of its own, which is killed whole when the script ends, is late, or the probe is cancelled."""
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    tail = bytearray()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_tail, process.stdout, tail)
            await _ended(process.pid)
            # not reaped yet, so the group's number is still its own
            _kill_group(process.pid)
            nursery.cancel_scope.deadline = trio.current_time() + OUTPUT_GRACE_S
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                _kill_group(process.pid)
            await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()
    if process.returncode != 0:
        lines = tail.decode("utf-8", "replace").strip().splitlines()
        raise _Failed(f"{command[0]} exited with {process.returncode}" + (f": {lines[-1]}" if lines else ""))


async def _ended(pid: int) -> None:
    """Waits for the end of a child without reaping it."""
    descriptor = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


async def _keep_tail(stream: trio.abc.ReceiveStream | None, tail: bytearray) -> None:
    with contextlib.suppress(trio.BrokenResourceError):  # what was read until then is the tail
        while stream is not None and (chunk := await stream.receive_some(CHUNK)):
            tail += chunk
            del tail[:-MAX_OUTPUT]
