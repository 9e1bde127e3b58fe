"""The host's journal: the only module of the host that uses sqlite3; so agents' databases are copied here, too.

One file, written before the host acts: `synchronous=FULL` means that what a method wrote is on the disk when it
returns. After a `kill -9` it holds the last transaction that was finished, whole.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import msgspec

from interlock.agents.slot_io import Row, State
from interlock.agents.trees import StorageError, sha256_of
from interlock.broker.errors import LogError, Refused

FORMAT = 2  # user_version of the file
DONE_KEPT = 10_000  # results of commands, the oldest go first; a command is not repeated after its deadline
ENTRIES_KEPT = 50_000  # lines of the journal itself
COPY_PAGES = 4096  # of a database copied before the time is looked at: some 16 MiB
BUSY_MS = 5000  # a backup tool or a reader may hold the file for so long

_SCHEMA = """
CREATE TABLE slots (
    agent TEXT PRIMARY KEY, permanent TEXT NOT NULL, permanent_digest TEXT NOT NULL,
    candidate TEXT, candidate_digest TEXT, state TEXT NOT NULL, migration TEXT, epoch INTEGER NOT NULL,
    place TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE names (agent TEXT NOT NULL, name TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (agent, name)) STRICT;
CREATE TABLE done (number INTEGER PRIMARY KEY AUTOINCREMENT, command TEXT UNIQUE NOT NULL, result BLOB NOT NULL) STRICT;
CREATE TABLE marks (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE journal (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, agent TEXT NOT NULL, entry TEXT NOT NULL
) STRICT;
CREATE INDEX journal_agent ON journal (agent, seq);
"""


class Entry(msgspec.Struct, frozen=True):
    """One line of the journal: what the host was about to do. `time` in seconds since 1970."""

    seq: int
    time: float
    agent: str
    entry: str


class Journal:
    """Methods block until the disk has it; each may be called from any thread. Made by `Journal.open`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or make the file. LogError if it is damaged, newer than this program, or can't be written."""
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=BUSY_MS / 1000)
            try:
                _prepare(path, connection)
            except BaseException:
                connection.close()
                raise
        return cls(path, connection)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # --- slots

    def slot(self, agent: str) -> Row | None:
        """The slot's row as last written; None if there never was one."""
        with self._reading() as db:
            found = db.execute(f"SELECT {_ROW} FROM slots WHERE agent = ?", (agent,)).fetchone()
        return _row(found) if found else None

    def slots(self) -> dict[str, Row]:
        """All of them by agent."""
        with self._reading() as db:
            found = db.execute(f"SELECT {_ROW} FROM slots ORDER BY agent").fetchall()
        return {values[0]: _row(values) for values in found}

    def save_slot(
        self, row: Row, entry: str, *, done: tuple[str, bytes] | None = None, at: float | None = None
    ) -> None:
        """Write a slot and why; with it `done`, a command's id and result, in one transaction.

        The name of its permanent revision is bound to the digest for good: Refused, and nothing written, if it
        was bound to another. `at` in seconds since 1970, now if left out.
        """
        with self._writing() as db:
            bound = db.execute(
                "SELECT digest FROM names WHERE agent = ? AND name = ?", (row.agent, row.permanent)
            ).fetchone()
            if bound and bound[0] != row.permanent_digest:
                raise Refused(
                    f"revision {row.permanent!r} of {row.agent} was committed before with other content",
                    where=str(self.path),
                    hint="give the changed code a new revision name",
                )
            db.execute("INSERT OR IGNORE INTO names VALUES (?, ?, ?)", (row.agent, row.permanent, row.permanent_digest))
            db.execute(
                f"INSERT OR REPLACE INTO slots ({_ROW}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.agent,
                    row.permanent,
                    row.permanent_digest,
                    row.candidate,
                    row.candidate_digest,
                    row.state.value,
                    row.migration,
                    row.epoch,
                    row.place,
                ),
            )
            _write_entry(db, row.agent, entry, at)
            if done is not None:
                _write_done(db, *done)

    def drop_slot(self, agent: str, entry: str) -> None:
        """Forget a slot: its agent is another host's."""
        with self._writing() as db:
            db.execute("DELETE FROM slots WHERE agent = ?", (agent,))
            _write_entry(db, agent, entry, None)

    def names(self, agent: str) -> dict[str, str]:
        """The digest of each revision name that was ever permanent."""
        with self._reading() as db:
            return dict(db.execute("SELECT name, digest FROM names WHERE agent = ?", (agent,)).fetchall())

    # --- commands, marks, entries

    def remember_done(self, command: str, result: bytes) -> None:
        """Keep a command's result, so that the same command is answered from here and not done again."""
        with self._writing() as db:
            _write_done(db, command, result)

    def remember_refused(self, command: str, refusal: bytes) -> None:
        """Keep a command's refusal as its result, unless it has one: it is not done later, when it would fit."""
        with self._writing() as db:
            if db.execute("SELECT 1 FROM done WHERE command = ?", (command,)).fetchone() is None:
                _write_done(db, command, refusal)

    def done(self, command: str) -> bytes | None:
        """The result of a command that was done, or its refusal; None if there is none, or it is older than the newest
        DONE_KEPT.
        """
        with self._reading() as db:
            found = db.execute("SELECT result FROM done WHERE command = ?", (command,)).fetchone()
        return found[0] if found else None

    def set_mark(self, key: str, value: str | int) -> None:
        """Keep a value under a name, such as the position of an event feed."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (key, json.dumps(value)))

    def mark(self, key: str) -> str | int | None:
        with self._reading() as db:
            found = db.execute("SELECT value FROM marks WHERE key = ?", (key,)).fetchone()
        value: str | int | None = json.loads(found[0]) if found else None
        return value

    def note(self, agent: str, entry: str, *, at: float | None = None) -> None:
        """Write a line that changes no slot."""
        with self._writing() as db:
            _write_entry(db, agent, entry, at)

    def entries(self, agent: str, *, newest: int = 1000) -> list[Entry]:
        """The newest lines about an agent, in the order they were written."""
        with self._reading() as db:
            found = db.execute(
                "SELECT seq, time, agent, entry FROM journal WHERE agent = ? ORDER BY seq DESC LIMIT ?", (agent, newest)
            ).fetchall()
        return [Entry(*values) for values in reversed(found)]

    def snapshot(self) -> bytes:
        """The whole database at one moment, as the bytes of a file: for a backup."""
        with self._lock, _explained(self.path):
            copy = sqlite3.connect(":memory:")
            try:
                self._connection.backup(copy)
                return bytes(copy.serialize())
            finally:
                copy.close()

    # --- transactions

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _explained(self.path):
            yield self._connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


_ROW = "agent, permanent, permanent_digest, candidate, candidate_digest, state, migration, epoch, place"


def _row(values: tuple[str, str, str, str | None, str | None, str, str | None, int, str]) -> Row:
    agent, permanent, permanent_digest, candidate, candidate_digest, state, migration, epoch, place = values
    try:
        known = State(state)
    except ValueError:
        known = State.ROLLING_BACK  # of another version of this program: what nobody knows is undone
    return Row(agent, permanent, permanent_digest, candidate, candidate_digest, known, migration, epoch, place)


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > FORMAT:  # before anything is set or made in the file
        raise LogError(
            f"was written by a newer version of Interlock (format {version}, this one knows {FORMAT})",
            where=str(path),
            hint="start the newer version again; nothing was changed",
        )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")  # says now, not at the first slot change, that the file can't be written
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
    elif version == 1:  # agents did not move then
        connection.execute("ALTER TABLE slots ADD COLUMN place TEXT NOT NULL DEFAULT ''")
    if version < FORMAT:
        connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.execute("COMMIT")
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)


def _write_entry(db: sqlite3.Connection, agent: str, entry: str, at: float | None) -> None:
    moment = time.time() if at is None else at
    number = db.execute("INSERT INTO journal (time, agent, entry) VALUES (?, ?, ?)", (moment, agent, entry)).lastrowid
    db.execute("DELETE FROM journal WHERE seq <= ?", ((number or 0) - ENTRIES_KEPT,))


def _write_done(db: sqlite3.Connection, command: str, result: bytes) -> None:
    number = db.execute("INSERT OR REPLACE INTO done (command, result) VALUES (?, ?)", (command, result)).lastrowid
    db.execute("DELETE FROM done WHERE number <= ?", ((number or 0) - DONE_KEPT,))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's and the system's errors in an operator's words."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise LogError(
            f"the host's journal can't be used: {error}",
            where=str(path),
            hint="check that the folder can be written, the disk is not full, and no other program holds the file",
        ) from None
    except (
        sqlite3.DatabaseError,
        ValueError,
        TypeError,
        OverflowError,
    ) as error:  # of a text that is no UTF-8, for one
        raise LogError(
            f"the host's journal is damaged: {' '.join(str(error).split())}",
            where=str(path),
            hint="move it and its -wal away; the host then begins with what `serve` names, see README.md",
        ) from None
    except sqlite3.Error as error:
        raise LogError(f"the host's journal can't be used: {error}", where=str(path)) from None
    except OSError as error:
        raise LogError(
            f"the host's journal can't be used: {error.strerror or error}",
            where=str(error.filename or path),
            hint="check the permissions and the free space",
        ) from None


def copy_database(source: Path, target: Path, *, timeout_s: float) -> tuple[int, str]:
    """Copy a SQLite database that may be in use, as it is at one moment; (bytes, sha256) of the copy, which is synced.

    StorageError if it is damaged, or locked for `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s

    def watch(*_: int) -> None:
        if time.monotonic() > deadline:
            raise StorageError(
                f"a database is locked for more than {timeout_s:g} s", where=str(source), hint="stop what writes it"
            )

    try:
        with (
            closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True, timeout=timeout_s)) as db,
            closing(sqlite3.connect(target)) as copy,
        ):
            db.backup(copy, pages=COPY_PAGES, progress=watch)
    except sqlite3.Error as error:
        raise StorageError(f"a database can't be copied: {error}", where=str(source)) from None
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return target.stat().st_size, sha256_of(target)
