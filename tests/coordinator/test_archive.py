"""What the coordinator keeps of a migration: its series in the log, its record in a folder; and what the verbs show."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from interlock.broker import commands, facts, topics
from interlock.broker.config import FleetConfig
from interlock.broker.errors import Refused
from interlock.broker.memory import MemoryBroker
from interlock.broker.samples import labels
from interlock.coordinator import cli, records, report_verb, service, verbs
from interlock.coordinator.decisions import Coordinator

TIMEOUT = 5.0
OWN = labels("agent_up", agent="tutor", revision="r2", role="candidate")
SHORT = {"baseline_s": 0.1, "canary": [], "observation_s": 900.0}


class Scene:
    """A broker, the coordinator on it, and host alpha, which obeys and measures."""

    def __init__(self, fleet: FleetConfig, folder: Path) -> None:
        self.fleet, self.folder = fleet, folder
        self.broker = MemoryBroker()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.host)
            await nursery.start(self.coordinate)
            task_status.started()

    async def coordinate(self, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        core = Coordinator(lambda: self.fleet, self.fleet)
        with trio.CancelScope() as scope:
            ready: Callable[[], None] = lambda: task_status.started(scope)  # noqa: E731
            await service._serve(self.broker.bus("coordinator"), core, ready, None, self.folder)

    async def host(self, *, task_status: trio.TaskStatus[None]) -> None:
        bus = self.broker.bus("host/alpha")
        bus.post(topics.host_fact("alpha"), facts.HostUp(host="alpha", control="c", pid=1, boot="b", agents=["tutor"]))
        serving = facts.SlotChanged(host="alpha", agent="tutor", state="serving", permanent="r1")
        bus.post(topics.host_fact("alpha"), serving)
        async with trio.open_nursery() as nursery, bus.events([topics.command("alpha"), "rollback/"]) as feed:
            nursery.start_soon(self.measure)
            task_status.started()
            async for event in feed:
                body: Any = event.body
                common = {"host": "alpha", "agent": "tutor", "migration": body.migration, "epoch": body.epoch}
                now = time.time()
                if isinstance(body, commands.RollBack):
                    done: Any = facts.RolledBack(
                        **common, revision="r1", level=1, breach=body.breach, received=now, routed=now, restored=now,
                        verified=True,
                    )  # fmt: skip
                else:
                    done = facts.StepDone(**common, step=type(body).__struct_config__.tag, command=event.header.id)
                bus.post(topics.host_fact("alpha"), done)

    async def measure(self) -> None:
        telemetry = self.broker.bus("host/alpha").telemetry("alpha", "host")
        while True:
            telemetry.send({OWN: 1.0 + time.time() % 1, labels("agent_up", agent="other"): 1.0}, time=time.time())
            await trio.sleep(0.02)

    def operator(self) -> Any:
        return self.broker.bus("operator/ann")

    async def undone(self) -> verbs.Report:
        """A migration that an operator undoes once something was recorded of it."""
        begun = await verbs.migrate(
            self.operator(), self.fleet, "tutor", "r2", timeout=TIMEOUT, detach=True, tell=lambda event: None,
            note=lambda text: None,
        )  # fmt: skip
        await trio.sleep(0.6)  # the recorder looks four times a second; a slow one only records less
        ended = await verbs.roll_back(
            self.operator(), self.fleet, "tutor", reason="enough", timeout=TIMEOUT, tell=lambda event: None,
            note=lambda text: None,
        )  # fmt: skip
        assert begun.migration == ended.migration
        return ended

    async def written(self, migration: str) -> Path:
        path = self.folder / f"{migration}.json"
        while not path.exists():  # noqa: ASYNC110  (a file tells nobody)
            await trio.sleep(0.01)
        return path


@pytest.fixture
async def scene(story: Any, nursery: trio.Nursery, tmp_path: Path) -> Scene:
    made = Scene(story(strategy=SHORT).config, tmp_path / "records")
    await nursery.start(made.run)
    return made


async def test_a_migration_leaves_its_series_in_the_log_and_its_record_in_the_folder(scene: Scene) -> None:
    with trio.fail_after(30):
        ended = await scene.undone()
        record = records.load(await scene.written(ended.migration))
    assert (record.outcome, record.decided_by) == ("rolled-back", "operator")
    assert [track.labels["agent"] for track in record.series] == ["tutor"]
    assert len(record.series[0].values) > 2
    assert (scene.folder / f"{ended.migration}.html").exists()
    view = await report_verb.view(scene.operator(), scene.fleet, timeout=TIMEOUT)
    found = report_verb.find(view, "tutor")
    assert await records.gather(scene.operator(), found.id, "tutor", "alpha", epoch=found.epoch) == record
    assert await records.gather(scene.operator(), found.id, "tutor", "alpha", epoch=9_999) == record


async def test_a_coordinator_that_was_killed_before_it_wrote_writes_at_its_next_start(
    story: Any, nursery: trio.Nursery, tmp_path: Path
) -> None:
    made = Scene(story(strategy=SHORT).config, tmp_path / "file")
    (tmp_path / "file").write_text("in the way")  # no folder can be made here: nothing is written, nothing breaks
    with trio.fail_after(30):
        await nursery.start(made.host)
        first = await nursery.start(made.coordinate)
        one = await made.undone()
        two = await made.undone()
        first.cancel()
        made.folder = tmp_path / "records"
        await nursery.start(made.coordinate)
        for ended in (one, two):
            assert records.load(await made.written(ended.migration)).outcome == "rolled-back"


async def test_a_migration_is_found_by_its_id_its_agent_or_as_the_last(scene: Scene) -> None:
    view = await report_verb.view(scene.operator(), scene.fleet, timeout=TIMEOUT)
    with pytest.raises(Refused, match="no migration has begun yet"):
        report_verb.find(view, "")
    with pytest.raises(Refused, match="tutor was never migrated"):
        report_verb.find(view, "tutor")
    with trio.fail_after(30):
        one, two = await scene.undone(), await scene.undone()
    view = await report_verb.view(scene.operator(), scene.fleet, timeout=TIMEOUT)
    assert [report_verb.find(view, name).id for name in (one.migration, "tutor", "")] == [
        one.migration, two.migration, two.migration,
    ]  # fmt: skip
    with pytest.raises(Refused, match="did you mean 'tutor'"):
        report_verb.find(view, "tutro")

    def told(agent: str = "", since: float = 0.0, outcome: str = "") -> list[str]:
        return [m.id for m in report_verb.history(view, agent=agent, since=since, outcome=outcome)]

    assert told() == told("tutor") == told(outcome="rolled-back") == [one.migration, two.migration]
    assert told(since=time.time() + 9) == told(outcome="committed") == []
    with pytest.raises(Refused, match="there is no agent 'tutro'"):
        told("tutro")


async def test_a_file_is_shown_without_a_broker(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trio.fail_after(30):
        ended = await scene.undone()
        path = str(await scene.written(ended.migration))
    fleet = ["--fleet", "/there/is/none"]
    assert cli.main(["report", "--file", path, *fleet]) == 0
    assert "ROLLED-BACK" in capsys.readouterr().out
    assert cli.main(["explain", "--file", path, *fleet]) == 0
    assert "It ended as rolled-back" in capsys.readouterr().out
    assert cli.main(["explain", "--file", path, "--json", *fleet]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "rolled-back"
    target = tmp_path / "page.html"
    assert cli.main(["report", "--file", path, "--html", str(target), *fleet]) == 0
    assert "<!DOCTYPE html>" in target.read_text()
    capsys.readouterr()
    assert cli.main(["report", "--file", path, "--json", *fleet]) == 0
    again = tmp_path / "again.json"
    again.write_text(capsys.readouterr().out)
    assert records.load(again) == records.load(Path(path))
    assert cli.main(["report", "--file", path, "--html", "/no/such/folder/page.html", *fleet]) == 2
    assert "can't be written" in capsys.readouterr().err
    assert cli.main(["report", "--file", str(target), *fleet]) == 2
    assert "is no record of a migration" in capsys.readouterr().err
