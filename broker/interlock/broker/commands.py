"""What may be asked, and of whom. What is answered stands in `facts.py`.

A command carries its deadline (seconds since 1970): it is refused after that. Its identity is the id in the event's
header: the same id is done once. `epoch` is the fencing token of a migration, the sequence number that the event log
gave to the request that began it: a host refuses a command of an older epoch than the newest it has seen for the agent.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from interlock.broker.fields import (
    AgentName,
    BackupLevel,
    Count,
    Deadline,
    Epoch,
    Labels,
    MigrationId,
    Reason,
    RevisionName,
    Share,
    Span,
    WaveId,
    says,
)


class _Body(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    pass


class Breach(msgspec.Struct, frozen=True, kw_only=True):
    """What a rule or a check saw."""

    by: Annotated[str, says('"rule gpu-memory", "check shadow", "host process-died", "operator"')]
    reason: Reason
    labels: Labels = {}
    value: Annotated[float | None, says("of the sample that showed it")] = None
    sample_time: Annotated[float | None, says("of the first sample that showed it, in seconds since 1970")] = None


# operator -> coordinator, topic command/coordinator/


class Migrate(_Body, frozen=True, kw_only=True, tag="migrate"):
    """Move an agent to a revision. Without `strategy` and `level` by what is due to the agent."""

    agent: AgentName
    to: RevisionName
    deadline: Deadline
    strategy: Annotated[str | None, says('"rapid", "staged", "framework" or "custom"')] = None
    level: Annotated[str | None, says('"low", "medium", "high" or "critical", in place of a strategy')] = None
    because: Annotated[str, says("why it may be less careful than is due, or happen in a freeze")] = ""
    host: Annotated[str | None, says("where the candidate runs; none: where the old one does")] = None
    accept: Annotated[str, says('the slowest class of rollback that will do: "" (warm), "cold" or "hand-over"')] = ""
    wave: Annotated[str, says("the wave that it is part of")] = ""


class RollBackAgent(_Body, frozen=True, kw_only=True, tag="roll-back-agent"):
    """Undo the agent's migration in flight."""

    agent: AgentName
    reason: Reason
    deadline: Deadline


SteerAction = Literal["approve", "pause", "resume", "hold", "abort", "commit"]


class Steer(_Body, frozen=True, kw_only=True, tag="steer"):
    """Lead the agent's migration in flight: approve its next stage, let it stand, let it go on, end it."""

    agent: AgentName
    action: Annotated[SteerAction, says("what is asked for")]
    deadline: Deadline
    reason: Reason = ""


WaveOrder = Literal["dependency", "host", "name"]


class StartWave(_Body, frozen=True, kw_only=True, tag="start-wave"):
    """Move many agents, some at a time; once more of them fail than the budget allows, move all of them back.

    Whoever is named in `revisions` goes there. Where it is empty, all go to `to` that have such a revision and that
    `agents`, `category` and `host` leave; each of these, where it is empty, leaves everybody.
    """

    deadline: Deadline
    revisions: Annotated[dict[str, str], says("by agent: the revision that it goes to")] = {}
    to: Annotated[str, says("the revision that all go to, instead")] = ""
    agents: Annotated[list[str], says("only these agents; each must have the revision")] = []
    category: Annotated[str, says("only agents of this category")] = ""
    host: Annotated[str, says("only agents of this host")] = ""
    order: Annotated[
        WaveOrder, says("dependency: after all that it depends on; host: one host after the other; name")
    ] = "dependency"
    parallel: Annotated[int, says("so many at once, at most")] = 1
    budget: Annotated[int, says("so many may fail")] = 0
    budget_share: Annotated[float, says("of all, 0 to 1, that may fail instead, rounded down")] = 0.0
    strategy: Annotated[str | None, says("of each migration; none: what is due to the agent")] = None
    level: Annotated[str | None, says("the same by level of risk, in place of a strategy")] = None
    because: Annotated[str, says("why it may be less careful than is due, or happen in a freeze")] = ""


class StopWave(_Body, frozen=True, kw_only=True, tag="stop-wave"):
    """Begin no further migration of a wave. What is in flight goes on; what was moved stays."""

    wave: WaveId
    deadline: Deadline
    undo: Annotated[bool, says("roll back what is in flight, and move back what was moved")] = False
    reason: Reason = ""


class RunDrill(_Body, frozen=True, kw_only=True, tag="run-drill"):
    """Rehearse the rollback of an agent, now."""

    agent: AgentName
    deadline: Deadline
    whole_host: Annotated[bool, says("level 3 too, so all agents of its host at once")] = False


# coordinator -> host, topic command/<host>/


