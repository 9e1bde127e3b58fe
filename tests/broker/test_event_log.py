"""The log on a real SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interlock.broker.errors import LogError, UnsureWrite
from interlock.broker.log import VERSION, Draft, EventLog, open_log
from interlock.broker.wire import Header

PAGE = {"limit": 100, "max_bytes": 1 << 20}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    made = EventLog(tmp_path / "events.sqlite")
    yield made
    made.close()


def draft(id: str, topic: str = "fact/host/a/", body: bytes = b"\x80") -> Draft:
    return Draft(topic, Header(id=id, source="host/a", time=1.5), body)


def seqs(log: EventLog, after: int, *prefixes: str, **page: int) -> list[int]:
    return [record.header.seq for record in log.read(after, prefixes, **{**PAGE, **page}).records]


def test_events_get_the_numbers_one_two_three_and_the_previous_number_of_their_topic(log: EventLog) -> None:
    records = log.append([draft("1"), draft("2", "fact/host/b/"), draft("3")], now=9.0)
    records += log.append([draft("4", "fact/host/b/")], now=10.0)
    assert [(r.header.seq, r.header.prev, r.header.logged) for r in records] == [
        (1, 0, 9.0),
        (2, 0, 9.0),
        (3, 1, 9.0),
        (4, 2, 10.0),
    ]
    assert log.last == 4
    assert log.topics == {"fact/host/a/": 3, "fact/host/b/": 4}


def test_a_repeated_id_keeps_its_first_record_also_after_reopening(log: EventLog, tmp_path: Path) -> None:
    first = log.append([draft("1"), draft("1", body=b"\x90")], now=9.0)
    assert [(r.header.seq, r.fresh, r.body) for r in first] == [(1, True, b"\x80"), (1, False, b"\x80")]
    log.close()
    again = EventLog(tmp_path / "events.sqlite")
    assert [(r.header.seq, r.fresh) for r in again.append([draft("1"), draft("2")], now=10.0)] == [
        (1, False),
        (2, True),
    ]
    assert again.identity == log.identity
    again.close()


def by(source: str, id: str, topic: str = "fact/host/a/") -> Draft:
    return Draft(topic, Header(id=id, source=source, time=1.5), b"\x80")


def test_an_id_belongs_to_its_source_and_nobody_else_can_use_it_up(log: EventLog, tmp_path: Path) -> None:
    log.append([by("host/beta", "m-1/roll-back")], now=9.0)
    theirs, mine = log.append([by("coordinator", "m-1/roll-back"), by("host/beta", "m-1/roll-back")], now=9.0)
    assert (theirs.header.seq, theirs.header.source, theirs.fresh) == (2, "coordinator", True)
    assert (mine.header.seq, mine.header.source, mine.fresh) == (1, "host/beta", False)
    log.close()
    again = EventLog(tmp_path / "events.sqlite")
    assert [r.fresh for r in again.append([by("coordinator", "m-1/roll-back"), by("c", "m-1/roll-back")], now=9.0)] == [
        False,
        True,
    ]
    assert again.verify().findings == []
    again.close()


class FailingCommit:
    """The writer's connection, whose next commit happens, or does not, and reports an error."""

    def __init__(self, log: EventLog, error: str, *, happens: bool) -> None:
        self._real, self._log, self._error, self._happens = log._writer, log, error, happens
        log._writer = self  # type: ignore[assignment]

    def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        if statement != "COMMIT":
            return self._real.execute(statement, *parameters)
        self._log._writer = self._real
        if self._happens:
            self._real.execute("COMMIT")
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = self._error
        raise error

    @property
    def in_transaction(self) -> bool:
        return self._real.in_transaction


@pytest.mark.parametrize(
    ("error", "happens", "unsure"),
    [
        ("SQLITE_IOERR_FSYNC", False, True),
        ("SQLITE_IOERR_FSYNC", True, True),
        ("SQLITE_FULL", True, True),
        ("SQLITE_FULL", False, False),
        ("SQLITE_IOERR_WRITE", False, False),
    ],
)
def test_a_failed_commit_says_whether_it_may_have_happened(
    log: EventLog, error: str, happens: bool, unsure: bool
) -> None:
    FailingCommit(log, error, happens=happens)
    with pytest.raises(LogError) as caught:
        log.append([draft("1")], now=9.0)
    assert isinstance(caught.value, UnsureWrite) is unsure
    assert log.last == int(happens)
    (record,) = log.append([draft("1")], now=9.0)
    assert (record.header.seq, record.fresh) == (1, not happens)


