"""A routing core in a few words, for tests of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interlock.agents.routing import Router
from interlock.agents.routing_types import Fail, Send

TIMEOUT = 30.0
HOLD = 10.0


def may_repeat(body: str) -> bool:
    return body.startswith("get")


def as_it_is(body: str) -> str:
    return body


def router(*names: str, window: int = 64, shares: Mapping[str, float] | None = None) -> Router[str, str, str]:
    core: Router[str, str, str] = Router(request_timeout_s=TIMEOUT, hold_s=HOLD, key_of=as_it_is)
    for name in names:
        core.attach(name, window=window, idempotent=may_repeat)
    core.route({names[0]: 1.0} if shares is None and names else shares or {}, 0.0)
    return core


def ask(core: Router[str, str, str], client: str, body: str = "get", now: float = 0.0) -> list[Any]:
    return core.request(client, client, body, len(body), now)


def sends(commands: list[Any]) -> list[Send[str]]:
    return [command for command in commands if isinstance(command, Send)]


def only_send(commands: list[Any]) -> Send[str]:
    (send,) = commands
    assert isinstance(send, Send)
    return send


def codes(commands: list[Any]) -> list[tuple[str, str]]:
    return [(command.client, command.code) for command in commands if isinstance(command, Fail)]


def route(core: Router[str, str, str], shares: Mapping[str, float], now: float) -> list[Any]:
    core.route(shares, now)
    return core.settle(now)
