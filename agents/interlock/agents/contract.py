"""What an agent answers: its actions, their arguments and types, and how a request becomes a call and a reply.

Pure: bytes and classes go in, bytes and values come out. A request is one JSON object or MessagePack map that has the
key "action" and the arguments beside it; the reply is in the same encoding, `{"status": "ok", ...}` or
`{"status": "error", "error": {"code", "message"}}`.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from interlock.agents.agent import MARK, ActiveMark, Agent, BackgroundMark, HandlerMark, RequestError, ThreadMark
from interlock.agents.answers import MAX_BODY
from interlock.broker.errors import InterlockError

ACTION = "action"  # the key of a request that names its handler
HEALTH = "health"  # the action that every agent answers, through its `health` method
MAX_REPLY = MAX_BODY  # bytes: the gateway would disconnect an instance that sends more
MAX_MESSAGE_TEXT = 2000  # characters of an error's or a health check's text: it ends up in logs and tables

Encoding = Literal["json", "msgpack"]


class ContractError(InterlockError):
    """The class is not an agent, or one of its handlers can't be called by name. The agent's author is at fault."""

    def __init__(self, what: str, *, file: str = "", line: int = 0) -> None:
        super().__init__(what, where=f"{file}:{line}" if file else "")
        self.file = file
        self.line = line


class Action(msgspec.Struct, frozen=True):
    """One handler: `parameters` are types to convert to, those in `optional` have a default."""

    name: str
    method: str
    idempotent: bool
    side_effects: bool
    blocking: bool  # a plain `def`: called in a thread
    parameters: dict[str, Any]
    optional: frozenset[str]
    open_ended: bool  # takes **arguments: whatever else the request holds

    def describe(self) -> dict[str, Any]:
        parameters = {
            name: type_name(kind) + (" = ..." if name in self.optional else "")
            for name, kind in self.parameters.items()
        }
        if self.open_ended:
            parameters["**"] = "Any"
        return {"idempotent": self.idempotent, "side_effects": self.side_effects, "parameters": parameters}


class Contract(msgspec.Struct, frozen=True):
    """All that is marked in an agent's class: actions by name, and the methods to run while it serves."""

    actions: dict[str, Action]
    backgrounds: list[str]
    threads: list[str]
    turns: list[str] = []  # tasks and threads that run while the instance is active
    state: bool = False  # it has state in memory that can be handed to another instance

    def describe(self) -> dict[str, Any]:
        return {name: action.describe() for name, action in sorted(self.actions.items())}


def type_name(kind: Any) -> str:
    """The type as its author wrote it, near enough: `list[str]`, `int | None`, `Any`."""
    if isinstance(kind, type) and not typing.get_args(kind):
        return kind.__name__
    return str(kind).replace("typing.", "")


# --- the class


def contract_of(kind: type[Agent]) -> Contract:
    """What the class offers; ContractError names the file and line of a method that can't be offered."""
    actions: dict[str, Action] = {}
    backgrounds: list[str] = []
    threads: list[str] = []
    turns: list[str] = []
    for name in dir(kind):
        method = getattr(kind, name, None)
        mark = getattr(method, MARK, None)
        if method is None or mark is None:
            continue
        if isinstance(mark, HandlerMark):
            action = _action(name, method, mark)
            if action.name in actions:
                raise _fault(
                    method, f"action {action.name!r} has two handlers, {actions[action.name].method} and {name}"
                )
            actions[action.name] = action
        elif isinstance(mark, BackgroundMark):
            if not inspect.iscoroutinefunction(method):
                raise _fault(method, f"@background {name} is not an async def")
            backgrounds.append(name)
        elif isinstance(mark, ThreadMark):
            if inspect.iscoroutinefunction(method):
                raise _fault(method, f"@thread {name} is an async def; it should be a plain def")
            if len(inspect.signature(method).parameters) != 2:
                raise _fault(method, f"@thread {name} should take one argument: stop, a threading.Event")
            threads.append(name)
        elif isinstance(mark, ActiveMark):
            wanted = 1 if inspect.iscoroutinefunction(method) else 2
            if len(inspect.signature(method).parameters) != wanted:
                raise _fault(
                    method, f"@while_active {name} should take no argument as async def, stop (an Event) as plain def"
                )
            turns.append(name)
    return Contract(actions, backgrounds, threads, turns, _keeps_state(kind))


def _keeps_state(kind: type[Agent]) -> bool:
    """Whether the class can give its state away, and take it; one of both is a mistake."""
    gives, takes = kind.snapshot is not Agent.snapshot, kind.restore is not Agent.restore
    if gives != takes:
        have, lack = ("snapshot", "restore") if gives else ("restore", "snapshot")
        raise _fault(getattr(kind, have), f"{kind.__name__} has {have}() and no {lack}(): state needs both")
    return gives


