"""Random series and expressions: Prometheus' own promtool and our evaluation say the same. Longer: fuzz_promql.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from promql_parts import Dice, cases, differ, near, ours, promtools

CASES = 150


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize("seed", [101, 102])
def test_random_expressions_have_the_values_that_prometheus_gives(seed: int, tmp_path: Path) -> None:
    dice = Dice(seed)
    rows = dice.rows()
    asked = cases(dice, CASES)
    mine, theirs = ours(rows, asked), promtools(rows, asked, tmp_path)
    assert [f"{c}: {a} is not {b}" for c, a, b in zip(asked, mine, theirs, strict=True) if differ(a, b)] == []
    assert sum(bool(each) and not isinstance(each, str) for each in theirs) > CASES / 2  # it compares something


def test_a_difference_is_seen() -> None:
    key = (("a", "1"),)
    assert differ({key: 1.0}, {key: 1.0 + 1e-5})
    assert differ({key: 1.0}, {})
    assert differ("many-to-many", {key: 1.0})
    assert not differ({key: 1.0}, {key: 1.0 + 1e-8})
    assert near(float("nan"), float("nan"))
    assert not near(float("inf"), 1e300)
