"""What may be asked, and of whom. What is answered stands in `facts.py`.

A command carries its deadline (seconds since 1970): it is refused after that. Its identity is the id in the event's
header: the same id is done once. `epoch` is the fencing token of a migration, the sequence number that the event log
gave to the request that began it: a host refuses a command of an older epoch than the newest it has seen for the agent.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class _Body(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    pass


class Breach(msgspec.Struct, frozen=True, kw_only=True):
    """What a rule or a check saw. `sample_time` is the time of the first sample that showed it, seconds since 1970."""

    by: str  # "rule gpu-memory", "check shadow", "host process-died", "operator"
    reason: str  # one line for people
    labels: dict[str, str] = {}
    value: float | None = None
    sample_time: float | None = None


# operator -> coordinator, topic command/coordinator/


class Migrate(_Body, frozen=True, kw_only=True, tag="migrate"):
    """Move an agent to a revision. `strategy`: None takes the agent's own.

    because: why it may be less careful than is due. accept: the slowest class of rollback that will do ("": warm,
    "cold", "hand-over").
    """

    agent: str
    to: str
    deadline: float
    strategy: str | None = None
    because: str = ""
    accept: str = ""


class RollBackAgent(_Body, frozen=True, kw_only=True, tag="roll-back-agent"):
    """Undo the agent's migration in flight."""

    agent: str
    reason: str
    deadline: float


class RunDrill(_Body, frozen=True, kw_only=True, tag="run-drill"):
    """Rehearse the rollback of an agent, now. whole_host: level 3 too, so all agents of its host at once."""

    agent: str
    deadline: float
    whole_host: bool = False


# coordinator -> host, topic command/<host>/


class Prepare(_Body, frozen=True, kw_only=True, tag="prepare"):
    """Check, record and back up revision `to`; measure the baseline of the old one for `baseline_s` seconds.

    levels: of the backup. accept: as of Migrate. sick_ok: go on though the old revision is not healthy; it is then no
    verified way back.
    """

    migration: str
    agent: str
    epoch: int
    deadline: float
    to: str
    baseline_s: float
    levels: list[str] = msgspec.field(default_factory=lambda: ["configuration", "code"])
    accept: str = ""
    sick_ok: bool = False


class Drill(_Body, frozen=True, kw_only=True, tag="drill"):
    """Rehearse the rollback with the real processes, and measure it; within `promise_s` it is done, else failed.

    accept: "cold": a slower one will do, and says so. cold: the old process will be stopped, so there is no level 1.
    whole_host: as of RunDrill. `migration` is empty where there is none.
    """

    migration: str
    agent: str
    epoch: int
    deadline: float
    promise_s: float
    accept: str = ""
    cold: bool = False
    whole_host: bool = False


class StartCandidate(_Body, frozen=True, kw_only=True, tag="start-candidate"):
    """Start the prepared revision beside the serving one, without live requests; done when it is healthy.

    cold: both don't fit, so the old one is stopped before, and all requests go to the candidate once it is healthy.
    """

    migration: str
    agent: str
    epoch: int
    deadline: float
    cold: bool = False


class Shadow(_Body, frozen=True, kw_only=True, tag="shadow"):
    """Mirror live requests to the candidate until `requests` were compared or `seconds` are over."""

    migration: str
    agent: str
    epoch: int
    deadline: float
    requests: int
    seconds: float
    min_requests: int
    max_mismatches: int


class CutOver(_Body, frozen=True, kw_only=True, tag="cut-over"):
    """Give the candidate this share (0 to 1) of the live requests; the host holds a lease of `lease_s` from then on."""

    migration: str
    agent: str
    epoch: int
    deadline: float
    share: float
    lease_s: float


class Commit(_Body, frozen=True, kw_only=True, tag="commit"):
    """Make the candidate permanent; drain and stop the old one."""

    migration: str
    agent: str
    epoch: int
    deadline: float


# operator, coordinator -> hosts, topic command/<host>/ or command/all/


class RollCall(_Body, frozen=True, kw_only=True, tag="roll-call"):
    """Say that you are there: the host's receipt is all that is asked for. Also to all hosts, topic command/all/."""

    deadline: float


# rule engine, coordinator, operator -> host, topic rollback/<host>/


class RollBack(_Body, frozen=True, kw_only=True, tag="roll-back"):
    """Put the old revision back. Needs no permission, and is done whatever state the migration is in."""

    migration: str
    agent: str
    epoch: int
    breach: Breach
    issued: float  # seconds since 1970, when it was decided


# coordinator -> host, directly (not through the log)


class RenewLease(_Body, frozen=True, kw_only=True, tag="renew-lease"):
    """Keep the candidate live for another `lease_s` seconds; a host whose lease expires rolls back by itself."""

    migration: str
    agent: str
    epoch: int
    lease_s: float


Step = Literal["prepare", "drill", "start-candidate", "shadow", "cut-over", "commit"]

Command = (
    Migrate
    | RollBackAgent
    | RunDrill
    | RollCall
    | Prepare
    | Drill
    | StartCandidate
    | Shadow
    | CutOver
    | Commit
    | RollBack
    | RenewLease
)
HostCommand = Prepare | Drill | StartCandidate | Shadow | CutOver | Commit

Evidence = dict[str, Any]  # figures and findings by name, as the host or a check measured them
