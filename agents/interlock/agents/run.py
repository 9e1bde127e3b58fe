"""`python -m interlock.agents.run --spec FILE`: one class agent in a process of its own, as a host starts it.

With `--check` the revision's code is imported and looked at, one line of JSON on standard output says what was found,
and nothing is served. Exit codes: 0 served and stopped in order, or checked and well; 1 `setup` failed; 2 the spec or
an endpoint can't be used; 3 the code is no agent.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from interlock.agents.agent import Agent
from interlock.agents.contract import Contract, ContractError, contract_of
from interlock.agents.serving import Serving, Spec
from interlock.broker.errors import ConfigError, InterlockError

EXIT_SPEC = 2
EXIT_CODE = 3


def read_spec(path: str) -> Spec:
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Spec)
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", where=path) from None
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"is not an instance's spec: {error}", where=path) from None


def load(spec: Spec) -> tuple[type[Agent], Contract]:
    """The agent's class and what it offers; ContractError with the file and line at fault.

    The source folder goes first on `sys.path`, and no bytecode is written into it: a revision doesn't change.
    """
    source = os.path.abspath(spec.source)
    sys.dont_write_bytecode = True
    sys.path.insert(0, source)
    module_name, _, class_name = spec.entry.partition(":")
    if not module_name or not class_name:
        raise ContractError(f"entry {spec.entry!r} is not module:Class")
    try:
        module = importlib.import_module(module_name)
    except SyntaxError as error:
        what = f"{type(error).__name__}: {error.msg}"
        raise ContractError(what, file=error.filename or "", line=error.lineno or 0) from None
    except (Exception, SystemExit) as error:  # importing runs the author's code: anything can happen
        file, line = blame(error, source)
        raise ContractError(f"{type(error).__name__}: {error}", file=file, line=line) from None
    file = getattr(module, "__file__", None) or ""
    kind = getattr(module, class_name, None)
    if kind is None:
        raise ContractError(f"there is no {class_name} in module {module_name}", file=file)
    if not isinstance(kind, type) or not issubclass(kind, Agent):
        raise ContractError(
            f"{class_name} is not a subclass of interlock.agents.agent.Agent", file=file, line=line_of(kind)
        )
    return kind, contract_of(kind)


def blame(error: BaseException, source: str) -> tuple[str, int]:
    """File and line of the innermost frame in the source folder; ("", 0) where there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if os.path.abspath(frame.filename).startswith(source + os.sep):
            return frame.filename, frame.lineno or 0
    return "", 0


def line_of(thing: Any) -> int:
    try:
        return inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):
        return 0


def check(spec: Spec) -> dict[str, Any]:
    """{"ok": True, "handlers": {...}}, or {"ok": False, "error", "file", "line"}."""
    try:
        _, contract = load(spec)
    except ContractError as error:
        return {"ok": False, "error": error.what, "file": error.file, "line": error.line}
    return {"ok": True, "handlers": contract.describe()}


def report_check(spec: Spec) -> int:
    """Standard output holds the one line of JSON and nothing else, whatever the imported code prints."""
    sys.stdout.flush()
    out = os.dup(1)
    os.dup2(2, 1)
    report = check(spec)
    sys.stdout.flush()
    with os.fdopen(out, "wb") as stream:
        stream.write(json.dumps(report).encode() + b"\n")
    return 0 if report["ok"] else EXIT_CODE


def serve(spec: Spec) -> int:
    kind, contract = load(spec)
    agent = kind(name=spec.agent, revision=spec.revision, instance=spec.instance, config=spec.config)
    try:
        return trio.run(Serving(spec, agent, contract).run)
    except BaseExceptionGroup as group:
        ours, rest = group.split(InterlockError)
        if ours is None or rest is not None:
            raise
        first: BaseException = ours
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None  # an endpoint that can't be bound is one line, not a traceback


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m interlock.agents.run", description="Run one class agent.")
    parser.add_argument(
        "--spec", required=True, metavar="FILE", help="JSON file that says which agent, and its endpoints"
    )
    parser.add_argument("--check", action="store_true", help="only import the agent and say what it answers, as JSON")
    options = parser.parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("INTERLOCK_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        spec = read_spec(options.spec)
        return report_check(spec) if options.check else serve(spec)
    except InterlockError as error:
        print(f"interlock agent: {error}", file=sys.stderr)
        return EXIT_CODE if isinstance(error, ContractError) else EXIT_SPEC


if __name__ == "__main__":
    sys.exit(main())
