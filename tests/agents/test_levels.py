"""The four levels of a backup: what is in each, how each comes back, and what a folder in use does to it."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from interlock.agents import backup as module
from interlock.agents.backup import About, Live, list_backups, make_backup, verify_backup
from interlock.agents.journal import Journal
from interlock.agents.levels import (
    LEVELS,
    Nothing,
    Whole,
    back_up,
    bring_back,
    levels_of,
    newest_verified,
    restore_code,
    restore_journal,
    restore_state,
    saved_row,
)
from interlock.agents.revisions import RevisionStore
from interlock.agents.slot_io import Row
from interlock.agents.trees import StorageError
from interlock.broker.config import RevisionConfig
from interlock.broker.errors import ConfigError

NOW = 1_700_000_000.0


class Agent:
    """An agent of a host: its recorded revision, its data, its journal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = RevisionStore(folder / "revisions")
        source = folder / "source"
        source.mkdir()
        (source / "agent.py").write_text("good = True")
        recorded = self.store.record("tutor", "r1", RevisionConfig(entry="agent:A", source="source"), source)
        self.row = Row("tutor", "r1", recorded.digest)
        self.code = recorded.folder / "agent.py"
        self.data = folder / "data" / "tutor"
        self.data.mkdir(parents=True)
        (self.data / "memory").write_text("ten years")
        self.journal = Journal.open(folder / "host.sqlite")
        self.journal.save_slot(self.row, "first")
        self.backups = folder / "backups"
        self.whole = Whole("alpha", self.row, recorded, None, self.data, self.journal)

    def back_up(self, *levels: str, now: float = NOW) -> Path:
        return back_up(self.whole, self.backups, levels, now=now, keep=5).path

    def ruin_code(self) -> None:
        self.code.parent.chmod(0o700)
        self.code.chmod(0o600)
        self.code.write_text("nonsense(")
        assert self.store.verify(self.row.permanent_digest)


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


def test_each_level_holds_its_part_and_says_so(agent: Agent) -> None:
    held = {
        "configuration": {"slot.json", "configuration.json"},
        "code": {"slot.json", "configuration.json", "code"},
        "state": {"slot.json", "state"},
        "host": {"slot.json", "host.sqlite"},
    }
    for level, parts in held.items():
        manifest = verify_backup(agent.back_up(level))
        assert set(manifest.parts) == parts
        assert manifest.about == About(
            host="alpha", agent="tutor", revision="r1", digest=agent.row.permanent_digest, levels=[level]
        )
    everything = verify_backup(agent.back_up(*LEVELS))
    assert everything.about.levels == list(LEVELS)
    assert everything.newest == pytest.approx((agent.data / "memory").stat().st_mtime)
    assert saved_row(list_backups(agent.backups / "tutor")[0]) == agent.row


def test_a_level_that_nobody_knows_is_refused(agent: Agent) -> None:
    with pytest.raises(ConfigError, match="'mood' is no level"):
        agent.back_up("mood")
    assert list_backups(agent.backups / "tutor") == []


def test_code_comes_back_as_it_was_recorded_and_as_nothing_else(agent: Agent) -> None:
    path = agent.back_up("code")
    agent.ruin_code()
    assert restore_code(path, agent.store).digest == agent.row.permanent_digest
    assert agent.store.verify(agent.row.permanent_digest) == []


def test_state_comes_back_and_what_it_replaced_is_kept_and_counted(agent: Agent) -> None:
    path = agent.back_up("state", now=time.time())
    (agent.data / "memory").write_text("last night")
    (agent.data / "notes").write_text("new")
    lost = restore_state(path, agent.data, now=time.time() + 7200)
    assert (agent.data / "memory").read_text() == "ten years"
    assert not (agent.data / "notes").exists()
    assert lost.changed == 2
    assert lost.age_s == pytest.approx(7200, abs=60)
    assert "2 files were written after it" in lost.words()
    assert "2 hours old" in lost.words()
    assert (Path(lost.kept) / "memory").read_text() == "last night"
    for hours in range(4):
        restore_state(path, agent.data, now=time.time() + 3600 * hours)
    assert len(list(agent.data.parent.glob(".replaced-*"))) == 2


def test_a_journal_comes_back_with_the_rows_of_all_slots(agent: Agent) -> None:
    other = Row("pilot", "p1", "dp")
    agent.journal.save_slot(other, "first")
    path = agent.back_up("host")
    agent.journal.save_slot(Row("pilot", "p2", "dp2"), "later")
    agent.journal.close()
    (agent.folder / "host.sqlite").write_bytes(b"rubbish")
    lost = restore_journal(path, agent.folder / "host.sqlite", now=NOW + 60)
    assert Path(lost.kept).read_bytes() == b"rubbish"
    again = Journal.open(agent.folder / "host.sqlite")
    assert again.slots() == {"pilot": other, "tutor": agent.row}
    again.close()


