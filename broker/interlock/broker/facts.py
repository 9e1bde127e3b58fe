"""What happened: the events that hosts, the coordinator and the rule engine report. Requests stand in `commands.py`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from interlock.broker.commands import Breach, SteerAction, Step, WaveOrder, _Body
from interlock.broker.fields import (
    AgentName,
    Epoch,
    Evidence,
    HostName,
    InstanceId,
    Labels,
    MigrationId,
    Reason,
    RevisionName,
    RuleName,
    Seq,
    Time,
    WaveId,
    says,
)

Role = Literal["permanent", "candidate"]  # of an instance: what serves by right, and what is on trial
Outcome = Literal["committed", "rolled-back", "held", "refused", "failed"]
Verdict = Literal["passed", "failed", "inconclusive", "error"]  # error: it could not be measured; no data is no pass

# host, topic fact/host/<host>/


class HostUp(_Body, frozen=True, kw_only=True, tag="host-up"):
    """A host process began."""

    host: HostName
    control: Annotated[str, says("the endpoint where it takes rollbacks and leases directly")]
    pid: Annotated[int, says("of the host process")]
    boot: Annotated[str, says("the machine's boot id: another one after a restart of the machine")]
    agents: Annotated[list[str], says("whom it serves")] = []


class HostDown(_Body, frozen=True, kw_only=True, tag="host-down"):
    """A host process is ending in good order."""

    host: HostName


class InstanceStarted(_Body, frozen=True, kw_only=True, tag="instance-started"):
    """A process of an agent runs."""

    host: HostName
    agent: AgentName
    instance: InstanceId
    revision: RevisionName
    role: Annotated[Role, says("what serves by right, or what is on trial")]
    pid: Annotated[int, says("of the process, and of its group")]
    started: Time


class InstanceStopped(_Body, frozen=True, kw_only=True, tag="instance-stopped"):
    """A process of an agent is gone."""

    host: HostName
    agent: AgentName
    instance: InstanceId
    revision: RevisionName
    role: Annotated[Role, says("what served by right, or what was on trial")]
    returncode: Annotated[int, says("its exit code; negative: the number of the signal that ended it")]
    expected: Annotated[bool, says("the host asked for it")]
    detail: Annotated[str, says("what is known about why")] = ""


class SlotChanged(_Body, frozen=True, kw_only=True, tag="slot-changed"):
    """An agent's slot entered another state."""

    host: HostName
    agent: AgentName
    state: Annotated[
        str, says("serving, preparing, prepared, starting, standby, shadowing, handing-over, live or rolling-back")
    ]
    permanent: Annotated[str, says("the revision that serves by right")]
    candidate: Annotated[str | None, says("the revision on trial")] = None
    share: Annotated[float, says("of the live requests, 0 to 1, to the candidate")] = 0.0
    migration: Annotated[str | None, says("the id of the migration that it belongs to")] = None
    epoch: Epoch = 0
    endpoint: Annotated[str, says("the gateway's, where clients find the agent")] = ""
    hands_over: Annotated[bool, says("it keeps state in memory, which is handed over in a migration")] = False


class StepDone(_Body, frozen=True, kw_only=True, tag="step-done"):
    """A host did what a command asked."""

    host: HostName
    agent: AgentName
    migration: MigrationId
    epoch: Epoch
    step: Annotated[Step, says("what was asked")]
    command: Annotated[str, says("the id of the event that asked")]
    evidence: Evidence = {}


class StepFailed(_Body, frozen=True, kw_only=True, tag="step-failed"):
    """A host could not do it; the slot serves what it served before."""

    host: HostName
    agent: AgentName
    migration: MigrationId
    epoch: Epoch
    step: Annotated[Step, says("what was asked")]
    command: Annotated[str, says("the id of the event that asked")]
    check: Annotated[str, says("the name of what failed")]
    reason: Reason
    evidence: Evidence = {}


class CommandRefused(_Body, frozen=True, kw_only=True, tag="command-refused"):
    """A host did not accept a command (stale epoch, past its deadline, wrong state, unknown agent)."""

    host: HostName
    agent: AgentName
    migration: MigrationId
    command: Annotated[str, says("the id of the event that asked")]
    reason: Reason


