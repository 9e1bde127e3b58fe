"""How long a host stays fast, told as what is said of its migrations; and the templates of categories."""

from __future__ import annotations

import pytest

from interlock.broker.cadence import FIRST_S
from interlock.broker.config import MonitorTemplate, parse_fleet
from interlock.broker.errors import ConfigError
from interlock.monitors import templates
from interlock.monitors.cadence import Cadence
from interlock.monitors.sampler import Group
from interlock.monitors.templates import templates as made

ALL = frozenset(Group)


def test_a_migration_makes_the_host_fast_for_a_while_by_itself() -> None:
    cadence = Cadence()
    assert not cadence.hot(0.0)
    cadence.follow(["m1"], 100.0)
    assert cadence.hot(100.0)
    assert not cadence.hot(100.0 + FIRST_S)


def test_the_same_news_again_is_no_new_lease() -> None:
    cadence = Cadence()
    cadence.follow(["m1"], 100.0)
    cadence.follow(["m1"], 105.0)
    assert not cadence.hot(100.0 + FIRST_S)


def test_a_coordinator_that_goes_on_renewing_keeps_it_fast_and_a_dead_one_does_not() -> None:
    cadence = Cadence()
    cadence.follow(["m1"], 0.0)
    for second in range(100):
        cadence.renew("m1", 10.0, float(second))
        assert cadence.hot(float(second))
    assert cadence.hot(108.9)
    assert not cadence.hot(109.0)


def test_a_lease_that_says_less_takes_nothing_back() -> None:
    cadence = Cadence()
    cadence.follow(["m1"], 0.0)
    cadence.renew("m1", 1.0, 0.0)
    assert cadence.hot(FIRST_S - 0.1)


def test_a_migration_that_ended_is_not_renewed_by_what_was_still_on_its_way() -> None:
    cadence = Cadence()
    cadence.follow(["m1", "m2"], 0.0)
    cadence.follow(["m2"], 1.0)
    cadence.follow([], 2.0)
    cadence.renew("m1", 10.0, 2.0)
    assert not cadence.hot(2.0)


def test_each_category_has_a_template_and_memory_is_read_in_all_of_them() -> None:
    assert all(templates.RSS in one.due(ALL) for one in made({}).values())
    assert all(templates.PSS not in one.due(ALL) for one in made({}).values()), "it costs too much to be read unasked"
    assert templates.READ in made({})["worker"].due(frozenset({Group.HOT}))
    assert templates.READ not in made({})["service"].due(frozenset({Group.HOT}))


def test_the_fleet_file_moves_a_metric_to_another_tier_adds_one_and_turns_one_off() -> None:
    changed = MonitorTemplate(hot=[templates.FDS], slow=[templates.PSS], off=[templates.FAULTS])
    found = made({"worker": changed})
    assert templates.FDS in found["worker"].due(frozenset({Group.HOT}))
    assert templates.PSS in found["worker"].due(frozenset({Group.SLOW}))
    assert templates.FAULTS not in found["worker"].due(ALL)
    assert templates.FAULTS in found["service"].due(ALL)


@pytest.mark.parametrize(
    ("category", "changed", "says"),
    [
        ("worker", MonitorTemplate(hot=["agent_process_fd"]), "did you mean 'agent_process_fds'"),
        ("worker", MonitorTemplate(hot=["x"]), "docs/metrics.md"),
        ("worker", MonitorTemplate(hot=[templates.FDS], off=[templates.FDS]), "stands in two tiers"),
        ("robot", MonitorTemplate(), "use one of voice"),
    ],
)
def test_a_template_that_can_not_be_is_refused_with_what_to_do(
    category: str, changed: MonitorTemplate, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        made({category: changed})


def test_a_slow_period_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="out of range"):
        parse_fleet({"monitor": {"slow_s": 0}})
