"""`interlock watch`: both planes of the bus as lines, or as JSON lines."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import trio

from interlock.broker import topics
from interlock.broker.bus import Bus
from interlock.broker.config import FleetConfig
from interlock.broker.samples import NAME, Batch, Labels, SeriesReader
from interlock.broker.wire import Event
from interlock.coordinator.screen import Screen, clock
from interlock.coordinator.verbs import TICK_S, Note, broker_silent, listening

EVENT_PLANE = (topics.COMMANDS, topics.ROLLBACKS, topics.FACTS)


def planes(prefixes: Sequence[str], *, events: bool, telemetry: bool) -> tuple[list[str], list[str]]:
    """(event prefixes, telemetry prefixes) to subscribe to; of no prefix: all of the planes that were asked for.

    A prefix may be shorter than a plane's own ("" or "f"): it then stands for all topics that start with it.
    """
    both = events == telemetry
    wanted = prefixes or [""]
    of_telemetry = [p for p in wanted if p.startswith(topics.TELEMETRY) or topics.TELEMETRY.startswith(p)]
    of_events = [p for p in wanted if any(p.startswith(plane) or plane.startswith(p) for plane in EVENT_PLANE)]
    return (of_events if both or events else []), (of_telemetry if both or telemetry else [])


def event_json(event: Event) -> dict[str, Any]:
    header = event.header
    return {
        "plane": "event",
        "topic": event.topic,
        "seq": header.seq,
        "time": header.time,
        "source": header.source,
        "id": header.id,
        "body": msgspec.to_builtins(event.body),
    }


async def watch(
    bus: Bus,
    fleet: FleetConfig,
    events: Sequence[str],
    telemetry: Sequence[str],
    *,
    after: int | None,
    timeout: float,
    as_json: bool,
    screen: Screen,
    note: Note,
) -> None:
    """Until cancelled. Unreachable if the broker is silent from the start; later silences are noted."""

    def say(tree: dict[str, Any]) -> None:
        print(msgspec.json.encode(tree).decode(), flush=True)

    async def follow_events() -> None:
        lost = False
        async with listening(bus, fleet, events, timeout=timeout, after=after) as feed:
            while True:
                with trio.move_on_after(TICK_S):
                    event = await anext(feed)
                    if as_json:
                        say(event_json(event))
                    else:
                        screen.event(event)
                if feed.lost != lost:
                    lost = feed.lost
                    note("the broker is silent" if lost else "the broker is back")

    async def follow_telemetry() -> None:
        reader = SeriesReader()
        async with bus.samples(telemetry) as samples:
            async for batches in samples:
                for batch in batches:
                    for key, value, over in _samples(reader, batch):
                        if as_json:
                            say(_sample_json(batch, key, value, over))
                        else:
                            text = "ended" if over else f"{value:.6g}"
                            screen.line(f"{clock(batch.time)}  {_series(key)}  {text}", "dim")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_with_reader)
        if events:
            nursery.start_soon(follow_events)
        if telemetry:
            if not events:
                await broker_speaks(bus, fleet, timeout)
            nursery.start_soon(follow_telemetry)


async def end_with_reader() -> None:
    """BrokenPipeError once nobody reads standard output any more, though there is nothing to print just now."""
    try:
        descriptor = sys.stdout.fileno()
        is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except (OSError, ValueError):  # not a file at all
        return
    if is_pipe:
        await trio.lowlevel.wait_readable(descriptor)  # of a pipe's writing end: it is broken, there is nothing to read
        raise BrokenPipeError


async def broker_speaks(bus: Bus, fleet: FleetConfig, timeout: float) -> None:
    """Telemetry may be silent for good reasons; the event plane tells whether there is a broker at all."""
    async with listening(bus, fleet, [topics.FACTS], timeout=timeout) as feed:
        if feed.lost:
            raise broker_silent(fleet, timeout)


def _samples(reader: SeriesReader, batch: Batch) -> list[tuple[Labels, float, bool]]:
    samples, ended = reader.read(batch)
    return [(key, value, False) for key, value in samples] + [(key, 0.0, True) for key in ended]


def _sample_json(batch: Batch, key: Labels, value: float, over: bool) -> dict[str, Any]:
    labels = dict(key)
    name = labels.pop(NAME, "")
    tree = {"plane": "telemetry", "source": batch.source, "time": batch.time, "name": name, "labels": labels}
    return tree | ({"ended": True} if over else {"value": value})


def _series(key: Labels) -> str:
    labels = dict(key)
    name = labels.pop(NAME, "")
    inside = ", ".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{inside}}}"
