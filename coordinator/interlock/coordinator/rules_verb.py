"""The actions of the verb `rules`: from its options to what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from interlock.broker.errors import ConfigError
from interlock.coordinator.rules import conformance

EXIT_FAILED = 13  # something differs


def run(chosen: argparse.Namespace) -> int:
    """The exit code: 0, or 13 if something is not as it should be. ConfigError for a file that can't be read."""
    return {"conformance": _conformance}[chosen.act](chosen)


def _conformance(chosen: argparse.Namespace) -> int:
    files: dict[str, dict[str, int]] = {}
    for path in chosen.files:
        verdicts = list(conformance.check(_text(path)))
        files[_name(path, files)] = conformance.tally(verdicts)
        for verdict in verdicts if chosen.failures else ():
            if verdict.outcome == "fail":
                print(f"{path}:{verdict.line}: {verdict.query}: {verdict.detail}", file=sys.stderr)
    report = conformance.report(files)
    print(json.dumps(report, indent=2))
    return EXIT_FAILED if report["failed"] else 0


def _name(path: Path, taken: dict[str, dict[str, int]]) -> str:
    return path.name if path.name not in taken else str(path)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't be read: {error}", where=str(path)) from None
