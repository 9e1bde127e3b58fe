"""Projects made for the purpose, with known answers: every factor alone, hidden, and only seemingly there.

`tests/assess/NAME/answers.json` has, by agent, the factors that hold and the places that show each.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import trio

from interlock.coordinator.assess.report import Assessed, Report
from interlock.coordinator.assess.scoring import FACTORS
from interlock.coordinator.assess.settings import Settings
from interlock.coordinator.assess_verb import examine

PROJECTS = Path(__file__).parents[1] / "assess"
NAMES = sorted(path.parent.name for path in PROJECTS.glob("*/answers.json"))
ALONE = {"sockets", "threads", "health", "database", "config", "long", "large", "no_base"}  # projects of these names


@cache
def reports() -> dict[str, Report]:
    """All of them, each as a tree of its own."""
    found: dict[str, Report] = {}

    async def run() -> None:
        for name in NAMES:
            found[name] = (await examine([PROJECTS / name], Settings(), workers=1))[1]

    trio.run(run)
    return found


def report(name: str) -> Report:
    return reports()[name]


def agent(project: str, name: str) -> Assessed:
    return next(each for each in report(project).agents if each.name == name)


def said(each: Assessed) -> dict[str, list[str]]:
    return {factor.factor: sorted({f"{place.file}:{place.line}" for place in factor.places}) for factor in each.factors}


def answers(name: str) -> dict[str, dict[str, list[str]]]:
    known: dict[str, dict[str, list[str]]] = json.loads((PROJECTS / name / "answers.json").read_text("utf-8"))
    return {each: {factor: sorted(places) for factor, places in found.items()} for each, found in known.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_agents_and_every_place_of_every_factor_are_as_known(name: str) -> None:
    assert {each.name: said(each) for each in report(name).agents} == answers(name)


def test_precision_and_recall_of_every_factor_are_1() -> None:
    right, invented, missed = Counter[str](), Counter[str](), Counter[str]()
    for name in NAMES:
        known = {
            (each, factor, place)
            for each, found in answers(name).items()
            for factor, places in found.items()
            for place in places
        }
        seen = {
            (each.name, factor, place)
            for each in report(name).agents
            for factor, places in said(each).items()
            for place in places
        }
        right.update(factor for _, factor, _ in known & seen)
        invented.update(factor for _, factor, _ in seen - known)
        missed.update(factor for _, factor, _ in known - seen)
    figures = {}
    for factor in FACTORS:
        assert right[factor] > 0, f"no project shows {factor}"
        figures[factor] = (
            right[factor] / (right[factor] + invented[factor]), right[factor] / (right[factor] + missed[factor])
        )  # fmt: skip
        print(f"{factor:10} precision {figures[factor][0]:.2f} recall {figures[factor][1]:.2f} of {right[factor]}")
    assert set(figures.values()) == {(1.0, 1.0)}


def test_each_factor_has_a_project_of_its_own() -> None:
    assert set(FACTORS) == ALONE
    for factor in FACTORS:
        assert {found for each in answers(factor).values() for found in each} == {factor}
