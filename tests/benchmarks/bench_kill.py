"""SIGKILL to the broker, a publisher and a subscriber at random moments under load: what was lost, doubled, reordered.

    python tests/benchmarks/bench_kill.py --kills 200 --seed 1

One publisher posts through an outbox on disk, and notes what the bus had taken; another one publishes and notes what
was acknowledged; one subscriber applies each event to a file and goes on behind it after a restart; one lives through
all of it. One kill in five meets a broker that is still starting. At the end the log's chain is verified and everything
noted is compared with it. Prints one JSON object; exits 1 unless nothing was lost, doubled or out of order.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from interlock.broker import client, topics
from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.errors import Refused, Unreachable
from interlock.broker.facts import HostDown
from interlock.broker.log import EventLog

POSTED, PUBLISHED, END = topics.host_fact("posted"), topics.host_fact("published"), topics.host_fact("end")
ENDPOINTS = ("events", "feed", "telemetry_in", "telemetry_out")
PAUSE_S = 0.002  # between posts: some hundred events a second, so that a kill always meets some under way
STARTED_S = (0.05, 0.6)  # from readiness to the kill
STARTING_S = (0.0, 0.6)  # from the start to a kill that does not wait for readiness
EARLY = 0.2  # of the kills of the broker


def note(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def lines(path: Path) -> list[str]:
    """The whole lines of a file whose writer may have been killed in the middle of one."""
    content = path.read_text() if path.exists() else ""
    return content.split("\n")[:-1]


# --- the processes that are killed


async def publisher(folder: Path, broker: Path) -> None:
    taken = folder / "taken"
    first = int(lines(taken)[-1]) + 1 if lines(taken) else 0
    cut_to_whole_lines(taken)
    async with client.open_bus(load_fleet(broker).broker, "host/posted", outbox=folder / "outbox") as bus:
        print("ready", flush=True)
        number = first
        while not (folder / "stop").exists():
            bus.post(POSTED, HostDown(host=str(number)), id=f"posted-{number}")
            await bus.taken()
            note(taken, f"{number}\n")
            number += 1
            await trio.sleep(PAUSE_S)
        await bus.flushed()


async def subscriber(folder: Path, broker: Path) -> None:
    applied = folder / "applied"
    cut_to_whole_lines(applied)
    known = lines(applied)
    after = int(known[-1].split()[0]) if known else 0
    async with client.open_bus(load_fleet(broker).broker, "host/subscriber") as bus:
        print("ready", flush=True)
        async with bus.events([topics.FACTS], after=after) as feed:
            async for event in feed:
                note(applied, f"{event.header.seq} {event.header.id}\n")
                if event.topic == END:
                    return


def cut_to_whole_lines(path: Path) -> None:
    if path.exists():
        with open(path, "r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


# --- who kills


class Part:
    """One process that is started again whenever it was killed."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self.process: subprocess.Popen[bytes] | None = None
        self.kills = 0

    def start(self) -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=writing,
            pass_fds=[writing],
            env={**os.environ, "INTERLOCK_READY_FD": str(writing), "INTERLOCK_LOG": "CRITICAL"},
        )
        os.close(writing)
        self._said = reading

    async def ready(self) -> None:
        async with trio.lowlevel.FdStream(os.dup(self._said)) as said:
            assert await said.receive_some(), f"{self._command} ended before it was ready"

    async def ended(self) -> int:
        assert self.process is not None
        code = await trio.to_thread.run_sync(self.process.wait)
        os.close(self._said)
        return code

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.ended()
        self.kills += 1


async def keep_killing(part: Part, kills: int, early: float, chance: random.Random, tell: Callable[[], None]) -> None:
    while part.kills < kills:
        part.start()
        if chance.random() < early:
            await trio.sleep(chance.uniform(*STARTING_S))
        else:
            await part.ready()
            await trio.sleep(chance.uniform(*STARTED_S))
        await part.kill()
        tell()
    part.start()
    await part.ready()


