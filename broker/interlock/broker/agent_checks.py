"""What is checked of an agent in the fleet file beyond the types of its keys; `config.py` calls it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from interlock.broker.bounds import check_command, check_environment
from interlock.broker.errors import ConfigError

if TYPE_CHECKING:
    from interlock.broker.config import AgentConfig, FleetConfig, RevisionConfig

_HTTP_NAME = re.compile(r"[A-Z]+ /\S*")  # a method and a path
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_host_places(fleet: FleetConfig, agent: AgentConfig, where: str) -> Iterator[tuple[str, str]]:
    """Where an agent is to be found on other hosts; ConfigError for what can't be."""
    for host, place in agent.endpoints.items():
        if host not in fleet.hosts:
            raise ConfigError(f"unknown host {host!r}", where=where, hint=near(host, fleet.hosts))
        if place.partition(":")[0] != agent.endpoint.partition(":")[0]:
            raise ConfigError(f"{place!r} is of another kind than {agent.endpoint!r}", where=f"{where}.{host}")
        if host == agent.host and place != agent.endpoint:
            raise ConfigError(f"{place!r} is not its endpoint there, {agent.endpoint!r}", where=f"{where}.{host}")
        if host != agent.host:
            yield host, place


def check_revision(fleet: FleetConfig, agent: AgentConfig, revision: RevisionConfig, where: str) -> None:
    if bool(revision.entry) == bool(revision.command):
        raise ConfigError("needs an entry or a command, and not both", where=where)
    if revision.entry and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", revision.entry):
        raise ConfigError(f"entry {revision.entry!r} is not module:Class", where=where)
    if revision.entry and agent.endpoint.startswith(("http", "stream")):
        scheme = agent.endpoint.partition(":")[0]
        raise ConfigError(
            f"a class agent answers ZeroMQ requests, its endpoint is {scheme}",
            where=where,
            hint="use a tcp:// endpoint",
        )
    if revision.command and revision.probe is None:
        raise ConfigError(
            "a program needs a probe", where=where, hint='for example probe = { kind = "tcp", port = "request" }'
        )
    if revision.probe is not None and revision.probe.kind == "script" and not revision.probe.command:
        raise ConfigError("a script probe needs a command", where=where)
    if revision.command:
        check_command(revision.command, where)
    if revision.state is not None:
        check_state(agent, revision, f"{where}.state")
    if revision.probe is not None and revision.probe.command:
        check_command(revision.probe.command, f"{where}.probe")
    check_environment(revision.env, where)


def check_state(agent: AgentConfig, revision: RevisionConfig, where: str) -> None:
    state = revision.state
    assert state is not None
    if revision.entry:
        raise ConfigError("a class has snapshot() and restore() for it", where=where, hint="leave the table out")
    if agent.endpoint.startswith("stream"):
        raise ConfigError(
            "connections of a protocol of its own can't be held while state is handed over", where=where,
            hint="leave the table out, and keep what must last in the agent's data folder",
        )  # fmt: skip
    for key in ("give", "take", "quiesce", "resume"):
        command = getattr(state, key)
        if not command and key in ("give", "take"):
            raise ConfigError("needs a command", where=f"{where}.{key}")
        if command:
            check_command(command, f"{where}.{key}")


def check_handlers(agent: AgentConfig, where: str) -> None:
    if agent.endpoint.startswith("http"):
        listed = agent.idempotent if isinstance(agent.idempotent, list) else []
        for key, names in (("idempotent", listed), ("side_effects", agent.side_effects)):
            for name in names:
                _check_request(name, f"{where}.{key}")
    for name, handler in agent.compare.handlers.items():
        place = f"{where}.compare.handlers.{name}"
        if agent.endpoint.startswith("http"):
            _check_request(name, place)
        if handler.function and not _FUNCTION.fullmatch(handler.function):
            raise ConfigError(f"function {handler.function!r} is not module:function", where=place)
        if handler.function and (handler.ignore is not None or handler.tolerance is not None):
            raise ConfigError("a function decides alone", where=place, hint="leave ignore and tolerance out")
        if handler.mode == "exact" and (
            handler.function or handler.ignore is not None or handler.tolerance is not None
        ):
            raise ConfigError(
                "exact compares bytes", where=place, hint="leave ignore, tolerance and function out, or the mode"
            )


def _check_request(name: str, where: str) -> None:
    if not _HTTP_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} names no request", where=where, hint='write "METHOD /path", as in "GET /ask"')


def near(name: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known)) or 'none'}"
