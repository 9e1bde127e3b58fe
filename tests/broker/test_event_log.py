"""The log on a real SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from interlock.broker.errors import LogError
from interlock.broker.log import Draft, EventLog, open_log
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
        with pytest.raises(LogError, match=r"version 99, this one knows 2.*start the newer version"):
            opened(path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["events.sqlite"]


def test_a_folder_that_can_not_be_made_is_an_error_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match="can't be opened"):
        EventLog(tmp_path / "file" / "events.sqlite")
