"""Every decoder of bytes that another process, or another person, wrote: what comes out is of its type, or its error.

Nothing else may leave it: an exception that nobody expects ends a process. The bytes are arbitrary, or valid messages
with something changed: values, lengths, types, depth. `make fuzz` does the same for longer, guided by coverage.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interlock.agents import answers, compare, contract, http1, probes
from interlock.agents.journal import Journal
from interlock.broker import chain, facts, keys, outbox_file, protocol, telemetry_protocol, wire
from interlock.broker.config import load_fleet
from interlock.broker.direct import Reply, decode_reply
from interlock.broker.errors import ConfigError, LogError, WireError
from interlock.broker.log import EventLog, open_log
from interlock.broker.samples import Announcement, Batch
from interlock.broker.simgpu import CARD, NoSimulatedGpu, SimulatedGpu
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.rules.durations import duration
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.rulefile import parse_rules


class Decoder(NamedTuple):
    decode: Callable[[bytes], Any]
    errors: tuple[type[Exception], ...]
    seeds: list[bytes]


def pack(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


DONE = facts.StepDone(
    host="a",
    agent="b",
    migration="m",
    epoch=1,
    step="commit",
    command="c",
    evidence={"p99": 0.5, "of": [1, {"x": None}]},
)
HEADER = wire.Header(id="i", source="host/a", time=1.0, sig=b"x")
BATCH = Batch(source="a/host", epoch=1, seq=2, time=3.0, series=[Announcement(1, {"a": "b"})], ids=[1], values=[0.5])
REQUESTS = [
    protocol.Publish(1, 1), protocol.Replay(1, 2, ["fact/"]), protocol.Ping(1), protocol.Receipt("a", "c"),
    protocol.Watch("c"),
]  # fmt: skip
ANSWERS = [
    protocol.Ack("i", 1), protocol.Nack("log", "full", "i"), protocol.Replayed(1, 2, True, 3, "l"),
    protocol.ReplayEvent(1), protocol.ReplayFailed(1, "r"), protocol.Pong(1, 2, "l"),
    protocol.Received("c", 1, {"a": ""}),
]  # fmt: skip
JSON = [b'{"status": "error", "n": [1, {"x": null}], "action": "a"}']
MAPS = [*JSON, pack({"status": "error", "n": [1, {"x": None}], "action": "a"})]
AUTHORITY, PRIVATE = keys.issue(keys.Authority(fleet="f"), "host/a", now=1.0)
RULES = (
    b"groups:\n- name: g\n  rules:\n  - alert: a\n    expr: up == 0\n    for: 5m\n    labels: {a: b}\n"
    b"    x_action: hold\n"
)
FLEET = (
    b'[hosts.a]\ncontrol = "tcp://127.0.0.1:1"\n[agents.b]\nhost = "a"\nendpoint = "tcp://127.0.0.1:2"\nserve = "v1"\n'
)


def frames_of(decode: Callable[[list[bytes]], Any], *before: bytes) -> Callable[[bytes], Any]:
    return lambda data: decode([*before, data])


def restore(data: bytes) -> None:
    fleet = Fleet()
    fleet._restore(facts.FleetSnapshot(through=5, start=3, state=data))
    fleet._restore(facts.FleetSnapshot(through=5, start=4, state=zlib.compress(data)))
    json.dumps(fleet.to_json())


def outbox(data: bytes) -> None:
    list(outbox_file._records(data, 0))
    record = len(data).to_bytes(4, "little") + zlib.crc32(data).to_bytes(4, "little") + data
    for (id, kept), _ in outbox_file._records(record, 0):
        assert isinstance(id, str)
        assert kept is None or all(isinstance(frame, bytes) for frame in kept)


class Stream:
    """A connection with these bytes and then its end; what is sent is thrown away."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def receive_some(self, most: int) -> bytes:
        piece, self.data = self.data[:most], self.data[most:]
        return piece

    async def send_all(self, data: bytes) -> None:
        pass


def client(data: bytes) -> None:
    async def serve() -> None:
        side = http1.ClientSide(Stream(data))  # type: ignore[arg-type]
        while await side.request() is not None:
            while await side.chunk() is not None:
                pass
            await side.respond_whole(200, b"x", [])
            if not side.again():
                return

    trio.run(serve)


