"""One process of a fleet is killed (SIGKILL) at one moment of a migration, under requests; what must hold afterwards.

Used by the suite with a fixed sample of the matrix, and by benchmarks/bench_crash.py with all of it. A fleet is a
`TestFleet` of fleet/conftest.py that is up, with the agents `calc` (whose requests may all be asked twice) and `rep`
(where "double" may, and "once" may not).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import zmq

from interlock.broker.log import EventLog
from interlock.broker.wire import Event, decode_body
from interlock.coordinator.fleet import Fleet

ROLES = ("host", "coordinator", "rules", "broker", "telemetry", "monitor", "candidate", "permanent")
STAGES = ("prepare", "infrastructure", "core-logic", "integration", "observation", "commit")
STEPS = ("prepare", "start-candidate", "shadow", "cut-over", "commit")
MOMENTS = (*(f"stage {name}" for name in STAGES), *(f"done {name}" for name in STEPS), "random")
BEFORE_THE_CANDIDATE = ("stage prepare", "done prepare", "stage infrastructure")  # nothing there to kill
LIVE = ("stage observation", "done cut-over")  # here a breach can come in the same moment as the kill
OUTCOMES = {0: "committed", 10: "rolled-back", 11: "held", 12: "refused", 13: "failed"}

# How a candidate does on a machine that may be busy is not the question here.
UNJUDGED = """
observe = { failures = 99, latency_passed = 98.0, latency_failed = 99.0, slow_passed = 0.98, slow_failed = 0.99 }
"""
HEAD = f"""
name = "crashes"
state = "state"
[rules]
files = ["rules.yaml"]
[monitor]
gpu = "none"
[coordinator]
lease_s = 4.0
[strategies.rapid]  # for what is to be committed
baseline_s = 0.3
shadow_requests = 10
shadow_min_requests = 5
canary = [{{ share = 0.5, seconds = 0.2 }}]
observation_s = 0.5
{UNJUDGED}
[strategies.staged]  # for what turns bad while it is observed
baseline_s = 0.3
shadow_requests = 10
shadow_min_requests = 5
canary = [{{ share = 0.5, seconds = 0.2 }}]
observation_s = 100.0
{UNJUDGED}
"""

PROMISE_S = 5.0  # a rollback that is due is done within, the restart of who was killed included
MIGRATION_S = 4.0  # a random moment is within so long after the start
SETTLE_S = 40.0  # for all views to agree, on a machine that may be busy
ANSWER_S = 25.0  # for one answer: what misses it hangs
LOST_S = 2.0  # what was in flight in a killed host gets no answer; its clients ask again after this
FLIGHT_S = 0.1  # a request sent so shortly after the kill may still have gone to the dead
BURST = 20  # requests of which every answer must be of one revision
PAUSE_S = 0.02  # between requests of one client
LOOK_S = 0.1


@dataclass(frozen=True)
class Case:
    """Kill `role` at `moment` while `agent` is moved; with `breach` the candidate turns bad at the same time."""

    role: str
    moment: str
    agent: str
    breach: bool = False
    delay_s: float = 0.0  # of a random moment

    def __str__(self) -> str:
        return f"{self.role} killed at {self.moment}{' + breach' if self.breach else ''} ({self.agent})"


def possible(role: str, moment: str) -> bool:
    return not (role == "candidate" and moment in BEFORE_THE_CANDIDATE)


def cases(kills: int, seed: int) -> list[Case]:
    """All of the matrix, again and again, in an order that the seed decides; each role's turn comes round evenly."""
    chance = random.Random(seed)
    roles = list(ROLES)
    chance.shuffle(roles)
    moments: dict[str, list[str]] = {role: [] for role in roles}
    found = []
    while len(found) < kills:
        role = roles[len(found) % len(roles)]
        if not moments[role]:
            moments[role] = [moment for moment in MOMENTS if possible(role, moment)]
            chance.shuffle(moments[role])
        moment = moments[role].pop()
        breach = moment in LIVE and role not in ("host", "candidate") and chance.random() < 0.5
        agent = "calc" if breach else chance.choice(("calc", "rep"))  # calc has the gauge that the rule looks at
        found.append(Case(role, moment, agent, breach, chance.uniform(0, MIGRATION_S)))
    return found


