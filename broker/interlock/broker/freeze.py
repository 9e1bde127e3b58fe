"""Freeze windows: when a fleet stays as it is. Pure: the moment and the zone are arguments.

A window is of the week ("Fri 16:00" to "Mon 08:00", which may go over the week's end) or happens once (ISO 8601). Times
that name no zone are wall-clock times of the zone that the fleet file names, so a window moves with daylight saving.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from interlock.broker.errors import ConfigError

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_WEEKLY = re.compile(r"(\w{3,9}) (\d{1,2}):(\d{2})")
DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class Window:
    """From `start` until before `end`: minutes since Monday 0:00, or moments."""

    start: int | datetime
    end: int | datetime

    @classmethod
    def parse(cls, start: str, end: str, *, where: str = "freeze") -> Window:
        """ConfigError if one is no time, they are not of the same kind, or nothing lies between them."""
        begin, finish = _moment(start, f"{where}.from"), _moment(end, f"{where}.to")
        if isinstance(begin, int) != isinstance(finish, int):
            raise ConfigError(
                "from and to are not of the same kind",
                where=where,
                hint='both of the week, such as "Fri 16:00", or both of a date',
            )
        if begin == finish or (isinstance(begin, datetime) and isinstance(finish, datetime) and _order(begin, finish)):
            raise ConfigError(f"nothing lies between {start} and {end}", where=where)
        return cls(begin, finish)

    def covers(self, now: float, zone: tzinfo | None) -> bool:
        """Whether `now` (seconds since 1970) lies in it. `zone`: None is the machine's own."""
        local = datetime.fromtimestamp(now, zone)
        if isinstance(self.start, int) and isinstance(self.end, int):
            minute = local.weekday() * DAY_MINUTES + local.hour * 60 + local.minute
            if self.start < self.end:
                return self.start <= minute < self.end
            return minute >= self.start or minute < self.end
        assert isinstance(self.start, datetime)
        assert isinstance(self.end, datetime)
        return _seconds(self.start, zone) <= now < _seconds(self.end, zone)


def parse_zone(name: str, *, where: str = "freeze.timezone") -> tzinfo | None:
    """None for "": the machine's own. ConfigError for a zone that this machine doesn't know."""
    if not name:
        return None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(f"there is no time zone {name!r} here", where=where, hint='such as "Europe/Berlin"') from None


def _moment(text: str, where: str) -> int | datetime:
    if found := _WEEKLY.fullmatch(text):
        day, hour, minute = found[1][:3].capitalize(), int(found[2]), int(found[3])
        if day in DAYS and hour < 24 and minute < 60:
            return DAYS.index(day) * DAY_MINUTES + hour * 60 + minute
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{text!r} is no time", where=where, hint='such as "Fri 16:00" or "2026-12-24T12:00"'
        ) from None


def _order(begin: datetime, finish: datetime) -> bool:
    """Whether the second is not after the first, as far as that can be told without a zone."""
    if (begin.tzinfo is None) != (finish.tzinfo is None):
        begin, finish = begin.replace(tzinfo=None), finish.replace(tzinfo=None)
    return finish <= begin


def _seconds(moment: datetime, zone: tzinfo | None) -> float:
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=zone)).timestamp()
