"""`interlock assess`: which agents there are in source trees, and how risky each is to move. Needs no fleet."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import trio

from interlock.broker.errors import ConfigError
from interlock.coordinator.assess import agents, pool, walking
from interlock.coordinator.assess.page import page
from interlock.coordinator.assess.project import Project
from interlock.coordinator.assess.report import Report, report
from interlock.coordinator.assess.sarif import sarif
from interlock.coordinator.assess.settings import Settings, parse_settings, with_options
from interlock.coordinator.assess.startup import Entry, read_startup
from interlock.coordinator.rules.yamltree import load_yaml
from interlock.coordinator.screen import Screen
from interlock.coordinator.terminal import say_json

EXIT_ABOVE = 13  # an agent is above the level that was named, or can't be migrated
MAX_LIST = 1 << 20  # bytes of a YAML file that may be a start-up list: one of 1,000 agents has 0.2 MiB


def run(chosen: argparse.Namespace) -> int:
    """0; 13 if --fail-above was asked for, and something is."""
    settings = with_options(_settings(chosen.config), exclude=chosen.exclude, bases=chosen.base)
    root, found = trio.run(examine, chosen.paths, settings, chosen.workers)
    if chosen.sarif is not None:
        _write(chosen.sarif, json.dumps(sarif(found, root.as_uri()), indent=1) + "\n")
    if chosen.html is not None:
        _write(chosen.html, page(found, str(root)))
    if chosen.json:
        say_json(found)
    else:
        Screen(sys.stdout).assessed(found, details=chosen.details)
    above = found.above(chosen.fail_above) if chosen.fail_above else []
    return EXIT_ABOVE if above else 0


async def examine(paths: list[Path], settings: Settings, workers: int = 0) -> tuple[Path, Report]:
    """The root of all paths, and the report on them. ConfigError for a path that there is not."""
    tree = walking.walk(paths, settings.excluded)
    modules, unread = await pool.read_all(tree.root, tree.sources, limit=settings.max_bytes, workers=workers)
    notes = [f"{path}: {why}" for path, why in [*tree.unread, *unread]]
    if tree.left_out:
        notes.append(f"{tree.left_out} files were left out by the excludes")
    entries: list[tuple[str, Entry]] = []
    for name in tree.lists:
        entries += _listed(tree.root / name, name, notes)
    project = Project(modules)
    found = agents.find(project, entries, settings)
    parsed = [path for path in dict.fromkeys(agent.file for agent in found[0]) if not project.modules[path].problem]
    uncompiled = await pool.compile_all(tree.root, parsed, limit=settings.max_bytes, workers=workers)
    return tree.root, report(project, entries, settings, uncompiled=uncompiled, notes=notes, found=found)


def _listed(path: Path, name: str, notes: list[str]) -> list[tuple[str, Entry]]:
    """The entries of a YAML file, if it is a start-up list."""
    try:
        if path.stat().st_size > MAX_LIST:
            return []
        text = path.read_text("utf-8")
        tree = load_yaml(text, file=name)
    except (OSError, UnicodeDecodeError):
        return []
    except ConfigError as error:
        if "script" in text:
            notes.append(f"{error.where}: {error.what}")
        return []
    return [(os.path.dirname(name), entry) for entry in read_startup(tree, os.environ).entries]


def _settings(path: Path | None) -> Settings:
    if path is None:
        return Settings()
    try:
        return parse_settings(path.read_text("utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't be read: {error}", where=str(path)) from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"can't be written: {error.strerror}", where=str(path)) from None
