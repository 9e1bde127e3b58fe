"""A whole fleet as a user runs it: `interlock up` in processes of its own, small agents, clients that check answers.

FLEET_EVENTS=FILE keeps the events of all fleets in FILE, and the roles' log of the last one in FILE.log.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fleet_parts import INTERLOCK, WAIT_S, Clients, Done, Running, Watcher, free_ports, until
from interlock.agents.process import host_marker

LOOK_S = 0.15  # between looks at all processes of the machine, each of which takes some 10 ms
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
EXTRA = {
    "calc": "",
    "keep": "",
    "rep": 'idempotent = ["double"]\n',
    "web": "window = 8\nhand_over_s = 30\nhold_s = 60\n",
}


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
        signs = ("Traceback", " CRITICAL ", "unawaited")
        found = [line for line in lines if any(sign in line for sign in signs)]
        return [line if len(line) < 4000 else f"{line[:1000]} ... {line[-3000:]}" for line in found]

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
        found = "\n".join(line for lines in defects.values() for line in lines)
        if found:
            pytest.fail(f"a role logged what nobody expected:\n{found}", pytrace=False)


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
