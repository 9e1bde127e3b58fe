"""One instance of a revision, from its start to its end: the process, its endpoints, its health.

Both kinds look the same from outside: a class on our base class is asked over its control socket, any other program by
its probe. The owner hears `Healthy` once, then `Gone` at most once.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import msgspec
import trio

from interlock.agents import process as processes
from interlock.agents.agent import RequestError
from interlock.agents.compare import covers
from interlock.agents.contract import decode_map
from interlock.agents.figures import InstanceView
from interlock.agents.instance import HandlerContract, Health, InstanceControl, contract_gaps
from interlock.agents.preflight import environment, fill_command, free_ports, placeholders
from interlock.agents.probes import probe
from interlock.agents.revisions import Revision
from interlock.agents.serving import Spec
from interlock.agents.slot_io import Gone, Healthy, Start
from interlock.agents.state_ports import CommandPort, ControlPort, StatePort
from interlock.agents.token_file import TokenFile
from interlock.broker.config import AgentConfig, RevisionConfig
from interlock.broker.errors import InterlockError
from interlock.broker.sockets import Sockets

log = logging.getLogger(__name__)

START_POLL_S = 0.05  # between questions to an instance that is not healthy yet
TRIAL_HEALTH_S = 0.25  # between health checks of a candidate, however seldom the permanent revision is asked
HEALTH_TIMEOUT_S = 1.0  # of a class agent: with three failures, a frozen candidate is out of the way in 4 s
METRICS_TIMEOUT_S = 1.0
TAIL_LINES = 6  # of its log, in the reason why it did not start
MANY = 64  # requests outstanding at a class agent or an HTTP server: it handles them at once
ONE = 1  # a REP socket takes one at a time, and so only one is at risk when the program dies


Report = Callable[[Healthy | Gone], None]


@dataclass
class Place:
    """Where instances of a host run."""

    sockets: Sockets
    marker: str  # of the host
    run_dir: Path  # short: sockets are in there
    log_dir: Path
    data_dir: Path  # a folder of each agent in it, the same for all its revisions: their own folders are read-only
    base: Path  # of the fleet file: relative interpreters start here
    environment: dict[str, str]  # added to that of every instance


@dataclass
class Instance:
    """A running instance and what is known of it."""

    name: str
    agent: str
    config: AgentConfig
    recorded: Revision
    place: Place
    view: InstanceView
    requests: str = ""  # the endpoint that the gateway connects to
    health_endpoint: str = ""
    process: processes.Process | None = None
    control: InstanceControl | None = None
    handlers: dict[str, HandlerContract] = field(default_factory=dict)
    state_port: StatePort | None = None  # where it keeps state in memory that can be handed over
    token: TokenFile | None = None  # of a program without an endpoint
    stopping: bool = False
    on_reach: Callable[[bool], None] = lambda reachable: None  # called when the way to it is cut, or open again
    here: ClassVar[bool] = True  # it runs on this host
    start_s: float | None = None  # seconds from its start until it was healthy
    _files: list[Path] = field(default_factory=list)  # in the folder of the sockets

    @property
    def revision(self) -> RevisionConfig:
        return self.recorded.config

    @property
    def window(self) -> int:
        at_once = self.revision.kind == "class" or self.config.endpoint.startswith("http")
        return self.config.window or (MANY if at_once else ONE)

    def idempotent(self, body: bytes) -> bool:
        """May this request be asked twice? A class says so by handler, a program in the fleet file.

        Of an HTTP agent `body` is the request line, "METHOD /path?query".
        """
        if self.revision.kind == "exec" and isinstance(self.config.idempotent, bool):
            return self.config.idempotent
        if self.revision.kind == "exec":
            names = self.config.idempotent
            return isinstance(names, list) and self._listed(body, names)
        action = self._action(body)
        contract = self.handlers.get(action)
        return action == "health" or (contract is not None and contract.idempotent)

    def mirrorable(self, body: bytes) -> bool:
        """May this request be given to a candidate too, only to compare its answer?"""
        if self.config.side_effects and self._listed(body, self.config.side_effects):
            return False
        if self.config.endpoint.startswith("http"):
            return True  # by its method, or by what is declared idempotent: the gateway knows
        contract = self.handlers.get(self._action(body)) if self.revision.kind == "class" else None
        return self.idempotent(body) and not (contract is not None and contract.side_effects)

    def _action(self, body: bytes) -> str:
        try:
            action = decode_map(body).get("action" if self.revision.kind == "class" else self.config.action_field)
        except RequestError:
            return ""
        return action if isinstance(action, str) else ""

    def _listed(self, body: bytes, names: list[str]) -> bool:
        if not self.config.endpoint.startswith("http"):
            return self._action(body) in names
        line = body.decode("latin-1").partition("?")[0]
        return any(covers(name, line) for name in names)

    @property
    def reachable(self) -> bool:
        """Whether requests get to it now."""
        return True

    # --- life

    async def start(self, nursery: trio.Nursery, number: int) -> None:
        """Start the process; `nursery` owns it. InterlockError if it can't be started."""
        log_path = self.place.log_dir / f"{self.agent}.{self.view.revision}.log"
        argv, env = await self._command(number)
        self.process = await processes.start(
            nursery,
            argv,
            cwd=self.recorded.folder,
            env=env,
            log_path=log_path,
            marker=f"{self.place.marker}:{self.name}",
        )
        if self.revision.kind == "class":
            self.control = InstanceControl(self.place.sockets, self.health_endpoint)

    async def _command(self, number: int) -> tuple[list[str], dict[str, str]]:
        where = f"{self.agent} {self.recorded.name}"
        if self.revision.kind == "class":
            self.requests = f"ipc://{self.place.run_dir}/{number}.req"
            self.health_endpoint = f"ipc://{self.place.run_dir}/{number}.ctl"
            values = placeholders(self.recorded, base=self.place.base)
            spec = Spec(
                agent=self.agent, entry=self.revision.entry, source=str(self.recorded.folder),
                revision=self.recorded.name, instance=self.name, config=self.revision.config, requests=self.requests,
                control=self.health_endpoint, stop_timeout_s=self.revision.stop_timeout_s,
                standby=not self.config.endpoint, candidate=self.view.role == "candidate",
            )  # fmt: skip
            path = self.place.run_dir / f"{number}.json"
            self._files = [path, *(self.place.run_dir / f"{number}.{kind}" for kind in ("req", "ctl"))]
            await trio.to_thread.run_sync(path.write_bytes, msgspec.json.encode(spec))
            argv = [values["python"], "-m", "interlock.agents.run", "--spec", str(path)]
        else:
            port, health_port = await trio.to_thread.run_sync(free_ports, 2)
            scheme = "http" if self.config.endpoint.startswith("http") else "tcp"
            self.requests = f"{scheme}://127.0.0.1:{port}"
            self.health_endpoint = f"{scheme}://127.0.0.1:{health_port}"
            values = placeholders(self.recorded, base=self.place.base, port=port, health_port=health_port)
            argv = fill_command(self.revision.command, values, where=where)
        data = self.place.data_dir / self.agent
        await trio.to_thread.run_sync(partial(data.mkdir, parents=True, exist_ok=True))
        env = environment(self.revision.env, values, where=where) | self.place.environment
        env |= {"INTERLOCK_DATA": str(data)}
        if self.revision.state is not None:
            folder = self.recorded.folder
            self.state_port = CommandPort(self.revision.state, values, folder, env, self.place.marker, where)
        if not self.config.endpoint and self.revision.kind == "exec":
            self.token = await trio.to_thread.run_sync(TokenFile, self.place.run_dir / f"{number}.token")
            env |= {"INTERLOCK_TOKEN": str(self.token.path)}
        return argv, env

    async def check(self) -> Health:
        """One health check; of one that has ended too."""
        if self.control is not None:
            return await self.control.health(HEALTH_TIMEOUT_S)
        if self.revision.probe is None:
            return Health(False, "the instance is gone", 0.0)
        return await probe(
            self.revision.probe,
            request_endpoint=self.requests,
            health_endpoint=self.health_endpoint,
            sockets=self.place.sockets,
            cwd=self.recorded.folder,
        )

    async def watch(self, start: Start, needed: dict[str, HandlerContract], give: Report) -> None:
        """Report the instance's first health, and its end or sickness; returns after `Gone`, or when it is stopping."""
        assert self.process is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_process, give, nursery.cancel_scope)
            if not await self._become_healthy(start, needed, give):
                nursery.cancel_scope.cancel()
                return
            await self._stay_healthy(start, give)
            nursery.cancel_scope.cancel()

    async def _watch_process(self, give: Report, scope: trio.CancelScope) -> None:
        assert self.process is not None
        code = await self.process.exited()
        if not self.stopping:
            give(Gone(self.name, "process-died" if self.view.up else "start-failed", self._obituary(code), time.time()))
        self.view.up = False
        scope.cancel()

    async def _become_healthy(self, start: Start, needed: dict[str, HandlerContract], give: Report) -> bool:
        assert self.process is not None
        began = trio.current_time()
        detail = "no answer"
        with trio.move_on_after(self.revision.start_timeout_s):
            while True:
                health = await self.check()
                if health.ok:
                    break
                detail = health.detail or detail
                await trio.sleep(START_POLL_S)
            self.start_s = trio.current_time() - began
            evidence: dict[str, object] = {"start_s": self.start_s, "pid": self.process.pid}
            if self.control is not None:
                gaps = await self.learn_contract(needed)
                if gaps:
                    give(Gone(self.name, "contract", "; ".join(gaps), time.time()))
                    return False
                evidence["handlers"] = sorted(self.handlers)
            self.view.up = True
            give(Healthy(self.name, evidence, self.state_port is not None))
            return True
        reason = f"not healthy after {self.revision.start_timeout_s:g} s: {detail}"
        give(Gone(self.name, "start-failed", self._with_tail(reason), time.time()))
        return False

    async def learn_contract(self, needed: dict[str, HandlerContract]) -> list[str]:
        """What the instance handles; returns what it should and does not."""
        assert self.control is not None
        try:
            described = await self.control.describe()
        except InterlockError as error:
            return [f"it does not describe itself: {error}"]
        if (described.agent, described.revision, described.instance) != (self.agent, self.view.revision, self.name):
            return [f"it says that it is {described.agent} {described.revision} ({described.instance})"]
        self.handlers = described.handlers
        if described.state:
            self.state_port = ControlPort(self.control)
        return contract_gaps(needed, described.handlers)

    async def _stay_healthy(self, start: Start, give: Report) -> None:
        """Ask again and again, on trial more often. Returns when it failed too often in a row."""
        while True:
            period = self.config.health_period_s
            on_trial = self.view.role == "candidate"
            await trio.sleep(min(period, TRIAL_HEALTH_S) if on_trial else period)
            health = await self.check()
            if health.ok:
                self.view.failures = 0
                if self.control is not None:
                    await self._read_metrics()
                continue
            self.view.failures += 1
            if self.view.failures == 1:
                first_failure = time.time()
            if self.view.failures >= self.config.health_failures and not self.stopping:
                self.view.up = False
                reason = f"{self.view.failures} health checks failed in a row: {health.detail}"
                give(Gone(self.name, "health-failed", reason, first_failure))
                return

    async def _read_metrics(self) -> None:
        assert self.control is not None
        try:
            self.view.metrics = await self.control.metrics(METRICS_TIMEOUT_S)
        except InterlockError as error:
            log.info("%s: its metrics can't be read: %s", self.name, error)

    async def end(self) -> int | None:
        """Stop the process and close what leads to it; its exit code."""
        self.stopping = True
        self.view.up = False
        code = None
        if self.process is not None:
            code = await self.process.stop(self.revision.stop_timeout_s)
        self.close()
        return code

    def close(self) -> None:
        """What leads to it, the files of its sockets included: one that was killed has left them."""
        if self.control is not None:
            self.control.close()
            self.control = None
        if self.token is not None:
            self.token.close()
            self.token = None
        for file in self._files:
            file.unlink(missing_ok=True)

    # --- the token of an agent without an endpoint (see token_gateway.Holder)

    @property
    def limit_s(self) -> float:
        return self.revision.stop_timeout_s

    async def give(self) -> bool:
        """Asks until it says that it works, or that it can't: one that is slow to begin may begin all the same."""
        if self.token is not None:
            self.token.give()
            return True
        while self.control is not None and not self.stopping:
            try:
                said = await self.control.activate(self.limit_s)
            except InterlockError as error:
                log.info("%s has not said yet that it works: %s", self.name, error)
                continue
            if not said.ok:
                log.warning("%s can't work: %s", self.name, said.detail)
            return said.ok
        return False

    async def take(self) -> bool:
        if self.token is not None:
            await self.token.take()
            return True
        try:
            said = await self.control.deactivate(self.limit_s) if self.control is not None else Health(False, "gone")
        except InterlockError as error:
            said = Health(False, str(error))
        return said.ok

    async def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
        await self.gone()

    async def gone(self) -> None:
        if self.process is not None:
            await self.process.gone()

    # --- words

    def _obituary(self, code: int) -> str:
        if code < 0:
            name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
            return self._with_tail(f"the process was ended by {name}")
        return self._with_tail(f"the process exited with code {code}")

    def _with_tail(self, reason: str) -> str:
        tail = self.process.tail(TAIL_LINES).strip() if self.process is not None else ""
        return f"{reason}; its last words: {' | '.join(tail.splitlines())}" if tail else reason
