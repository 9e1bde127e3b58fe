"""The tutor: answers questions about Python from its documentation. A revision says how it finds the topics."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import corpus

from interlock.agents.agent import Agent, handler
from interlock.broker.simgpu import open_simulated

MODEL_BYTES = 4 << 30  # what a small language model would take on the GPU


class Tutor(Agent):
    model_bytes = MODEL_BYTES

    async def setup(self) -> None:
        self.model = open_simulated().reserve(self.model_bytes)
        self.asked = 0
        self.prepare()

    async def teardown(self) -> None:
        self.model.free()

    def prepare(self) -> None:
        """Make ready whatever `rank` needs."""

    @abstractmethod
    def rank(self, looked_for: list[str]) -> dict[str, int]:
        """Score of every topic that has one of the words."""
        ...

    @handler("ask", idempotent=True)
    async def ask(self, question: str, limit: int = 3) -> dict[str, Any]:
        self.asked += 1
        self.metrics.counter("questions").add(1)
        looked_for = corpus.terms(question)
        scores = self.rank(looked_for)
        best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:limit]
        answers = [
            {"topic": topic, "score": points, "text": corpus.excerpt(topic, looked_for)} for topic, points in best
        ]
        return {"answers": answers, "revision": self.revision}
