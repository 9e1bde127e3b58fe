"""What may be repeated and what may be mirrored, as a class declares it or the fleet file: by action or by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from interlock.agents.figures import InstanceView
from interlock.agents.instance import HandlerContract
from interlock.agents.launch import Instance
from interlock.agents.revisions import Revision
from interlock.broker.config import AgentConfig, ProbeConfig, RevisionConfig, parse_fleet
from interlock.broker.errors import ConfigError

CLASS = RevisionConfig(entry="a:B")
EXEC = RevisionConfig(command=["x"], probe=ProbeConfig(kind="tcp"))


def instance(revision: RevisionConfig, endpoint: str = "tcp://127.0.0.1:1", **settings: Any) -> Instance:
    config = AgentConfig(host="h", endpoint=endpoint, serve="r1", revisions={"r1": revision}, **settings)
    recorded = Revision("tutor", "r1", "digest", Path(), revision)
    return Instance("tutor-r1-1", "tutor", config, recorded, None, InstanceView("r1", "permanent"))  # type: ignore[arg-type]


def test_a_class_says_it_by_handler_and_the_fleet_file_may_add() -> None:
    one = instance(CLASS, side_effects=["listed"])
    one.handlers = {
        "ask": HandlerContract(idempotent=True),
        "mail": HandlerContract(idempotent=True, side_effects=True),
        "listed": HandlerContract(idempotent=True),
        "add": HandlerContract(),
    }
    found = {name: (one.idempotent(body(name)), one.mirrorable(body(name))) for name in [*one.handlers, "none"]}
    assert found == {
        "ask": (True, True),
        "mail": (True, False),
        "listed": (True, False),
        "add": (False, False),
        "none": (False, False),
    }
    assert not one.mirrorable(b"no map")


def test_of_a_program_the_fleet_file_says_it() -> None:
    one = instance(EXEC, idempotent=["ask", "mail"], side_effects=["mail"], action_field="do")
    found = {
        name: (one.idempotent(body(name, "do")), one.mirrorable(body(name, "do"))) for name in ("ask", "mail", "x")
    }
    assert found == {"ask": (True, True), "mail": (True, False), "x": (False, False)}
    every = instance(EXEC, idempotent=True, side_effects=["mail"])
    assert (every.mirrorable(body("x")), every.mirrorable(body("mail"))) == (True, False)


def test_of_http_it_is_said_by_method_and_path_and_holds_for_all_below() -> None:
    one = instance(EXEC, "http://127.0.0.1:1", idempotent=["POST /ask"], side_effects=["GET /unsubscribe"])
    assert [one.idempotent(line) for line in (b"POST /ask?x", b"POST /ask/a", b"POST /asks", b"GET /ask")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert [one.mirrorable(line) for line in (b"GET /unsubscribe/me?x", b"GET /other")] == [False, True]


@pytest.mark.parametrize("key", ["side_effects", "idempotent"])
def test_what_names_no_request_of_an_http_agent_is_refused(key: str) -> None:
    agent = {
        "host": "alpha", "endpoint": "http://127.0.0.1:7201", "serve": "r1", key: ["unsubscribe"],
        "revisions": {"r1": {"command": ["x"], "probe": {"kind": "tcp"}}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=f"agents.page.{key}: 'unsubscribe' names no request"):
        parse_fleet({"hosts": {"alpha": {"control": "tcp://127.0.0.1:7180"}}, "agents": {"page": agent}})


def body(action: str, field: str = "action") -> bytes:
    return f'{{"{field}": "{action}"}}'.encode()
