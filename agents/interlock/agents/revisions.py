"""The revision store: what a host runs, kept under the sha256 of what it is.

A digest covers the canonical specification (every field of a RevisionConfig but the path of its source, and what it
needs of the machine) and the manifest of the code: path, executable or not, and sha256 of each file, and each link. So
the same content has the same digest and is kept once, and a digest says all about what will run.
`FOLDER/DIGEST/revision.json` holds both, `FOLDER/DIGEST/source/` the code, read-only; instances run there.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from interlock.agents.trees import (
    ASIDE,
    Damaged,
    StorageError,
    copy_file,
    entries,
    is_executable,
    put_in_place,
    remove_tree,
    sha256_of,
    sync_folder,
    sync_folders,
    write_file,
)
from interlock.broker.config import NeedsConfig, RevisionConfig
from interlock.broker.errors import ConfigError, Refused

MAX_SOURCE_BYTES = 512 << 20  # of code; models and data sets belong beside it, named in the configuration
MAX_SOURCE_FILES = 20_000  # each costs a write to the disk that is waited for
IGNORED = {
    "__pycache__", ".git", ".hg", ".svn", ".venv", ".tox", ".nox", ".mypy_cache", ".ruff_cache", ".pytest_cache",
    ".interlock",
}  # fmt: skip
FORMAT = 1  # of revision.json
SPECIFICATION = "revision.json"
SOURCE = "source"


class Revision(msgspec.Struct, frozen=True):
    """A recorded revision of an agent. `folder`: its code, read-only, where its instances run."""

    agent: str
    name: str
    digest: str
    folder: Path
    config: RevisionConfig  # as recorded; its source is `folder`


class _File(msgspec.Struct, frozen=True, array_like=True):
    path: str
    executable: bool
    sha256: str


class _Link(msgspec.Struct, frozen=True, array_like=True):
    path: str
    target: str


class _Recorded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """revision.json. Its digest is the sha256 of the file."""

    format: int
    spec: RevisionConfig
    files: list[_File]
    folders: list[str]  # the empty ones too: a program may expect them
    links: list[_Link]


def check_name_free(name: str, digest: str, known: dict[str, str]) -> None:
    """Refused if `name` was once permanent with other content: a name that means two things can't be rolled back to."""
    if known.get(name, digest) != digest:
        raise Refused(
            f"revision {name!r} was committed before with other content ({known[name][:12]}, now {digest[:12]})",
            hint="give the changed code a new revision name",
        )


