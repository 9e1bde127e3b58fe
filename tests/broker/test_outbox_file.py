"""What was posted outlives the process that posted it, and reaches the log once."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.broker import client, outbox_file, topics
from interlock.broker.config import PLACES, BrokerConfig
from interlock.broker.errors import LogError
from interlock.broker.facts import HostDown
from interlock.broker.outbox import Entry
from interlock.broker.outbox_file import Keeper, OutboxFile
from interlock.broker.planes import serve_planes

A = topics.host_fact("a")
NOWHERE = BrokerConfig(**dict.fromkeys(PLACES, "ipc:///tmp/interlock-nobody-listens-here"))


def entry(n: int, size: int = 3) -> Entry:
    return Entry(str(n), [b"t/", b"h", bytes([n % 256]) * size])


def kept(path: Path) -> list[str]:
    file = OutboxFile(path)
    file.close()
    return [entry.id for entry in file.entries]


def test_what_was_saved_and_not_settled_is_there_again_in_order(tmp_path: Path) -> None:
    file = OutboxFile(tmp_path / "state" / "outbox")
    file.save([entry(1), entry(2)], [])
    file.save([entry(3)], ["1"])
    file.close()
    again = OutboxFile(tmp_path / "state" / "outbox")
    assert again.entries == [entry(2), entry(3)]
    again.save([], ["2", "3", "1"])
    assert again.path.read_bytes() == outbox_file.HEAD
    again.close()


@settings(max_examples=60, deadline=None)
@given(lost=st.integers(0, 200), garble=st.booleans(), acts=st.lists(st.sampled_from(["add", "settle"]), max_size=12))
def test_a_torn_end_costs_only_what_was_not_saved_yet(
    lost: int, garble: bool, acts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("outbox") / "outbox"
    file = OutboxFile(path)
    expected: list[str] = []
    for n, act in enumerate(acts):
        if act == "add":
            file.save([entry(n)], [])
            expected.append(str(n))
        elif len(expected) > 1:
            file.save([], [expected.pop(0)])
    whole = path.stat().st_size
    file.save([entry(99, 100)], [])
    file.close()
    content = path.read_bytes()
    cut = max(whole, len(content) - lost - 1)
    path.write_bytes(content[:cut] + (bytes(len(content) - cut) if garble else b""))
    assert kept(path) == expected
    again = OutboxFile(path)
    again.save([entry(100)], [])
    again.close()
    assert kept(path) == [*expected, "100"]


def test_a_file_that_never_is_empty_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_file, "COMPACT_BYTES", 10_000)
    file = OutboxFile(tmp_path / "outbox")
    file.save([entry(0)], [])
    for n in range(1, 100):
        file.save([entry(n, 1000)], [str(n - 1)] if n > 1 else [])
    assert file.path.stat().st_size < 15_000
    file.close()
    assert kept(tmp_path / "outbox") == ["0", "99"]


def test_a_file_without_a_head_is_read_and_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "outbox"
    path.write_bytes(b"".join(outbox_file._record((str(n), entry(n).frames)) for n in range(3)) + b"torn")
    assert kept(path) == ["0", "1", "2"]
    assert path.read_bytes().startswith(outbox_file.HEAD)
    assert kept(path) == ["0", "1", "2"]


def test_a_file_of_a_newer_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "outbox"
    content = outbox_file.MAGIC + (99).to_bytes(4, "little") + b"whatever that one writes"
    path.write_bytes(content)
    with pytest.raises(LogError, match=r"format 99, this one knows 2.*start the newer version"):
        OutboxFile(path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["outbox"]


async def test_a_disk_that_refuses_keeps_nobody_waiting_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox_file, "RETRY_S", 0.01)
    file = OutboxFile(tmp_path / "outbox")
    keeper = Keeper(file)
    full = True

    def save(added: list[Entry], settled: list[str], save: object = file.save) -> None:
        if full:
            raise LogError("the outbox can't be written: full")
        save(added, settled)  # type: ignore[operator]

    monkeypatch.setattr(file, "save", save)
    nursery.start_soon(keeper.run)
    keeper.keep(entry(1))
    keeper.keep(entry(2))
    with trio.fail_after(20):
        while "not kept" not in caplog.text:  # noqa: ASYNC110
            await trio.sleep(0.01)
        keeper.settled("1")
        full = False
        await keeper.kept()
    assert kept(tmp_path / "outbox") == ["2"]
    nursery.cancel_scope.cancel()
    file.close()


async def test_posts_without_a_broker_wait_on_disk_for_the_next_process(folder: Path, nursery: trio.Nursery) -> None:
    config = BrokerConfig(**{name: f"ipc://{folder}/{name}" for name in PLACES})
    for first in (0, 5):
        async with client.open_bus(config, "host/a", outbox=folder / "outbox") as bus:
            for n in range(first, first + 5):
                bus.post(A, HostDown(host=str(n)), id=str(n))
            with trio.fail_after(20):
                await bus.taken()
    await nursery.start(serve_planes, config, folder / "log")
    async with client.open_bus(config, "host/a", outbox=folder / "outbox") as bus:
        bus.post(A, HostDown(host="10"))
        with trio.fail_after(20):
            await bus.flushed()
        async with bus.events(["fact/"], after=0) as feed:
            with trio.fail_after(20):
                seen = [(await anext(feed)).body for _ in range(11)]
        assert seen == [HostDown(host=str(n)) for n in range(11)]
    assert kept(folder / "outbox") == []


POSTER = """
import sys, trio
from pathlib import Path
from interlock.broker import client, topics
from interlock.broker.config import PLACES, BrokerConfig
from interlock.broker.facts import HostDown

async def main(folder, first):
    config = BrokerConfig(**{name: f"ipc://{folder}/{name}" for name in PLACES})
    async with client.open_bus(config, "host/a", outbox=Path(folder) / "outbox") as bus:
        for n in range(first, first + 100_000):
            bus.post(topics.host_fact("a"), HostDown(host=str(n)), id=f"id-{n}")
            await bus.taken()
            print(n, flush=True)

trio.run(main, sys.argv[1], int(sys.argv[2]))
"""


async def test_a_publisher_killed_again_and_again_loses_nothing_it_had_taken(
    folder: Path, nursery: trio.Nursery
) -> None:
    config = BrokerConfig(**{name: f"ipc://{folder}/{name}" for name in PLACES})
    taken: list[int] = []
    with trio.fail_after(100):
        for life in range(4):
            if life == 2:  # the first two lives meet no broker
                await nursery.start(serve_planes, config, folder / "log")
            first = taken[-1] + 1 if taken else 0
            process = await trio.lowlevel.open_process(
                [sys.executable, "-c", POSTER, str(folder), str(first)], stdout=-1
            )
            assert process.stdout is not None
            said = b""
            while said.count(b"\n") < 20:
                chunk = await process.stdout.receive_some()
                assert chunk, "the poster ended"
                said += chunk
            os.kill(process.pid, signal.SIGKILL)
            async for chunk in process.stdout:
                said += chunk
            await process.wait()
            await process.stdout.aclose()
            taken += [int(line) for line in said.split(b"\n")[:-1]]
        async with client.open_bus(config, "host/a", outbox=folder / "outbox") as bus:
            await bus.flushed()
            last = await bus.publish(A, HostDown(host="end"))
            async with bus.events(["fact/"], after=0) as feed:
                events = [await anext(feed) for _ in range(last)]
    ids = [event.header.id for event in events][:-1]
    assert len(set(ids)) == len(ids)
    numbers = [int(id.removeprefix("id-")) for id in ids]
    assert numbers == sorted(numbers)
    assert set(taken) <= set(numbers)
