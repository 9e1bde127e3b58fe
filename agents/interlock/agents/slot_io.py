"""What goes into a slot machine and what comes out of it; the machine itself is in `slot.py`."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import msgspec

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


class Ask(msgspec.Struct, frozen=True):
    """A command of the coordinator; `id` is the event's."""

    command: HostCommand
    id: str


class AskRollBack(msgspec.Struct, frozen=True):
    command: RollBack


class Renew(msgspec.Struct, frozen=True):
    command: commands.RenewLease


class PrepareEnded(msgspec.Struct, frozen=True):
    """`digest` of the recorded revision; a failed one names the check.

    exclusive: there may not be room for two, so the candidate is stopped before the old revision is started again.
    """

    migration: str
    ok: bool
    digest: str = ""
    exclusive: bool = False
    check: str = ""
    reason: str = ""
    evidence: Evidence = {}


class Healthy(msgspec.Struct, frozen=True):
    """An instance answered its first health check, and its contract covers what is needed."""

    instance: str
    evidence: Evidence = {}
    keeps_state: bool = False  # in memory, and it can be handed over


class Gone(msgspec.Struct, frozen=True):
    """An instance is no more, or never came to life; `by` is the check that says so."""

    instance: str
    by: str  # process-died, start-failed, health-failed
    reason: str
    sample_time: float  # wall clock, when it was seen
    evidence: Evidence = {}


class ShadowEnded(msgspec.Struct, frozen=True):
    migration: str
    ok: bool
    reason: str
    evidence: Evidence = {}


class HandedOver(msgspec.Struct, frozen=True):
    """The candidate says that it has the old one's state; or not, and the old one has it still, as it was."""

    migration: str
    ok: bool
    reason: str = ""
    evidence: Evidence = {}
    limit_s: float = 0.0  # what the hand-over was given


class HandedBack(msgspec.Struct, frozen=True):
    """In a rollback: the old one has the candidate's newer state; or not, and goes on with what it had."""

    migration: str
    ok: bool
    reason: str = ""
    evidence: Evidence = {}


class Arrived(msgspec.Struct, frozen=True):
    """The other host has written that it will serve, or it won't."""

    migration: str
    ok: bool
    reason: str = ""
    endpoint: str = ""


class Owned(msgspec.Struct, frozen=True):
    """Of an agent that is arriving: it is ours now. `instance` ran here as a guest, and still does."""

    instance: str = ""


class Verified(msgspec.Struct, frozen=True):
    """The permanent revision answered (a live request or a probe) after the route went back to it, or did not.

    `instance`: which one was asked; about one that is not permanent any more it says nothing.
    """

    migration: str
    ok: bool
    restored: float
    routed: float
    reason: str = ""
    evidence: Evidence = {}
    instance: str = ""


class DrillEnded(msgspec.Struct, frozen=True):
    """What the rehearsal measured: seconds by level, what was left out and why, and what went wrong."""

    ok: bool
    reason: str = ""
    seconds: dict[str, float] = {}
    skipped: dict[str, str] = {}
    problems: tuple[str, ...] = ()
    evidence: Evidence = {}


class AskHostLevel(msgspec.Struct, frozen=True):
    """Another agent's rollback has come to level 3: this slot returns to its permanent revision, too."""

    agent: str
    reason: str


class HostRestored(msgspec.Struct, frozen=True):
    """What level 3 did: the agents whose migrations were rolled back for it."""

    migration: str
    agents: tuple[str, ...] = ()


class Restored(msgspec.Struct, frozen=True):
    """What level 4 did: the newest verified backup is in place, or there is none."""

    migration: str
    ok: bool
    reason: str = ""
    evidence: Evidence = {}


class Tick(msgspec.Struct, frozen=True):
    pass


Input = (
    Ask | AskRollBack | Renew | PrepareEnded | Healthy | Gone | ShadowEnded | HandedOver | HandedBack | Arrived | Owned
    | Verified | DrillEnded | AskHostLevel | HostRestored | Restored | Tick
)  # fmt: skip

