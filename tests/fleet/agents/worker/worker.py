import os
import time

import trio

from interlock.agents.agent import Agent, while_active


class Worker(Agent):
    """Takes a piece of work every few milliseconds, and notes when it began and when it ended."""

    @while_active
    async def work(self) -> None:
        while True:
            with trio.CancelScope(shield=True):  # what was begun is ended
                self.note("begins")
                await trio.sleep(0.005)
                self.note("ends")
            await trio.lowlevel.checkpoint()

    def note(self, what: str) -> None:
        with open(self.config["out"], "a") as file:
            file.write(f"{time.monotonic()} {self.revision} {os.getpid()} {what}\n")