def _action(name: str, method: Callable[..., Any], mark: HandlerMark) -> Action:
    if mark.action == HEALTH:
        raise _fault(method, 'action "health" is answered for every agent; override the method health() instead')
    if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
        raise _fault(method, f"handler {name} is a generator; it should return its reply")
    try:
        hints = typing.get_type_hints(method, include_extras=True)
    except Exception as error:  # the annotations are the author's code: anything can happen
        raise _fault(method, f"handler {name}: annotations can't be evaluated: {error}") from None
    parameters: dict[str, Any] = {}
    optional: set[str] = set()
    open_ended = False
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise _fault(method, f"handler {name}: argument {parameter.name!r} can't be given by name")
        if parameter.name == ACTION:
            raise _fault(
                method, f'handler {name}: an argument can\'t be called "action", the key that names the handler'
            )
        kind = hints.get(parameter.name, Any)
        try:
            msgspec.json.Decoder(kind)
        except (TypeError, NotImplementedError) as error:
            raise _fault(method, f"handler {name}: argument {parameter.name!r} has no type to check: {error}") from None
        parameters[parameter.name] = kind
        if parameter.default is not parameter.empty:
            optional.add(parameter.name)
    return Action(
        name=mark.action,
        method=name,
        idempotent=mark.idempotent,
        side_effects=mark.side_effects,
        blocking=not inspect.iscoroutinefunction(method),
        parameters=parameters,
        optional=frozenset(optional),
        open_ended=open_ended,
    )


def _fault(method: Callable[..., Any], what: str) -> ContractError:
    code = getattr(inspect.unwrap(method), "__code__", None)
    return ContractError(what, file=code.co_filename if code else "", line=code.co_firstlineno if code else 0)


# --- one request

_json = msgspec.json.Decoder(dict[str, Any])
_msgpack = msgspec.msgpack.Decoder(dict[str, Any])


def encoding_of(body: bytes) -> Encoding:
    """By the first byte: no MessagePack map starts as a JSON object does. What is neither is answered in JSON."""
    first = body[:1]
    return "msgpack" if first and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF)) else "json"


def decode_map(body: bytes) -> dict[str, Any]:
    """A JSON object or MessagePack map whose keys are strings; RequestError("bad-request") for anything else."""
    try:
        return (_msgpack if encoding_of(body) == "msgpack" else _json).decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RequestError("bad-request", f"not a JSON object or MessagePack map: {error}") from None


def name_action(request: Mapping[str, Any], known: Mapping[str, Action]) -> str:
    """The action that the request names: a known one or "health"; RequestError otherwise."""
    name = request.get(ACTION)
    if not isinstance(name, str):
        raise RequestError("bad-request", 'the request needs the key "action", a string')
    if name != HEALTH and name not in known:
        names = ", ".join(sorted([*known, HEALTH]))
        raise RequestError("unknown-action", f"no action {name[:100]!r}; known: {names}")
    return name


def bind_arguments(action: Action, request: Mapping[str, Any]) -> dict[str, Any]:
    """The handler's arguments, converted to their types; RequestError("bad-request") names the one that is wrong."""
    given = {key: value for key, value in request.items() if key != ACTION}
    arguments: dict[str, Any] = {}
    for name, kind in action.parameters.items():
        if name in given:
            arguments[name] = _convert(given.pop(name), kind, name)
        elif name not in action.optional:
            raise RequestError("bad-request", f"argument {name!r} is missing; it is of type {type_name(kind)}")
    if action.open_ended:
        arguments.update(given)
    elif given:
        name = min(given)
        near = difflib.get_close_matches(name, action.parameters, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(action.parameters) or 'none'}"
        raise RequestError("bad-request", f"unknown argument {name[:100]!r}; {hint}")
    return arguments


def _convert(value: Any, kind: Any, name: str) -> Any:
    if kind is Any:
        return value
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError, ValueError) as error:
        message = str(error)
        raise RequestError("bad-request", f"argument {name!r}: {message[:1].lower()}{message[1:]}") from None


# --- its reply


def reply_ok(result: Any, encoding: Encoding) -> bytes:
    """The handler's result as the body of a reply; TypeError if it can't be one."""
    if result is None:
        fields: Any = {}
    elif isinstance(result, dict):
        fields = result
    else:
        fields = msgspec.to_builtins(result)  # a Struct or dataclass
        if not isinstance(fields, dict):
            raise TypeError(f"the handler returned {type(result).__name__}, not a dict")
    if "status" in fields:
        raise TypeError('the handler\'s reply has the key "status", which says whether a request was answered')
    body = _encode({"status": "ok", **fields}, encoding)
    if len(body) > MAX_REPLY:
        raise RequestError("too-large", f"the reply has {len(body)} bytes, at most {MAX_REPLY} can be sent")
    return body


def reply_error(code: str, message: str, encoding: Encoding) -> bytes:
    text = message[:MAX_MESSAGE_TEXT].encode("utf-8", "replace").decode()  # a path in it may not be Unicode
    return _encode({"status": "error", "error": {"code": code[:100], "message": text}}, encoding)


def _encode(value: Any, encoding: Encoding) -> bytes:
    return msgspec.msgpack.encode(value) if encoding == "msgpack" else msgspec.json.encode(value)


def health_of(verdict: Any) -> tuple[bool, str]:
    """What an agent's `health` returned, as (well, detail)."""
    if verdict is None or isinstance(verdict, bool):
        return verdict is not False, "" if verdict is not False else "health() returned False"
    if isinstance(verdict, dict):
        detail = verdict.get("detail")
        if detail is None:
            detail = ", ".join(f"{key}={value}" for key, value in verdict.items() if key != "ok")
        return bool(verdict.get("ok", True)), str(detail)[:MAX_MESSAGE_TEXT]
    return False, f"health() returned {type(verdict).__name__}, not a dict, bool or None"
