"""Where records of migrations come from and where they are kept: the event log, and files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec
import trio

from interlock.broker import topics
from interlock.broker.bus import Bus, EventFeed
from interlock.broker.errors import ConfigError
from interlock.coordinator.record import FORMAT, Folding, Record
from interlock.coordinator.report_page import page

KEPT = 200  # records that stay in the folder, at some 0.5 MB each: 100 MB
MAX_FILE = 64 << 20  # bytes of a record file that are read: the largest of ours has 2 MB
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


async def gather(bus: Bus, migration: str, agent: str, host: str, *, target: str = "", epoch: int = 0) -> Record:
    """The record of a migration out of the log. `epoch`: its own, which says where it begins; 0: anywhere.

    target: the host that it was to move to, if any.
    """
    hosts = [name for name in (host, target) if name]
    folding = await _fold(bus, migration, agent, hosts, after=max(0, epoch - 1))
    if epoch > 1 and not folding.began:  # a log that began anew has smaller numbers than the epochs of its agents
        folding = await _fold(bus, migration, agent, hosts, after=0)
    return folding.record()


async def _fold(bus: Bus, migration: str, agent: str, hosts: list[str], *, after: int) -> Folding:
    folding = Folding(migration)
    prefixes = [topics.COORDINATOR, topics.migration_fact(agent), topics.record(agent), "fact/alert/"]
    for host in hosts:
        prefixes += [topics.host_fact(host), topics.command(host), topics.rollback(host)]
    async with bus.events(prefixes, after=after) as feed, trio.open_nursery() as nursery:
        nursery.start_soon(_read, feed, folding, nursery.cancel_scope)
        await feed.caught_up.wait()
        nursery.cancel_scope.cancel()
    return folding


async def _read(feed: EventFeed, folding: Folding, scope: trio.CancelScope) -> None:
    async for event in feed:
        folding.apply(event)
        if folding.ended:
            scope.cancel()
            return


# --- files


def is_name(migration: str) -> bool:
    """Whether it can be the name of a file."""
    return _NAME.fullmatch(migration) is not None


def save(folder: Path, record: Record) -> None:
    """Write it as JSON and as a page, each at once or not at all; the oldest beyond KEPT are removed. OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{record.migration}.html", page(record).encode())
    _write(folder / f"{record.migration}.json", msgspec.json.encode(record))
    kept = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[KEPT:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".html").unlink(missing_ok=True)


def load(path: Path) -> Record:
    """A record from its file; ConfigError if it is none."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE)
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", where=str(path)) from None
    try:
        record = msgspec.json.decode(text, type=Record)
    except (msgspec.DecodeError, ValueError) as error:
        hint = "a record is what `interlock report --json` prints, or a file of STATE/coordinator/records"
        raise ConfigError(f"is no record of a migration: {error}", where=str(path), hint=hint) from None
    if record.format > FORMAT:
        raise ConfigError(
            f"is a record of format {record.format}, and known here is {FORMAT}", where=str(path),
            hint="read it with the Interlock that wrote it, or a newer one",
        )  # fmt: skip
    return record


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(data)
    os.replace(beside, path)
