"""A check that was made before anything is started: whether it passed, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from interlock.broker.fields import Evidence


@dataclass(frozen=True)
class Finding:
    """One check. `reason` is one line: why it failed, or what was seen."""

    check: str
    ok: bool
    reason: str
    evidence: Evidence = field(default_factory=dict)


def first_failed(findings: Sequence[Finding]) -> Finding | None:
    return next((finding for finding in findings if not finding.ok), None)


def mib(count: int) -> str:
    return f"{count >> 20} MiB"
