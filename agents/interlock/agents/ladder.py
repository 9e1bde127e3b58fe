"""The ladder of a rollback: its levels, how long each has, and what each sign means on each of them. Pure.

A rollback begins on `ROUTE` where the old process still runs, else on `CODE`. A level whose verification fails or whose
time is up leads to the next. Times count from the sample that showed the breach; a level that is reached late still has
its least time, since a level that gets none could only fail.

`KEPT` and `LOST` are where it ends badly. KEPT: the old revision can't be started, and the candidate, which had live
requests before and is healthy, serves them. LOST: neither serves. On both somebody is paged, and the old revision is
tried again at a slow pace, for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

from interlock.agents.slot_io import Moment
from interlock.broker.commands import Breach


class Rung(IntEnum):
    """The first four are the levels that are reported."""

    ROUTE = 1  # to the old process, which still runs
    CODE = 2  # the old revision is started again, from the store
    HOST = 3  # all slots of the host return to their permanent revisions
    BACKUP = 4  # files and state come from the newest verified backup, then as on CODE
    LOST = 5
    KEPT = 6


class Sign(StrEnum):
    """What can be heard while a rollback is under way."""

    VERIFIED = "verified"
    UNVERIFIED = "unverified"  # the old revision runs, and does not answer
    DIED = "died"  # it ended, or did not start
    TIME_UP = "time-up"
    HOST_BACK = "host-back"
    RESTORED = "restored"
    NOT_RESTORED = "not-restored"
    CANDIDATE_GONE = "candidate-gone"
    ASKED = "asked"  # somebody asks to roll back once more


class Turn(StrEnum):
    """What follows from a sign."""

    FINISH = "finish"  # rolled back
    START = "start"  # the old revision, again
    CLIMB = "climb"  # to the next level
    WAIT = "wait"


_F, _S, _C, _W = Turn.FINISH, Turn.START, Turn.CLIMB, Turn.WAIT
_SIGNS = (
    Sign.VERIFIED, Sign.UNVERIFIED, Sign.DIED, Sign.TIME_UP, Sign.HOST_BACK, Sign.RESTORED, Sign.NOT_RESTORED,
    Sign.CANDIDATE_GONE, Sign.ASKED,
)  # fmt: skip
_ROWS = {
    #              verified unverified died time-up host-back restored not-restored candidate-gone asked
    Rung.ROUTE:  (_F,      _C,        _C,  _C,     _W,       _W,      _W,          _W,            _W),
    Rung.CODE:   (_F,      _S,        _S,  _C,     _W,       _W,      _W,          _W,            _W),
    Rung.HOST:   (_F,      _S,        _S,  _C,     _W,       _W,      _W,          _W,            _W),
    Rung.BACKUP: (_F,      _S,        _S,  _C,     _W,       _S,      _C,          _W,            _W),
    Rung.LOST:   (_F,      _S,        _S,  _W,     _W,       _S,      _S,          _W,            _W),
    Rung.KEPT:   (_F,      _S,        _S,  _W,     _W,       _W,      _W,          _C,            _C),
}  # fmt: skip
LADDER: dict[tuple[Rung, Sign], Turn] = {
    (rung, sign): turn for rung, row in _ROWS.items() for sign, turn in zip(_SIGNS, row, strict=True)
}
NEXT = {
    Rung.ROUTE: Rung.CODE,
    Rung.CODE: Rung.HOST,  # KEPT, if the candidate can be kept
    Rung.HOST: Rung.BACKUP,
    Rung.BACKUP: Rung.LOST,
    Rung.KEPT: Rung.HOST,
}

WITHIN_S = {Rung.ROUTE: 5.0, Rung.CODE: 10.0, Rung.HOST: 30.0, Rung.BACKUP: 60.0}  # from the sample on: the promise
LEAST_S = {Rung.ROUTE: 2.5, Rung.CODE: 5.0, Rung.HOST: 10.0, Rung.BACKUP: 30.0}  # of a level that is reached late
SLOW_S = 30.0  # between attempts once somebody is paged: they cost a start each, and what is mended is seen within this
MAX_NOTES = 100  # lines of what was tried, kept as evidence: more than four levels can make


@dataclass
class Ascent:
    """One rollback under way: how far it is, and all that was tried."""

    breach: Breach
    received: float  # seconds since 1970
    began: float  # monotonic: when the sample was taken that showed the breach
    rung: Rung = Rung.ROUTE
    until: float = float("inf")  # monotonic: when the level's time is up
    overdue: bool = False  # the time is up, but a start in hand is let come to its end
    restoring: bool = False  # files are being put in place: nothing is started meanwhile
    keepable: bool = False  # the candidate had live requests, and nothing says that it is ill itself
    kept_at: float = float("inf")  # seconds since 1970
    highest: Rung = Rung.ROUTE  # of the four levels
    notes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, breach: Breach, rung: Rung, now: Moment) -> Ascent:
        """Time that has passed since the sample counts, unless the clocks say that it was taken later than now."""
        sampled = now.wall if breach.sample_time is None else breach.sample_time
        ascent = cls(breach, now.wall, now.mono - max(0.0, now.wall - sampled))
        ascent.enter(rung, now)
        return ascent

    def enter(self, rung: Rung, now: Moment) -> None:
        self.rung, self.overdue = rung, False
        self.until = float("inf")
        if rung is Rung.KEPT:
            self.kept_at = now.wall
        if rung in WITHIN_S:
            self.highest = rung
            self.until = max(self.began + WITHIN_S[rung], now.mono + LEAST_S[rung])
        self.note(now, f"level {rung.value}" if rung in WITHIN_S else rung.name.lower())

    def note(self, now: Moment, what: str) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes.append({"after_s": round(now.mono - self.began, 3), "what": what})


def is_hungry(breach: Breach) -> bool:
    """The breach is about memory: the candidate must go before anything else can have room."""
    return "memory" in breach.by or "gpu" in breach.labels
