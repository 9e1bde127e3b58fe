"""Recorded telemetry: the lines that `interlock watch --json` prints, one sample or event each. Pure.

A value of null is not a number: JSON has no other word for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from interlock.broker.errors import ConfigError
from interlock.broker.samples import NAME, Labels, fits
from interlock.coordinator.rules.source import History, milliseconds


class _Line(msgspec.Struct):
    plane: Literal["telemetry", "event"]
    time: float
    source: str = ""
    name: str = ""
    labels: dict[str, str] = {}
    value: float | None = None
    ended: bool = False
    topic: str = ""
    body: dict[str, Any] = {}


@dataclass
class Taken:
    """What one publisher said at one time."""

    time: float
    source: str
    samples: dict[Labels, float] = field(default_factory=dict)
    ended: list[Labels] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # topic, body

    def into(self, history: History) -> None:
        at = milliseconds(self.time)
        for labels, value in self.samples.items():
            history.append(labels, value, at)
        for labels in self.ended:
            history.end(labels, at)


def read(lines: Iterable[bytes], *, file: str) -> Iterator[Taken]:
    """What was recorded, in its order. ConfigError names the line that is none."""
    decoder = msgspec.json.Decoder(_Line)
    taken: Taken | None = None
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            line = decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            hint = "a recording is what interlock watch --json prints"
            raise ConfigError(f"is no line of a recording: {error}", where=f"{file}:{number}", hint=hint) from None
        if not math.isfinite(line.time) or not fits({NAME: line.name, **line.labels}):
            raise ConfigError("has no time, or too many labels", where=f"{file}:{number}")
        if line.plane == "event":
            if taken is not None:
                yield taken
            yield Taken(line.time, line.source, events=[(line.topic, line.body)])
            taken = None
            continue
        if taken is None or (taken.time, taken.source) != (line.time, line.source):
            if taken is not None:
                yield taken
            taken = Taken(line.time, line.source)
        key = tuple(sorted({NAME: line.name, **line.labels}.items()))
        if line.ended:
            taken.ended.append(key)
        else:
            taken.samples[key] = math.nan if line.value is None else line.value
    if taken is not None:
        yield taken
