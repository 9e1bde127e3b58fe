"""What tests of a whole fleet have in hand: the command line, a reader of the bus, clients that check answers.

Used by fleet/conftest.py, whose fleets they speak to.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import subprocess
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

INTERLOCK = str(Path(sysconfig.get_path("scripts")) / "interlock")
WAIT_S = 40.0  # for anything: the machine may be busy; what is waited for takes a second or two
ANSWER_S = 25.0  # for one answer: so long that what misses it hangs, however busy the machine is
PAUSE_S = 0.02  # between requests of one client
PORTS = range(12_000, 32_000)  # below the range from which the system takes the ports of outgoing connections

T = TypeVar("T")


def until(found: Callable[[], T], what: str | Callable[[], str], timeout: float = WAIT_S, *, every: float = 0.02) -> T:
    """The first value of `found` that is true."""
    deadline = time.monotonic() + timeout
    while not (value := found()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(every)
    return value


def free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = random.choice(PORTS)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


# --- the command line


class Done:
    """A command that has ended."""

    def __init__(self, argv: Sequence[str], code: int, out: str, err: str) -> None:
        self.argv, self.code, self.out, self.err = argv, code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])

    def __repr__(self) -> str:
        return f"{' '.join(self.argv)} -> {self.code}\n{self.out}{self.err}"


class Running:
    """A command on its way."""

    def __init__(self, argv: Sequence[str], env: dict[str, str], cwd: Path) -> None:
        self.argv = argv
        self.process = subprocess.Popen(
            argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def done(self, timeout: float = WAIT_S) -> Done:
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"{' '.join(self.argv[1:])} did not end in {timeout:g} s:\n{out}{err}")
        return Done(self.argv[1:], self.process.returncode, out, err)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class Watcher:
    """`interlock watch --events --json --after 0`: every event of the fleet, also while the broker is restarted."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.events: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in iter(self._line, ""):
            self.events.append(json.loads(line))
            if os.environ.get("FLEET_EVENTS"):
                with open(os.environ["FLEET_EVENTS"], "a") as file:
                    file.write(line)

    def _line(self) -> str:
        assert self.running.process.stdout is not None
        try:
            line = self.running.process.stdout.readline()
        except ValueError:  # closed
            return ""
        return line if line.endswith("\n") else ""

    def find(self, type: str, since: int = 0, **wanted: Any) -> dict[str, Any] | None:
        """The first event of a type from the `since`-th on whose body has these values."""
        for event in self.events[since:]:
            body: dict[str, Any] = event.get("body", {})
            if body.get("type") == type and all(body.get(name) == value for name, value in wanted.items()):
                return body
        return None

    def wait(self, type: str, since: int = 0, **wanted: Any) -> dict[str, Any]:
        return until(lambda: self.find(type, since, **wanted), lambda: f"{type} {wanted}; last: {self.last()}")

    def last(self, count: int = 12) -> str:
        return "\n".join(str(event.get("body", event)) for event in self.events[-count:])


# --- clients


class Clients:
    """Threads that each ask one agent again and again, and check every answer."""

    def __init__(self, endpoint: str, count: int = 2, *, answer_s: float = ANSWER_S) -> None:
        self.endpoint = endpoint
        self.answer_s = answer_s
        self.revisions: Counter[str] = Counter()
        self.failures: list[str] = []
        self.last = ""
        self._stop = threading.Event()
        self._context = zmq.Context()
        ask = self._ask_http if endpoint.startswith("http") else self._ask_zmq
        self._threads = [threading.Thread(target=ask, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def asked(self) -> int:
        return self.revisions.total()

    def __enter__(self) -> Clients:
        self.more()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(self.answer_s + 5)
        self._context.destroy(linger=0)

    def more(self, count: int = 5) -> None:
        """Wait until so many more requests were answered."""
        goal = self.asked + count
        until(
            lambda: self.asked >= goal, lambda: f"{count} answers from {self.endpoint}; failures: {self.failures[-3:]}"
        )

    def served_by(self, revision: str) -> None:
        """Wait until this revision, and from then on no other, answers."""

        def only() -> bool:
            before = self.revisions.copy()
            goal = self.asked + 10
            until(lambda: self.asked >= goal, lambda: f"answers from {self.endpoint}")
            return set(self.revisions - before) == {revision}

        until(only, lambda: f"{revision} answers alone at {self.endpoint}, answers so far: {self.revisions}")

    def _check(self, n: int, answer: dict[str, Any]) -> None:
        if answer.get("n") != n or answer.get("answer") != 2 * n:
            self.failures.append(f"{n}: {answer}")
            time.sleep(0.1)  # errors may come fast
        else:
            self.last = answer["revision"]
            self.revisions[answer["revision"]] += 1

    def _ask_zmq(self) -> None:
        sock: zmq.Socket[bytes] | None = None
        n = 0
        while not self._stop.wait(PAUSE_S):
            if sock is None:
                sock = self._context.socket(zmq.REQ)
                sock.setsockopt(zmq.LINGER, 0)
                sock.setsockopt(zmq.RCVTIMEO, int(self.answer_s * 1000))
                sock.connect(self.endpoint)
            n += 1
            try:
                sock.send_json({"action": "double", "n": n})
                self._check(n, sock.recv_json())  # type: ignore[arg-type]
            except zmq.Again:
                self.failures.append(f"{n}: no answer within {self.answer_s:g} s")
                sock.close()
                sock = None
        if sock is not None:
            sock.close()

    def _ask_http(self) -> None:
        place = self.endpoint.removeprefix("http://")
        connection = http.client.HTTPConnection(place, timeout=self.answer_s)
        n = 0
        while not self._stop.wait(PAUSE_S):
            n += 1
            try:
                connection.request("GET", f"/double?n={n}")
                response = connection.getresponse()
                body = response.read()
                self._check(n, json.loads(body) if response.status == 200 else {"status": response.status})
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.failures.append(f"{n}: {error!r}")
                connection.close()
                time.sleep(0.1)
        connection.close()
