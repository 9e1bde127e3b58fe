"""An agent's data folder on its way to another host: only what differs there, file by file, each put in place whole.

The taker says what it has, the giver sends what differs, the taker says what it made of it. So the same folder sent a
second time costs a look at both sides, and what was sent while the agent ran is made right once it stands still.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import trio

from interlock.agents.frames import Frames
from interlock.agents.transfer import PIECE, TransferError
from interlock.agents.trees import ASIDE, entries, remove_tree, sha256_of
from interlock.broker.errors import WireError

MAX_FILES = 100_000  # in a data folder: what names them must fit into memory, twice
MANIFEST_PART = 100  # names in one message


@dataclass(frozen=True)
class Entry:
    """kind: file, folder or link. what: a file's sha256, a link's target."""

    kind: str
    mode: int
    size: int
    what: str


@dataclass(frozen=True)
class Moved:
    files: int
    bytes: int


def survey(folder: Path) -> dict[str, Entry]:
    """What is in a folder, by relative path; nothing if it is not there. Sockets and pipes are left out."""
    found: dict[str, Entry] = {}
    for relative, path, status in entries(folder) if folder.is_dir() else ():
        mode = stat.S_IMODE(status.st_mode)
        try:
            if PurePosixPath(relative).name.startswith(ASIDE):
                continue
            if stat.S_ISLNK(status.st_mode):
                found[relative] = Entry("link", 0, 0, os.readlink(path))
            elif stat.S_ISDIR(status.st_mode):
                found[relative] = Entry("folder", mode, 0, "")
            elif stat.S_ISREG(status.st_mode):
                found[relative] = Entry("file", mode, status.st_size, sha256_of(path))
        except FileNotFoundError:  # it runs still: what is gone is gone
            continue
        if len(found) > MAX_FILES:
            raise TransferError(f"the data folder has more than {MAX_FILES} files", where=str(folder))
    return found


def is_empty(folder: Path) -> bool:
    return not folder.is_dir() or next(iter(entries(folder)), None) is None


async def give_folder(folder: Path, frames: Frames) -> Moved:
    """Send to who takes it what it does not have. TransferError with its reason if it does not take it."""
    theirs = await _receive_survey(frames)
    ours = await trio.to_thread.run_sync(survey, folder)
    moved = 0
    for relative in sorted(theirs.keys() - ours.keys(), reverse=True):
        await frames.send("gone", relative)
    for relative, entry in sorted(ours.items()):
        if theirs.get(relative) == entry:
            continue
        await frames.send("entry", relative, entry.kind, entry.mode, entry.what)
        if entry.kind == "file":
            moved += await _send_file(folder / relative, frames)
    await frames.send("done")
    said, *about = await frames.receive()
    if said != "taken" or len(about) != 2:
        raise TransferError(f"the data folder was not taken: {about[0] if about else said}")
    return Moved(int(about[0]), moved)


async def _send_file(path: Path, frames: Frames) -> int:
    size = 0
    try:
        async with await trio.open_file(path, "rb") as file:
            while data := await file.read(PIECE):
                size += len(data)
                await frames.send("data", data)
    except FileNotFoundError:
        pass
    await frames.send("end")
    return size


async def take_folder(folder: Path, frames: Frames, *, strict: bool = True) -> Moved:
    """The other side of `give_folder`. strict: each file must be what was announced: the agent stands still."""
    aside = folder.parent / f"{ASIDE}{uuid.uuid4().hex}"
    try:
        await trio.to_thread.run_sync(partial(folder.mkdir, parents=True, exist_ok=True))
        await _send_survey(frames, await trio.to_thread.run_sync(survey, folder))
        moved = await _take_all(folder, aside, frames, strict=strict)
    except (OSError, TransferError) as error:
        await frames.send("refused", str(error))
        raise TransferError(f"the data folder can't be taken: {error}", where=str(folder)) from None
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(partial(aside.unlink, missing_ok=True))
    await frames.send("taken", moved.files, moved.bytes)
    return moved


async def _take_all(folder: Path, aside: Path, frames: Frames, *, strict: bool) -> Moved:
    files = size = 0
    while True:
        said, *about = await frames.receive()
        match said, about:
            case "done", []:
                return Moved(files, size)
            case "gone", [str(relative)]:
                await trio.to_thread.run_sync(_remove, _inside(folder, relative))
            case "entry", [str(relative), str(kind), int(mode), str(what)]:
                target = _inside(folder, relative)
                if kind == "file":
                    size += await _take_file(aside, frames, mode)
                    if strict and await trio.to_thread.run_sync(sha256_of, aside) != what:
                        raise TransferError(f"the checksum of {relative} is wrong")
                await trio.to_thread.run_sync(_put, target, aside, kind, mode, what)
                files += 1
            case _:
                raise WireError(f"{said!r} is no message about a folder")


async def _take_file(aside: Path, frames: Frames, mode: int) -> int:
    size = 0
    async with await trio.open_file(aside, "wb") as file:
        while True:
            said, *about = await frames.receive()
            if said == "end":
                break
            if said != "data" or len(about) != 1 or not isinstance(about[0], bytes):
                raise WireError(f"{said!r} in the middle of a file")
            size += len(about[0])
            await file.write(about[0])
        await file.flush()
        await trio.to_thread.run_sync(os.fsync, file.fileno())
    await trio.to_thread.run_sync(os.chmod, aside, mode | stat.S_IRUSR | stat.S_IWUSR)
    return size


def _put(target: Path, aside: Path, kind: str, mode: int, what: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        if target.is_symlink() or not target.is_dir():
            _remove(target)
            target.mkdir()
        target.chmod(mode | stat.S_IRWXU)
        return
    if target.is_dir() and not target.is_symlink():
        remove_tree(target)
    if kind == "link":
        _remove(target)
        target.symlink_to(what)
    else:
        os.replace(aside, target)


def _remove(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        remove_tree(target)
    else:
        target.unlink(missing_ok=True)


def _inside(folder: Path, relative: str) -> Path:
    """Where that is; TransferError for what leads out of the folder."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in relative:
        raise TransferError(f"{relative!r} is not in a folder")
    parent = (folder / path).parent
    root = folder.resolve()
    resolved = parent.resolve()
    if resolved != root and root not in resolved.parents:
        raise TransferError(f"{relative!r} leads out of the folder")
    return folder / path


async def _send_survey(frames: Frames, found: dict[str, Entry]) -> None:
    for part in _by(MANIFEST_PART, list(found.items())):
        await frames.send("has", [[name, entry.kind, entry.mode, entry.size, entry.what] for name, entry in part])
    await frames.send("asks")


async def _receive_survey(frames: Frames) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    while True:
        said, *about = await frames.receive()
        if said == "asks":
            return found
        if said != "has" or len(found) > MAX_FILES:
            raise TransferError(str(about[0]) if said == "refused" and about else f"{said!r} is no list of files")
        for name, *entry in about[0]:
            found[str(name)] = Entry(*entry)


def _by(count: int, items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), count):
        yield items[start : start + count]
