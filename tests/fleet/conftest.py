"""A whole fleet as a user runs it: `interlock up` in processes of its own, small agents, clients that check answers.

FLEET_EVENTS=FILE keeps the events of all fleets in FILE, and the roles' log of the last one in FILE.log.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import zmq

from interlock.agents.process import host_marker

INTERLOCK = str(Path(sysconfig.get_path("scripts")) / "interlock")
WAIT_S = 40.0  # for anything: the machine may be busy; what is waited for takes a second or two
ANSWER_S = 25.0  # for one answer: so long that what misses it hangs, however busy the machine is
PAUSE_S = 0.02  # between requests of one client
LOOK_S = 0.15  # between looks at all processes of the machine, each of which takes some 10 ms
PORTS = range(12_000, 32_000)  # below the range from which the system takes the ports of outgoing connections
TAG = "FLEET_UNDER_TEST"  # in the environment of all that a fleet starts, agents included

AGENTS = Path(__file__).parent / "agents"

RULES = """
    groups:
      - name: fleet
        rules:
          - alert: badness
            expr: agent_badness > 0.5
            x_action: rollback
            annotations:
              summary: "{{ $labels.agent }} {{ $labels.revision }} is bad: {{ $value }}"
"""

HEAD = """
    name = "test"
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
    canary = [{ share = 0.5, seconds = 0.2 }]
    observation_s = 0.5
    # a busy machine is slow at moments: speed is measured in the benchmarks
    observe = { latency_passed = 100.0, latency_failed = 100.0, slow_passed = 1.0, slow_failed = 1.0 }
    [strategies.staged]  # for what something is done to while it is observed
    baseline_s = 0.3
    shadow_requests = 10
    shadow_min_requests = 5
    canary = [{ share = 0.5, seconds = 0.2 }]
    observation_s = 100.0
    observe = { latency_passed = 100.0, latency_failed = 100.0, slow_passed = 1.0, slow_failed = 1.0 }
"""

T = TypeVar("T")

BUS = ("events", "feed", "telemetry_in", "telemetry_out")

KINDS: dict[str, Callable[[str, str], str]] = {
    "calc": lambda trigger, revision: (
        f'source = "calc"\nentry = "calc:Calc"\nconfig = {{ trigger = "{trigger}", number = "{revision}" }}'
    ),
    "keep": lambda trigger, revision: (
        f'source = "keep"\nentry = "keep:Keep"\nconfig = {{ trigger = "{trigger}", number = "{revision}" }}'
    ),
    "rep": lambda trigger, revision: (
        f'source = "rep"\ncommand = ["{{python}}", "rep.py", "{{port}}", "{trigger}", "{revision}"]\n'
        'probe = { kind = "zmq", port = "request", expect = { status = "ok" }, timeout_s = 0.5 }'
    ),
    "web": lambda trigger, revision: (
        f'source = "web"\ncommand = ["{{python}}", "web.py", "{{port}}", "{trigger}", "{revision}"]\n'
        'probe = { kind = "http", port = "request", expect = { ok = true }, timeout_s = 0.5 }'
    ),
}
EXTRA = {"calc": "", "keep": "", "rep": 'idempotent = ["double"]\n', "web": "window = 8\n"}


def until(found: Callable[[], T], what: str | Callable[[], str], timeout: float = WAIT_S, *, every: float = 0.02) -> T:
    """The first value of `found` that is true."""
    deadline = time.monotonic() + timeout
    while not (value := found()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(every)
    return value


def free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = random.choice(PORTS)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


# --- the command line


class Done:
    """A command that has ended."""

    def __init__(self, argv: Sequence[str], code: int, out: str, err: str) -> None:
        self.argv, self.code, self.out, self.err = argv, code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])

    def __repr__(self) -> str:
        return f"{' '.join(self.argv)} -> {self.code}\n{self.out}{self.err}"


class Running:
    """A command on its way."""

    def __init__(self, argv: Sequence[str], env: dict[str, str], cwd: Path) -> None:
        self.argv = argv
        self.process = subprocess.Popen(
            argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def done(self, timeout: float = WAIT_S) -> Done:
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"{' '.join(self.argv[1:])} did not end in {timeout:g} s:\n{out}{err}")
        return Done(self.argv[1:], self.process.returncode, out, err)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class Watcher:
    """`interlock watch --events --json --after 0`: every event of the fleet, also while the broker is restarted."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.events: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in iter(self._line, ""):
            self.events.append(json.loads(line))
            if os.environ.get("FLEET_EVENTS"):
                with open(os.environ["FLEET_EVENTS"], "a") as file:
                    file.write(line)

    def _line(self) -> str:
        assert self.running.process.stdout is not None
        try:
            line = self.running.process.stdout.readline()
        except ValueError:  # closed
            return ""
        return line if line.endswith("\n") else ""

    def find(self, type: str, since: int = 0, **wanted: Any) -> dict[str, Any] | None:
        """The first event of a type from the `since`-th on whose body has these values."""
        for event in self.events[since:]:
            body: dict[str, Any] = event.get("body", {})
            if body.get("type") == type and all(body.get(name) == value for name, value in wanted.items()):
                return body
        return None

    def wait(self, type: str, since: int = 0, **wanted: Any) -> dict[str, Any]:
        return until(lambda: self.find(type, since, **wanted), lambda: f"{type} {wanted}; last: {self.last()}")

    def last(self, count: int = 12) -> str:
        return "\n".join(str(event.get("body", event)) for event in self.events[-count:])


