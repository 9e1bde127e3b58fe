"""What our telemetry plane costs: batches through it against the same batches through a bare `zmq.proxy`.

Run: python tests/benchmarks/bench_telemetry.py [--batches N]; prints one JSON object. Publisher and subscriber are
plain zmq sockets in processes of their own, the same for both, so that the difference is what is in between.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import trio
import zmq

from interlock.broker.config import BrokerConfig
from interlock.broker.samples import SeriesTable, labels
from interlock.broker.telemetry_plane import serve_telemetry

SAMPLES = 100  # a batch: what a host with 8 GPUs and a dozen agents sends at once
TOPIC = b"telemetry/bench/monitor/"
WINDOW = 500  # batches under way at once in the throughput run: below every limit, so that nothing is dropped
RATE = 500  # batches a second in the latency run: 50 hosts at 10 Hz
LATENCY_S = 6.0

Serve = Callable[[str, str, Connection], None]


def serve_ours(ingress: str, egress: str, up: Connection) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_telemetry, BrokerConfig(telemetry_in=ingress, telemetry_out=egress))
            up.send("up")

    trio.run(main)


def serve_proxy(ingress: str, egress: str, up: Connection) -> None:
    """The least that does the same: no trio, no decoding, libzmq's own loop. PULL takes the DEALER's place."""
    context = zmq.Context()
    pull, xpub = context.socket(zmq.PULL), context.socket(zmq.XPUB)
    pull.bind(ingress)
    xpub.bind(egress)
    up.send("up")
    zmq.proxy(pull, xpub)


FIRST = (
    1 << 20
)  # of the batches' numbers: MessagePack gives them four bytes from here on, which are counted up in place


def frames() -> bytes:
    table = SeriesTable("bench/monitor", 1)
    samples = {labels(f"agent_metric_{n % 20}", host="bench", agent=f"agent-{n // 20}"): n / 7 for n in range(SAMPLES)}
    for n in range(5):  # beyond the announcements: what is sent most of the time
        batch = table.batch(samples, time=1000.0 + n / 10)
    return msgspec.msgpack.encode(msgspec.structs.replace(batch, seq=FIRST))


def publish(kind: int, ingress: str, orders: Connection) -> None:
    """Send batches as ordered: (count, per second or None). The topic ends with the time of sending."""
    context = zmq.Context()
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(ingress)
    body = bytearray(frames())
    place = body.index(struct.pack(">BI", 0xCE, FIRST)) + 1
    number = FIRST
    while (order := orders.recv()) is not None:
        count, rate = order
        began = time.monotonic()
        for n in range(count):
            if rate:
                while (left := began + n / rate - time.monotonic()) > 0:
                    time.sleep(left)
            number += 1
            struct.pack_into(">I", body, place, number)
            stamp = struct.pack(">d", time.monotonic()).hex().encode()
            socket.send_multipart([TOPIC + stamp + b"/", bytes(body)])
    context.destroy(linger=0)


def measure(serve: Serve, kind: int, batches: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="il-") as folder:
        ingress, egress = f"ipc://{folder}/in", f"ipc://{folder}/out"
        spawn = multiprocessing.get_context("spawn")
        up, said = spawn.Pipe()
        orders, taken = spawn.Pipe()
        server = spawn.Process(target=serve, args=(ingress, egress, said), daemon=True)
        sender = spawn.Process(target=publish, args=(kind, ingress, taken), daemon=True)
        server.start()
        sender.start()
        up.recv()
        context = zmq.Context()
        sub = context.socket(zmq.SUB)
        sub.setsockopt(zmq.RCVHWM, 0)
        sub.setsockopt(zmq.RCVTIMEO, 200)
        sub.connect(egress)
        sub.subscribe(TOPIC)
        try:
            join(sub, orders)
            return {**throughput(sub, orders, batches), **latency(sub, orders)}
        finally:
            orders.send(None)
            context.destroy(linger=0)
            sender.join(5)
            server.terminate()
            server.join(5)


def join(sub: zmq.Socket[bytes], orders: Connection) -> None:
    """Wait until the subscription is in force, and everything that was sent meanwhile has come."""
    seen = False
    for _ in range(100):
        orders.send((1, None))
        try:
            while True:
                sub.recv_multipart()
                seen = True
        except zmq.Again:
            if seen:
                return
    raise SystemExit("nothing arrives")


def throughput(sub: zmq.Socket[bytes], orders: Connection, batches: int) -> dict[str, float]:
    began = time.monotonic()
    asked = got = 0
    while got < batches:
        while asked < batches and asked - got <= WINDOW - 100:
            orders.send((100, None))
            asked += 100
        sub.recv_multipart()
        got += 1
    return {"batches_per_s": round(batches / (time.monotonic() - began))}


def latency(sub: zmq.Socket[bytes], orders: Connection) -> dict[str, float]:
    count = int(RATE * LATENCY_S)
    orders.send((count, RATE))
    took = []
    for _ in range(count):
        topic = sub.recv_multipart()[0]
        sent = struct.unpack(">d", bytes.fromhex(topic[len(TOPIC) : -1].decode()))[0]
        took.append((time.monotonic() - sent) * 1e3)
    cuts = statistics.quantiles(took, n=100)
    return {"p50_ms": round(cuts[49], 3), "p99_ms": round(cuts[98], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=20_000)
    options = parser.parse_args()
    ours = measure(serve_ours, zmq.DEALER, options.batches)
    proxy = measure(serve_proxy, zmq.PUSH, options.batches)
    report: dict[str, Any] = {
        "benchmark": Path(__file__).stem,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        "samples_per_batch": SAMPLES,
        "batch_bytes": len(frames()),
        "latency_at_batches_per_s": RATE,
        "ours": ours,
        "zmq_proxy": proxy,
        "ours_of_proxy": round(ours["batches_per_s"] / proxy["batches_per_s"], 3),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
