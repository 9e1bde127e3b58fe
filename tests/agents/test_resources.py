"""Is there room for two, and is what the agent needs there?"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
import trio

from interlock.agents import guard
from interlock.agents.measured import dependencies, folder_bytes, memory_available, read_cards, tree_memory
from interlock.agents.resources import SPARE_BYTES, Card, Needs, Room, cards_of, judge
from interlock.broker.config import AgentConfig
from interlock.broker.memory import MemoryBroker
from interlock.broker.samples import labels
from interlock.broker.sockets import open_sockets

GB = 1 << 30
CARD = Card("GPU-1", total=24 * GB, free=10 * GB, agent=8 * GB)


def room(available: int = 8 * GB, old: int | None = GB, cards: list[Card] | None = None) -> Room:
    return Room(available, old, cards)


@pytest.mark.parametrize(
    ("seen", "needs", "together", "apart", "says"),
    [
        (room(), Needs(), "yes", True, "8192 MiB available, 1126 MiB needed"),
        (room(GB), Needs(), "no", True, "as the old one takes"),
        (room(), Needs(memory=8 * GB), "no", True, "as the fleet file says"),
        (room(), Needs(memory=20 * GB), "no", False, "20480 MiB needed"),
        (Room(None, GB), Needs(), "unknown", False, "inconclusive"),
        (room(old=None), Needs(), "yes", True, "256 MiB needed"),
        (room(cards=[]), Needs(), "yes", True, "8192 MiB available"),
        (room(cards=[CARD]), Needs(), "yes", True, "10240 MiB free, 9011 MiB needed"),
        (room(cards=[CARD]), Needs(gpu_memory=16 * GB), "no", True, "10240 MiB free on GPU-1, 16384 MiB needed"),
        (room(cards=[CARD]), Needs(gpu_memory=20 * GB), "no", False, "20480 MiB needed"),
        (room(cards=None), Needs(gpu=True), "unknown", True, "inconclusive: it uses a GPU, and nothing is known"),
        (room(cards=[]), Needs(gpu_memory=GB), "unknown", True, "inconclusive: it uses a GPU, and nothing is known"),
        (room(cards=[Card("GPU-1", 24 * GB, 20 * GB)]), Needs(gpu=True), "unknown", True, "gpu_memory_mb = N"),
        (room(cards=[Card("GPU-1", 24 * GB, 20 * GB)]), Needs(gpu_memory=4 * GB), "yes", True, "20480 MiB free"),
        (room(cards=[Card("GPU-1", 24 * GB, 20 * GB)]), Needs(), "yes", True, "8192 MiB available"),  # another's card
    ],
)
def test_two_fit_or_not_and_the_reason_is_told(seen: Room, needs: Needs, together: str, apart: bool, says: str) -> None:
    found = judge(seen, needs)
    assert (found.together, found.apart) == (together, apart)
    assert any(says in finding.reason for finding in found.findings), found.findings
    assert all(finding.ok for finding in found.findings) is (together == "yes")


def test_a_share_that_nobody_has_seen_is_not_called_known() -> None:
    unseen = Card("GPU-1", 24 * GB, 10 * GB)
    assert not judge(room(cards=[unseen]), Needs(gpu_memory=16 * GB)).known
    assert not judge(room(cards=[unseen]), Needs(gpu=True)).known
    assert judge(room(cards=[CARD]), Needs(gpu_memory=16 * GB)).known
    assert judge(room(cards=[unseen]), Needs(gpu_memory=4 * GB)).known  # it fits in any case
    assert judge(room(cards=[]), Needs()).known


def test_the_rest_of_the_machine_keeps_something() -> None:
    assert judge(room(GB + SPARE_BYTES - 1, old=0), Needs(memory=GB)).together == "no"
    assert judge(room(GB + SPARE_BYTES, old=0), Needs(memory=GB)).together == "yes"


def test_two_cards_of_one_agent_each_get_their_part() -> None:
    cards = [Card("A", 24 * GB, 20 * GB, agent=3 * GB), Card("B", 24 * GB, 2 * GB, agent=GB)]
    assert judge(room(cards=cards), Needs()).together == "yes"
    assert judge(room(cards=cards), Needs(gpu_memory=8 * GB)).together == "no"  # a quarter of 8 GiB on B


def test_cards_are_read_from_fresh_samples_of_the_agents_permanent_revision() -> None:
    def of(name: str, value: float, **rest: str) -> tuple[object, tuple[float, float]]:
        return labels(name, host="alpha", uuid="U", gpu="0", **rest), (value, 100.0)

    samples = dict(
        [
            of("gpu_memory_total_bytes", 24.0),
            of("gpu_memory_free_bytes", 10.0),
            of("gpu_process_memory_bytes", 8.0, agent="tutor", revision="r1", role="permanent"),
            of("gpu_process_memory_bytes", 4.0, agent="tutor", revision="r2", role="candidate"),
            of("gpu_process_memory_bytes", 2.0, agent="pilot", revision="r1", role="permanent"),
        ]
    )
    assert cards_of(samples, "tutor", 101.0) == [Card("U", 24, 10, 8)]  # type: ignore[arg-type]
    assert cards_of(samples, "tutor", 200.0) == []  # type: ignore[arg-type]


async def test_a_monitor_that_has_gpus_or_says_that_there_are_none_is_heard_at_once() -> None:
    broker = MemoryBroker()
    bus = broker.bus("host/alpha")
    monitor = broker.bus("monitor/alpha").telemetry("alpha", "monitor")
    with trio.fail_after(20):
        monitor.send({labels("host_load1", host="alpha"): 1.0}, time=time.time())
        assert await read_cards(bus, "alpha", "tutor") == []
        card = {"host": "alpha", "gpu": "0", "uuid": "U"}
        total, free = labels("gpu_memory_total_bytes", **card), labels("gpu_memory_free_bytes", **card)
        monitor.send({total: 24.0, free: 9.0}, time=time.time())
        assert await read_cards(bus, "alpha", "tutor") == [Card("U", 24, 9, 0)]


def test_the_memory_of_an_instance_is_that_of_its_whole_tree() -> None:
    child = "x = bytearray(40 << 20); print('up', flush=True); input()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    env = {**os.environ, guard.INSTANCE_VARIABLE: "test-memory:1"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        held = tree_memory("test-memory:1", process.pid)
        assert held is not None
        assert 40 << 20 < held < 400 << 20
    finally:
        process.communicate(b"\n", timeout=20)
    assert tree_memory("test-memory:1", process.pid) is None
    assert (memory_available() or 0) > 0


def test_a_folder_is_as_large_as_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(bytes(1000))
    (tmp_path / "b").write_bytes(bytes(24))
    assert folder_bytes(tmp_path) == 1024
    assert folder_bytes(tmp_path / "none") == 0


# --- dependencies


@contextmanager
def page(status: int) -> Iterator[str]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def agent(endpoint: str) -> AgentConfig:
    return msgspec.convert({"host": "beta", "endpoint": endpoint, "serve": "r1", "revisions": {}}, AgentConfig)


async def test_dependencies_are_agents_here_or_elsewhere_and_endpoints() -> None:
    with page(200) as good, page(503) as bad, socket.socket() as listening, socket.socket() as unbound:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        unbound.bind(("127.0.0.1", 0))
        there = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        nowhere = f"tcp://127.0.0.1:{unbound.getsockname()[1]}"
        agents = {"far": agent(there), "gone": agent(nowhere), "web": agent(bad)}
        needed = ["near", "sick", "far", "gone", "web", there, nowhere, good, bad, "stranger", "tcp://no-port"]
        with trio.fail_after(30):
            async with open_sockets() as sockets:
                up = {"near": True, "sick": False}.get
                found = await dependencies(needed, agents, up, sockets)
    assert {finding.check.removeprefix("depends "): finding.ok for finding in found} == {
        "near": True, "sick": False, "far": True, "gone": False, "web": True, there: True, nowhere: False, good: True,
        bad: False, "stranger": False, "tcp://no-port": False,
    }  # fmt: skip
    reasons = {finding.check.removeprefix("depends "): finding.reason for finding in found}
    assert "503" in reasons[bad]
    assert "no agent 'stranger'" in reasons["stranger"]
