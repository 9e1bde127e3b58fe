"""What the options of `interlock wave` and a plan file ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from interlock.broker.errors import ConfigError
from interlock.coordinator import cli
from interlock.coordinator.wave_verb import asked_of, parse_budget, read_plan


def asked(*argv: str) -> Any:
    return asked_of(cli.parser().parse_args(["wave", "start", *argv]), 5.0)


def test_options_are_what_is_asked_for() -> None:
    body = asked(
        "--to", "r2", "--agents", "a,b", "--category", "worker", "--host", "alpha", "--order", "name",
        "--parallel", "3", "--budget", "10%", "--level", "low", "--because", "it must",
    )  # fmt: skip
    assert (body.to, body.agents, body.category, body.host, body.order) == ("r2", ["a", "b"], "worker", "alpha", "name")
    assert (body.parallel, body.budget, body.budget_share, body.level) == (3, 0, 0.1, "low")
    assert (body.because, body.deadline, body.revisions) == ("it must", 5.0, {})


def test_a_plan_says_what_the_options_do_not(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('parallel = 2\nbudget = "50%"\nstrategy = "rapid"\n[revisions]\na = "r2"\nb = "r3"\n')
    body = asked("--plan", str(path), "--parallel", "4")
    assert body.revisions == {"a": "r2", "b": "r3"}
    assert (body.parallel, body.budget_share, body.strategy, body.order) == (4, 0.5, "rapid", "dependency")
    assert asked("--plan", str(path), "--level", "high").strategy is None


@pytest.mark.parametrize(
    "text", ["", "revisions = 3", "[revisions]", '[revision]\na = "b"', "[revisions]\na = 1", "= ="]
)
def test_what_is_no_plan_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.toml"):
        read_plan(path)


def test_a_budget_is_a_number_or_a_share() -> None:
    assert (parse_budget("3"), parse_budget("10%")) == ((3, 0.0), (0, 0.1))
    for text in ("-1", "1.5", "%", "200%", "nan%"):
        with pytest.raises(ConfigError, match="is no failure budget"):
            parse_budget(text)
