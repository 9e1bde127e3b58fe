"""An agent that keeps state in memory is moved, and rolled back, while clients change its state: nothing is lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq


class Keepers:
    """Clients that each have numbers kept; what was acknowledged is in `kept`."""

    def __init__(self, endpoint: str, count: int = 2) -> None:
        self.endpoint = endpoint
        self.kept: list[int] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(k, count), daemon=True) for k in range(count)]

    def __enter__(self) -> Keepers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self, n: int, step: int) -> None:
        with zmq.Context() as context, context.socket(zmq.REQ) as sock:
            sock.setsockopt(zmq.LINGER, 0)
            sock.connect(self.endpoint)
            while not self._stop.wait(0.01):
                n += step
                sock.send_json({"action": "keep", "n": n})
                if not sock.poll(25_000):
                    self.failures.append(f"{n}: no answer")
                    return
                answer = json.loads(sock.recv())
                if answer.get("answer") == 2 * n:
                    self.kept.append(n)
                else:
                    self.failures.append(f"{n}: {answer}")


def kept(endpoint: str) -> dict[int, int]:
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(endpoint)
        sock.send_json({"action": "kept"})
        assert sock.poll(25_000)
        return dict(json.loads(sock.recv())["kept"])


@pytest.fixture(scope="module")
def fleet(make_module_fleet: Callable[..., Any]) -> Iterator[Any]:
    made = make_module_fleet({"keep": "alpha"})
    made.start()
    yield made
    assert made.stop() == 0, made.log
    made.nothing_left()


def test_the_new_revision_has_all_that_was_acknowledged_and_the_plan_said_so(fleet: Any, clients: Any) -> None:
    plan = fleet.cli("plan", "keep", "--to", "r2", "--strategy", "rapid")
    assert "hand over the state in memory" in plan.out, plan
    assert "canary is not possible: it keeps state in memory" in plan.out
    with Keepers(fleet.endpoint("keep")) as keepers, clients(fleet.endpoint("keep")):
        done = fleet.migrate("keep", "r2").done()
    assert done.code == 0, done
    assert keepers.failures == []
    assert kept(fleet.endpoint("keep")) == dict.fromkeys(keepers.kept, 1)
    report = fleet.cli("report", "keep").out
    assert "hand-over done (" in report
    assert "requests waited" in report


def test_a_rollback_brings_the_newer_state_back(fleet: Any, clients: Any) -> None:
    fleet.calm()
    old = fleet.serving("keep")
    before = kept(fleet.endpoint("keep"))
    since = len(fleet.events.events)
    with Keepers(fleet.endpoint("keep")) as keepers, clients(fleet.endpoint("keep")) as asking:
        command = fleet.migrate("keep", "odd", "staged")
        fleet.observed("keep", since)
        asking.served_by("odd")
        fleet.trigger("keep", "bad")
        done = command.done()
        asking.served_by(old)
    assert done.code == 10, done
    assert keepers.failures == asking.failures == []
    found = kept(fleet.endpoint("keep"))
    wanted = dict(before)
    for n in keepers.kept:
        wanted[n] = wanted.get(n, 0) + 1
    assert found == wanted
    assert "the newer state was handed back" in fleet.cli("explain", "keep").out.lower()
