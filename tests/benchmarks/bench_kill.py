"""SIGKILL to the broker, a publisher and a subscriber at random moments under load: what was lost, doubled, reordered.

    python tests/benchmarks/bench_kill.py --kills 200 --seed 1

With keys, over TCP on the loopback. One publisher posts through an outbox on disk, and notes what the bus had taken;
another one publishes and notes what was acknowledged; one subscriber applies each event to a file and goes on behind it
after a restart; one lives through all of it. One kill in five meets a broker that is still starting. After one in four
the broker's files are left as a power cut may leave them: behind the write-ahead log half of what was being written, in
the database itself torn pages, of those that a checkpoint was copying from the write-ahead log. At the end the log's
chain is verified and everything noted is compared with it. Prints one JSON object; exits 1 unless nothing was lost,
doubled or out of order.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from interlock.broker import client, topics
from interlock.broker.config import load_fleet
from interlock.broker.errors import Refused, Unreachable
from interlock.broker.facts import HostDown
from interlock.broker.keyring import Keyring
from interlock.broker.log import EventLog
from interlock.broker.security import load_security

POSTED, PUBLISHED, END = topics.host_fact("posted"), topics.host_fact("published"), "end"
WHO = ("broker", "host/posted", "host/published", "host/subscriber")
ENDPOINTS = ("events", "feed", "telemetry_in", "telemetry_out")
PAUSE_S = 0.002  # between posts: some hundred events a second, so that a kill always meets some under way
STARTED_S = (0.05, 0.6)  # from readiness to the kill
STARTING_S = (0.0, 0.6)  # from the start to a kill that does not wait for readiness
EARLY = 0.2  # of the kills of the broker
POWER_CUTS = 0.25  # the same
TORN = 4  # pages of the database at most, with each power cut
WAL_HEADER, FRAME_HEADER = 32, 24  # bytes, of SQLite's write-ahead log and of each page in it


def note(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def lines(path: Path) -> list[str]:
    """The whole lines of a file whose writer may have been killed in the middle of one."""
    content = path.read_text() if path.exists() else ""
    return content.split("\n")[:-1]


@asynccontextmanager
async def open_bus(path: Path, who: str, **options: Any) -> Any:
    fleet = load_fleet(path)
    async with client.open_bus(fleet.broker, who, security=load_security(fleet, who), **options) as bus:
        yield bus


# --- the processes that are killed


async def publisher(folder: Path, broker: Path) -> None:
    taken = folder / "taken"
    first = int(lines(taken)[-1]) + 1 if lines(taken) else 0
    cut_to_whole_lines(taken)
    async with open_bus(broker, "host/posted", outbox=folder / "outbox") as bus:
        print("ready", flush=True)
        number = first
        while not (folder / "stop").exists():
            bus.post(POSTED, HostDown(host="posted"), id=f"posted-{number}")
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
    async with open_bus(broker, "host/subscriber") as bus:
        print("ready", flush=True)
        async with bus.events([topics.FACTS], after=after) as feed:
            async for event in feed:
                note(applied, f"{event.header.seq} {event.header.id}\n")
                if event.header.id == END:
                    return


def cut_to_whole_lines(path: Path) -> None:
    if path.exists():
        with open(path, "r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


# --- who kills


def checksum(content: bytes, order: str, start: tuple[int, int]) -> tuple[int, int]:
    one, two = start
    words = struct.unpack(f"{order}{len(content) // 4}I", content)
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return one, two


def committed(wal: bytes) -> tuple[set[int], int, int]:
    """The pages whose newest content a write-ahead log has for sure, where that ends, and the size of a page."""
    if len(wal) < WAL_HEADER:
        return set(), 0, 0
    magic, _, size = struct.unpack(">III", wal[:12])
    order, salts = ">" if magic & 1 else "<", wal[16:24]
    found, pending, end, at = set[int](), set[int](), WAL_HEADER, WAL_HEADER
    sums = checksum(wal[:24], order, (0, 0))
    while at + FRAME_HEADER + size <= len(wal) and wal[at + 8 : at + 16] == salts:
        page, commits = struct.unpack(">II", wal[at : at + 8])
        content = wal[at + FRAME_HEADER : at + FRAME_HEADER + size]
        sums = checksum(content, order, checksum(wal[at : at + 8], order, sums))
        if struct.unpack(">II", wal[at + 16 : at + 24]) != sums:
            break
        at += FRAME_HEADER + size
        pending.add(page)
        if commits:
            found, pending, end = found | pending, set(), at
    return found, end, size


def cut_power(log: Path, chance: random.Random) -> int:
    """Leave the files of a killed broker as a power cut may leave them; returns how many pages were torn.

    What was written since the last fsync is there in part: the next frame behind the write-ahead log. A page of the
    database is written only while the write-ahead log has it on disk, so that only such a page can be torn.
    """
    wal = log.with_name(f"{log.name}-wal")
    if not wal.exists():
        return 0
    content = wal.read_bytes()
    pages, end, size = committed(content)
    if not size:
        return 0
    part = content[WAL_HEADER : WAL_HEADER + FRAME_HEADER] + chance.randbytes(chance.randrange(size))
    with open(wal, "r+b") as file:
        file.seek(end)
        file.write(part)
    there = [page for page in sorted(pages) if page * size <= log.stat().st_size]
    torn = chance.sample(there, min(len(there), TORN))
    with open(log, "r+b") as file:
        for page in torn:
            file.seek((page - 1) * size + size // 2)
            file.write(chance.randbytes(size // 2))
    return len(torn)


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
    """`tell` is called after each kill, before the part is started again."""
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


async def bench(kills: int, others: int, seed: int, folder: Path) -> dict[str, object]:  # noqa: PLR0915  (one run, told in order)
    broker_file = folder / "fleet.toml"
    with ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in ENDPOINTS]
    endpoints = "".join(f'{name} = "tcp://127.0.0.1:{port}"\n' for name, port in zip(ENDPOINTS, ports, strict=True))
    broker_file.write_text(f'state = "{folder}/state"\n[broker]\n{endpoints}')
    Keyring(load_fleet(broker_file).keys_dir, "").ensure(WHO, now=time.time())
    this = [sys.executable, __file__, "--folder", str(folder)]
    broker = Part([sys.executable, "-m", "interlock.broker", "--fleet", str(broker_file)])
    posting, applying = Part([*this, "--part", "publisher"]), Part([*this, "--part", "subscriber"])
    chance = random.Random(seed)
    acked: list[tuple[int, str]] = []
    seen: list[tuple[int, str]] = []
    began = time.monotonic()

    power_cuts: list[int] = []

    def tell() -> None:
        if chance.random() < POWER_CUTS and folder.joinpath("state", "broker", "events.sqlite").exists():
            power_cuts.append(cut_power(folder / "state" / "broker" / "events.sqlite", chance))
        if broker.kills % 20 == 0:
            print(f"{broker.kills} of {kills} kills, {len(acked)} acknowledged", file=sys.stderr)

    async with open_bus(broker_file, "host/published") as bus, trio.open_nursery() as nursery:

        async def publish() -> None:
            number = 0
            while True:
                number += 1
                try:
                    id = f"published-{number}"
                    seq = await bus.publish(PUBLISHED, HostDown(host="published"), id=id, timeout=1)
                except (Unreachable, Refused):
                    continue  # whether it is in the log is open
                acked.append((seq, id))

        async def watch(ended: trio.Event) -> None:
            async with bus.events([topics.FACTS], after=0) as feed:
                async for event in feed:
                    seen.append((event.header.seq, event.header.id))
                    if event.header.id == END:
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
            for part in (posting, applying):
                killers.start_soon(keep_killing, part, others, 0.0, chance, lambda: None)
        killing_s = time.monotonic() - began
        publishing.cancel()
        (folder / "stop").touch()
        with trio.fail_after(120):
            assert await posting.ended() == 0
            await bus.publish(PUBLISHED, HostDown(host="published"), id=END, timeout=30)
            assert await applying.ended() == 0
            await ended.wait()
        nursery.cancel_scope.cancel()
    assert broker.process is not None
    broker.process.terminate()
    await broker.ended()
    figures = {
        name: part.kills for name, part in (("broker", broker), ("publisher", posting), ("subscriber", applying))
    }
    run = {"bench": "kill", "seed": seed, "kills": figures, "seconds": round(killing_s, 1)}
    run |= {"power_cuts": len(power_cuts), "torn_pages": sum(power_cuts)}
    return run | compare(folder, acked, seen)


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
    options.add_argument("--kills", type=int, default=200, help="of the broker")
    options.add_argument("--others", type=int, help="kills of a publisher and of a subscriber, each (default: as many)")
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
        result = trio.run(bench, chosen.kills, chosen.others or chosen.kills, chosen.seed, Path(folder))
    print(json.dumps(result))
    return (
        0
        if (result["lost"], result["duplicates"], result["order_kept"], result["chain"]) == (0, 0, True, "whole")
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
