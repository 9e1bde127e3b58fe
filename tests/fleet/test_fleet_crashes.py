"""A fixed sample of the crash matrix; benchmarks/bench_crash.py has all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from crash_parts import HEAD, MOMENTS, ROLES, Case, Crash, LogFold, cases, possible

# Moments that no test of test_fleet_kills.py has; each role once, before the requests move and after.
SAMPLE = [
    Case("host", "done prepare", "rep"),
    Case("coordinator", "done shadow", "calc"),
    Case("rules", "done cut-over", "calc", breach=True),
    Case("broker", "stage core-logic", "rep"),
    Case("telemetry", "stage observation", "calc", breach=True),
    Case("monitor", "done start-candidate", "calc"),
    Case("candidate", "done start-candidate", "rep"),
    Case("permanent", "stage integration", "rep"),
    Case("permanent", "stage prepare", "calc"),
    Case("host", "done cut-over", "calc"),
    Case("candidate", "done commit", "calc"),
]
UNTIMED_S = 60.0  # the promise is the bench's to hold: no test hangs on the machine's speed


@pytest.fixture(scope="module")
def running(make_module_fleet: Callable[..., Any]) -> Iterator[tuple[Any, LogFold]]:
    fleet = make_module_fleet({"calc": "alpha", "rep": "alpha"}, head=HEAD)
    fleet.start()
    yield fleet, LogFold(fleet)
    assert fleet.stop() == 0, fleet.log
    fleet.nothing_left()


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_after_a_kill_one_revision_serves_and_all_agree_which(case: Case, running: tuple[Any, LogFold]) -> None:
    fleet, fold = running
    fleet.calm()
    result = Crash(fleet, fold, case, promise_s=UNTIMED_S).run()
    assert result.violations == []
    assert result.killed
    assert result.answers > 0


def test_the_matrix_has_every_role_at_every_moment_and_the_seed_decides_the_order() -> None:
    all_of_it = {(role, moment) for role in ROLES for moment in MOMENTS if possible(role, moment)}
    drawn = cases(300, seed=7)
    assert {(case.role, case.moment) for case in drawn} == all_of_it
    assert drawn == cases(300, seed=7) != cases(300, seed=8)
    assert any(case.breach for case in drawn)
