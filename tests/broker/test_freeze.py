"""Freeze windows: which moments they cover, and what is no window."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from interlock.broker.config import parse_fleet
from interlock.broker.errors import ConfigError
from interlock.broker.freeze import Window, parse_zone


def at(text: str, zone: str = "") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone) if zone else UTC).timestamp()


@pytest.mark.parametrize(
    ("moment", "frozen"),
    [
        ("2026-10-02T15:59", False),  # a Friday
        ("2026-10-02T16:00", True),
        ("2026-10-04T23:59", True),
        ("2026-10-05T00:00", True),
        ("2026-10-05T07:59", True),
        ("2026-10-05T08:00", False),
        ("2026-10-07T12:00", False),
    ],
)
def test_a_window_of_the_week_may_go_over_its_end(moment: str, frozen: bool) -> None:
    assert Window.parse("Fri 16:00", "Monday 08:00").covers(at(moment), UTC) is frozen


def test_a_window_within_the_week_covers_each_week() -> None:
    window = Window.parse("tue 09:00", "Wed 9:00")
    found = [window.covers(at(f"2026-10-{day:02}T10:00"), UTC) for day in range(5, 19)]
    assert [day for day, covered in enumerate(found, start=5) if covered] == [6, 13]


def test_a_window_moves_with_daylight_saving() -> None:
    zone, window = ZoneInfo("Europe/Berlin"), Window.parse("Mon 08:00", "Mon 09:00")
    assert window.covers(at("2026-07-06T06:30"), zone)
    assert window.covers(at("2026-12-07T07:30"), zone)
    assert not window.covers(at("2026-12-07T06:30"), zone)


def test_a_window_that_happens_once_has_a_zone_of_its_own_or_that_of_the_fleet() -> None:
    zone = ZoneInfo("Europe/Berlin")
    once = Window.parse("2026-12-24T12:00", "2026-12-27T00:00")
    assert not once.covers(at("2026-12-24T10:59"), zone)
    assert once.covers(at("2026-12-24T11:00"), zone)
    assert not once.covers(at("2026-12-26T23:00"), zone)
    assert Window.parse("2026-12-24T12:00+00:00", "2026-12-25T12:00+00:00").covers(at("2026-12-24T12:00"), zone)


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [
        ("Fri 16:00", "2026-12-24", "not of the same kind"),
        ("Fri 16:00", "Fri 16:00", "nothing lies between"),
        ("2026-12-24", "2026-12-23", "nothing lies between"),
        ("Fry 16:00", "Mon 08:00", "'Fry 16:00' is no time"),
        ("Fri 24:00", "Mon 08:00", "is no time"),
        ("", "Mon 08:00", "is no time"),
    ],
)
def test_what_is_no_window_is_refused_with_its_place(start: str, end: str, said: str) -> None:
    tree = {"freeze": {"windows": [{"from": start, "to": end, "because": "weekend"}]}}
    with pytest.raises(ConfigError, match=said) as caught:
        parse_fleet(tree)
    assert "freeze.windows[0]" in str(caught.value)


def test_a_zone_that_nobody_knows_and_a_misspelt_key_are_refused() -> None:
    with pytest.raises(ConfigError, match="no time zone 'Europe/Berln'"):
        parse_fleet({"freeze": {"timezone": "Europe/Berln"}})
    with pytest.raises(ConfigError, match="did you mean 'because'"):
        parse_fleet({"freeze": {"windows": [{"from": "Fri 16:00", "to": "Mon 08:00", "becuse": "weekend"}]}})
    assert parse_zone("") is None
