"""Whoever changes, removes or moves an event of the log is found, and where."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from interlock.broker.chain import GENESIS, Head, link
from interlock.broker.errors import LogError
from interlock.broker.log import Draft, EventLog
from interlock.broker.wire import Header

EVENTS = 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "events.sqlite"
    log = EventLog(path)
    for n in range(1, EVENTS + 1):
        header = Header(id=str(n), source="host/a", time=1.5)
        log.append([Draft("fact/host/a/", header, b"\x81\xa1n" + bytes([n]))], now=9.0)
    log.close()
    return path


def alter(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def findings(path: Path, expect: Head | None = None) -> list[tuple[int, str]]:
    log = EventLog(path, read_only=True)
    try:
        return [(finding.seq, finding.kind) for finding in log.verify(expect=expect).findings]
    finally:
        log.close()


def test_an_untouched_log_is_whole_and_tells_its_head(path: Path) -> None:
    log = EventLog(path)
    verdict = log.verify()
    assert (verdict.events, verdict.findings, verdict.head) == (EVENTS, [], log.head)
    assert verdict.anchor == Head(0, GENESIS)
    assert Head.parse(str(verdict.head)) == verdict.head
    assert log.verify(expect=log.head).findings == []
    log.close()


def test_the_hash_is_what_the_documents_say() -> None:
    """SHA-256 of 32 zero bytes and the MessagePack array [1, "t/", b"h", b"b"]."""
    assert link(GENESIS, 1, "t/", b"h", b"b").hex() == (
        hashlib.sha256(bytes(32) + b"\x94\x01\xa2t/\xc4\x01h\xc4\x01b").hexdigest()
    )


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE events SET body = x'80' WHERE seq = 4", (4, "changed")),
        ("UPDATE events SET topic = 'fact/host/b/' WHERE seq = 4", (4, "changed")),
        ("UPDATE events SET id = 'other' WHERE seq = 4", (4, "changed")),
        ("UPDATE events SET header = x'C1' WHERE seq = 4", (4, "changed")),
        ("UPDATE events SET header = CAST(replace(header, 'host/a', 'host/b') AS BLOB) WHERE seq = 4", (4, "changed")),
        ("DELETE FROM events WHERE seq = 4", (4, "missing")),
        ("DELETE FROM events WHERE seq BETWEEN 4 AND 6", (4, "missing")),
        ("DELETE FROM events WHERE seq = 1", (1, "missing")),
        ("DELETE FROM events WHERE seq = 10", (10, "missing")),
    ],
)
def test_what_was_done_to_the_file_is_found_where_it_was_done(
    path: Path, statement: str, found: tuple[int, str]
) -> None:
    alter(path, statement)
    assert findings(path) == [found]


def test_two_events_that_changed_places_are_both_named(path: Path) -> None:
    alter(
        path,
        "UPDATE events SET seq = 100 WHERE seq = 4",
        "UPDATE events SET seq = 4 WHERE seq = 7",
        "UPDATE events SET seq = 7 WHERE seq = 100",
    )
    assert [found for found in findings(path) if found[1] == "reordered"] == [(4, "reordered"), (7, "reordered")]


def test_a_changed_event_with_a_hash_made_anew_is_found_at_the_next_one(path: Path) -> None:
    def rehash(seq: int) -> Callable[[sqlite3.Connection], None]:
        def change(connection: sqlite3.Connection) -> None:
            (before,) = connection.execute("SELECT hash FROM events WHERE seq = ?", (seq - 1,)).fetchone()
            topic, header = connection.execute("SELECT topic, header FROM events WHERE seq = ?", (seq,)).fetchone()
            connection.execute(
                "UPDATE events SET body = x'80', hash = ? WHERE seq = ?",
                (link(before, seq, topic, header, b"\x80"), seq),
            )

        return change

    with sqlite3.connect(path) as connection:
        rehash(4)(connection)
    connection.close()
    assert findings(path) == [(5, "changed")]


def test_a_head_that_was_noted_finds_a_log_that_was_cut_or_made_anew(path: Path) -> None:
    log = EventLog(path)
    noted = log.head
    log.close()
    alter(path, "DELETE FROM events WHERE seq > 8")
    with sqlite3.connect(path) as connection:  # by somebody who knows how
        (hash,) = connection.execute("SELECT hash FROM events WHERE seq = 8").fetchone()
        connection.execute("UPDATE about SET value = ? WHERE key = 'head'", (f"8:{hash.hex()}",))
    connection.close()
    assert findings(path) == []
    assert findings(path, noted) == [(9, "missing")]
    assert findings(path, Head(5, bytes(32))) == [(5, "changed")]


def test_a_log_that_does_not_end_as_it_was_written_takes_no_events_and_is_read(path: Path) -> None:
    alter(path, "UPDATE events SET body = x'80' WHERE seq = 9")
    log = EventLog(path)
    with pytest.raises(LogError, match="event 9 changed"):
        log.append([Draft("t/", Header(id="new", source="s", time=1.0), b"\x80")], now=1.0)
    assert len(log.read(0, [""], limit=100, max_bytes=1 << 20).records) == EVENTS
    log.close()


def test_a_log_of_the_first_version_is_chained_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    alter(
        path,
        "CREATE TABLE events (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, topic TEXT NOT NULL, prev INTEGER NOT"
        " NULL, source TEXT NOT NULL, time REAL NOT NULL, logged REAL NOT NULL, body BLOB NOT NULL) STRICT",
        "CREATE INDEX events_of_topic ON events (topic, seq)",
        "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
        "INSERT INTO about VALUES ('identity', 'abc')",
        "INSERT INTO events VALUES (1, 'a', 't/', 0, 'host/a', 1.5, 2.5, x'80')",
        "INSERT INTO events VALUES (2, 'b', 't/', 1, 'host/a', 1.5, 2.5, x'81a16101')",
        "PRAGMA user_version = 1",
    )
    with pytest.raises(LogError, match="no chain"):
        EventLog(path, read_only=True)
    log = EventLog(path)
    assert log.identity == "abc"
    again, new = log.append(
        [
            Draft("t/", Header(id="b", source="host/a", time=1.5), b""),
            Draft("t/", Header(id="c", source="s", time=1.0), b"\x80"),
        ],
        now=3.0,
    )
    assert (again.header.seq, again.fresh, new.header.seq, new.header.prev) == (2, False, 3, 2)
    records = log.read(0, ["t/"], limit=10, max_bytes=1 << 20).records
    assert [(r.header.seq, r.header.id, r.header.prev, r.header.logged, r.body) for r in records] == [
        (1, "a", 0, 2.5, b"\x80"),
        (2, "b", 1, 2.5, b"\x81\xa1a\x01"),
        (3, "c", 2, 3.0, b"\x80"),
    ]
    assert log.verify().findings == []
    log.close()


def test_a_power_cut_in_the_middle_of_a_commit_leaves_what_was_acknowledged(path: Path, tmp_path: Path) -> None:
    """The write-ahead log cut, or garbled, at every point behind the last commit that was acknowledged."""
    log = EventLog(path)
    wal = path.with_name(path.name + "-wal")
    marks = []
    for n in range(EVENTS + 1, EVENTS + 4):
        log.append([Draft("t/", Header(id=str(n), source="s", time=1.0), bytes(3000))], now=9.0)
        marks.append((n, wal.stat().st_size))
    main, journal = path.read_bytes(), wal.read_bytes()
    log.close()
    for number, (acked, end) in enumerate(marks[:-1]):
        following = marks[number + 1][1]
        for cut in range(end, following, 509):
            garbled = journal[:cut] + bytes(byte ^ 0x5A for byte in journal[cut:following])
            for torn in (journal[:cut], garbled):
                copy = tmp_path / "copy.sqlite"
                copy.write_bytes(main)
                copy.with_name("copy.sqlite-wal").write_bytes(torn)
                copy.with_name("copy.sqlite-shm").unlink(missing_ok=True)
                found = EventLog(copy)
                assert found.last == acked
                assert found.trouble == ""
                assert found.verify().findings == []
                again = found.append([Draft("t/", Header(id=str(acked + 1), source="s", time=1.0), b"\x80")], now=9.0)
                assert (again[0].header.seq, again[0].fresh) == (acked + 1, True)
                found.close()
