"""What the fields of messages hold: types that say their meaning and unit, in the code and in what is made of it
(docs/wire.md, `interlock asyncapi`). To msgspec and mypy each is the plain type.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

MAX_EPOCH = 1 << 53  # what every language's numbers hold exactly; SQLite takes 2**63 - 1
MAX_SPAN_S = 1e9  # 31 years; never NaN or infinity, at which clocks and timers break


def says(text: str) -> msgspec.Meta:
    """The meaning of one field, as `Annotated[int, says("how many")]`."""
    return msgspec.Meta(description=text)


Time = Annotated[float, says("seconds since 1970")]
Seconds = Annotated[float, says("seconds")]
Seq = Annotated[int, says("the number of an event in the log")]
EventId = Annotated[str, says("the id of an event")]
Identity = Annotated[str, says("who, as its key names it: host/alpha, coordinator, operator/ann")]
HostName = Annotated[str, says("the host's name")]
AgentName = Annotated[str, says("the agent's name")]
RevisionName = Annotated[str, says("the revision's name")]
RuleName = Annotated[str, says("the alert's name in the rule file")]
InstanceId = Annotated[str, says("the host's own name for this process of the agent")]
MigrationId = Annotated[str, says("the migration's id, chosen by the coordinator")]
Epoch = Annotated[
    int,
    msgspec.Meta(ge=0, le=MAX_EPOCH),
    says("the migration's fencing token: the number in the log of the request that began it"),
]
Span = Annotated[float, msgspec.Meta(ge=0, le=MAX_SPAN_S)]  # seconds
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
WaveId = Annotated[str, says("the wave's id, chosen by the coordinator")]
Deadline = Annotated[float, says("seconds since 1970; refused after that")]
Reason = Annotated[str, says("why, in one line for people")]
Labels = Annotated[dict[str, str], says("labels as Prometheus has them: name and value")]
Evidence = Annotated[dict[str, Any], says("figures and findings by name, as they were measured")]
Number = Annotated[int, says("of the request: any number of the asker's, which its answers repeat")]
Prefixes = Annotated[list[str], says("what topics start with; an empty one stands for all")]

BackupLevel = Literal["configuration", "code", "state", "host"]  # what a backup holds of an agent and its host
