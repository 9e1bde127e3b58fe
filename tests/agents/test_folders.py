"""A data folder goes to another one: only what differs, each file whole, and nothing outside of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from trio.testing import memory_stream_pair

from interlock.agents.folders import Moved, give_folder, is_empty, survey, take_folder
from interlock.agents.frames import Frames
from interlock.agents.transfer import TransferError


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
