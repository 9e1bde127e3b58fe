"""`interlock log` over a log file and over a live broker: the same events, the same words."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from interlock.broker import client, facts, topics
from interlock.broker.config import BrokerConfig, FleetConfig
from interlock.broker.errors import ConfigError, Unreachable
from interlock.broker.log import Draft, EventLog
from interlock.broker.planes import serve_planes
from interlock.broker.wire import Body, Header, encode
from interlock.coordinator import cli
from interlock.coordinator.logbook import Entry, Filter, moment, of_broker

Captured = pytest.CaptureFixture[str]

ENDPOINTS = ("events", "feed", "telemetry_in", "telemetry_out")
EVENTS: list[tuple[str, Body]] = [
    (topics.host_fact("alpha"), facts.HostUp(host="alpha", control="tcp://a:1", pid=1, boot="b", agents=["echo"])),
    (topics.migration_fact("echo"), facts.StageEntered(migration="echo-1", agent="echo", stage="canary")),
    (topics.migration_fact("page"), facts.StageEntered(migration="page-1", agent="page", stage="shadow")),
    (topics.host_fact("alpha"), facts.HostDown(host="alpha")),
]


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    path = tmp_path / "events.sqlite"
    log = EventLog(path)
    for number, (topic, body) in enumerate(EVENTS):
        header = Header(id=f"id-{number}", source="test", time=100.0)
        log.append([Draft(topic, header, encode(body))], now=200.0 + number)
    header = Header(id="new", source="newer", time=1.0)
    log.append([Draft("fact/new/", header, encode({"type": "unheard", "x": 1}))], now=300.0)
    log.close()
    return path


def listed(capsys: Captured, *options: str) -> list[int]:
    assert cli.main(["log", *options, "--json"]) == 0
    return [json.loads(line)["seq"] for line in capsys.readouterr().out.splitlines()]


def test_a_file_is_listed_and_filtered(log_file: Path, capsys: Captured) -> None:
    file = f"--file={log_file}"
    assert listed(capsys, file) == [1, 2, 3, 4, 5]
    assert listed(capsys, file, "--limit", "2") == [4, 5]
    assert listed(capsys, file, "--topic", "fact/host/", "--topic", "fact/new/") == [1, 4, 5]
    assert listed(capsys, file, "--type", "stage-entered", "--agent", "page") == [3]
    assert listed(capsys, file, "--since", "201", "--until", "202") == [2, 3]
    assert listed(capsys, file, "--after", "3", "--topic", "fact/host/") == [4]
    assert cli.main(["log", file]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert "alpha" in said[0]
    assert "unheard" in said[4]


def test_an_export_has_everything_of_each_event_one_a_line(log_file: Path, capsys: Captured) -> None:
    assert cli.main(["log", "export", "--file", str(log_file)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == {
        "seq": 2,
        "logged": 201.0,
        "topic": "fact/migration/echo/",
        "type": "stage-entered",
        "source": "test",
        "id": "id-1",
        "time": 100.0,
        "prev": 0,
        "v": 1,
        "body": {"type": "stage-entered", "migration": "echo-1", "agent": "echo", "stage": "canary", "note": ""},
    }
    assert rows[4]["body"] == {"type": "unheard", "x": 1}


def test_verify_tells_the_head_and_finds_a_change_against_it(log_file: Path, capsys: Captured) -> None:
    verify = ["log", "verify", "--file", str(log_file)]
    assert cli.main([*verify, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (told["whole"], told["events"], told["findings"]) == (True, 5, [])
    assert cli.main([*verify, "--expect", told["head"]]) == 0
    assert "5 events: whole" in capsys.readouterr().out
    with sqlite3.connect(log_file) as connection:
        connection.execute("UPDATE events SET body = x'80' WHERE seq = 3")
    connection.close()
    assert cli.main([*verify, "--json"]) == 13
    assert [(f["seq"], f["kind"]) for f in json.loads(capsys.readouterr().out)["findings"]] == [(3, "changed")]
    assert cli.main(verify) == 13
    assert "event 3 changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--file", "/nowhere/events.sqlite"], "no such file"),
        (["follow", "--file", "x"], "a file is not followed"),
        (["--limit", "0"], "1 or more"),
        (["--since", "yesterday"], "is no time"),
        (["verify", "--file", "LOG", "--expect", "5"], "NUMBER:HASH"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(
    options: list[str], said: str, log_file: Path, capsys: Captured
) -> None:
    assert cli.main(["log", *(str(log_file) if option == "LOG" else option for option in options)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_times_are_given_as_people_say_them() -> None:
    assert moment("10m", now=1000.0) == 400.0
    assert moment("12.5") == 12.5
    assert moment("2026-01-31T12:00:00+00:00") == 1769860800.0
    with pytest.raises(ConfigError):
        moment("10y")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="il-") as made:
        yield Path(made)


async def test_a_live_broker_is_listed_and_followed_by_replay(short_folder: Path, nursery: trio.Nursery) -> None:
    config = BrokerConfig(**{name: f"ipc://{short_folder}/{name}" for name in ENDPOINTS})
    fleet = FleetConfig(broker=config)
    said: list[Entry] = []
    async with client.open_bus(config, "cli/1") as bus:
        with pytest.raises(Unreachable):
            await of_broker(bus, fleet, Filter(), follow=False, timeout=0.1, say=said.append)
        await nursery.start(serve_planes, config, short_folder / "log")
        for topic, body in EVENTS:
            await bus.publish(topic, body)
        with trio.fail_after(30):
            await of_broker(bus, fleet, Filter(), follow=False, timeout=10, say=said.append)
            assert [entry.header.seq for entry in said] == [1, 2, 3, 4]
            said.clear()
            wanted = Filter(topics=("fact/migration/",), agent="echo")
            async with trio.open_nursery() as following:

                async def follow() -> None:
                    await of_broker(bus, fleet, wanted, follow=True, timeout=10, say=said.append)

                following.start_soon(follow)
                for topic, body in EVENTS:
                    await bus.publish(topic, body)
                while len(said) < 2:  # noqa: ASYNC110
                    await trio.sleep(0.02)
                following.cancel_scope.cancel()
    assert [entry.header.seq for entry in said] == [2, 6]
    assert said[0].type == "stage-entered"
