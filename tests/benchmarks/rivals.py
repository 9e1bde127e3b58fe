"""The same breach through what people run otherwise, if installed: Prometheus and Alertmanager, and Erlang's heart.

Both from Debian: apt-get install prometheus prometheus-alertmanager erlang-base. Used by bench_rollback.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import zmq

UP_S = 30.0  # for a program to start
ALERT_S = 30.0  # for an alert to come, or to end: it takes a few seconds
POLL_S = 0.005

OLD = """
import sys, zmq
socket = zmq.Context().socket(zmq.REP)
socket.bind(sys.argv[1])
while True:
    socket.send(socket.recv())
"""

PROMETHEUS = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
alerting: {{alertmanagers: [{{static_configs: [{{targets: ['127.0.0.1:{alertmanager}']}}]}}]}}
rule_files: [rules.yml]
scrape_configs: [{{job_name: bench, static_configs: [{{targets: ['127.0.0.1:{exporter}']}}]}}]
"""
RULES = "groups: [{name: bench, rules: [{alert: breach, expr: bench_badness > 0.5}]}]\n"
ALERTMANAGER = """
route: {{receiver: hook, group_wait: 0s, group_interval: 1s, repeat_interval: 1h}}
receivers: [{{name: hook, webhook_configs: [{{url: 'http://127.0.0.1:{exporter}/', send_resolved: true}}]}}]
"""


def spread(values: list[float]) -> dict[str, float]:
    """Of seconds, in milliseconds."""
    ordered = sorted(value * 1000 for value in values)
    if not ordered:
        return {}
    last = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {"p50": round(statistics.median(ordered), 2), "p99": round(last, 2), "max": round(ordered[-1], 2)}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(found: Callable[[], Any], what: str, timeout: float) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := found()):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {timeout:g} s")
        time.sleep(POLL_S)
    return value


# --- Prometheus, Alertmanager, and a webhook that starts the old program again


class Hook:
    """What is scraped, and what is called."""

    def __init__(self) -> None:
        self.badness = 0.0
        self.filler = ""  # what is scraped beside it
        self.status = ""  # of the last call: firing or resolved
        hook = self

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = f"bench_badness {hook.badness}\n{hook.filler}".encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                hook.status = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["status"]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])


@contextmanager
def running(*argv: str, log: Path) -> Any:
    with open(log, "ab") as out, subprocess.Popen(argv, stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.kill()


def answers(endpoint: str) -> bool:
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(endpoint)
        sock.send(b"?")
        return bool(sock.poll(int(UP_S * 1000)))


def prometheus(rounds: int, folder: Path, filler: str = "", rules: str = RULES) -> dict[str, Any]:
    """From the breach to the webhook, and to the old program answering. `filler`: series that are scraped beside it."""
    if not (shutil.which("prometheus") and shutil.which("prometheus-alertmanager")):
        return {"skipped": "not installed: prometheus, prometheus-alertmanager"}
    folder.mkdir()
    hook = Hook()
    hook.filler = filler
    ports = {"prometheus": free_port(), "alertmanager": free_port(), "exporter": hook.port}
    (folder / "rules.yml").write_text(rules)
    (folder / "prometheus.yml").write_text(PROMETHEUS.format(**ports))
    (folder / "alertmanager.yml").write_text(ALERTMANAGER.format(**ports))
    called: list[float] = []
    restored: list[float] = []
    with ExitStack() as stack:
        stack.callback(hook.server.shutdown)
        stack.enter_context(running(
            "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address=127.0.0.1:{ports['prometheus']}", log=folder / "log",
        ))  # fmt: skip
        stack.enter_context(running(
            "prometheus-alertmanager", f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/am",
            f"--web.listen-address=127.0.0.1:{ports['alertmanager']}", "--cluster.listen-address=", log=folder / "log",
        ))  # fmt: skip
        for _ in range(rounds):
            began, hook.badness = time.time(), 1.0
            until(lambda: hook.status == "firing", f"the webhook\n{(folder / 'log').read_text()[-2000:]}", ALERT_S)
            called.append(time.time() - began)
            endpoint = f"tcp://127.0.0.1:{free_port()}"
            with running(sys.executable, "-c", OLD, endpoint, log=folder / "log"):
                if not answers(endpoint):
                    raise SystemExit("the old program does not answer")
                restored.append(time.time() - began)
            hook.badness = 0.0
            until(lambda: hook.status == "resolved", "the end of the alert", ALERT_S)
    return {
        "rounds": rounds,
        "scrape_and_evaluation_s": 1.0,
        "breach_to_webhook_ms": spread(called),
        "breach_to_old_program_answering_ms": spread(restored),
    }


# --- heart


def heart(rounds: int, folder: Path) -> dict[str, Any]:
    """From a killed Erlang release to the old one running, started by heart."""
    if not shutil.which("erl"):
        return {"skipped": "not installed: erlang-base"}
    folder.mkdir()
    restored = [_one_heart(folder / str(number)) for number in range(rounds)]
    return {"rounds": rounds, "killed_to_old_release_running_ms": spread(restored)}


def _one_heart(folder: Path) -> float:
    folder.mkdir()

    def says(name: str) -> str:
        """Erlang that writes its process id, whole at once."""
        path = folder / name
        return f'file:write_file("{path}.new", os:getpid()), file:rename("{path}.new", "{path}").'

    def started(name: str) -> int:
        until((folder / name).exists, f"erl {name}", UP_S)
        return int((folder / name).read_text())

    again = folder / "again.sh"
    again.write_text(f"#!/bin/sh\nexec erl -noshell -eval '{says('old')}' >/dev/null 2>&1 </dev/null &\n")
    again.chmod(0o755)
    env = {**os.environ, "HEART_COMMAND": str(again)}
    argv = ["erl", "-heart", "-noshell", "-eval", says("new")]
    with open(folder / "log", "wb") as log, subprocess.Popen(argv, env=env, stdout=log, stderr=log) as process:
        os.kill(started("new"), signal.SIGKILL)
        began = time.time()
        process.wait()  # heart waits for 10 s for the end of one that nobody reaps
        old = started("old")
        took = time.time() - began
    with suppress(ProcessLookupError):
        os.kill(old, signal.SIGKILL)
    return took
