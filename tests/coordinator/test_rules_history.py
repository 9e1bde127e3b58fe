"""Recorded telemetry: expressions over it, what rules would have done, and why an alert fired."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from interlock.broker.errors import ConfigError
from interlock.coordinator.cli import main
from interlock.coordinator.rules.explain import written
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.recording import read
from interlock.coordinator.rules.replay import replay
from interlock.coordinator.rules.rulefile import default_rules, parse_rules

T0 = 1_800_000_000.0
RULES = """
groups: [{name: g, rules: [
  {alert: hot, expr: "gpu_temperature_celsius > 90 and on(host) gpu_power_watts > 100", for: 2s, x_action: rollback},
  {alert: quiet, expr: "absent_each(host_load1[3s])"}]}]
"""


def line(name: str, value: float | None, at: float, **rest: object) -> str:
    tree = {"plane": "telemetry", "source": "alpha/monitor", "time": T0 + at, "name": name, "labels": {"host": "alpha"}}
    return json.dumps(tree | ({} if rest else {"value": value}) | rest)


def recorded() -> list[str]:
    lines = []
    for tenth in range(200):
        at = tenth / 10
        lines.append(line("gpu_temperature_celsius", 95.0 if 50 <= tenth < 120 else 60.0, at))
        lines.append(line("gpu_power_watts", 300.0, at))
        if tenth < 100:
            lines.append(line("host_load1", 1.0, at))
    alert = {"rule": "hot", "migrations": ["m1"], "action": "rollback"}
    event = {"plane": "event", "topic": "fact/alert/hot/", "time": T0 + 7.1, "seq": 3, "source": "rules", "id": "x"}
    lines.insert(200, json.dumps({**event, "body": alert}))
    return lines


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("day.jsonl").write_text("\n".join(recorded()))
    Path("rules.yml").write_text(RULES)
    return tmp_path


def test_a_replay_gives_each_transition_at_its_time() -> None:
    taken = read((text.encode() for text in recorded()), file="day")
    made = [(round(at - T0, 2), each.rule.name, each.state) for at, each in replay(taken, parse_rules(RULES, file="r"))]
    found = {(name, state): at for at, name, state in made}
    assert found["hot", "pending"] == 5.0
    assert 7.0 <= found["hot", "firing"] <= 7.1
    assert found["hot", "resolved"] == 12.0
    assert 12.8 <= found["quiet", "firing"] <= 13.2  # 3 s after its last sample, by the scan


def test_a_hole_of_hours_is_passed_quickly_and_nothing_is_invented_in_it() -> None:
    texts = [line("host_load1", 1.0, at) for at in (0.0, 1.0, 2.0, 3600.0, 3601.0)]
    taken = read((text.encode() for text in texts), file="day")
    assert list(replay(taken, default_rules())) == []


def test_the_verb_replay_says_what_would_have_been_rolled_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rules", "replay", "day.jsonl", "--rules", "rules.yml"]) == 0
    told = capsys.readouterr().out
    assert 'firing    hot  {host="alpha"}  95  -> rolls back' in told
    assert main(["rules", "replay", "day.jsonl", "--rules", "rules.yml", "--json"]) == 0
    states = [json.loads(text)["state"] for text in capsys.readouterr().out.splitlines()]
    assert states[:2] == ["pending", "firing"]
    assert main(["rules", "replay", "day.jsonl"]) == 0  # the rules that ship
    assert "gpu-temperature  " in capsys.readouterr().out


def test_an_expression_is_evaluated_at_any_time_of_a_recording(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eval_ = ["rules", "eval", "--file", "day.jsonl", "--json"]
    assert main([*eval_, "gpu_temperature_celsius"]) == 0
    assert json.loads(capsys.readouterr().out)["elements"][0]["value"] == 60.0
    assert main([*eval_, "max_over_time(gpu_temperature_celsius[5s])", "--time", str(T0 + 6)]) == 0
    assert json.loads(capsys.readouterr().out)["elements"] == [{"labels": {"host": "alpha"}, "value": 95.0}]
    assert main([*eval_, "nothing"]) == 0
    assert json.loads(capsys.readouterr().out)["elements"] == []
    assert main([*eval_, "count_over_time(host_load1[1s]) + 1", "--time", str(T0 + 6)]) == 0
    assert json.loads(capsys.readouterr().out)["elements"][0]["value"] == 11.0
    assert main([*eval_, "nothing >"]) == 2


def test_a_firing_alert_is_explained_by_its_parts_and_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "explain", "hot", "--file", "day.jsonl", "--rules", "rules.yml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 7.0 <= told["time"] - T0 <= 7.1
    parts = {part["expr"]: part for part in told["rules"][0]["parts"]}
    assert parts["gpu_temperature_celsius > 90"]["elements"][0]["value"] == 95.0
    assert parts["gpu_temperature_celsius"]["samples"][0]["time"] == pytest.approx(told["time"], abs=0.11)
    assert parts["gpu_power_watts > 100"]["elements"][0]["value"] == 300.0
    assert [each["state"] for each in told["transitions"]] == ["pending", "firing", "resolved"]
    assert told["did"] == [{"rule": "hot", "migrations": ["m1"], "action": "rollback"}]
    assert main(["rules", "explain", "hot", "--file", "day.jsonl", "--rules", "rules.yml"]) == 0
    text = capsys.readouterr().out
    assert "holds at" in text
    assert "for 2s" in text


def test_an_alert_that_does_not_fire_is_explained_at_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = str(T0 + 3)
    assert main(["rules", "explain", "hot", "--file", "day.jsonl", "--rules", "rules.yml", "--time", at]) == 0
    text = capsys.readouterr().out
    assert "gives nothing at" in text
    assert "gpu_temperature_celsius > 90  nothing" in text
    assert "x_action: rollback" in text
    assert main(["rules", "explain", "hott", "--file", "day.jsonl", "--rules", "rules.yml"]) == 2
    assert "there is no alert 'hott' (there are: hot, quiet)" in " ".join(capsys.readouterr().err.split()).replace(
        ": interlock rules explain", ""
    )


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", '{"plane": "telemetry"}', '{"plane": "telemetry", "time": "x"}',
        '{"plane": "telemetry", "time": 1, "name": "x", "value": "y"}', '{"plane": "other", "time": 1}', "\xff",
        '{"plane": "telemetry", "time": 1, "labels": {"a": "' + "x" * 5000 + '"}}',
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        list(read([b"", line("x", 1.0, 0).encode(), text.encode("latin-1")], file="day.jsonl"))
    assert "day.jsonl:3" in str(error.value)


def test_what_is_no_number_and_what_ended_come_through() -> None:
    lines = [line("x", None, 0), line("x", None, 1, ended=True)]
    first, last = read((text.encode() for text in lines), file="f")
    assert [math.isnan(value) for value in first.samples.values()] == [True]
    assert last.ended == list(first.samples)


@pytest.mark.parametrize("rule", default_rules(), ids=lambda rule: rule.name)
def test_an_expression_written_again_is_the_same_expression(rule: object) -> None:
    tree = rule.expression  # type: ignore[attr-defined]
    assert parse(written(tree)) == tree
