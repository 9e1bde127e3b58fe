"""What goes into a slot machine and what comes out of it; the machine itself is in `slot.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from interlock.broker import commands
from interlock.broker.commands import HostCommand, RollBack
from interlock.broker.facts import Fact, Role
from interlock.broker.fields import Evidence


class State(StrEnum):
    SERVING = "serving"  # no migration here
    PREPARING = "preparing"
    PREPARED = "prepared"
    DRILLING = "drilling"  # the rollback is rehearsed, in a migration or without one
    STARTING = "starting"  # the candidate's process runs, it is not healthy yet
    STANDBY = "standby"  # the candidate is healthy, without live requests
    SHADOWING = "shadowing"
    HANDING_OVER = "handing-over"  # requests wait, while the state goes from the old instance to the candidate
    LIVE = "live"  # the candidate has a share of the live requests
    ARRIVING = "arriving"  # it comes from another host, which has not said yet that it moved: nobody serves here
    FORWARDING = "forwarding"  # it moved to another host: requests that come here are passed on
    ROLLING_BACK = "rolling-back"  # live requests go to the permanent revision; it is not verified yet
    KEPT = (
        "kept"  # the permanent revision could not be brought back; the candidate, healthy, serves for a human to look
    )


class Moment(NamedTuple):
    mono: float  # seconds of the monotonic clock: for leases and delays
    wall: float  # seconds since 1970: for reports


# --- what goes in


@dataclass(frozen=True)
class Ask:
    """A command of the coordinator; `id` is the event's."""

    command: HostCommand
    id: str


@dataclass(frozen=True)
class AskRollBack:
    command: RollBack


@dataclass(frozen=True)
class Renew:
    command: commands.RenewLease


@dataclass(frozen=True)
class PrepareEnded:
    """`digest` of the recorded revision; a failed one names the check.

    exclusive: there may not be room for two, so the candidate is stopped before the old revision is started again.
    """

    migration: str
    ok: bool
    digest: str = ""
    exclusive: bool = False
    check: str = ""
    reason: str = ""
    evidence: Evidence = field(default_factory=dict)


@dataclass(frozen=True)
class Healthy:
    """An instance answered its first health check, and its contract covers what is needed."""

    instance: str
    evidence: Evidence = field(default_factory=dict)
    keeps_state: bool = False  # in memory, and it can be handed over


@dataclass(frozen=True)
class Gone:
    """An instance is no more, or never came to life; `by` is the check that says so."""

    instance: str
    by: str  # process-died, start-failed, health-failed
    reason: str
    sample_time: float  # wall clock, when it was seen
    evidence: Evidence = field(default_factory=dict)


@dataclass(frozen=True)
class ShadowEnded:
    migration: str
    ok: bool
    reason: str
    evidence: Evidence = field(default_factory=dict)


@dataclass(frozen=True)
class HandedOver:
    """The candidate says that it has the old one's state; or not, and the old one has it still, as it was."""

    migration: str
    ok: bool
    reason: str = ""
    evidence: Evidence = field(default_factory=dict)
    limit_s: float = 0.0  # what the hand-over was given


@dataclass(frozen=True)
class HandedBack:
    """In a rollback: the old one has the candidate's newer state; or not, and goes on with what it had."""

    migration: str
    ok: bool
    reason: str = ""
    evidence: Evidence = field(default_factory=dict)


@dataclass(frozen=True)
class Arrived:
    """The other host has written that it will serve, or it won't."""

    migration: str
    ok: bool
    reason: str = ""
    endpoint: str = ""


@dataclass(frozen=True)
class Owned:
    """Of an agent that is arriving: it is ours now. `instance` ran here as a guest, and still does."""

    instance: str = ""


@dataclass(frozen=True)
class Verified:
    """The permanent revision answered (a live request or a probe) after the route went back to it, or did not.

    `instance`: which one was asked; about one that is not permanent any more it says nothing.
    """

    migration: str
    ok: bool
    restored: float
    routed: float
    reason: str = ""
    evidence: Evidence = field(default_factory=dict)
    instance: str = ""


@dataclass(frozen=True)
class DrillEnded:
    """What the rehearsal measured: seconds by level, what was left out and why, and what went wrong."""

    ok: bool
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    evidence: Evidence = field(default_factory=dict)


@dataclass(frozen=True)
class AskHostLevel:
    """Another agent's rollback has come to level 3: this slot returns to its permanent revision, too."""

    agent: str
    reason: str


