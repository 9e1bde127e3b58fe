"""The four levels of a backup: what each holds of an agent, and how each comes back. Blocking: call it in a thread.

configuration: the launch specification of the serving revision, the agent's settings, its row. code: the recorded
source. state: the agent's data folder. host: the journal, with the rows of all slots. What comes back replaces as a
whole; what it replaces is kept beside it, since whoever restores may have been wrong.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from interlock.agents.backup import About, Backup, Live, Part, list_backups, make_backup, restore_backup, verify_backup
from interlock.agents.journal import Journal
from interlock.agents.revisions import Revision, RevisionStore
from interlock.agents.slot_io import Row
from interlock.agents.trees import Damaged, StorageError, entries, remove_tree
from interlock.broker.config import AgentConfig, RevisionConfig
from interlock.broker.errors import ConfigError

LEVELS = ("configuration", "code", "state", "host")
REPLACED = ".replaced-"  # a data folder that a restore put aside: `.replaced-AGENT-TIME`
REPLACED_KEPT = 2  # of an agent: the one before the restore, and one more for a second thought
ROW, SPEC, SETTINGS, CODE, STATE, JOURNAL = (
    "slot.json", "configuration.json", "agent.json", "code", "state", "host.sqlite",
)  # fmt: skip


class Nothing(StorageError):
    """There is no backup that holds what is asked for."""


class Whole(msgspec.Struct, frozen=True):
    """What a backup of an agent is made from."""

    host: str
    row: Row
    revision: Revision
    settings: AgentConfig | None
    data: Path
    journal: Journal


class Lost(msgspec.Struct, frozen=True):
    """What a restore costs. Times in seconds since 1970; `age_s`: how old the backup is.

    changed: files that were written after the backup was made; newest: the last of these writes, 0 if there was none.
    """

    age_s: float
    made: float
    changed: int = 0
    newest: float = 0.0
    kept: str = ""  # where what was replaced is now

    def words(self) -> str:
        written = f"{self.changed} files were written after it, the last {_ago(time.time() - self.newest)}"
        return f"the backup is {_ago(self.age_s)} old; " + (written if self.changed else "nothing was written after it")


@dataclass
class Restoration:
    """What was put back, by level, and what that cost."""

    backup: Path
    levels: list[str] = field(default_factory=list)
    lost: Lost | None = None


def back_up(whole: Whole, folder: Path, levels: Collection[str], *, now: float, keep: int) -> Backup:
    """A verified backup of these levels. StorageError or Damaged: there is none."""
    unknown = sorted(set(levels) - set(LEVELS))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no level of a backup", where="backup", hint=f"one of {', '.join(LEVELS)}")
    row, revision = whole.row, whole.revision
    parts: dict[str, Part] = {ROW: _json(row)}
    if "configuration" in levels:
        parts[SPEC] = _json(revision.config)
        if whole.settings is not None:
            parts[SETTINGS] = _json(whole.settings)
    if "code" in levels:
        parts |= {CODE: revision.folder, SPEC: _json(revision.config)}
    if "state" in levels:
        parts[STATE] = Live(whole.data)
    if "host" in levels:
        parts[JOURNAL] = whole.journal.snapshot()
    about = About(
        host=whole.host, agent=row.agent, revision=row.permanent, digest=row.permanent_digest,
        levels=[level for level in LEVELS if level in levels],
    )  # fmt: skip
    return make_backup(folder / row.agent, parts, now=now, keep=keep, about=about)


def newest_verified(folder: Path, fits: Callable[[Row, About], bool], *, level: str = "") -> Path:
    """The newest backup in the folder that has the level, fits, and reads back as it was made. `Nothing` otherwise."""
    reason = "there is no backup yet"
    for path in list_backups(folder):
        try:
            manifest = verify_backup(path)
            row = saved_row(path)
        except (Damaged, OSError, msgspec.MsgspecError) as error:
            reason = f"the only ones are damaged: {error}"
            continue
        if level and level not in levels_of(manifest.about, manifest.parts):
            reason = f"no backup has the level {level}"
        elif not fits(row, manifest.about):
            reason = "no backup is of the revision that is permanent"
        else:
            return path
    raise Nothing(reason, where=str(folder))


def levels_of(about: About, parts: Sequence[str]) -> list[str]:
    """The levels that a backup holds; of one that does not say so, by its parts."""
    held = {"configuration": SPEC, "code": CODE, "state": STATE, "host": JOURNAL}
    return about.levels or [level for level in LEVELS if held[level] in parts]


def saved_row(path: Path) -> Row:
    return msgspec.json.decode((path / ROW).read_bytes(), type=Row)


def restore_code(path: Path, store: RevisionStore) -> Revision:
    """Record the backup's code and configuration; the content gives the digest, so nothing else can come out of it."""
    verify_backup(path)
    row = saved_row(path)
    config = msgspec.json.decode((path / SPEC).read_bytes(), type=RevisionConfig)
    source = path / CODE
    recorded = store.record(row.agent, row.permanent, config, source if any(source.iterdir()) else None)
    if recorded.digest != row.permanent_digest:
        raise Damaged("its code is not that of its row", where=f"backup {path}", hint="use an older backup")
    return recorded


