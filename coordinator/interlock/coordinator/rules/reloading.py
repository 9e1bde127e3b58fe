"""Rule files that change while the engine runs: read again on SIGHUP, or soon after one was written."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.errors import ConfigError
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.rulefile import SHIPPED, load_rules

LOOK_S = 1.0  # between looks at the files' times; somebody who wrote one expects it to hold within seconds

Stamp = tuple[tuple[int, int, int] | None, ...]  # of each file: inode, time of change, size; None: it isn't there


class RuleFiles:
    """The rule files that a fleet file names, the fleet file among what is watched: it may name others."""

    def __init__(self, fleet: FleetConfig) -> None:
        self._fleet = fleet
        self._seen = _stamp(fleet)

    def changed(self) -> bool:
        """Whether a file is another one than at the last look. That one is gone, as an editor leaves it, is none."""
        stamp = tuple(new or old for new, old in zip(_stamp(self._fleet), self._seen, strict=True))
        before, self._seen = self._seen, stamp
        return stamp != before

    def read(self) -> list[Rule]:
        """The rules as they are now. ConfigError for what is wrong; it is read again when a file changes."""
        path = Path(self._fleet.path)
        fleet = load_fleet(path) if path.is_file() else self._fleet  # its list from before holds while it is gone
        stamp = _stamp(fleet)  # before the files are read: one that is written meanwhile is read again
        rules = load_rules(fleet.rules.files, fleet.folder)
        self._fleet, self._seen = fleet, stamp
        return rules


def _stamp(fleet: FleetConfig) -> Stamp:
    own = [Path(fleet.path)] if fleet.path else []
    return tuple(
        _one(path) for path in (*own, *(fleet.folder / name for name in fleet.rules.files if name not in SHIPPED))
    )


def _one(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


async def follow(
    files: RuleFiles, take: Callable[[Sequence[Rule]], None], refuse: Callable[[ConfigError], None]
) -> None:
    """Until cancelled: `take` what was read anew, `refuse` what can't be."""

    async def read() -> None:
        try:
            rules = await trio.to_thread.run_sync(files.read)
        except ConfigError as error:
            refuse(error)
        else:
            take(rules)

    async def on_signal() -> None:
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            async for _ in signals:
                await read()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(on_signal)
        while True:
            await trio.sleep(LOOK_S)
            if await trio.to_thread.run_sync(files.changed):
                await read()
