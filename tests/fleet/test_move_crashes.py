"""A fixed sample of kills while an agent moves between hosts; benchmarks/bench_moves.py has all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from crash_parts import HEAD, LogFold
from move_parts import Case, Move

SAMPLE = [
    Case("target", "done start-candidate", "keep"),
    Case("source", "done hand-over", "keep"),
    Case("guest", "stage observation", "rep"),
    Case("both", "stage commit", "rep"),
    Case("source", "done commit", "keep"),
    Case("target", "done commit", "rep"),
    Case("coordinator", "done shadow", "rep"),
    Case("broker", "stage commit", "keep"),
    Case("target", "done receive", "rep"),
]


@pytest.fixture(scope="module")
def running(make_module_fleet: Callable[..., Any]) -> Iterator[tuple[Any, LogFold]]:
    fleet = make_module_fleet({"keep": "alpha", "rep": "alpha", "calc": "beta"}, head=HEAD)
    fleet.start()
    yield fleet, LogFold(fleet)
    assert fleet.stop() == 0, fleet.log
    fleet.nothing_left()


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_after_a_kill_one_revision_serves_on_one_host_and_all_agree(case: Case, running: tuple[Any, LogFold]) -> None:
    fleet, fold = running
    fleet.calm()
    result = Move(fleet, fold, case).run()
    assert result.violations == []
    assert result.killed
    assert result.answers > 0
