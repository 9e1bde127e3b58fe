"""`interlock keys`, and what its files forbid."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from interlock.broker import keys
from interlock.broker.config import FleetConfig, load_fleet, parse_fleet
from interlock.broker.errors import ConfigError
from interlock.broker.security import load_operator, load_security
from interlock.coordinator import cli

FLEET = 'name = "f"\nstate = "s"\n[hosts.alpha]\ncontrol = "tcp://127.0.0.1:7180"\n'


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return path


def run(fleet: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["keys", *arguments, "--fleet", str(fleet), "--json"]) == 0
    tree: dict[str, Any] = json.loads(capsys.readouterr().out)
    return tree


def test_a_fleet_gets_keys_for_all_whom_its_file_names_and_only_once(
    fleet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(fleet_file, capsys, "init")["issued"]
    assert made == ["broker", "coordinator", "rules", "host/alpha", "monitor/alpha", "operator/local"]
    assert run(fleet_file, capsys, "init")["issued"] == []
    listed = run(fleet_file, capsys, "list")
    assert [row["identity"] for row in listed["keys"]] == made
    assert {row["identity"] for row in listed["keys"] if row["sign"]} == {"coordinator", "rules", "operator/local"}
    fleet = load_fleet(fleet_file)
    for identity in made:
        assert stat.S_IMODE(keys.key_file(fleet.keys_dir, identity).stat().st_mode) == 0o600
        assert load_security(fleet, identity)
    operator = load_operator(fleet)
    assert operator is not None
    assert operator.identity == "operator/local"


def test_a_private_key_that_others_may_read_is_refused(fleet_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(fleet_file, capsys, "init")
    fleet = load_fleet(fleet_file)
    os.chmod(keys.key_file(fleet.keys_dir, "rules"), 0o640)
    with pytest.raises(ConfigError, match="others may read this private key"):
        load_security(fleet, "rules")


def test_a_revoked_key_is_gone_and_its_name_needs_a_new_one(
    fleet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(fleet_file, capsys, "init")
    before = keys.read_private(load_fleet(fleet_file).keys_dir, "monitor/alpha")
    assert run(fleet_file, capsys, "revoke", "monitor/alpha")["outcome"] == "revoked"
    with pytest.raises(ConfigError, match="no such file"):
        load_security(load_fleet(fleet_file), "monitor/alpha")
    keys.write_private(load_fleet(fleet_file).keys_dir, before)  # whoever kept a copy
    with pytest.raises(ConfigError, match="not valid"):
        load_security(load_fleet(fleet_file), "monitor/alpha")
    assert run(fleet_file, capsys, "init")["issued"] == []  # a start does not bring it back
    assert run(fleet_file, capsys, "issue", "monitor", "alpha")["outcome"] == "issued"
    assert load_security(load_fleet(fleet_file), "monitor/alpha")


def test_an_enrolment_file_takes_part_elsewhere(
    fleet_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(fleet_file, capsys, "init")
    file = tmp_path / "beta.enrol"
    run(fleet_file, capsys, "issue", "host", "beta", "--out", str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not keys.key_file(load_fleet(fleet_file).keys_dir, "host/beta").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "fleet.toml").write_text(FLEET)
    run(elsewhere / "fleet.toml", capsys, "install", str(file))
    security = load_security(load_fleet(elsewhere / "fleet.toml"), "host/beta")
    assert security is not None
    assert security.key_of("broker") == bytes.fromhex(
        next(grant.curve for grant in security.roll.authority.grants if grant.identity == "broker")
    )
    run(fleet_file, capsys, "rotate", "beta", "--out", str(tmp_path / "newer"))
    run(elsewhere / "fleet.toml", capsys, "install", str(tmp_path / "newer"))
    assert cli.main(["keys", "install", str(file), "--fleet", str(elsewhere / "fleet.toml")]) == 2
    assert "is older" in capsys.readouterr().err


def test_what_can_t_be_is_said(fleet_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(fleet_file, capsys, "init")
    for arguments, said in (
        (["issue", "hots", "beta"], "unknown role"),
        (["issue", "host", "../beta"], "is not a name"),
        (["issue", "host", "alpha"], "has keys already"),
        (["issue", "subscriber", "grafana"], "--topic"),
        (["revoke", "gamma"], "nobody called 'gamma'"),
        (["revoke", "alpha"], "the name of several"),
    ):
        assert cli.main(["keys", *arguments, "--fleet", str(fleet_file)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:7171", "tcp://192.0.2.1:7171", "tcp://*:7171"])
def test_insecure_is_for_the_loopback_only(endpoint: str) -> None:
    fleet = parse_fleet({"security": {"mode": "insecure"}, "broker": {"events": endpoint}})
    with pytest.raises(ConfigError, match="not on the loopback"):
        load_security(fleet, "broker")


def test_insecure_must_be_asked_for_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="interlock up"):
        load_security(FleetConfig(state="/nowhere"), "broker")
    fleet = parse_fleet({"security": {"mode": "insecure"}})
    assert load_security(fleet, "broker") is None
    assert "insecure" in caplog.text


@pytest.mark.parametrize(
    "newer",
    [
        {"format": 99, "fleet": "f"},
        {"format": 99, "fleet": {"of": "another shape"}, "more": 1},
        {"own": {"format": 99, "more": 1}},
    ],
)
def test_a_file_of_a_newer_format_is_refused_as_that_and_left_as_it_is(
    newer: dict[str, Any], fleet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(fleet_file, capsys, "init")
    path = load_fleet(fleet_file).keys_dir / keys.AUTHORITY
    path.write_text(json.dumps(newer))
    for arguments in (["list"], ["init"], ["issue", "operator", "ann"], ["rotate", "rules"], ["revoke", "rules"]):
        assert cli.main(["keys", *arguments, "--fleet", str(fleet_file)]) == 2
        said = capsys.readouterr().err
        assert "format 99" in said
        assert "knows 1" in said
        assert "update Interlock" in said
    assert json.loads(path.read_text()) == newer
