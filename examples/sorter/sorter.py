"""A worker without a port: in its turns it sorts the lines of the files in its inbox, one file after the other."""

import os
from pathlib import Path

import trio

from interlock.agents.agent import Agent, while_active


class Sorter(Agent):
    def setup(self) -> None:
        self.inbox = Path(os.environ.get("INTERLOCK_DATA", ".")) / "inbox"
        self.inbox.mkdir(parents=True, exist_ok=True)

    @while_active
    async def work(self) -> None:
        while True:
            for path in sorted(self.inbox.glob("*.txt")):
                with trio.CancelScope(shield=True):  # what was begun is ended
                    await trio.to_thread.run_sync(sort, path)
                self.metrics.counter("sorted").add()
            await trio.sleep(0.2)


def sort(path: Path) -> None:
    """The sorted lines go aside under another name first, so that a crash leaves the file or its result, not half."""
    aside = path.with_suffix(".part")
    aside.write_text("".join(sorted(path.read_text("utf-8").splitlines(keepends=True))), "utf-8")
    aside.rename(path.with_suffix(".sorted"))
    path.unlink()
