"""What a migration remembers of the measurements of its candidate, and which of them are told. Pure.

Each kind of verdict has a limit. *failed*: so many measurements may fail, the next one condemns. *inconclusive*: at the
end of its time the observation is prolonged so many times by a quarter, then it is held for an operator. *error*: so
many in a row are waited for at the end, then it is held too. Only *passed* leads to the commit.
"""

from __future__ import annotations

from dataclasses import dataclass

from interlock.broker import facts
from interlock.broker.commands import Breach
from interlock.broker.strategies import ObserveConfig
from interlock.coordinator.observation import CHECKPOINTS, Measurement

SPACING_S = 1.0  # between measurements that count against a limit: nobody can do better within less
PROLONGED = 0.25  # of the planned time, each time
LAST_WORD_S = 15.0  # after an observation's time, for a measurement; nobody judges any more, and it is held


@dataclass(frozen=True)
class Watched:
    """How far a candidate's trial with live requests is. `share`: of the planned time that is over; may exceed 1.

    elapsed_s: seconds of it. ends: all requests are the candidate's; before, it is a canary and can only fail.
    """

    share: float
    elapsed_s: float
    ends: bool


class Judgement:
    """Folded from the `checks-measured` of one migration."""

    def __init__(self, settings: ObserveConfig) -> None:
        self.last: facts.ChecksMeasured | None = None  # the final one
        self._settings = settings
        self._told = 0.0  # the newest checkpoint
        self._counted_at = float("-inf")  # of the newest that counts against a limit, seconds since 1970
        self._count = 0  # of measurements: no event has the id of an earlier one
        self._failures = 0
        self._errors = 0
        self._prolonged = 0

    def apply(self, body: facts.ChecksMeasured, at: float) -> None:
        self._count += 1
        if body.verdict in ("failed", "error"):
            self._counted_at = at
        self._told = max(self._told, body.checkpoint)
        self._failures += body.verdict == "failed"
        if body.final:
            self.last = body
        elif body.checkpoint >= 1:
            self._errors = self._errors + 1 if body.verdict == "error" else 0
            self._prolonged += body.verdict == "inconclusive"

    def again(self) -> None:
        """An operator lets it go on: what was inconclusive is measured once more."""
        self.last = None
        self._errors = 0

    @property
    def passed(self) -> bool:
        return self.last is not None and self.last.verdict == "passed"

    @property
    def time(self) -> float:
        """How many times the planned time the observation takes."""
        return 1 + PROLONGED * self._prolonged

    def next_id(self, migration: str) -> str:
        return f"{migration}/checks/{self._count}"

    def breach(self, at: float) -> Breach:
        """Why it did not pass, as what held it or rolled it back."""
        if self.last is None:
            reason = f"nobody has judged the candidate {LAST_WORD_S:.0f} s after the end of its time"
            return Breach(by="check observation", reason=reason, sample_time=at)
        guilty = [check.check for check in self.last.checks if check.verdict == self.last.verdict]
        return Breach(by=f"check {', '.join(guilty) or 'observation'}", reason=self.last.reason, sample_time=at)

    def due(self, watched: Watched, measured: Measurement, now: float) -> tuple[bool, bool]:
        """(whether the measurement is to be told, whether it is the last)."""
        settings, spaced = self._settings, now >= self._counted_at + SPACING_S
        if measured.verdict == "failed":
            return spaced, self._failures >= settings.failures
        if not watched.ends:
            return False, False
        if watched.share < 1:
            enough = settings.min_s is not None and watched.elapsed_s >= settings.min_s
            if measured.verdict == "passed" and enough:
                return True, True
            return max((point for point in CHECKPOINTS if point <= watched.share), default=0.0) > self._told, False
        if measured.verdict == "error":
            return spaced, self._errors >= settings.errors
        return True, measured.verdict == "passed" or self._prolonged >= settings.inconclusive

    @staticmethod
    def words(measured: Measurement, watched: Watched, *, final: bool) -> str:
        """For the record: what was seen, and why it ended when it did."""
        if not final or measured.verdict != "passed":
            return measured.reason
        early = watched.share < 1
        end = f"after {watched.elapsed_s:.0f} s: the evidence is enough" if early else "for its full time"
        return f"observed {end}, every check passed"
