"""A real broker that drops what is old, a coordinator that makes snapshots: who comes later sees the same fleet."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import trio

from interlock.broker import event_plane, facts, topics
from interlock.broker.client import open_bus
from interlock.broker.config import AgentConfig, BrokerConfig, FleetConfig, LogConfig
from interlock.broker.event_plane import serve_events
from interlock.coordinator import decisions, service
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.verbs import catch_up, listening

ENDPOINTS = ("events", "feed", "telemetry_in", "telemetry_out")
ROUNDS = 60


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="il-") as made:
        yield Path(made)


async def test_what_the_log_dropped_is_in_the_snapshot(
    short_folder: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_plane, "RETAIN_S", 0.05)
    monkeypatch.setattr(decisions, "SNAPSHOT_EVENTS", 25)
    config = BrokerConfig(**{name: f"ipc://{short_folder}/{name}" for name in ENDPOINTS})
    agents = {f"agent{n}": AgentConfig(host=f"h{n}", serve="r0", revisions={}) for n in range(ROUNDS)}
    fleet = FleetConfig(broker=config, agents=agents)
    await nursery.start(partial(serve_events, keep=LogConfig(keep_days=0.0)), config, short_folder / "log")

    async def coordinator(task_status: trio.TaskStatus[Coordinator]) -> None:
        core = Coordinator(lambda: fleet, fleet)
        async with open_bus(config, "coordinator", outbox=short_folder / "outbox") as bus:
            await service._serve(bus, core, lambda: task_status.started(core))

    def first_number() -> int:
        """Of the log, from its file: a reader would wait for ever for a fact when all of them are dropped."""
        with closing(sqlite3.connect(f"file:{short_folder / 'log' / 'events.sqlite'}?mode=ro", uri=True)) as log:
            return log.execute("SELECT min(seq) FROM events").fetchone()[0] or 0

    with trio.fail_after(60):
        first: Coordinator = await nursery.start(coordinator)
        async with open_bus(config, "host/alpha") as bus:
            for n in range(ROUNDS):
                up = facts.HostUp(host=f"h{n}", control="tcp://h:1", pid=n, boot="b", agents=[f"agent{n}"])
                bus.post(topics.host_fact(f"h{n}"), up)
                slot = facts.SlotChanged(host=f"h{n}", agent=f"agent{n}", state="serving", permanent=f"r{n}")
                bus.post(topics.host_fact(f"h{n}"), slot)
            await bus.flushed()
            while first_number() < 2 * ROUNDS - 50:  # noqa: ASYNC110  (until the log has dropped it)
                await trio.sleep(0.05)
            view = Fleet()
            async with listening(bus, fleet, [topics.FACTS, topics.SNAPSHOTS], timeout=20, after=0) as feed:
                await catch_up(feed, view, fleet, timeout=20)
        second: Coordinator = await nursery.start(coordinator)  # after a loss of everything but the log
        nursery.cancel_scope.cancel()
    expected = first.fleet.to_json()
    assert len(expected["hosts"]) == ROUNDS
    for found in (view.to_json(), second.fleet.to_json()):
        assert {**found, "position": 0} == {**expected, "position": 0}
