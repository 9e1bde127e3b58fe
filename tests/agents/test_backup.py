"""Backups: each one that is listed was read back, and what is restored is what was backed up."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.agents import backup as module
from interlock.agents import trees
from interlock.agents.backup import Backup, list_backups, make_backup, restore_backup, verify_backup
from interlock.agents.trees import Damaged, StorageError
from interlock.broker.errors import ConfigError

NOW = 1_700_000_000.25


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    (folder / "deep" / "empty").mkdir(parents=True)
    (folder / "memory.bin").write_bytes(bytes(range(256)) * 9000)
    (folder / "secret").write_text("key")
    (folder / "secret").chmod(0o600)
    (folder / "deep" / "link").symlink_to("../secret")
    return folder


def tree(folder: Path) -> dict[str, object]:
    """Everything below, comparable."""
    found: dict[str, object] = {}
    for relative, path, status in trees.entries(folder):
        if path.is_symlink():
            found[relative] = os.readlink(path)
        else:
            found[relative] = (stat.S_IMODE(status.st_mode), path.read_bytes()) if path.is_file() else "folder"
    return found


def make(tmp_path: Path, state: Path, *, now: float = NOW, keep: int = 5) -> Backup:
    return make_backup(tmp_path / "backups", {"slot.json": b"{}", "state": state}, now=now, keep=keep)


def test_a_backup_has_a_timestamp_and_a_manifest_of_every_file(tmp_path: Path, state: Path) -> None:
    made = make(tmp_path, state)
    assert made.path.name == "20231114T221320.250000Z"
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["parts"] == ["slot.json", "state"]
    assert set(manifest["files"]) == {"slot.json", "state/memory.bin", "state/secret"}
    assert manifest["files"]["state/memory.bin"]["size"] == 256 * 9000
    assert len(manifest["files"]["slot.json"]["sha256"]) == 64
    assert verify_backup(made.path) == made.manifest
    assert list_backups(tmp_path / "backups") == [made.path]


def test_what_is_restored_is_what_was_backed_up(tmp_path: Path, state: Path) -> None:
    before = tree(state)
    made = make(tmp_path, state)
    (state / "secret").write_text("other")
    (state / "later").write_text("x")
    restore_backup(made.path, state, part="state")
    assert tree(state) == before
    assert sorted(os.listdir(tmp_path)) == ["backups", "state"]
    restore_backup(made.path, tmp_path / "new" / "all")
    assert tree(tmp_path / "new" / "all" / "state") == before
    restore_backup(made.path, tmp_path / "new" / "slot", part="slot.json")
    restore_backup(made.path, tmp_path / "new" / "slot", part="slot.json")
    assert (tmp_path / "new" / "slot").read_bytes() == b"{}"


def test_a_file_system_that_cannot_exchange_is_restored_too(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(state)
    made = make(tmp_path, state)
    (state / "later").write_text("x")
    monkeypatch.setattr(trees, "_swap", lambda *_: False)
    restore_backup(made.path, state, part="state")
    assert tree(state) == before
    assert sorted(os.listdir(tmp_path)) == ["backups", "state"]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda path: (path / "state" / "secret").write_text("kez"), "state/secret was changed"),
        (lambda path: (path / "state" / "secret").unlink(), "state/secret is missing"),
        (lambda path: (path / "state" / "deep" / "empty").rmdir(), "state/deep/empty is missing"),
        (lambda path: (path / "extra").write_text(""), "extra is not of this backup"),
        (lambda path: (path / "manifest.json").unlink(), "can't be read"),
        (lambda path: (path / "manifest.json").write_text("{"), "can't be read"),
    ],
)
def test_a_damaged_backup_is_not_restored(
    tmp_path: Path, state: Path, edit: Callable[[Path], object], says: str
) -> None:
    made = make(tmp_path, state)
    edit(made.path)
    before = tree(state)
    with pytest.raises(Damaged, match=says):
        verify_backup(made.path)
    with pytest.raises(Damaged, match="use an older backup"):
        restore_backup(made.path, state, part="state")
    assert tree(state) == before


def test_only_the_newest_are_kept_and_never_the_one_just_made_lost(tmp_path: Path, state: Path) -> None:
    made = [make(tmp_path, state, now=NOW + number, keep=3).path for number in range(5)]
    assert list_backups(tmp_path / "backups") == made[:1:-1]
    back = make(tmp_path, state, now=NOW - 1000, keep=2).path  # the clock was set back
    assert list_backups(tmp_path / "backups") == [made[-1], back]


def test_two_backups_of_one_moment_are_two(tmp_path: Path, state: Path) -> None:
    made = [make(tmp_path, state, keep=20).path for _ in range(11)]
    assert list_backups(tmp_path / "backups") == made[::-1]
    assert made[1].name.endswith("Z-2")


def test_a_backup_that_reads_back_differently_does_not_count(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "copy_file", lambda source, target, mode: str(target.write_bytes(b"")))
    with pytest.raises(Damaged):
        make(tmp_path, state)
    assert os.listdir(tmp_path / "backups") == []


def test_an_unfinished_backup_is_not_listed_and_goes_in_time(tmp_path: Path, state: Path) -> None:
    crashed = tmp_path / "backups" / f"{trees.ASIDE}crashed"
    crashed.mkdir(parents=True)
    assert list_backups(tmp_path / "backups") == []
    make(tmp_path, state)
    assert crashed.exists()  # it might be another one at work
    os.utime(crashed, (1, 1))
    make(tmp_path, state, now=NOW + 1)
    assert not crashed.exists()


def test_a_part_that_is_not_there_and_a_folder_that_cannot_be_written_are_named(tmp_path: Path, state: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        make_backup(tmp_path / "backups", {"x": tmp_path / "nowhere"}, now=NOW, keep=1)
    assert os.listdir(tmp_path / "backups") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        make_backup(tmp_path / "file" / "backups", {}, now=NOW, keep=1)
    with pytest.raises(ConfigError, match=r"slot\.json, state"):
        restore_backup(make(tmp_path, state).path, tmp_path / "x", part="stat")


@pytest.mark.parametrize("name", ["", "/etc", "../x", "a/../b", "manifest.json", "a//b", "./a"])
def test_a_part_needs_a_plain_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="can't name a part"):
        make_backup(tmp_path, {name: b""}, now=NOW, keep=1)


names = st.text(st.characters(min_codepoint=97, max_codepoint=105), min_size=1, max_size=3)


@settings(max_examples=15, deadline=None)
@given(content=st.dictionaries(names, st.binary(max_size=300), max_size=5))
def test_any_content_comes_back(tmp_path_factory: pytest.TempPathFactory, content: dict[str, bytes]) -> None:
    folder = tmp_path_factory.mktemp("any")
    made = make_backup(folder / "backups", content, now=NOW, keep=1)
    restore_backup(made.path, folder / "out")
    assert {name: (folder / "out" / name).read_bytes() for name in os.listdir(folder / "out")} == content
