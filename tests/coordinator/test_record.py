"""The record of a migration: what the log says of it, in one object, as a page and in words."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from interlock.broker import commands, facts, topics
from interlock.broker.commands import Breach
from interlock.broker.errors import ConfigError
from interlock.coordinator import records
from interlock.coordinator.record import MOMENTS, Folding, Record
from interlock.coordinator.report_page import page
from interlock.coordinator.report_text import explain, report

EXPR = "agent_response_seconds > 0.5"
HOSTILE = "<script>alert(1)</script>\"'&]]>"


def track(name: str, values: list[float], **labels: str) -> facts.Track:
    times = [1000.0 + number / 10 for number in range(len(values))]
    return facts.Track(
        labels={"__name__": name, "agent": "tutor", "host": "alpha", **labels}, times=times, values=values
    )


SERIES = [
    track("agent_response_seconds", [0.1, 0.1, 0.1], revision="r1", role="permanent", quantile="0.95"),
    track("agent_response_seconds", [0.1, 0.6, 0.9], revision="r2", role="candidate", quantile="0.95"),
    track("agent_requests_total", [100.0, 110.0, 130.0], revision="r1", role="permanent"),
    track("agent_requests_total", [0.0, 5.0, 12.0], revision="r2", role="candidate"),
    track("gpu_memory_used_ratio", [0.5, 0.5, 0.5]),
]


def alert(play: Any, **rest: Any) -> None:
    body = facts.AlertFiring(
        **{
            "rule": "slow", "labels": {"agent": "tutor", "role": "candidate"}, "value": 0.9, "action": "rollback",
            "sample_time": play.now, "summary": "tutor is slow", "migrations": list(play.core.migrations),
            "expr": EXPR, **rest,
        }
    )  # fmt: skip
    play.say(topics.alert_fact("slow"), body)


def undone(play: Any, **rest: Any) -> Any:
    """A migration in its canary step that rule `slow` rolls back."""
    play.to_canary()
    play.later(5)
    alert(play, **rest)
    breach = Breach(by="rule slow", reason=rest.get("summary", "tutor is slow"), value=0.9, sample_time=play.now)
    migration = play.migration
    back = commands.RollBack(
        migration=migration.id, agent="tutor", epoch=migration.started.epoch, breach=breach, issued=play.now
    )
    play.say("rollback/alpha/", back, "by-rules")
    play.later(0.05)
    series = facts.SeriesRecorded(migration=migration.id, agent="tutor", series=SERIES)
    play.say(topics.record("tutor"), series)
    play.rolled_back()
    return play


def folded(play: Any) -> Record:
    number = next(e.body.migration for e in play.events if isinstance(e.body, facts.MigrationStarted))
    folding = Folding(number)
    for event in play.events:
        folding.apply(event)
    return folding.record()


def test_a_rollback_by_a_rule_is_told_with_its_times_its_rule_and_the_series_of_its_expression(story: Any) -> None:
    record = folded(undone(story()))
    assert (record.agent, record.previous, record.to, record.outcome) == ("tutor", "r1", "r2", "rolled-back")
    assert (record.asked_by, record.decided_by) == ("operator/ann", "rule slow")
    assert [span.stage for span in record.stages] == ["prepare", "infrastructure", "integration"]
    assert all(span.end is not None for span in record.stages)
    assert record.stages[0].steps == ["prepare done after 0.00 s"]
    (fired,) = record.rules
    assert (fired.rule, fired.expr, fired.decided) == ("slow", EXPR, True)
    assert record.deciding == ["agent_response_seconds"]
    assert record.rollback is not None
    assert record.rollback.routed_ms == pytest.approx(50)
    assert record.requests == {"r1": {"asked": 30.0}, "r2": {"asked": 12.0}}
    assert record.gaps == []
    assert [moment.seq for moment in record.timeline] == sorted(moment.seq for moment in record.timeline)


def test_a_commit_is_told_with_its_checks_deviations_and_who_led_it(story: Any) -> None:
    play = story(strategy={"canary": []})
    play.migrate(because="it must be")
    play.done(compared=7)
    play.done()
    play.done()
    play.steer("pause", "lunch")
    play.steer("resume")
    play.later(12)
    play.steer("commit", "the old one is dying")
    play.done()
    record = folded(play)
    assert (record.outcome, record.decided_by, record.because) == ("committed", "operator commit", "it must be")
    assert [led.what for led in record.led] == ["pause", "resume", "commit"]
    assert record.deviations[0].because == "the old one is dying"
    assert record.evidence["0-prepare"] == {"compared": 7}
    assert record.gaps == ["no series were recorded"]


def test_a_shadow_that_differs_is_told_as_the_check_that_decided(story: Any) -> None:
    play = story(strategy={"shadow_requests": 10})
    play.migrate()
    play.done()
    play.done()
    play.failed("shadow")
    play.rolled_back()
    record = folded(play)
    assert record.decided_by == "check shadow"
    assert record.stages[-1].steps == ["shadow failed: check shadow after 0.00 s"]
    assert any("check shadow decided (event" in sentence for sentence in explain(record))


def test_other_migrations_and_leases_are_not_in_it(story: Any) -> None:
    play = undone(story())
    play.migrate()
    play.done()
    first = folded(play)
    assert {"tutor-3"} == {first.migration}
    assert not any("tutor-2" in moment.text for moment in first.timeline)
    assert first.timeline[-1].type == "migration-ended"


def test_a_record_is_the_same_wherever_it_is_folded_and_with_a_cut_log_it_says_what_is_missing(story: Any) -> None:
    play = undone(story())
    assert folded(play) == folded(play)
    folding = Folding("tutor-3")
    for event in play.events[-3:]:
        folding.apply(event)
    record = folding.record()
    assert record.outcome == "rolled-back"
    assert record.gaps[0] == "the log does not hold its beginning any more"
    page(record)
    list(report(record))
    explain(record)


def test_a_timeline_has_an_end(story: Any) -> None:
    play = story().to_canary()
    for number in range(MOMENTS + 10):
        play.say(topics.host_fact("alpha"), facts.InstanceStarted(
            host="alpha", agent="tutor", instance=f"i{number}", revision="r1", role="permanent", pid=1, started=1.0
        ))  # fmt: skip
    record = folded(play)
    assert len(record.timeline) == MOMENTS
    assert any("more events concern it" in gap for gap in record.gaps)


# --- in words


def test_an_explanation_has_the_event_the_samples_and_the_rule_that_decided(story: Any) -> None:
    record = folded(undone(story()))
    told = "\n".join(explain(record))
    assert "operator/ann asked for it (event 3)" in told
    assert f"Rule slow fired (event {record.rules[0].seq}). Its expression '{EXPR}' was true of" in told
    assert "agent_response_seconds (revision r2, quantile 0.95) went 0.1, 0.6, 0.9" in told
    assert "50 ms after the first sample that showed it" in told
    assert "It ended as rolled-back" in told


def test_a_report_has_everything_but_the_samples(story: Any) -> None:
    lines = [text for text, _ in report(folded(undone(story())))]
    assert lines[0].startswith("tutor-3: tutor on alpha, r1 -> r2, staged: ROLLED-BACK after")
    text = "\n".join(lines)
    for part in ("Stages", "Rules", "Rollback", "Requests", "5 series were recorded; what decided: agent_response"):
        assert part in text


# --- as a page


class Tags(HTMLParser):
    """Whether every tag that is opened is closed, and what tags there are."""

    EMPTY = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.loads += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_is_whole_loads_nothing_and_draws_both_revisions(story: Any) -> None:
    text = page(folded(undone(story())))
    tags = parsed(text)
    assert "script" not in tags.seen
    assert tags.loads == []
    assert "url(" not in text
    charts = re.findall(r"<svg xmlns.*?</svg>", text, flags=re.DOTALL)
    assert len(charts) == 2  # what decided, and the requests
    for chart in charts:
        root = ElementTree.fromstring(chart)
        lines = root.findall("{http://www.w3.org/2000/svg}polyline")
        assert len(lines) == 2
        assert len({line.get("stroke") for line in lines}) == 2


def test_what_names_and_reasons_contain_is_text_on_the_page(story: Any) -> None:
    play = undone(story(), summary=HOSTILE, expr=HOSTILE, labels={HOSTILE: HOSTILE})
    record = folded(play)
    series = [facts.Track(labels={"__name__": HOSTILE, HOSTILE: HOSTILE}, times=[1.0], values=[1.0])]
    record = msgspec.structs.replace(
        record, agent=HOSTILE, to=HOSTILE, outcome=HOSTILE, series=series, deciding=[HOSTILE], strategy=HOSTILE,
        led=[msgspec.structs.replace(led, by=HOSTILE) for led in record.led],
        requests={HOSTILE: {HOSTILE: 1.0}}, gaps=[HOSTILE],
    )  # fmt: skip
    text = page(record)
    tags = parsed(text)
    assert "script" not in tags.seen
    assert "<script" not in text
    assert tags.loads == []
    for chart in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(chart)


def test_an_empty_record_and_a_series_of_one_value_can_be_drawn() -> None:
    parsed(page(Record(migration="m", agent="a")))
    flat = facts.Track(labels={"__name__": "agent_requests_total", "revision": "x"}, times=[5.0], values=[0.0])
    parsed(page(Record(migration="m", agent="a", series=[flat])))


# --- as a file


def test_a_record_comes_back_from_its_file(tmp_path: Path, story: Any) -> None:
    record = folded(undone(story()))
    records.save(tmp_path / "records", record)
    assert records.load(tmp_path / "records" / "tutor-3.json") == record
    assert (tmp_path / "records" / "tutor-3.html").read_text() == page(record)
    assert {path.name for path in (tmp_path / "records").iterdir()} == {"tutor-3.json", "tutor-3.html"}


def test_the_oldest_records_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "KEPT", 3)
    for number in range(5):
        records.save(tmp_path, Record(migration=f"m-{number}", agent="a"))
        (tmp_path / f"m-{number}.json").touch()
        os.utime(tmp_path / f"m-{number}.json", (number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"m-{number}.{kind}" for number in (2, 3, 4) for kind in ("html", "json")
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no record"),
        ("[1, 2]", "is no record"),
        ('{"migration": "m"}', "is no record"),
        ('{"migration": "m", "agent": 3}', "is no record"),
        ('{"migration": "m", "agent": "a", "format": 99}', "is a record of format 99"),
    ],
)
def test_what_is_no_record_is_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        records.load(path)
    with pytest.raises(ConfigError, match="can't be read"):
        records.load(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "x" * 300])
def test_a_migration_whose_id_is_no_file_name_is_not_written(name: str) -> None:
    assert not records.is_name(name)
