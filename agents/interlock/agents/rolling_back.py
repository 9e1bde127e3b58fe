"""How a slot rolls back: `ladder.py` says what follows from what, this carries it out on the slot. Pure.

The route comes first, then the old revision is verified, and only then is the candidate stopped: should the old one
turn out to be the sick one, there is still somebody who can serve. It is stopped at once if it is ill itself, or if the
breach is about memory; and before the old revision is started again, if there may not be room for both.
"""

from __future__ import annotations

from typing import Any

from interlock.agents.handing import Handing
from interlock.agents.ladder import LADDER, NEXT, SLOW_S, WITHIN_S, Ascent, Rung, Sign, Turn, is_hungry
from interlock.agents.slot_io import (
    Action,
    EndDrill,
    EndHandOver,
    EndShadow,
    Gone,
    HostRestored,
    Moment,
    Persist,
    Publish,
    Rescue,
    Restore,
    Restored,
    RestoreHost,
    Resume,
    Route,
    State,
    Stop,
    Verified,
    Verify,
)
from interlock.broker import facts
from interlock.broker.commands import Breach

AWAY = {State.ROLLING_BACK, State.KEPT}  # states in which a rollback is under way, or stuck


class RollingBack(Handing):
    """The part of a slot that leads back to its permanent revision."""

    def _roll_back(self, breach: Breach, now: Moment) -> list[Action]:
        was, candidate = self.row.state, self.candidate
        warm = self.permanent_up and self.permanent is not None
        self.ascent = Ascent.begin(breach, Rung.ROUTE if warm else Rung.CODE, now)
        hungry = is_hungry(breach)
        self.ascent.keepable = was is State.LIVE and self.candidate_up and not hungry
        self._asked = ""
        self.share = 0.0
        self.lease_until = None
        self._set(State.ROLLING_BACK)
        back = was is State.LIVE and self._may_hand_back()
        actions: list[Action] = self._begin_hand_back(now) if back else [Route(self.shares(), urgent=True)]
        if was is State.HANDING_OVER:
            actions.append(EndHandOver())
        if was is State.SHADOWING:
            actions.append(EndShadow())
        if was is State.DRILLING:
            actions.append(EndDrill())
        if not back:
            self._note_lost(_why_lost(breach, warm=warm, candidate_up=self.candidate_up), now)
        if warm and self.permanent is not None and not back:
            resume = was is State.HANDING_OVER or self.handed.at > 0
            actions += [Resume(self.permanent)] if resume else []
            actions.append(Verify(self.row.migration or "", self.permanent))
        if candidate is not None and not back:
            actions.append(Rescue(candidate))
        actions.append(Persist(self.row, f"roll back: {breach.by}: {breach.reason}"))
        if hungry or not self.candidate_up or (self.exclusive and not warm):
            actions += self._drop_candidate()
        if self.permanent is None:  # it was stopped for the candidate
            actions += self._start_permanent(now, restart=False, after=candidate)
        return [*actions, self._changed()]

    # --- signs

    def _verified(self, given: Verified, now: Moment) -> list[Action]:
        stale = not self.permanent_up or given.instance not in ("", self.permanent)
        if self.row.state not in AWAY or given.migration != (self.row.migration or "") or stale:
            return []
        if not given.ok:
            return self._heard(self._unless_late(Sign.UNVERIFIED, now), given.reason, now)
        return self._heard(Sign.VERIFIED, "", now, given)

    def _old_gone(self, given: Gone, now: Moment) -> list[Action]:
        """The permanent instance ended, or did not start, while a rollback is under way."""
        if self.handed.returning:  # the candidate has the state still: it is asked again once another one is there
            self.handed.returning = self.handed.tried = False
            return [EndHandOver(), *self._heard(self._unless_late(Sign.DIED, now), given.reason, now)]
        return self._heard(self._unless_late(Sign.DIED, now), given.reason, now)

    def _unless_late(self, sign: Sign, now: Moment) -> Sign:
        ascent = self.ascent
        late = ascent is not None and (ascent.overdue or now.mono >= ascent.until)
        return Sign.TIME_UP if late else sign

    def _candidate_gone(self, given: Gone, now: Moment) -> list[Action]:
        """It was kept beside, and is no help any more."""
        if self.handed.returning:
            return [*self._hand_back_over(False, given.reason, {}, now), *self._drop_candidate()]
        dropped = self._drop_candidate()
        if self.ascent is not None:
            self.ascent.keepable = False
        return [*self._heard(Sign.CANDIDATE_GONE, given.reason, now), *dropped]

    def _host_restored(self, given: HostRestored, now: Moment) -> list[Action]:
        if self.row.state not in AWAY or given.migration != (self.row.migration or ""):
            return []
        agents = ", ".join(given.agents) or "no other agent had to move"
        return self._heard(Sign.HOST_BACK, f"the host's slots are back: {agents}", now)

    def _restored(self, given: Restored, now: Moment) -> list[Action]:
        if self.row.state not in AWAY or given.migration != (self.row.migration or ""):
            return []
        if self.ascent is not None:
            self.ascent.restoring = False
            if given.ok:
                self.ascent.note(now, f"restored from a backup: {given.evidence}")
        return self._heard(Sign.RESTORED if given.ok else Sign.NOT_RESTORED, given.reason, now)

    def _level_time(self, now: Moment) -> list[Action]:
        """A start in hand is not cut off for level 4, which takes the files away from under it."""
        ascent = self.ascent
        if ascent is None or now.mono < ascent.until:
            return []
        if self.handed.returning:
            return self._hand_back_over(False, "its time is over", {}, now)
        if ascent.rung is Rung.HOST and self.permanent is not None:
            ascent.overdue, ascent.until = True, float("inf")
            return []
        return self._heard(Sign.TIME_UP, f"its {WITHIN_S.get(ascent.rung, 0.0):g} s are over", now)

    # --- turns

    def _heard(self, sign: Sign, why: str, now: Moment, verified: Verified | None = None) -> list[Action]:
        ascent = self.ascent
        if ascent is None:
            return []
        if why:
            ascent.note(now, f"{sign}: {why}")
        match LADDER[ascent.rung, sign]:
            case Turn.FINISH if verified is not None:
                return self._rolled_back(verified, ascent, now)
            case Turn.START:
                slow = ascent.rung in (Rung.KEPT, Rung.LOST) and sign is not Sign.RESTORED
                return self._start_permanent(now, restart=True, pace=SLOW_S if slow else 0.0)
            case Turn.CLIMB:
                return self._climb(why, now)
        return []

    def _climb(self, why: str, now: Moment) -> list[Action]:
        ascent = self.ascent
        assert ascent is not None
        if ascent.rung is Rung.CODE and ascent.keepable and self.candidate_up and self.candidate is not None:
            return self._keep(why, now)
        was, rung = ascent.rung, NEXT[ascent.rung]
        ascent.enter(rung, now)
        self._set(State.ROLLING_BACK)
        entry = Persist(self.row, f"roll back, {rung.name.lower()}: {why}")
        match rung:
            case Rung.CODE:
                candidate = self.candidate if self.exclusive else None
                again = self._start_permanent(now, restart=True, after=candidate)
                return [*again, *(self._drop_candidate() if candidate else []), entry, self._escalated(why)]
            case Rung.HOST:
                again = self._start_permanent(now, restart=True) if was is Rung.KEPT else []
                rest = RestoreHost(self.row.migration or "", why)
                return [*again, *self._drop_candidate(), entry, self._escalated(why), rest, self._changed()]
            case Rung.BACKUP:
                self.permanent, self.permanent_up, ascent.restoring = None, False, True
                route, restore = Route(self.shares(), urgent=True), Restore(self.row.migration or "")
                return [route, entry, self._escalated(why), restore, self._changed()]
        idle = self.permanent is None and not ascent.restoring
        again = self._start_permanent(now, restart=False, pace=SLOW_S) if idle else []
        return [*again, entry, self._page(why, ""), self._changed()]

    def _keep(self, why: str, now: Moment) -> list[Action]:
        """Never roll back a rollback: whoever is healthy serves, and a human decides."""
        assert self.ascent is not None
        self.ascent.enter(Rung.KEPT, now)
        self._set(State.KEPT)
        return [
            Route(self.shares(), urgent=True),
            *([Resume(self.candidate)] if self.handed.at and self.candidate is not None else []),
            Persist(self.row, f"keep {self.row.candidate}: {why}"),
            self._page(why, self.row.candidate or ""),
            self._changed(),
        ]

    def _rolled_back(self, given: Verified, ascent: Ascent, now: Moment) -> list[Action]:
        done = facts.RolledBack(
            host=self.host,
            agent=self.row.agent,
            migration=given.migration,
            epoch=self.row.epoch,
            revision=self.row.permanent,
            level=ascent.highest.value,
            breach=ascent.breach,
            received=ascent.received,
            routed=max(given.routed, ascent.received),
            restored=given.restored,
            verified=True,
            evidence={**given.evidence, **self._state_told(now), "levels": ascent.notes},
        )
        dropped = self._drop_candidate()
        self._forget_candidate()
        return [Persist(self.row, "rolled back"), Publish(done), *dropped, self._changed()]

    def _state_told(self, now: Moment) -> dict[str, Any]:
        """What became of the state in memory, where the candidate had it."""
        self._note_lost("the old revision was started anew, without what the candidate had", now)
        return {"state": self.handed.told} if self.handed.told else {}

    def _escalated(self, why: str) -> Publish:
        ascent = self.ascent
        assert ascent is not None
        return Publish(
            facts.RollBackEscalated(
                host=self.host,
                agent=self.row.agent,
                migration=self.row.migration or "",
                epoch=self.row.epoch,
                breach=ascent.breach,
                level=ascent.rung.value,
                reason=why,
            )
        )

    def _page(self, why: str, kept: str) -> Publish:
        ascent = self.ascent
        assert ascent is not None
        return Publish(
            facts.RollBackFailed(
                host=self.host,
                agent=self.row.agent,
                migration=self.row.migration or "",
                epoch=self.row.epoch,
                breach=ascent.breach,
                reason=why,
                level=ascent.highest.value,
                kept=kept,
                evidence={"levels": list(ascent.notes)},
            )
        )

    def _drop_candidate(self) -> list[Action]:
        gone, self.candidate, self.candidate_up = self.candidate, None, False
        return [] if gone is None else [Stop(gone)]


def _why_lost(breach: Breach, *, warm: bool, candidate_up: bool) -> str:
    """Why the candidate's newer state is not handed back, or not at once."""
    if not candidate_up:
        return f"the candidate can't give it any more: {breach.by}: {breach.reason}"
    if is_hungry(breach):
        return f"the candidate was stopped at once: {breach.by}"
    return "the agent's settings say hand_back = false" if warm else ""