def instance(data: bytes) -> None:
    async def ask() -> None:
        side = http1.Backend(Stream(data))  # type: ignore[arg-type]
        await side.start(http1.RequestHead(b"GET", b"/", [(b"Host", b"a")], None, False, b""), b"", complete=True)
        await side.response()
        while await side.chunk() is not None:
            pass

    trio.run(ask)


def differ(data: bytes) -> None:
    found = compare.decode_answer(data)
    if found is not None:
        compare.value_difference(found[1], copy.copy(found[1]), ignore=["x"], tolerance=0.1)
        compare.value_difference(found[1], {"a": 1}, ignore=["x"], tolerance=0.1)


def text(decode: Callable[[str], Any]) -> Callable[[bytes], Any]:
    return lambda data: decode(data.decode("utf-8", "replace"))


WIRE = (WireError,)
DECODERS: dict[str, Decoder] = {
    "event body": Decoder(wire.decode_body, WIRE, [pack(DONE), pack(Fleet().snapshot(0))]),
    "event header": Decoder(wire.decode_header, WIRE, [pack(HEADER)]),
    "event trail": Decoder(protocol.decode_trail, WIRE, [pack({"since": 1, "recent": {"fact/": 2}})]),
    "topic": Decoder(wire.decode_topic, WIRE, [b"fact/host/a/"]),
    "event": Decoder(frames_of(wire.decode_event, b"fact/host/a/", pack(HEADER)), WIRE, [pack(DONE)]),
    "batch": Decoder(frames_of(wire.decode_batch, b"telemetry/a/host/"), WIRE, [pack(BATCH)]),
    "request": Decoder(protocol.decode_request, WIRE, [pack(message) for message in REQUESTS]),
    "answer": Decoder(protocol.decode_answer, WIRE, [pack(message) for message in ANSWERS]),
    "beat": Decoder(
        protocol.decode_beat, WIRE, [pack(protocol.Beat(beat=1, epoch=2, seq=3, since=1, topics={"a/": 1}, log="l"))]
    ),
    "request for last values": Decoder(
        telemetry_protocol.decode_ask, WIRE, [pack(telemetry_protocol.AskLast(1, ["telemetry/"]))]
    ),
    "page": Decoder(
        frames_of(telemetry_protocol.decode_answer), WIRE, [pack(telemetry_protocol.Page(1, 2, False))]
    ),
    "telemetry beat": Decoder(
        frames_of(telemetry_protocol.decode_beat, b"beat/"), WIRE, [pack(telemetry_protocol.Beat(1, 2, 3.0))]
    ),
    "direct reply": Decoder(decode_reply, WIRE, [pack(Reply("i", True))]),
    "authority": Decoder(
        lambda data: keys.Roll(keys.decode(data, keys.Authority, where="f")), (ConfigError,),
        [msgspec.json.encode(AUTHORITY)],
    ),
    "private keys": Decoder(
        lambda data: bytes.fromhex(keys.decode(data, keys.PrivateKeys, where="f").curve), (ConfigError,),
        [msgspec.json.encode(PRIVATE)],
    ),
    "enrolment": Decoder(
        lambda data: keys.key_file(Path("."), keys.decode(data, keys.Enrolment, where="f").own.identity),
        (ConfigError,),
        [msgspec.json.encode(keys.Enrolment(own=PRIVATE, authority=AUTHORITY))],
    ),
    "head of the log": Decoder(text(chain.Head.parse), (ValueError,), [str(chain.Head(5, b"x" * 32)).encode()]),
    "outbox": Decoder(outbox, (), [pack(("i", [b"t", b"h", b"b"])), pack(("i", None))]),
    "fleet snapshot": Decoder(restore, (), [zlib.decompress(Fleet().snapshot(0).state)]),
    "agent request": Decoder(contract.decode_map, (contract.RequestError,), MAPS),
    "agent answer": Decoder(lambda data: answers.is_error([data]), (), MAPS),
    "compared answer": Decoder(differ, (), MAPS),
    "probe's answer": Decoder(probes.decode_answer, (ValueError,), MAPS),
    "HTTP client": Decoder(
        client, (http1.HttpError,),
        [b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nGET / HTTP/1.0\r\n\r\n",
         b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nok"],
    ),
    "HTTP instance": Decoder(
        instance, (http1.HttpError,),
        [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"],
    ),
    "rule file": Decoder(text(lambda data: parse_rules(data, file="f")), (ConfigError,), [RULES]),
    "expression": Decoder(
        text(parse), (ConfigError,), [b'sum by (a) (rate(x{a=~"b.*"}[5m])) / 2 > bool 1 and on (a) up']
    ),
    "duration": Decoder(text(duration), (ConfigError,), [b"1h30m250ms"]),
}  # fmt: skip

# --- hostile bytes

LIES = [  # lengths that are not true, depth, what is not allowed, numbers beyond what fits
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\xdc\xff\xff", b"\xde\xff\xff", b"\x91" * 1200, b"\x81\xa1a" * 2000, b"\xc1",
    b"\xd6\xff\0\0\0\0", b"\xd7\xff" + b"\xff" * 8, b"\xc7\x0c\xff" + b"\x7f" * 12, b"\xc7\x01\x05a", b"\xa2\xff\xfe",
    b"\xa3\xed\xa0\x80", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\0" * 7, b"\xcb\x7f\xf8" + b"\0" * 6,
    b"\xcb\x7f\xf0" + b"\0" * 6, b"\x81\x80\x01", b"\x81\x91\x80\x01", b"\x81\xa2op\xda\x10\0" + b"x" * 4096,
    b"\x81\xa4type\xda\x10\0" + b"x" * 4096, b"[" * 1200, b'{"a":' * 1200, b'"\xff"', b"9" * 5000, b"1e99999",
    b'"\\ud800"', b"\0", b"-" * 3000, b"(" * 3000, b"&a [*a]", b"1:" + b"59:" * 2500 + b"1", b"2001-99-99", b"0x_",
    b"<<: [*a, *a]", b"\r\n\r\n", b"Content-Length: -1\r\n",
]  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=10)
    | st.just(msgspec.msgpack.Ext(5, b"x")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9) | st.binary(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


def damaged(seed: bytes) -> st.SearchStrategy[bytes]:
    """The seed with bytes changed, cut, doubled, or a lie put in."""

    @st.composite
    def change(draw: st.DrawFn) -> bytes:
        data = seed
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data)))
            to = draw(st.integers(at, min(len(data), at + 8)))
            piece = draw(st.binary(max_size=4) | st.sampled_from(LIES) | st.just(data[at:to] * 2))
            data = data[:at] + piece + data[to:]
        return data

    return change()


