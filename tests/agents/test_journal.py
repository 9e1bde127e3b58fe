"""The host's journal: what was written is there after any end of the process, and nothing of what was not."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from interlock.agents import journal as module
from interlock.agents.journal import Journal
from interlock.agents.slot_io import Row, State
from interlock.broker.errors import LogError, Refused

ROW = Row("alpha", "v1", "a" * 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "host-a" / "host.sqlite"


def test_what_was_written_is_there_after_opening_again(path: Path) -> None:
    row = replace(ROW, candidate="v2", candidate_digest="b" * 64, state=State.LIVE, migration="m1", epoch=7)
    journal = Journal.open(path)
    assert journal.slot("alpha") is None
    journal.save_slot(ROW, "serve v1", at=1.5)
    journal.save_slot(row, "cut over", done=("c1", b"\x00result"), at=2.5)
    journal.save_slot(replace(ROW, agent="beta"), "serve v1")
    journal.set_mark("position", 41)
    journal.set_mark("position", 42)
    journal.set_mark("boot", "abc")
    journal.note("alpha", "drained", at=3.5)
    journal.close()

    again = Journal.open(path)
    assert again.slot("alpha") == row
    assert again.slots() == {"alpha": row, "beta": replace(ROW, agent="beta")}
    assert again.done("c1") == b"\x00result"
    assert again.done("c2") is None
    assert (again.mark("position"), again.mark("boot"), again.mark("none")) == (42, "abc", None)
    lines = [(entry.time, entry.entry) for entry in again.entries("alpha")]
    assert lines == [(1.5, "serve v1"), (2.5, "cut over"), (3.5, "drained")]
    assert [entry.entry for entry in again.entries("alpha", newest=2)] == ["cut over", "drained"]
    again.close()


def test_a_name_that_was_permanent_keeps_its_digest(path: Path) -> None:
    journal = Journal.open(path)
    journal.save_slot(ROW, "serve v1")
    journal.save_slot(replace(ROW, permanent="v2", permanent_digest="b" * 64), "commit v2")
    with pytest.raises(Refused, match="new revision name"):
        journal.save_slot(replace(ROW, permanent_digest="c" * 64), "commit another v1", done=("c9", b""))
    assert journal.names("alpha") == {"v1": "a" * 64, "v2": "b" * 64}
    assert journal.slot("alpha") == replace(ROW, permanent="v2", permanent_digest="b" * 64)
    assert len(journal.entries("alpha")) == 2
    assert journal.done("c9") is None
    journal.save_slot(ROW, "serve v1 again")
    journal.close()


def test_a_state_that_nobody_knows_is_rolled_back(path: Path) -> None:
    journal = Journal.open(path)
    journal.save_slot(ROW, "serve v1")
    journal.close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE slots SET state = 'of-the-future'")
    raw.close()
    journal = Journal.open(path)
    assert journal.slot("alpha") == replace(ROW, state=State.ROLLING_BACK)
    journal.close()


def test_the_oldest_results_and_lines_go_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DONE_KEPT", 3)
    monkeypatch.setattr(module, "ENTRIES_KEPT", 2)
    journal = Journal.open(path)
    for number in range(5):
        journal.remember_done(f"c{number}", b"%d" % number)
        journal.note("alpha", str(number))
    journal.remember_done("c2", b"again")  # the same command, told twice, counts as its newest
    assert [journal.done(f"c{number}") for number in range(5)] == [None, None, b"again", b"3", b"4"]
    assert [entry.entry for entry in journal.entries("alpha")] == ["3", "4"]
    journal.close()


async def test_any_thread_may_write(path: Path) -> None:
    journal = Journal.open(path)

    async def write(number: int) -> None:
        await trio.to_thread.run_sync(lambda: journal.save_slot(replace(ROW, agent=f"a{number}"), "serve"))

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(write, number)
    assert len(journal.slots()) == 30
    journal.close()


def test_a_snapshot_is_a_whole_journal(path: Path, tmp_path: Path) -> None:
    journal = Journal.open(path)
    journal.save_slot(ROW, "serve v1")
    (tmp_path / "copy.sqlite").write_bytes(journal.snapshot())
    journal.save_slot(replace(ROW, epoch=9), "later")
    journal.close()
    copy = Journal.open(tmp_path / "copy.sqlite")
    assert copy.slots() == {"alpha": ROW}
    copy.save_slot(replace(ROW, epoch=3), "it can be written")
    copy.close()


WRITER = """
import sys
from msgspec.structs import replace
from pathlib import Path
from interlock.agents.journal import Journal
from interlock.agents.slot_io import Row, State

