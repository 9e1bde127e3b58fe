"""What the gateway costs: requests a second and latency through it, beside a client that asks the instance directly.

    python tests/benchmarks/bench_gateway.py [--seconds 3] [--clients 16]

ZeroMQ and HTTP; plain, split (half of the requests to a second instance) and mirrored (all of them to it as well, and
the answers compared). Same instance program, same client, same run; gateway, instances and client are processes of
their own. HTTP also through nginx, where it is installed (apt-get install nginx-light): one worker, with kept-alive
connections to the instances, `split` over two of them, `mirror` without a comparison. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import trio

from interlock.agents.gateway import ZmqGateway
from interlock.agents.http_gateway import HttpGateway
from interlock.agents.latency import quantile
from interlock.broker.config import CompareConfig
from interlock.broker.sockets import open_sockets

MODES = ("plain", "split", "mirrored")
BODY = json.dumps({"action": "echo", "text": "x" * 200}).encode()
REQUEST = b"PUT /echo HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
WARM_UP_S = 0.3
ROUNDS = 3  # taken in turns, so that a disturbance meets all; the middle one counts
PLAYING_S = 10.0  # for nginx to listen

# A REP program, as users have them; a ROUTER loop, as class agents have inside; an HTTP server that keeps connections.
ZMQ_INSTANCE = """
import sys, zmq
rep = sys.argv[1] == "rep"
socket = zmq.Context().socket(zmq.REP if rep else zmq.ROUTER)
print("tcp://127.0.0.1:%d" % socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
while True:
    socket.send_multipart(socket.recv_multipart())
"""
HTTP_INSTANCE = """
import asyncio

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.rest = transport, b""

    def data_received(self, data):
        self.rest += data
        while (end := self.rest.find(b"\\r\\n\\r\\n") + 4) > 3:
            head = self.rest[:end].lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\\r\\n")[0] or 0)
            if len(self.rest) < end + length:
                return
            body, self.rest = self.rest[end:end + length], self.rest[end + length:]
            self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))

