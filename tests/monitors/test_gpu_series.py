"""A card's readings as series, as transcripts: what begins, what ends, and what is told of a sample itself. Pure."""

from __future__ import annotations

import subprocess
import sys

import pytest

from interlock.broker.samples import NAME, Labels
from interlock.monitors import gpu_metrics as gm
from interlock.monitors.gpu import Card, Reading
from interlock.monitors.gpu_series import CardSeries, Samples
from interlock.monitors.roster import Instance
from interlock.monitors.sampler import Group

HOT = frozenset({Group.HOT})
ALL = frozenset(Group)
CARD = Card(0, "GPU-0", "card")
HOT_VALUES = {gm.MEMORY_USED: 1.0, gm.UTILIZATION: 0.5}
CALM_VALUES = HOT_VALUES | {gm.TEMPERATURE: 60.0, f"{gm.CLOCK} clock=sm": 1e9}


class Play:
    """The series of one card, and what is known of it after each sample."""

    def __init__(self) -> None:
        self.series = CardSeries("alpha", CARD)
        self.known: dict[str, float] = {}

    def take(self, values: dict[str, float], groups: frozenset[Group] = ALL, **rest: object) -> list[str]:
        """The names of the series that ended."""
        samples: Samples = {}
        reading = Reading(CARD, 1.0, values, groups=groups, **rest)  # type: ignore[arg-type]
        owner = Instance("i", "tutor", "r1", "permanent", 7, 0.0)
        ended = self.series.take(reading, {7: owner}, samples)
        return self._take(ended, samples)

    def fail(self) -> list[str]:
        samples: Samples = {}
        return self._take(self.series.fail(samples), samples)

    def _take(self, ended: list[Labels], samples: Samples) -> list[str]:
        for key in ended:
            self.known.pop(name(key), None)
        self.known |= {name(key): value for key, value in samples.items()}
        return sorted(name(key) for key in ended)


def name(key: Labels) -> str:
    of = dict(key)
    assert (of.pop("host"), of.pop("gpu"), of.pop("uuid")) == ("alpha", "0", "GPU-0")
    return " ".join([of.pop(NAME), *(f"{label}={value}" for label, value in sorted(of.items()))])


def test_a_sample_says_that_the_card_is_up_how_good_it_is_and_which_one() -> None:
    play = Play()
    play.take(CALM_VALUES, seconds=0.25)
    assert play.known == CALM_VALUES | {gm.UP: 1, gm.QUALITY: 1, gm.SAMPLES: 1, gm.SAMPLE_SECONDS: 0.25}
    play.take(HOT_VALUES, HOT)
    assert play.known[gm.SAMPLES] == 2


def test_a_hot_sample_ends_nothing_that_only_calm_ones_have() -> None:
    play = Play()
    play.take(CALM_VALUES)
    assert play.take(HOT_VALUES, HOT) == []
    assert play.known[gm.TEMPERATURE] == 60


def test_a_reading_that_is_gone_ends_with_the_first_sample_that_should_have_it() -> None:
    play = Play()
    play.take(CALM_VALUES)
    del play.known[gm.TEMPERATURE]
    assert play.take({k: v for k, v in CALM_VALUES.items() if k != gm.TEMPERATURE}) == [gm.TEMPERATURE]
    assert play.take({gm.UTILIZATION: 0.5}, HOT) == [gm.MEMORY_USED]
    assert play.take(CALM_VALUES) == [], "and it may come back"


def test_what_failed_for_once_is_a_hole_and_lowers_the_quality() -> None:
    play = Play()
    play.take(CALM_VALUES)
    three = {k: v for k, v in CALM_VALUES.items() if k != gm.TEMPERATURE}
    assert play.take(three, missing=1) == []
    assert play.known[gm.QUALITY] == 0.75
    assert play.take(CALM_VALUES) == []
    assert play.known[gm.QUALITY] == 1


def test_a_card_that_does_not_answer_has_no_readings_but_is_there() -> None:
    play = Play()
    play.take(CALM_VALUES)
    assert set(play.fail()) == {*CALM_VALUES, gm.SAMPLE_SECONDS}
    assert play.known == {gm.UP: 0, gm.QUALITY: 0, gm.SAMPLES: 1}
    assert play.fail() == []
    assert not play.series.up
    play.take(CALM_VALUES)
    assert play.known[gm.UP] == 1


def test_processes_are_those_of_agents_and_only_in_calm_samples() -> None:
    play = Play()
    of = "agent=tutor revision=r1 role=permanent"
    play.take(CALM_VALUES, processes={7: 100, 8: 50}, shares={7: 0.3, 8: 0.1})
    assert play.known[f"{gm.PROCESS_MEMORY} {of}"] == 100
    assert play.known[f"{gm.PROCESS_UTILIZATION} {of}"] == pytest.approx(0.3)
    assert play.take(HOT_VALUES, HOT, processes={7: 200}) == []
    assert play.known[f"{gm.PROCESS_MEMORY} {of}"] == 100
    assert play.take(CALM_VALUES, processes={}) == [f"{gm.PROCESS_MEMORY} {of}", f"{gm.PROCESS_UTILIZATION} {of}"]


def test_what_is_lacking_is_a_series_with_its_reason_until_it_is_given() -> None:
    play = Play()
    play.take(CALM_VALUES, lacking={gm.POWER: "no-permission"})
    lacking = f"{gm.LACKING} reading={gm.POWER} reason=no-permission"
    assert play.known[lacking] == 1
    assert play.take(CALM_VALUES, lacking={gm.POWER: "no-permission"}) == []
    assert play.take(CALM_VALUES | {gm.POWER: 1.0}, lacking={}) == [lacking]


def test_what_reports_is_what_a_goodbye_ends() -> None:
    play = Play()
    play.take(CALM_VALUES, processes={7: 100}, lacking={gm.POWER: "no-permission"})
    play.series.count_xids({(0, "device"): 2}, samples := {})
    assert sorted(samples.values()) == [0, 2]
    assert {name(key) for key in play.series.live} == {*play.known, *(name(key) for key in samples)}
    assert {name(key) for key in play.series.end()} == {*play.known, *(name(key) for key in samples)}
    assert not play.series.live


def test_the_monitor_itself_never_loads_the_binding_of_nvidias_library() -> None:
    program = "import sys, interlock.monitors.service; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
