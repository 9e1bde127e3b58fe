"""`interlock up` is stopped, interrupted, killed and started twice: nothing is left, and it always starts again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest


def test_agents_end_in_good_order_when_the_fleet_is_told_to_stop(make_fleet: Callable[..., Any], clients: Any) -> None:
    fleet = make_fleet({"calc": "alpha"})
    fleet.start()
    second = fleet.cli("up", str(fleet.path))
    assert second.code == 2, second
    assert str(fleet.process.pid) in second.err
    assert "held by up" in second.err
    with clients(fleet.endpoint("calc"), 1) as load:
        load.more(20)
    assert load.failures == []
    assert fleet.stop(signal.SIGINT) == 0, fleet.log
    assert fleet.events.wait("instance-stopped", agent="calc")["returncode"] == 0
    assert fleet.events.wait("host-down")["host"] == "alpha"
    fleet.nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_fleet_that_is_stopped_while_it_starts_leaves_nothing(
    number: signal.Signals, make_fleet: Callable[..., Any], wait_until: Any
) -> None:
    fleet = make_fleet({"calc": "alpha"})
    fleet.start(wait=False, watch=False)
    word = "interlock.broker" if number == signal.SIGINT else "interlock.agents"
    wait_until(lambda: any(word in process.cmdline() for process in fleet.left()), "a role has been started")
    assert fleet.stop(number) == 0, fleet.log
    fleet.nothing_left()


def test_stopped_or_killed_in_the_middle_of_a_migration_it_comes_back_with_the_old_revision(
    make_fleet: Callable[..., Any], clients: Any
) -> None:
    fleet = make_fleet({"calc": "alpha", "rep": "alpha"})
    fleet.start()
    for number, code in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
        since = len(fleet.events.events)
        with clients(fleet.endpoint("calc"), 1) as calc, clients(fleet.endpoint("rep"), 1) as rep:
            commands = [fleet.migrate(agent, "r2", "staged") for agent in ("calc", "rep")]
            for agent in ("calc", "rep"):
                fleet.observed(agent, since)
        assert calc.failures == rep.failures == []
        assert fleet.stop(number) == code, fleet.log
        fleet.nothing_left(locks=number != signal.SIGKILL)
        fleet.start()
        for command in commands:
            done = command.done()
            assert done.code == 10, done
            assert "restart" in done.json["reason"]
        for agent in ("calc", "rep"):
            with clients(fleet.endpoint(agent), 1) as load:
                load.served_by("r1")
            assert load.failures == []
        fleet.calm()
    assert fleet.stop() == 0
    fleet.nothing_left()


def test_a_role_that_cannot_start_ends_it_all_and_says_why(make_fleet: Callable[..., Any]) -> None:
    fleet = make_fleet({"calc": "alpha"})
    (fleet.folder / "rules.yaml").write_text("groups: [{name: x, rules: [{alert: a, expr: '1 +'}]}]")
    done = fleet.cli("up", str(fleet.path))
    assert done.code == 2, done
    assert "rules.yaml" in done.err
    fleet.nothing_left()
    assert not os.path.exists(fleet.folder / "state" / "up")
