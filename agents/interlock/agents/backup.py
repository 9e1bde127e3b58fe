"""Backups: timestamped folders with a manifest of sha256 sums, which count only once they were read back.

`FOLDER/20250131T235959.123456Z/` holds the parts under their names, and `manifest.json`. A folder with another kind of
name is not a backup: it was not finished.

A folder that a program may be writing (`Live`) is copied until it stood still meanwhile, a bounded number of times.
Databases of SQLite in it are copied by SQLite itself, whole at one moment, and need not stand still.
"""

from __future__ import annotations

import os
import re
import stat
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import msgspec

from interlock.agents.journal import copy_database
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
LIVE_TRIES = 3  # copies of a folder that is written meanwhile, before it is given up
LIVE_PAUSE_S = 0.3  # between them: whoever writes a few files at once has done so by then
DATABASE_S = 20.0  # for a database to be copied; longer means that a writer has locked it
DATABASE_MAGIC = b"SQLite format 3\0"
DATABASE_BESIDE = ("-wal", "-shm", "-journal")  # files of SQLite's own beside a database; its copy has what is in them
LEFTOVER_S = 3600.0  # an unfinished backup older than this was left by a crash; no backup takes so long
_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z(-\d+)?")


class BackupFile(msgspec.Struct, frozen=True):
    size: int  # bytes
    sha256: str
    mode: int  # permission bits


class About(msgspec.Struct, frozen=True, kw_only=True):
    """Of what the backup is. `levels`: of configuration, code, state and host those that are in it."""

    host: str = ""
    agent: str = ""
    revision: str = ""
    digest: str = ""
    levels: list[str] = []


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a backup holds. Paths are relative, with slashes, and begin with the name of a part."""

    format: int
    made: float  # seconds since 1970
    parts: list[str]
    files: dict[str, BackupFile]
    folders: list[str]
    links: dict[str, str]
    about: About = About()
    newest: float = 0.0  # seconds since 1970: when the newest file of a `Live` part was last written


class Live(msgspec.Struct, frozen=True):
    """A folder to copy that a program may be writing. It is empty in the backup if it is not there."""

    path: Path


class Changed(StorageError):
    """What was being copied was written meanwhile."""


Part = bytes | Path | Live


class Backup(msgspec.Struct, frozen=True):
    path: Path
    manifest: Manifest


def make_backup(
    folder: Path, parts: Mapping[str, Part], *, now: float, keep: int, about: About | None = None
) -> Backup:
    """Back up `parts` (content, or a file or folder to copy) and verify it; then keep only the newest `keep`.

    `now` in seconds since 1970. What is copied should not change meanwhile: a change is an error, unless the part is
    `Live`. StorageError if it can't be written or a part is not there, Damaged if it reads back differently; then
    there is no backup.
    """
    for name in parts:
        _check_part(name)
    aside = folder / f"{ASIDE}{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.mkdir(mode=0o700)
        try:
            manifest = _fill(aside, parts, now, about or About())
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


def copy_live(source: Path, target: Path) -> None:
    """Copy a folder that a program may be writing to a new place, as it is at one moment. Changed, StorageError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _Filling(target.parent).add_live(target.name, source.resolve())


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


