"""What the gateway costs: requests a second and latency through it, beside a client that asks the instance directly.

Prints JSON. Same instance script, same client, same run; the gateway, the instance and the client are three processes.
Run: python tests/benchmarks/bench_gateway.py [--seconds 3] [--clients 16]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import trio

from interlock.agents.gateway import ZmqGateway
from interlock.agents.latency import quantile
from interlock.broker.sockets import open_sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

ANY_PORT = "tcp://127.0.0.1:*"
BODY = json.dumps({"action": "echo", "text": "x" * 200}).encode()
WARM_UP_S = 0.3

# A REP program, as users have them, and a ROUTER loop, as class agents have inside.
INSTANCE = """
import sys, zmq
rep = sys.argv[1] == "rep"
socket = zmq.Context().socket(zmq.REP if rep else zmq.ROUTER)
print("tcp://127.0.0.1:%d" % socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
while True:
    socket.send_multipart(socket.recv_multipart())
"""


@contextmanager
def child(*command: str) -> Iterator[str]:
    """A process that prints its endpoint, ended with the block."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        out: IO[str] | None = process.stdout
        assert out is not None
        try:
            yield out.readline().strip()
        finally:
            process.kill()


async def serve(endpoint: str, window: int) -> None:
    """The gateway's process."""
    async with open_sockets() as sockets, trio.open_nursery() as nursery:
        gateway = ZmqGateway("bench", ANY_PORT, sockets)
        await nursery.start(gateway.run)
        gateway.attach("only", endpoint, window=window, idempotent=lambda _: False)
        gateway.route({"only": 1.0})
        print(gateway.endpoint, flush=True)


async def measure(endpoint: str, clients: int, seconds: float) -> dict[str, float]:
    """`clients` REQ sockets, each in a loop."""
    latencies: list[float] = []

    async with open_sockets() as sockets:

        async def loop() -> None:
            socket = sockets.open("req", connect=endpoint)
            while True:
                before = trio.current_time()
                await socket.send([BODY])
                await socket.receive()
                latencies.append(trio.current_time() - before)

        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(loop)
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


def compare(kind: str, window: int, clients: int, seconds: float) -> dict[str, Any]:
    with child("-c", INSTANCE, kind) as instance, child(__file__, "--serve", instance, str(window)) as gateway:
        rounds = []
        for _ in range(3):  # taken in turns, so that a disturbance meets both; the middle one counts
            rounds.append(
                {
                    "direct": trio.run(measure, instance, clients, seconds / 3),
                    "gateway": trio.run(measure, gateway, clients, seconds / 3),
                }
            )
    middle = sorted(rounds, key=lambda r: r["gateway"]["requests_per_s"] / r["direct"]["requests_per_s"])[1]
    direct, through = middle["direct"], middle["gateway"]
    return {
        "instance": kind,
        "window": window,
        "clients": clients,
        **middle,
        "ratio": round(through["requests_per_s"] / direct["requests_per_s"], 3),
        "added_p50_ms": round(through["p50_ms"] - direct["p50_ms"], 3),
        "added_p99_ms": round(through["p99_ms"] - direct["p99_ms"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--clients", type=int, default=16, help="of the concurrent measurement")
    parser.add_argument("--serve", nargs=2, metavar=("ENDPOINT", "WINDOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, options.serve[0], int(options.serve[1]))
        return
    cases = [("rep", 1, 1), ("rep", 1, options.clients), ("router", 64, 1), ("router", 64, options.clients)]
    report = {
        "benchmark": "gateway",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load1": os.getloadavg()[0],
        "request_bytes": len(BODY),
        "results": [compare(*case, options.seconds) for case in cases],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