def retyped(seed: bytes) -> st.SearchStrategy[bytes]:
    """The seed's map with some values replaced by any others, so that all else is right."""
    for codec in (msgspec.msgpack, msgspec.json):
        try:
            tree = codec.decode(seed)
        except (msgspec.DecodeError, ValueError):
            continue
        if isinstance(tree, dict):
            names = st.sampled_from([*tree, "other"])

            def encode(changes: dict[str, Any], codec: Any = codec, tree: dict[str, Any] = tree) -> bytes:
                try:
                    return codec.encode({**tree, **changes})
                except (TypeError, ValueError):
                    return pack({**tree, **changes})

            return st.dictionaries(names, VALUES, max_size=3).map(encode)
    return st.just(seed)


def outcome(decoder: Decoder, data: bytes) -> None:
    try:
        decoder.decode(data)
    except decoder.errors as raised:
        error = raised
    else:
        return
    if isinstance(error, WireError | http1.HttpError):  # it is logged, and sent to whoever asked
        assert "\n" not in str(error)
        assert len(str(error)) < 500


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What is refused is logged: thousands of lines."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", DECODERS)
def test_a_seed_is_taken(name: str) -> None:
    """Otherwise what follows would show nothing."""
    for seed in DECODERS[name].seeds:
        DECODERS[name].decode(seed)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_decoded_is_a_value_or_the_decoder_s_own_error(name: str, data: st.DataObject) -> None:
    decoder = DECODERS[name]
    seed = data.draw(st.sampled_from(decoder.seeds))
    outcome(decoder, data.draw(st.binary(max_size=200) | VALUES.map(pack) | damaged(seed) | retyped(seed)))


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in ("rule file", "expression", "duration")])
def test_a_length_that_lies_takes_no_memory(name: str) -> None:
    """16 MiB at most for some 15 kB, whatever they say of what follows; and each of the lies alone is an error too."""
    decoder = DECODERS[name]
    for seed in decoder.seeds:
        for lie in LIES:
            for data in (lie, seed + lie, seed[: len(seed) // 2] + lie, seed[:1] + lie + seed[1:]):
                tracemalloc.start()
                try:
                    outcome(decoder, data)
                    _, peak = tracemalloc.get_traced_memory()
                finally:
                    tracemalloc.stop()
                assert peak < 16 << 20, (lie[:10], peak)


# --- files


@pytest.fixture
def log_file(tmp_path: Path) -> bytes:
    EventLog(tmp_path / "seed").close()
    return (tmp_path / "seed").read_bytes()


@pytest.mark.parametrize("seed", range(6))
def test_a_file_that_is_no_database_is_an_error_for_the_log_and_the_journal(
    seed: int, log_file: bytes, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    for number in range(10):
        data = bytearray(log_file)
        for _ in range(rng.choice([1, 10, 1000])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(rng.choice([bytes(data), bytes(data[: rng.randrange(len(data))]), rng.randbytes(5000)]))
        with suppress(LogError):
            log = open_log(path)
            with closing(log), suppress(LogError):
                log.read(0, [""], limit=10, max_bytes=1000)
        copy_of = tmp_path / f"{number}.journal"
        copy_of.write_bytes(path.read_bytes())
        with suppress(LogError):
            Journal.open(copy_of).close()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200) | damaged(FLEET) | st.sampled_from(LIES))
def test_a_fleet_file_is_read_or_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fleet.toml"
    for content in (data, b"a = " + data, b"[agents.b.revisions.v1.config]\na = " + data):
        path.write_bytes(content)
        with suppress(ConfigError):
            load_fleet(path)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.binary(max_size=100)
    | damaged(b'{"name": "a", "uuid": "b", "memory_bytes": 5}')
    | st.sampled_from([*LIES, b'{"name": 1, "uuid": 2, "memory_bytes": Infinity}', b'{"memory_bytes": NaN}', b"[]"])
)
def test_a_simulated_card_is_read_or_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / CARD).write_bytes(data)
    with suppress(NoSimulatedGpu):
        SimulatedGpu(folder)