class RolledBack(_Body, frozen=True, kw_only=True, tag="rolled-back"):
    """The old revision serves again. Times are by the host's clock."""

    host: HostName
    agent: AgentName
    migration: MigrationId
    epoch: Epoch
    revision: RevisionName
    level: Annotated[int, says("1: it was still running; 2: it had to be started again")]
    breach: Breach
    received: Annotated[float, says("when the host learned of it, in seconds since 1970")]
    routed: Annotated[float, says("from then on live requests went to the old revision, in seconds since 1970")]
    restored: Annotated[float, says("its first answer after that, to a request or a probe, in seconds since 1970")]
    verified: Annotated[bool, says("it answered a probe")]
    evidence: Evidence = {}


class RollBackEscalated(_Body, frozen=True, kw_only=True, tag="roll-back-escalated"):
    """One level of a rollback has failed, or its time is up; the host goes on with the next one."""

    host: HostName
    agent: AgentName
    migration: MigrationId
    epoch: Epoch
    breach: Breach
    level: Annotated[int, says("the one that begins, 2 to 4")]
    reason: Reason


class RollBackFailed(_Body, frozen=True, kw_only=True, tag="roll-back-failed"):
    """The old revision could not be brought back; a human must look. All evidence is kept, the host goes on trying."""

    host: HostName
    agent: AgentName
    migration: MigrationId
    epoch: Epoch
    breach: Breach
    reason: Reason
    level: Annotated[int, says("the last one tried, 1 to 4")] = 1
    kept: Annotated[str, says("the revision on trial, if it serves instead because it is the healthy one")] = ""
    evidence: Evidence = {}


class DrillDone(_Body, frozen=True, kw_only=True, tag="drill-done"):
    """A rollback was rehearsed."""

    host: HostName
    agent: AgentName
    revision: RevisionName
    seconds: Annotated[dict[str, float], says('what each level ("1", "2") took')]
    problems: Annotated[list[str], says("what went wrong")] = []
    skipped: Annotated[dict[str, str], says("levels that were not rehearsed, and why")] = {}
    migration: Annotated[MigrationId, says("the migration's id; empty where an operator asked for it")] = ""
    command: Annotated[str, says("the id of the event that asked")] = ""
    evidence: Evidence = {}


# coordinator, topic fact/migration/<agent>/


class MigrationStarted(_Body, frozen=True, kw_only=True, tag="migration-started"):
    """It has begun."""

    migration: MigrationId
    epoch: Epoch
    agent: AgentName
    host: HostName
    previous: Annotated[str, says("the revision that serves so far")]
    to: RevisionName
    strategy: Annotated[str, says('"rapid" or "staged"')]
    request: Annotated[str, says("the id of the event that asked")]
    settings: Annotated[Evidence, says("the strategy's figures as they were then; they hold to the end")] = {}
    wave: Annotated[str, says("the wave that it is part of")] = ""
    target: Annotated[str, says("the host that the agent moves to; empty: it stays where it is")] = ""


class MigrationRefused(_Body, frozen=True, kw_only=True, tag="migration-refused"):
    """Nothing was changed."""

    request: Annotated[str, says("the id of the event that asked")]
    agent: AgentName
    to: RevisionName
    reason: Reason


class StageEntered(_Body, frozen=True, kw_only=True, tag="stage-entered"):
    """A migration went on to its next stage."""

    migration: MigrationId
    agent: AgentName
    stage: Annotated[str, says("prepare, infrastructure, core-logic, integration, observation or commit")]
    note: Annotated[str, says("more about it, for people")] = ""


class MigrationWaiting(_Body, frozen=True, kw_only=True, tag="migration-waiting"):
    """It waits for an operator to approve its next stage."""

    migration: MigrationId
    agent: AgentName
    stage: Annotated[str, says("what is to begin")]
    until: Annotated[float, says("seconds since 1970, when it is rolled back")]


class MigrationHeld(_Body, frozen=True, kw_only=True, tag="migration-held"):
    """It stays where it is until an operator decides, or its time is up."""

    migration: MigrationId
    agent: AgentName
    breach: Breach
    blame: Annotated[str, says('whose fault it is, where it is not the candidate\'s: "host" or "permanent"')] = ""
    until: Annotated[float, says("seconds since 1970, when its time is up; 0: nobody said")] = 0.0


class Steered(_Body, frozen=True, kw_only=True, tag="steered"):
    """What an operator asked for holds."""

    request: Annotated[str, says("the id of the event that asked")]
    migration: MigrationId
    agent: AgentName
    action: Annotated[SteerAction, says("what was asked for")]
    by: Annotated[str, says("the operator")]
    reason: Reason = ""
    until: Annotated[float, says("of pause and hold: seconds since 1970, when its time is up")] = 0.0


