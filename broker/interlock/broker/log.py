"""The event log: one SQLite file, the only place here that imports sqlite3.

Numbers are 1, 2, 3, ... without a hole. What `append` returned is on disk (WAL, synchronous=FULL: one fsync per call,
so calls take many events at once). Each event is chained to the one before (`chain.py`). `prune` drops what is old: the
file then begins after `floor`, and the chain with the hash of the last event dropped. All methods block: call them in a
thread. One thread may write while another reads.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from interlock.broker import chain, wire
from interlock.broker.chain import Head, Stored, Verdict
from interlock.broker.errors import LogError, WireError
from interlock.broker.facts import FleetSnapshot
from interlock.broker.sequence import matches
from interlock.broker.topics import FLEET_SNAPSHOT, SNAPSHOTS
from interlock.broker.wire import Header

VERSION = 2  # of the tables, in SQLite's user_version. 1: before the chain
BUSY_S = 5.0  # somebody else looks into the file (a backup, an operator's sqlite3): wait for so long
TAIL_EVENTS = 1000  # whose chain is checked when the log is opened: what a power cut could touch, in some 10 ms

_TABLES = (
    """CREATE TABLE events (
  seq INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  topic TEXT NOT NULL,
  logged REAL NOT NULL,
  header BLOB NOT NULL,
  body BLOB NOT NULL,
  hash BLOB NOT NULL
) STRICT""",
    "CREATE INDEX events_of_topic ON events (topic, seq)",
    "CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
)
_MORE_TABLES = (  # what retention leaves behind
    "CREATE TABLE IF NOT EXISTS gone (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE) STRICT",
    "CREATE TABLE IF NOT EXISTS topics (topic TEXT PRIMARY KEY, seq INTEGER NOT NULL) STRICT",
)
PRUNE_EVENTS = 1000  # dropped in one transaction: events that wait for the disk meanwhile wait for some 30 ms
GONE_IDS = 200_000  # of dropped events, kept so that a late repetition is recognised: 20 MB
_STORED = "seq, id, topic, logged, header, body, hash"


class Record(msgspec.Struct, frozen=True):
    """A logged event: its header with seq, prev and logged filled in; `fresh` is False for a repeated id."""

    topic: str
    header: Header
    body: bytes
    fresh: bool = True


class Draft(msgspec.Struct, frozen=True):
    topic: str
    header: Header
    body: bytes


class Excerpt(msgspec.Struct, frozen=True):
    """All matching events up to `through`. `more`: the log goes on after it."""

    records: list[Record]
    through: int
    more: bool
    start: int = 0  # the answer begins only after this number: before it is nothing (any more), or `snapshot`
    snapshot: Record | None = None


class EventLog:
    """The log in `path`, made where there is none. LogError if it can't be opened.

    identity: made with the file; another one means another history. last: the newest number. topics: every topic with
    its last number. All tell of what is on disk. trouble: why nothing can be appended, if so; reading may go on.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.last = 0
        self.topics: dict[str, int] = {}
        self.trouble = "it was opened for reading only" if read_only else ""
        self.floor = 0  # the last event that was dropped
        self._head = Head()
        self._snapshot: _Snapshot | None = None  # the newest
        with self._translated("opened"):
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._connect(read_only)
            try:
                self._refuse_newer()
                if not read_only:
                    self._writer.execute("PRAGMA journal_mode = WAL")
                    self._writer.execute("PRAGMA synchronous = FULL")
                self._prepare(read_only)
                self._reader = self._connect(read_only)
            except BaseException:
                self._writer.close()
                raise
        try:
            with self._translated("read"):
                self.identity = self._about("identity")
                self._refresh()
                self._check_tail()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    @property
    def head(self) -> Head:
        return self._head

    def append(self, drafts: Sequence[Draft], *, now: float) -> list[Record]:
        """All of them, in one transaction; a repeated id gives the record that is there. LogError: none was added."""
        if self.trouble:
            raise LogError(self.trouble, where=str(self.path))
        with self._translated("written"):
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                records, head = self._insert(drafts, now)
                self._writer.execute("COMMIT")
            except sqlite3.Error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                self._refresh()  # a commit that failed late may have happened
                raise
        fresh = [record for record in records if record.fresh]
        self.topics.update((record.topic, record.header.seq) for record in fresh)
        self._head = head
        for record in fresh:
            self._snapshot = _snapshot_of(record.topic, record.header.seq, record.body) or self._snapshot
        self.last = head.seq  # after the topics: a reader in another thread takes them in the opposite order
        return records

    def read(self, after: int, prefixes: Sequence[str], *, limit: int, max_bytes: int) -> Excerpt:
        """What was logged after `after` under any of the prefixes: at most `limit` events and some `max_bytes`."""
        end = self.last
        newest = max((seq for topic, seq in list(self.topics.items()) if matches(topic, prefixes)), default=0)
        if newest <= after:
            return Excerpt([], end, more=False)
        with self._translated("read"):
            self._reader.execute("BEGIN")  # what is dropped meanwhile is still there for this reader
            try:
                start, snapshot = self._start(after, prefixes, end)
                page = self._page(max(after, start), end, prefixes, limit, max_bytes)
            finally:
                self._reader.execute("COMMIT")
        return msgspec.structs.replace(page, start=start, snapshot=snapshot)

    def _start(self, after: int, prefixes: Sequence[str], end: int) -> tuple[int, Record | None]:
        """Where the answer to who has everything up to `after` begins, and the snapshot of what is before."""
        floor = _head(self._reader, "floor").seq
        wanted = any(prefix.startswith(SNAPSHOTS) for prefix in prefixes)
        if after >= floor and not (wanted and after == 0):
            return 0, None
        snapshot = self._snapshot
        if wanted and snapshot is not None and snapshot.seq <= end and snapshot.start > after:
            row = self._reader.execute("SELECT topic, header, body FROM events WHERE seq = ?", (snapshot.seq,))
            return snapshot.start, _record(row.fetchone())
        return floor, None

    def _page(self, after: int, end: int, prefixes: Sequence[str], limit: int, max_bytes: int) -> Excerpt:
        where = " OR ".join("(topic >= ? AND topic < ?)" if prefix else "TRUE" for prefix in prefixes)
        bounds = [bound for prefix in prefixes if prefix for bound in (prefix, prefix + "\x7f")]
        records: list[Record] = []
        size = 0
        rows = self._reader.execute(
            f"SELECT topic, header, body FROM events WHERE seq > ? AND seq <= ? AND ({where}) ORDER BY seq LIMIT ?",
            (after, end, *bounds, limit + 1),
        )
        for row in rows:
            if len(records) == limit or (records and size + len(row[2]) > max_bytes):
                rows.close()
                return Excerpt(records, records[-1].header.seq, more=True)
            records.append(_record(row))
            size += len(row[2])
        return Excerpt(records, end, more=False)

    def prune(self, *, before: float, max_bytes: int) -> int:
        """Drop some of the oldest events, if they were logged before `before` or the log is larger than `max_bytes`;
        how many. To be called again until it is 0. What no snapshot stands for is never dropped.
        """
        if self.trouble or self._snapshot_start() <= self.floor:
            return 0
        with self._translated("written"):
            rows = self._writer.execute(
                "SELECT seq, logged, hash FROM events WHERE seq <= ? ORDER BY seq LIMIT ?",
                (self._snapshot_start(), PRUNE_EVENTS),
            ).fetchall()
            if self._used_bytes() <= max_bytes:
                rows = list(takewhile(lambda row: row[1] < before, rows))
            if not rows:
                return 0
            anchor = Head(rows[-1][0], rows[-1][2])
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                self._drop(anchor)
                self._writer.execute("COMMIT")
            except sqlite3.Error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
        self.floor = anchor.seq
        return len(rows)

    def _drop(self, anchor: Head) -> None:
        upto = (anchor.seq,)
        execute = self._writer.execute
        execute("INSERT OR IGNORE INTO gone SELECT seq, id FROM events WHERE seq <= ?", upto)
        execute("INSERT OR REPLACE INTO topics SELECT topic, max(seq) FROM events WHERE seq <= ? GROUP BY topic", upto)
        execute("DELETE FROM events WHERE seq <= ?", upto)
        execute("DELETE FROM gone WHERE seq <= ?", (anchor.seq - GONE_IDS,))
        self._note("floor", anchor)

    def _used_bytes(self) -> int:
        page, pages, free = (
            int(self._writer.execute(f"PRAGMA {what}").fetchone()[0])
            for what in ("page_size", "page_count", "freelist_count")
        )
        return page * (pages - free)

    def _snapshot_start(self) -> int:
        return 0 if self._snapshot is None else self._snapshot.start

    def verify(self, *, expect: Head | None = None) -> Verdict:
        """Walk the whole chain. Another process may append meanwhile: it is the log of one moment that is judged."""
        with self._translated("read"):
            self._reader.execute("BEGIN")
            try:
                rows = self._reader.execute(f"SELECT {_STORED} FROM events ORDER BY seq")
                anchor, head = (_head(self._reader, key) for key in ("floor", "head"))
                return chain.verify((Stored(*row) for row in rows), anchor=anchor, head=head, expect=expect)
            finally:
                self._reader.execute("COMMIT")

    # --- inside

    def _connect(self, read_only: bool) -> sqlite3.Connection:
        where = f"file:{quote(str(self.path))}?mode=ro" if read_only else str(self.path)
        return sqlite3.connect(where, uri=read_only, timeout=BUSY_S, isolation_level=None, check_same_thread=False)

    def _refuse_newer(self) -> None:
        """Before anything is set or made in the file: what a newer program wrote stays as it is."""
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise NewerLog(
                f"the log was written by a newer version of Interlock (version {version}, this one knows {VERSION})",
                where=str(self.path),
                hint="start the newer version again; nothing was changed",
            )

    def _prepare(self, read_only: bool) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version == VERSION:
            for statement in () if read_only else _MORE_TABLES:
                self._writer.execute(statement)
            return
        if read_only:
            what = f"has version {version}, which has no chain" if version else "is no event log"
            raise LogError(what, where=str(self.path), hint="a broker that opens it brings it up to date")
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            if version == 0:
                self._create()
                self._note("identity", uuid.uuid4().hex)
                self._note("head", Head())
            else:
                self._chain_first_version()
            self._note("floor", Head())
            self._writer.execute(f"PRAGMA user_version = {VERSION}")
            self._writer.execute("COMMIT")
        except BaseException:
            self._writer.execute("ROLLBACK")
            raise

    def _create(self) -> None:
        for statement in (*_TABLES, *_MORE_TABLES):
            self._writer.execute(statement)

    def _chain_first_version(self) -> None:
        """Version 1 had the header's fields in columns, and no hash."""
        self._writer.execute("DROP INDEX events_of_topic")
        self._writer.execute("ALTER TABLE events RENAME TO old")
        self._create()
        head = Head()
        rows = self._writer.execute("SELECT seq, id, topic, prev, source, time, logged, body FROM old ORDER BY seq")
        for seq, id, topic, prev, source, time, logged, body in rows:
            header = Header(id=id, source=source, time=time, seq=seq, prev=prev, logged=logged)
            head = self._insert_one(head, topic, header, body)
        self._writer.execute("DROP TABLE old")
        self._note("head", head)

    def _about(self, key: str) -> str:
        return str(self._writer.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()[0])

    def _note(self, key: str, value: object) -> None:
        self._writer.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (key, str(value)))

    def _refresh(self) -> None:
        if self._has("topics"):
            for topic, seq in self._writer.execute("SELECT topic, seq FROM topics"):
                self.topics[topic] = max(seq, self.topics.get(topic, 0))
        self.topics.update(
            self._writer.execute("SELECT topic, max(seq) FROM events WHERE seq > ? GROUP BY topic", (self.last,))
        )
        self._head = _head(self._writer, "head")
        self.last = self._head.seq
        self.floor = _head(self._writer, "floor").seq
        row = self._writer.execute(
            "SELECT topic, seq, body FROM events WHERE topic = ? ORDER BY seq DESC LIMIT 1", (FLEET_SNAPSHOT,)
        ).fetchone()
        self._snapshot = None if row is None else _snapshot_of(*row)

    def _has(self, table: str) -> bool:
        return self._writer.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (table,)).fetchone() is not None

    def _check_tail(self) -> None:
        """A log that does not end as it was written takes no more events: they would hide what is missing."""
        begin = max(self.last - TAIL_EVENTS, _head(self._writer, "floor").seq)
        found = self._writer.execute("SELECT hash FROM events WHERE seq = ?", (begin,)).fetchone()
        anchor = Head(begin, found[0]) if found else _head(self._writer, "floor")
        rows = self._writer.execute(f"SELECT {_STORED} FROM events WHERE seq > ? ORDER BY seq", (anchor.seq,))
        findings = chain.verify((Stored(*row) for row in rows), anchor=anchor, head=self._head).findings
        if findings and not self.trouble:
            self.trouble = (
                f"the log is damaged: {findings[0]} (see all with: interlock log verify --file {self.path}; to begin "
                "a new log, move the file away)"
            )

    def _insert(self, drafts: Sequence[Draft], now: float) -> tuple[list[Record], Head]:
        records = []
        head = self._head
        previous: dict[str, int] = {}
        for draft in drafts:
            known = self._known(draft)
            if known is not None:
                records.append(known)
                continue
            seq = head.seq + 1
            prev = previous.get(draft.topic, self.topics.get(draft.topic, 0))
            previous[draft.topic] = seq
            header = msgspec.structs.replace(draft.header, seq=seq, prev=prev, logged=now)
            head = self._insert_one(head, draft.topic, header, draft.body)
            records.append(Record(draft.topic, header, draft.body))
        if head is not self._head:
            self._note("head", head)
        return records, head

    def _known(self, draft: Draft) -> Record | None:
        row = self._writer.execute("SELECT topic, header, body FROM events WHERE id = ?", (draft.header.id,)).fetchone()
        if row is not None:
            return _record(row, fresh=False)
        gone = self._writer.execute("SELECT seq FROM gone WHERE id = ?", (draft.header.id,)).fetchone()
        if gone is None:
            return None
        return Record(draft.topic, msgspec.structs.replace(draft.header, seq=gone[0]), draft.body, fresh=False)

    def _insert_one(self, head: Head, topic: str, header: Header, body: bytes) -> Head:
        packed = wire.encode(header)
        hash = chain.link(head.hash, header.seq, topic, packed, body)
        self._writer.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
            (header.seq, header.id, topic, header.logged, packed, body, hash),
        )
        return Head(header.seq, hash)

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, WireError, ValueError, TypeError, OverflowError) as error:
            # a damaged file gives values of other types, and texts, in SQLite's own errors too, that are no UTF-8
            raise LogError(
                f"can't be {what}: {' '.join(str(error).split())}",
                where=str(self.path),
                hint="is the disk full, or the file damaged? a copy of the file and its -wal keeps what can be saved",
            ) from error


