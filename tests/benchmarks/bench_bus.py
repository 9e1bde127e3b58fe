"""Telemetry through our authorising broker, beside a bare `zmq.proxy` and the usual brokers where they are installed.

Run: python tests/benchmarks/bench_bus.py [--batches N] [--quick]; prints one JSON object. All carry the same bytes,
over TCP on the loopback, from one publisher process to one subscriber: first batches of 100 samples, then one sample of
100 bytes a message. nats-server, redis-server
and mosquitto are spoken to in their own protocols over plain sockets, with records of known length: less work than any
client library for them does. None of them encrypts or authorises here; "interlock" does both (CURVE, one key a role).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio
import zmq
import zmq.utils.z85
from rig import aim

from interlock.broker.config import BrokerConfig, FleetConfig
from interlock.broker.keyring import Keyring
from interlock.broker.samples import SeriesTable, labels
from interlock.broker.security import Security, load_security
from interlock.broker.telemetry_plane import serve_telemetry

SAMPLES = 100  # a batch: what a host with 8 GPUs and a dozen agents sends at once
WINDOW = 500  # batches under way at once in the throughput run: below every limit, so that nothing is dropped
STEP = 100  # batches of one order to the publisher
RATE = 500  # batches a second in the latency run: 50 hosts at 10 Hz
LATENCY_S = 4.0
PATIENCE_S = 5.0  # without a message for so long, some were dropped
FIRST = 1 << 20  # of the batches' numbers: MessagePack gives them four bytes from here on
TOPIC = b"telemetry/bench/monitor/"
SUBJECT = b"telemetry.bench.monitor"


def body(samples: int) -> bytes:
    """A batch, without what may be left out; beyond the announcements, as most are."""
    table = SeriesTable("bench/monitor", 1_760_000_000_000_000_000)
    values = {labels(f"agent_metric_{n % 20}", host="bench", agent=f"agent-{n // 20}"): n / 7 for n in range(samples)}
    for n in range(5):
        batch = table.batch(values, time=1000.0 + n / 10)
    fields = msgspec.structs.asdict(msgspec.structs.replace(batch, seq=FIRST, time=1.5))
    return msgspec.msgpack.encode({key: fields[key] for key in fields if key not in ("whole", "delay", "cached")})


BODIES = {"batches": body(SAMPLES), "messages": body(1)}


def places(data: bytes) -> tuple[int, int]:
    """Where the number and the time of sending stand in the bytes."""
    return data.index(struct.pack(">BI", 0xCE, FIRST)) + 1, data.index(struct.pack(">Bd", 0xCB, 1.5)) + 1


class Client(Protocol):
    def send(self, data: bytes) -> None: ...
    def receive(self) -> bytes: ...


class ZmqClient:
    def __init__(self, kind: int, endpoint: str, security: Security | None) -> None:
        self._socket = zmq.Context.instance().socket(kind)
        if security is not None:
            curve = security.curve()
            self._socket.curve_publickey = zmq.utils.z85.encode(curve.public)
            self._socket.curve_secretkey = zmq.utils.z85.encode(curve.secret)
            self._socket.curve_serverkey = zmq.utils.z85.encode(curve.server)
            if kind == zmq.DEALER:
                self._socket.setsockopt(zmq.PROBE_ROUTER, 1)  # a server cuts who says nothing
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        self._socket.connect(endpoint)
        if kind == zmq.SUB:
            self._socket.subscribe(TOPIC)

    def send(self, data: bytes) -> None:
        self._socket.send_multipart([TOPIC, data])

    def receive(self) -> bytes:
        try:
            return self._socket.recv_multipart()[-1]
        except zmq.Again:
            raise TimeoutError from None


class Records:
    """A protocol whose every message is the same bytes around the body, over a plain socket."""

    def __init__(
        self, port: int, greeting: list[tuple[bytes, int]], sent: bytes, got: bytes, tail: bytes, *, size: int
    ) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for said, answer in greeting:  # what to say, and how many lines (or, below 0, bytes) come back
            self._socket.sendall(said)
            heard = b""
            while (heard.count(b"\r\n") < answer) if answer >= 0 else (len(heard) < -answer):
                heard += self._socket.recv(65536 if answer > 0 else -answer - len(heard))
        self._sent, self._tail = sent, tail
        self._body = slice(len(got), len(got) + size)
        self._size = len(got) + size + len(tail)
        self._buffer = bytearray()

    def send(self, data: bytes) -> None:
        self._socket.sendall(self._sent + data + self._tail)

    def receive(self) -> bytes:
        while len(self._buffer) < self._size:
            self._buffer += self._socket.recv(1 << 16)
        found = bytes(self._buffer[self._body])
        del self._buffer[: self._size]
        return found


class Redis(Records):
    def send(self, data: bytes) -> None:
        super().send(data)
        with suppress(BlockingIOError):
            self._socket.recv(65536, socket.MSG_DONTWAIT)  # how many got it


class Nats(Records):
    def receive(self) -> bytes:
        while len(self._buffer) < 6:
            self._buffer += self._socket.recv(1 << 16)
        if self._buffer.startswith(b"PING\r\n"):  # once, soon after the connection was made
            del self._buffer[:6]
            self._socket.sendall(b"PONG\r\n")
        return super().receive()


def connect(name: str, port: int, folder: str, size: int, *, publishes: bool) -> Client:
    """A connection to the broker of this name, for messages of so many bytes."""
    n = str(size).encode()
    match name:
        case "nats":
            hello = (b'CONNECT {"verbose":false}\r\nPING\r\n', 2)
            sub = [] if publishes else [(b"SUB %s 1\r\nPING\r\n" % SUBJECT, 1)]
            sent, got = b"PUB %s %s\r\n" % (SUBJECT, n), b"MSG %s 1 %s\r\n" % (SUBJECT, n)
            return Nats(port, [hello, *sub], sent, got, b"\r\n", size=size)
        case "redis":
            channel = b"$%d\r\n%s\r\n" % (len(TOPIC), TOPIC)
            sub = [] if publishes else [(b"*2\r\n$9\r\nSUBSCRIBE\r\n" + channel, 6)]
            around = b"*3\r\n$7\r\n%s\r\n" + channel + b"$" + n + b"\r\n"
            return Redis(port, sub, around % b"PUBLISH", around % b"message", b"\r\n", size=size)
        case "mosquitto":
            text = struct.pack(">H", len(TOPIC)) + TOPIC
            rest = len(text) + size
            head = bytes([0x30, rest & 0x7F | 0x80, rest >> 7] if rest > 127 else [0x30, rest]) + text
            who = b"\0\1p" if publishes else b"\0\1s"
            hello = (b"\x10" + bytes([10 + len(who)]) + b"\0\4MQTT\4\2\0\0" + who, -4)
            sub = [] if publishes else [(b"\x82" + bytes([len(text) + 3]) + b"\0\1" + text + b"\0", -5)]
            return Records(port, [hello, *sub], head, head, b"", size=size)
    keys = fleet_of(Path(folder)) if name == "interlock" else None
    security = load_security(keys, "monitor/bench" if publishes else "rules") if keys else None
    sender = zmq.PUSH if name == "zmq_proxy" else zmq.DEALER
    kind, at = (sender, port) if publishes else (zmq.SUB, port + 1)
    return ZmqClient(kind, f"tcp://127.0.0.1:{at}", security)


# --- the brokers


def fleet_of(folder: Path) -> FleetConfig:
    return FleetConfig(path=str(folder / "fleet.toml"))


def serve_ours(port: int, folder: str, closed: bool, up: Connection) -> None:
    config = BrokerConfig(telemetry_in=f"tcp://127.0.0.1:{port}", telemetry_out=f"tcp://127.0.0.1:{port + 1}")
    security = load_security(fleet_of(Path(folder)), "broker") if closed else None

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_telemetry, security=security), config)
            up.send("up")

    trio.run(main)


def serve_proxy(port: int, up: Connection) -> None:
    """The least that does the same: no trio, no decoding, libzmq's own loop. PULL takes the DEALER's place."""
    context = zmq.Context()
    pull, xpub = context.socket(zmq.PULL), context.socket(zmq.XPUB)
    pull.bind(f"tcp://127.0.0.1:{port}")
    xpub.bind(f"tcp://127.0.0.1:{port + 1}")
    up.send("up")
    zmq.proxy(pull, xpub)


def others(port: int, folder: Path) -> dict[str, list[str]]:
    settings = folder / "mosquitto.conf"
    settings.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nmax_queued_messages 0\n"
    )
    return {
        "nats": ["nats-server", "-a", "127.0.0.1", "-p", str(port)],
        "redis": ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
        "mosquitto": ["mosquitto", "-c", str(settings)],
    }


@contextmanager
def serving(name: str, folder: Path) -> Iterator[int]:
    """The broker in a process of its own; its port (and the next one for subscribers, where it has two)."""
    port = free_port()
    command = others(port, folder).get(name)
    if command is not None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until_open(port)
            yield port
        finally:
            process.terminate()
            process.wait(10)
        return
    if name == "interlock":
        fleet = fleet_of(folder)
        Keyring(fleet.keys_dir, "bench").ensure(["broker", "monitor/bench", "rules"], now=time.time())
    spawn = multiprocessing.get_context("spawn")
    up, said = spawn.Pipe()
    ours = (serve_ours, (port, str(folder), name == "interlock", said))
    target, arguments = (serve_proxy, (port, said)) if name == "zmq_proxy" else ours
    server = spawn.Process(target=target, args=arguments, daemon=True)
    server.start()
    try:
        up.recv()
        yield port
    finally:
        server.terminate()
        server.join(5)


def free_port() -> int:
    """A port that is free, as is the next one."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return port


