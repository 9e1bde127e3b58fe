"""Some migrations and rollbacks in a row under requests; benchmarks/bench_load.py does a thousand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from crash_parts import Askers
from load_parts import HEAD, load

MIGRATIONS, EVERY = 20, 10
KEPT = {"host-alpha/backups", "host-alpha/data", "coordinator/records", "rules/snapshot"}  # made by the first migration
DESCRIPTORS = 4  # more or fewer from one look to the next: connections that are just being made


@pytest.mark.timeout(300)
async def test_migrations_in_a_row_lose_no_request_and_leave_no_process_descriptor_or_file(
    make_fleet: Callable[..., Any],
) -> None:
    agents = ["calc", "rep"]
    fleet = make_fleet(dict.fromkeys(agents, "alpha"), head=HEAD)
    fleet.start()
    with Askers(fleet.endpoint("calc")) as calc, Askers(fleet.endpoint("rep"), once=True) as rep:
        done, looks = await load(fleet, agents, MIGRATIONS, every=EVERY)
    assert done.odd == []
    assert done.committed + done.rolled_back == MIGRATIONS
    assert done.rolled_back >= MIGRATIONS // 2 - len(agents)
    for asker in (calc, rep):
        assert (asker.wrong, asker.errors, asker.lost) == ([], 0, 0)
        assert asker.answers.total() > MIGRATIONS
    begin, middle, end = looks
    assert end.processes == begin.processes
    for role, count in end.descriptors.items():
        assert count <= middle.descriptors[role] + DESCRIPTORS, role
    for look in (middle, end):
        assert look.folders.keys() - begin.folders.keys() <= KEPT
    assert end.folders["host-alpha/revisions"] == middle.folders["host-alpha/revisions"]
    assert end.folders["host-alpha/backups"] <= 2 * middle.folders["host-alpha/backups"]
    for look in (middle, end):
        assert look.sockets == begin.sockets
    assert fleet.stop() == 0, fleet.log
    fleet.nothing_left()