class UnreadableLog(EventLog):
    """Stands for a log file that can't be opened: takes nothing, gives nothing, and says why. It has no identity."""

    def __init__(self, path: Path, trouble: str) -> None:
        self.path = path
        self.last = self.floor = 0
        self.topics = {}
        self._snapshot = None
        self.identity = ""
        self.trouble = trouble
        self._head = Head()

    def close(self) -> None:
        pass

    def read(self, after: int, prefixes: Sequence[str], *, limit: int, max_bytes: int) -> Excerpt:
        raise LogError(self.trouble)


def open_log(path: Path) -> EventLog:
    """The log for a broker: one that is damaged is opened for what can still be read of it, and takes no events.

    LogError where there is no log and none can be made, and for one of a newer program.
    """
    try:
        return EventLog(path)
    except NewerLog:
        raise
    except LogError as error:
        if not path.exists():
            raise
        try:
            log = EventLog(path, read_only=True)
        except LogError:
            return UnreadableLog(path, str(error))
        log.trouble = str(error)
        return log


class NewerLog(LogError):
    """The file was written by a newer program."""


class _Snapshot(msgspec.Struct, frozen=True):
    seq: int
    start: int


def _snapshot_of(topic: str, seq: int, body: bytes) -> _Snapshot | None:
    """None if it is none that can stand for anything."""
    if topic != FLEET_SNAPSHOT:
        return None
    try:
        found = wire.decode_body(body)
    except WireError:
        return None
    if isinstance(found, FleetSnapshot) and 0 <= found.start <= found.through < seq:
        return _Snapshot(seq, found.start)
    return None


def _head(connection: sqlite3.Connection, key: str) -> Head:
    row = connection.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
    try:
        return Head.parse(row[0])
    except (TypeError, ValueError):
        raise sqlite3.DatabaseError(f"its own note of the {key} is gone") from None


def _record(row: tuple[Any, ...], *, fresh: bool = True) -> Record:
    topic, header, body = row
    return Record(topic, wire.decode_header(header), body, fresh)