def until_open(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"nobody listens on port {port}")


# --- measuring


def publish(name: str, port: int, folder: str, data: bytes, orders: Connection) -> None:
    """Send batches as ordered: (count, per second or None). Each holds its number and its time of sending."""
    client = connect(name, port, folder, len(data), publishes=True)
    seq_at, time_at = places(data)
    data = bytearray(data)
    number = FIRST
    orders.send("up")
    while (order := orders.recv()) is not None:
        count, rate = order
        began = time.monotonic()
        for n in range(count):
            if rate:
                while (left := began + n / rate - time.monotonic()) > 0:
                    time.sleep(left)
            number += 1
            struct.pack_into(">I", data, seq_at, number)
            struct.pack_into(">d", data, time_at, time.monotonic())
            client.send(bytes(data))


def measure(name: str, data: bytes, count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="il-") as folder, serving(name, Path(folder)) as port:
        spawn = multiprocessing.get_context("spawn")
        orders, taken = spawn.Pipe()
        sender = spawn.Process(target=publish, args=(name, port, folder, data, taken), daemon=True)
        sender.start()
        try:
            client = connect(name, port, folder, len(data), publishes=False)
            orders.recv()
            join(client, orders.send)
            found = {"per_s": round(throughput(client, orders.send, count))}
            return {**found, **latency(client, orders.send, places(data)[1])}
        except TimeoutError:
            return {"dropped": 1}
        finally:
            orders.send(None)
            sender.join(5)