@dataclass(frozen=True)
class HostRestored:
    """What level 3 did: the agents whose migrations were rolled back for it."""

    migration: str
    agents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Restored:
    """What level 4 did: the newest verified backup is in place, or there is none."""

    migration: str
    ok: bool
    reason: str = ""
    evidence: Evidence = field(default_factory=dict)


@dataclass(frozen=True)
class Tick:
    pass


Input = (
    Ask | AskRollBack | Renew | PrepareEnded | Healthy | Gone | ShadowEnded | HandedOver | HandedBack | Arrived | Owned
    | Verified | DrillEnded | AskHostLevel | HostRestored | Restored | Tick
)  # fmt: skip

# --- what comes out


@dataclass(frozen=True)
class Persist:
    """Write the slot's row before the actions that follow; `done` also remembers a command's result."""

    row: Row
    entry: str
    done: tuple[str, Fact] | None = None


@dataclass(frozen=True)
class Route:
    """Live requests go to these instances by share from now on; an `urgent` one overtakes whatever is queued."""

    shares: tuple[tuple[str, float], ...]
    urgent: bool = False


@dataclass(frozen=True)
class BeginTrial:
    """The candidate gets its first live requests: `warm_up_s` later both instances are counted for the comparison."""

    migration: str
    warm_up_s: float


@dataclass(frozen=True)
class BeginPrepare:
    command: commands.Prepare


@dataclass(frozen=True)
class Start:
    """Start an instance of a revision, once those of `after` are gone; the shell answers Healthy or Gone."""

    instance: str
    revision: str
    digest: str
    role: Role
    delay_s: float = 0.0
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stop:
    """Drain (as far as its time allows) and end an instance; the shell is silent about it afterwards."""

    instance: str


@dataclass(frozen=True)
class BeginShadow:
    command: commands.Shadow
    candidate: str


@dataclass(frozen=True)
class EndShadow:
    pass


@dataclass(frozen=True)
class BeginHandOver:
    """Requests wait already: move the state from one instance to the other; the shell answers HandedOver."""

    command: commands.HandOver
    old: str
    new: str


@dataclass(frozen=True)
class BeginHandBack:
    """The same in a rollback, within `limit_s`; the shell answers HandedBack."""

    migration: str
    candidate: str
    permanent: str
    limit_s: float


@dataclass(frozen=True)
class EndHandOver:
    """Call off what is under way of a hand-over, or of handing back."""


@dataclass(frozen=True)
class Resume:
    """This instance is the one that works, of those that have state: the others stop, as far as they can be told."""

    instance: str


@dataclass(frozen=True)
class BeginCommit:
    """Have the other host write that it will serve; the shell answers Arrived."""

    command: commands.Commit
    candidate: str


@dataclass(frozen=True)
class Forward:
    """From now on what comes here goes to the other host; `candidate` is the guest that is that host's own now."""

    place: str
    candidate: str = ""


@dataclass(frozen=True)
class Rescue:
    """Send again, to where live requests go now, what the instance has in flight."""

    instance: str


@dataclass(frozen=True)
class Verify:
    """Find out by an answer whether the permanent instance serves; the shell answers Verified."""

    migration: str
    instance: str


@dataclass(frozen=True)
class BeginDrill:
    """Rehearse the rollback; the shell answers DrillEnded."""

    command: commands.Drill


@dataclass(frozen=True)
class EndDrill:
    """Call the rehearsal off: what it started is stopped."""


@dataclass(frozen=True)
class RestoreHost:
    """Level 3: every other slot of the host returns to its permanent revision; the shell answers HostRestored."""

    migration: str
    reason: str


@dataclass(frozen=True)
class Restore:
    """Level 4: stop what runs of the agent, put the newest verified backup in place; the shell answers Restored."""

    migration: str


@dataclass(frozen=True)
class Publish:
    fact: Fact


Action = (
    Persist | Route | BeginTrial | BeginPrepare | BeginDrill | EndDrill | Start | Stop | BeginShadow | EndShadow
    | BeginHandOver | BeginHandBack | EndHandOver | Resume | BeginCommit | Forward | Rescue | Verify | RestoreHost
    | Restore | Publish
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What the journal holds of a slot: enough to come back to after any crash."""

    agent: str
    permanent: str
    permanent_digest: str
    candidate: str | None = None
    candidate_digest: str | None = None
    state: State = State.SERVING
    migration: str | None = None
    epoch: int = 0  # the newest seen; older ones are refused
    place: str = ""  # the other host that it moves to, or moved to
