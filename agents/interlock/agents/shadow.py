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
    compared: int = 0
    mismatches: int = 0
    first_mismatch: float | None = None
    examples: list[dict[str, str]] = field(default_factory=list)
    old_latencies: list[float] = field(default_factory=list)
    new_latencies: list[float] = field(default_factory=list)

    def add(self, pair: Pair, at: float) -> None:
        self.compared += 1
        self.old_latencies.append(pair.old_latency)
        if pair.new_latency is not None:
            self.new_latencies.append(pair.new_latency)
        if pair.equal:
            return
        self.mismatches += 1
        self.first_mismatch = self.first_mismatch or at
        if len(self.examples) < MAX_EXAMPLES:
            text = pair.request.decode("utf-8", "backslashreplace")[:MAX_REQUEST_TEXT]
            self.examples.append({"request": text, "difference": pair.difference})

    def verdict(self, now: float) -> Literal["passed", "failed", "inconclusive"] | None:
        """None while there is nothing to say yet. No data is never a pass."""
        if self.mismatches > self.command.max_mismatches:
            return "failed"
        if self.compared >= self.command.requests:
            return "passed"
        if now < self.started + self.command.seconds:
            return None
        return "passed" if self.compared >= self.command.min_requests else "inconclusive"

    def reason(self, verdict: str) -> str:
        if verdict == "failed":
            example = f"; for example {self.examples[0]['difference']}" if self.examples else ""
            return f"{self.mismatches} of {self.compared} answers differ from the serving revision's{example}"
        if verdict == "inconclusive":
            return (
                f"{self.compared} requests were compared in {self.command.seconds:g} s, "
                f"{self.command.min_requests} are needed (only idempotent requests are mirrored)"
            )
        return f"{self.compared} answers compared, {self.mismatches} differ"

    def evidence(self) -> Evidence:
        found: Evidence = {"compared": self.compared, "mismatches": self.mismatches, "examples": self.examples}
        for name, values in (("old", self.old_latencies), ("new", self.new_latencies)):
            if values:
                found[f"{name}_p95_s"] = quantile(sorted(values), 0.95)
        if self.first_mismatch is not None:
            found["first_breach_time"] = self.first_mismatch
        return found