async def main():
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
    print("http://127.0.0.1:%d" % server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

NGINX = """
daemon off; worker_processes 1; error_log stderr crit; pid {folder}/pid;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; keepalive_requests 100000000;
  upstream live {{ {live} keepalive 64; keepalive_requests 100000000; }}
  upstream second {{ server {second}; keepalive 64; keepalive_requests 100000000; }}
  proxy_http_version 1.1; proxy_set_header Connection "";
  server {{
    listen 127.0.0.1:{port};
    location / {{ {mirror} proxy_pass http://live; }}
    location = /copy {{ internal; proxy_pass http://second/echo; }}
  }}
}}
"""


@contextmanager
def child(*command: str) -> Iterator[str]:
    """A Python process that prints its endpoint, ended with the block."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        out: IO[str] | None = process.stdout
        assert out is not None
        try:
            yield out.readline().strip()
        finally:
            process.kill()


def instance(kind: str) -> Any:
    return child("-c", HTTP_INSTANCE) if kind == "http" else child("-c", ZMQ_INSTANCE, kind)


@contextmanager
def nginx(mode: str, first: str, second: str) -> Iterator[str]:
    one, other = (endpoint.removeprefix("http://") for endpoint in (first, second))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="interlock-bench-") as folder:
        live = f"server {one};" + (f" server {other};" if mode == "split" else "")
        mirror = "mirror /copy; mirror_request_body on;" if mode == "mirrored" else ""
        config = NGINX.format(folder=folder, live=live, second=other, port=port, mirror=mirror)
        (Path(folder) / "nginx.conf").write_text(config)
        argv = ["nginx", "-p", folder, "-c", f"{folder}/nginx.conf", "-e", "stderr", "-g", user()]
        with subprocess.Popen(argv) as process:
            try:
                until_listening(port)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()


def user() -> str:
    return "user root;" if os.geteuid() == 0 else ""


def until_listening(port: int) -> None:
    deadline = time.monotonic() + PLAYING_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


# --- the gateway's process


async def serve(kind: str, mode: str, window: int, endpoints: list[str]) -> None:
    async with open_sockets() as sockets, trio.open_nursery() as nursery:
        gateway: Any
        if kind == "http":
            gateway = HttpGateway("bench", "http://127.0.0.1:0")
        else:
            gateway = ZmqGateway("bench", "tcp://127.0.0.1:*", sockets)
        await nursery.start(gateway.run)
        for name, endpoint in zip(("old", "new"), endpoints, strict=True):
            gateway.attach(name, endpoint, window=window, idempotent=lambda _: True)
        gateway.route({"old": 0.5, "new": 0.5} if mode == "split" else {"old": 1.0})
        if mode == "mirrored":
            gateway.mirror("new", compare=CompareConfig(), on_pair=lambda _: None)
        print(gateway.endpoint, flush=True)


# --- the client's process: this one


async def ask_zmq(endpoint: str, sockets: Any, took: Callable[[float], None]) -> None:
    sock = sockets.open("req", connect=endpoint)
    while True:
        before = trio.current_time()
        await sock.send([BODY])
        await sock.receive()
        took(trio.current_time() - before)


async def ask_http(endpoint: str, took: Callable[[float], None]) -> None:
    host, _, port = endpoint.removeprefix("http://").partition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        rest = b""
        while True:
            before = trio.current_time()
            await stream.send_all(REQUEST)
            while (end := rest.find(b"\r\n\r\n") + 4) < 4 or len(rest) < end + len(BODY):
                chunk = await stream.receive_some()
                if not chunk:
                    raise SystemExit(f"{endpoint} closed the connection: {rest!r}")
                rest += chunk
            if not rest.startswith(b"HTTP/1.1 200") or rest[end:] != BODY:
                raise SystemExit(f"{endpoint} answered {rest!r}")
            rest = b""
            took(trio.current_time() - before)


async def measure(endpoint: str, clients: int, seconds: float) -> dict[str, float]:
    """`clients` of them, each in a loop."""
    latencies: list[float] = []
    async with open_sockets() as sockets, trio.open_nursery() as nursery:
        for _ in range(clients):
            if endpoint.startswith("http"):
                nursery.start_soon(ask_http, endpoint, latencies.append)
            else:
                nursery.start_soon(ask_zmq, endpoint, sockets, latencies.append)
        await trio.sleep(WARM_UP_S)
        latencies.clear()
        began = trio.current_time()
        await trio.sleep(seconds)
        took = trio.current_time() - began
        ordered = sorted(latencies)
        nursery.cancel_scope.cancel()
    return {
        "requests_per_s": round(len(ordered) / took),
        "p50_ms": round(quantile(ordered, 0.5) * 1e3, 3),
        "p99_ms": round(quantile(ordered, 0.99) * 1e3, 3),
    }


def compare(kind: str, mode: str, window: int, clients: int, seconds: float) -> dict[str, Any]:
    with ExitStack() as stack:
        first, second = (stack.enter_context(instance(kind)) for _ in range(2))
        ways = {"direct": first}
        ways["gateway"] = stack.enter_context(child(__file__, "--serve", kind, mode, str(window), first, second))
        if kind == "http" and shutil.which("nginx"):
            ways["nginx"] = stack.enter_context(nginx(mode, first, second))
        rounds = [
            {way: trio.run(measure, endpoint, clients, seconds / ROUNDS) for way, endpoint in ways.items()}
            for _ in range(ROUNDS)
        ]
    middle = sorted(rounds, key=lambda r: r["gateway"]["requests_per_s"] / r["direct"]["requests_per_s"])[ROUNDS // 2]
    direct = middle["direct"]
    return {
        "instance": kind, "mode": mode, "window": window, "clients": clients, **middle,
        "added": {
            way: {
                "ratio": round(middle[way]["requests_per_s"] / direct["requests_per_s"], 3),
                "p50_ms": round(middle[way]["p50_ms"] - direct["p50_ms"], 3),
                "p99_ms": round(middle[way]["p99_ms"] - direct["p99_ms"], 3),
            }
            for way in ways if way != "direct"
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--clients", type=int, default=16, help="of the concurrent measurement")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        kind, mode, window, *endpoints = options.serve
        trio.run(serve, kind, mode, int(window), endpoints)
        return
    kinds = [("rep", 1), ("router", 64), ("http", 64)]
    report = {
        "benchmark": "gateway",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load1": os.getloadavg()[0],
        "request_bytes": len(BODY),
        "nginx": "beside it" if shutil.which("nginx") else "not installed",
        "results": [
            compare(kind, mode, window, clients, options.seconds)
            for kind, window in kinds
            for mode in MODES
            for clients in (1, options.clients)
        ],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
