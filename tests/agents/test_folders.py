"""A data folder goes to another one: only what differs, each file whole, and nothing outside of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import memory_stream_pair

from interlock.agents import folders
from interlock.agents.folders import Moved, finish_folders, give_folder, is_empty, survey, take_folder
from interlock.agents.frames import Frames
from interlock.agents.transfer import TransferError
from interlock.broker.errors import WireError


async def move(source: Path, target: Path) -> Moved:
    here, there = memory_stream_pair()
    moved: list[Moved] = []

    async def give() -> None:
        moved.append(await give_folder(source, Frames(here)))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(give)
            await take_folder(target, Frames(there))
    return moved[0]


def fill(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "deep" / "er" / "large").write_bytes(os.urandom(700_000))
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)
    (folder / "link").symlink_to("deep/er/large")


async def test_the_other_folder_is_the_same_afterwards_and_a_second_time_costs_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    fill(source)
    assert (await move(source, target)).bytes == 700_010
    assert survey(target) == survey(source)
    assert (await move(source, target)) == Moved(0, 0)


async def test_what_changed_vanished_or_became_something_else_is_made_the_same(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    fill(source)
    await move(source, target)
    (source / "run").write_text("#!/bin/sh\nexit\n")
    (source / "link").unlink()
    (source / "link").mkdir()
    (source / "deep" / "er" / "large").unlink()
    (target / "stray").write_text("left by somebody")
    (target / "empty").rmdir()
    (target / "empty").write_text("a file now")
    moved = await move(source, target)
    assert survey(target) == survey(source)
    assert moved.bytes == 15


async def test_an_empty_folder_and_none_are_the_same(tmp_path: Path) -> None:
    assert is_empty(tmp_path / "none")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").write_text("x")
    await move(tmp_path / "none", tmp_path / "b")
    assert is_empty(tmp_path / "b")


@pytest.mark.parametrize("relative", ["../x", "/etc/x", "a/../../x", "", "out/x", "a\0b"])
async def test_nothing_is_put_outside_of_the_folder(tmp_path: Path, relative: str) -> None:
    target = tmp_path / "b"
    target.mkdir()
    (target / "out").symlink_to(tmp_path)
    here, there = memory_stream_pair()
    frames = Frames(here)

    async def hostile() -> None:
        while (await frames.receive())[0] != "asks":
            pass
        await frames.send("entry", relative, "link", 0, "/etc/passwd")
        await frames.receive()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hostile)
            with pytest.raises(TransferError):
                await take_folder(target, Frames(there))
    assert os.listdir(tmp_path) == ["b"]


async def send_without_end(frames: Frames) -> None:
    """A new file, a changed one and one to be removed, and then the way breaks."""
    for name in ("changed", "new"):
        await frames.send("entry", name, "file", 0o644, hashlib.sha256(b"newer").hexdigest())
        await frames.send("data", b"newer")
        await frames.send("end")
    await frames.send("gone", "old")


def before(folder: Path) -> Path:
    folder.mkdir()
    for name in ("changed", "old"):
        (folder / name).write_text("older")
    return folder


async def test_what_did_not_come_whole_changes_nothing(tmp_path: Path) -> None:
    target = before(tmp_path / "b")
    found = survey(target)
    here, there = memory_stream_pair()

    await send_without_end(Frames(here))
    await here.send_eof()
    with trio.fail_after(20), pytest.raises(WireError, match="ended before"):
        await take_folder(target, Frames(there))
    assert survey(target) == found
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("done", range(4))
async def test_who_dies_while_it_puts_things_in_place_ends_it_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    target = before(tmp_path / "b")
    here, there = memory_stream_pair()

    await send_without_end(Frames(here))
    await Frames(here).send("done")
    steps = iter(range(10))

    def dies(target: Path, relative: str, inside: Callable[[Path, str], Path] = folders._inside) -> Path:
        if (tmp_path / "b").exists() and list(tmp_path.glob(f".aside-*/{folders.STEPS}")) and next(steps) == done:
            raise KeyboardInterrupt
        return inside(target, relative)

    monkeypatch.setattr(folders, "_inside", dies)
    with trio.fail_after(20), suppress(KeyboardInterrupt):
        await take_folder(target, Frames(there))
    monkeypatch.undo()
    assert finish_folders(tmp_path) == (["b"] if done < 3 else [])
    assert {path.name: path.read_text() for path in target.iterdir()} == {"changed": "newer", "new": "newer"}
    assert os.listdir(tmp_path) == ["b"]
    assert finish_folders(tmp_path) == []


def test_a_damaged_list_is_left_alone_and_what_never_came_whole_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".aside-1").mkdir()
    (tmp_path / ".aside-1" / folders.STEPS).write_bytes(b"\xc1")
    (tmp_path / ".aside-2").mkdir()
    (tmp_path / ".aside-2" / "0").write_text("half")
    assert finish_folders(tmp_path) == []
    assert os.listdir(tmp_path) == [".aside-1"]
    assert "can't be put in place" in caplog.text


async def test_a_file_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    here, there = memory_stream_pair()
    frames = Frames(here)
    said: list[object] = []

    async def hostile() -> None:
        while (await frames.receive())[0] != "asks":
            pass
        await frames.send("entry", "x", "file", 0o644, "0" * 64)
        await frames.send("data", b"something else")
        await frames.send("end")
        said.extend(await frames.receive())

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hostile)
            with pytest.raises(TransferError, match="checksum of x"):
                await take_folder(tmp_path / "b", Frames(there))
    assert said[0] == "refused"
    assert is_empty(tmp_path / "b")