@pytest.mark.parametrize("identity", ["host/../../x", "host/", "broker/x", "nobody", "host/a/b", "", "operator/\0"])
def test_an_enrolment_whose_identity_would_be_a_path_is_refused(identity: str) -> None:
    own = msgspec.structs.replace(PRIVATE, identity=identity)
    for found in (own, keys.Enrolment(own=own, authority=AUTHORITY)):
        with pytest.raises(ConfigError, match="no identity"):
            keys.decode(msgspec.json.encode(found), type(found), where="f")


# --- what `make fuzz` runs


@pytest.fixture(scope="module")
def targets() -> Iterator[Any]:
    path = Path(__file__).parent / "benchmarks" / "fuzz_targets.py"
    spec = importlib.util.spec_from_file_location("fuzz_targets", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fuzz_targets"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz_targets"]


@pytest.mark.parametrize("name", ["envelope", "telemetry", "control", "direct", "zap", "http"])
async def test_the_fuzzer_s_targets_take_their_seeds_and_what_becomes_of_them(name: str, targets: Any) -> None:
    assert name in targets.TARGETS
    target, rng = targets.TARGETS[name](), random.Random(7)

    def otherwise(data: bytes, most: int) -> bytes:
        at = rng.randrange(len(data) + 1)
        return (data[:at] + rng.choice(LIES)[:200] + data[at + rng.randrange(4) :])[:most]

    for frames in list(target.seeds()):
        target.take(frames)
        data = targets.SEPARATOR.join(frames)
        for _ in range(40):
            mutant = targets.mutate(data, 4096, rng.randrange(1 << 30), otherwise)
            target.take(mutant.split(targets.SEPARATOR))