async def bench(kills: int, seed: int, folder: Path) -> dict[str, object]:  # noqa: PLR0915  (one run, told in order)
    broker_file = folder / "fleet.toml"
    endpoints = "".join(f'{name} = "ipc://{folder}/{name}"\n' for name in ENDPOINTS)
    open_to_all = 'security = { mode = "insecure" }\n' if "security" in FleetConfig.__struct_fields__ else ""
    broker_file.write_text(f'state = "{folder}/state"\n{open_to_all}[broker]\n{endpoints}')
    this = [sys.executable, __file__, "--folder", str(folder)]
    broker = Part([sys.executable, "-m", "interlock.broker", "--fleet", str(broker_file)])
    posting, applying = Part([*this, "--part", "publisher"]), Part([*this, "--part", "subscriber"])
    chance = random.Random(seed)
    acked: list[tuple[int, str]] = []
    seen: list[tuple[int, str]] = []
    began = time.monotonic()

    def tell() -> None:
        if broker.kills % 20 == 0:
            print(f"{broker.kills} of {kills} kills, {len(acked)} acknowledged", file=sys.stderr)

    async with client.open_bus(load_fleet(broker_file).broker, "host/published") as bus, trio.open_nursery() as nursery:

        async def publish() -> None:
            number = 0
            while True:
                number += 1
                try:
                    seq = await bus.publish(PUBLISHED, HostDown(host=str(number)), id=f"published-{number}", timeout=1)
                except (Unreachable, Refused):
                    continue  # whether it is in the log is open
                acked.append((seq, f"published-{number}"))

        async def watch(ended: trio.Event) -> None:
            async with bus.events([topics.FACTS], after=0) as feed:
                async for event in feed:
                    seen.append((event.header.seq, event.header.id))
                    if event.topic == END:
                        ended.set()

        ended = trio.Event()
        nursery.start_soon(watch, ended)
        async with trio.open_nursery() as killers:
            publishing = trio.CancelScope()

            async def publish_until_stopped() -> None:
                with publishing:
                    await publish()

            nursery.start_soon(publish_until_stopped)
            killers.start_soon(keep_killing, broker, kills, EARLY, chance, tell)
            killers.start_soon(keep_killing, posting, max(1, kills // 4), 0.0, chance, tell)
            killers.start_soon(keep_killing, applying, max(1, kills // 4), 0.0, chance, tell)
        killing_s = time.monotonic() - began
        publishing.cancel()
        (folder / "stop").touch()
        with trio.fail_after(120):
            assert await posting.ended() == 0
            await bus.publish(END, HostDown(host="end"), timeout=30)
            assert await applying.ended() == 0
            await ended.wait()
        nursery.cancel_scope.cancel()
    assert broker.process is not None
    broker.process.terminate()
    await broker.ended()
    figures = {
        name: part.kills for name, part in (("broker", broker), ("publisher", posting), ("subscriber", applying))
    }
    return {"bench": "kill", "seed": seed, "kills": figures, "seconds": round(killing_s, 1)} | compare(
        folder, acked, seen
    )


def compare(folder: Path, acked: list[tuple[int, str]], seen: list[tuple[int, str]]) -> dict[str, object]:
    log = EventLog(folder / "state" / "broker" / "events.sqlite", read_only=True)
    verdict = log.verify()
    logged: list[tuple[int, str]] = []
    while (page := log.read(len(logged), [""], limit=1000, max_bytes=1 << 24)).records:
        logged += [(record.header.seq, record.header.id) for record in page.records]
    log.close()
    ids = {id for _, id in logged}
    applied = [(int(line.split()[0]), line.split()[1]) for line in lines(folder / "applied")]
    taken = [f"posted-{line}" for line in lines(folder / "taken")]
    posted = [int(id.removeprefix("posted-")) for _, id in logged if id.startswith("posted-")]
    lost = {
        "acknowledged": len(set(acked) - set(logged)),
        "taken": len(set(taken) - ids),
        "by_subscriber": len(set(logged) - set(applied)),
        "by_watcher": len(set(logged) - set(seen)),
    }
    duplicates = {
        "log": len(logged) - len(ids),
        "subscriber": len(applied) - len(set(applied)),
        "watcher": len(seen) - len(set(seen)),
    }
    order = posted == sorted(posted) and applied == sorted(applied) and seen == sorted(seen)
    return {
        "events": len(logged),
        "acknowledged": len(acked),
        "taken": len(taken),
        "lost": sum(lost.values()),
        "duplicates": sum(duplicates.values()),
        "order_kept": order and [seq for seq, _ in logged] == list(range(1, len(logged) + 1)),
        "chain": [str(finding) for finding in verdict.findings] or "whole",
        "lost_by": lost,
        "duplicates_by": duplicates,
    }


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    options.add_argument("--kills", type=int, default=200, help="of the broker; of the others a quarter of it, each")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--part", choices=["publisher", "subscriber"], help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    logging.disable(logging.WARNING)  # "the broker is silent", hundreds of times
    if chosen.part:
        part = {"publisher": publisher, "subscriber": subscriber}[chosen.part]
        trio.run(part, chosen.folder, chosen.folder / "fleet.toml")
        return 0
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="il-") as folder:
        result = trio.run(bench, chosen.kills, chosen.seed, Path(folder))
    print(json.dumps(result))
    return (
        0
        if (result["lost"], result["duplicates"], result["order_kept"], result["chain"]) == (0, 0, True, "whole")
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
