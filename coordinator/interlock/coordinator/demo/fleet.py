"""The demo's fleet file: two agents on one host, a simulated GPU, and short stages."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

SOURCES = Path(__file__).parent / "sources"

FLEET = """\
# The fleet of `interlock demo`. Strategies are shortened so that a migration takes seconds.
name = "demo"
state = "state"

[broker]
events = "tcp://127.0.0.1:{events}"
feed = "tcp://127.0.0.1:{feed}"
telemetry_in = "tcp://127.0.0.1:{telemetry_in}"
telemetry_out = "tcp://127.0.0.1:{telemetry_out}"

[rules]
files = ["rules.yaml"]

[monitor]
gpu = "simulated"
simulated = [{{ name = "simulated 24 GB", memory_bytes = 25769803776 }}]

[strategies.staged]
baseline_s = 1.5
shadow_requests = 60
shadow_s = 15.0
canary = [{{ share = 0.25, seconds = 1.0 }}]
observation_s = 4.0
# Four seconds of traffic on a machine that may be busy: only what is plainly worse counts.
observe = {{ latency_passed = 1.0, latency_failed = 2.0, latency_slack_s = 0.05, slow_passed = 0.5, slow_failed = 0.8 }}

[hosts.alpha]
control = "tcp://127.0.0.1:{control}"

# An agent written as a class. Each revision is recorded whole, and runs from the record.
[agents.tutor]
host = "alpha"
endpoint = "tcp://127.0.0.1:{tutor}"
serve = "r1"
compare = {{ ignore = ["revision"] }}

[agents.tutor.revisions]
r1 = {{ source = "tutor", entry = "r1:Scanning" }}
r2 = {{ source = "tutor", entry = "r2:Indexed" }}
r3 = {{ source = "tutor", entry = "r3:Hungry" }}
r4 = {{ source = "tutor", entry = "r4:Crashing" }}
r5 = {{ source = "tutor", entry = "r5:Slow" }}
r6 = {{ source = "tutor", entry = "r6:Wrong" }}

# A program as it is: a REP socket on one port, health on another. Nothing in it knows of Interlock.
[agents.wordbook]
host = "alpha"
endpoint = "tcp://127.0.0.1:{wordbook}"
serve = "v1"
idempotent = ["define"]

[agents.wordbook.revisions.v1]
source = "wordbook/v1"
command = ["{{python}}", "server.py", "{{port}}", "{{health_port}}"]
probe = {{ kind = "zmq", expect = {{ status = "ok" }} }}

[agents.wordbook.revisions.v2]
source = "wordbook/v2"
command = ["{{python}}", "server.py", "{{port}}", "{{health_port}}"]
probe = {{ kind = "zmq", expect = {{ status = "ok" }} }}
"""


def lay_out(folder: Path) -> Path:
    """Copy the agents into `folder`, write the fleet file there with ports that are free, and return its path."""
    for name in ("tutor", "wordbook", "clients"):
        shutil.copytree(SOURCES / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(SOURCES / "rules.yaml", folder / "rules.yaml")
    names = ("events", "feed", "telemetry_in", "telemetry_out", "control", "tutor", "wordbook")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    path = folder / "fleet.toml"
    path.write_text(FLEET.format(**ports), "utf-8")
    return path


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
