"""Folders and files of the host that are whole or not there: written aside, synced, then renamed into place."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from interlock.broker.errors import InterlockError

CHUNK = 1 << 20  # bytes read at once
ASIDE = ".aside-"  # what is not in place yet, or not any more; anything with this prefix may be removed
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


class StorageError(InterlockError):
    """A folder of the host can't be read or written: a full disk, a missing permission. What was there still is."""


class Damaged(InterlockError):
    """A stored revision or backup is not what was recorded: it was changed, or the disk is failing. It was not used."""


def sha256_of(path: Path) -> str:
    """Of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def copy_file(source: Path, target: Path, mode: int) -> str:
    """Copy to a new file and sync it; the sha256 of what was copied."""
    digest = hashlib.sha256()
    with open(source, "rb") as reading, open(target, "xb") as writing:
        while chunk := reading.read(CHUNK):
            digest.update(chunk)
            writing.write(chunk)
        writing.flush()
        os.fchmod(writing.fileno(), mode)
        os.fsync(writing.fileno())
    return digest.hexdigest()


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a new file and sync it."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(root: Path) -> None:
    """The same for a folder and all below it."""
    for folder, _, _ in os.walk(root):
        sync_folder(Path(folder))


def remove_tree(path: Path) -> None:
    """Remove a folder, read-only ones in it too, or a file; nothing if it is not there."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o700)
    shutil.rmtree(path)


def put_in_place(new: Path, target: Path) -> Path | None:
    """Put `new`, in the same folder, in the place of `target`, in one step; where the old one is now, if there was one.

    Where the file system can't exchange two folders (some of networks), the old one is moved aside first: a crash in
    between leaves it there.
    """
    old: Path | None = None
    if not os.path.lexists(target):
        new.rename(target)
    elif _swap(new, target):
        old = new
    else:
        old = target.parent / f"{ASIDE}old-{target.name}"
        remove_tree(old)
        target.rename(old)
        new.rename(target)
    sync_folder(target.parent)
    return old


def _swap(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    result = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(result == 0)


def entries(root: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """All below a folder, sorted: (relative path with slashes, path, lstat); links are not followed."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(folders + files):
            path = Path(folder) / name
            yield path.relative_to(root).as_posix(), path, path.lstat()


def is_executable(status: os.stat_result) -> bool:
    return bool(status.st_mode & stat.S_IXUSR)
