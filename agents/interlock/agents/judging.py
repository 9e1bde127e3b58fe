"""`python -m interlock.agents.judging --spec FILE`: a revision's own comparison functions, in a process of their own.

The host asks over a Unix socket, one pair at a time: 4 bytes of length, then a MessagePack map. What a function does
can hurt this process only: it has the lowest priority, is the first that the kernel ends when memory runs out, and
can't write more than `MAX_OUTPUT` into a file, its log among them. With `--check` the functions are imported only, and
one line of JSON says how that went.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import resource
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from interlock.agents.values import value_in

MAX_OUTPUT = 8 << 20  # bytes of any file that it writes; its log begins with 1 MiB at most
MAX_TEXT = 500  # characters of a difference or an error: it stands in one line of a report
LENGTH = 4  # bytes of a message's length, big-endian
NICENESS = 10  # live requests come first

Function = Callable[[Any, Any, Any], Any]


class Spec(msgspec.Struct, kw_only=True):
    """What the host tells this process, as JSON."""

    source: str  # the folder of the revision's code
    functions: list[str]  # "module:function"
    socket: str = ""  # where the host listens


class Question(msgspec.Struct, kw_only=True):
    """One pair. `request` is given as it is where it is no bytes of a message (HTTP)."""

    function: str
    request: list[bytes]
    old: list[bytes]
    new: list[bytes]
    http: dict[str, str] | None = None  # method and path of a request; its body is `request`


_question = msgspec.msgpack.Decoder(Question)


class Unusable(Exception):
    """A function can't be had; the text says why, with file and line."""


def load(spec: Spec) -> dict[str, Function]:
    """The functions by their names; Unusable for the first that can't be had."""
    source = os.path.abspath(spec.source)
    sys.dont_write_bytecode = True
    sys.path.insert(0, source)
    found: dict[str, Function] = {}
    for name in spec.functions:
        module_name, _, function_name = name.partition(":")
        try:
            function = getattr(importlib.import_module(module_name), function_name, None)
        except SyntaxError as error:
            raise Unusable(f"{error.filename}:{error.lineno}: {error.msg}") from None
        except BaseException as error:  # importing runs the author's code: anything can happen
            raise Unusable(told(error, source)) from None
        if function is None:
            raise Unusable(f"there is no {function_name} in module {module_name}")
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise Unusable(f"{name} is no plain function; write def {function_name}(request, old, new)")
        found[name] = function
    return found


def told(error: BaseException, source: str) -> str:
    """The exception with file and line of the innermost frame in the source folder."""
    place = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = os.path.abspath(frame.filename)
        if path.startswith(source + os.sep):
            place = f"{os.path.relpath(path, source)}:{frame.lineno}: "
            break
    return f"{place}{type(error).__name__}: {error}"[:MAX_TEXT]


def judge(function: Function, question: Question, source: str) -> dict[str, str]:
    """{"difference": text}, empty if the answers are equal; or {"error": why there is no saying}."""
    try:
        request = value_in(question.request)
        if question.http is not None:
            request = {**question.http, "body": request}
        said = function(request, value_in(question.old), value_in(question.new))
    except BaseException as error:  # SystemExit too: it is a fault of the function, not the end of this process
        return {"error": told(error, source)}
    if said is True or said == "":
        return {"difference": ""}
    if said is False:
        return {"difference": f"{question.function} says that they differ"}
    if isinstance(said, str):
        return {"difference": said[:MAX_TEXT]}
    return {"error": f"{question.function} returned {type(said).__name__}, not True, False or a text"}


def serve(spec: Spec, functions: dict[str, Function], host: socket.socket) -> None:
    """Until the host closes the connection."""
    source = os.path.abspath(spec.source)
    send(host, {"ready": True})
    while (body := receive(host)) is not None:
        question = _question.decode(body)
        send(host, judge(functions[question.function], question, source))


def send(to: socket.socket, message: dict[str, Any]) -> None:
    body = msgspec.msgpack.encode(message)
    to.sendall(len(body).to_bytes(LENGTH, "big") + body)


def receive(host: socket.socket) -> bytes | None:
    head = _exactly(host, LENGTH)
    return None if head is None else _exactly(host, int.from_bytes(head, "big"))


def _exactly(host: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        piece = host.recv(min(1 << 20, count - len(parts)))
        if not piece:
            return None
        parts += piece
    return bytes(parts)


def confine() -> None:
    """Whatever the functions do, the machine's other processes come first."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_OUTPUT, MAX_OUTPUT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    with suppress(OSError):  # not everywhere; it only says who goes first
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m interlock.agents.judging", description="Compare answers.")
    parser.add_argument("--spec", required=True, metavar="FILE", help="JSON file that says which functions")
    parser.add_argument("--check", action="store_true", help="only import the functions and say how it went, as JSON")
    options = parser.parse_args(arguments)
    spec = msgspec.json.decode(Path(options.spec).read_bytes(), type=Spec)
    confine()
    if options.check:
        sys.stdout.flush()
        out = os.dup(1)
        os.dup2(2, 1)  # the one line of JSON stands alone, whatever the imported code prints
        try:
            load(spec)
            report: dict[str, Any] = {"usable": True}
        except Unusable as error:
            report = {"usable": False, "error": str(error)}
        os.write(out, json.dumps(report).encode() + b"\n")
        return 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as host:
        host.connect(spec.socket)
        try:
            functions = load(spec)
        except Unusable as error:
            send(host, {"error": str(error)})
            return 1
        serve(spec, functions, host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
