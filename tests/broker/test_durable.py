"""What must outlive a power cut is synced under its name, in the order that makes it so."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from interlock.broker import keys, outbox_file
from interlock.broker.outbox import Entry
from interlock.broker.outbox_file import OutboxFile


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this process asked of the disk: "sync NAME" of files, "sync NAME/" of folders, "replace NAME"."""
    done: list[str] = []

    def watch(what: str) -> None:
        real = getattr(os, what)

        def sync(descriptor: int) -> None:
            real(descriptor)
            name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
            done.append(f"sync {name}" + ("/" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else ""))

        monkeypatch.setattr(os, what, sync)

    watch("fsync")
    watch("fdatasync")
    replace = os.replace

    def replaced(old: str | Path, new: str | Path) -> None:
        replace(old, new)
        done.append(f"replace {Path(new).name}")

    monkeypatch.setattr(os, "replace", replaced)
    return done


def test_a_new_outbox_is_there_under_its_name_before_anything_is_kept_in_it(tmp_path: Path, done: list[str]) -> None:
    file = OutboxFile(tmp_path / "state" / "host" / "outbox")
    with_its_head = ["sync outbox.new", "replace outbox", "sync host/"]
    assert done == ["sync state/", f"sync {tmp_path.name}/", "sync host/", *with_its_head]
    file.save([Entry("1", [b"t/", b"h", b"b"])], [])
    assert done[6:] == ["sync outbox"]
    file.close()


def test_an_outbox_written_anew_has_its_name_before_more_is_kept_in_it(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_file, "COMPACT_BYTES", 1000)
    file = OutboxFile(tmp_path / "outbox")
    file.save([Entry(str(n), [b"t/", b"h", bytes(500)]) for n in range(4)], [])
    done.clear()
    file.save([], ["0", "1", "2"])
    for n in (5, 6):
        file.save([Entry(str(n), [b"t/", b"h", bytes(500)])], [])
    file.close()
    assert done[-4:] == ["sync outbox.new", "replace outbox", f"sync {tmp_path.name}/", "sync outbox"]


def test_a_revocation_is_on_disk_under_its_name_when_it_has_been_written(tmp_path: Path, done: list[str]) -> None:
    keys.write_authority(tmp_path / "keys", keys.Authority(fleet="f"))
    assert done[0] == f"sync {tmp_path.name}/"
    assert done[1].startswith("sync .new-")
    assert done[2:] == ["replace authority.json", "sync keys/"]
