"""Revision 5: asks another service before each answer, and that one takes its time."""

from typing import Any

import r2
import trio

from interlock.agents.agent import handler

SERVICE_S = 0.4  # seconds


class Slow(r2.Indexed):
    @handler("ask", idempotent=True)
    async def ask(self, question: str, limit: int = 3) -> dict[str, Any]:
        await trio.sleep(SERVICE_S)
        return await super().ask(question, limit)
