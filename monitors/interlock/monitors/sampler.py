"""When which samples are due. Pure: the time (monotonic, seconds) is an argument everywhere.

Three groups of readings have a beat each. The hot ones (GPU memory and load, memory and CPU of agents, memory of the
machine) are what a bad candidate shows first: while a migration touches the host they beat fast. The calm ones always
beat once an idle period; what changes slowly, or costs much to read, beats more slowly still. A beat is a grid,
`origin + n * period`: a late sample does not push the next one back, and all groups share the origin, so that a slow
beat falls together with a hot one and goes into the same batch.
"""

from __future__ import annotations

import math
from enum import Enum


class Group(Enum):
    HOT = "hot"
    CALM = "calm"
    SLOW = "slow"

    __hash__ = object.__hash__  # members are compared by identity; the usual one is Python, and asked for each series


class Beat:
    """The grid of one group. `missed` counts the points that passed without a sample."""

    def __init__(self, origin: float, period: float) -> None:
        if period <= 0:
            raise ValueError(f"a period of {period} s")
        self.origin = origin
        self.period = period
        self.missed = 0
        self._tick = 0

    @property
    def next(self) -> float:
        return self.origin + self._tick * self.period

    def take(self, now: float) -> bool:
        """True if a sample is due; the next one is then the first point after `now`."""
        if now < self.next:
            return False
        first = self._tick
        self._tick = max(first + 1, math.floor((now - self.origin) / self.period))
        while self.next <= now:  # at most two rounds: what rounding may have left
            self._tick += 1
        self.missed += self._tick - first - 1
        return True

    def change(self, period: float, now: float) -> None:
        """Go on with another period on the same origin; the first point is not before `now`."""
        if period == self.period:
            return
        self.period = period
        self._tick = max(0, math.floor((now - self.origin) / period))
        while self.next < now:
            self._tick += 1


class Schedule:
    """The beats of all groups for one thing that is sampled. `slow_s` None: as often as the calm ones."""

    def __init__(self, start: float, *, idle_s: float, migrating_s: float, slow_s: float | None = None) -> None:
        self._idle = idle_s
        self._migrating = min(migrating_s, idle_s)
        self._hot = Beat(start, idle_s)
        self._calm = Beat(start, idle_s)
        self._slow = Beat(start, max(idle_s, idle_s if slow_s is None else slow_s))

    def migrating(self, yes: bool, now: float) -> None:
        """Fast from now on, or slow again."""
        self._hot.change(self._migrating if yes else self._idle, now)

    @property
    def next(self) -> float:
        """When to call `due` again."""
        return min(self._hot.next, self._calm.next, self._slow.next)

    def due(self, now: float) -> frozenset[Group]:
        """The groups to sample right now; empty before `next`."""
        beats = ((Group.HOT, self._hot), (Group.CALM, self._calm), (Group.SLOW, self._slow))
        return frozenset([group for group, beat in beats if beat.take(now)])

    @property
    def missed(self) -> int:
        """Points that passed without a sample: sampling took longer than the period, or the machine stood still."""
        return self._hot.missed + self._calm.missed + self._slow.missed
