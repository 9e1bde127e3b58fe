"""The judgement of a shadow run: enough mirrored requests compared, few enough different. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from interlock.agents.compare import Pair
from interlock.agents.latency import quantile
from interlock.broker.commands import Shadow
from interlock.broker.fields import Evidence

MAX_EXAMPLES = 5  # differences that the report keeps
MAX_REQUEST_TEXT = 200  # characters of a request in an example


@dataclass
class ShadowRun:
    """Collects pairs until `verdict` has something to say. Times are wall clock, seconds since 1970."""

    command: Shadow
    started: float
    max_errors: int = 0  # pairs whose comparison failed; one more is the verdict "error"
    compared: int = 0
    errors: int = 0
    first_error: float | None = None
    failures: list[dict[str, str]] = field(default_factory=list)
    mismatches: int = 0
    first_mismatch: float | None = None
    examples: list[dict[str, str]] = field(default_factory=list)
    old_latencies: list[float] = field(default_factory=list)
    new_latencies: list[float] = field(default_factory=list)

    def add(self, pair: Pair, at: float) -> None:
        if pair.error:  # its comparison failed: it says nothing about the candidate
            self.errors += 1
            self.first_error = self.first_error or at
            if len(self.failures) < MAX_EXAMPLES:
                self.failures.append({"request": _shown(pair), "handler": pair.handler, "error": pair.error})
            return
        self.compared += 1
        self.old_latencies.append(pair.old_latency)
        if pair.new_latency is not None:
            self.new_latencies.append(pair.new_latency)
        if pair.equal:
            return
        self.mismatches += 1
        self.first_mismatch = self.first_mismatch or at
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append({"request": _shown(pair), "difference": pair.difference})

    def verdict(self, now: float) -> Literal["passed", "failed", "error", "inconclusive"] | None:
        """None while there is nothing to say yet. No data is never a pass."""
        if self.mismatches > self.command.max_mismatches:
            return "failed"
        if self.errors > self.max_errors:
            return "error"
        if self.compared >= self.command.requests:
            return "passed"
        if now < self.started + self.command.seconds:
            return None
        return "passed" if self.compared >= self.command.min_requests else "inconclusive"

    def reason(self, verdict: str) -> str:
        if verdict == "failed":
            example = f"; for example {self.examples[0]['difference']}" if self.examples else ""
            return f"{self.mismatches} of {self.compared} answers differ from the serving revision's{example}"
        if verdict == "error":
            return (
                f"{self.errors} comparisons failed, {self.max_errors} may: {self.failures[0]['error']}; "
                "that says nothing about the candidate"
            )
        if verdict == "inconclusive":
            return (
                f"{self.compared} requests were compared in {self.command.seconds:g} s, "
                f"{self.command.min_requests} are needed (only idempotent requests are mirrored)"
            )
        return f"{self.compared} answers compared, {self.mismatches} differ"

    def evidence(self) -> Evidence:
        found: Evidence = {"compared": self.compared, "mismatches": self.mismatches, "examples": self.examples}
        if self.errors:
            found |= {"errors": self.errors, "failures": self.failures}
        for name, values in (("old", self.old_latencies), ("new", self.new_latencies)):
            if values:
                found[f"{name}_p95_s"] = quantile(sorted(values), 0.95)
        first = self.first_mismatch or self.first_error
        if first is not None:
            found["first_breach_time"] = first
        return found


def _shown(pair: Pair) -> str:
    return pair.request.decode("utf-8", "backslashreplace")[:MAX_REQUEST_TEXT]