def test_level_4_takes_the_newest_backup_of_the_permanent_revision_that_is_whole(agent: Agent) -> None:
    good = agent.back_up("code", "state", now=NOW)
    damaged = agent.back_up("code", "state", now=NOW + 1)
    (damaged / "state" / "memory").write_text("tampered")
    foreign = Whole("alpha", Row("tutor", "r0", "d0"), agent.whole.revision, None, agent.data, agent.journal)
    back_up(foreign, agent.backups, ["code"], now=NOW + 2, keep=5)
    agent.ruin_code()
    (agent.data / "memory").write_text("ruined")
    done = bring_back(agent.row, agent.backups, agent.store, agent.data, now=NOW + 3)
    assert done.backup == good
    assert done.levels == ["code", "state"]
    assert agent.store.verify(agent.row.permanent_digest) == []
    assert (agent.data / "memory").read_text() == "ten years"


def test_without_a_backup_that_fits_level_4_says_which_is_missing(agent: Agent) -> None:
    with pytest.raises(Nothing, match="there is no backup yet"):
        bring_back(agent.row, agent.backups, agent.store, agent.data, now=NOW)
    agent.back_up("configuration")
    with pytest.raises(Nothing, match="no backup has the level state"):
        newest_verified(agent.backups / "tutor", lambda row, about: True, level="state")


def test_a_backup_of_before_there_were_levels_is_known_by_its_parts(tmp_path: Path) -> None:
    made = make_backup(tmp_path / "b", {"slot.json": b"{}", "configuration.json": b"{}"}, now=NOW, keep=5)
    assert levels_of(made.manifest.about, made.manifest.parts) == ["configuration"]


# --- folders in use


class Writer:
    """Writes a file again and again until told to stop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 0
        while not self.stop.is_set():
            number += 1
            self.path.write_text(str(number))

    def __enter__(self) -> Writer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def test_a_folder_that_never_stands_still_is_no_backup_and_the_file_is_named(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIVE_PAUSE_S", 0.01)
    (agent.data / "large").write_bytes(bytes(8 << 20))
    with Writer(agent.data / "ticks"), pytest.raises(StorageError, match=r"changed while it was backed up, 3 times"):
        agent.back_up("state")
    assert list((agent.backups / "tutor").iterdir()) == []


def test_a_folder_that_is_written_once_meanwhile_is_copied_again(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = module.copy_file, []

    def copy(source: Path, target: Path, mode: int) -> str:
        digest = real(source, target, mode)
        if not seen:
            (agent.data / "late").write_text("x")
        seen.append(source)
        return digest

    monkeypatch.setattr(module, "LIVE_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "copy_file", copy)
    path = agent.back_up("state")
    assert (path / "state" / "late").read_text() == "x"


def test_a_database_that_is_written_all_the_time_is_copied_whole(agent: Agent) -> None:
    database = agent.data / "deep" / "log.sqlite"
    database.parent.mkdir()
    with sqlite3.connect(database, isolation_level=None) as first:
        first.execute("PRAGMA journal_mode = WAL")
        first.execute("CREATE TABLE pairs (a INTEGER, b INTEGER)")
        first.executemany("INSERT INTO pairs VALUES (?, ?)", [(n, n) for n in range(2000)])
    stop = threading.Event()

    def write() -> None:
        with sqlite3.connect(database) as db:
            number = 10_000
            while not stop.is_set():
                db.execute("INSERT INTO pairs VALUES (?, ?)", (number, number))
                db.execute("UPDATE pairs SET b = a")
                db.commit()
                number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        path = agent.back_up("state")
    finally:
        stop.set()
        writer.join()
    names = {each.name for each in (path / "state" / "deep").iterdir()}
    assert names == {"log.sqlite"}
    with sqlite3.connect(f"file:{path}/state/deep/log.sqlite?mode=ro", uri=True) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert copy.execute("SELECT count(*) FROM pairs").fetchone()[0] >= 2000
        assert copy.execute("SELECT count(*) FROM pairs WHERE a <> b").fetchone() == (0,)


def test_a_database_that_somebody_keeps_locked_fails_in_time(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DATABASE_S", 0.3)
    database = agent.data / "log.sqlite"
    with sqlite3.connect(database) as db:
        db.execute("CREATE TABLE t (a INTEGER)")
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(StorageError, match=r"database is locked|a database is locked"):
            agent.back_up("state")
    finally:
        holder.close()
    assert list_backups(agent.backups / "tutor") == []


def test_an_agent_without_a_data_folder_has_an_empty_state(tmp_path: Path) -> None:
    made = make_backup(tmp_path / "b", {"state": Live(tmp_path / "none")}, now=NOW, keep=5)
    assert (made.path / "state").is_dir()
    assert made.manifest.files == {}


def test_a_full_disk_is_told_and_leaves_no_half_backup(agent: Agent) -> None:
    """The kernel refuses to let a file grow: the nearest to a full disk that a test may make."""
    (agent.data / "large").write_bytes(bytes(4 << 20))
    program = f"""
        import resource, signal, sys
        from pathlib import Path
        from interlock.agents.backup import Live, make_backup
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, {resource.RLIM_INFINITY}))
        folder, parts = Path({str(agent.backups)!r}) / "tutor", {{"state": Live(Path({str(agent.data)!r}))}}
        make_backup(folder, parts, now=1.0, keep=5)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "the backup failed: File too large (check the permissions and the free space)" in ended.stderr
    assert list((agent.backups / "tutor").iterdir()) == []
    assert agent.back_up("state")  # and once there is room again it works