journal = Journal.open(Path(sys.argv[1]))
row = journal.slot("alpha") or Row("alpha", "v1", "a" * 64)
while True:
    row = replace(row, epoch=row.epoch + 1, candidate=f"v{row.epoch + 1}")
    journal.save_slot(row, str(row.epoch), done=(f"c{row.epoch}", b"x" * 5000))
    sys.stdout.write(f"{row.epoch}\\n")
    sys.stdout.flush()
"""


def test_after_a_kill_in_the_middle_of_writes_the_last_committed_state_is_there(path: Path) -> None:
    reached = 0
    for enough in (1, 40, 200):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        told = reached
        for line in writer.stdout:
            told = int(line)
            if told >= reached + enough:
                writer.kill()
                break
        told = max([told, *(int(line) for line in writer.stdout if line.endswith("\n"))])
        writer.wait()
        writer.stdout.close()

        journal = Journal.open(path)
        row = journal.slot("alpha")
        assert row is not None
        assert told <= row.epoch <= told + 1  # one may have been written and not told
        assert row.candidate == f"v{row.epoch}"
        assert [entry.entry for entry in journal.entries("alpha", newest=1)] == [str(row.epoch)]
        assert journal.done(f"c{row.epoch}") == b"x" * 5000
        assert journal.done(f"c{row.epoch + 1}") is None
        reached = row.epoch
        journal.close()


def overwrite(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(os.urandom(3000))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: overwrite(path, 0),
        lambda path: overwrite(path, 4096),
        lambda path: os.truncate(path, path.stat().st_size // 8192 * 4096),
    ],
    ids=["header", "page", "cut"],
)
def test_a_damaged_file_is_an_error_that_says_what_to_do(path: Path, damage: Callable[[Path], object]) -> None:
    journal = Journal.open(path)
    for number in range(300):
        journal.note("alpha", f"{number}" * 50)
    journal.close()
    damage(path)
    with pytest.raises(LogError) as caught:
        Journal.open(path)
    assert caught.value.where == str(path)
    assert "damaged" in caught.value.what
    assert "serve" in caught.value.hint


def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as raw:  # whatever it looks like then, also inside
        raw.execute("CREATE TABLE other (thing TEXT)")
        raw.execute("PRAGMA user_version = 99")
    raw.close()
    content = path.read_bytes()
    with pytest.raises(LogError, match=r"newer version of Interlock \(format 99, this one knows 2\)"):
        Journal.open(path)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_of_the_first_version_is_taken_over_with_all_its_slots(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as raw:
        old = module._SCHEMA.replace(",\n    place TEXT NOT NULL DEFAULT ''", "")
        assert "place" not in old
        raw.executescript(old)
        raw.execute("INSERT INTO slots VALUES ('chat', 'v1', 'd1', NULL, NULL, 'serving', NULL, 3)")
        raw.execute("PRAGMA user_version = 1")
    raw.close()
    for _ in range(2):
        journal = Journal.open(path)
        assert journal.slot("chat") == Row("chat", "v1", "d1", epoch=3)
        journal.save_slot(Row("chat", "v1", "d1", state=State.FORWARDING, epoch=3, place="beta"), "moved")
        journal.save_slot(Row("chat", "v1", "d1", epoch=3), "back")
        journal.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match="file"):
        Journal.open(tmp_path / "file" / "host.sqlite")
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(LogError, match=r"folder\.sqlite"):
        Journal.open(tmp_path / "folder.sqlite")


def test_a_file_that_another_program_holds_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_MS", 10)
    journal = Journal.open(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LogError, match="no other program holds"):
        journal.save_slot(ROW, "serve v1")
    other.execute("ROLLBACK")
    other.close()
    journal.save_slot(ROW, "serve v1")
    journal.close()
    with pytest.raises(LogError):
        journal.slots()
