"""What the demo plays, and what is measured of each move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interlock.broker import commands, facts
from interlock.broker.wire import Event
from interlock.coordinator.demo.clients import Seen, longest_gap_ms


@dataclass(frozen=True)
class Scenario:
    name: str
    agent: str
    to: str
    story: str
    expected: str  # outcome


SCENARIOS = [
    Scenario("good", "tutor", "r2", "r2 uses an inverted index: the same answers, faster", "committed"),
    Scenario("gpu-memory", "tutor", "r3", "r3 keeps something on the GPU for every question", "rolled-back"),
    Scenario("crash", "tutor", "r4", "r4 dies under load", "rolled-back"),
    Scenario("slow", "tutor", "r5", "r5 waits for another service before each answer", "rolled-back"),
    Scenario("wrong-answers", "tutor", "r6", "r6 forgot what makes a good answer", "rolled-back"),
    Scenario("exec", "wordbook", "v2", "a plain REP program, moved as it is", "committed"),
]


@dataclass(frozen=True)
class Result:
    """What the report says of a move: its `entry`, the same keys for each, and more of a `rollback`."""

    entry: dict[str, Any]
    rollback: dict[str, Any]


@dataclass
class Move:
    """One scenario while it is played: the events that concern it, and in the end what was measured."""

    scenario: Scenario
    began: float
    request: str = ""
    started: facts.MigrationStarted | None = None
    stage: str = ""
    roll_back: commands.RollBack | None = None
    rolled_back: facts.RolledBack | None = None
    ended: facts.MigrationEnded | None = None
    refused: str = ""

    def apply(self, event: Event) -> str | None:
        """Take in an event; returns a line for the timeline if it is about this move."""
        body = event.body
        if isinstance(body, facts.MigrationRefused) and body.request == self.request:
            self.refused = body.reason
            return f"refused: {body.reason}"
        if isinstance(body, facts.MigrationStarted) and body.request == self.request:
            self.started = body
            return f"{body.agent}: {body.previous} -> {body.to} ({body.strategy})"
        if self.started is None or getattr(body, "migration", None) != self.started.migration:
            return None
        match body:
            case facts.StageEntered():
                self.stage = body.stage
                return f"stage {body.stage}"
            case facts.StepDone():
                return f"{body.step} done{_figures(body.evidence)}"
            case facts.StepFailed():
                return f"{body.step} failed: {body.reason}"
            case commands.RollBack():
                self.roll_back = self.roll_back or body
                return f"ROLL BACK, by {body.breach.by}: {body.breach.reason}"
            case facts.RolledBack():
                self.rolled_back = body
                return f"{body.revision} answers again (level {body.level}), decided by {body.breach.by}"
            case facts.MigrationEnded():
                self.ended = body
                return f"{body.outcome}: {body.reason}"
        return None

    def result(self, seen: Seen, until: float) -> Result:
        """What the report says of it. Times in milliseconds, from the first sample that showed the breach."""
        answers = seen.between(self.began, until)
        entry: dict[str, Any] = {
            "name": self.scenario.name,
            "agent": self.scenario.agent,
            "from": self.started.previous if self.started else None,
            "to": self.scenario.to,
            "outcome": self.ended.outcome if self.ended else "refused",
            "decided_by": self.ended.decided_by if self.ended else self.refused,
            "breach_to_event_ms": None,
            "breach_to_restored_ms": None,
            "requests": len(answers),
            "failed_requests": sum(not answer.right for answer in answers),
            "longest_gap_ms": round(longest_gap_ms(answers), 1),
        }
        rollback: dict[str, Any] = {}
        back = self.rolled_back
        if back is not None and back.breach.sample_time is not None:
            breach = back.breach.sample_time
            told = self.roll_back.issued if self.roll_back is not None else back.received
            entry["breach_to_event_ms"] = round((told - breach) * 1000, 2)
            entry["breach_to_restored_ms"] = round((back.restored - breach) * 1000, 2)
            client_saw = seen.first_answer_of(back.revision, breach)
            rollback = {
                "level": back.level,
                "event_to_restored_ms": round((back.restored - told) * 1000, 2),
                "breach_to_client_answer_ms": None if client_saw is None else round((client_saw - breach) * 1000, 2),
            }
        return Result(entry, rollback)


def _figures(evidence: dict[str, Any]) -> str:
    """The few figures of a step that fit into a line."""
    if "compared" in evidence:
        return f": {evidence['compared']} answers compared, {evidence['mismatches']} differ"
    if "share" in evidence:
        return f": {evidence['share']:.0%} of the requests"
    if "start_s" in evidence:
        return f": healthy after {evidence['start_s']:.2f} s"
    baseline = (evidence.get("baseline") or {}).get("response_s")
    return f": baseline p95 {baseline['0.95'] * 1000:.1f} ms" if baseline else ""
