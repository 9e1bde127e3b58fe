"""One process is killed (SIGKILL) at one moment of a move to another host, under requests; what must hold afterwards.

Used by the suite with a fixed sample, and by benchmarks/bench_moves.py with all of it. The agent goes from the host
that it is on to the other one, alpha or beta; whatever became of it, the next case begins where it is.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from crash_parts import LOOK_S, OUTCOMES, SETTLE_S, Askers, LogFold, burst, wait

ROLES = ("source", "target", "both", "guest", "old", "coordinator", "broker")
MOMENTS = (
    "stage prepare", "done receive", "done prepare", "done start-candidate", "done shadow", "done hand-over",
    "stage observation", "done cut-over", "stage commit", "done commit",
)  # fmt: skip
BEFORE_THE_GUEST = ("stage prepare", "done receive", "done prepare")
OTHER = {"alpha": "beta", "beta": "alpha"}


@dataclass(frozen=True)
class Case:
    role: str
    moment: str
    agent: str

    def __str__(self) -> str:
        return f"{self.role} killed at {self.moment} ({self.agent})"


def possible(role: str, moment: str, agent: str) -> bool:
    if moment == "done hand-over" and agent != "keep":
        return False  # it has no state
    return not (role == "guest" and moment in BEFORE_THE_GUEST)


def matrix() -> list[Case]:
    return [
        Case(role, moment, agent)
        for role in ROLES for moment in MOMENTS for agent in ("keep", "rep") if possible(role, moment, agent)
    ]  # fmt: skip


@dataclass
class Result:
    case: Case
    outcome: str = ""
    killed: bool = False
    lost: int = 0
    errors: int = 0
    answers: int = 0
    violations: list[str] = field(default_factory=list)


def slot(fleet: Any, agent: str, host: str) -> tuple[str, str, str] | None:
    """(permanent revision, state, place) as the host has written them; None if it has no such slot."""
    path = fleet.folder / "state" / f"host-{host}" / "host.sqlite"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        found = db.execute("SELECT permanent, state, place FROM slots WHERE agent = ?", (agent,)).fetchone()
    db.close()
    return None if found is None else tuple(found)


def owners(fleet: Any, agent: str) -> list[str]:
    """The hosts whose journals say that the agent is theirs."""
    found = {host: slot(fleet, agent, host) for host in OTHER}
    return [host for host, row in found.items() if row is not None and row[1] not in ("forwarding", "arriving")]


def home(fleet: Any, agent: str) -> str:
    """Wait until exactly one host has it, and it serves there; which."""

    def settled() -> str:
        having = owners(fleet, agent)
        rows = [slot(fleet, agent, host) for host in OTHER]
        calm = all(row is None or row[1] in ("serving", "forwarding") for row in rows)
        return having[0] if calm and len(having) == 1 else ""

    return str(wait(settled, SETTLE_S, every=LOOK_S))


class Move:
    """Carries out one case on a fleet that is calm."""

    def __init__(self, fleet: Any, fold: LogFold, case: Case) -> None:
        self.fleet, self.fold, self.case = fleet, fold, case
        self.result = Result(case)
        self.since = len(fleet.events.events)

    def run(self) -> Result:
        fleet, agent, result = self.fleet, self.case.agent, self.result
        source = home(fleet, agent)
        target = OTHER[source]
        row = slot(fleet, agent, source)
        assert row is not None
        old, to = row[0], {"r1": "r2", "r2": "r1"}[row[0]]
        victims = self._victims(source, target)
        with Askers(fleet.endpoint(agent)) as askers:
            command = fleet.migrate(agent, to, "rapid", "--host", target)
            self._wait_for_the_moment(command)
            self._kill(victims, askers)
            done = command.done(150)
            result.outcome = OUTCOMES.get(done.code, f"exit code {done.code}: {done.err.strip()[-300:]}")
            if done.code not in (0, 10, 12):
                result.violations.append(f"ended as {result.outcome}: {done.out[-300:]}")
            self._judge(old, to, source, target)
        result.violations += askers.wrong[:3]
        result.errors, result.lost, result.answers = askers.errors, askers.lost, askers.answers.total()
        if askers.lost > askers.count:
            result.violations.append(f"{askers.lost} requests lost")
        return result

    def _find(self, type: str, **wanted: Any) -> Any:
        return self.fleet.events.find(type, self.since, agent=self.case.agent, **wanted)

    def _wait_for_the_moment(self, command: Any) -> None:
        kind, _, name = self.case.moment.partition(" ")
        seen = {"stage": ("stage-entered", {"stage": name}), "done": ("step-done", {"step": name})}[kind]
        wait(lambda: command.process.poll() is not None or self._find(seen[0], **seen[1]), 90, every=0.002)

    def _victims(self, source: str, target: str) -> list[int]:
        """Looked for before the moment: to look at all processes takes longer than the moment lasts."""
        role, fleet = self.case.role, self.fleet
        hosts = {"source": [source], "target": [target], "both": [source, target]}.get(role, [])
        words = {"broker": [("broker",)], "coordinator": [("coordinator", "coordinator")]}.get(role, [])
        return [fleet.role(*each).pid for each in [*(("agents", host) for host in hosts), *words]]

    def _kill(self, pids: list[int], askers: Askers) -> None:
        role = self.case.role
        if role in ("guest", "old"):
            wanted = "candidate" if role == "guest" else "permanent"
            started = [
                event["body"] for event in self.fleet.events.events
                if event["body"]["type"] == "instance-started" and event["body"]["agent"] == self.case.agent
            ]  # fmt: skip
            pids = [body["pid"] for body in started if body["role"] == wanted and psutil.pid_exists(body["pid"])][-1:]
        if role in ("source", "target", "both"):
            askers.killed_at = time.time()  # what is in flight in a host dies with it
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                self.result.killed = True
            except ProcessLookupError:
                pass

    def _judge(self, old: str, to: str, source: str, target: str) -> None:
        """One revision serves on one host: by the journals, the log, the processes, and what clients get."""
        agent, fleet = self.case.agent, self.fleet
        host, serving = (target, to) if self.result.outcome == "committed" else (source, old)
        said: dict[str, Any] = {}

        def agree() -> bool:
            said["owners"] = owners(fleet, agent)
            said["journal"] = slot(fleet, agent, host)
            folded = self.fold.read().agents[agent]
            said["log"] = (folded.host, folded.permanent, folded.state, folded.candidate)
            said["processes"] = [name.split("-")[-2] for name in fleet.instances(agent)]
            return said == {
                "owners": [host], "journal": (serving, "serving", ""), "log": (host, serving, "serving", None),
                "processes": [serving],
            }  # fmt: skip

        if not wait(agree, SETTLE_S, every=LOOK_S):
            self.result.violations.append(f"after {self.result.outcome} {serving} should serve on {host}: {said}")
        places = [fleet.endpoint(agent)] if host == "alpha" else [fleet.endpoint(agent), fleet.endpoint(agent, "beta")]
        for place in places:
            answers = burst(place)
            if set(answers) != {serving}:
                self.result.violations.append(f"{dict(answers)} answered at {place}, not {serving} alone")
