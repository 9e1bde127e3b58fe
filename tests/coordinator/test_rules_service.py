"""The rule engine's role on a real bus: telemetry in, rollbacks on both ways, alerts in the log."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from interlock.broker import questions, topics
from interlock.broker.client import Bus, open_bus
from interlock.broker.commands import RollBack
from interlock.broker.config import BrokerConfig, FleetConfig, HostConfig, RulesConfig, SecurityConfig
from interlock.broker.direct import serve_direct
from interlock.broker.errors import ConfigError, InUse, Refused
from interlock.broker.facts import AlertFiring, AlertResolved, HostUp, MigrationStarted
from interlock.broker.planes import serve_planes
from interlock.broker.questions import Question, ask, new_id
from interlock.broker.samples import labels
from interlock.broker.wire import Event
from interlock.coordinator.rules import reloading
from interlock.coordinator.rules.service import run_rules

PATIENCE_S = 30
ANY = BrokerConfig(
    events="tcp://127.0.0.1:*",
    feed="tcp://127.0.0.1:*",
    telemetry_in="tcp://127.0.0.1:*",
    telemetry_out="tcp://127.0.0.1:*",
)
RULES = """
groups:
- name: g
  rules:
  - {alert: gpu-memory, expr: gpu_memory_used_ratio > 0.95, x_action: rollback}
