"""The fleet file: what is wrong in it is said with its place in the file and what was probably meant."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.broker.bounds import check_values
from interlock.broker.config import FleetConfig, heartbeat_of, load_fleet, parse_fleet, source_of
from interlock.broker.errors import ConfigError
from interlock.broker.strategies import RAPID, STAGED

GOOD: dict[str, Any] = {
    "hosts": {"alpha": {"control": "tcp://127.0.0.1:7181"}},
    "agents": {
        "tutor": {
            "host": "alpha",
            "endpoint": "tcp://127.0.0.1:7801",
            "serve": "r1",
            "revisions": {"r1": {"entry": "tutor:Tutor"}},
        }
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    tree = deepcopy(GOOD)
    node: Any = tree
    *parents, last = path.split("/")
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return tree


def test_a_good_file_is_read_with_its_defaults() -> None:
    fleet = parse_fleet(GOOD)
    agent = fleet.agents["tutor"]
    assert agent.strategy_name == "staged"
    assert agent.revisions["r1"].kind == "class"
    assert fleet.strategy("rapid").observation_s == 60.0
    assert list(fleet.agents_of("alpha")) == ["tutor"]
    assert not fleet.agents_of("beta")


@pytest.mark.parametrize(
    ("path", "value", "where", "what"),
    [
        ("path", "x", "top level", "unknown key 'path'"),
        ("brokre", {}, "top level", "did you mean 'broker'?"),
        ("agents/tutor/revision", 1, "agents.tutor", "did you mean 'revisions'?"),
        ("agents/tutor/revisions/r1/entri", 1, "agents.tutor.revisions.r1", "did you mean 'entry'?"),
        ("agents/tutor/serve", 1, "agents.tutor.serve", "expected `str`, got `int`"),
        ("agents/tutor/serve", "r2", "agents.tutor.serve", "unknown revision 'r2' (known: r1)"),
        ("agents/tutor/host", "alhpa", "agents.tutor.host", "did you mean 'alpha'?"),
        ("agents/tutor/endpoint", "localhost:80", "agents.tutor.endpoint", "is not an endpoint"),
        (
            "agents/tutor/endpoint",
            "tcp://127.0.0.1:7181",
            "agents.tutor.endpoint",
            "already used by hosts.alpha.control",
        ),
        ("agents/tutor/endpoint", "http://127.0.0.1:80", "agents.tutor.revisions.r1", "use a tcp:// endpoint"),
        ("agents/tutor/revisions/r1/entry", "tutor", "agents.tutor.revisions.r1", "is not module:Class"),
        ("agents/tutor/revisions/r1/command", ["x"], "agents.tutor.revisions.r1", "and not both"),
        ("agents/tutor/revisions/r1", {"command": ["x"]}, "agents.tutor.revisions.r1", "a program needs a probe"),
        ("agents/../x", {}, "agents", "is not a name"),
        ("hosts/a b", {"control": "tcp://127.0.0.1:1"}, "hosts", "is not a name"),
        ("strategies/brave", {}, "strategies", "unknown strategy 'brave'"),
        (
            "strategies/rapid",
            {"canary": [{"share": 2, "seconds": 1}]},
            "strategies.rapid.canary.share",
            "2.0 is out of range (use 0.000001 to 1)",
        ),
        ("monitor/gpu", "amd", "monitor.gpu", "invalid enum value 'amd'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(path: str, value: Any, where: str, what: str) -> None:
    tree = deepcopy(GOOD)
    if path == "agents/../x":
        tree["agents"]["../x"] = tree["agents"]["tutor"]
    else:
        tree = changed(path, value)
    with pytest.raises(ConfigError) as raised:
        parse_fleet(tree, path="fleet.toml")
    text = str(raised.value)
    assert text.startswith(f"fleet.toml: {where}: ")
    assert what in text


INF, NAN = float("inf"), float("nan")
CANARY = "strategies/rapid/canary"


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("agents/tutor/revisions/r1/stop_timeout_s", INF, "0 to 3600"),
        ("agents/tutor/revisions/r1/start_timeout_s", 0, "0.01 to 86400"),
        ("agents/tutor/request_timeout_s", NAN, "0.01 to 86400"),
        ("agents/tutor/hold_s", -1, "0 to 86400"),
        ("agents/tutor/window", -3, "0 to 10000"),
        ("agents/tutor/health_failures", 0, "1 to 1000"),
        ("agents/tutor/health_period_s", 0, "0.01 to 3600"),
        ("agents/tutor/compare/tolerance", -0.1, "0 to 1"),
        ("coordinator/lease_s", -1, "0.5 to 3600"),
        ("log/keep_days", NAN, "0 to 36500"),
        ("monitor/idle_s", NAN, "0.01 to 3600"),
        ("monitor/migrating_s", -1, "0.01 to 3600"),
        ("strategies/rapid/observation_s", NAN, "0 to 2592000"),
        ("strategies/rapid/shadow_requests", -1, "0 to 1000000000"),
        ("agents/tutor/endpoint", "tcp://127.0.0.1:99999", "1 to 65535"),
        ("agents/tutor/endpoint", "tcp://127.0.0.1:0", "1 to 65535"),
    ],
)
def test_a_number_out_of_its_range_is_said_with_the_range(path: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_fleet(changed(path, value), path="fleet.toml")
    assert str(raised.value).startswith(f"fleet.toml: {path.replace('/', '.')}: ")
    assert f"(use {allowed})" in str(raised.value)


PROGRAM = {"command": ["x"], "probe": {"kind": "tcp"}}


@pytest.mark.parametrize(
    ("path", "value", "where", "what"),
    [
        ("state", "a\0b", "state", "holds a NUL character"),
        ("agents/tutor/endpoint", "tcp://127.0.0.1:*", "agents.tutor.endpoint", "others could not know which"),
        ("agents/tutor/endpoint", f"ipc://{'x' * 108}", "agents.tutor.endpoint", "the path has 108 bytes"),
        (CANARY, [{"share": 0.5, "seconds": 1}, {"share": 0.1, "seconds": 1}], "strategies.rapid.canary", "shrink"),
        (CANARY, [{"share": 0.5, "seconds": NAN}], "strategies.rapid.canary.seconds", "nan is out of range"),
        ("agents/tutor/revisions/r1", {**PROGRAM, "command": ["{prt}"]}, "agents.tutor.revisions.r1.command", "{prt}"),
        ("agents/tutor/revisions/r1", {**PROGRAM, "command": ["a\0"]}, "agents.tutor.revisions.r1.command", "NUL"),
        ("agents/tutor/revisions/r1", {**PROGRAM, "command": [""]}, "agents.tutor.revisions.r1.command", "is empty"),
        ("agents/tutor/revisions/r1/env", {"": "x"}, "agents.tutor.revisions.r1.env", "the name of a variable"),
        ("agents/tutor/revisions/r1/env", {"A=B": "x"}, "agents.tutor.revisions.r1.env", "the name of a variable"),
        ("agents/tutor/revisions/r1/env", {"A": "{prt}"}, "agents.tutor.revisions.r1.env.A", "{prt}"),
    ],
)
def test_what_could_never_be_started_is_known_from_the_file(path: str, value: Any, where: str, what: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_fleet(changed(path, value), path="fleet.toml")
    assert str(raised.value).startswith(f"fleet.toml: {where}: ")
    assert what in str(raised.value)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("path", "see the reference"),  # and not "python", which a revision has
        ("agents/tutor/revisions/r1/endpoint", "see the reference"),
        ("hosts/alpha/contrl", "did you mean 'control'?"),
    ],
)
def test_the_nearest_key_is_one_of_the_same_table(path: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_fleet(changed(path, "x"), path="fleet.toml")
    assert hint in str(raised.value)


def test_every_default_is_in_its_range() -> None:
    check_values(FleetConfig(strategies={"rapid": RAPID, "staged": STAGED}), "", "fleet")


def test_a_file_that_is_missing_or_no_toml_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_fleet(tmp_path / "fleet.toml")
    (tmp_path / "fleet.toml").write_text("agents = [")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_fleet(tmp_path / "fleet.toml")
    (tmp_path / "fleet.toml").write_text("# nothing yet\n")
    with pytest.raises(ConfigError, match="is empty"):
        load_fleet(tmp_path / "fleet.toml")
    (tmp_path / "fleet.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="can't be read"):
        load_fleet(tmp_path / "fleet.toml")


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text('state = "s"')
    fleet = load_fleet(tmp_path / "fleet.toml")
    assert fleet.state_dir == tmp_path / "s"
    revision = parse_fleet(GOOD).agents["tutor"].revisions["r1"]
    (tmp_path / "code").mkdir()
    assert source_of(fleet, revision, where="x") == tmp_path


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(
    key=st.sampled_from(["hosts", "agents", "broker", "rules", "monitor", "strategies", "name", "state"]),
    value=json_like,
)
def test_whatever_stands_in_the_file_the_answer_is_a_fleet_or_a_config_error(key: str, value: Any) -> None:
    def outcome() -> str:
        try:
            return parse_fleet({**deepcopy(GOOD), key: value}).name or "a fleet"
        except ConfigError as error:
            return str(error)

    assert outcome()


@pytest.mark.parametrize(
    ("level", "strategy"),
    [("low", "rapid"), ("medium", "staged"), ("high", "framework"), ("critical", "custom")],
)
def test_each_level_has_its_strategy(level: str, strategy: str) -> None:
    fleet = parse_fleet(changed("agents/tutor/level", level))
    assert fleet.agents["tutor"].strategy_name == strategy
    assert fleet.strategy(fleet.agents["tutor"].strategy_name).observation_s >= 60.0


@pytest.mark.parametrize("needed", ["tutor", "tuto", "ftp://host:1"])
def test_an_agent_depends_on_others_or_on_endpoints(needed: str) -> None:
    with pytest.raises(ConfigError, match=r"agents\.tutor\.depends"):
        parse_fleet(changed("agents/tutor/depends", [needed]))
    assert parse_fleet(changed("agents/tutor/depends", ["tcp://10.0.0.1:5432", "http://models:80/health"]))


@pytest.mark.parametrize(("hosts", "heartbeat_s"), [(1, 1.0), (400, 1.0), (4000, 10.0), (100_000, 60.0)])
def test_a_large_fleet_pings_its_links_less_often(hosts: int, heartbeat_s: float) -> None:
    assert heartbeat_of(hosts) == heartbeat_s


def test_how_often_links_are_pinged_is_what_the_file_says_or_follows_from_the_number_of_hosts() -> None:
    hosts = {f"h{n}": {"control": f"tcp://127.0.0.1:{10_000 + n}"} for n in range(800)}
    many = changed("hosts", {**GOOD["hosts"], **hosts})
    assert parse_fleet(many).broker.heartbeat_s == pytest.approx(2.0, abs=0.1)
    said = {**many, "broker": {**many.get("broker", {}), "heartbeat_s": 5.0}}
    assert parse_fleet(said).broker.heartbeat_s == 5.0