# --- clients


class Askers:
    """Plain REQ clients of one agent, each in a thread of its own, that account for every request they sent."""

    def __init__(self, endpoint: str, *, count: int = 2, once: bool = False) -> None:
        self.endpoint, self.count, self.once = endpoint, count, once
        self.answers: Counter[str] = Counter()  # by revision
        self.wrong: list[str] = []
        self.errors = 0  # of requests that may not be asked twice
        self.lost = 0  # were in flight in a host that was killed
        self.killed_at = 0.0
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(count)]

    def __enter__(self) -> Askers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(ANSWER_S + 5)
        self._context.destroy(linger=0)

    def _open(self) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.REQ)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(self.endpoint)
        return sock

    def _ask(self, number: int) -> None:
        sock, n = self._open(), number
        while not self._stop.wait(PAUSE_S):
            n += self.count
            once = self.once and n % 3 == 0
            sent = time.time()
            sock.send_json({"action": "once" if once else "double", "n": n})
            answer = self._answer(sock, sent)
            if answer is None:
                sock.close()
                sock = self._open()
            elif answer.get("answer") == 2 * n:
                self.answers[answer["revision"]] += 1
            elif once and answer.get("status") == "error":
                self.errors += 1
            else:
                self.wrong.append(f"{n}: {answer}")
        sock.close()

    def _answer(self, sock: zmq.Socket[bytes], sent: float) -> dict[str, Any] | None:
        while not sock.poll(50):
            waited = time.time() - sent
            if waited > LOST_S and self.killed_at and sent < self.killed_at + FLIGHT_S:
                self.lost += 1
                return None
            if waited > ANSWER_S:
                self.wrong.append(f"no answer within {ANSWER_S:g} s")
                return None
        return dict(sock.recv_json())  # type: ignore[call-overload]


def burst(endpoint: str) -> Counter[str]:
    """The revisions that answer some requests in a row."""
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(endpoint)
        found: Counter[str] = Counter()
        for n in range(BURST):
            sock.send_json({"action": "double", "n": n})
            found[json.loads(sock.recv())["revision"] if sock.poll(int(ANSWER_S * 1000)) else "nobody"] += 1
            if "nobody" in found:
                break
        return found


# --- what the views say


class LogFold:
    """The fleet as the log's file says it, read on from where it was read before."""

    def __init__(self, fleet: Any) -> None:
        self._path = fleet.folder / "state" / "broker" / "events.sqlite"
        self._at = 0
        self.view = Fleet()

    def read(self) -> Fleet:
        log = EventLog(self._path, read_only=True)
        try:
            while True:
                page = log.read(self._at, [""], limit=1000, max_bytes=1 << 24)
                for record in page.records:
                    self.view.apply(Event(record.topic, record.header, decode_body(record.body), record.body))
                self._at = page.through
                if not page.more:
                    return self.view
        finally:
            log.close()


def journal(fleet: Any, agent: str, host: str = "alpha") -> tuple[str, str, str | None]:
    """(permanent revision, state, candidate) as the host has written them."""
    path = fleet.folder / "state" / f"host-{host}" / "host.sqlite"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        found = db.execute("SELECT permanent, state, candidate FROM slots WHERE agent = ?", (agent,)).fetchone()
    db.close()
    return tuple(found)


def processes(fleet: Any) -> dict[str, int]:
    """Role -> pid of all that runs now, and "agent NAME" -> how many instances it has."""
    found: dict[str, int] = {}
    for process in fleet.left():
        try:
            line = process.cmdline()
            instance = process.environ().get("INTERLOCK_INSTANCE", "").partition(":")[2]
        except psutil.Error:
            continue
        if instance:
            agent = f"agent {instance.rsplit('-', 2)[0]}"
            found[agent] = found.get(agent, 0) + 1
            continue
        for role, words in (
            ("telemetry", ("interlock.broker", "--plane")), ("broker", ("interlock.broker",)),
            ("host", ("interlock.agents",)), ("monitor", ("interlock.monitors",)),
            ("rules", ("interlock.coordinator", "rules")), ("coordinator", ("interlock.coordinator", "coordinator")),
        ):  # fmt: skip
            if all(word in line for word in words):
                found[role] = process.pid
                break
    return found


