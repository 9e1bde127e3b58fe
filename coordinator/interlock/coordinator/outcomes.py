"""What facts of a host say of how a migration ended. Pure."""

from __future__ import annotations

from interlock.broker import facts
from interlock.broker.fields import Evidence

FORWARDING = "forwarding"  # the state of a slot whose agent was moved to another host


def is_committed(started: facts.MigrationStarted, slot: facts.SlotChanged) -> bool:
    """Of a slot that has no candidate any more: whether the migration was made permanent."""
    if started.target:
        return slot.state == FORWARDING or slot.host == started.target
    return slot.permanent == started.to


def rollback_evidence(body: facts.RolledBack) -> Evidence:
    """For the record: times, and all that the host found."""
    first = body.breach.sample_time
    return {
        "level": body.level,
        "revision": body.revision,
        "received": body.received,
        "routed": body.routed,
        "restored": body.restored,
        "breach_to_routed_ms": None if first is None else (body.routed - first) * 1000,
        "breach_to_restored_ms": None if first is None else (body.restored - first) * 1000,
        **body.evidence,
    }
