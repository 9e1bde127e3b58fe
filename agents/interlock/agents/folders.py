"""An agent's data folder on its way to another host: only what differs there, put in place once all of it is there.

The taker says what it has, the giver sends what differs, the taker says what it made of it. So the same folder sent a
second time costs a look at both sides, and what was sent while the agent ran is made right once it stands still.

What comes is kept aside with the list of what is to be done: an agent whose newer state did not come whole goes on with
what it had. A host that dies while it carries the list out goes through it again when it starts.
"""

from __future__ import annotations

import logging
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import trio

from interlock.agents.frames import Frames
from interlock.agents.transfer import PIECE, TransferError
from interlock.agents.trees import ASIDE, entries, remove_tree, sha256_of, sync_folder
from interlock.broker.errors import WireError

log = logging.getLogger(__name__)

MAX_FILES = 100_000  # in a data folder: what names them must fit into memory, twice
MANIFEST_PART = 100  # names in one message
GONE = "gone"  # a step that removes
STEPS = "steps"  # the list of them, beside the files that came


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


class Step(msgspec.Struct, frozen=True, array_like=True):
    """What is to be done with one path. kind: as of an entry, or GONE."""

    kind: str
    path: str
    mode: int = 0
    what: str = ""


_LIST = msgspec.msgpack.Decoder(tuple[str, list[Step]])


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
    """The other side of `give_folder`. strict: each file must be what was announced: the agent stands still.

    TransferError, and then nothing was changed (unless what is there can't be replaced: see the host's log).
    """
    staged = folder.parent / f"{ASIDE}{uuid.uuid4().hex}"
    listed = False
    try:
        await trio.to_thread.run_sync(partial(folder.mkdir, parents=True, exist_ok=True))
        await trio.to_thread.run_sync(staged.mkdir)
        await _send_survey(frames, await trio.to_thread.run_sync(survey, folder))
        steps, size = await _take_all(folder, staged, frames, strict=strict)
        await trio.to_thread.run_sync(_list_steps, folder, staged, steps)
        listed = True
        await trio.to_thread.run_sync(_put_all, folder, staged, steps)
        listed = False
    except (OSError, TransferError) as error:
        await frames.send("refused", str(error))
        raise TransferError(f"the data folder can't be taken: {error}", where=str(folder)) from None
    finally:
        if not listed:  # else it is tried again at the next start
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(remove_tree, staged)
    moved = Moved(sum(step.kind != GONE for step in steps), size)
    await frames.send("taken", moved.files, moved.bytes)
    return moved


def finish_folders(data: Path) -> list[str]:
    """Carry out what a host that died had begun to; the names of these folders. What had not come whole is removed."""
    finished = []
    for staged in sorted(data.glob(f"{ASIDE}*")):
        try:
            with suppress(FileNotFoundError):
                name, steps = _LIST.decode((staged / STEPS).read_bytes())
                _put_all(_inside(data, name), staged, steps)
                finished.append(name)
            remove_tree(staged)
        except (OSError, TransferError, msgspec.DecodeError) as error:
            log.warning("%s: data that came from another host can't be put in place: %s", staged, error)
    return finished


async def _take_all(folder: Path, staged: Path, frames: Frames, *, strict: bool) -> tuple[list[Step], int]:
    """What is to be done in the folder, and the bytes of what came; the n-th step's file is kept under that number."""
    steps: list[Step] = []
    leaves: set[str] = set()  # what is no folder: nothing can be below it
    size = 0
    while True:
        said, *about = await frames.receive()
        match said, about:
            case "done", []:
                return steps, size
            case "gone", [str(relative)]:
                step = Step(GONE, relative)
            case "entry", [str(relative), str(kind), int(mode), str(what)]:
                step = Step(kind, relative, mode, what)
            case _:
                raise WireError(f"{said!r} is no message about a folder")
        _inside(folder, step.path)
        if any(str(parent) in leaves for parent in PurePosixPath(step.path).parents):
            raise TransferError(f"{step.path!r} is below what is no folder")
        if step.kind == "file":
            file = staged / str(len(steps))
            size += await _take_file(file, frames, step.mode)
            if strict and await trio.to_thread.run_sync(sha256_of, file) != step.what:
                raise TransferError(f"the checksum of {step.path} is wrong")
        if step.kind in ("file", "link"):
            leaves.add(step.path)
        steps.append(step)
        if len(steps) > 2 * MAX_FILES:
            raise TransferError(f"more than {2 * MAX_FILES} changes to a data folder")


def _list_steps(folder: Path, staged: Path, steps: list[Step]) -> None:
    """Once the list is on the disk it will be done, by whoever starts here next if not by us."""
    part = staged / f"{STEPS}.part"
    with open(part, "wb") as file:
        file.write(msgspec.msgpack.encode((folder.name, steps)))
        file.flush()
        os.fsync(file.fileno())
    part.rename(staged / STEPS)
    sync_folder(staged)


def _put_all(folder: Path, staged: Path, steps: list[Step]) -> None:
    """Each step can be done again."""
    for number, step in enumerate(steps):
        target = _inside(folder, step.path)
        if step.kind == GONE:
            _remove(target)
        elif step.kind != "file" or (staged / str(number)).exists():
            _put(target, staged / str(number), step.kind, step.mode, step.what)


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
