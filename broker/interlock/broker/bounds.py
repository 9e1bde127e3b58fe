"""What the values of a fleet file may be: one table of ranges, and what a text may not hold. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from interlock.broker.errors import ConfigError

PLACEHOLDERS = ("port", "health_port", "python", "source", "revision", "agent")  # in a revision's command and env
DAY_S = 86_400.0
MONTH_S = 30 * DAY_S
MAX_IPC_PATH = 107  # bytes: what Linux takes as the path of a socket
PORTS = range(1, 1 << 16)


class Range(NamedTuple):
    """From `least` to `most`, both included."""

    least: float
    most: float

    def __str__(self) -> str:
        return f"{_plain(self.least)} to {_plain(self.most)}"


TIME = Range(0, MONTH_S)  # seconds: longer is a slip of the finger, or another unit
DEADLINE = Range(0.01, DAY_S)  # seconds until something counts as failed: at 0 it would never succeed
PERIOD = Range(0.01, 3600)  # seconds between two of the same: at 0 a loop would take a whole core
COUNT = Range(0, 1_000_000_000)  # whatever is counted

# By class and key. A number that has no entry is a TIME if its key says so, else a COUNT.
RANGES: dict[str, Range] = {
    "BrokerConfig.heartbeat_s": Range(0.2, 60),  # more often costs more than the news is worth
    "LogConfig.keep_days": Range(0, 36_500),
    "LogConfig.keep_mb": Range(1, 100_000_000),
    "CoordinatorConfig.lease_s": Range(0.5, 3600),  # the coordinator renews it every third of that
    "CoordinatorConfig.step_margin_s": Range(0, 3600),
    "RulesConfig.partitions": Range(1, 64),  # each hears the partial results of all
    "SimulatedGpu.memory_bytes": Range(1, 1 << 50),
    "MonitorConfig.idle_s": PERIOD,
    "MonitorConfig.migrating_s": PERIOD,
    "MonitorConfig.slow_s": PERIOD,
    "MonitorConfig.gpu_call_s": DEADLINE,
    "HostConfig.backups": Range(1, 10_000),
    "ProbeConfig.timeout_s": DEADLINE,
    "RevisionConfig.start_timeout_s": DEADLINE,
    "RevisionConfig.stop_timeout_s": Range(0, 3600),
    "AgentConfig.window": Range(0, 10_000),
    "AgentConfig.request_timeout_s": DEADLINE,
    "AgentConfig.hold_s": Range(0, DAY_S),
    "AgentConfig.hand_over_s": DEADLINE,
    "AgentConfig.health_period_s": PERIOD,
    "AgentConfig.health_failures": Range(1, 1000),
    "CompareConfig.tolerance": Range(0, 1),
    "CompareConfig.timeout_s": DEADLINE,
    "HandlerCompare.tolerance": Range(0, 1),
    "CanaryStep.share": Range(0.000001, 1),  # the gateway counts in millionths
    "StrategyConfig.promise_s": DEADLINE,
    "ObserveConfig.alpha": Range(0.000001, 0.5),
}


def range_of(owner: str, key: str) -> Range:
    """Of a number's key in the class of that name in config.py."""
    return RANGES.get(f"{owner}.{key}") or (TIME if key.endswith("_s") or key == "seconds" else COUNT)


def check_values(node: msgspec.Struct, place: str, where: str) -> None:
    """ConfigError for the first number out of its range, or text that no system call takes, below `node`."""
    for key, owner, value in _leaves(node, place):
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{value!r} holds a NUL character", where=f"{where}: {key}", hint="leave it out")
        if isinstance(value, int | float) and not isinstance(value, bool):
            allowed = range_of(owner, key.rpartition(".")[2])
            if not (math.isfinite(value) and allowed.least <= value <= allowed.most):
                raise ConfigError(f"{value} is out of range", where=f"{where}: {key}", hint=f"use {allowed}")


def check_command(command: list[str], where: str) -> None:
    """ConfigError for a command that can't be started, whatever the machine."""
    if not command[0]:
        raise ConfigError("the program's name is empty", where=f"{where}.command")
    for word in command:
        _check_placeholders(word, f"{where}.command")


def check_environment(env: Mapping[str, str], where: str) -> None:
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            raise ConfigError(f"{name!r} can't be the name of a variable", where=f"{where}.env")
        _check_placeholders(value, f"{where}.env.{name}")


def check_place(endpoint: str, where: str, *, any_port: bool) -> None:
    """ConfigError for a port or path that nobody can listen on, or that nobody else could know."""
    path = endpoint.removeprefix("ipc://")
    if path != endpoint:
        if len(path.encode()) > MAX_IPC_PATH:
            raise ConfigError(
                f"the path has {len(path.encode())} bytes", where=where, hint=f"a socket's may have {MAX_IPC_PATH}"
            )
        return
    port = endpoint.rpartition(":")[2]
    if port == "*" and not any_port:
        raise ConfigError("any port: others could not know which", where=where, hint="name one")
    if port != "*" and int(port) not in PORTS:
        raise ConfigError(f"{port} is no port", where=where, hint=f"use 1 to {PORTS[-1]}")


def _check_placeholders(text: str, where: str) -> None:
    for name in re.findall(r"\{([A-Za-z_][A-Za-z0-9_]*)\}", text):
        if name not in PLACEHOLDERS:
            known = ", ".join(f"{{{each}}}" for each in PLACEHOLDERS)
            raise ConfigError(f"unknown placeholder {{{name}}}", where=where, hint=f"use one of {known}")


def _leaves(node: Any, place: str, owner: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted key, class, value) of each text and number. What is handed on to an agent or a probe is not ours."""
    if isinstance(node, msgspec.Struct):
        for field in msgspec.structs.fields(node):
            if field.type != dict[str, Any]:
                yield from _leaves(
                    getattr(node, field.name), f"{place}.{field.encode_name}".lstrip("."), type(node).__name__
                )
    elif isinstance(node, Mapping):
        for name, each in node.items():
            yield from _leaves(each, f"{place}.{name}", owner)
    elif isinstance(node, list):
        for each in node:
            yield from _leaves(each, place, owner)
    else:
        yield place, owner, node


def _plain(number: float) -> str:
    return f"{number:.6f}".rstrip("0").rstrip(".")
