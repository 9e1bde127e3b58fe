"""Time to roll back while the old process is warm, from the breaching sample to the old revision answering.

A real fleet (`interlock up`), clients that ask all the time, and a candidate that is live. The benchmark publishes the
sample that breaches a rule, as a monitor would, so that the sampling period is not in the figures: they are our time
(bus, rule, host, route). Beside it, from the same run: what a restart of the old revision would take (the time from
starting the same program to its first healthy answer), which is what people do without a warm old process.

    python tests/benchmarks/bench_rollback.py [ROLLBACKS]
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio

from interlock.broker import commands, facts, topics
from interlock.broker.client import Bus, open_bus
from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.samples import labels
from interlock.broker.security import load_operator, load_security
from interlock.broker.sockets import open_sockets
from interlock.coordinator.demo.fleet import free_ports

ROLLBACKS = 50
CLIENTS, PERIOD_S = 4, 0.005

FLEET = """
name = "bench"
state = "state"
broker = {{ events = "tcp://127.0.0.1:{0}", feed = "tcp://127.0.0.1:{1}", \
telemetry_in = "tcp://127.0.0.1:{2}", telemetry_out = "tcp://127.0.0.1:{3}" }}
rules = {{ files = ["rules.yaml"] }}
monitor = {{ gpu = "none" }}
hosts.alpha = {{ control = "tcp://127.0.0.1:{4}", monitor = false }}

[strategies.rapid]
baseline_s = 0.1
observation_s = 600.0

[agents.echo]
host = "alpha"
endpoint = "tcp://127.0.0.1:{5}"
serve = "r1"
level = "low"
compare = {{ ignore = ["revision"] }}
revisions.r1 = {{ source = "echo", entry = "echo:Echo" }}
revisions.r2 = {{ source = "echo", entry = "echo:Echo", config = {{ new = true }} }}
"""

RULES = """
groups:
  - name: bench
    rules:
      - alert: bench-breach
        expr: bench_badness > 0.5
        x_action: rollback
"""

AGENT = """
from interlock.agents.agent import Agent, handler


class Echo(Agent):
    @handler("ask", idempotent=True)
    async def ask(self, number: int) -> dict:
        return {"number": number, "revision": self.revision}
"""


async def clients(endpoint: str, seen: dict[str, int]) -> None:
    """Plain REQ sockets that ask all the time and count wrong or missing answers."""
    async with open_sockets() as sockets, trio.open_nursery() as nursery:

        async def ask() -> None:
            socket = sockets.open("req", connect=endpoint)
            while True:
                seen["requests"] += 1
                await socket.send([json.dumps({"action": "ask", "number": seen["requests"]}).encode()])
                answer = json.loads((await socket.receive())[0])
                seen["failed"] += answer.get("status") != "ok"
                await trio.sleep(PERIOD_S)

        for _ in range(CLIENTS):
            nursery.start_soon(ask)


async def one_rollback(bus: Bus, number: int, publisher: Any) -> tuple[facts.RolledBack, commands.RollBack, float]:
    """Move to r2, breach the rule as soon as r2 serves, and wait until it is rolled back."""
    async with bus.events(["fact/", "rollback/"]) as feed:
        body = commands.Migrate(agent="echo", to="r2", deadline=time.time() + 10)
        await bus.publish(topics.COORDINATOR, body, id=f"bench-{number}")
        start_s, asked = 0.0, None
        async for event in feed:
            match event.body:
                case facts.StepDone(step="start-candidate", evidence=evidence):
                    start_s = float(evidence["start_s"])
                case facts.StepDone(step="cut-over"):
                    send(publisher, 1.0)
                case commands.RollBack():
                    asked = event.body
                case facts.RolledBack():
                    done = event.body
                case facts.MigrationEnded():
                    assert asked is not None
                    assert event.body.decided_by == "rule bench-breach", event.body
                    return done, asked, start_s
                case facts.MigrationRefused():
                    raise SystemExit(f"refused: {event.body.reason}")
    raise SystemExit("the feed ended")


def send(publisher: Any, value: float) -> None:
    publisher.send({labels("bench_badness", host="alpha", agent="echo"): value}, time=time.time())


async def calm(bus: Bus, publisher: Any) -> None:
    """End the breach, and wait until the rule engine says so."""
    async with bus.events(["fact/alert/"]) as feed:
        send(publisher, 0.0)
        async for event in feed:
            if isinstance(event.body, facts.AlertResolved):
                return


async def run(fleet: FleetConfig, rollbacks: int) -> dict[str, Any]:
    seen = {"requests": 0, "failed": 0}
    found = []
    async with (
        open_bus(fleet.broker, "cli/bench", security=load_operator(fleet)) as bus,
        open_bus(fleet.broker, "monitor/alpha", security=load_security(fleet, "monitor/alpha")) as monitor,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(clients, fleet.agents["echo"].endpoint, seen)
        publisher = monitor.telemetry("alpha", "monitor")
        send(publisher, 0.0)
        for number in range(rollbacks):
            found.append(await one_rollback(bus, number, publisher))
            await calm(bus, publisher)
        nursery.cancel_scope.cancel()
    cold = statistics.median(start_s for _, _, start_s in found) * 1000
    restored = [(done.restored - (done.breach.sample_time or 0)) * 1000 for done, _, _ in found]
    return {
        "benchmark": "rollback, old process warm",
        "rollbacks": len(found),
        "levels": sorted({done.level for done, _, _ in found}),
        "breach_to_decision_ms": spread((a.issued - (a.breach.sample_time or 0)) * 1000 for _, a, _ in found),
        "decision_to_routed_ms": spread((done.routed - asked.issued) * 1000 for done, asked, _ in found),
        "breach_to_routed_ms": spread((d.routed - (d.breach.sample_time or 0)) * 1000 for d, _, _ in found),
        "breach_to_restored_ms": spread(restored),
        "cold_restart_ms": cold,
        "cold_restart_to_warm_rollback_ratio": round(cold / statistics.median(restored), 1),
        "sampling_period_ms_of_a_monitor": fleet.monitor.migrating_s * 1000,
        "client_requests": seen["requests"],
        "client_failures": seen["failed"],
    }


def spread(values: Any) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2),
        "max": round(ordered[-1], 2),
    }


def main() -> None:
    rollbacks = int(sys.argv[1]) if len(sys.argv) > 1 else ROLLBACKS
    with tempfile.TemporaryDirectory(prefix="interlock-bench-") as name:
        folder = Path(name)
        (folder / "echo").mkdir()
        (folder / "echo" / "echo.py").write_text(AGENT)
        (folder / "rules.yaml").write_text(RULES)
        (folder / "fleet.toml").write_text(FLEET.format(*free_ports(6)))
        fleet = load_fleet(folder / "fleet.toml")
        ready = folder / "ready"
        argv = [sys.executable, "-m", "interlock.coordinator", "up", fleet.path, "--ready-file", str(ready)]
        with open(folder / "log", "wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as up:
            try:
                while not ready.exists():
                    if up.poll() is not None:
                        raise SystemExit((folder / "log").read_text())
                    time.sleep(0.05)
                issue = [sys.executable, "-m", "interlock.coordinator", "keys", "issue", "monitor", "alpha"]
                subprocess.run([*issue, "--fleet", fleet.path], check=True, stdout=subprocess.DEVNULL)
                print(json.dumps(trio.run(run, fleet, rollbacks), indent=2))
            finally:
                up.terminate()
                up.wait(30)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # its folder goes, and its fleet
    code = 0
    try:
        main()
    except* KeyboardInterrupt:
        code = 130
    sys.exit(code)
