"""`interlock log`: what is in the event log, told, followed, exported, and verified against its hash chain."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import trio

from interlock.broker import wire
from interlock.broker.bus import Bus, EventFeed
from interlock.broker.chain import Head, Verdict
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError, LogError, WireError
from interlock.broker.log import EventLog, Record
from interlock.broker.wire import Header
from interlock.coordinator.verbs import broker_silent, listening
from interlock.coordinator.wording import sentence

LIMIT = 50  # events that `list` tells where nobody asks for more: a screen or two
PAGE_EVENTS, PAGE_BYTES = 1000, 16 << 20  # read from a file at once
PLAIN = ("id", "source", "time", "seq", "prev", "logged")  # told of every event; what else its header has, if it has
AGO = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True)
class Entry:
    """One event of the log. `body`: plain values, also of a type that is not known here, where `text` is empty."""

    topic: str
    header: Header
    body: dict[str, Any]
    text: str

    @property
    def type(self) -> str:
        return str(self.body.get("type", ""))

    def to_json(self) -> dict[str, Any]:
        header = self.header
        return {
            "seq": header.seq,
            "logged": header.logged,
            "topic": self.topic,
            "type": self.type,
            "source": header.source,
            "id": header.id,
            "time": header.time,
            "prev": header.prev,
            "body": self.body,
        } | {key: value for key, value in msgspec.to_builtins(header).items() if value and key not in PLAIN}


@dataclass(frozen=True)
class Filter:
    """Which events are wanted; what is empty lets all pass. since, until: seconds since 1970, when they were logged."""

    topics: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    agent: str = ""
    since: float = 0.0
    until: float = float("inf")

    def passes(self, entry: Entry) -> bool:
        return (
            (not self.topics or entry.topic.startswith(self.topics))
            and (not self.types or entry.type in self.types)
            and (not self.agent or entry.body.get("agent") == self.agent)
            and self.since <= (entry.header.logged or entry.header.time) <= self.until
        )

    @property
    def prefixes(self) -> list[str]:
        return list(self.topics) or [""]


def moment(text: str, *, now: float | None = None) -> float:
    """Seconds since 1970 of "90s", "10m", "2h" or "3d" ago, of ISO 8601 (local time if it names no zone), or a number.

    ConfigError for anything else.
    """
    if ago := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return (time.time() if now is None else now) - float(ago[1]) * AGO[ago[2]]
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ConfigError(
            f"{text!r} is no time", hint="such as 10m (ago), 2026-01-31T12:00, or seconds since 1970"
        ) from None


def read_entry(record: Record) -> Entry:
    try:
        text = sentence(wire.decode_body(record.body))
    except WireError:
        text = ""
    try:
        body = msgspec.msgpack.decode(record.body)
    except (msgspec.DecodeError, ValueError):
        body = {"undecodable": record.body.hex()}
    return Entry(record.topic, record.header, body if isinstance(body, dict) else {"value": body}, text)


# --- a file


@contextmanager
def opened(path: Path) -> Iterator[EventLog]:
    """The log file for reading only, a broker's live one too; a copy of it from where nothing can be written."""
    if not path.is_file():
        raise ConfigError("there is no such file", where=str(path), hint="a broker's log is STATE/broker/events.sqlite")
    try:
        log = EventLog(path, read_only=True)
    except LogError as error:
        if "unable to open" not in str(error) and "readonly" not in str(error):
            raise
        with tempfile.TemporaryDirectory(prefix="interlock-log-") as folder:
            for suffix in ("", "-wal"):
                beside = path.with_name(path.name + suffix)
                if beside.exists():
                    shutil.copyfile(beside, Path(folder) / beside.name)
            log = EventLog(Path(folder) / path.name)
            try:
                yield log
            finally:
                log.close()
        return
    try:
        yield log
    finally:
        log.close()


def of_file(path: Path, wanted: Filter, *, after: int = 0) -> Iterator[Entry]:
    with opened(path) as log:
        while True:
            page = log.read(after, wanted.prefixes, limit=PAGE_EVENTS, max_bytes=PAGE_BYTES)
            for entry in map(read_entry, page.records):
                if wanted.passes(entry):
                    yield entry
            if not page.more:
                return
            after = page.through


def verify(path: Path, expect: str = "") -> Verdict:
    """Judge the chain of a log file, also one that a broker is writing. `expect`: a head that was noted earlier."""
    try:
        head = Head.parse(expect) if expect else None
    except ValueError as error:
        raise ConfigError(str(error), hint="as an earlier `interlock log verify` printed it") from None
    with opened(path) as log:
        return log.verify(expect=head)


# --- a live broker


async def of_broker(
    bus: Bus,
    fleet: FleetConfig,
    wanted: Filter,
    *,
    after: int = 0,
    follow: bool,
    timeout: float,
    say: Callable[[Entry], None],
) -> None:
    """Say the events of the log, by replay, and with `follow` those that come then.

    Unreachable if the broker is silent from the start, or before all has come.
    """
    async with listening(bus, fleet, wanted.prefixes, timeout=timeout, after=after) as feed:
        while (event := await _next(feed, fleet, follow=follow, timeout=timeout)) is not None:
            entry = read_entry(Record(event.topic, event.header, event.raw))
            if wanted.passes(entry):
                say(entry)


async def _next(feed: EventFeed, fleet: FleetConfig, *, follow: bool, timeout: float) -> wire.Event | None:
    """None: all that was in the log has come. (With `follow` there is no end.)"""
    found: list[wire.Event] = []
    while not found:
        position = feed.position
        with trio.move_on_after(timeout) as waited:
            async with trio.open_nursery() as nursery:

                async def caught_up(scope: trio.CancelScope) -> None:
                    await feed.caught_up.wait()
                    scope.cancel()

                if not follow:
                    nursery.start_soon(caught_up, nursery.cancel_scope)
                found.append(await anext(feed))
                nursery.cancel_scope.cancel()
        if found or follow:
            continue
        if feed.caught_up.is_set():
            return None
        if waited.cancelled_caught and feed.position == position:
            raise broker_silent(fleet, timeout)
    return found[0]