class Deviation(_Body, frozen=True, kw_only=True, tag="deviation"):
    """An operator let a migration be less careful than is due, begin in a freeze, or commit early."""

    migration: MigrationId
    agent: AgentName
    what: Annotated[str, says("what was left away")]
    because: Annotated[str, says("the operator's reason")]
    by: Annotated[str, says("the operator")]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was measured of a candidate."""

    check: Annotated[str, says("what was measured")]
    verdict: Annotated[Verdict, says("passed, failed, inconclusive, or error: it could not be measured")]
    value: Annotated[float | None, says("what was found; none where there was nothing to measure")]
    limit: Annotated[float, says("what it was held against, in the same unit")]
    reason: Reason


class ChecksMeasured(_Body, frozen=True, kw_only=True, tag="checks-measured"):
    """How a candidate with live requests does."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    verdict: Annotated[Verdict, says("of all checks together: the worst counts")]
    reason: Reason
    checkpoint: Annotated[float, says("the share of the planned time that was over, 0 to 1")]
    final: Annotated[bool, says("it was the last measurement: the observation ends as its verdict says")]
    checks: Annotated[list[Check], says("each of them")] = []


class MigrationEnded(_Body, frozen=True, kw_only=True, tag="migration-ended"):
    """Its outcome."""

    migration: MigrationId
    agent: AgentName
    epoch: Epoch
    outcome: Annotated[Outcome, says("how it ended")]
    decided_by: Annotated[str, says("who or what decided so")]
    reason: Reason
    evidence: Evidence = {}


# coordinator, topic fact/wave/<wave>/

WaveOutcome = Literal["committed", "rolled-back", "stopped", "failed"]
MemberState = Literal[
    "waiting", "moving", "committed", "rolled-back", "refused", "failed", "left-out", "going-back", "gone-back", "stuck"
]


class WaveMember(msgspec.Struct, frozen=True, kw_only=True):
    """An agent of a wave."""

    agent: AgentName
    previous: Annotated[str, says("the revision that serves so far")]
    to: RevisionName
    after: Annotated[
        list[str], says("agents of the wave that must be committed before, without those that come before these anyway")
    ] = []


class WaveResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an agent of a wave."""

    agent: AgentName
    state: Annotated[MemberState, says("how it ended; `gone-back`: moved, and moved back; `stuck`: not moved back")]
    migration: Annotated[str, says("the id of its migration")] = ""
    back: Annotated[str, says("the id of the migration that moved it back")] = ""
    reason: Reason = ""


class WaveStarted(_Body, frozen=True, kw_only=True, tag="wave-started"):
    """Many agents are moved, in this order."""

    wave: WaveId
    request: Annotated[str, says("the id of the event that asked")]
    by: Annotated[str, says("the operator")]
    members: Annotated[list[WaveMember], says("in the order in which they begin")]
    order: Annotated[WaveOrder, says("what the order is by")]
    parallel: Annotated[int, says("so many at once, at most")]
    budget: Annotated[int, says("so many may fail")]
    strategy: Annotated[str | None, says("of each migration; none: what is due to the agent")] = None
    level: Annotated[str | None, says("the same by level of risk, in place of a strategy")] = None
    because: Annotated[str, says("the operator's reason")] = ""
    left_out: Annotated[dict[str, str], says("agents that were asked for and are not in it, and why")] = {}


class WaveRefused(_Body, frozen=True, kw_only=True, tag="wave-refused"):
    """Nothing was changed."""

    request: Annotated[str, says("the id of the event that asked")]
    reason: Reason
    wave: Annotated[str, says("the wave's id, if there is one")] = ""


class WaveChanged(_Body, frozen=True, kw_only=True, tag="wave-changed"):
    """It begins no further migration."""

    wave: WaveId
    phase: Annotated[Literal["stopping", "rolling-back"], says("whether what was moved stays, or is moved back")]
    by: Annotated[str, says("who or what decided so")]
    reason: Reason
    request: Annotated[str, says("the id of the event that asked, if an operator did")] = ""


class WaveEnded(_Body, frozen=True, kw_only=True, tag="wave-ended"):
    """Its outcome."""

    wave: WaveId
    outcome: Annotated[WaveOutcome, says("how it ended; failed: somebody must look")]
    reason: Reason
    members: Annotated[list[WaveResult], says("what became of each agent")]


# coordinator, topic record/<agent>/: not among the facts, since hosts and monitors have no use for it


class Track(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one series; thinned, so that its extremes are still there."""

    labels: Labels
    times: Annotated[list[float], says("seconds since 1970, by the clock of whoever measured")]
    values: Annotated[list[float], says("as many as times")]


