"""A host is cut off from the other one while it runs a candidate for it: the old one goes on, there and only there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crash_parts import SETTLE_S, LogFold, wait
from move_parts import owners
from net_parts import Net, why_not
from partition_parts import MACHINES, NetFleet, asking

WHY_NOT = why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.serial]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[NetFleet, LogFold]]:
    with Net(MACHINES) as net:
        fleet = NetFleet(Path(tempfile.mkdtemp(prefix="il-cut-")), net, {"rep": "alpha", "calc": "beta"})
        try:
            fleet.start_roles()
            yield fleet, LogFold(fleet)
            assert fleet.stop_roles() == [0] * len(fleet.parts), fleet.log
            fleet.nothing_left()
        finally:
            fleet.close()
            shutil.rmtree(fleet.folder, ignore_errors=True)
        assert fleet.defects() == []


@pytest.mark.parametrize("way", ["both", "in", "out"])
def test_a_target_that_is_cut_off_loses_the_guest_and_the_source_rolls_back_by_itself(
    way: str, running: tuple[NetFleet, LogFold]
) -> None:
    fleet, fold = running
    fleet.calm()
    since = len(fleet.events.events)
    with asking(fleet, "rep") as asked:
        command = fleet.start_cli(
            "migrate", "rep", "--to", "odd", "--host", "beta", "--strategy", "rapid", "--because", "test", "--json"
        )
        assert wait(lambda: fleet.events.find("slot-changed", since, agent="rep", share=1.0), 60)
        fleet.net.cut("alpha", "beta", way)
        rolled = wait(lambda: fleet.events.find("rolled-back", since, agent="rep"), SETTLE_S)
        assert rolled, fleet.events.last()
        assert rolled["breach"]["by"].startswith("host "), rolled["breach"]
        assert rolled["level"] == 1
        assert wait(lambda: [name.split("-")[-2] for name in fleet.instances("rep")] == ["r1"], SETTLE_S, every=0.1)
        fleet.net.heal()
        assert command.done(90).code == 10
    assert owners(fleet, "rep") == ["alpha"]
    assert asked.answers[-1][1] == "r1"
    assert all("instance-died" in failure for failure in asked.failures), asked.failures
    assert len(asked.failures) <= 1  # the one that was on its way; the next ones wait for the old revision
    assert fold.read().agents["rep"].host == "alpha"
