"""Who may work, of the instances of an agent without a port: at most one at any time. Pure.

The token is given to one instance, and to another only once the first has said that it stopped, or is dead. Whoever
does not say so in its time is killed. Each method takes what happened and the time (seconds, any monotone clock), and
returns what to do, in order.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

HURRY_S = 1.0  # for a candidate that is rolled back to give the token up: the rollback is promised within seconds


class Phase(StrEnum):
    FREE = "free"  # nobody has it
    GIVING = "giving"  # an instance was told to begin, and has not said that it did: it may work
    ACTIVE = "active"  # it said so
    TAKING = "taking"  # it was told to stop, and has not said that it did: it may still work
    ENDING = "ending"  # it is being killed


TRANSITIONS: dict[tuple[Phase, str], Phase] = {
    (Phase.FREE, "give"): Phase.GIVING,
    (Phase.GIVING, "given"): Phase.ACTIVE,
    (Phase.GIVING, "take"): Phase.TAKING,
    (Phase.GIVING, "gone"): Phase.FREE,
    (Phase.ACTIVE, "take"): Phase.TAKING,
    (Phase.ACTIVE, "gone"): Phase.FREE,
    (Phase.TAKING, "released"): Phase.FREE,
    (Phase.TAKING, "overdue"): Phase.ENDING,
    (Phase.TAKING, "gone"): Phase.FREE,
    (Phase.ENDING, "gone"): Phase.FREE,
}


class Give(msgspec.Struct, frozen=True):
    """Tell the instance to begin; say `given` once it did."""

    instance: str


class Take(msgspec.Struct, frozen=True):
    """Tell the instance to stop; say `released` once it did, `refused` if it can't."""

    instance: str


class Kill(msgspec.Struct, frozen=True):
    """It did not stop in its time: end it, and say `gone`."""

    instance: str


Order = Give | Take | Kill


class Token:
    """The token of one agent. `limit_s` of an instance: how long it may take to stop."""

    def __init__(self) -> None:
        self.phase = Phase.FREE
        self.holder: str | None = None  # who may be working
        self.wanted: str | None = None  # who is to work
        self._limits: dict[str, float] = {}
        self._until = float("inf")

    def known(self, instance: str) -> bool:
        return instance in self._limits

    def attach(self, instance: str, limit_s: float, now: float) -> list[Order]:
        self._limits[instance] = limit_s
        return self._settle(now)

    def want(self, instance: str | None, now: float) -> list[Order]:
        """From now on this one is to work, or nobody."""
        self.wanted = instance
        return self._settle(now)

    def hurry(self, instance: str, now: float) -> list[Order]:
        """If it is to stop, then soon."""
        if instance == self.holder and self.phase is Phase.TAKING:
            self._until = min(self._until, now + HURRY_S)
        return []

    def given(self, instance: str, now: float) -> list[Order]:
        return self._told("given", instance, now)

    def released(self, instance: str, now: float) -> list[Order]:
        return self._told("released", instance, now)

    def refused(self, instance: str, now: float) -> list[Order]:
        """It says that it can't stop: waiting is of no use."""
        return self._overdue(now) if instance == self.holder and self.phase is Phase.TAKING else []

    def gone(self, instance: str, now: float) -> list[Order]:
        """Nothing of it is left."""
        self._limits.pop(instance, None)
        return self._told("gone", instance, now)

    def expire(self, now: float) -> list[Order]:
        return self._overdue(now) if self.phase is Phase.TAKING and now >= self._until else []

    def next_deadline(self) -> float:
        return self._until if self.phase is Phase.TAKING else float("inf")

    # --- inside

    def _told(self, what: str, instance: str, now: float) -> list[Order]:
        if instance != self.holder or (self.phase, what) not in TRANSITIONS:
            return []
        self._turn(what)
        return self._settle(now)

    def _turn(self, what: str) -> None:
        self.phase = TRANSITIONS[self.phase, what]
        if self.phase is Phase.FREE:
            self.holder = None

    def _overdue(self, now: float) -> list[Order]:
        assert self.holder is not None
        self._turn("overdue")
        return [Kill(self.holder)]

    def _settle(self, now: float) -> list[Order]:
        """What follows from who has it and who should."""
        if self.phase in (Phase.GIVING, Phase.ACTIVE) and self.holder != self.wanted:
            assert self.holder is not None
            self._turn("take")
            self._until = now + self._limits.get(self.holder, 0.0)
            return [Take(self.holder)]
        if self.phase is Phase.FREE and self.wanted is not None and self.wanted in self._limits:
            self._turn("give")
            self.holder = self.wanted
            return [Give(self.wanted)]
        return []
