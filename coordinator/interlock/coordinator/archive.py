"""Listens to what is measured of migrations in flight, and keeps their records. A broken disk hurts no migration."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from interlock.broker import facts, topics
from interlock.broker.client import Bus
from interlock.broker.errors import InterlockError
from interlock.broker.samples import SeriesReader
from interlock.broker.wire import Event
from interlock.coordinator import records
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.emit import Emit
from interlock.coordinator.observers import hosts_of
from interlock.coordinator.recorder import Recorder

log = logging.getLogger("interlock.coordinator")

LOOK_S = 0.25  # between looks for what began or ended: an answer of the host takes longer
RECORDED = 64  # migrations whose series are recorded at once, at some 1 MB each; others have a record without series
GATHER_S = 60.0  # for reading one migration's events back: a broker that is slower has other worries

T = TypeVar("T")
_Ended = tuple[str, str, tuple[str, str], int]  # migration, agent, its host and where it was to move to, epoch


class Archive:
    """`see` takes each event of the log; `recorded` what belongs into the log before a migration's end.

    folder: where records are kept; None: nowhere.
    """

    def __init__(self, bus: Bus, core: Coordinator, folder: Path | None) -> None:
        self._bus = bus
        self._core = core
        self._folder = folder
        self._recorders: dict[str, tuple[Recorder, trio.CancelScope]] = {}
        self._hosts: dict[str, tuple[str, str]] = {}  # of migrations that have begun: where, and where to
        self._ended: dict[str, _Ended] = {}  # to be written, the oldest first
        self._changed = trio.Event()

    def see(self, event: Event) -> None:
        """An event of the log."""
        body = event.body
        if self._folder is None:
            return
        if isinstance(body, facts.MigrationStarted):
            self._hosts[body.migration] = (body.host, body.target)
        elif isinstance(body, facts.MigrationEnded):
            known = self._core.fleet.migrations.get(body.migration)  # begun before the snapshot that was read
            places = self._hosts.pop(body.migration, None) or (
                (known.host, known.target) if known is not None else ("", "")
            )
            ended = (body.migration, body.agent, places, body.epoch)
            self._ended[body.migration] = ended
            while len(self._ended) > records.KEPT:
                del self._ended[next(iter(self._ended))]
            self._changed.set()

    def recorded(self, emit: Emit) -> Emit | None:
        """Before a migration's end: the series that were recorded of it, if any."""
        if not isinstance(emit.body, facts.MigrationEnded) or emit.body.migration not in self._recorders:
            return None
        recorder, scope = self._recorders.pop(emit.body.migration)
        scope.cancel()
        found = recorder.recorded()
        return Emit(topics.record(emit.body.agent), found, f"{emit.body.migration}/series") if found.series else None

    async def run(self) -> None:
        """Until cancelled. To be started once the log is read: what ended long ago and has its file is left alone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._record)
            if self._folder is not None:
                nursery.start_soon(self._keep, self._folder)

    async def _record(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                flying = self._core.migrations
                for number in [number for number in self._recorders if number not in flying]:
                    self._recorders.pop(number)[1].cancel()
                for number, migration in flying.items():
                    if number not in self._recorders and len(self._recorders) < RECORDED and not migration.said_end:
                        recorder, scope = Recorder(number, migration.started.agent), trio.CancelScope()
                        self._recorders[number] = (recorder, scope)
                        nursery.start_soon(_listen, self._bus, hosts_of(migration), recorder, scope)
                await trio.sleep(LOOK_S)

    async def _keep(self, folder: Path) -> None:
        there = await _in_thread("read the folder of records", lambda: {path.stem for path in folder.glob("*.json")})
        for number in (there or set()) & set(self._ended):
            del self._ended[number]
        while True:
            self._changed = trio.Event()
            while self._ended:
                migration, agent, places, epoch = self._ended.pop(next(iter(self._ended)))
                await self._write(folder, migration, agent, places, epoch)
            await self._changed.wait()

    async def _write(self, folder: Path, migration: str, agent: str, places: tuple[str, str], epoch: int) -> None:
        if not records.is_name(migration):
            return
        host, target = places
        try:
            with trio.fail_after(GATHER_S):
                record = await records.gather(self._bus, migration, agent, host, target=target, epoch=epoch)
        except (InterlockError, trio.TooSlowError) as error:
            log.warning("no record of %s was written: its events could not be read: %s", migration, error)
            return
        await _in_thread(f"write the record of {migration}", lambda: records.save(folder, record))


async def _in_thread(what: str, act: Callable[[], T]) -> T | None:
    try:
        return await trio.to_thread.run_sync(act)
    except OSError as error:
        log.warning("could not %s: %s", what, error)
        return None


async def _listen(bus: Bus, hosts: list[str], recorder: Recorder, scope: trio.CancelScope) -> None:
    reader = SeriesReader()
    with scope:
        wanted = [topics.telemetry(host, publisher) for host in hosts for publisher in ("host", "monitor")]
        async with bus.samples(wanted) as feed:
            async for batches in feed:
                for batch in batches:
                    samples, _ = reader.read(batch)
                    recorder.take(samples, batch.time)
