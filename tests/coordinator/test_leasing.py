"""The lease by which hosts stay fast, from the coordinator to a monitor, over the bus in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
import trio.testing

from interlock.broker import cadence, facts, policy, topics
from interlock.broker.errors import Refused
from interlock.broker.keys import Grant
from interlock.broker.memory import MemoryBroker
from interlock.broker.samples import Batch, Labels, SeriesReader
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.leasing import leases_of, lend

Clock = trio.testing.MockClock


@dataclass
class Migration:
    id: str
    started: facts.MigrationStarted


@dataclass
class Core:
    """As much of a coordinator as lending needs."""

    migrations: dict[str, Migration] = field(default_factory=dict)
    lease_s: float = 6.0

    def begin(self, id: str, target: str = "") -> None:
        started = facts.MigrationStarted(
            migration=id, epoch=1, agent="echo", host="alpha", previous="v1", to="v2", strategy="rapid", request="r",
            target=target,
        )  # fmt: skip
        self.migrations[id] = Migration(id, started)


def test_each_host_that_a_migration_touches_has_a_lease_that_outlasts_the_coordinators_own() -> None:
    core = Core()
    core.begin("m1", target="beta")
    assert leases_of(cast(Coordinator, core)) == {
        cadence.lease("alpha", "m1"): 10.0,
        cadence.lease("beta", "m1"): 10.0,
    }


async def test_a_lease_is_repeated_each_second_and_ends_with_the_migration(autojump_clock: Clock) -> None:
    broker = MemoryBroker()
    core = Core()
    heard: list[tuple[float, list[tuple[Labels, float]], list[Labels]]] = []
    reader = SeriesReader()

    async def listen(*, task_status: trio.TaskStatus[None]) -> None:
        async with broker.bus("monitor/alpha").samples([cadence.TOPIC]) as feed:
            task_status.started()
            async for batches in feed:
                heard.extend((trio.current_time(), *reader.read(batch)) for batch in batches)

    async with trio.open_nursery() as nursery:
        await nursery.start(listen)
        nursery.start_soon(lend, broker.bus("coordinator"), core)
        await trio.sleep(5.5)
        assert heard == [], "a fleet at rest hears nothing"
        core.begin("m1")
        await trio.sleep(3)
        assert len(heard) == 3
        assert {key for _, samples, _ in heard for key, _ in samples} == {cadence.lease("alpha", "m1")}
        core.migrations.clear()
        await trio.sleep(3)
        assert heard[-1][1:] == ([], [cadence.lease("alpha", "m1")])
        assert len(heard) == 4
        nursery.cancel_scope.cancel()


def batch(**rest: Any) -> Batch:
    return Batch(source="fleet/cadence", epoch=1, seq=1, time=1.0, **rest)


def grant(identity: str) -> Grant:
    return Grant(identity=identity, curve="0" * 64, sign="0" * 64, issued=0.0)


def test_only_the_coordinator_may_lend_and_monitors_may_hear_it() -> None:
    policy.telemetry(grant("coordinator"), cadence.TOPIC, batch())
    for other in ("host/alpha", "monitor/alpha", "rules", "operator/o"):
        with pytest.raises(Refused):
            policy.telemetry(grant(other), cadence.TOPIC, batch())
    policy.subscribe(grant("monitor/alpha"), [cadence.TOPIC])
    with pytest.raises(Refused):
        policy.subscribe(grant("monitor/alpha"), [topics.telemetry("fleet", "coordinator")])
