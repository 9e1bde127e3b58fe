"""A check that was made before anything is started: whether it passed, and why not."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from interlock.broker.fields import Evidence


class Finding(msgspec.Struct, frozen=True):
    """One check. `reason` is one line: why it failed, or what was seen."""

    check: str
    ok: bool
    reason: str
    evidence: Evidence = {}


def first_failed(findings: Sequence[Finding]) -> Finding | None:
    return next((finding for finding in findings if not finding.ok), None)


def mib(count: int) -> str:
    return f"{count >> 20} MiB"
