import threading
from pathlib import Path

from interlock.agents.agent import Agent, handler, while_active


class Keep(Agent):
    """Counts in memory how often each number was asked for."""

    def setup(self) -> None:
        self.asked: dict[int, int] = {}
        self.lock = threading.Lock()

    @handler("double", idempotent=True)
    def double(self, n: int) -> dict:
        return {"n": n, "answer": 2 * n, "revision": self.revision}

    @handler("keep")
    def keep(self, n: int) -> dict:
        with self.lock:
            self.asked[n] = self.asked.get(n, 0) + 1
        return {"n": n, "answer": 2 * n, "revision": self.revision}

    @handler("kept", idempotent=True)
    def kept(self) -> dict:
        return {"kept": [[n, count] for n, count in self.asked.items()], "revision": self.revision}

    @while_active
    def look(self, stop: threading.Event) -> None:
        while not stop.wait(0.02):
            trigger = Path(self.config.get("trigger", "/nonexistent"))
            self.metrics.gauge("badness", trigger.exists() and trigger.read_text() == "bad")

    def snapshot(self):
        for n, count in self.asked.items():
            yield f"{n} {count}\n".encode()
        yield bytes(self.config.get("ballast", 0) << 20)

    def restore(self, state) -> None:
        text = b"".join(state).rstrip(b"\0").decode()
        self.asked = {int(n): int(count) for n, count in (line.split() for line in text.splitlines())}
