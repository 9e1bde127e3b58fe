"""What is fuzzed, without the fuzzer: each target has the state that stands behind a socket, gives valid messages as
seeds, and takes one message of any bytes. Whatever it lets out, but what its code declares, is a fault.

`fuzz_wire.py` runs them under atheris; a test runs each over its seeds and some mutants.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import msgspec
import trio

from interlock.agents import contract, http1
from interlock.agents.compare import decode_answer, difference
from interlock.agents.probes import decode_answer as decode_probe
from interlock.broker import facts, keys, policy, protocol, signing, telemetry_protocol, topics, wire
from interlock.broker.bus import new_event
from interlock.broker.commands import Breach, Commit, CutOver, Migrate, Prepare, RenewLease, RollBack, RollCall
from interlock.broker.config import CompareConfig
from interlock.broker.connections import DESCRIPTOR, LINE, USER, Ask, Connections
from interlock.broker.direct import _Entrance
from interlock.broker.errors import ConfigError, Refused, WireError
from interlock.broker.event_plane import EventPlane
from interlock.broker.gate import Gate
from interlock.broker.lines import Line
from interlock.broker.link import read_arrival
from interlock.broker.rejects import Rejects
from interlock.broker.samples import SeriesTable, labels
from interlock.broker.security import Security
from interlock.broker.telemetry_plane import _Plane, paged
from interlock.coordinator.catalogue import example
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.rules.intake import Intake

SEPARATOR = b"\xc1\xc1"  # between the frames of one message in an input: MessagePack never uses the byte 0xc1
USERS = ["broker", "coordinator", "rules", "host/alpha", "host/beta", "monitor/alpha", "operator/ann"]
BREACH = Breach(by="rule gpu-memory", reason="r", labels={"agent": "chat"}, value=1.5)

Frames = list[bytes]


class Taker:
    """Stands for a socket: takes all, and counts."""

    closed = False
    endpoint = "inproc://none"
    users = 0
    connections: Any = None

    def __init__(self) -> None:
        self.sent = 0

    def send_nowait(self, frames: Sequence[bytes]) -> bool:
        self.sent += sum(map(len, frames)) > 0
        return True

    def send_burst(self, messages: Sequence[Sequence[bytes]]) -> int:
        return sum(map(self.send_nowait, messages))

    async def grant_subscriptions(self, may: Callable[[Line, bytes], bool]) -> None:
        self.may = may


class Log:
    """Stands for the event log, of which intake reads only this."""

    trouble = ""
    last = 7
    identity = "log"


def security_of(identity: str = "broker") -> tuple[Security, dict[str, keys.PrivateKeys]]:
    authority = keys.Authority(fleet="f")
    private = {}
    for number, who in enumerate([*USERS, "subscriber/eye", "host/gone"]):
        authority, private[who] = keys.issue(authority, who, now=float(number), topics=["fact/"])
    authority = keys.revoke(authority, "host/gone")
    return Security(private[identity], keys.Roll(authority), Path("/nonexistent")), private


class Stage:
    """The keys of everybody, and the events that serve as seeds."""

    def __init__(self) -> None:
        self.security, self.private = security_of()
        self.roll = self.security.roll
        self.users = [grant.curve for grant in self.roll.authority.grants]

    def user(self, frames: Frames) -> str:
        """Whose message it is: by its length, so that each is tried as anyone's."""
        return self.users[sum(map(len, frames)) % len(self.users)]

    def events(self) -> Iterator[wire.Event]:
        migration: dict[str, Any] = {"migration": "m", "agent": "chat", "epoch": 7}
        deadline = time.time() + 60
        asked = [
            ("operator/ann", topics.COORDINATOR, Migrate(agent="chat", to="v2", deadline=deadline)),
            ("operator/ann", topics.ALL_HOSTS, RollCall(deadline=deadline)),
            ("coordinator", topics.command("alpha"), Prepare(**migration, deadline=deadline, to="v2", baseline_s=1.0)),
            ("coordinator", topics.command("alpha"), CutOver(**migration, deadline=deadline, share=0.5, lease_s=6.0)),
            ("coordinator", topics.command("alpha"), Commit(**migration, deadline=deadline)),
            ("coordinator", topics.command("alpha"), RenewLease(**migration, lease_s=6.0)),
            ("rules", topics.rollback("alpha"), RollBack(**migration, breach=BREACH, issued=1.0)),
        ]
        for who, topic, body in asked:
            yield signing.sign(new_event(topic, body, source=who, time=1.0), self.private[who])
        for kind in get_args(facts.Fact):
            body = _fact(kind)
            yield new_event(_topic(body), body, source=_source(body), time=1.0)