def restore_state(path: Path, data: Path, *, now: float) -> Lost:
    """Put the backup's data folder in the place of `data`, which nobody may use now. What was there is kept beside."""
    manifest = verify_backup(path)
    newer = [status.st_mtime for _, _, status in _files(data) if status.st_mtime > manifest.made]
    kept = data.parent / f"{REPLACED}{data.name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}"
    remove_tree(kept)
    was = data.exists()
    restore_backup(path, data, part=STATE, keep_old=kept)
    older = sorted(data.parent.glob(f"{REPLACED}{data.name}-*"))
    for one in older[:-REPLACED_KEPT]:
        remove_tree(one)
    return Lost(
        max(0.0, now - manifest.made), manifest.made, len(newer), max(newer, default=0.0), str(kept) if was else ""
    )


def restore_journal(path: Path, journal: Path, *, now: float) -> Lost:
    """Put the backup's journal in the place of the host's, which nobody may use now; what was there is kept beside."""
    manifest = verify_backup(path)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    kept = ""
    for end in ("", "-wal", "-shm"):
        beside = journal.with_name(journal.name + end)
        if beside.exists():
            kept = kept or str(journal.with_name(f"{journal.name}.replaced-{stamp}"))
            beside.rename(journal.with_name(f"{journal.name}.replaced-{stamp}{end}"))
    restore_backup(path, journal, part=JOURNAL)
    return Lost(max(0.0, now - manifest.made), manifest.made, kept=kept)


def bring_back(whole_row: Row, backups: Path, store: RevisionStore, data: Path, *, now: float) -> Restoration:
    """Level 4 of a rollback: the recorded revision if it is damaged, and the state, from the newest verified backup."""
    agent = whole_row.agent

    def ours(row: Row, _: About) -> bool:
        return row.permanent_digest == whole_row.permanent_digest

    path = newest_verified(backups / agent, ours)
    manifest = verify_backup(path)
    held = levels_of(manifest.about, manifest.parts)
    done = Restoration(path, lost=Lost(max(0.0, now - manifest.made), manifest.made))
    if "code" in held and store.verify(whole_row.permanent_digest):
        restore_code(path, store)
        done.levels.append("code")
    if "state" in held:
        done.lost = restore_state(path, data, now=now)
        done.levels.append("state")
    return done


def _files(folder: Path) -> list[tuple[str, Path, os.stat_result]]:
    if not folder.is_dir():
        return []
    return [one for one in entries(folder) if one[1].is_file()]


def _json(tree: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(tree))


def _ago(seconds: float) -> str:
    for size, unit in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"
