"""The verbs over the bus in memory, against a stand-in for the coordinator or the host; the clock jumps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing

from interlock.broker import commands, facts, topics
from interlock.broker.bus import Bus
from interlock.broker.commands import Breach
from interlock.broker.config import AgentConfig, FleetConfig
from interlock.broker.errors import Refused, Unreachable
from interlock.broker.memory import MemoryBroker
from interlock.broker.policy import BY_HOST
from interlock.broker.samples import labels
from interlock.broker.wire import Body, Event
from interlock.coordinator import verbs

FLEET = FleetConfig(agents={"echo": AgentConfig(host="alpha", serve="v1", revisions={})})
NUMBER = "echo-1"
BREACH = Breach(by="rule gpu-memory", reason="96 % used", sample_time=99.0)
CONTROL = "tcp://127.0.0.1:1"


def started(request: str) -> Body:
    return facts.MigrationStarted(
        migration=NUMBER, epoch=1, agent="echo", host="alpha", previous="v1", to="v2", strategy="rapid", request=request
    )


def stage(name: str) -> Body:
    return facts.StageEntered(migration=NUMBER, agent="echo", stage=name)


def ended(outcome: facts.Outcome) -> Body:
    return facts.MigrationEnded(
        migration=NUMBER, agent="echo", epoch=1, outcome=outcome, decided_by="rule gpu-memory", reason="96 % used",
        evidence={"compared": 20},
    )  # fmt: skip


def rolled_back() -> Body:
    return facts.RolledBack(
        host="alpha", agent="echo", migration=NUMBER, epoch=1, revision="v1", level=1, breach=BREACH,
        received=99.1, routed=99.2, restored=99.3, verified=True,
    )  # fmt: skip


def refused(request: str, reason: str = "no such revision") -> Body:
    return facts.MigrationRefused(request=request, agent="echo", to="v2", reason=reason)


class Scene:
    """A broker, and a coordinator that answers each request with what `answer` makes of it."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.told: list[Body] = []
        self.notes: list[str] = []
        self.requests: list[Event] = []

    @property
    def bus(self) -> Bus:
        return self.broker.bus("cli/1")

    def tell(self, event: Event) -> None:
        self.told.append(event.body)

    async def coordinate(
        self,
        answer: Callable[[str], Sequence[Body]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        bus = self.broker.bus("coordinator")
        async with bus.events([topics.COORDINATOR]) as feed:
            task_status.started()
            async for event in feed:
                self.requests.append(event)
                for body in answer(event.header.id):
                    by_host = isinstance(body, BY_HOST)
                    bus.post(topics.host_fact("alpha") if by_host else topics.migration_fact("echo"), body)

    async def migrate(self, **options: object) -> verbs.Report:
        return await verbs.migrate(
            self.bus, FLEET, "echo", "v2", timeout=5.0, tell=self.tell, note=self.notes.append, **options
        )  # type: ignore[arg-type]

    async def roll_back(self) -> verbs.Report:
        return await verbs.roll_back(
            self.bus, FLEET, "echo", reason="it is odd", timeout=5.0, tell=self.tell, note=self.notes.append
        )


Clock = trio.testing.MockClock  # pytest-trio runs a test on a clock that stands in its own signature


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def test_a_migration_is_followed_to_its_commit(
    autojump_clock: Clock, scene: Scene, nursery: trio.Nursery
) -> None:
    await nursery.start(
        scene.coordinate, lambda request: [started(request), stage("prepare"), stage("observation"), ended("committed")]
    )
    report = await scene.migrate(strategy="rapid")
    assert (report.outcome, report.exit_code, report.migration) == ("committed", 0, NUMBER)
    assert report.evidence == {"compared": 20}
    assert {"started", "prepare", "observation", "ended"} <= set(report.times)
    assert [type(body).__name__ for body in scene.told] == [
        "MigrationStarted", "StageEntered", "StageEntered", "MigrationEnded",
    ]  # fmt: skip
    (request,) = scene.requests
    assert isinstance(request.body, commands.Migrate)
    assert request.body.strategy == "rapid"
    assert 0 < request.body.deadline - time.time() <= 5.0


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ([rolled_back(), ended("rolled-back")], ("rolled-back", 10)),
        ([facts.MigrationHeld(migration=NUMBER, agent="echo", breach=BREACH)], ("held", 11)),
        ([ended("failed")], ("failed", 13)),
    ],
)
async def test_each_outcome_has_its_exit_code(
    autojump_clock: Clock, scene: Scene, nursery: trio.Nursery, last: list[Body], expected: tuple[str, int]
) -> None:
    await nursery.start(scene.coordinate, lambda request: [started(request), *last])
    report = await scene.migrate()
    assert (report.outcome, report.exit_code) == expected
    assert (report.decided_by, report.reason) == ("rule gpu-memory", "96 % used")


