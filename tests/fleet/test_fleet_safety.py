"""Drills, backups, the cold class and rollbacks that fail, on a whole fleet as an operator drives it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

GPU = """
    name = "gpu"
    state = "state"
    [rules]
    files = ["rules.yaml"]
    [monitor]
    gpu = "simulated"
    simulated = [{ memory_bytes = 25769803776 }]
    [strategies.rapid]
    baseline_s = 0.3
    observation_s = 100.0
"""
CAREFUL = "".join(
    f"""
    [strategies.{name}]
    baseline_s = 0.3
    shadow_requests = 10
    shadow_min_requests = 5
    canary = [{{ share = 0.5, seconds = 0.2 }}]
    observation_s = 0.5
    drill = true
    backup = ["configuration", "code", "state", "host"]
    approve = {approve}
"""
    for name, approve in (("framework", "false"), ("custom", "true"))
)
STEPS = ["prepare", "drill", "start-candidate", "shadow", "cut-over", "cut-over", "commit"]
EATER = """
import sys
sys.path.insert(0, ".")
from calc import Calc
from interlock.broker.simgpu import open_simulated

class Eater(Calc):
    def setup(self):
        self.memory = self.gpu.reserve(self.config["gib"] << 30, wait_s=20)
        self.memory.__enter__()
        self.held = open_simulated().reserve(self.config["gib"] << 30)
"""
REVISIONS = "".join(
    f"""