# --- one kill


@dataclass
class Result:
    case: Case
    outcome: str = ""
    why: str = ""
    killed: bool = False
    rollback_s: float | None = None  # from when it was due to the old revision's first answer
    errors: int = 0
    lost: int = 0
    answers: int = 0
    violations: list[str] = field(default_factory=list)


class Crash:
    """Carries out one case on a fleet that is calm."""

    def __init__(self, fleet: Any, fold: LogFold, case: Case, *, promise_s: float = PROMISE_S) -> None:
        self.fleet, self.fold, self.case, self.promise_s = fleet, fold, case, promise_s
        self.result = Result(case)
        self.since = len(fleet.events.events)
        self.killed_at = 0.0

    def run(self) -> Result:
        fleet, case = self.fleet, self.case
        fleet.trigger(case.agent, "")
        old = journal(fleet, case.agent)[0]
        to = "odd" if case.breach else ("r2" if old == "r1" else "r1")
        roles = processes(fleet)
        with (
            Askers(fleet.endpoint("calc")) as calc,
            Askers(fleet.endpoint("rep"), once=True) as rep,
        ):
            command = fleet.migrate(case.agent, to, "staged" if case.breach else "rapid")
            self._wait_for_the_moment(command)
            self._kill(roles, (calc, rep))
            done = command.done(90)
            self.result.outcome = OUTCOMES.get(done.code, f"exit code {done.code}: {done.err.strip()[-300:]}")
            if done.code not in OUTCOMES:
                self.result.violations.append(self.result.outcome)
            if self.result.outcome in ("rolled-back", "held"):
                self.result.why = f"{done.json['decided_by']}: {done.json['reason']}"
            if self.result.outcome == "held":  # as the old one is sick: an operator decides
                self._undo(done)
            self._judge_end(old, to, done)
            self._judge_rollback()
        self._judge_requests(calc, rep)
        self._judge_processes(roles)
        return self.result

    def _find(self, type: str, **wanted: Any) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.fleet.events.find(type, self.since, agent=self.case.agent, **wanted)
        return found

    def _wait_for_the_moment(self, command: Any) -> None:
        kind, _, name = self.case.moment.partition(" ")

        def come() -> bool:
            if command.process.poll() is not None:
                return True  # it was over before: then there is nothing to kill in it
            if kind == "stage":
                return self._find("stage-entered", stage=name) is not None
            if kind == "done":
                return self._find("step-done", step=name) is not None
            return self._find("migration-started") is not None

        wait(come, 60, every=0.002)
        if kind == "random":
            time.sleep(self.case.delay_s)
            if self.case.role == "candidate":
                wait(lambda: command.process.poll() is not None or self._pid("candidate") is not None, 60, every=0.002)

    def _pid(self, role: str) -> int | None:
        """Of the instance that is the candidate, or the permanent one."""
        alive: dict[str, tuple[str, int]] = {}
        for event in list(self.fleet.events.events):
            body = event.get("body", {})
            if body.get("agent") != self.case.agent:
                continue
            if body["type"] == "instance-started":
                alive[body["instance"]] = (body["role"], body["pid"])
            elif body["type"] == "instance-stopped":
                alive.pop(body["instance"], None)
            elif body["type"] == "step-done" and body["step"] == "commit":
                alive = {name: ("permanent", pid) for name, (was, pid) in alive.items() if was == "candidate"}
        pids = [pid for was, pid in alive.values() if was == role and psutil.pid_exists(pid)]
        return pids[-1] if pids else None

    def _kill(self, roles: dict[str, int], askers: tuple[Askers, Askers]) -> None:
        role = self.case.role
        if role in ("candidate", "permanent"):
            pid = self._pid(role)
            if pid is None and role == "candidate":
                pid = self._pid("permanent")  # it was committed in this moment
        else:
            pid = roles[role]
        self.killed_at = time.time()
        if role == "host":
            for asker in askers:
                asker.killed_at = self.killed_at
        if self.case.breach:
            self.fleet.trigger(self.case.agent, "bad")
        if pid is not None:
            try:
                os.kill(pid, signal.SIGKILL)
                self.result.killed = True
            except ProcessLookupError:
                pass

    # --- judging

    def _undo(self, done: Any) -> None:
        if self.case.role != "permanent":
            self.result.violations.append(f"held, though the old revision was well: {done.json['reason']}")
        undone = self.fleet.cli("rollback", self.case.agent, "--json", timeout=90)
        if undone.code != 0:
            self.result.violations.append(f"held, and not rolled back: {undone}")

    def _judge_end(self, old: str, to: str, done: Any) -> None:
        agent, result = self.case.agent, self.result
        if (
            done.code in (0, 10)
            and (ended := wait(lambda: self._find("migration-ended"), SETTLE_S)) is not None
            and ended["outcome"] != result.outcome
        ):
            result.violations.append(f"the operator was told {result.outcome}, the log says {ended['outcome']}")
        self.fleet.trigger(agent, "")
        serving = {"committed": to}.get(result.outcome, old)
        said: dict[str, Any] = {}

        def agree() -> bool:
            said["journal"] = journal(self.fleet, agent)
            folded = self.fold.read().agents[agent]
            said["log"] = (folded.permanent, folded.state, folded.candidate)
            return said["journal"] == said["log"] == (serving, "serving", None)

        if not wait(agree, SETTLE_S, every=LOOK_S):
            result.violations.append(f"after {result.outcome} {serving} should serve: {said}")
        status = self.fleet.cli("status", "--json", timeout=60)
        shown = status.json["agents"][agent] if status.code == 0 else {}
        if (shown.get("permanent"), shown.get("state")) != (serving, "serving"):
            result.violations.append(f"status shows {shown or status}, not {serving}")
        answers = burst(self.fleet.endpoint(agent))
        if set(answers) != {serving}:
            result.violations.append(f"{dict(answers)} answered, not {serving} alone")

    def _judge_rollback(self) -> None:
        rolled = self._find("rolled-back")
        if self.case.breach and rolled is None:
            self.result.violations.append("a breach was not rolled back")
        if rolled is None:
            return
        due = rolled["breach"].get("sample_time") or rolled["received"]
        if self.result.outcome != "held" and (self.case.breach or self.case.role in ("host", "candidate")):
            due = min(due, self.killed_at)
        took = rolled["restored"] - due
        self.result.rollback_s = round(took, 3)
        if took > self.promise_s:
            self.result.violations.append(f"the rollback took {took:.2f} s: {rolled['breach']}")

    def _judge_requests(self, *askers: Askers) -> None:
        result = self.result
        for asker in askers:
            result.violations += asker.wrong[:3]
            result.errors += asker.errors
            result.lost += asker.lost
            result.answers += asker.answers.total()
            dies = self.case.role in ("host", "candidate", "permanent")
            if asker.errors > (asker.count if dies else 0) or asker.lost > asker.count:
                result.violations.append(f"{asker.endpoint}: {asker.errors} errors, {asker.lost} lost")

    def _judge_processes(self, before: dict[str, int]) -> None:
        now: dict[str, int] = {}

        def whole() -> bool:
            now.clear()
            now.update(processes(self.fleet))
            return set(now) == set(before) and all(now[name] == 1 for name in now if name.startswith("agent "))

        if not wait(whole, SETTLE_S, every=LOOK_S):
            self.result.violations.append(f"processes: {now}, before: {before}")


def wait(found: Callable[[], Any], timeout: float, *, every: float = 0.02) -> Any:
    """The first true value of `found`, or its last one."""
    deadline = time.monotonic() + timeout
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(every)
    return value
