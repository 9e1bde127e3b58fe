"""Where an agent is, and where it can go."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.broker.config import FleetConfig, parse_fleet
from interlock.broker.errors import ConfigError
from interlock.coordinator.fleet import Agent, Fleet, Host
from interlock.coordinator.placing import deviations, placed, target_of
from interlock.coordinator.rules.inflight import Migration


def config(**agent: Any) -> FleetConfig:
    revision = {"entry": "tutor:Tutor"}
    hosts = {
        name: {"control": f"tcp://127.0.0.1:{port}", "link": f"tcp://127.0.0.1:{port + 10}"}
        for name, port in (("alpha", 7181), ("beta", 7182))
    }
    hosts["gamma"] = {"control": "tcp://127.0.0.1:7183"}
    tutor = {
        "host": "alpha", "endpoint": "tcp://127.0.0.1:7801", "serve": "r1", "revisions": {"r1": revision},
        "endpoints": {"beta": "tcp://127.0.0.1:7802", "gamma": "tcp://127.0.0.1:7803"}, **agent,
    }  # fmt: skip
    return parse_fleet({"hosts": hosts, "agents": {"tutor": tutor}})


def fleet(host: str = "alpha", *, moved: bool = False) -> Fleet:
    view = Fleet()
    view.agents["tutor"] = Agent("tutor", host=host, moved=moved, endpoint="tcp://e")
    view.hosts = {name: Host(name, up=name != "gamma") for name in ("alpha", "beta", "gamma")}
    return view


def test_the_log_holds_before_the_fleet_file_and_the_difference_is_told() -> None:
    there = placed("tutor", config(), fleet("beta", moved=True))
    assert (there.host, there.endpoint) == ("beta", "tcp://127.0.0.1:7802")
    assert "it was moved to beta" in deviations(config(), fleet("beta", moved=True))["tutor"]
    assert placed("tutor", config(), fleet()) == config().agents["tutor"]
    assert deviations(config(), fleet()) == {}


def test_a_host_that_is_asked_for_must_be_there_and_reachable() -> None:
    def ask(host: str, **agent: Any) -> str:
        found = config(**agent)
        return target_of(host, "tutor", placed("tutor", found, fleet()), found, fleet())

    assert ask("beta") == "beta"
    assert ask("alpha") == ask("") == ""
    for host, agent, why in (
        ("delta", {}, "there is no host 'delta'"),
        ("gamma", {}, "where other hosts reach gamma"),
        ("beta", {"endpoints": {}}, "does not say where clients find tutor on beta"),
        ("beta", {"endpoint": "", "endpoints": {}}, "an agent without a port can't move"),
    ):
        with pytest.raises(ConfigError, match=why):
            ask(host, **agent)


def test_a_breach_on_either_host_concerns_an_agent_that_moves() -> None:
    moving = Migration("tutor-7", "tutor", "alpha", 7, "r2", 0.0, target="beta")
    candidate = {"agent": "tutor", "revision": "r2", "role": "candidate"}
    assert moving.matches({**candidate, "host": "alpha"})
    assert moving.matches({**candidate, "host": "beta"})
    assert not moving.matches({**candidate, "host": "gamma"})
    assert not moving.matches({**candidate, "host": "beta", "role": "permanent"})
    staying = Migration("tutor-7", "tutor", "alpha", 7, "r2", 0.0)
    assert not staying.matches({**candidate, "host": "beta"})


@pytest.mark.parametrize(("endpoints", "why"), [
    ({"delta": "tcp://127.0.0.1:1"}, "unknown host 'delta'"),
    ({"beta": "http://127.0.0.1:1"}, "of another kind"),
    ({"alpha": "tcp://127.0.0.1:1"}, "is not its endpoint there"),
    ({"beta": "tcp://127.0.0.1:7801"}, "already used"),
])  # fmt: skip
def test_endpoints_that_can_not_be_are_refused_with_the_file(endpoints: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config(endpoints=endpoints)