[agents.calc.revisions.{name}]
source = "eater"
entry = "eater:Eater"
config = {{ trigger = "-", number = "{name}", gib = {gib} }}
needs = {{ gpu_memory_mb = {gib * 1024} }}
"""
    for name, gib in (("small", 10), ("large", 16), ("huge", 40))
)


@pytest.fixture(scope="module")
def running(make_module_fleet: Callable[..., Any]) -> Iterator[Any]:
    made = make_module_fleet({"calc": "alpha", "rep": "alpha"}, more=CAREFUL)
    made.start()
    yield made
    assert made.stop() == 0, made.log
    made.nothing_left()


def test_a_drill_is_told_with_the_time_of_each_level_and_costs_no_request(running: Any, clients: Any) -> None:
    running.calm()
    before = running.instances("calc") | running.instances("rep")
    with clients(running.endpoint("calc"), 1) as calc, clients(running.endpoint("rep"), 1) as rep:
        first = running.cli("drill", "calc", "--json")
        assert first.code == 0, first
        assert set(first.json["seconds"]) == {"1", "2"}
        assert "no backup yet" in first.json["skipped"]["4"]
        told = running.cli("drill", "rep", "--host")
        assert told.code == 0, told
        for words in ("level 1 route", "level 2 code", "level 3 host", "DONE, within the promised"):
            assert words in told.out, told
    assert calc.failures == rep.failures == []
    assert running.instances("calc") | running.instances("rep") == before


def test_a_drill_that_can_not_be_is_refused(running: Any) -> None:
    done = running.cli("drill", "calk")
    assert done.code == 12, done
    assert "did you mean 'calc'" in done.err


def test_a_migration_leaves_a_backup_that_a_drill_starts_from_and_a_running_host_is_not_restored(
    running: Any, clients: Any
) -> None:
    running.calm()
    with clients(running.endpoint("calc"), 2):
        assert running.migrate("calc", "r2").done().code == 0
        assert running.migrate("calc", "r1").done().code == 0
    listed = running.cli("backup", "list", "calc", "--json")
    assert listed.code == 0, listed
    assert [one["levels"] for one in listed.json["backups"]] == [["configuration", "code"]] * 2
    assert running.cli("backup", "verify").code == 0
    refused = running.cli("backup", "restore", "calc")
    assert refused.code == 12, refused
    assert "host alpha runs" in refused.err
    drilled = running.cli("drill", "calc", "--json")
    assert drilled.code == 0, drilled
    assert set(drilled.json["seconds"]) == {"1", "2", "4"}


def careful_steps(running: Any, since: int, migration: str) -> list[str]:
    """What was done, seen that prepare made all levels of a backup and that the rollback was rehearsed from it."""
    bodies = [event["body"] for event in list(running.events.events)[since:]]
    mine = [body for body in bodies if body.get("migration") == migration]
    done = [body for body in mine if body["type"] == "step-done"]
    assert done[0]["evidence"]["backup"]["levels"] == ["configuration", "code", "state", "host"]
    (drilled,) = [body for body in mine if body["type"] == "drill-done"]
    assert set(drilled["seconds"]) == {"1", "2", "4"}
    assert drilled["problems"] == []
    return [body["step"] for body in done]


def test_the_framework_strategy_backs_up_every_level_rehearses_the_rollback_and_goes_on(
    running: Any, clients: Any
) -> None:
    running.calm()
    to, since = running.other("calc"), len(running.events.events)
    with clients(running.endpoint("calc")) as load:
        done = running.migrate("calc", to, "framework").done()
        load.served_by(to)
    assert done.code == 0, done
    assert load.failures == []
    assert careful_steps(running, since, done.json["migration"]) == STEPS
    running.alone("calc", to)


def test_the_custom_strategy_rehearses_before_the_first_approval_and_waits_before_each_stage(
    running: Any, clients: Any
) -> None:
    running.calm()
    to, since = running.other("calc"), len(running.events.events)
    with clients(running.endpoint("calc")) as load:
        command = running.start_cli("migrate", "calc", "--to", to, "--level", "critical", "--json")
        for stage in ("infrastructure", "core-logic", "integration", "observation", "commit"):
            running.events.wait("migration-waiting", since, agent="calc", stage=stage)
            assert running.events.find("drill-done", since, agent="calc") is not None
            assert running.cli("approve", "calc").code == 0
        done = command.done()
        load.served_by(to)
    assert done.code == 0, done
    assert load.failures == []
    assert careful_steps(running, since, done.json["migration"]) == STEPS
    running.alone("calc", to)


def test_a_rollback_to_what_does_not_start_keeps_the_candidate_and_a_second_one_restores_the_backup(
    running: Any, clients: Any
) -> None:
    running.calm()
    old, since = running.serving("rep"), len(running.events.events)
    with clients(running.endpoint("rep"), 1) as load:
        moving = running.migrate("rep", "odd", "staged")
        running.observed("rep", since)
        folder = running.folder / "state" / "host-alpha" / "revisions"
        backup = running.events.wait("step-done", since, step="prepare", agent="rep")["evidence"]["backup"]["path"]
        digest = json.loads((Path(backup) / "slot.json").read_text())["permanent_digest"]
        code = folder / digest / "source" / "rep.py"
        code.parent.chmod(0o700)
        code.chmod(0o600)
        code.write_text("nonsense(")
        os.kill(next(pid for name, pid in running.instances("rep").items() if f"-{old}-" in name), signal.SIGKILL)
        first = running.cli("rollback", "rep")
        assert first.code == 11, first
        assert moving.done().code == 11
        load.served_by("odd")
    assert load.failures == []
    failed = running.events.wait("roll-back-failed", since, agent="rep")
    assert failed["kept"] == "odd"
    second = running.cli("rollback", "rep", timeout=100)
    assert second.code == 0, second
    done = running.events.wait("rolled-back", since, agent="rep")
    assert done["level"] == 4
    running.alone("rep", old)
    assert running.serving("rep") == old


def test_what_does_not_fit_on_the_gpu_goes_only_as_cold(make_fleet: Callable[..., Any], clients: Any) -> None:
    fleet = make_fleet({"calc": "alpha"}, head=GPU, more=REVISIONS)
    (fleet.folder / "eater").mkdir()
    (fleet.folder / "eater" / "eater.py").write_text(EATER)
    (fleet.folder / "eater" / "calc.py").write_text((fleet.folder / "calc" / "calc.py").read_text())
    fleet.path.write_text(fleet.path.read_text().replace('serve = "r1"', 'serve = "small"'))
    fleet.start()
    shown = fleet.cli("top", "--once", "--json").json
    assert [(row["agent"], row["gpu_memory_bytes"]) for row in shown["agents"]] == [("calc", 10 << 30)]
    assert [(row["memory_used_bytes"], row["unattributed_bytes"]) for row in shown["gpus"]] == [(10 << 30, 0)]
    refused = fleet.cli("migrate", "calc", "--to", "large", "--strategy", "rapid")
    assert refused.code == 12, refused
    assert "16384 MiB needed" in refused.out
    assert "--accept cold" in refused.out
    hopeless = fleet.cli("migrate", "calc", "--to", "huge", "--strategy", "rapid", "--accept", "cold")
    assert hopeless.code == 12, hopeless
    since = len(fleet.events.events)
    with clients(fleet.endpoint("calc"), 1) as load:
        moving = fleet.start_cli(
            "migrate", "calc", "--to", "large", "--strategy", "rapid", "--accept", "cold", "--json"
        )
        fleet.observed("calc", since)
        load.served_by("large")
        assert fleet.cli("rollback", "calc").code == 0
        load.served_by("small")
        assert moving.done().code == 10
    assert load.failures == []
    done = fleet.events.wait("rolled-back", since, agent="calc")
    assert done["level"] == 2
    assert fleet.stop() == 0, fleet.log
    fleet.nothing_left()