async def test_a_refusal_says_why_and_only_the_answer_to_this_request_counts(
    autojump_clock: Clock, scene: Scene, nursery: trio.Nursery
) -> None:
    await nursery.start(scene.coordinate, lambda request: [refused("another", "not ours"), refused(request)])
    report = await scene.migrate()
    assert (report.outcome, report.exit_code, report.reason) == ("refused", 12, "no such revision")


async def test_detached_it_returns_when_the_migration_has_begun(
    autojump_clock: Clock, scene: Scene, nursery: trio.Nursery
) -> None:
    await nursery.start(scene.coordinate, lambda request: [started(request)])
    report = await scene.migrate(detach=True)
    assert (report.outcome, report.exit_code, report.migration) == ("started", 0, NUMBER)


async def test_a_silent_coordinator_is_named_with_what_to_do(autojump_clock: Clock, scene: Scene) -> None:
    with pytest.raises(Unreachable, match=r"coordinator has not answered within 5 s.*nothing was started"):
        await scene.migrate()


async def test_a_silent_broker_is_named_with_what_to_do(autojump_clock: Clock, scene: Scene) -> None:
    scene.broker.up = False
    with pytest.raises(Unreachable, match="broker"):
        await scene.migrate()


@pytest.mark.parametrize(
    ("last", "outcome"),
    [
        (rolled_back(), "rolled-back"),
        (
            facts.StepDone(host="alpha", agent="echo", migration=NUMBER, epoch=1, step="commit", command="c"),
            "committed",
        ),
    ],
)
async def test_the_host_has_the_last_word_when_the_coordinator_dies(
    autojump_clock: Clock, scene: Scene, nursery: trio.Nursery, last: Body, outcome: str
) -> None:
    await nursery.start(scene.coordinate, lambda request: [started(request), last])
    assert (await scene.migrate()).outcome == outcome
    assert "has not closed it" in scene.notes[0]


async def test_a_broker_that_falls_silent_is_noted_once_and_the_migration_followed_on(
    autojump_clock: Clock, scene: Scene, nursery: trio.Nursery
) -> None:
    await nursery.start(scene.coordinate, lambda request: [started(request)])

    async def outage() -> None:
        await trio.sleep(3.0)
        scene.broker.up = False
        await trio.sleep(5.0)
        scene.broker.up = True
        await trio.sleep(3.0)
        scene.broker.bus("coordinator").post(topics.migration_fact("echo"), ended("committed"))

    nursery.start_soon(outage)
    assert (await scene.migrate()).outcome == "committed"
    assert len(scene.notes) == 2
    assert "silent" in scene.notes[0]
    assert "back" in scene.notes[1]


# --- roll back


async def test_a_rollback_waits_until_the_old_revision_serves_again(
    autojump_clock: Clock, scene: Scene, nursery: trio.Nursery
) -> None:
    scene.broker.bus("coordinator").post(topics.migration_fact("echo"), started("r"))
    await nursery.start(scene.coordinate, lambda request: [rolled_back(), ended("rolled-back")])
    report = await scene.roll_back()
    assert (report.outcome, report.previous) == ("rolled-back", "v1")
    assert report.rollback is not None
    assert isinstance(scene.requests[0].body, commands.RollBackAgent)
    assert scene.requests[0].body.reason == "it is odd"


