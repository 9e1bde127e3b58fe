"""What a slot machine knows, and how it says what it did: the ground of `rolling_back.py` and `slot.py`. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from interlock.agents.ladder import Ascent
from interlock.agents.slot_io import Action, Moment, Publish, Rescue, Route, Row, Start, State, Stop
from interlock.broker import commands, facts
from interlock.broker.fields import Evidence

RESTART_DELAYS_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)  # before the n-th restart in a row of a permanent instance
STEADY_S = 30.0  # a permanent instance that ran for so long begins a new row


def forwarder(agent: str, place: str) -> str:
    """What a gateway calls an agent that is on another host."""
    return f"{agent}@{place}"


@dataclass
class Handed:
    """Where the state is that an agent keeps in memory. `at`: since when the candidate has it; 0: it has none.

    back_s: seconds that handing it back may take. returning: it is on its way. told: for the report of a rollback.
    """

    at: float = 0.0  # seconds since 1970
    back_s: float = 0.0
    returning: bool = False
    tried: bool = False  # to hand it back
    told: Evidence = field(default_factory=dict)


class SlotBase:
    """The state of a slot. `row` is what the journal has of it."""

    def __init__(self, host: str, row: Row, *, endpoint: str = "") -> None:
        self.host = host
        self.row = row
        self.endpoint = endpoint
        self.permanent: str | None = None  # instance
        self.permanent_up = False
        self.permanent_since = 0.0
        self.candidate: str | None = None  # instance
        self.candidate_up = False
        self.share = 0.0
        self.lease_until: float | None = None  # monotonic
        self.exclusive = False  # no room for two: the candidate goes before the old revision is started again
        self.ascent: Ascent | None = None  # the rollback under way
        self.keeps_state = False  # the permanent instance does, in memory, and can hand it over
        self.candidate_keeps_state = False
        self.hand_back = True  # whether the agent's settings want the newer state back in a rollback
        self.handed = Handed()
        self._hand_over_asked: commands.HandOver | None = None
        self._counted = False  # the candidate's answers to live requests are
        self._asked = ""  # id of the command under way
        self._restarts = 0
        self._born = 0

    def shares(self) -> tuple[tuple[str, float], ...]:
        """Whoever is up gets what the other can't take; nobody up: the requests wait."""
        share = 0.0
        if self.row.state is State.HANDING_OVER or self.handed.returning:
            return ()  # requests wait: whoever answered one now would change what is being handed over
        if self.row.state is State.ARRIVING:
            return ()
        if self.row.state is State.FORWARDING:
            return ((forwarder(self.row.agent, self.row.place), 1.0),)
        if self.candidate is not None and self.row.state is State.LIVE:
            share = self.share
        elif self.candidate is not None and self.row.state is State.KEPT and not self.permanent_up:
            share = 1.0
        shares = []
        if self.permanent_up and self.permanent is not None and share < 1:
            shares.append((self.permanent, 1 - share))
        if share > 0 and self.candidate is not None:
            shares.append((self.candidate, share if shares else 1.0))
        return tuple(shares)

    # --- inside

    def _start_permanent(
        self, now: Moment, *, restart: bool, pace: float = 0.0, after: str | None = None
    ) -> list[Action]:
        """Start the permanent revision, again if `restart`; `pace` seconds from now or later, once `after` is gone."""
        old = self.permanent
        if self.permanent_up and now.mono - self.permanent_since > STEADY_S:
            self._restarts = 0
        delay = max(RESTART_DELAYS_S[min(self._restarts, len(RESTART_DELAYS_S) - 1)], pace)
        self._restarts += 1
        self.permanent_up = False
        self.permanent = self._name(self.row.permanent)
        before = (old if self.exclusive else None, after)
        gone = tuple(name for name in before if name is not None)
        start = Start(self.permanent, self.row.permanent, self.row.permanent_digest, "permanent", delay, gone)
        actions: list[Action] = [Route(self.shares(), urgent=True)]
        if restart and old is not None:
            actions += [Rescue(old), Stop(old)]  # it may hang: what it owes is not left to its end
        return [*actions, start]

    def _forget_candidate(self) -> None:
        self.row = replace(
            self.row, state=State.SERVING, candidate=None, candidate_digest=None, migration=None, place=""
        )  # the epoch stays: older ones are refused for good
        self.candidate, self.candidate_up, self.exclusive = None, False, False
        self.lease_until, self.share, self.ascent = None, 0.0, None
        self.handed = Handed()

    def _is_current(self, migration: str, epoch: int) -> bool:
        return migration == self.row.migration and epoch == self.row.epoch

    def _set(self, state: State) -> None:
        self.row = replace(self.row, state=state)

    def _name(self, revision: str, *, epoch: int = 0) -> str:
        """`epoch`: of one that runs on another host, where names of this host say nothing."""
        self._born += 1
        return f"{self.row.agent}-{revision}-{f'{epoch}.' if epoch else ''}{self._born}"

    def _changed(self) -> Publish:
        return Publish(
            facts.SlotChanged(
                host=self.host,
                agent=self.row.agent,
                state=str(self.row.state) if self.permanent_up or self.row.state is not State.SERVING else "starting",
                permanent=self.row.permanent,
                candidate=self.row.candidate,
                share=self.share,
                migration=self.row.migration,
                epoch=self.row.epoch,
                endpoint=self.endpoint,
                hands_over=self.keeps_state,
            )
        )

    def _done(self, step: commands.Step, asked: str, evidence: Evidence) -> facts.StepDone:
        return facts.StepDone(
            host=self.host,
            agent=self.row.agent,
            migration=self.row.migration or "",
            epoch=self.row.epoch,
            step=step,
            command=asked,
            evidence=evidence,
        )

    def _failed(self, step: commands.Step, asked: str, check: str, reason: str, evidence: Evidence) -> facts.StepFailed:
        return facts.StepFailed(
            host=self.host,
            agent=self.row.agent,
            migration=self.row.migration or "",
            epoch=self.row.epoch,
            step=step,
            command=asked,
            check=check,
            reason=reason,
            evidence=evidence,
        )