def _fact(kind: type[Any]) -> Any:
    """A fact with plausible values, about this host and agent."""
    named: dict[str, Any] = {"host": "alpha", "agent": "chat", "migration": "m", "epoch": 7, "breach": BREACH}
    named |= {"evidence": {"p99": 0.5, "by": [1, {"x": None}]}, "settings": {"share": 0.5}, "labels": {"a": "b"}}
    named |= {"state": Fleet().snapshot(0).state if kind is facts.FleetSnapshot else "live"}
    fields = {field.name for field in msgspec.structs.fields(kind)}
    return msgspec.structs.replace(example(kind), **{name: value for name, value in named.items() if name in fields})


def _topic(body: Any) -> str:
    if isinstance(body, facts.FleetSnapshot):
        return topics.FLEET_SNAPSHOT
    if isinstance(body, facts.AlertFiring | facts.AlertResolved):
        return topics.alert_fact("r")
    return topics.host_fact("alpha") if hasattr(body, "host") and not hasattr(body, "to") else "fact/migration/chat/"


def _source(body: Any) -> str:
    if isinstance(body, facts.AlertFiring | facts.AlertResolved):
        return "rules"
    return "host/alpha" if _topic(body) == topics.host_fact("alpha") else "coordinator"


# --- targets: each gives its seeds, and takes one input. Whatever it lets out is a crash.


class Envelope(Stage):
    """Events: frames -> types, the policy and the signature that judge them, the folds that take them."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.rejects = Rejects("fuzz")

    def seeds(self) -> Iterator[Frames]:
        for event in self.events():
            yield wire.encode_event(event)
            header = protocol.LiveHeader(**msgspec.structs.asdict(event.header), since=3, recent={event.topic: 5})
            yield [event.topic.encode(), wire.encode(header), event.raw]

    def take(self, frames: Frames) -> None:
        try:
            read_arrival(frames, self.rejects)
            event = wire.decode_event(frames)
        except WireError:
            return
        again = wire.encode_event(event)
        assert wire.encode_event(wire.decode_event(again)) == again
        grant = self.roll.by_key(self.user(frames))
        for judge in (policy.publish, policy.direct):
            with suppress(Refused):
                if grant is not None:
                    judge(grant, event)
        with suppress(Refused):
            signing.check(event, self.roll, now=2.0)
        self.fleet.apply(event)
        json.dumps(self.fleet.to_json())
        self.fleet.snapshot(0)
        if len(self.fleet.hosts) + len(self.fleet.agents) + len(self.fleet.alerts) > 100:
            self.fleet = Fleet()  # the log bounds it, and the disk the log


class Telemetry(Stage):
    """Batches and requests for last values at the plane, and what is remembered of them; and a reader's side."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Taker()
        self.plane = _Plane(self.line, self.line, None, Rejects("fuzz"))  # type: ignore[arg-type]
        self.closed = _Plane(self.line, self.line, Gate(self.security, "fuzz"), Rejects("fuzz"))  # type: ignore[arg-type]
        self.intake = Intake()
        self.count = 0

    def seeds(self) -> Iterator[Frames]:
        for source in ("alpha/host", "alpha/monitor"):
            table = SeriesTable(source, 5)
            for now in (1.0, 1.1, 2.5):
                samples = {labels("up", host="alpha", n=str(n)): float(n) for n in range(4)}
                batch = table.batch(samples, time=now, ended=[labels("up", host="alpha", n="gone")])
                yield [f"telemetry/{source}/".encode(), wire.encode(batch)]
        yield [wire.encode(telemetry_protocol.AskLast(1, ["telemetry/", "telemetry/alpha/"]))]
        yield [wire.encode(telemetry_protocol.Page(1, 2, True)), b"telemetry/a/b/", b"\x80"]
        yield [b"beat/", wire.encode(telemetry_protocol.Beat(1, 2, 3.0))]

    def take(self, frames: Frames) -> None:
        if self.closed.take(self.user(frames), b"peer", frames):
            self.closed.pass_on([frames])
        if self.plane.take("", b"peer", frames):
            batch = wire.decode_batch(frames)
            self.intake.read(batch, now=2.0)
        for decode in (telemetry_protocol.decode_answer, telemetry_protocol.decode_beat):
            with suppress(WireError):
                decode(frames)
        self.count += 1
        if self.count % 1000 == 0:
            last, now = self.plane._last, trio.current_time()
            for page, _ in paged(last.snapshot(["telemetry/"], now)):
                assert all(len(frame) <= 8 << 20 for frame in page)
            self.plane._figures()
            last.forget_silent(now)


