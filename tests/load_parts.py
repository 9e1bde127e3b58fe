"""Many migrations and rollbacks in a row, and what they leave behind: memory, descriptors, processes, files.

Used by fleet/test_fleet_load.py with some, and by benchmarks/bench_load.py with a thousand.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import trio

from crash_parts import UNJUDGED, processes, wait
from interlock.broker import commands, facts, topics
from interlock.broker.bus import Bus, EventFeed
from interlock.broker.client import open_bus
from interlock.broker.config import load_fleet
from interlock.broker.security import load_operator

EACH_S = 90.0  # for one migration, on a machine that may be busy
MAX_ODD = 10  # then it is given up

HEAD = f"""
    name = "load"
    state = "state"
    [log]
    keep_mb = 2.0
    [rules]
    files = ["rules.yaml"]
    [monitor]
    gpu = "none"
    [strategies.rapid]  # committed
    baseline_s = 0.1
    observation_s = 0.1
    {UNJUDGED}
    [strategies.staged]  # rolled back
    baseline_s = 0.1
    observation_s = 600.0
    {UNJUDGED}
"""


@dataclass
class Held:
    """What a fleet holds at one moment. Roles: broker, telemetry, host, monitor, rules, coordinator."""

    migrations: int
    memory: dict[str, int]  # resident bytes by role
    descriptors: dict[str, int]  # by role
    processes: int
    folders: dict[str, int]  # bytes by path in the state folder, two levels deep
    files: int  # in the state folder
    sockets: int  # and other files, where the instances have theirs


@dataclass
class Done:
    committed: int = 0
    rolled_back: int = 0
    refused: int = 0
    restored_s: list[float] = field(default_factory=list)  # from the order to the old revision's answer
    odd: list[str] = field(default_factory=list)  # what did not end as was asked

    @property
    def ended(self) -> int:
        return self.committed + self.rolled_back + self.refused


def held(fleet: Any, migrations: int) -> Held:
    """Looked at while nothing moves; instances are not among the roles."""
    memory, descriptors = {}, {}
    for role, pid in processes(fleet).items():
        if not role.startswith("agent "):
            process = psutil.Process(pid)
            memory[role], descriptors[role] = process.memory_info().rss, process.num_fds()
    state: Path = fleet.folder / "state"
    folders: dict[str, int] = {}
    count = 0
    for path in state.rglob("*"):
        try:
            size = path.lstat().st_size if path.is_file() else 0
        except OSError:  # gone meanwhile
            continue
        count += 1
        name = "/".join(path.relative_to(state).parts[:2])
        folders[name] = folders.get(name, 0) + size
    sockets = sum(1 for folder in fleet.run_folders() for _ in folder.iterdir())
    return Held(migrations, memory, descriptors, len(fleet.left()), folders, count, sockets)


def calm(fleet: Any, agents: list[str]) -> bool:
    """Every agent has one instance."""
    return bool(wait(lambda: all(len(fleet.instances(agent)) == 1 for agent in agents), EACH_S, every=0.2))


class Mover:
    """Moves one agent again and again: one time to the other revision for good, the next time there and back."""

    def __init__(self, agent: str, done: Done) -> None:
        self.agent, self.done = agent, done
        self.serving = "r1"

    async def run(self, bus: Bus, more: Callable[[], bool]) -> None:
        back = True
        async with bus.events([topics.FACTS]) as feed:
            while more():
                await self._move(bus, feed, back=back)
                back = not back

    async def _move(self, bus: Bus, feed: EventFeed, *, back: bool) -> None:
        to, request = ("r2" if self.serving == "r1" else "r1"), uuid.uuid4().hex
        body = commands.Migrate(
            agent=self.agent, to=to, strategy="staged" if back else "rapid", deadline=time.time() + EACH_S
        )
        await bus.publish(topics.COORDINATOR, body, id=request, timeout=EACH_S)
        migration = ""
        seen: list[str] = []
        with trio.move_on_after(EACH_S):
            async for event in feed:
                if getattr(event.body, "agent", "") == self.agent:
                    seen.append(f"{event.header.seq} {event.body}")
                match event.body:
                    case facts.MigrationStarted() if event.body.request == request:
                        migration = event.body.migration
                    case facts.MigrationRefused() if event.body.request == request:
                        self.done.refused += 1
                        self.done.odd.append(f"{self.agent}: refused: {event.body.reason}")
                        return
                    case facts.StageEntered(stage="observation") if back and event.body.migration == migration:
                        ask = commands.RollBackAgent(agent=self.agent, reason="load", deadline=time.time() + EACH_S)
                        await bus.publish(topics.COORDINATOR, ask, timeout=EACH_S)
                    case facts.MigrationHeld() if event.body.migration == migration:
                        raise SystemExit(f"{migration} is held by {event.body.breach.by}: {event.body.breach.reason}")
                    case facts.RolledBack() if event.body.migration == migration:
                        asked = event.body.breach.sample_time or event.body.received
                        self.done.restored_s.append(event.body.restored - asked)
                    case facts.MigrationEnded() if event.body.migration == migration:
                        self._ended(event.body, to, back=back)
                        return
        raise SystemExit(f"{self.agent}: no end of {migration or request} in {EACH_S:g} s; its events: {seen[-12:]}")

    def _ended(self, ended: facts.MigrationEnded, to: str, *, back: bool) -> None:
        if ended.outcome != ("rolled-back" if back else "committed"):
            self.done.odd.append(f"{ended.migration}: {ended.outcome} by {ended.decided_by}: {ended.reason}")
        if ended.outcome == "committed":
            self.done.committed += 1
            self.serving = to
        else:
            self.done.rolled_back += 1


async def load(
    fleet: Any,
    agents: list[str],
    migrations: int,
    *,
    every: int,
    tell: Callable[[Held], None] = lambda _: None,
    seconds: float = float("inf"),
) -> tuple[Done, list[Held]]:
    """`migrations` of these agents, which move side by side; after each `every` of them all wait, and it is looked.

    After so many `seconds` the next look is the last.
    """
    until = time.monotonic() + seconds
    done, found = Done(), [held(fleet, 0)]
    movers = [Mover(agent, done) for agent in agents]
    config = load_fleet(fleet.path)
    async with open_bus(config.broker, "cli/load", security=load_operator(config)) as bus:
        while done.ended < migrations:
            goal = min(migrations, done.ended + every)
            begun = done.ended

            def more(goal: int = goal) -> bool:
                nonlocal begun
                begun += 1
                return begun <= goal

            async with trio.open_nursery() as nursery:
                for mover in movers:
                    nursery.start_soon(mover.run, bus, more)
            done.odd += [] if await trio.to_thread.run_sync(calm, fleet, agents) else ["an instance too many"]
            found.append(held(fleet, done.ended))
            tell(found[-1])
            if len(done.odd) > MAX_ODD or time.monotonic() > until:
                break
    return done, found


def slope(points: list[tuple[float, float]]) -> float:
    """Of the straight line through them that fits best; 0 for fewer than two."""
    if len(points) < 2:
        return 0.0
    middle = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    spread = sum((x - middle[0]) ** 2 for x, _ in points)
    return sum((x - middle[0]) * (y - middle[1]) for x, y in points) / spread if spread else 0.0
