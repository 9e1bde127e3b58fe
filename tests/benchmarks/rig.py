"""What the benchmarks of the bus share: a fleet with keys in a folder of its own, a broker process, and its figures."""

from __future__ import annotations

import os
import platform
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from interlock.broker import crypto, keys
from interlock.broker.config import FleetConfig, heartbeat_of, load_fleet
from interlock.broker.keys import Authority, Grant, PrivateKeys, Roll
from interlock.broker.role import READY_FD
from interlock.broker.security import Security

OPERATOR = "operator/bench"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
READY_S = 60.0  # a broker that has not said "ready" by then won't
STOP_S = 10.0


@dataclass
class Stand:
    """A fleet's folder: its file, its authority, and everybody's private keys."""

    folder: Path
    fleet: FleetConfig
    roll: Roll
    private: dict[str, PrivateKeys] = field(default_factory=dict)

    def security(self, identity: str) -> Security:
        return Security(self.private[identity], self.roll, self.folder / "keys")

    def curve(self, identity: str) -> tuple[bytes, bytes, bytes]:
        """The public and secret key of one, and the broker's public key."""
        curve = self.security(identity).curve()
        return curve.public, curve.secret, curve.server


@contextmanager
def stand(identities: Iterable[str], *, hosts: int = 0) -> Iterator[Stand]:
    """Keys for all of these and the broker, four free ports, and a folder on the disk that /tmp is on.

    Links ping as seldom as in a fleet of so many hosts.
    """
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="il-") as name:
        folder = Path(name)
        ports = _free_ports(4)
        names = ("events", "feed", "telemetry_in", "telemetry_out")
        lines = [f'{key} = "tcp://127.0.0.1:{port}"' for key, port in zip(names, ports, strict=True)]
        lines.append(f"heartbeat_s = {heartbeat_of(hosts)}")
        (folder / "fleet.toml").write_text('name = "bench"\nstate = "state"\n[broker]\n' + "\n".join(lines) + "\n")
        fleet = load_fleet(str(folder / "fleet.toml"))
        grants, private = [], {}
        for identity in dict.fromkeys(["broker", OPERATOR, *identities]):
            signs = identity.split("/")[0] in keys.SIGNERS
            public, secret = crypto.new_curve_pair()
            sign, sign_secret = crypto.new_signing_pair() if signs else (b"", b"")
            grants.append(Grant(identity=identity, curve=public.hex(), sign=sign.hex()))
            private[identity] = PrivateKeys(identity=identity, curve=secret.hex(), sign=sign_secret.hex())
        authority = Authority(fleet="bench", serial=len(grants), grants=grants)
        keys.write_authority(fleet.keys_dir, authority)
        keys.write_private(fleet.keys_dir, private["broker"])
        yield Stand(folder, fleet, Roll(authority), private)


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


class BrokerProcess:
    """`interlock broker` as a process of its own, both planes. What it logs goes to the file `broker.log`."""

    def __init__(self, folder: Path) -> None:
        reading, writing = os.pipe()
        began = time.monotonic()
        with (folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "interlock.broker", "--fleet", str(folder / "fleet.toml")],
                pass_fds=[writing],
                env={**os.environ, READY_FD: str(writing)},
                stderr=log,
            )
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            if said.readline() != b"ready\n":
                raise SystemExit(f"the broker did not start: {(folder / 'broker.log').read_text()}")
        self.ready_s = time.monotonic() - began
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(STOP_S)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    @property
    def telemetry_pid(self) -> int:
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return int(" ".join((thread / "children").read_text() for thread in threads).split()[0])

    def resident_kb(self) -> int:
        """Resident memory of the event plane's process."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def descriptor_limit() -> int:
    """The most descriptors that one process may have here; raised to that for this process and its children."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for wanted in (65_536, hard):  # a privileged one may raise the hard limit itself
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, hard), max(wanted, hard)))
            break
        except (ValueError, OSError):
            continue
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def quantiles(took: Sequence[float]) -> dict[str, float]:
    """Milliseconds in, the usual percentiles out."""
    ordered = sorted(took)
    at = {f"p{p:g}_ms": ordered[min(int(len(ordered) * p / 100), len(ordered) - 1)] for p in (50, 90, 99, 99.9)}
    return {"count": len(ordered), **{key: round(value, 2) for key, value in at.items()}, "max_ms": round(max(took), 2)}


def aim(value: float, limit: float, *, at_most: bool = True) -> dict[str, Any]:
    """A figure beside what it should be."""
    met = value <= limit if at_most else value >= limit
    return {"value": round(value, 2), "aim": f"{'<' if at_most else '>='} {limit:g}", "met": met}


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
    }
