"""A start-up list of ten plain ZeroMQ scripts with fixed ports: imported, started, one moved, one rolled back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from fleet_parts import free_ports, until

PLAIN = Path(__file__).parent / "agents" / "plain" / "service.py"
COUNT = 10
SHORT = """
[rules]
files = ["rules.yaml"]
[monitor]
gpu = "none"
[strategies.rapid]
baseline_s = 0.3
observation_s = 0.5
observe = { latency_passed = 100.0, latency_failed = 100.0, slow_passed = 1.0, slow_failed = 1.0 }
"""
BECAUSE = ("--because", "the test has no day")


def write_scripts(folder: Path, ports: list[int], **changes: object) -> None:
    folder.mkdir()
    for number in range(COUNT):
        port, health = ports[2 * number], ports[2 * number + 1]
        text = PLAIN.read_text()
        for name, value in {"PORT": port, "HEALTH_PORT": health, **changes}.items():
            text = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value!r}", text)
        (folder / f"service{number}.py").write_text(text)


@pytest.fixture(scope="module")
def fleet(make_module_fleet: Callable[..., Any]) -> Iterator[Any]:
    made = make_module_fleet({})
    ports = free_ports(2 * COUNT + 1)
    made.hosts = ["main"]
    made.service_ports = ports
    write_scripts(made.folder / "scripts", ports)
    lines = ["services:"]
    for number in range(COUNT):
        lines.append(f"  - name: Service_{number}")
        lines.append(f"    script_path: scripts/service{number}.py")
        lines.append(f'    port: "${{OFFSET}}+{ports[2 * number] - 3}"')
        lines.append(f'    health_check_port: "${{OFFSET}}+{ports[2 * number + 1] - 3}"')
        lines += ["    required: true", "    gpu_share: 0.5"]
        lines += [f"    dependencies: [Service_{number - 1}]"] if number else []
    (made.folder / "startup.yaml").write_text("\n".join(lines) + "\n")
    made.imported = made.cli("import", "startup.yaml", "--out", "fleet.toml", "--force", "--set", "OFFSET=3")
    text = made.path.read_text()
    for name in ("events", "feed", "telemetry_in", "telemetry_out"):
        text = re.sub(rf"(?m)^{name} = .*$", f'{name} = "tcp://127.0.0.1:{made.ports[name]}"', text)
    text = re.sub(r"(?m)^control = .*$", f'control = "tcp://127.0.0.1:{ports[-1]}"', text)
    made.path.write_text(text.replace('name = "fleet"', 'name = "fleet"\nstate = "state"') + SHORT)
    made.start()
    yield made
    assert made.stop() == 0
    made.nothing_left()


def endpoint(fleet: Any, number: int) -> str:
    return f"tcp://127.0.0.1:{fleet.service_ports[2 * number]}"


def test_what_is_not_understood_is_named_and_stays_as_a_comment(fleet: Any) -> None:
    assert fleet.imported.code == 0, fleet.imported
    assert "fleet.toml: 10 agents on host main" in fleet.imported.out
    assert "Service_3: gpu_share is not understood; it stays as a comment" in fleet.imported.err
    text = fleet.path.read_text()
    assert text.count("# not understood: gpu_share: 0.5") == COUNT
    assert 'depends = ["Service_8"]' in text


def test_all_ten_serve_at_their_own_ports(fleet: Any) -> None:
    with zmq.Context() as context:
        for number in range(COUNT):
            with context.socket(zmq.REQ) as socket:
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.RCVTIMEO, 20_000)
                socket.connect(endpoint(fleet, number))
                socket.send_json({"n": number})
                assert socket.recv_json() == {"status": "ok", "n": number, "answer": 2 * number, "revision": "v1"}


def add_revision(fleet: Any, number: int, name: str, **changes: object) -> None:
    """As a user does: the changed scripts in a folder of their own, and a revision that names it."""
    write_scripts(fleet.folder / name, fleet.service_ports, REVISION=name, **changes)
    text = fleet.path.read_text()
    first = re.search(rf"(?ms)^\[agents\.Service_{number}\.revisions\.v1\]\n(.*?)\n\n", text + "\n\n")
    assert first is not None
    more = first[1].replace('source = "scripts"', f'source = "{name}"')
    fleet.path.write_text(f"{text}\n[agents.Service_{number}.revisions.{name}]\n{more}\n")


def test_one_is_moved_while_a_client_asks(fleet: Any, clients: Any) -> None:
    add_revision(fleet, 4, "v2")
    with clients(endpoint(fleet, 4)) as load:
        done = fleet.migrate("Service_4", "v2", "rapid", *BECAUSE).done()
        assert done.code == 0, done
        load.served_by("v2")
    assert load.failures == []


def test_one_that_dies_over_its_requests_is_rolled_back(fleet: Any, clients: Any) -> None:
    add_revision(fleet, 5, "bad", DIES_AFTER=3)
    with clients(endpoint(fleet, 5)) as load:
        done = fleet.migrate("Service_5", "bad", "rapid", *BECAUSE).done()
        assert done.code == 10, done
        assert done.json["decided_by"] == "host process-died"
        until(lambda: load.last == "v1", "v1 answers again")
    assert all("bad" not in failure for failure in load.failures)


def test_the_scores_came_into_the_file_with_the_factors(fleet: Any) -> None:
    text = fleet.path.read_text()
    assert text.count("# risk 31: no_base, sockets, threads, health\n") == COUNT
    assert text.count('level = "high"') == COUNT