async def test_a_rollback_of_nothing_is_refused(autojump_clock: Clock, scene: Scene, nursery: trio.Nursery) -> None:
    await nursery.start(scene.coordinate, lambda request: [refused(request, "no migration is in flight")])
    report = await scene.roll_back()
    assert (report.outcome, report.reason) == ("refused", "no migration is in flight")


async def test_a_rollback_that_comes_after_the_commit_says_how_to_go_back(
    autojump_clock: Clock, scene: Scene, nursery: trio.Nursery
) -> None:
    scene.broker.bus("coordinator").post(topics.migration_fact("echo"), started("r"))
    await nursery.start(scene.coordinate, lambda request: [ended("committed")])
    report = await scene.roll_back()
    assert report.outcome == "refused"
    assert "interlock migrate echo --to v1" in report.reason


async def test_with_a_dead_coordinator_a_rollback_goes_to_the_host_both_ways_under_one_id(
    autojump_clock: Clock, scene: Scene, nursery: trio.Nursery
) -> None:
    host = scene.broker.bus("host/alpha")
    up = facts.HostUp(host="alpha", control=CONTROL, pid=1, boot="b", agents=["echo"])
    host.post(topics.host_fact("alpha"), up)
    host.post(topics.migration_fact("echo"), started("r"))
    direct: list[Event] = []

    def accept(event: Event) -> None:
        direct.append(event)
        host.post(topics.host_fact("alpha"), rolled_back())

    with scene.broker.serve_direct(CONTROL, accept):
        report = await scene.roll_back()
    assert report.outcome == "rolled-back"
    logged = [event for event in scene.broker.log if event.topic == topics.rollback("alpha")]
    assert [event.header.id for event in logged] == [event.header.id for event in direct]
    assert isinstance(direct[0].body, commands.RollBack)
    assert (direct[0].body.migration, direct[0].body.epoch) == (NUMBER, 1)
    assert direct[0].body.breach.by == "operator"


async def test_a_host_that_reports_no_rollback_is_named(autojump_clock: Clock, scene: Scene) -> None:
    scene.broker.bus("coordinator").post(topics.migration_fact("echo"), started("r"))
    with pytest.raises(Unreachable, match="host alpha has not reported the rollback"):
        await scene.roll_back()


async def test_a_host_that_refuses_directly_is_noted_and_the_log_still_tells_it(
    autojump_clock: Clock, scene: Scene
) -> None:
    host = scene.broker.bus("host/alpha")
    up = facts.HostUp(host="alpha", control=CONTROL, pid=1, boot="b", agents=["echo"])
    host.post(topics.host_fact("alpha"), up)
    host.post(topics.migration_fact("echo"), started("r"))

    def accept(event: Event) -> None:
        raise Refused("an old epoch")

    with scene.broker.serve_direct(CONTROL, accept), pytest.raises(Unreachable):
        await scene.roll_back()
    assert any("an old epoch" in note for note in scene.notes)


# --- status


async def test_status_tells_a_host_that_is_silent_from_one_that_is_up_or_said_goodbye(
    autojump_clock: Clock, scene: Scene, nursery: trio.Nursery
) -> None:
    bus = scene.broker.bus("host/x")
    for name in ("alpha", "beta", "gamma"):
        up = facts.HostUp(host=name, control=CONTROL, pid=1, boot="b", agents=[])
        bus.post(topics.host_fact(name), up)
    bus.post(topics.host_fact("gamma"), facts.HostDown(host="gamma"))

    async def speak() -> None:
        alive = bus.telemetry("alpha", "host")
        only_watched = bus.telemetry("beta", "monitor")
        while True:
            for publisher, host in ((alive, "alpha"), (only_watched, "beta")):
                publisher.send({labels("agent_up", host=host): 1.0}, time=time.time())
            await trio.sleep(0.4)

    nursery.start_soon(speak)
    status = await verbs.status(scene.bus, FLEET, timeout=5.0)
    nursery.cancel_scope.cancel()
    found = {name: status.condition(host) for name, host in status.view.hosts.items()}
    assert found == {"alpha": "up", "beta": "silent", "gamma": "down"}
    assert status.to_json()["hosts"]["beta"]["condition"] == "silent"
