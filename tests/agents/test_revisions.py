"""The revision store: a digest says all about what runs, and nothing in the store changes unseen."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interlock.agents import revisions
from interlock.agents.revisions import Revision, RevisionStore, check_name_free
from interlock.agents.trees import Damaged, StorageError, remove_tree
from interlock.broker.config import ProbeConfig, RevisionConfig
from interlock.broker.errors import ConfigError, Refused

CONFIG = RevisionConfig(source="src", entry="agent:Echo", config={"b": 1, "a": [1.5, None]}, env={"X": "{port}"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    (folder / "pkg" / "empty").mkdir(parents=True)
    (folder / "agent.py").write_text("class Echo: ...\n")
    (folder / "pkg" / "model.bin").write_bytes(bytes(range(256)) * 5000)
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "current").symlink_to("pkg/model.bin")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> RevisionStore:
    return RevisionStore(tmp_path / "state" / "revisions")


Edit = Callable[[Path], object]


def in_store(revision: Revision, edit: Edit) -> None:
    """Change the store behind its back, as somebody with the rights can."""
    for folder, _, files in os.walk(revision.folder.parent):
        os.chmod(folder, 0o755)
        for name in files:
            if not (Path(folder) / name).is_symlink():
                os.chmod(Path(folder) / name, 0o644 | (0o111 & (Path(folder) / name).stat().st_mode))
    edit(revision.folder)


def test_a_recorded_revision_is_the_same_and_read_only(store: RevisionStore, source: Path) -> None:
    revision = store.record("echo", "v1", CONFIG, source)
    assert (revision.folder / "agent.py").read_text() == "class Echo: ...\n"
    assert (revision.folder / "current").read_bytes() == (source / "pkg" / "model.bin").read_bytes()
    assert (revision.folder / "pkg" / "empty").is_dir()
    modes = {path.name: path.stat().st_mode & 0o777 for path in revision.folder.iterdir() if not path.is_symlink()}
    assert modes == {"agent.py": 0o444, "run.sh": 0o555, "pkg": 0o555}
    assert store.verify(revision.digest) == []
    assert store.spec_of(revision.digest) == msgspec.structs.replace(CONFIG, source=str(revision.folder))
    assert store.get("echo", "v1", revision.digest) == revision


def test_the_same_content_has_the_same_digest_and_is_kept_once(
    store: RevisionStore, source: Path, tmp_path: Path
) -> None:
    first = store.record("echo", "v1", CONFIG, source)
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "agent.pyc").write_bytes(b"x")
    (source / ".git").mkdir()
    (source / "old.pyc").write_bytes(b"x")
    (source / "venv").mkdir()
    (source / "venv" / "pyvenv.cfg").write_text("")
    elsewhere = source.rename(tmp_path / "elsewhere")
    os.utime(elsewhere / "agent.py", (1, 1))
    (elsewhere / "agent.py").chmod(0o600)
    moved = msgspec.structs.replace(CONFIG, source="elsewhere", config={"a": [1.5, None], "b": 1})
    again = store.record("other", "v7", moved, elsewhere)
    assert again.digest == first.digest
    assert store.digests() == {first.digest}


@pytest.mark.parametrize(
    "edit",
    [
        lambda source: (source / "agent.py").write_text("class Echo: pass\n"),
        lambda source: (source / "agent.py").chmod(0o755),
        lambda source: (source / "agent.py").rename(source / "agent2.py"),
        lambda source: (source / "new").mkdir(),
        lambda source: ((source / "current").unlink(), (source / "current").symlink_to("run.sh")),
    ],
)
def test_any_other_content_has_another_digest(store: RevisionStore, source: Path, edit: Edit) -> None:
    first = store.record("echo", "v1", CONFIG, source)
    edit(source)
    second = store.record("echo", "v1", CONFIG, source)
    assert second.digest != first.digest
    assert store.verify(first.digest) == store.verify(second.digest) == []


@pytest.mark.parametrize(
    "change",
    [
        {"entry": "agent:Other"},
        {"python": "/usr/bin/python3"},
        {"config": {"b": 2}},
        {"env": {}},
        {"start_timeout_s": 31.0},
        {"entry": "", "command": ["a"], "probe": ProbeConfig(kind="tcp")},
    ],
)
def test_any_other_specification_has_another_digest(store: RevisionStore, source: Path, change: dict[str, Any]) -> None:
    first = store.record("echo", "v1", CONFIG, source)
    other = store.record("echo", "v1", msgspec.structs.replace(CONFIG, **change), source)
    assert first.digest != other.digest


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda code: (code / "agent.py").write_text("x"), "agent.py was changed"),
        (lambda code: (code / "agent.py").unlink(), "agent.py is missing"),
        (lambda code: (code / "agent.py").chmod(0o755), "agent.py has another mode"),
        (lambda code: (code / "extra.py").write_text("x"), "extra.py is not of the revision"),
        (lambda code: ((code / "current").unlink(), (code / "current").symlink_to("x")), "current points elsewhere"),
        (lambda code: ((code / "run.sh").unlink(), (code / "run.sh").mkdir()), "run.sh was replaced"),
        (lambda code: (code.parent / "revision.json").write_text("{}"), "was changed since it was recorded"),
        (lambda code: (code.parent / "revision.json").unlink(), "no such revision"),
    ],
)
def test_verify_finds_what_was_changed_and_recording_again_mends_it(
    store: RevisionStore, source: Path, edit: Edit, says: str
) -> None:
    revision = store.record("echo", "v1", CONFIG, source)
    in_store(revision, edit)
    (problem,) = store.verify(revision.digest)
    assert says in problem
    assert store.record("echo", "v1", CONFIG, source) == revision
    assert store.verify(revision.digest) == []
    store.collect({revision.digest})
    assert os.listdir(store.folder) == [revision.digest]


def test_a_revision_that_is_not_there_says_so(store: RevisionStore) -> None:
    with pytest.raises(Damaged, match="no such revision"):
        store.spec_of("0" * 64)
    assert store.verify("0" * 64) != []
    assert store.digests() == set()
    assert store.collect(set()) == []


@pytest.mark.parametrize("target", ["../outside", "/etc/passwd", "pkg/../../outside", "loop"])
def test_links_out_of_the_source_are_refused(store: RevisionStore, source: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "outside").write_text("x")
    (source / "loop").symlink_to("loop2")
    (source / "loop2").symlink_to("/")
    (source / "bad").symlink_to(target)
    with pytest.raises(ConfigError, match="points outside the source"):
        store.record("echo", "v1", CONFIG, source)
    assert store.digests() == set()


def test_an_absolute_link_inside_the_source_leads_into_the_copy(store: RevisionStore, source: Path) -> None:
    (source / "pkg" / "absolute").symlink_to(source / "run.sh")
    revision = store.record("echo", "v1", CONFIG, source)
    assert os.readlink(revision.folder / "pkg" / "absolute") == "../run.sh"


def test_a_source_that_is_too_large_is_refused_with_a_hint(
    store: RevisionStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revisions, "MAX_SOURCE_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match=r"larger than 1 MiB.*keep models"):
        store.record("echo", "v1", CONFIG, source)


def test_sockets_are_left_out_and_pipes_refused(store: RevisionStore, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        os.chdir(folder)  # the path of a socket must be short
        left.bind("left.sock")
        revision = store.record("echo", "v1", CONFIG, folder)
    assert list(revision.folder.iterdir()) == []
    os.mkfifo(folder / "pipe")
    with pytest.raises(ConfigError, match="neither file"):
        store.record("echo", "v1", CONFIG, folder)


def test_a_state_folder_inside_the_source_is_left_out(tmp_path: Path, source: Path) -> None:
    store = RevisionStore(source / "state" / "host-a" / "revisions")
    first = store.record("echo", "v1", CONFIG, source)
    second = store.record("echo", "v1", CONFIG, source)
    assert first.digest == second.digest
    assert not (first.folder / "state").exists()


def test_a_revision_without_code_has_an_empty_folder(store: RevisionStore) -> None:
    config = RevisionConfig(command=["/usr/bin/server"], probe=ProbeConfig(kind="tcp"))
    revision = store.record("server", "v1", config, None)
    assert list(revision.folder.iterdir()) == []
    assert revision.config.command == ["/usr/bin/server"]


def test_a_file_that_changes_while_it_is_recorded_is_refused(
    store: RevisionStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revisions, "copy_file", lambda *arguments: "0" * 64)
    with pytest.raises(ConfigError, match="was changed while it was recorded"):
        store.record("echo", "v1", CONFIG, source)
    assert os.listdir(store.folder) == []


def test_a_store_that_cannot_be_written_says_where(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        RevisionStore(tmp_path / "file" / "revisions").record("echo", "v1", CONFIG, source)


def test_collect_keeps_what_it_is_told(store: RevisionStore, source: Path) -> None:
    first = store.record("echo", "v1", CONFIG, source)
    (source / "agent.py").write_text("two")
    second = store.record("echo", "v2", CONFIG, source)
    (store.folder / ".aside-crashed").mkdir()
    assert store.collect({second.digest}) == [first.digest]
    assert os.listdir(store.folder) == [second.digest]
    assert store.verify(second.digest) == []


def test_a_name_means_one_content_for_good() -> None:
    known = {"v1": "a" * 64}
    check_name_free("v1", "a" * 64, known)
    check_name_free("v2", "b" * 64, known)
    with pytest.raises(Refused, match="new revision name"):
        check_name_free("v1", "b" * 64, known)


@pytest.fixture(autouse=True)
def _removable(tmp_path: Path) -> object:
    """pytest can't remove read-only folders where it is not root."""
    here = os.getcwd()
    yield
    os.chdir(here)
    remove_tree(tmp_path)