"""
BAD = labels("gpu_memory_used_ratio", host="alpha", gpu="0")


class Stage:
    """A broker, a rule engine, a host's control endpoint, and a bus of our own that sees everything."""

    def __init__(self, bus: Bus, fleet: FleetConfig, nursery: trio.Nursery) -> None:
        self.bus = bus
        self.fleet = fleet
        self.nursery = nursery
        self.direct: list[Event] = []
        self.logged: list[Event] = []
        self.rules = trio.CancelScope()
        self.rules_ended = trio.Event()
        self.control = ""
        self._news = trio.Condition()

    async def start_rules(self) -> None:
        self.rules, self.rules_ended = trio.CancelScope(), trio.Event()
        up = trio.Event()

        async def run() -> None:
            with self.rules:
                await run_rules(self.fleet, up.set)
            self.rules_ended.set()

        self.nursery.start_soon(run)
        await up.wait()

    async def watch(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with self.bus.events(["fact/alert/", "rollback/"], after=0) as feed:
            task_status.started()
            async for event in feed:
                self.logged.append(event)
                await self._told()

    async def serve_host(self, *, task_status: trio.TaskStatus[str]) -> None:
        await serve_direct(self.bus.sockets, "tcp://127.0.0.1:*", self._accept, task_status=task_status)

    def _accept(self, event: Event) -> None:
        self.direct.append(event)
        self.nursery.start_soon(self._told)

    async def _told(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self._news:
            while not condition():
                await self._news.wait()

    async def sample(self, value: float, condition: Callable[[], bool]) -> None:
        """Send the sample, as a monitor does, again and again until the condition holds."""
        publisher = self.bus.telemetry("alpha", "monitor")
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                while True:
                    publisher.send({BAD: value}, time=time.time())
                    await trio.sleep(0.05)

            nursery.start_soon(send)
            await self.until(condition)
            nursery.cancel_scope.cancel()

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.logged if isinstance(event.body, kind)]


@asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    with tempfile.TemporaryDirectory() as name, trio.fail_after(PATIENCE_S):
        folder = Path(name)
        (folder / "rules.yml").write_text(RULES)
        async with trio.open_nursery() as planes:
            config = await planes.start(serve_planes, ANY, folder / "broker")
            fleet = FleetConfig(
                broker=config,
                rules=RulesConfig(files=["rules.yml"]),
                hosts={"alpha": HostConfig(control="tcp://127.0.0.1:*")},
                path=str(folder / "fleet.toml"),
                security=SecurityConfig(mode="insecure"),
            )
            async with open_bus(config, "test") as bus, trio.open_nursery() as nursery:
                stage = Stage(bus, fleet, nursery)
                stage.control = await nursery.start(stage.serve_host)
                await nursery.start(stage.watch)
                yield stage
                nursery.cancel_scope.cancel()
            planes.cancel_scope.cancel()


async def migrate(stage: Stage) -> None:
    up = HostUp(host="alpha", control=stage.control, pid=1, boot="b")
    await stage.bus.publish(topics.host_fact("alpha"), up)
    begun = MigrationStarted(
        migration="m1", epoch=1, agent="chat", host="alpha", previous="v1", to="v2", strategy="rapid", request="r"
    )
    await stage.bus.publish(topics.migration_fact("chat"), begun)


async def test_a_bad_sample_rolls_the_migration_back_on_both_ways_with_one_id() -> None:
    async with staged() as stage:
        await stage.start_rules()
        await migrate(stage)
        await stage.sample(0.5, lambda: True)
        await stage.sample(0.97, lambda: bool(stage.direct and stage.of(AlertFiring)))
        (direct,), (logged,), (alert,) = stage.direct, stage.of(RollBack), stage.of(AlertFiring)
        assert direct.header.id == logged.header.id == "m1/1/rules"
        assert direct.body == logged.body
        assert direct.topic == logged.topic == "rollback/alpha/"
        assert isinstance(alert.body, AlertFiring)
        assert alert.body.migrations == ["m1"]
        assert logged.header.seq < alert.header.seq
        await stage.sample(0.5, lambda: bool(stage.of(AlertResolved)))


async def test_a_rule_engine_that_was_restarted_neither_forgets_an_alert_nor_tells_it_twice() -> None:
    async with staged() as stage:
        await stage.start_rules()
        await stage.sample(0.97, lambda: bool(stage.of(AlertFiring)))
        stage.rules.cancel()
        await stage.rules_ended.wait()
        await migrate(stage)
        await stage.start_rules()
        await stage.sample(0.99, lambda: True)
        await stage.sample(0.5, lambda: bool(stage.of(AlertResolved)))
        assert len(stage.of(AlertFiring)) == 1
        assert stage.of(RollBack) == []


SECOND = "  - {alert: second, expr: gpu_memory_used_ratio > 0.5}\n"


@pytest.mark.parametrize("told_by", ["file", "signal"])
async def test_rule_files_that_change_are_read_again_and_what_is_the_same_goes_on(
    told_by: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if told_by == "signal":
        monkeypatch.setattr(reloading, "LOOK_S", 3600.0)
    caplog.set_level("INFO", "interlock.rules")

    def write(text: str) -> None:
        (stage.fleet.folder / "rules.yml").write_text(text)
        if told_by == "signal":
            os.kill(os.getpid(), signal.SIGHUP)

    async with staged() as stage:
        await stage.start_rules()
        await stage.sample(0.97, lambda: bool(stage.of(AlertFiring)))
        write(RULES + SECOND)
        await stage.sample(0.97, lambda: len(stage.of(AlertFiring)) == 2)
        assert [event.body.rule for event in stage.of(AlertFiring)] == ["gpu-memory", "second"]  # type: ignore[union-attr]
        write(RULES.replace("x_action", "x_acton"))
        while "the 2 rules from before go on" not in caplog.text:  # noqa: ASYNC110  (the log has no event)
            await trio.sleep(0.01)
        assert "did you mean 'x_action'?" in caplog.text
        assert stage.of(AlertResolved) == []
        write(RULES)
        await stage.until(lambda: bool(stage.of(AlertResolved)))
        assert [event.body.rule for event in stage.of(AlertResolved)] == ["second"]  # type: ignore[union-attr]
        assert len(stage.of(AlertFiring)) == 2


async def test_it_reports_its_own_figures() -> None:
    async with staged() as stage:
        await stage.start_rules()
        seen: set[str] = set()
        async with stage.bus.samples(["telemetry/fleet/rules/"]) as feed:
            async for batches in feed:
                seen |= {announced.labels["__name__"] for batch in batches for announced in batch.series}
                if seen:
                    break
        assert {"rules_samples_total", "rules_evaluations_total", "rules_unresolved_total"} <= seen


async def test_what_lives_as_long_as_the_engine_is_no_work_for_the_collector() -> None:
    before = gc.get_freeze_count()
    async with staged() as stage:
        await stage.start_rules()
        assert gc.get_freeze_count() > before
    gc.unfreeze()


async def test_rules_that_change_are_read_again_and_a_bad_file_leaves_the_old_ones() -> None:
    async with staged() as stage:
        await stage.start_rules()
        file = Path(stage.fleet.path).parent / "rules.yml"
        file.write_text("groups: [{name: g, rules: [{alert: broken, expr: '>'}]}]")
        await stage.sample(0.97, lambda: bool(stage.of(AlertFiring)))
        file.write_text(RULES.replace("alert: gpu-memory", "alert: renamed"))
        await stage.sample(0.97, lambda: len(stage.of(AlertFiring)) > 1)
        assert [event.body.rule for event in stage.of(AlertFiring)] == ["gpu-memory", "renamed"]  # type: ignore[attr-defined]
        assert [event.body.rule for event in stage.of(AlertResolved)] == ["gpu-memory"]  # type: ignore[attr-defined]


async def test_the_engine_answers_what_an_expression_is_worth_and_why_an_alert_fires() -> None:
    async with staged() as stage:
        await stage.start_rules()
        await stage.sample(0.97, lambda: bool(stage.of(AlertFiring)))
        where = questions.place(stage.fleet)

        async def asked(**question: str) -> Any:
            return await ask(stage.bus.sockets, where, b"", Question(id=new_id(), **question), timeout=5.0)  # type: ignore[arg-type]

        told = await asked(expr="gpu_memory_used_ratio * 2")
        assert [(row["labels"], row["value"]) for row in told["elements"]] == [({"host": "alpha", "gpu": "0"}, 1.94)]
        told = await asked(alert="gpu-memory")
        assert [each["state"] for each in told["alerts"]] == ["firing"]
        assert told["rules"][0]["parts"][0]["elements"][0]["value"] == 0.97
        with pytest.raises(ConfigError, match="is not PromQL"):
            await asked(expr="gpu_memory >")
        with pytest.raises(Refused, match="may take long"):
            await asked(expr='a{b=~"(x+)+"}')
        assert len(stage.of(AlertFiring)) == 1  # questions change nothing


async def test_a_place_for_answers_that_is_taken_keeps_no_rule_from_its_work(caplog: pytest.LogCaptureFixture) -> None:
    async with staged() as stage:
        taken = stage.fleet.folder / "taken"
        taken.mkdir()
        rules = RulesConfig(files=["rules.yml"], answers=f"ipc://{taken}")
        stage.fleet = msgspec.structs.replace(stage.fleet, rules=rules)
        await stage.start_rules()
        await stage.sample(0.97, lambda: bool(stage.of(AlertFiring)))
        assert "no questions are answered" in caplog.text


async def test_a_second_rule_engine_on_the_same_state_is_refused() -> None:
    async with staged() as stage:
        await stage.start_rules()
        with pytest.raises(InUse, match="rules"):
            await run_rules(stage.fleet, lambda: None)


async def test_a_bad_rule_file_ends_it_before_anything_is_started() -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "rules.yml").write_text(RULES.replace("x_action", "x_acton"))
        fleet = FleetConfig(rules=RulesConfig(files=["rules.yml"]), path=f"{name}/fleet.toml")
        with pytest.raises(ConfigError, match="did you mean 'x_action'"):
            await run_rules(fleet, lambda: None)
        assert not fleet.state_dir.exists()
        missing = msgspec.structs.replace(fleet, rules=RulesConfig(files=["other.yml"]))
        with pytest.raises(ConfigError, match="no such file"):
            await run_rules(missing, lambda: None)
