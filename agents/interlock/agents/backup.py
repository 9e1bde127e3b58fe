"""Backups: timestamped folders with a manifest of sha256 sums, which count only once they were read back.

`FOLDER/20250131T235959.123456Z/` holds the parts under their names, and `manifest.json`. A folder with another kind of
name is not a backup: it was not finished.
"""

from __future__ import annotations

import os
import re
import stat
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import msgspec

from interlock.agents.trees import (
    ASIDE,
    Damaged,
    StorageError,
    copy_file,
    entries,
    put_in_place,
    remove_tree,
    sha256_of,
    sync_folder,
    sync_folders,
    write_file,
)
from interlock.broker.errors import ConfigError

MANIFEST = "manifest.json"
FORMAT = 1  # of manifest.json
LEFTOVER_S = 3600.0  # an unfinished backup older than this was left by a crash; no backup takes so long
_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z(-\d+)?")


class BackupFile(msgspec.Struct, frozen=True):
    size: int  # bytes
    sha256: str
    mode: int  # permission bits


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a backup holds. Paths are relative, with slashes, and begin with the name of a part."""

    format: int
    made: float  # seconds since 1970
    parts: list[str]
    files: dict[str, BackupFile]
    folders: list[str]
    links: dict[str, str]


@dataclass(frozen=True)
class Backup:
    path: Path
    manifest: Manifest


def make_backup(folder: Path, parts: Mapping[str, bytes | Path], *, now: float, keep: int) -> Backup:
    """Back up `parts` (content, or a file or folder to copy) and verify it; then keep only the newest `keep`.

    `now` in seconds since 1970. What is copied should not change meanwhile: a change is an error. StorageError if it
    can't be written or a part is not there, Damaged if it reads back differently; then there is no backup.
    """
    for name in parts:
        _check_part(name)
    aside = folder / f"{ASIDE}{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.mkdir(mode=0o700)
        try:
            manifest = _fill(aside, parts, now)
            write_file(aside / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest, order="sorted")))
            sync_folders(aside)
            verify_backup(aside)
            path = folder / _free_name(folder, now)
            aside.rename(path)
        except BaseException:
            remove_tree(aside)
            raise
        sync_folder(folder)
        _prune(folder, path, keep)
    except OSError as error:
        raise StorageError(
            f"the backup failed: {error.strerror or error}",
            where=str(error.filename or folder),
            hint="check the permissions and the free space",
        ) from None
    return Backup(path, manifest)


def verify_backup(path: Path) -> Manifest:
    """Read all of a backup back. Damaged says which file is changed or missing."""
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
        missing = {*manifest.files, *manifest.folders, *manifest.links}
        for relative, entry, status in entries(path):
            if relative == MANIFEST:
                continue
            problem = _problem(manifest, relative, entry, status)
            if problem:
                raise Damaged(f"{relative} {problem}", where=f"backup {path}", hint="use an older backup")
            missing.discard(relative)
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise Damaged(f"can't be read: {error}", where=f"backup {path}", hint="use an older backup") from None
    if missing:
        raise Damaged(f"{min(missing)} is missing", where=f"backup {path}", hint="use an older backup")
    return manifest


def list_backups(folder: Path) -> list[Path]:
    """The finished backups, newest first. They are not verified here."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_age, reverse=True)


def restore_backup(path: Path, target: Path, *, part: str = "") -> Manifest:
    """Verify a backup, then put its parts into the folder `target`, or one `part` (file or folder) as `target`.

    What was at `target` is replaced as a whole, in one step. Damaged: nothing was changed. Whoever uses the target must
    be stopped before.
    """
    manifest = verify_backup(path)
    if part and part not in manifest.parts:
        raise ConfigError(
            f"the backup has no part {part!r}", where=str(path), hint=f"it has: {', '.join(manifest.parts) or 'none'}"
        )
    target = target.resolve()
    aside = target.parent / f"{ASIDE}{uuid.uuid4().hex}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _copy_out(path, aside, manifest, part)
            old = put_in_place(aside, target)
        except BaseException:
            remove_tree(aside)
            raise
        if old is not None:
            remove_tree(old)
    except OSError as error:
        raise StorageError(
            f"can't be restored: {error.strerror or error}",
            where=str(error.filename or target),
            hint="check the permissions and the free space",
        ) from None
    return manifest


