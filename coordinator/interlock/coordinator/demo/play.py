"""`interlock demo`: a small fleet on this machine, moved under live load; shown, measured and reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from interlock.broker import commands, topics
from interlock.broker.client import Bus, open_bus
from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.errors import ConfigError, Unreachable
from interlock.broker.role import EXIT_DONE, Ready, run_role
from interlock.broker.samples import NAME, SeriesReader
from interlock.broker.security import load_operator
from interlock.coordinator.demo.clients import Load, Seen, run_clients
from interlock.coordinator.demo.fleet import lay_out
from interlock.coordinator.demo.scenarios import SCENARIOS, Move, Result, Scenario
from interlock.coordinator.demo.scene import Scene, table
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.ownership import places

TUTOR_CLIENTS, TUTOR_RATE = 8, 200.0  # REQ sockets, and requests a second of all of them
WORDBOOK_CLIENTS, WORDBOOK_RATE = 4, 60.0
UP_S = 40.0  # for all roles and agents to be up
MOVE_S = 60.0  # for one move to end; it takes some 10 s
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
LOG_SHOWN = 4000  # characters of the roles' log, where the fleet did not come up
STOP_S = 20.0  # for `interlock up` to end after SIGTERM


def main(report: Path | None = None, keep: bool = False) -> int:
    """Play all scenarios; 0 if each ended as it should and no request was lost, 1 otherwise."""
    folder = Path(tempfile.mkdtemp(prefix="interlock-demo-"))
    os.environ.setdefault("INTERLOCK_LOG", "WARNING")
    outcome = INTERRUPTED

    async def play(ready: Ready) -> None:
        nonlocal outcome
        outcome = await _main(folder, report)

    try:
        code = run_role("demo", play)
        if code != EXIT_DONE and (folder / "up.log").exists():
            print((folder / "up.log").read_text("utf-8", "replace")[-LOG_SHOWN:], file=sys.stderr)
        return code or outcome
    finally:
        if keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


async def _main(folder: Path, report: Path | None) -> int:
    results: list[Result] = []
    fleet = load_fleet(lay_out(folder))
    with Scene() as scene:
        scene.say("starting a broker, a coordinator, a rule engine, a monitor and a host with two agents")
        async with _fleet_up(fleet, folder), open_bus(fleet.broker, "", security=load_operator(fleet)) as bus:
            await _Play(fleet, bus, scene, results).run(folder / "clients" / "ask.py")
    scene.console.print(table([result.entry for result in results]))
    scene.console.print(_explain(fleet))
    if report is not None:
        told = {"scenarios": [result.entry for result in results], "rollbacks": _rollbacks(results)}
        text = json.dumps({**told, "settings": _settings(fleet)}, indent=2)
        try:
            await trio.Path(report).write_text(text + "\n", "utf-8")
        except OSError as error:
            raise ConfigError(f"can't be written: {error.strerror}", where=f"--report {report}") from None
        scene.console.print(f"report: {report}")
    played = zip(results, SCENARIOS, strict=True)
    wrong = [scenario.name for result, scenario in played if not _as_expected(result.entry, scenario)]
    if wrong:
        scene.console.print(f"not as expected: {', '.join(wrong)}", style="bold red")
    return 1 if wrong else 0


def _as_expected(entry: dict[str, Any], scenario: Scenario) -> bool:
    return bool(entry["outcome"] == scenario.expected and entry["failed_requests"] == 0)


def _rollbacks(results: list[Result]) -> dict[str, Any]:
    """What else is known of those that were rolled back, by scenario."""
    return {result.entry["name"]: result.rollback for result in results if result.rollback}


def _settings(fleet: FleetConfig) -> dict[str, Any]:
    return {
        "sampling_period_ms": fleet.monitor.migrating_s * 1000,
        "clients": {"tutor": TUTOR_CLIENTS, "wordbook": WORDBOOK_CLIENTS},
        "requests_per_s": {"tutor": TUTOR_RATE, "wordbook": WORDBOOK_RATE},
        "client_period_ms": {
            "tutor": TUTOR_CLIENTS / TUTOR_RATE * 1000,
            "wordbook": WORDBOOK_CLIENTS / WORDBOOK_RATE * 1000,
        },
    }


def _explain(fleet: FleetConfig) -> str:
    return (
        "breach: the time of the first sample that showed it (sampled every "
        f"{fleet.monitor.migrating_s * 1000:.0f} ms); event: the decision to roll back; restored: the old revision's "
        "first answer after it. A client asks every "
        f"{TUTOR_CLIENTS / TUTOR_RATE * 1000:.0f} ms (wordbook: {WORDBOOK_CLIENTS / WORDBOOK_RATE * 1000:.0f} ms), "
        "which is the smallest gap it can see."
    )


@asynccontextmanager
async def _fleet_up(fleet: FleetConfig, folder: Path) -> AsyncIterator[None]:
    """`interlock up` in a process of its own, as a user would start it; stopped on leaving."""
    ready = folder / "ready"
    argv = [sys.executable, "-m", "interlock.coordinator", "up", fleet.path, "--ready-file", str(ready)]
    async with await trio.open_file(folder / "up.log", "wb") as output:
        process = await trio.lowlevel.open_process(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output.wrapped,
            stderr=output.wrapped,
            start_new_session=True,
            env={**os.environ, "INTERLOCK_LOG": "INFO"},
        )
    try:
        with trio.move_on_after(UP_S) as waited:
            while not ready.exists():
                if process.poll() is not None:
                    raise Unreachable("interlock up ended at once", where=fleet.path)
                await trio.sleep(0.05)
        if waited.cancelled_caught:
            raise Unreachable(f"the fleet was not up within {UP_S:g} s", where=fleet.path)
        yield
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            with trio.move_on_after(STOP_S):
                await process.wait()
            if process.poll() is None:
                process.kill()
                await process.wait()


class _Play:
    """One run of all scenarios against a fleet that is up."""

    def __init__(self, fleet: FleetConfig, bus: Bus, scene: Scene, results: list[Result]) -> None:
        self.fleet = fleet
        self.bus = bus
        self.scene = scene
        self.results = results
        self.seen = {"tutor": Seen(), "wordbook": Seen()}
        self.move: Move | None = None
        self.gpu = "-"
        self.changed = trio.Event()
        self.state = Fleet(places(fleet))

    async def run(self, script: Path) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._follow)
            nursery.start_soon(self._watch_gpu)
            for name, clients, rate in (
                ("tutor", TUTOR_CLIENTS, TUTOR_RATE),
                ("wordbook", WORDBOOK_CLIENTS, WORDBOOK_RATE),
            ):
                endpoint = self.fleet.agents[name].endpoint
                with trio.fail_after(UP_S):
                    await nursery.start(run_clients, script, Load(name, endpoint, clients, rate), self.seen[name])
            nursery.start_soon(self._draw)
            self.scene.say(f"{TUTOR_CLIENTS} clients ask the tutor, {WORDBOOK_CLIENTS} the wordbook")
            for scenario in SCENARIOS:
                self.results.append(await self._play(scenario))
            nursery.cancel_scope.cancel()

    async def _play(self, scenario: Scenario) -> Result:
        """Ask for the move as an operator would, and wait until it is over and the clients have reported."""
        await self._calm()
        self.scene.say(f"{scenario.name}: {scenario.story}", "bold")
        move = Move(scenario, began=time.time(), request=f"demo-{os.getpid()}-{scenario.name}")
        self.move = move
        body = commands.Migrate(agent=scenario.agent, to=scenario.to, deadline=time.time() + 10)
        await self.bus.publish(topics.COORDINATOR, body, id=move.request)
        with trio.fail_after(MOVE_S):
            while move.ended is None and not move.refused:
                await self.changed.wait()
        until = time.time()
        seen = self.seen[scenario.agent]
        with trio.fail_after(MOVE_S):
            while not any(answer.sent > until for answer in seen.recent):
                await seen.grown.wait()
        return move.result(seen, until)

    async def _calm(self) -> None:
        """Wait, as an operator would, until the alert that the last candidate set off is over."""
        with trio.fail_after(MOVE_S):
            while any(alert.action == "rollback" for alert in self.state.alerts.values()):
                await self.changed.wait()

    async def _follow(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with self.bus.events(["fact/", "rollback/"], after=0) as feed:
            task_status.started()
            async for event in feed:
                self.state.apply(event)
                if self.move is not None:
                    line = self.move.apply(event)
                    if line is not None:
                        bad = line.startswith(("ROLL BACK", "refused"))
                        self.scene.say("  " + line, "bold yellow" if bad else "")
                changed, self.changed = self.changed, trio.Event()
                changed.set()

    async def _watch_gpu(self) -> None:
        reader = SeriesReader()
        async with self.bus.samples([topics.telemetry("alpha", "monitor")]) as feed:
            async for batches in feed:
                for batch in batches:
                    for key, value in reader.read(batch)[0]:
                        if (NAME, "gpu_memory_used_ratio") in key:
                            self.gpu = f"{'#' * round(value * 40):40} {value:.0%}"

    async def _draw(self) -> None:
        while True:
            now = {}
            for name, seen in self.seen.items():
                waits = sorted(a.answered - a.sent for a in seen.recent)
                p95 = waits[int(len(waits) * 0.95)] * 1000 if waits else 0.0
                by = ", ".join(sorted({a.revision for a in seen.recent if a.revision}))
                wrong = sum(not a.right for a in seen.answers)
                now[name] = f"{len(seen.recent):4} requests/s, p95 {p95:6.1f} ms, {wrong} failed so far  {by}"
            now["GPU memory"] = self.gpu
            if self.move is not None:
                now["move"] = f"{self.move.scenario.name}: {self.move.stage}"
            self.scene.show([result.entry for result in self.results], now)
            await trio.sleep(0.125)
