"""Publishers' clocks against ours. Pure."""

from __future__ import annotations

import math

MAX_DELAY_S = 5.0  # a sample counts as no older than this when it arrives, whatever its publisher's clock says
SKEW_WINDOW_S = 60.0  # a publisher's clock offset is the smallest of the last one to two windows


class Skew:
    """A publisher's clock against ours: the smallest difference lately is the offset, the rest is delay."""

    def __init__(self) -> None:
        self._until = -math.inf
        self._current = self._previous = math.inf
        self._last = -math.inf

    def to_ours(self, time: float, now: float) -> float:
        """`time` by our clock; never after `now`, never more than `MAX_DELAY_S` before it."""
        if now >= self._until:
            self._previous, self._current = self._current, math.inf
            self._until = now + SKEW_WINDOW_S
        self._current = min(self._current, now - time)
        return min(now, max(time + min(self._current, self._previous), now - MAX_DELAY_S))

    def in_order(self, time: float, now: float) -> float:
        """As `to_ours`, and never before the last one: a clock that was set back makes no sample an old one."""
        self._last = max(self._last, self.to_ours(time, now))
        return self._last
