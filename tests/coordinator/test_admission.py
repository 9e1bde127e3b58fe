"""Which strategy a migration gets, what speaks against its beginning, and what an operator may override."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.broker import facts
from interlock.broker.strategies import BUILT_IN, STRATEGY_OF
from interlock.coordinator.admission import ORDER

WEEKEND = {
    "timezone": "UTC",
    "windows": [{"from": "Thu 00:00", "to": "Fri 00:00", "because": "the night of the moves"}],
}


def started(play: Any) -> facts.MigrationStarted:
    found = [event.body for event in play.events if isinstance(event.body, facts.MigrationStarted)]
    assert len(found) == 1
    body: facts.MigrationStarted = found[0]
    return body


def test_the_order_of_strategies_is_that_of_the_levels() -> None:
    assert ORDER == list(STRATEGY_OF.values()) == list(BUILT_IN) == ["rapid", "staged", "framework", "custom"]


@pytest.mark.parametrize(
    ("agent", "risk", "expected"),
    [
        ({"level": "low"}, None, "rapid"),
        ({"level": "critical"}, None, "custom"),
        ({"level": "low", "strategy": "framework"}, None, "framework"),
        ({"level": "low"}, "high", "framework"),
        ({"strategy": "custom"}, "low", "rapid"),
    ],
)
def test_the_risk_score_says_the_strategy_where_there_is_one_and_else_the_fleet_file(
    story: Any, agent: dict[str, str], risk: Any, expected: str
) -> None:
    play = story(agent=agent)
    if risk is not None:
        play.core.risk["tutor"] = risk
    play.migrate()
    assert started(play).strategy == expected


@pytest.mark.parametrize("asked", [{"level": "high"}, {"strategy": "framework"}])
def test_an_operator_may_raise_it_without_a_word(story: Any, asked: dict[str, str]) -> None:
    play = story()
    assert "deviation" not in " ".join(play.migrate(**asked))
    assert started(play).strategy == "framework"


@pytest.mark.parametrize("asked", [{"level": "low"}, {"strategy": "rapid"}])
def test_to_lower_it_takes_a_reason_which_is_recorded(story: Any, asked: dict[str, str]) -> None:
    play = story()
    (said,) = play.migrate(**asked)
    what = "strategy rapid is less careful than staged, which is due (its level in the fleet file is medium)"
    assert said == f"refused: {what} (if it must be, say why: --because TEXT)"
    assert play.migrate(**asked, because="it is a hot fix")[:2] == [
        "MigrationStarted",
        f"deviation: {what}; because it is a hot fix",
    ]
    for _ in range(3):
        play.done()
    play.later(30.1)
    play.done()
    ended = next(event.body for event in play.events if isinstance(event.body, facts.MigrationEnded))
    assert ended.evidence["deviations"][0]["because"] == "it is a hot fix"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"level": "brave"}, "there is no level 'brave' (known: critical, high, low, medium)"),
        ({"strategy": "framwork"}, "did you mean 'framework'?"),
        ({"level": "low", "strategy": "rapid"}, "both a level and a strategy are asked for"),
    ],
)
def test_what_is_no_level_or_strategy_is_refused(story: Any, asked: dict[str, str], said: str) -> None:
    (refused,) = story().migrate(**asked)
    assert said in refused


def test_a_frozen_fleet_begins_nothing_but_what_an_operator_answers_for(story: Any) -> None:
    play = story(freeze=WEEKEND)  # the clock stands at 1970-01-01, a Thursday
    (said,) = play.migrate()
    assert said == (
        "refused: the fleet is frozen from Thu 00:00 to Fri 00:00: the night of the moves "
        "(if it must be now, say why: --because TEXT)"
    )
    assert play.migrate(because="the old one leaks")[1].startswith("deviation: the fleet is frozen from Thu 00:00")
    assert play.steer("abort", "no")[1] == "roll back: operator abort: no"  # a freeze is no obstacle to it
    play.rolled_back()
    play.now += 86_400
    assert play.migrate()[0] == "MigrationStarted"


def test_a_reason_without_a_deviation_is_none(story: Any) -> None:
    assert "deviation" not in " ".join(story().migrate(because="just so"))