def restore_backup(path: Path, target: Path, *, part: str = "", keep_old: Path | None = None) -> Manifest:
    """Verify a backup, then put its parts into the folder `target`, or one `part` (file or folder) as `target`.

    What was at `target` is replaced as a whole, in one step, and moved to `keep_old` if that is given. Damaged: nothing
    was changed. Whoever uses the target must be stopped before.
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
        if old is not None and keep_old is not None:
            keep_old.parent.mkdir(parents=True, exist_ok=True)
            old.rename(keep_old)
        elif old is not None:
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


class _Filling:
    """A backup folder that is being filled, and what its manifest will say."""

    def __init__(self, aside: Path) -> None:
        self.aside = aside
        self.files: dict[str, BackupFile] = {}
        self.links: dict[str, str] = {}
        self.newest = 0.0

    def add(self, target: Path, source: Path, status: os.stat_result) -> None:
        relative = target.relative_to(self.aside).as_posix()
        if stat.S_ISLNK(status.st_mode):
            self.links[relative] = os.readlink(source)
            target.symlink_to(self.links[relative])
        elif stat.S_ISDIR(status.st_mode):
            target.mkdir(parents=True, exist_ok=True)
        elif stat.S_ISREG(status.st_mode):
            mode = stat.S_IMODE(status.st_mode)
            # readable to the owner, so that it can be read back
            digest = copy_file(source, target, mode | stat.S_IRUSR)
            after = source.stat()
            if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
                raise Changed(
                    "it was changed while it was backed up", where=str(source), hint="stop what writes it, or try again"
                )
            self.files[relative] = BackupFile(status.st_size, digest, mode)

    def add_content(self, name: str, content: bytes) -> None:
        write_file(self.aside / name, content)
        self.files[name] = BackupFile(len(content), sha256_of(self.aside / name), 0o644)

    def add_tree(self, name: str, root: Path) -> None:
        self.add(self.aside / name, root, root.stat())
        for relative, path, status in entries(root) if root.is_dir() else ():
            self.add(self.aside / name / relative, path, status)

    def add_live(self, name: str, root: Path) -> None:
        """The folder as it was at one moment: nothing in it was written between the first look and the last."""
        for attempt in range(1, LIVE_TRIES + 1):
            try:
                self._copy_live(name, root)
            except (Changed, FileNotFoundError) as error:
                self._take_back(name)
                if attempt == LIVE_TRIES:
                    where = error.where if isinstance(error, Changed) else str(error.filename or root)
                    raise Changed(
                        f"it was changed while it was backed up, {LIVE_TRIES} times", where=where,
                        hint="let the agent write less often, keep what it writes in a SQLite database, or leave "
                        '"state" out of the backup',
                    ) from None  # fmt: skip
                time.sleep(LIVE_PAUSE_S)
            else:
                return

    def _copy_live(self, name: str, root: Path) -> None:
        target = self.aside / name
        target.mkdir(parents=True, exist_ok=True)
        seen = _survey(root)
        for relative, (path, status) in seen.items():
            if _is_database(path, status):
                size, digest = copy_database(path, target / relative, timeout_s=DATABASE_S)
                self.files[f"{name}/{relative}"] = BackupFile(size, digest, stat.S_IMODE(status.st_mode))
            else:
                self.add(target / relative, path, status)
            if stat.S_ISREG(status.st_mode):
                self.newest = max(self.newest, status.st_mtime)
        now = _survey(root)
        changed = [
            relative
            for relative in sorted({*seen, *now})
            if relative not in seen or relative not in now or _differs(*seen[relative], *now[relative])
        ]
        if changed:
            raise Changed("it was changed while it was backed up", where=str(root / changed[0]))

    def _take_back(self, name: str) -> None:
        remove_tree(self.aside / name)
        self.newest = 0.0
        for kept in (self.files, self.links):
            for relative in [one for one in kept if one.startswith(f"{name}/")]:
                del kept[relative]


def _fill(aside: Path, parts: Mapping[str, Part], now: float, about: About) -> Manifest:
    filling = _Filling(aside)
    for name, part in sorted(parts.items()):
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(part, bytes):
            filling.add_content(name, part)
        elif isinstance(part, Live):
            filling.add_live(name, part.path.resolve())
        else:
            filling.add_tree(name, part.resolve())
    folders = [relative for relative, _, status in entries(aside) if stat.S_ISDIR(status.st_mode)]
    return Manifest(
        format=FORMAT, made=now, parts=sorted(parts), files=dict(sorted(filling.files.items())), folders=folders,
        links=filling.links, about=about, newest=filling.newest,
    )  # fmt: skip


def _survey(root: Path) -> dict[str, tuple[Path, os.stat_result]]:
    """All in a folder that counts for a copy: no sockets, and no files of SQLite's own beside its databases."""
    found = {relative: (path, status) for relative, path, status in entries(root)} if root.is_dir() else {}
    databases = {relative for relative, (path, status) in found.items() if _is_database(path, status)}
    beside = {f"{relative}{end}" for relative in databases for end in DATABASE_BESIDE}
    kinds = (stat.S_ISREG, stat.S_ISDIR, stat.S_ISLNK)
    return {
        relative: (path, status)
        for relative, (path, status) in found.items()
        if relative not in beside and any(kind(status.st_mode) for kind in kinds)
    }


def _is_database(path: Path, status: os.stat_result) -> bool:
    if not stat.S_ISREG(status.st_mode) or status.st_size < len(DATABASE_MAGIC):
        return False
    with open(path, "rb") as file:
        return file.read(len(DATABASE_MAGIC)) == DATABASE_MAGIC


def _differs(path: Path, before: os.stat_result, _: Path, after: os.stat_result) -> bool:
    if stat.S_ISDIR(before.st_mode):
        return not stat.S_ISDIR(after.st_mode)
    if _is_database(path, after):
        return False
    return (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns)


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
