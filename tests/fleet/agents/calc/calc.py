import os
import signal
from pathlib import Path

import trio

from interlock.agents.agent import Agent, background, handler


class Calc(Agent):
    sick = False

    @handler("double", idempotent=True)
    async def double(self, n: int) -> dict:
        self.mischief()
        return {"n": n, "answer": 2 * n, "revision": self.revision}

    @background
    async def look(self) -> None:
        self.metrics.gauge("badness", 0)
        while True:
            self.mischief()
            await trio.sleep(0.02)

    def mischief(self) -> None:
        trigger = Path(self.config.get("trigger", "/nonexistent"))
        what = trigger.read_text() if trigger.exists() else ""
        if what == "die":
            os._exit(3)
        if what == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "bad":
            self.metrics.gauge("badness", 1)
        self.sick = what == "sick"

    async def health(self) -> dict:
        return {"ok": not self.sick, "detail": "told to be sick"}
