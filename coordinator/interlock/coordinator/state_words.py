"""What became of an agent's state in memory, in words. Pure: evidence of a host goes in, whatever it holds."""

from __future__ import annotations

from interlock.broker.fields import Evidence

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def handed_over(evidence: Evidence) -> str:
    """Of the step "hand-over": how much it was, and how long requests waited for it; "" if that is not told."""
    held = evidence.get("held_s")
    if not isinstance(held, int | float):
        return ""
    return f"{size(evidence.get('bytes'))} of state, requests waited {held:.2f} s"


def handed_back(evidence: Evidence) -> str:
    """Of a rollback: whether the newer state came back, or what was lost; "" if none was moved."""
    told = evidence.get("state")
    if not isinstance(told, dict):
        return ""
    if told.get("handed_back") is True:
        return f"the newer state was handed back: {handed_over(told)}"
    lost, why = told.get("lost_s"), told.get("why")
    span = f"{lost:.1f} s" if isinstance(lost, int | float) else "some time"
    return f"what the candidate did to the state in {span} is lost: {why or 'it could not be handed back'}"


def size(count: object) -> str:
    """Bytes, for people."""
    if not isinstance(count, int | float):
        return "an unknown size"
    left, unit = float(count), 0
    while left >= 1024 and unit < len(UNITS) - 1:
        left, unit = left / 1024, unit + 1
    return f"{left:.0f} {UNITS[unit]}" if unit == 0 else f"{left:.1f} {UNITS[unit]}"