class Control(Stage):
    """Requests at the event plane, and its answers at a client; nothing is written."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Taker()
        gate = Gate(self.security, "fuzz")
        self.planes = [
            EventPlane(self.line, self.line, Log(), guard)  # type: ignore[arg-type]
            for guard in (None, gate)
        ]

    def seeds(self) -> Iterator[Frames]:
        for event in self.events():
            yield [wire.encode(protocol.Publish(3, 1)), *wire.encode_event(event)]
        for message in (
            protocol.Publish(),
            protocol.Replay(1, 0, ["fact/", "command/alpha/"]),
            protocol.Ping(4),
            protocol.Receipt("host/alpha", "c", "why not"),
            protocol.Watch("c"),
            protocol.Ack("i", 4),
            protocol.Nack("log", "disk full", "i"),
            protocol.Replayed(1, 9, False, 2, "log", 3, True),
            protocol.ReplayEvent(1),
            protocol.ReplayEvents(1),
            protocol.ReplayFailed(1, "no"),
            protocol.Pong(1, 2, "log"),
            protocol.Received("c", 5, {"host/alpha": ""}),
            protocol.Beat(beat=1, epoch=2, seq=3, since=1, topics={"fact/": 3}, log="log"),
        ):
            yield [wire.encode(message)]
        yield from protocol.answers(1, [(b"fact/", b"\x80", b"\x80")] * 3)

    def take(self, frames: Frames) -> None:
        for plane in self.planes:
            with suppress(WireError, Refused):
                plane._take(self.user(frames), b"peer", frames)
            plane._tell_watchers()
            for waiting in plane._queue.take(1000, 1 << 30):  # as the writer does, without the disk
                header = waiting.draft.header
                id, topic, source = header.id, waiting.draft.topic, header.source
                plane._receipts.logged(id, topic=topic, source=source, seq=9, now=trio.current_time())
            plane._replays._waiting.take(1000, 1 << 30)
        for decode in (protocol.decode_answer, protocol.decode_beat):
            with suppress(WireError):
                decode(frames[0])
        with suppress(WireError):
            for event in protocol.decode_events(frames[-1]):
                read_arrival(event, plane.rejects, live=False)


class Direct(Stage):
    """A host's own endpoint, and its answers at whoever asked."""

    def __init__(self) -> None:
        super().__init__()
        self.entrances = [
            _Entrance("fuzz", self.accept, gate) for gate in (None, Gate(security_of("host/alpha")[0], "fuzz"))
        ]

    def accept(self, event: wire.Event) -> None:
        signing.check(event, self.roll, now=2.0)

    def seeds(self) -> Iterator[Frames]:
        for event in self.events():
            yield wire.encode_event(event)
        yield [b"\x83\xa2id\xa1x\xa2ok\xc3\xa6reason\xa0"]

    def take(self, frames: Frames) -> None:
        for entrance in self.entrances:
            assert entrance.reply(self.user(frames), frames).id is not None