# --- what comes out


class Persist(msgspec.Struct, frozen=True):
    """Write the slot's row before the actions that follow; `done` also remembers a command's result."""

    row: Row
    entry: str
    done: tuple[str, Fact] | None = None


class Route(msgspec.Struct, frozen=True):
    """Live requests go to these instances by share from now on; an `urgent` one overtakes whatever is queued."""

    shares: tuple[tuple[str, float], ...]
    urgent: bool = False


class BeginTrial(msgspec.Struct, frozen=True):
    """The candidate gets its first live requests: `warm_up_s` later both instances are counted for the comparison."""

    migration: str
    warm_up_s: float


class BeginPrepare(msgspec.Struct, frozen=True):
    command: commands.Prepare


class Start(msgspec.Struct, frozen=True):
    """Start an instance of a revision, once those of `after` are gone; the shell answers Healthy or Gone."""

    instance: str
    revision: str
    digest: str
    role: Role
    delay_s: float = 0.0
    after: tuple[str, ...] = ()


class Stop(msgspec.Struct, frozen=True):
    """Drain (as far as its time allows) and end an instance; the shell is silent about it afterwards."""

    instance: str


class BeginShadow(msgspec.Struct, frozen=True):
    command: commands.Shadow
    candidate: str


class EndShadow(msgspec.Struct, frozen=True):
    pass


class BeginHandOver(msgspec.Struct, frozen=True):
    """Requests wait already: move the state from one instance to the other; the shell answers HandedOver."""

    command: commands.HandOver
    old: str
    new: str


class BeginHandBack(msgspec.Struct, frozen=True):
    """The same in a rollback, within `limit_s`; the shell answers HandedBack."""

    migration: str
    candidate: str
    permanent: str
    limit_s: float


class EndHandOver(msgspec.Struct, frozen=True):
    """Call off what is under way of a hand-over, or of handing back."""


class Resume(msgspec.Struct, frozen=True):
    """This instance is the one that works, of those that have state: the others stop, as far as they can be told."""

    instance: str


class BeginCommit(msgspec.Struct, frozen=True):
    """Have the other host write that it will serve; the shell answers Arrived."""

    command: commands.Commit
    candidate: str


class Forward(msgspec.Struct, frozen=True):
    """From now on what comes here goes to the other host; `candidate` is the guest that is that host's own now."""

    place: str
    candidate: str = ""


class Rescue(msgspec.Struct, frozen=True):
    """Send again, to where live requests go now, what the instance has in flight."""

    instance: str


class Verify(msgspec.Struct, frozen=True):
    """Find out by an answer whether the permanent instance serves; the shell answers Verified."""

    migration: str
    instance: str


class BeginDrill(msgspec.Struct, frozen=True):
    """Rehearse the rollback; the shell answers DrillEnded."""

    command: commands.Drill


class EndDrill(msgspec.Struct, frozen=True):
    """Call the rehearsal off: what it started is stopped."""


class RestoreHost(msgspec.Struct, frozen=True):
    """Level 3: every other slot of the host returns to its permanent revision; the shell answers HostRestored."""

    migration: str
    reason: str


class Restore(msgspec.Struct, frozen=True):
    """Level 4: stop what runs of the agent, put the newest verified backup in place; the shell answers Restored."""

    migration: str


class Publish(msgspec.Struct, frozen=True):
    fact: Fact


Action = (
    Persist | Route | BeginTrial | BeginPrepare | BeginDrill | EndDrill | Start | Stop | BeginShadow | EndShadow
    | BeginHandOver | BeginHandBack | EndHandOver | Resume | BeginCommit | Forward | Rescue | Verify | RestoreHost
    | Restore | Publish
)  # fmt: skip


class Row(msgspec.Struct, frozen=True):
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