# --- clients


class Clients:
    """Threads that each ask one agent again and again, and check every answer."""

    def __init__(self, endpoint: str, count: int = 2, *, answer_s: float = ANSWER_S) -> None:
        self.endpoint = endpoint
        self.answer_s = answer_s
        self.revisions: Counter[str] = Counter()
        self.failures: list[str] = []
        self.last = ""
        self._stop = threading.Event()
        self._context = zmq.Context()
        ask = self._ask_http if endpoint.startswith("http") else self._ask_zmq
        self._threads = [threading.Thread(target=ask, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def asked(self) -> int:
        return self.revisions.total()

    def __enter__(self) -> Clients:
        self.more()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(self.answer_s + 5)
        self._context.destroy(linger=0)

    def more(self, count: int = 5) -> None:
        """Wait until so many more requests were answered."""
        goal = self.asked + count
        until(
            lambda: self.asked >= goal, lambda: f"{count} answers from {self.endpoint}; failures: {self.failures[-3:]}"
        )

    def served_by(self, revision: str) -> None:
        """Wait until this revision, and from then on no other, answers."""

        def only() -> bool:
            before = self.revisions.copy()
            goal = self.asked + 10
            until(lambda: self.asked >= goal, lambda: f"answers from {self.endpoint}")
            return set(self.revisions - before) == {revision}

        until(only, lambda: f"{revision} answers alone at {self.endpoint}, answers so far: {self.revisions}")

    def _check(self, n: int, answer: dict[str, Any]) -> None:
        if answer.get("n") != n or answer.get("answer") != 2 * n:
            self.failures.append(f"{n}: {answer}")
            time.sleep(0.1)  # errors may come fast
        else:
            self.last = answer["revision"]
            self.revisions[answer["revision"]] += 1

    def _ask_zmq(self) -> None:
        sock: zmq.Socket[bytes] | None = None
        n = 0
        while not self._stop.wait(PAUSE_S):
            if sock is None:
                sock = self._context.socket(zmq.REQ)
                sock.setsockopt(zmq.LINGER, 0)
                sock.setsockopt(zmq.RCVTIMEO, int(self.answer_s * 1000))
                sock.connect(self.endpoint)
            n += 1
            try:
                sock.send_json({"action": "double", "n": n})
                self._check(n, sock.recv_json())  # type: ignore[arg-type]
            except zmq.Again:
                self.failures.append(f"{n}: no answer within {self.answer_s:g} s")
                sock.close()
                sock = None
        if sock is not None:
            sock.close()

    def _ask_http(self) -> None:
        place = self.endpoint.removeprefix("http://")
        connection = http.client.HTTPConnection(place, timeout=self.answer_s)
        n = 0
        while not self._stop.wait(PAUSE_S):
            n += 1
            try:
                connection.request("GET", f"/double?n={n}")
                response = connection.getresponse()
                body = response.read()
                self._check(n, json.loads(body) if response.status == 200 else {"status": response.status})
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.failures.append(f"{n}: {error!r}")
                connection.close()
                time.sleep(0.1)
        connection.close()


# --- the fleet


class TestFleet:
    """A fleet file in a folder, and the processes that run from it.

    `agents`: name -> host. The first part of a name (`calc`, `rep`, `web`) says what it is. Revisions r1 and r2 are
    good, `odd` does what `trigger(agent, what)` tells it to.
    """

    __test__ = False

    def __init__(self, folder: Path, agents: dict[str, str], *, head: str = HEAD, more: str = "") -> None:
        self.folder = folder
        self.path = folder / "fleet.toml"
        self.tag = uuid.uuid4().hex
        self.env = {**os.environ, "INTERLOCK_LOG": "INFO", "INTERLOCK_FLEET": str(self.path)}
        self.hosts = sorted(set(agents.values()))
        others = [f"{name}@{host}" for name, home in agents.items() for host in self.hosts if host != home]
        names = [*BUS, *self.hosts, *agents, *(f"link-{host}" for host in self.hosts), *others]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        for name in KINDS:
            shutil.copytree(AGENTS / name, folder / name)
        (folder / "rules.yaml").write_text(textwrap.dedent(RULES))
        self.path.write_text(self._text(agents, head) + more)
        self.process: subprocess.Popen[bytes] | None = None
        self.watcher: Watcher | None = None
        self.commands: list[Running] = []
        self.parts: list[subprocess.Popen[bytes]] = []

    def _text(self, agents: dict[str, str], head: str) -> str:
        bus = "".join(f'{name} = "tcp://127.0.0.1:{self.ports[name]}"\n' for name in BUS)
        text = f"{textwrap.dedent(head)}[broker]\n{bus}"
        for host in self.hosts:
            text += f'[hosts.{host}]\ncontrol = "tcp://127.0.0.1:{self.ports[host]}"\n'
            text += f'link = "tcp://127.0.0.1:{self.ports[f"link-{host}"]}"\n'
        for name, host in agents.items():
            kind = name.partition("-")[0]
            text += (
                f'[agents.{name}]\nhost = "{host}"\nendpoint = "{self.endpoint(name)}"\nserve = "r1"\nlevel = "low"\n'
            )
            places = ", ".join(f'{there} = "{self.endpoint(name, there)}"' for there in self.hosts if there != host)
            text += f"endpoints = {{ {places} }}\n" if places else ""
            text += f'health_period_s = 0.3\ncompare = {{ ignore = ["revision"] }}\n{EXTRA[kind]}'
            for revision, trigger in (("r1", "-"), ("r2", "-"), ("odd", str(self.folder / f"{name}.trigger"))):
                text += (
                    f"[agents.{name}.revisions.{revision}]\nstop_timeout_s = 1.0\n{KINDS[kind](trigger, revision)}\n"
                )
        return text

    def endpoint(self, agent: str, host: str = "") -> str:
        """Of the agent's own host, or of the one that it may be moved to."""
        port = self.ports[f"{agent}@{host}" if host else agent]
        return f"{'http' if agent.startswith('web') else 'tcp'}://127.0.0.1:{port}"

    # --- running

    def start(self, *, wait: bool = True, watch: bool = True) -> None:
        ready = self.folder / "ready"
        ready.unlink(missing_ok=True)  # left by one that was killed
        with open(self.folder / "up.log", "ab") as log:
            self.process = subprocess.Popen(
                [INTERLOCK, "up", str(self.path), "--ready-file", str(ready)],
                env={**self.env, TAG: self.tag}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        if wait:
            process = self.process
            until(lambda: ready.exists() or process.poll() is not None, lambda: f"up\n{self.log}")
            assert process.poll() is None, self.log
        if watch:  # only now are there keys to watch with; the log has what was before
            self.watch()

    def watch(self) -> None:
        """See all events from the first on. There must be keys."""
        if self.watcher is None:
            self.watcher = Watcher(self.start_cli("watch", "--events", "--json", "--after", "0", "--timeout", "60"))

    @property
    def log(self) -> str:
        file = self.folder / "up.log"
        return file.read_text("utf-8", "replace")[-8000:] if file.exists() else ""

    def defects(self) -> list[str]:
        """What a role logged of an exception that nobody expected."""
        file = self.folder / "up.log"
        lines = file.read_text("utf-8", "replace").splitlines() if file.exists() else []
        return [line[:4000] for line in lines if "Traceback" in line or " CRITICAL " in line or "unawaited" in line]

    def part(self, *argv: str) -> subprocess.Popen[bytes]:
        """One role by itself, ready."""
        reading, writing = os.pipe()
        with open(self.folder / "up.log", "ab") as log:
            process = subprocess.Popen(
                [INTERLOCK, *argv], env={**self.env, TAG: self.tag, "INTERLOCK_READY_FD": str(writing)},
                pass_fds=[writing], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        os.close(writing)
        self.parts.append(process)
        with os.fdopen(reading) as said:
            assert said.readline() == "ready\n", self.log
        return process

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        """Leave nothing, whatever happened."""
        for command in self.commands:
            command.close()
        for process in [self.process, *self.parts]:
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        for left in self.left():
            left.kill()

    # --- looking

    @property
    def events(self) -> Watcher:
        assert self.watcher is not None
        return self.watcher

    def left(self) -> list[psutil.Process]:
        """Every process of this fleet's roles and agents; commands are not among them."""
        markers = [host_marker(self.folder / "state" / f"host-{host}") for host in self.hosts]
        found = []
        for process in psutil.process_iter():
            try:
                guard = [word for word in process.cmdline() if word in markers]
                mine = guard or process.environ().get(TAG) == self.tag
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def nothing_left(self, *, locks: bool = True) -> None:
        """No process or socket file of this fleet is there, no file of a lock either; or they go within seconds."""

        def left() -> list[str]:
            names = [f"{process.pid} {' '.join(_cmdline(process))}" for process in self.left()]
            state = self.folder / "state"
            files = [*state.glob("*/lock"), state / "up"] if locks else []
            return names + [str(path) for path in [*files, *self.run_folders()] if path.exists()]

        until(lambda: not left(), lambda: f"everything is gone; left: {left()}\n{self.log}", 20, every=LOOK_S)

    def run_folders(self) -> list[Path]:
        """Where the hosts keep the sockets of their instances."""
        from interlock.agents.host import run_folder

        return [run_folder(self.folder / "state" / f"host-{host}").path for host in self.hosts]

    def role(self, *words: str) -> psutil.Process:
        """The process of a role: `role("coordinator", "rules")`, `role("agents", "alpha")`."""

        def find() -> psutil.Process | None:
            for process in self.left():
                line = _cmdline(process)
                if f"interlock.{words[0]}" in line and all(word in line for word in words[1:]):
                    return process
            return None

        return until(find, lambda: f"role {words}\n{self.log}", every=LOOK_S)

    def instances(self, agent: str) -> dict[str, int]:
        """Instance -> pid of the agent's own processes."""
        found = {}
        for process in self.left():
            try:
                name = process.environ().get("INTERLOCK_INSTANCE", "").partition(":")[2]
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if name.startswith(f"{agent}-"):
                found[name] = process.pid
        return found

    def alone(self, agent: str, revision: str) -> int:
        """Wait until the agent has exactly one instance, of this revision; its pid."""

        def only() -> list[int]:
            found = self.instances(agent)
            return list(found.values()) if [name.split("-")[-2] for name in found] == [revision] else []

        return until(only, lambda: f"one instance of {agent} {revision} alone: {self.instances(agent)}", every=LOOK_S)[
            0
        ]

    # --- doing

    def start_cli(self, *argv: str) -> Running:
        self.commands.append(Running([INTERLOCK, *argv], self.env, self.folder))
        return self.commands[-1]

    def cli(self, *argv: str, timeout: float = WAIT_S) -> Done:
        return self.start_cli(*argv).done(timeout)

    def migrate(self, agent: str, to: str, strategy: str = "rapid", *more: str) -> Running:
        return self.start_cli("migrate", agent, "--to", to, "--strategy", strategy, "--json", *more)

    def other(self, agent: str) -> str:
        """The good revision that does not serve now."""
        return {"r1": "r2", "r2": "r1"}[self.serving(agent)]

    def serving(self, agent: str) -> str:
        """The revision that a client is answered by."""
        with Clients(self.endpoint(agent), 1) as client:
            assert not client.failures
            return client.last

    def trigger(self, agent: str, what: str) -> None:
        """What revision `odd` of this agent does from now on; "" to behave."""
        aside = self.folder / f"{agent}.aside"
        aside.write_text(what)
        aside.rename(self.folder / f"{agent}.trigger")

    def observed(self, agent: str, since: int) -> str:
        """Wait until the migration that began after `since` has moved all requests; its id."""
        started = self.events.wait("migration-started", since, agent=agent)
        self.events.wait("stage-entered", since, agent=agent, stage="observation")
        self.events.wait("slot-changed", since, agent=agent, share=1.0)
        return str(started["migration"])

    def calm(self) -> None:
        """Wait until no rule fires and no migration is in flight."""
        until(self._is_calm, lambda: f"calm\n{self.events.last()}")

    def _is_calm(self) -> bool:
        firing: set[str] = set()
        flying: set[str] = set()
        for event in list(self.events.events):
            body = event["body"]
            labels = str(sorted(body.get("labels", {}).items()))
            match body["type"]:
                case "alert-firing":
                    firing.add(labels)
                case "alert-resolved":
                    firing.discard(labels)
                case "migration-started":
                    flying.add(body["migration"])
                case "migration-ended":
                    flying.discard(body["migration"])
        return not firing and not flying


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


MakeFleet = Callable[..., TestFleet]


def _maker() -> Iterator[MakeFleet]:
    made: list[TestFleet] = []

    def make(agents: dict[str, str], **options: Any) -> TestFleet:
        made.append(TestFleet(Path(tempfile.mkdtemp(prefix="il-fleet-")), agents, **options))
        return made[-1]

    try:
        yield make
    finally:
        defects = {}
        for fleet in made:
            fleet.close()
            defects[fleet.folder] = fleet.defects()
            if os.environ.get("FLEET_EVENTS") and (fleet.folder / "up.log").exists():
                shutil.copy(fleet.folder / "up.log", os.environ["FLEET_EVENTS"] + ".log")
            shutil.rmtree(fleet.folder, ignore_errors=True)
        assert not any(defects.values()), defects


@pytest.fixture
def make_fleet() -> Iterator[MakeFleet]:
    """`make_fleet({"calc": "alpha"})`: a fleet that is not started yet; nothing of it is left after the test."""
    yield from _maker()


@pytest.fixture(scope="module")
def make_module_fleet() -> Iterator[MakeFleet]:
    """The same for all tests of a module."""
    yield from _maker()


@pytest.fixture(scope="session")
def ports() -> Callable[[int], list[int]]:
    """So many ports that are free."""
    return free_ports


@pytest.fixture
def clients() -> type[Clients]:
    return Clients


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    return until


@pytest.fixture(scope="session")
def own_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment of its own, which finds our packages by a .pth file only."""
    import interlock.agents
    import interlock.broker

    home = tmp_path_factory.mktemp("own") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True, timeout=60)
    [site] = home.glob("lib/python*/site-packages")
    packages = [interlock.agents.__file__, interlock.broker.__file__]
    lines = {str(Path(file).parents[2]) for file in packages if file} | {sysconfig.get_path("purelib")}
    (site / "ours.pth").write_text("\n".join(sorted(lines)) + "\n")
    return home / "bin" / "python"