class Zap(Stage):
    """ZAP requests, subscriptions and key files: what stands between a stranger and the fleet."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(self.security, "fuzz")
        self.line = Taker()
        self.gate.guard(self.line)  # type: ignore[arg-type]
        self.heard: Connections[dict[str, str]] = Connections(
            b"fuzz", list, lambda message, name: message.get(name, ""), 10.0
        )
        self.heard.judge = self.gate

    def seeds(self) -> Iterator[Frames]:
        for key in (self.users[0], self.users[-1], "00" * 32):
            yield [b"1.0", b"1", b"interlock", b"127.0.0.1", b"", b"CURVE", bytes.fromhex(key)]
        yield [b"1.0", b"1", b"", b"::1", b"", b"PLAIN", b"user", b"password"]
        yield [b"\1fact/host/"]
        yield [b"\0fact/host/"]
        yield [msgspec.json.encode(self.roll.authority)]
        yield [msgspec.json.encode(keys.Enrolment(own=self.private["rules"], authority=self.roll.authority))]
        yield [msgspec.json.encode(self.private["rules"])]

    def take(self, frames: Frames) -> None:
        answer = self.gate.answer(frames)
        assert len(answer) == 6
        assert answer[2] in (b"200", b"300", b"400")
        if answer[2] == b"200":
            assert self.roll.by_key(answer[4].decode()) is not None
        with suppress(StopIteration):
            self.gate.grant_subscriptions(self.line).send(None)  # type: ignore[arg-type]
        line = self.heard.lines.let_in(self.user(frames), 0.0)
        of = {LINE: line.number, USER: line.user, DESCRIPTOR: "1000000"}  # beyond any that is open
        granted: Frames = []
        in_step = self.heard.subscription(of, frames, 0.0, Ask(self.line.may, granted.append), in_step=True)
        assert in_step == (len(frames) == 1 and frames[0][:1] in (b"\0", b"\1"))
        assert granted in ([], frames[:1])
        self.heard.sender(of, [b"route", *frames], 0.0)
        for kind in (keys.Authority, keys.Enrolment, keys.PrivateKeys):
            with suppress(ConfigError):
                keys.decode(frames[0], kind, where="fuzz")


class Stream:
    """A connection on which the given bytes come in pieces, and then its end."""

    def __init__(self, pieces: Frames) -> None:
        self.pieces = list(pieces)

    async def receive_some(self, most: int) -> bytes:
        while self.pieces:
            if piece := self.pieces.pop(0):
                return piece
        return b""

    async def send_all(self, data: bytes) -> None:
        pass


class Http:
    """HTTP/1 of the gateway's clients and of its instances; and what agents and probes decode."""

    def seeds(self) -> Iterator[Frames]:
        yield [b"GET /x?y=1 HTTP/1.1\r\nHost: a\r\nConnection: close, x-y\r\nX-Y: 1\r\n\r\n"]
        yield [b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n", b"hello"]
        yield [b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nT: 1\r\n\r\n"]
        yield [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n"]
        yield [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"]
        yield [
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
        ]
        yield [b'{"action": "echo", "text": "x", "n": 1}']
        yield [b"\x82\xa6action\xa4echo\xa4text\xa1x"]

    def take(self, frames: Frames) -> None:
        for side in (self.client, self.instance):
            with suppress(StopIteration, http1.HttpError):
                side(Stream(frames)).send(None)
        body = frames[0]
        with suppress(contract.RequestError):
            contract.decode_map(body)
        with suppress(ValueError):
            decode_probe(body)
        decode_answer(body)
        difference(frames[:1], frames[1:2], CompareConfig(tolerance=0.1))

    async def client(self, stream: Any) -> None:
        client = http1.ClientSide(stream)
        while (head := await client.request()) is not None:
            backend = http1.Backend(Stream([]))  # type: ignore[arg-type]
            await backend.start(head, b"", complete=not head.chunked and not head.length)
            while (piece := await client.chunk()) is not None:
                await backend.send(piece)
            await client.respond_whole(200, b"x", [])
            if not client.again():
                return

    async def instance(self, stream: Any) -> None:
        backend = http1.Backend(stream)
        head = http1.RequestHead(b"GET", b"/", [(b"Host", b"a")], None, False, b"")
        await backend.start(head, b"", complete=True)
        answer = await backend.response()
        while (piece := await backend.chunk()) is not None:
            assert piece is not None
        await http1.ClientSide(Stream([])).respond(answer)  # type: ignore[arg-type]


TARGETS: dict[str, Callable[[], Any]] = {
    "envelope": Envelope, "telemetry": Telemetry, "control": Control, "direct": Direct, "zap": Zap, "http": Http,
}  # fmt: skip


# --- mutations

ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.5, float("nan"), float("inf"), -float("inf"),
    "", "\0", "\u20ac", "a" * 300, "fact/", b"", b"x" * 64, [], {}, [[]], {"": {}}, {1: 2}, {b"k": None},
    msgspec.msgpack.Ext(5, b"x"),
]  # fmt: skip


def mutate(data: bytes, most: int, seed: int, otherwise: Callable[[bytes, int], bytes]) -> bytes:
    """Half of the time one frame's values, so that what comes out is a message still; else as `otherwise` does."""
    rng = random.Random(seed)
    frames = data.split(SEPARATOR)
    at = rng.randrange(len(frames))
    if rng.random() < 0.5:
        return bytes(otherwise(data, most))
    try:
        tree = msgspec.msgpack.decode(frames[at])
        for _ in range(rng.randint(1, 3)):
            tree = _changed(tree, rng)
        frames[at] = msgspec.msgpack.encode(tree)
    except (ValueError, RecursionError, TypeError, OverflowError):
        frames[at] = bytes(otherwise(frames[at], max(1, most - len(data) + len(frames[at]))))
    return SEPARATOR.join(frames)[:most]


def _changed(tree: Any, rng: random.Random) -> Any:
    """One place in a tree of plain values given another value, taken out, or doubled."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree))
        tree = dict(tree)
        if rng.random() < 0.1:
            del tree[key]
        elif rng.random() < 0.1:
            tree[rng.choice(["x", 1, b"x"])] = tree[key]
        else:
            tree[key] = _changed(tree[key], rng)
        return tree
    if isinstance(tree, list) and tree and rng.random() < 0.9:
        at = rng.randrange(len(tree))
        left, right = tree[:at], tree[at + 1 :]
        return [*left, *([tree[at]] * 2 if rng.random() < 0.2 else [_changed(tree[at], rng)]), *right]
    if isinstance(tree, int | float) and not isinstance(tree, bool) and rng.random() < 0.5:
        return tree + rng.choice([-1, 1, 0.5, 256])
    return rng.choice(ODD)
