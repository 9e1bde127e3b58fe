"""Hosts and telemetry for `bench_scale.py`: processes that hold thousands of connections each, on plain pyzmq."""

from __future__ import annotations

import select
import time
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import Connection
from typing import Any

import zmq

from interlock.broker import topics, wire
from interlock.broker.config import BrokerConfig
from interlock.broker.protocol import BEAT_TOPIC, Ping, Receipt
from interlock.broker.samples import SeriesTable, labels
from interlock.broker.sockets import tune

PER_HOST = 4  # descriptors in a process of hosts: of each connection the stream, and libzmq's own for waking
ASK_AGAIN_S = 5.0  # a host that has not heard the broker's answer by then asks again
CATCH_UP = 1.0  # the load may be behind by so many seconds, and no more

Curve = tuple[bytes, bytes, bytes]


class Orders(Enum):
    STOP = "stop"


@dataclass
class Order:
    what: str
    hosts: Any = ()


@dataclass(slots=True)
class Host:
    identity: str
    feed: zmq.Socket[bytes]
    events: zmq.Socket[bytes]
    heard: bool = False
    answered: bool = False


class Hosts:
    """All hosts of one process, in one loop."""

    def __init__(self, broker: BrokerConfig, orders: Connection) -> None:
        self._endpoints = broker.events, broker.feed
        self._heartbeat_s = broker.heartbeat_s
        self._orders = orders
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 32_000)
        self._epoll = select.epoll()
        self._epoll.register(orders.fileno(), select.EPOLLIN)
        self._by_fd: dict[int, tuple[Host, bool]] = {}
        self._hosts: list[Host] = []
        self._missing = {"feed": 0, "events": 0}
        self._when = {"feed": 0.0, "events": 0.0}
        self._waited_for = False
        self._ask_at = float("inf")

    def run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll(max(0.0, min(1.0, self._ask_at - time.monotonic()))):
                if fd == self._orders.fileno():
                    self._obey(self._orders.recv())
                else:
                    host, feed = self._by_fd[fd]
                    self._read_feed(host) if feed else self._read_answers(host)
            if time.monotonic() >= self._ask_at:
                self._ask_all()
            if self._waited_for and not any(self._missing.values()):
                self._waited_for, self._ask_at = False, float("inf")
                self._orders.send(self._when)

    def _obey(self, order: Order) -> None:
        match order.what:
            case "connect":
                for identity, curve in order.hosts:
                    self._connect(identity, curve)
                self._count()
                self._waited_for = True
                self._ask_at = time.monotonic() + ASK_AGAIN_S
            case "forget":
                for host in self._hosts:
                    host.heard = host.answered = False
                self._count()
                self._orders.send("done")
            case "count":
                self._orders.send(dict(self._missing))
            case "back":
                self._waited_for = True
                self._ask_at = time.monotonic()

    def _count(self) -> None:
        self._missing = {
            "feed": sum(not host.heard for host in self._hosts),
            "events": sum(not host.answered for host in self._hosts),
        }

    def _connect(self, identity: str, curve: Curve) -> None:
        name = identity.split("/")[1]
        made = []
        for kind, endpoint in ((zmq.DEALER, self._endpoints[0]), (zmq.SUB, self._endpoints[1])):
            raw = self._context.socket(kind)
            tune(raw, connects=True, heartbeat_s=self._heartbeat_s)
            raw.curve_publickey, raw.curve_secretkey, raw.curve_serverkey = curve
            if kind == zmq.DEALER:
                raw.setsockopt(zmq.PROBE_ROUTER, 1)  # a server cuts who says nothing
            if kind == zmq.SUB:
                for topic in (topics.command(name), topics.rollback(name), topics.ALL_HOSTS, BEAT_TOPIC):
                    raw.subscribe(topic.encode())
            raw.connect(endpoint)
            made.append(raw)
        host = Host(identity, feed=made[1], events=made[0])
        self._hosts.append(host)
        for raw in made:
            fd = raw.getsockopt(zmq.FD)
            self._by_fd[fd] = (host, raw is host.feed)
            self._epoll.register(fd, select.EPOLLIN)
        host.events.send(wire.encode(Ping(1)))
        self._read_answers(host)  # a socket that was never found empty does not tell that something has come
        self._read_feed(host)

    def _ask_all(self) -> None:
        for host in self._hosts:
            if not host.answered:
                host.events.send(wire.encode(Ping(1)), zmq.NOBLOCK)
                self._read_answers(host)
        self._ask_at = time.monotonic() + ASK_AGAIN_S

    def _read_feed(self, host: Host) -> None:
        while True:
            try:
                frames = host.feed.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if frames[0] != BEAT_TOPIC.encode():
                receipt = Receipt(host.identity, wire.decode_header(frames[1]).id)
                host.events.send(wire.encode(receipt), zmq.NOBLOCK)
                self._read_answers(host)  # sending may have taken the news of an answer
            elif not host.heard:
                host.heard = True
                self._missing["feed"] -= 1
                self._when["feed"] = time.monotonic()

    def _read_answers(self, host: Host) -> None:
        while True:
            try:
                host.events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if not host.answered:
                host.answered = True
                self._missing["events"] -= 1
                self._when["events"] = time.monotonic()


def simulate(broker: BrokerConfig, orders: Connection) -> None:
    Hosts(broker, orders).run()


def telemetry_load(
    config: BrokerConfig, publishers: list[tuple[str, Curve]], own: Curve, per_s: int, orders: Connection
) -> None:
    """Publish and hear batches of one sample, until told to stop; then say how many a second went out and came."""
    context = zmq.Context()
    feed = _socket(context, zmq.SUB, config.telemetry_out, own)
    feed.subscribe(topics.TELEMETRY.encode())
    links, tables = [], []
    for name, curve in publishers:
        links.append(
            (_socket(context, zmq.DEALER, config.telemetry_in, curve), topics.telemetry(name, "monitor").encode())
        )
        tables.append((SeriesTable(f"{name}/monitor", time.time_ns()), {labels("host_load1", host=name): 0.5}))
    turn = sent = heard = 0
    up = False
    began = time.monotonic()
    while not orders.poll(0):
        time.sleep(0.002)
        due = int((time.monotonic() - began) * per_s) - turn
        for _ in range(min(due, int(per_s * CATCH_UP))):
            link, topic = links[turn % len(links)]
            table, samples = tables[turn % len(links)]
            try:
                link.send_multipart([topic, wire.encode(table.batch(samples, time=time.time()))], zmq.NOBLOCK)
                sent += 1
            except zmq.Again:
                pass
            turn += 1
        while True:
            try:
                feed.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            heard += 1
        if not up and heard:
            up, began, turn, sent, heard = True, time.monotonic(), 0, 0, 0
            orders.send("up")
    took = time.monotonic() - began
    orders.send({"telemetry_sent_per_s": round(sent / took), "telemetry_heard_per_s": round(heard / took)})


def _socket(context: zmq.Context[Any], kind: int, endpoint: str, curve: Curve) -> zmq.Socket[bytes]:
    raw = context.socket(kind)
    tune(raw, connects=True)
    if kind == zmq.DEALER:
        raw.setsockopt(zmq.PROBE_ROUTER, 1)  # a server cuts who says nothing
    raw.curve_publickey, raw.curve_secretkey, raw.curve_serverkey = curve
    raw.connect(endpoint)
    return raw