def _check_part(name: str) -> None:
    path = PurePosixPath(name)
    plain = name == path.as_posix() and not path.is_absolute() and ".." not in path.parts and path.parts
    if not plain or name == MANIFEST or name.startswith(ASIDE):
        raise ConfigError(f"{name!r} can't name a part of a backup", where="backup", hint="use a relative path")


def _fill(aside: Path, parts: Mapping[str, bytes | Path], now: float) -> Manifest:
    files: dict[str, BackupFile] = {}
    links: dict[str, str] = {}

    def add(target: Path, source: Path, status: os.stat_result) -> None:
        relative = target.relative_to(aside).as_posix()
        if stat.S_ISLNK(status.st_mode):
            links[relative] = os.readlink(source)
            target.symlink_to(links[relative])
        elif stat.S_ISDIR(status.st_mode):
            target.mkdir(parents=True, exist_ok=True)
        elif stat.S_ISREG(status.st_mode):
            mode = stat.S_IMODE(status.st_mode)
            # readable to the owner, so that it can be read back
            digest = copy_file(source, target, mode | stat.S_IRUSR)
            after = source.stat()
            if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
                raise StorageError(
                    "it was changed while it was backed up", where=str(source), hint="stop what writes it, or try again"
                )
            files[relative] = BackupFile(status.st_size, digest, mode)

    for name, part in sorted(parts.items()):
        target = aside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(part, bytes):
            write_file(target, part)
            files[name] = BackupFile(len(part), sha256_of(target), 0o644)
        else:
            root = part.resolve()
            add(target, root, root.stat())
            for relative, path, status in entries(root) if root.is_dir() else ():
                add(target / relative, path, status)
    folders = [relative for relative, _, status in entries(aside) if stat.S_ISDIR(status.st_mode)]
    return Manifest(
        format=FORMAT, made=now, parts=sorted(parts), files=dict(sorted(files.items())), folders=folders, links=links
    )


def _problem(manifest: Manifest, relative: str, path: Path, status: os.stat_result) -> str:
    if relative in manifest.files:
        expected = manifest.files[relative]
        if not stat.S_ISREG(status.st_mode):
            return "was replaced by something else"
        if status.st_size != expected.size or sha256_of(path) != expected.sha256:
            return "was changed"
    elif relative in manifest.links:
        if not stat.S_ISLNK(status.st_mode) or os.readlink(path) != manifest.links[relative]:
            return "points elsewhere"
    elif relative not in manifest.folders or not stat.S_ISDIR(status.st_mode):
        return "is not of this backup"
    return ""


def _copy_out(path: Path, aside: Path, manifest: Manifest, part: str) -> None:
    """Copy a backup, or one part of it, to `aside`, which does not exist yet."""

    def goal_of(relative: str) -> Path | None:
        if not part:
            return aside / relative
        if relative == part:
            return aside
        return aside / relative[len(part) + 1 :] if relative.startswith(f"{part}/") else None

    if not part:
        aside.mkdir()
    for folder in manifest.folders:
        if (goal := goal_of(folder)) is not None:
            goal.mkdir()
    for relative, file in manifest.files.items():
        if (goal := goal_of(relative)) is not None and copy_file(path / relative, goal, file.mode) != file.sha256:
            raise Damaged(f"{relative} reads differently each time", where=f"backup {path}", hint="use an older backup")
    for relative, link in manifest.links.items():
        if (goal := goal_of(relative)) is not None:
            goal.symlink_to(link)
    if aside.is_dir():
        sync_folders(aside)


def _free_name(folder: Path, now: float) -> str:
    moment = datetime.fromtimestamp(now, UTC)
    name = moment.strftime("%Y%m%dT%H%M%S.%fZ")
    number = 1
    while (folder / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return name if number == 1 else f"{name}-{number}"


def _age(path: Path) -> tuple[str, int]:
    name, _, number = path.name.partition("-")
    return name, int(number or 1)


def _prune(folder: Path, made: Path, keep: int) -> None:
    """Remove what is older; never the one just made, wherever a clock that was set back puts it."""
    others = [path for path in list_backups(folder) if path != made]
    for path in others[max(keep - 1, 0) :]:
        # under its own name it is a whole backup or none
        path.rename(folder / f"{ASIDE}{path.name}")
        remove_tree(folder / f"{ASIDE}{path.name}")
    for aside in folder.glob(f"{ASIDE}*"):
        if aside.stat().st_mtime < time.time() - LEFTOVER_S:
            remove_tree(aside)
