"""A host is cut off from one other machine in one stage of a migration; what must hold then, and after healing.

Used by fleet/test_partitions.py with a fixed sample of the matrix, and by benchmarks/bench_partitions.py with all of
it. Every role is on a machine (a network namespace) of its own: the broker, the coordinator, the rule engine, and the
hosts alpha and beta. The agent that is moved is on alpha, and so are the clients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from crash_parts import PAUSE_S, SETTLE_S, STAGES, UNJUDGED, LogFold, journal, wait
from fleet.conftest import TAG, TestFleet
from fleet_parts import INTERLOCK, Running, Watcher
from net_parts import WAYS, Net

MACHINES = {
    "broker": "10.213.78.1",
    "coordinator": "10.213.78.2",
    "rules": "10.213.78.3",
    "alpha": "10.213.78.4",
    "beta": "10.213.78.5",
}
PEERS = ("coordinator", "rules", "broker", "beta")
LEASE_S = 3.0
CUT_S = LEASE_S + 2.0  # the lease runs out while it is cut
OBSERVATION_S = LEASE_S + 1.0  # and before the migration would be over
ANSWER_S = 10.0  # for one answer to a client on the host itself
LATE_S = 1.0  # an answer that a candidate gave before the rollback may reach its client so long after it
READY_S = 60.0

HEAD = f"""
name = "partitions"
state = "state"
[rules]
files = ["rules.yaml"]
[monitor]
gpu = "none"
[coordinator]
lease_s = {LEASE_S}
[strategies.rapid]
baseline_s = 0.3
shadow_requests = 10
shadow_min_requests = 5
canary = [{{ share = 0.5, seconds = 0.3 }}]
observation_s = {OBSERVATION_S}
{UNJUDGED}
"""


@dataclass(frozen=True)
class Cell:
    """Cut alpha off from `peer` when `stage` begins; `mischief` is what the candidate does meanwhile."""

    peer: str
    way: str
    stage: str
    mischief: str = ""  # "die"; or "bad": a rule must see it

    def __str__(self) -> str:
        return f"{self.peer} cut {self.way} in {self.stage}{', candidate: ' if self.mischief else ''}{self.mischief}"


def matrix() -> list[Cell]:
    """Every peer, way and stage; in observation also with a candidate that dies, or breaches a rule, in the dark."""
    plain = [Cell(peer, way, stage) for peer in PEERS for stage in STAGES for way in WAYS]
    dying = [Cell(peer, way, "observation", "die") for peer in PEERS for way in WAYS]
    breaching = [Cell(peer, way, "observation", "bad") for peer in ("rules", "beta") for way in WAYS]
    return [*plain, *dying, *breaching]


class NetFleet(TestFleet):
    """A fleet whose roles are on machines of their own."""

    def __init__(self, folder: Path, net: Net, agents: dict[str, str]) -> None:
        self.net = net
        self.host_of = agents
        super().__init__(folder, agents, head=HEAD)

    def endpoint(self, agent: str, host: str = "") -> str:
        port = self.ports[f"{agent}@{host}" if host else agent]
        return f"tcp://{MACHINES[host or self.host_of[agent]]}:{port}"

    def _text(self, agents: dict[str, str], head: str) -> str:
        text = super()._text(agents, head)
        for name, machine in (
            *((name, "broker") for name in ("events", "feed", "telemetry_in", "telemetry_out")),
            *((host, host) for host in self.hosts),
            *((f"link-{host}", host) for host in self.hosts),
        ):
            text = text.replace(f"127.0.0.1:{self.ports[name]}", f"{MACHINES[machine]}:{self.ports[name]}")
        return text

    def start_cli(self, *argv: str) -> Running:
        return self._started(self.net.within("coordinator"), argv)

    def watch(self) -> None:
        """Where the log is: no cut is between."""
        if self.watcher is None:
            argv = ("watch", "--events", "--json", "--after", "0", "--timeout", "60")
            self.watcher = Watcher(self._started(self.net.within("broker"), argv))

    def _started(self, within: list[str], argv: tuple[str, ...]) -> Running:
        self.commands.append(Running([*within, INTERLOCK, *argv], self.env, self.folder))
        return self.commands[-1]

    def start_roles(self) -> None:
        assert self.cli("keys", "init").code == 0
        for machine, argv in (
            ("broker", ("broker",)),
            *((host, ("host", "--name", host)) for host in self.hosts),
            ("rules", ("rules",)),
            ("coordinator", ("coordinator",)),
        ):
            self._role(machine, *argv)
        self.watch()

    def _role(self, machine: str, *argv: str) -> None:
        reading, writing = os.pipe()
        with open(self.folder / "up.log", "ab") as log:
            process = subprocess.Popen(
                [*self.net.within(machine), INTERLOCK, *argv],
                env={**self.env, TAG: self.tag, "INTERLOCK_READY_FD": str(writing)},
                pass_fds=[writing], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        os.close(writing)
        self.parts.append(process)
        with os.fdopen(reading) as said:
            assert said.readline() == "ready\n", self.log

    def stop_roles(self) -> list[int]:
        """Their exit codes."""
        for process in reversed(self.parts):
            process.terminate()
            process.wait(30)
        return [process.returncode for process in self.parts]


# --- a client on the host's own machine: `python partition_parts.py ENDPOINT`, until its standard input ends


def ask_until_told(endpoint: str) -> None:
    told, sock = zmq.Poller(), zmq.Context().socket(zmq.REQ)
    told.register(sys.stdin.fileno(), zmq.POLLIN)
    sock.setsockopt(zmq.LINGER, 0)
    sock.connect(endpoint)
    answers: list[tuple[float, str]] = []
    failures: list[str] = []
    n = 0
    while not told.poll(PAUSE_S * 1000):
        n += 1
        sock.send_json({"action": "double", "n": n})
        if not sock.poll(int(ANSWER_S * 1000)):
            failures.append(f"{n}: no answer within {ANSWER_S:g} s")
            break
        answer = json.loads(sock.recv())
        if answer.get("answer") == 2 * n:
            answers.append((time.time(), answer["revision"]))
        else:
            failures.append(f"{n}: {answer}")
    print(json.dumps({"answers": answers, "failures": failures}))


@dataclass
class Asked:
    answers: list[tuple[float, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def asking(fleet: NetFleet, agent: str) -> Iterator[Asked]:
    """A client on the agent's machine; what it saw is there when it is over."""
    argv = [*fleet.net.within(fleet.host_of[agent]), sys.executable, __file__, fleet.endpoint(agent)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        found = Asked()
        try:
            yield found
        finally:
            out, _ = process.communicate(timeout=ANSWER_S + 20)
            said = json.loads(out)
            found.answers = [(at, by) for at, by in said["answers"]]
            found.failures = said["failures"]


# --- one cut


@dataclass
class Result:
    cell: Cell
    outcome: str = ""
    decided_by: str = ""
    rollback_s: float | None = None  # from what showed it to the old revision's first answer
    answers: int = 0
    violations: list[str] = field(default_factory=list)


def cut(fleet: NetFleet, fold: LogFold, cell: Cell, agent: str = "calc") -> Result:
    """Carry out one cell on a fleet that is calm."""
    result, since = Result(cell), len(fleet.events.events)
    fleet.trigger(agent, "")
    old = journal(fleet, agent)[0]
    to = "odd" if cell.mischief else ("r2" if old == "r1" else "r1")
    try:
        with asking(fleet, agent) as asked:
            command = fleet.migrate(agent, to)
            wait(
                lambda: (
                    command.process.poll() is not None
                    or fleet.events.find("stage-entered", since, agent=agent, stage=cell.stage)
                ),
                60,
                every=0.005,
            )
            fleet.net.cut("alpha", cell.peer, cell.way)
            if cell.mischief:
                fleet.trigger(agent, cell.mischief)
            time.sleep(CUT_S)  # so long it is dark, whatever happens
            fleet.net.heal()
            done = command.done(90)
            result.outcome = {0: "committed", 10: "rolled-back"}.get(done.code, str(done))
            _agree(fleet, fold, agent, {"committed": to}.get(result.outcome, old), result)
            time.sleep(10 * PAUSE_S)
    finally:
        fleet.net.heal()
        fleet.trigger(agent, "")
    ended = fleet.events.find("migration-ended", since, agent=agent) or {}
    result.decided_by = ended.get("decided_by", "")
    result.answers = len(asked.answers)
    result.violations += asked.failures
    rolled = fleet.events.find("rolled-back", since, agent=agent)
    _judge(result, rolled, asked, old=old, to=to)
    return result


def _agree(fleet: NetFleet, fold: LogFold, agent: str, serving: str, result: Result) -> None:
    said: dict[str, Any] = {}

    def agree() -> bool:
        said["journal"] = journal(fleet, agent)
        folded = fold.read().agents[agent]
        said["log"] = (folded.permanent, folded.state, folded.candidate)
        said["processes"] = [name.split("-")[-2] for name in fleet.instances(agent)]
        return said == {
            "journal": (serving, "serving", None), "log": (serving, "serving", None), "processes": [serving],
        }  # fmt: skip

    if not wait(agree, SETTLE_S, every=0.1):
        result.violations.append(f"after {result.outcome} {serving} alone should serve: {said}")


def _judge(result: Result, rolled: dict[str, Any] | None, asked: Asked, *, old: str, to: str) -> None:
    cell = result.cell
    if result.outcome not in ("committed", "rolled-back"):
        result.violations.append(f"ended as {result.outcome}")
    expected = None
    if cell.mischief:
        expected = {"die": "host process-died", "bad": "rule badness"}[cell.mischief]
    elif cell.peer == "coordinator" and cell.stage == "observation":
        expected = "host lease-expired"
    elif cell.peer in ("rules", "beta") and result.outcome != "committed":
        result.violations.append(f"it is no matter to this migration, yet it ended as {result.outcome}")
    if expected is not None and (rolled is None or rolled["breach"]["by"] != expected):
        result.violations.append(f"not rolled back by {expected}: {rolled and rolled['breach']}")
    if asked.answers and asked.answers[-1][1] != (to if result.outcome == "committed" else old):
        result.violations.append(f"{asked.answers[-1][1]} answers")
    if rolled is not None:
        result.rollback_s = round(rolled["restored"] - (rolled["breach"]["sample_time"] or rolled["received"]), 3)
        late = [at for at, by in asked.answers if by == to and at > rolled["routed"] + LATE_S]
        if late:
            result.violations.append(f"{len(late)} answers of the candidate after the rollback")


if __name__ == "__main__":
    ask_until_told(sys.argv[1])