class RevisionStore:
    """The store in one folder. Methods block; each may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._lock = threading.Lock()

    def record(self, agent: str, name: str, config: RevisionConfig, source: Path | None) -> Revision:
        """Keep a revision: copied, synced, read back, then renamed into place.

        `source` None: it has no code of its own. ConfigError if its code can't be recorded, StorageError if a disk
        fails.
        """
        with self._lock:
            try:
                recorded, found = self._survey(agent, name, config, source)
                text = _canonical(recorded)
                digest = hashlib.sha256(text).hexdigest()
                if self._problems(digest):
                    self._copy(digest, text, recorded, found, where=f"{agent} {name}: {source}")
            except OSError as error:
                raise StorageError(
                    f"can't be recorded: {error.strerror or error}",
                    where=f"{agent} {name}: {error.filename or source}",
                    hint=f"check the permissions, and the free space of {self.folder}",
                ) from None
        return self.get(agent, name, digest)

    def get(self, agent: str, name: str, digest: str) -> Revision:
        """A recorded revision by its digest; Damaged if it is not there or its specification was changed."""
        return Revision(agent, name, digest, self.folder / digest / SOURCE, self.spec_of(digest))

    def spec_of(self, digest: str) -> RevisionConfig:
        """The specification as recorded, its source being the folder in the store. Damaged."""
        spec = self._read(digest).spec
        return msgspec.structs.replace(spec, source=str(self.folder / digest / SOURCE))

    def verify(self, digest: str) -> list[str]:
        """Read everything back: what is changed, missing or too much, in words; empty if it is as recorded."""
        with self._lock:
            return self._problems(digest)

    def digests(self) -> set[str]:
        """All that is in the store."""
        if not self.folder.is_dir():
            return set()
        return {path.name for path in self.folder.iterdir() if not path.name.startswith(".")}

    def collect(self, keep: set[str]) -> list[str]:
        """Remove all but these; the removed digests. Name those that run or may be rolled back to."""
        with self._lock:
            try:
                removed = sorted(self.digests() - keep)
                for digest in removed:
                    aside = self.folder / f"{ASIDE}{uuid.uuid4().hex}"  # never half a revision under its digest
                    (self.folder / digest).rename(aside)
                if self.folder.is_dir():
                    sync_folder(self.folder)
                    for aside in self.folder.glob(f"{ASIDE}*"):
                        remove_tree(aside)
            except OSError as error:
                raise StorageError(
                    f"can't be removed: {error.strerror or error}", where=str(error.filename or self.folder)
                ) from None
        return removed

    # --- recording

    def _survey(
        self, agent: str, name: str, config: RevisionConfig, source: Path | None
    ) -> tuple[_Recorded, dict[str, Path]]:
        """What there is to record, and where its files are now."""
        where = f"{agent} {name}"
        files: list[_File] = []
        folders: list[str] = []
        links: list[_Link] = []
        found: dict[str, Path] = {}
        size = 0
        root = (source or Path()).resolve()
        if source is not None and not root.is_dir():
            raise ConfigError("there is no such folder", where=f"{where}: source {source}")
        for relative, path, status in self._walk(root) if source is not None else ():
            _check_path(relative, where)
            if stat.S_ISLNK(status.st_mode):
                links.append(_Link(relative, _inside(path, root, where)))
            elif stat.S_ISDIR(status.st_mode):
                folders.append(relative)
            elif stat.S_ISREG(status.st_mode):
                size += status.st_size
                found[relative] = path
                if size > MAX_SOURCE_BYTES or len(found) > MAX_SOURCE_FILES:
                    raise _too_large(where, root, relative)
                files.append(_File(relative, is_executable(status), sha256_of(path)))
            elif not stat.S_ISSOCK(status.st_mode):  # a socket is what a running program left, not code
                raise ConfigError(
                    "is neither file, folder nor link", where=f"{where}: {path}", hint="move it elsewhere"
                )
        spec = msgspec.structs.replace(config, source="", needs=NeedsConfig())  # `needs` says nothing of what it is
        files.sort(key=lambda file: file.path)
        links.sort(key=lambda link: link.path)
        return _Recorded(FORMAT, spec, files, sorted(folders), links), found

    def _walk(self, root: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
        """Everything below but what is ignored: environments, caches, version control, and the state of Interlock."""
        pending = [root]
        while pending:
            with os.scandir(pending.pop()) as scan:
                inside = list(scan)
            for entry in inside:
                path = Path(entry.path)
                folder = entry.is_dir(follow_symlinks=False)
                if entry.name in IGNORED or (not folder and entry.name.endswith((".pyc", ".pyo"))):
                    continue
                if folder and ((path / "pyvenv.cfg").exists() or path in (self.folder, *self.folder.parents)):
                    continue
                if folder:
                    pending.append(path)
                yield path.relative_to(root).as_posix(), path, entry.stat(follow_symlinks=False)

    def _copy(self, digest: str, text: bytes, recorded: _Recorded, found: dict[str, Path], *, where: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f"{ASIDE}{uuid.uuid4().hex}"
        code = aside / SOURCE
        try:
            code.mkdir(parents=True)
            for folder in recorded.folders:
                (code / folder).mkdir()
            for file in recorded.files:
                if copy_file(found[file.path], code / file.path, _mode(file)) != file.sha256:
                    raise ConfigError(
                        f"{file.path} was changed while it was recorded", where=where, hint="try again when it is still"
                    )
            for link in recorded.links:
                (code / link.path).symlink_to(link.target)
            write_file(aside / SPECIFICATION, text, 0o444)
            sync_folders(aside)
            problems = _compare(code, recorded)
            if problems:
                raise Damaged(f"what was written reads back differently: {problems[0]}", where=str(aside))
            for folder_path, _, _ in os.walk(aside):
                os.chmod(folder_path, 0o555)
        except BaseException:
            remove_tree(aside)
            raise
        put_in_place(aside, self.folder / digest)  # a damaged one before it may still run: `collect` removes it

    # --- reading back

    def _read(self, digest: str) -> _Recorded:
        path = self.folder / digest / SPECIFICATION
        try:
            text = path.read_bytes()
            if hashlib.sha256(text).hexdigest() != digest:
                raise Damaged("was changed since it was recorded", where=str(path), hint="record the revision again")
            return msgspec.json.decode(text, type=_Recorded)
        except FileNotFoundError:
            raise Damaged(
                "there is no such revision in the store", where=str(path.parent), hint="record the revision again"
            ) from None
        except (OSError, msgspec.MsgspecError, RecursionError) as error:
            raise Damaged(f"can't be read: {error}", where=str(path), hint="record the revision again") from None

    def _problems(self, digest: str) -> list[str]:
        try:
            return _compare(self.folder / digest / SOURCE, self._read(digest))
        except Damaged as error:
            return [str(error)]
        except OSError as error:
            return [f"{error.filename} can't be read: {error.strerror}"]


def _compare(code: Path, recorded: _Recorded) -> list[str]:
    """How a folder differs from what was recorded."""
    problems: list[str] = []
    files = {file.path: file for file in recorded.files}
    links = {link.path: link.target for link in recorded.links}
    missing = {*files, *links, *recorded.folders}
    for relative, path, status in entries(code):
        if relative not in missing:
            problems.append(f"{relative} is not of the revision")
            continue
        missing.discard(relative)
        if stat.S_ISLNK(status.st_mode):
            if links.get(relative) != os.readlink(path):
                problems.append(f"{relative} points elsewhere")
        elif stat.S_ISREG(status.st_mode) and relative in files:
            if sha256_of(path) != files[relative].sha256:
                problems.append(f"{relative} was changed")
            elif is_executable(status) != files[relative].executable:
                problems.append(f"{relative} has another mode")
        elif relative in files or relative in links:
            problems.append(f"{relative} was replaced by something else")
    return problems + [f"{relative} is missing" for relative in sorted(missing)]


def _canonical(recorded: _Recorded) -> bytes:
    tree = msgspec.to_builtins(recorded)
    del tree["spec"]["needs"]
    if tree["spec"]["state"] is None:
        del tree["spec"]["state"]  # a revision that has none is what it was before there was such a key
    return msgspec.json.encode(tree, order="sorted")


def _mode(file: _File) -> int:
    return 0o555 if file.executable else 0o444


def _check_path(relative: str, where: str) -> None:
    try:
        relative.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the file name {relative!r} is not UTF-8", where=where, hint="rename the file") from None


def _inside(link: Path, root: Path, where: str) -> str:
    """A link's target, relative; ConfigError if it leads out of the source."""
    target = os.readlink(link)
    if os.path.isabs(target):
        target = os.path.relpath(Path(target).parent.resolve() / Path(target).name, link.parent)
    try:
        end = link.resolve()
    except (OSError, RuntimeError):  # a loop of links
        end = Path("/")
    if end != root and root not in end.parents:
        raise ConfigError(
            f"the link points outside the source, to {os.readlink(link)}",
            where=f"{where}: {link}",
            hint="copy the file there, or name it in the configuration: a revision must hold all of its code",
        )
    return target


def _too_large(where: str, root: Path, relative: str) -> ConfigError:
    return ConfigError(
        f"the source is larger than {MAX_SOURCE_BYTES >> 20} MiB or {MAX_SOURCE_FILES} files (at {relative})",
        where=f"{where}: source {root}",
        hint="keep models, data and logs outside the source folder and name them in the configuration",
    )