class SeriesRecorded(_Body, frozen=True, kw_only=True, tag="series-recorded"):
    """The measurements of an agent and its host while it was moved; said just before the migration's end."""

    migration: MigrationId
    agent: AgentName
    series: Annotated[list[Track], says("each of them")]
    left_out: Annotated[int, says("series that there was no room for")] = 0


# coordinator, topic snapshot/fleet/


class FleetSnapshot(_Body, frozen=True, kw_only=True, tag="fleet-snapshot"):
    """All that the log said up to event `through`, folded; of what is before `start` nobody needs more than this."""

    through: Seq
    start: Annotated[int, says("at most `through`: what is in flight began after it, and is folded from the events")]
    state: Annotated[bytes, says("zlib of a MessagePack map, which belongs to the coordinator and may change")]


# rule engine, topic fact/alert/<rule>/


class Blame(msgspec.Struct, frozen=True, kw_only=True):
    """A breach that is not held against a candidate: whose fault it is instead, and what says so."""

    who: Annotated[Literal["host", "permanent"], says("whose fault it is")]
    why: Annotated[str, says("what says so")]


class AlertFiring(_Body, frozen=True, kw_only=True, tag="alert-firing"):
    """A rule has held for its time."""

    rule: RuleName
    labels: Labels
    value: Annotated[float, says("of its expression")]
    action: Annotated[str, says('"rollback", "hold" or "notify"')]
    sample_time: Annotated[float, says("of the first sample that showed it, in seconds since 1970")]
    summary: Annotated[str, says("the rule's own words about it")] = ""
    dry_run: Annotated[bool, says("the rule only says what it would do")] = False
    migrations: Annotated[list[str], says("ids of those in flight that the labels fit")] = []
    blamed: Annotated[dict[str, Blame], says("by migration: those that it does not roll back, though it would")] = {}
    expr: Annotated[str, says("the rule's expression, as its file has it")] = ""


class AlertResolved(_Body, frozen=True, kw_only=True, tag="alert-resolved"):
    """It holds no longer."""

    rule: RuleName
    labels: Labels


# monitor, topic fact/gpu/<host>/

GpuCause = Literal["device", "driver", "agent", "limit"]
GpuIndex = Annotated[int, says("the card's number, as the driver counts; -1: the driver as a whole")]
GpuUuid = Annotated[str, says("the card's; empty as long as nobody has told it")]
GpuFaultKind = Annotated[str, says("one of those in docs/gpus.md: lost, hang, xid, ...")]
Xid = Annotated[int, says("NVIDIA's number of the error; 0: it is none of these")]


class GpuFault(_Body, frozen=True, kw_only=True, tag="gpu-fault"):
    """A fault of a GPU stands. Said once; again only if more is known of it."""

    host: HostName
    gpu: GpuIndex
    uuid: GpuUuid
    kind: GpuFaultKind
    cause: Annotated[
        GpuCause, says("whose it is; `agent`: a program's own error; `limit`: none, but a reading is not to be had")
    ]
    detail: Reason
    recovery: Annotated[str, says("what ends it")]
    since: Time
    xid: Xid = 0
    pid: Annotated[int, says("of the process that the kernel names; 0: none")] = 0
    agent: Annotated[str, says("whose process that is; empty: none of this host's agents'")] = ""


class GpuFaultCleared(_Body, frozen=True, kw_only=True, tag="gpu-fault-cleared"):
    """It stands no longer."""

    host: HostName
    gpu: GpuIndex
    uuid: GpuUuid
    kind: GpuFaultKind
    detail: Reason
    since: Time
    until: Time
    xid: Xid = 0


Fact = (
    HostUp
    | HostDown
    | InstanceStarted
    | InstanceStopped
    | SlotChanged
    | StepDone
    | StepFailed
    | CommandRefused
    | RolledBack
    | RollBackEscalated
    | RollBackFailed
    | DrillDone
    | MigrationStarted
    | MigrationRefused
    | StageEntered
    | MigrationWaiting
    | MigrationHeld
    | ChecksMeasured
    | Steered
    | Deviation
    | MigrationEnded
    | WaveStarted
    | WaveRefused
    | WaveChanged
    | WaveEnded
    | SeriesRecorded
    | FleetSnapshot
    | AlertFiring
    | AlertResolved
    | GpuFault
    | GpuFaultCleared
)
