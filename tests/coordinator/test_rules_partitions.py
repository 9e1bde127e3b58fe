"""Rule engines that share a fleet as processes of their own: each its hosts, sums over all, one rollback of two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from interlock.broker import topics
from interlock.broker.client import Bus, open_bus
from interlock.broker.commands import RollBack
from interlock.broker.config import BrokerConfig, load_fleet
from interlock.broker.errors import ConfigError
from interlock.broker.facts import AlertFiring, HostUp, MigrationStarted
from interlock.broker.planes import serve_planes
from interlock.broker.questions import Question, ask, new_id, place
from interlock.broker.samples import labels
from interlock.broker.wire import Event
from interlock.coordinator.rules.service import part_of_fleet
from interlock.coordinator.rules.sharing import Part, part_of
from interlock.coordinator.up import role_specs

PATIENCE_S = 50
ANY = BrokerConfig(
    events="tcp://127.0.0.1:*",
    feed="tcp://127.0.0.1:*",
    telemetry_in="tcp://127.0.0.1:*",
    telemetry_out="tcp://127.0.0.1:*",
)
RULES = """
groups: [{name: g, rules: [
  {alert: hot, expr: "temperature > 90", x_action: rollback},
  {alert: total, expr: "sum(load) > 15"}]}]
"""
FLEET = """
state = "{state}"
[broker]
events = "{broker.events}"
feed = "{broker.feed}"
telemetry_in = "{broker.telemetry_in}"
telemetry_out = "{broker.telemetry_out}"
[security]
mode = "insecure"
[rules]
files = ["rules.yml"]
partitions = 2
[hosts.{one}]
control = "tcp://127.0.0.1:1"
[hosts.{two}]
control = "tcp://127.0.0.1:2"
"""
ONE, TWO = (next(name for name in "abcdefgh" if part_of(name, 2) == number) for number in (1, 2))


def start(fleet: Path, number: int) -> subprocess.Popen[bytes]:
    arguments = ["rules", "--partition", str(number), "--fleet", str(fleet)]
    return subprocess.Popen([sys.executable, "-P", "-m", "interlock.coordinator", *arguments], env=dict(os.environ))


class Log:
    """What is in the event log of alerts and rollbacks."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = trio.Condition()

    async def follow(self, bus: Bus, *, task_status: trio.TaskStatus[None]) -> None:
        async with bus.events(["fact/alert/", "rollback/"], after=0) as feed:
            task_status.started()
            async for event in feed:
                self.events.append(event)
                async with self._news:
                    self._news.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self._news:
            while not condition():
                await self._news.wait()

    def fired(self, rule: str) -> list[dict[str, str]]:
        bodies = [event.body for event in self.events]
        return [body.labels for body in bodies if isinstance(body, AlertFiring) and body.rule == rule]


async def test_two_processes_share_a_fleet_and_a_third_in_one_s_place_changes_nothing() -> None:
    with tempfile.TemporaryDirectory() as name, trio.fail_after(PATIENCE_S):
        folder, processes = Path(name), []
        (folder / "rules.yml").write_text(RULES)
        async with trio.open_nursery() as planes:
            broker = await planes.start(serve_planes, ANY, folder / "broker")
            for state in ("s", "other"):
                text = FLEET.format(state=state, broker=broker, one=ONE, two=TWO)
                (folder / f"{state}.toml").write_text(text)
            try:
                for state, number in (("s", 1), ("s", 2), ("other", 2)):
                    processes.append(start(folder / f"{state}.toml", number))
                async with open_bus(broker, "test") as bus, trio.open_nursery() as nursery:
                    await shared(bus, nursery, folder / "s.toml")
                    nursery.cancel_scope.cancel()
            finally:
                for process in processes:
                    process.send_signal(signal.SIGTERM)
                codes = [process.wait(20) for process in processes]
            planes.cancel_scope.cancel()
        assert codes == [0, 0, 0]


async def shared(bus: Bus, nursery: trio.Nursery, file: Path) -> None:
    log, heat = Log(), {ONE: 60.0, TWO: 60.0}
    await nursery.start(log.follow, bus)
    for host in (ONE, TWO):
        await bus.publish(topics.host_fact(host), HostUp(host=host, control="", pid=1, boot="b"))
    publishers = {host: bus.telemetry(host, "monitor") for host in (ONE, TWO)}

    async def measure() -> None:
        while True:
            for host, publisher in publishers.items():
                found = {labels("load", host=host): 10.0, labels("temperature", host=host): heat[host]}
                publisher.send(found, time=time.time())
            await trio.sleep(0.1)

    nursery.start_soon(measure)
    await log.until(lambda: bool(log.fired("total")))  # 10 here and 10 there: each engine has one of them
    assert log.fired("total") == [{}]
    begun = MigrationStarted(
        migration="m1", epoch=1, agent="chat", host=TWO, previous="v1", to="v2", strategy="rapid", request="r"
    )
    await bus.publish(topics.migration_fact("chat"), begun)
    heat[ONE] = heat[TWO] = 95.0
    await log.until(lambda: len(log.fired("hot")) >= 3)  # once of the first host, twice of the one that two watch
    assert sorted(each["host"] for each in log.fired("hot")) == sorted([ONE, TWO, TWO])
    assert [event.header.id for event in log.events if isinstance(event.body, RollBack)] == ["m1/1/rules"]
    for number in (1, 2):
        where = place(load_fleet(file), number)
        question = Question(id=new_id(), expr="temperature")
        told = await ask(bus.sockets, where, b"", question, timeout=10.0)
        assert [row["labels"]["host"] for row in told["elements"]] == [(ONE, TWO)[number - 1]]


def test_an_engine_must_say_which_part_it_is_and_up_starts_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(FLEET.format(state="s", broker=BrokerConfig(), one=ONE, two=TWO))
    fleet = load_fleet(tmp_path / "fleet.toml")
    assert part_of_fleet(fleet, 2) == Part(2, 2)
    for number in (0, 3):
        with pytest.raises(ConfigError, match=r"which one|none is number 3"):
            part_of_fleet(fleet, number)
    names = [spec.name for spec in role_specs(fleet)]
    assert [name for name in names if name.startswith("rules")] == ["rules-1", "rules-2"]
    (tmp_path / "fleet.toml").write_text("[hosts.fleet]\ncontrol = 'tcp://127.0.0.1:1'\n")
    with pytest.raises(ConfigError, match="no host may be called 'fleet'"):
        load_fleet(tmp_path / "fleet.toml")