def join(client: Client, order: Callable[[Any], None]) -> None:
    """Until a subscription is in force, what is sent is lost: send until the newest arrives."""
    time.sleep(0.5)
    order((STEP, None))
    for _ in range(STEP):
        client.receive()


def throughput(client: Client, order: Callable[[Any], None], count: int) -> float:
    began = time.monotonic()
    asked = got = 0
    while got < count:
        while asked < count and asked - got <= WINDOW - STEP:
            order((STEP, None))
            asked += STEP
        client.receive()
        got += 1
    return count / (time.monotonic() - began)


def latency(client: Client, order: Callable[[Any], None], time_at: int) -> dict[str, float]:
    count = int(RATE * LATENCY_S)
    order((count, RATE))
    took = []
    for _ in range(count):
        sent = struct.unpack_from(">d", client.receive(), time_at)[0]
        took.append((time.monotonic() - sent) * 1e3)
    cuts = statistics.quantiles(took, n=100)
    return {"p50_ms": round(cuts[49], 3), "p99_ms": round(cuts[98], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=20_000)
    parser.add_argument("--messages", type=int, default=50_000, help="of one sample")
    parser.add_argument("--quick", action="store_true", help="a tenth of both")
    options = parser.parse_args()
    counts = {"batches": options.batches, "messages": options.messages}
    if options.quick:
        counts = {kind: count // 10 for kind, count in counts.items()}
    names = ["interlock", "interlock_insecure", "zmq_proxy"]
    programs = {"nats": "nats-server", "redis": "redis-server", "mosquitto": "mosquitto"}
    names += [name for name, program in programs.items() if shutil.which(program)]
    report: dict[str, Any] = {
        "benchmark": Path(__file__).stem,
        "cpus": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        "samples_per_batch": SAMPLES,
        "bytes": {kind: len(data) for kind, data in BODIES.items()},
        "latency_at_per_s": RATE,
        "not_installed": [program for program in programs.values() if not shutil.which(program)],
    }
    for kind, data in BODIES.items():
        report[kind] = {name: measure(name, data, counts[kind]) for name in names}
    report["aims"] = aims(report)
    print(json.dumps(report, indent=2))


def aims(report: dict[str, Any]) -> dict[str, Any]:
    """What the plane with keys is to reach; of brokers that are not installed nothing is said."""
    ours = report["batches"]["interlock"]
    samples = ours.get("per_s", 0) * SAMPLES
    found: dict[str, Any] = {
        "samples_per_s": aim(samples, 2_000_000, at_most=False),
        "p50_ms": aim(ours.get("p50_ms", math.inf), 0.5),
    }
    for other in ("redis", "mosquitto"):
        if (theirs := report["messages"].get(other, {}).get("per_s")) is not None:
            found[f"messages_ahead_of_{other}"] = aim(
                report["messages"]["interlock"].get("per_s", 0), theirs, at_most=False
            )
    return found


if __name__ == "__main__":
    main()
