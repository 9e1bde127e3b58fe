"""What the coordinator remembers has bounds, however many migrations there were."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.coordinator import fleet

MIGRATIONS = 60
KEPT = 20


def test_after_many_migrations_it_keeps_the_newest_in_the_fold_and_nothing_of_the_rest(
    story: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "KEPT_MIGRATIONS", KEPT)
    tale = story(strategy={"shadow_requests": 0})
    for _ in range(MIGRATIONS):
        tale.migrate()
        tale.done()
        tale.steer("abort", reason="enough")
        tale.rolled_back()
        tale.later(1.0)
    core = tale.core
    assert KEPT <= len(core.fleet.migrations) <= KEPT + 1
    held = (core.migrations, core._begun, core._waiting, core._answered, core._starting, core._holds, core.waves.open)
    assert [len(each) for each in held] == [0] * len(held)
