"""What one key may use of the broker: whoever takes more is told, logged and cut off, and the others notice nothing."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from interlock.broker import gate as gates
from interlock.broker import keys, lastvalues, samples, topics, wire
from interlock.broker.errors import Refused
from interlock.broker.facts import HostDown
from interlock.broker.gate import Gate
from interlock.broker.lastvalues import LastValues
from interlock.broker.protocol import Publish
from interlock.broker.samples import Announcement, Batch, SeriesReader, SeriesTable, labels
from interlock.broker.security import Security

UP = labels("up", host="a")


def batch(seq: int, source: str = "a/host", **fields: Any) -> Batch:
    return Batch(source=source, epoch=1, seq=seq, time=1.0, **fields)


def announced(count: int, first: int = 1, text: str = "x") -> list[Announcement]:
    return [Announcement(first + n, {samples.NAME: text}) for n in range(count)]


async def until(condition: Any) -> None:
    with trio.fail_after(25):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


# --- what is remembered of telemetry


def test_remembering_a_value_does_not_hold_all_that_its_batch_announced() -> None:
    """A host could have the plane hold 10,000 batches of 300,000 announcements each, by one sample in each."""
    last = LastValues()
    for seq in range(1, 50):
        last.take("telemetry/a/host/", batch(seq, series=announced(1000), ids=[seq], values=[0.0]), 0.0)
    source = last._sources["a/host"]
    assert len(source.groups) == 49
    assert not any(held.series or held.stale for held, _ in source.groups.values())


def test_a_series_whose_labels_are_no_labels_is_not_remembered() -> None:
    last = LastValues()
    last.take("telemetry/a/host/", batch(1, series=announced(3, text="x" * 5000), ids=[1], values=[0.5]), 0.0)
    many = Announcement(9, {str(n): "" for n in range(65)})
    last.take("telemetry/a/host/", batch(2, series=[many, *announced(1)], ids=[1], values=[0.5]), 0.0)
    assert (last.series, last.refused) == (1, 4)
    last.take("telemetry/a/host/", batch(3, series=announced(1, text="x" * 5000), ids=[1], values=[0.5]), 0.0)
    assert last._sources["a/host"].series[1].labels == {samples.NAME: "x"}


def test_one_host_does_not_take_the_room_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastvalues, "MAX_HOST_SOURCES", 3)
    monkeypatch.setattr(lastvalues, "MAX_HOST_SERIES", 5)
    last = LastValues()
    for n in range(5):
        last.take("t", batch(1, f"evil/{n}", series=announced(2)), now=float(n))
    assert (last.sources, last.series, last.refused) == (3, 5, 2 + 1)
    assert not last.has_room("evil/9")
    assert last.has_room("evil/0")
    last.take("t", batch(1, "good/host", series=announced(4)), now=4.0)
    assert last.series == 9
    last.forget_silent(now=lastvalues.SILENT_S + 3.5)
    assert (last.sources, last.series) == (1, 4)
    assert last.has_room("evil/9")
    assert not last._series_of["evil"]


def test_a_reader_keeps_no_more_series_and_sources_than_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_SERIES", 4)
    monkeypatch.setattr(samples, "MAX_SOURCES", 2)
    reader = SeriesReader()
    found, _ = reader.read(batch(1, series=announced(9), ids=list(range(1, 10)), values=[0.0] * 9))
    assert (len(found), reader.unresolved) == (4, 5)
    for source in ("b/host", "a/host", "c/host"):
        reader.read(batch(2, source))
    assert list(reader._labels) == list(reader._epochs) == ["a/host", "c/host"]


# --- allowances


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    authority, private = keys.issue(keys.Authority(fleet="f"), "broker", now=1.0)
    authority, _ = keys.issue(authority, "host/a", now=1.0)
    return Gate(Security(private, keys.Roll(authority), tmp_path), "plane")


def key(gate: Gate) -> str:
    grant = gate.security.roll.by_identity("host/a")
    assert grant is not None
    return grant.curve


async def test_large_batches_have_an_allowance_and_small_ones_none(
    gate: Gate, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    user = key(gate)
    for _ in range(10_000):
        gate.batch(user, gates.LARGE_BATCH)
    for _ in range(16):
        gate.batch(user, 1 << 20)
    with pytest.raises(Refused, match="sends more than 4 MiB a second"):
        gate.batch(user, 1 << 20)
    assert "plane: refused host/a: host/a: sends more than 4 MiB a second" in caplog.text
    await trio.sleep(1.0)
    for _ in range(4):
        gate.batch(user, 1 << 20)
    with pytest.raises(Refused):
        gate.batch(user, 1 << 20)


async def test_announcements_count_though_their_batches_are_small(gate: Gate, autojump_clock: Any) -> None:
    user = key(gate)
    for _ in range(53):
        gate.batch(user, 15_000)
        gate.announced(user, 5_000)
    with pytest.raises(Refused, match="in large batches and announcements"):
        gate.batch(user, 15_000)
    await trio.sleep(2.0)
    gate.batch(user, 15_000)


async def test_who_sends_what_is_no_message_is_cut_off_after_a_while(
    gate: Gate, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    user = key(gate)
    for _ in range(int(gates.MAX_REFUSED)):
        gate.garbage(user)
    gate.enter(user, "127.0.0.1")
    gate.garbage(user)
    with pytest.raises(Refused, match="cut off for now"):
        gate.enter(user, "127.0.0.1")
    assert "refused host/a: host/a: sends what is no message" in caplog.text
    assert "refused host/a: cut off for 10 s" in caplog.text
    await trio.sleep(gates.CUT_OFF_S)
    gate.enter(user, "127.0.0.1")


# --- at the planes


async def test_requests_beyond_the_rate_are_told_so_and_then_their_sender_is_cut_off(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gates, "EVENTS_PER_S", 1.0)
    monkeypatch.setattr(gates, "EVENTS", 5.0)
    monkeypatch.setattr(gates, "MAX_REFUSED", 20.0)
    event = wire.encode_event(fleet.event("host/beta", topics.host_fact("beta"), HostDown(host="beta")))
    async with fleet.sockets("host/beta") as sockets:
        dealer = sockets.open("dealer", connect=fleet.config.events)
        with trio.fail_after(25):
            while "refused host/beta: cut off" not in caplog.text:
                dealer.send_nowait([wire.encode(Publish()), *event])
                await trio.sleep(0.005)
            answers = []
            while (frames := dealer.receive_nowait()) is not None:
                answers.append(frames[0])
    assert any(b"asks more than 1 times a second" in answer for answer in answers)
    assert "refused host/beta: host/beta: asks more than 1 times a second" in caplog.text


async def test_a_flood_of_large_batches_ends_for_its_sender_and_an_honest_one_goes_on(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gates, "TELEMETRY", float(1 << 20))
    monkeypatch.setattr(gates, "MAX_REFUSED", 20.0)
    large = wire.encode(batch(1, "beta/host", series=announced(10_000)))
    caplog.set_level(logging.WARNING)
    async with (
        fleet.bus("host/alpha") as honest,
        fleet.bus("operator/local") as operator,
        operator.samples(["telemetry/alpha/"]) as feed,
        fleet.sockets("host/beta") as sockets,
        trio.open_nursery() as nursery,
    ):
        publisher, heard = honest.telemetry("alpha", "host"), []

        async def hear() -> None:
            async for batches in feed:
                heard.extend(batches)

        async def flood() -> None:
            dealers = [sockets.open("dealer", connect=fleet.config.telemetry_in) for _ in range(4)]
            while True:
                for dealer in dealers:
                    dealer.send_nowait([b"telemetry/beta/host/", large])
                await trio.sleep(0.002)

        nursery.start_soon(hear)
        nursery.start_soon(flood)
        await until(lambda: "refused host/beta: cut off" in caplog.text)
        sent = len(heard)
        with trio.fail_after(25):
            while len(heard) < sent + 5:
                publisher.send({UP: 1.0}, time=time.time())
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    assert "telemetry plane: refused host/beta: host/beta: sends more than 4 MiB a second" in caplog.text


async def test_a_host_can_not_invent_sources_without_end(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lastvalues, "MAX_HOST_SOURCES", 3)
    async with fleet.sockets("host/beta") as sockets:
        dealer = sockets.open("dealer", connect=fleet.config.telemetry_in)
        for n in range(5):
            frame = wire.encode(SeriesTable(f"beta/{n}", 1).batch({UP: 1.0}, time=1.0))
            with trio.fail_after(20):
                await dealer.send([f"telemetry/beta/{n}/".encode(), frame])
        await until(lambda: "sources at once" in caplog.text)
    assert "refused host/beta: host/beta on telemetry/beta/3/: sends as more than" in caplog.text


@pytest.mark.parametrize("name", ["series", "ids", "values", "stale"])
def test_a_batch_of_more_than_anybody_has_is_refused_before_it_is_decoded(name: str) -> None:
    """1 MiB of empty announcements took the plane 0.25 s."""
    item = b"\x92\x01\x80" if name == "series" else b"\x01"
    raw = b"\xdd" + (300_000).to_bytes(4, "big") + item * 300_000
    fields: dict[str, Any] = {"source": "a", "epoch": 1, "seq": 1, "time": 1.0, name: msgspec.Raw(raw)}
    with pytest.raises(wire.WireError, match="length <= 20000"):
        wire.decode_batch([b"telemetry/a/", wire.encode(fields)])
    fields[name] = msgspec.Raw(raw[:-1])
    with pytest.raises(wire.WireError, match="length <= 20000"):  # not that it is cut off: nothing was looked at
        wire.decode_batch([b"telemetry/a/", wire.encode(fields)])