class Receive(_Body, frozen=True, kw_only=True, tag="receive"):
    """To the host that an agent is to move to: check and record revision `to`, and let that host have it run here."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    deadline: Deadline
    to: RevisionName
    source: Annotated[str, says("the host that the agent is on")]


class Prepare(_Body, frozen=True, kw_only=True, tag="prepare"):
    """Check and record revision `to`, back up the serving one and measure its baseline."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    deadline: Deadline
    to: RevisionName
    baseline_s: Annotated[Span, says("seconds for which the serving revision is measured")]
    levels: Annotated[list[BackupLevel], says("what is backed up of the serving revision")] = msgspec.field(
        default_factory=lambda: ["configuration", "code"]
    )
    accept: Annotated[str, says('the slowest class of rollback that will do: "" (warm) or "cold"')] = ""
    sick_ok: Annotated[bool, says("go on though the serving revision is not healthy: it is no verified way back")] = (
        False
    )
    host: Annotated[str, says("the host that the agent moves to, which received it; empty: it stays")] = ""


class Drill(_Body, frozen=True, kw_only=True, tag="drill"):
    """Rehearse the rollback with the real processes, and measure it."""

    migration: Annotated[MigrationId, says("the migration's id; empty where an operator asked for it")]
    agent: AgentName
    epoch: Epoch
    deadline: Deadline
    promise_s: Annotated[Span, says("seconds: a rehearsal that takes longer has failed")]
    accept: Annotated[str, says('the slowest class of rollback that will do: "" (warm) or "cold"')] = ""
    cold: Annotated[bool, says("the serving process will be stopped, so there is no level 1 to rehearse")] = False
    whole_host: Annotated[bool, says("level 3 too, so all agents of the host at once")] = False


class StartCandidate(_Body, frozen=True, kw_only=True, tag="start-candidate"):
    """Start the prepared revision beside the serving one, without live requests; done when it is healthy."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    deadline: Deadline
    cold: Annotated[bool, says("both don't fit: stop the serving one first, and give all requests to the new")] = False


class Shadow(_Body, frozen=True, kw_only=True, tag="shadow"):
    """Mirror live requests to the candidate until `requests` were compared or `seconds` are over."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    deadline: Deadline
    requests: Annotated[Count, says("so many compared are enough")]
    seconds: Annotated[Span, says("seconds that it lasts at most")]
    min_requests: Annotated[Count, says("with fewer compared it has failed")]
    max_mismatches: Annotated[Count, says("more answers that differ: it has failed")]


class HandOver(_Body, frozen=True, kw_only=True, tag="hand-over"):
    """Hand the state in memory from the serving instance to the candidate, while requests wait at the gateway."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    deadline: Deadline
    route: Annotated[
        bool, says("all live requests go to the candidate then; else it is a copy, and the old one goes on")
    ]
    promise_s: Annotated[Span, says("seconds: a hand-over that takes longer has failed, unless that is accepted")]
    lease_s: Annotated[Span, says("seconds: a lease that is not renewed for so long is rolled back")]
    accept: Annotated[str, says('the slowest class of rollback that will do: "" (warm), "cold" or "hand-over"')] = ""


class CutOver(_Body, frozen=True, kw_only=True, tag="cut-over"):
    """Give the candidate a share of the live requests; the host holds a lease from then on."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    deadline: Deadline
    share: Annotated[Share, says("of the live requests, 0 to 1, to the candidate")]
    lease_s: Annotated[Span, says("seconds: a lease that is not renewed for so long is rolled back")]
    warm_up_s: Annotated[Span, says("seconds of live requests after which its answers count in the comparison")] = 0.0


class Commit(_Body, frozen=True, kw_only=True, tag="commit"):
    """Make the candidate permanent; drain and stop the old one."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    deadline: Deadline


# operator, coordinator -> hosts, topic command/<host>/ or command/all/


class RollCall(_Body, frozen=True, kw_only=True, tag="roll-call"):
    """Say that you are there: the host's receipt is all that is asked for. Also to all hosts, topic command/all/."""

    deadline: Deadline


# rule engine, coordinator, operator -> host, topic rollback/<host>/


class RollBack(_Body, frozen=True, kw_only=True, tag="roll-back"):
    """Put the old revision back. Needs no permission, and is done whatever state the migration is in."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    breach: Breach
    issued: Annotated[float, says("when it was decided, in seconds since 1970")]


# coordinator -> host, directly (not through the log)


class RenewLease(_Body, frozen=True, kw_only=True, tag="renew-lease"):
    """Keep the candidate live for a while more; a host whose lease expires rolls back by itself."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    lease_s: Annotated[Span, says("seconds from now, for which the lease holds")]


Step = Literal["receive", "prepare", "drill", "start-candidate", "hand-over", "shadow", "cut-over", "commit"]

Command = (
    Migrate
    | RollBackAgent
    | RunDrill
    | Steer
    | StartWave
    | StopWave
    | RollCall
    | Receive
    | Prepare
    | Drill
    | StartCandidate
    | Shadow
    | HandOver
    | CutOver
    | Commit
    | RollBack
    | RenewLease
)
HostCommand = Receive | Prepare | Drill | StartCandidate | Shadow | HandOver | CutOver | Commit