def test_a_log_of_the_second_version_keeps_its_chain_and_its_ids(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    log = EventLog(path)
    log.append([draft("1"), draft("2"), draft("3")], now=9.0)
    log.close()
    with sqlite3.connect(path) as connection:  # as the second version was
        for statement in (
            "ALTER TABLE events RENAME TO newer",
            "CREATE TABLE events (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, topic TEXT NOT NULL,"
            " logged REAL NOT NULL, header BLOB NOT NULL, body BLOB NOT NULL, hash BLOB NOT NULL) STRICT",
            "INSERT INTO events SELECT seq, id, topic, logged, header, body, hash FROM newer",
            "DROP TABLE newer",
            "CREATE INDEX events_of_topic ON events (topic, seq)",
            "DROP TABLE gone",
            "CREATE TABLE gone (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE) STRICT",
            "INSERT INTO gone VALUES (0, 'dropped')",
            "PRAGMA user_version = 2",
        ):
            connection.execute(statement)
    connection.close()
    reader = EventLog(path, read_only=True)
    assert reader.verify().findings == []
    reader.close()
    again = EventLog(path)
    assert again.verify().findings == []
    records = again.append([draft("2"), draft("dropped"), by("other", "2")], now=10.0)
    assert [(r.header.seq, r.fresh) for r in records] == [(2, False), (0, False), (4, True)]
    assert again.verify().findings == []
    again.close()


def test_reading_filters_by_prefix_and_never_takes_alpha2_for_alpha(log: EventLog) -> None:
    log.append([draft("1", "command/alpha/"), draft("2", "command/alpha2/"), draft("3", "fact/host/alpha/")], now=9.0)
    assert seqs(log, 0, "command/alpha/") == [1]
    assert seqs(log, 0, "command/") == [1, 2]
    assert seqs(log, 1, "") == [2, 3]
    assert seqs(log, 0) == []
    assert seqs(log, 3, "") == []


def test_a_page_ends_at_its_limit_of_events_or_bytes_and_says_where(log: EventLog) -> None:
    log.append([draft(str(n), body=bytes(1000)) for n in range(10)], now=9.0)
    page = log.read(0, [""], limit=4, max_bytes=1 << 20)
    assert (len(page.records), page.through, page.more) == (4, 4, True)
    page = log.read(4, [""], limit=100, max_bytes=2500)
    assert (len(page.records), page.through, page.more) == (2, 6, True)
    page = log.read(4, [""], limit=100, max_bytes=10)
    assert (len(page.records), page.more) == (1, True)  # one at least, whatever its size
    page = log.read(6, [""], limit=100, max_bytes=1 << 20)
    assert (len(page.records), page.through, page.more) == (4, 10, False)


def test_a_page_counts_the_bytes_of_headers_too(log: EventLog) -> None:
    header = Header(id="1", source="s", time=1.5, sig=bytes(2000))
    log.append([Draft("t/", msgspec.structs.replace(header, id=str(n)), b"\x80") for n in range(3)], now=9.0)
    assert len(log.read(0, [""], limit=100, max_bytes=4500).records) == 2


def test_a_full_disk_refuses_the_whole_transaction_and_reading_goes_on(log: EventLog) -> None:
    log.append([draft("1")], now=9.0)
    pages = log._writer.execute("PRAGMA page_count").fetchone()[0]
    log._writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LogError, match="full"):
        log.append([draft("2"), draft("3", body=bytes(100_000))], now=9.0)
    assert log.last == 1
    assert seqs(log, 0, "") == [1]
    log._writer.execute("PRAGMA max_page_count = 100000")
    assert [r.header.seq for r in log.append([draft("2")], now=9.0)] == [2]


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(LogError, match=r"events\.sqlite"):
        EventLog(path)


def test_a_file_of_a_newer_version_is_refused_by_all_who_open_it_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    with sqlite3.connect(path) as connection:  # whatever it looks like then, also inside
        connection.execute("CREATE TABLE other (thing TEXT)")
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    content = path.read_bytes()
    for opened in (EventLog, open_log, partial(EventLog, read_only=True)):
        with pytest.raises(LogError, match=rf"version 99, this one knows {VERSION}.*start the newer version"):
            opened(path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["events.sqlite"]


def test_a_folder_that_can_not_be_made_is_an_error_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match="can't be opened"):
        EventLog(tmp_path / "file" / "events.sqlite")
