"""Durations as Prometheus writes them: 90s, 1h30m, 250ms, 0."""

from __future__ import annotations

import re

from interlock.broker.errors import ConfigError

MAX_TEXT = 64  # characters: all units, with more digits each than anybody lives to see
_UNITS = {"y": 365 * 86400.0, "w": 7 * 86400.0, "d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile("".join(rf"(?:(\d+){unit})?" for unit in _UNITS))


def duration(text: str, *, where: str = "") -> float:
    """Seconds. Units from the largest to the smallest, each once, as in Prometheus; ConfigError for anything else."""
    found = _DURATION.fullmatch(text) if len(text) <= MAX_TEXT else None
    if text == "0":
        return 0.0
    if found is None or not text:
        raise ConfigError(
            f"{text[:MAX_TEXT]!r} is not a duration", where=where, hint="for example 30s, 5m, 1h30m, 250ms"
        )
    return sum(int(count) * size for count, size in zip(found.groups(), _UNITS.values(), strict=True) if count)
