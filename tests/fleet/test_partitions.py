"""A host is cut off in the middle of a migration: a sample; benchmarks/bench_partitions.py has all of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crash_parts import LogFold
from net_parts import Net, why_not
from partition_parts import MACHINES, Cell, NetFleet, cut

WHY_NOT = why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.serial]

SAMPLE = [
    Cell("coordinator", "both", "observation"),
    Cell("coordinator", "out", "prepare"),
    Cell("broker", "both", "core-logic"),
    Cell("broker", "in", "observation", "die"),
    Cell("rules", "both", "observation", "bad"),
    Cell("beta", "both", "integration"),
]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[NetFleet, LogFold]]:
    with Net(MACHINES) as net:
        fleet = NetFleet(Path(tempfile.mkdtemp(prefix="il-cut-")), net, {"calc": "alpha", "rep": "beta"})
        try:
            fleet.start_roles()
            yield fleet, LogFold(fleet)
            assert fleet.stop_roles() == [0] * len(fleet.parts), fleet.log
            fleet.nothing_left()
        finally:
            fleet.close()
            shutil.rmtree(fleet.folder, ignore_errors=True)
        assert fleet.defects() == []


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_a_host_that_is_cut_off_rolls_back_by_itself_or_goes_on_after_healing(
    cell: Cell, running: tuple[NetFleet, LogFold]
) -> None:
    fleet, fold = running
    fleet.calm()
    result = cut(fleet, fold, cell)
    assert result.violations == []
    assert result.answers > 0
