"""What happened: the events that hosts, the coordinator and the rule engine report. Requests stand in `commands.py`."""

from __future__ import annotations

from typing import Literal

from interlock.broker.commands import Breach, Evidence, Step, _Body

Role = Literal["permanent", "candidate"]  # of an instance: what serves by right, and what is on trial
Outcome = Literal["committed", "rolled-back", "held", "refused", "failed"]

# host, topic fact/host/<host>/


class HostUp(_Body, frozen=True, kw_only=True, tag="host-up"):
    """A host process began. `control`: the endpoint where it takes rollbacks and leases directly."""

    host: str
    control: str
    pid: int
    boot: str
    agents: list[str] = []


class HostDown(_Body, frozen=True, kw_only=True, tag="host-down"):
    """A host process is ending in good order."""

    host: str


class InstanceStarted(_Body, frozen=True, kw_only=True, tag="instance-started"):
    """A process of an agent runs. `pid` is also its process group."""

    host: str
    agent: str
    instance: str
    revision: str
    role: Role
    pid: int
    started: float


class InstanceStopped(_Body, frozen=True, kw_only=True, tag="instance-stopped"):
    """A process of an agent is gone. `returncode` is negative for a signal; `expected`: the host asked for it."""

    host: str
    agent: str
    instance: str
    revision: str
    role: Role
    returncode: int
    expected: bool
    detail: str = ""


class SlotChanged(_Body, frozen=True, kw_only=True, tag="slot-changed"):
    """An agent's slot entered another state. `share`: of live requests, to the candidate."""

    host: str
    agent: str
    state: str
    permanent: str
    candidate: str | None = None
    share: float = 0.0
    migration: str | None = None
    epoch: int = 0
    endpoint: str = ""


class StepDone(_Body, frozen=True, kw_only=True, tag="step-done"):
    """A host did what a command asked; `command` is the id of the event that asked."""

    host: str
    agent: str
    migration: str
    epoch: int
    step: Step
    command: str
    evidence: Evidence = {}


class StepFailed(_Body, frozen=True, kw_only=True, tag="step-failed"):
    """A host could not do it; the slot serves what it served before. `check` names what failed."""

    host: str
    agent: str
    migration: str
    epoch: int
    step: Step
    command: str
    check: str
    reason: str
    evidence: Evidence = {}


class CommandRefused(_Body, frozen=True, kw_only=True, tag="command-refused"):
    """A host did not accept a command (stale epoch, past its deadline, wrong state, unknown agent)."""

    host: str
    agent: str
    migration: str
    command: str
    reason: str


class RolledBack(_Body, frozen=True, kw_only=True, tag="rolled-back"):
    """The old revision serves again. Times in seconds since 1970, by the host's clock.

    received: the host learned of it; routed: live requests went to the old revision from then on; restored: the first
    answer of the old revision after that (a live request or a probe). `verified`: the old one answered a probe.
    """

    host: str
    agent: str
    migration: str
    epoch: int
    revision: str
    level: int
    breach: Breach
    received: float
    routed: float
    restored: float
    verified: bool
    evidence: Evidence = {}


class RollBackEscalated(_Body, frozen=True, kw_only=True, tag="roll-back-escalated"):
    """One level of a rollback has failed or its time is up (`reason`); the host goes on with `level`, 2 to 4."""

    host: str
    agent: str
    migration: str
    epoch: int
    breach: Breach
    level: int
    reason: str


class RollBackFailed(_Body, frozen=True, kw_only=True, tag="roll-back-failed"):
    """The old revision could not be brought back; a human must look. All evidence is kept, the host goes on trying.

    level: the last one tried. kept: the revision on trial, if it serves instead because it is the healthy one.
    """

    host: str
    agent: str
    migration: str
    epoch: int
    breach: Breach
    reason: str
    level: int = 1
    kept: str = ""
    evidence: Evidence = {}


class DrillDone(_Body, frozen=True, kw_only=True, tag="drill-done"):
    """A rollback was rehearsed. `seconds`: what each level ("1", "2") took; problems: what went wrong.

    skipped: levels that were not rehearsed, and why. command: the id of the event that asked.
    """

    host: str
    agent: str
    revision: str
    seconds: dict[str, float]
    problems: list[str] = []
    skipped: dict[str, str] = {}
    migration: str = ""
    command: str = ""
    evidence: Evidence = {}


# coordinator, topic fact/migration/<agent>/


class MigrationStarted(_Body, frozen=True, kw_only=True, tag="migration-started"):
    """It has begun. `settings`: the strategy's figures as they were at that time; they hold to the end."""

    migration: str
    epoch: int
    agent: str
    host: str
    previous: str
    to: str
    strategy: str
    request: str  # id of the event that asked
    settings: Evidence = {}


class MigrationRefused(_Body, frozen=True, kw_only=True, tag="migration-refused"):
    """Nothing was changed."""

    request: str
    agent: str
    to: str
    reason: str


class StageEntered(_Body, frozen=True, kw_only=True, tag="stage-entered"):
    migration: str
    agent: str
    stage: str
    note: str = ""


class MigrationHeld(_Body, frozen=True, kw_only=True, tag="migration-held"):
    """It stays where it is until an operator decides."""

    migration: str
    agent: str
    breach: Breach


class MigrationEnded(_Body, frozen=True, kw_only=True, tag="migration-ended"):
    migration: str
    agent: str
    epoch: int
    outcome: Outcome
    decided_by: str
    reason: str
    evidence: Evidence = {}


# coordinator, topic snapshot/fleet/


class FleetSnapshot(_Body, frozen=True, kw_only=True, tag="fleet-snapshot"):
    """All that the log said up to event `through`, folded; of what is before `start` nobody needs more than this.

    start: at most `through`; what is in flight began after it, and is folded from the events themselves.
    state: as `interlock.coordinator.fleet` packs it.
    """

    through: int
    start: int
    state: bytes


# rule engine, topic fact/alert/<rule>/


class AlertFiring(_Body, frozen=True, kw_only=True, tag="alert-firing"):
    rule: str
    labels: dict[str, str]
    value: float
    action: str  # rollback | hold | notify
    sample_time: float  # of the first sample that showed it
    summary: str = ""
    dry_run: bool = False
    migrations: list[str] = []  # in flight, and matched by the labels


class AlertResolved(_Body, frozen=True, kw_only=True, tag="alert-resolved"):
    rule: str
    labels: dict[str, str]


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
    | MigrationHeld
    | MigrationEnded
    | FleetSnapshot
    | AlertFiring
    | AlertResolved
)
