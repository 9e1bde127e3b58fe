"""The demo's clients, in a process of their own, and what they saw."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import trio

RECENT_S = 1.0  # seconds that the rate on the screen looks back


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it; times in seconds since 1970."""

    client: int
    sent: float
    answered: float
    right: bool
    revision: str


@dataclass
class Seen:
    """All that the clients of one agent have seen so far."""

    answers: list[Answer] = field(default_factory=list)
    recent: deque[Answer] = field(default_factory=deque)
    grown: trio.Event = field(default_factory=trio.Event)  # set and replaced when more is added

    def add(self, records: list[list[object]]) -> None:
        for record in records:
            answer = Answer(*record)  # type: ignore[arg-type]
            self.answers.append(answer)
            self.recent.append(answer)
        while self.recent and self.recent[0].answered < self.recent[-1].answered - RECENT_S:
            self.recent.popleft()
        grown, self.grown = self.grown, trio.Event()
        grown.set()

    def between(self, start: float, end: float) -> list[Answer]:
        """Requests that were on their way at some time between these two."""
        return [answer for answer in self.answers if answer.answered >= start and answer.sent <= end]

    def first_answer_of(self, revision: str, after: float) -> float | None:
        """When the revision answered a request that was sent after this time, as the clients saw it."""
        times = [a.answered for a in self.answers if a.revision == revision and a.sent >= after]
        return min(times, default=None)


def longest_gap_ms(answers: list[Answer]) -> float:
    """The longest time that any one client went without a right answer; its own pauses between requests included."""
    last: dict[int, float] = {}
    longest = 0.0
    for answer in sorted(answers, key=lambda a: a.answered):
        if not answer.right:
            continue
        if answer.client in last:
            longest = max(longest, answer.answered - last[answer.client])
        last[answer.client] = answer.answered
    return longest * 1000


@dataclass(frozen=True)
class Load:
    """`clients` REQ sockets that ask `rate` requests a second in all."""

    what: str
    endpoint: str
    clients: int
    rate: float


async def run_clients(script: Path, load: Load, seen: Seen, *, task_status: trio.TaskStatus[None]) -> None:
    """Let them ask until cancelled; started when the first answers are in."""
    argv = [sys.executable, str(script), load.what, load.endpoint, str(load.clients), str(load.rate)]
    process = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    buffer, answered = b"", False
    try:
        async for chunk in process.stdout:
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                seen.add(json.loads(line))
            if seen.answers and not answered:
                answered = True
                task_status.started()
        raise RuntimeError(f"the clients of {load.what} ended by themselves: code {await process.wait()}")
    finally:
        if process.returncode is None:
            process.terminate()
        with trio.CancelScope(shield=True):
            await process.wait()
