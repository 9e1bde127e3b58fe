"""Prometheus rule files -> rules.

Read unchanged, with a few keys of ours beside Prometheus' own: x_action, x_dry_run, x_no_data, x_resolve_expr. A key
that nobody knows is an error that names the file, the group, the rule, the key, and the nearest known one.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from interlock.broker.errors import ConfigError
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.rule import Action, Kind, NoData, Rule
from interlock.coordinator.rules.yamltree import (
    choice,
    duration_of,
    known,
    load_yaml,
    mapping,
    sequence,
    short,
    text_of,
    texts,
)

DEFAULT = "default"  # in a list of files: the default rules, so that rules of one's own need not replace them
SHIPPED = {DEFAULT: "default_rules.yaml", "categories": "category_rules.yaml"}  # beside this module, by their names

_GROUP_KEYS = ("name", "interval", "labels", "rules")
_RECORD_KEYS = ("record", "expr", "labels")
_ALERT_KEYS = (
    "alert",
    "expr",
    "for",
    "keep_firing_for",
    "labels",
    "annotations",
    "x_action",
    "x_dry_run",
    "x_no_data",
    "x_resolve_expr",
)


def load_rules(files: Sequence[str], folder: Path) -> list[Rule]:
    """The rules of these files (relative to `folder`), in their order; of none, the default rules that ship.

    Among the files, the names of `SHIPPED` stand for what ships.
    """
    if not files:
        return default_rules()
    rules: list[Rule] = []
    for name in files:
        if name in SHIPPED:
            rules += shipped_rules(name)
            continue
        path = folder / name
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            raise ConfigError("there is no such file", where=str(path), hint="see [rules] files") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't be read: {error}", where=str(path)) from None
        rules += parse_rules(text, file=str(path))
    return rules


def default_rules() -> list[Rule]:
    return shipped_rules(DEFAULT)


def shipped_rules(name: str) -> list[Rule]:
    """The rules of one of the files that ship."""
    source = importlib.resources.files("interlock.coordinator.rules").joinpath(SHIPPED[name])
    return parse_rules(source.read_text("utf-8"), file=SHIPPED[name])


def parse_rules(text: str, *, file: str, problems: list[ConfigError] | None = None) -> list[Rule]:
    """The rules of one file's text; ConfigError for the first thing that is wrong.

    With `problems`, what is wrong with one rule is noted there, and the next one is read.
    """
    tree = load_yaml(text, file=file)
    root = mapping({} if tree is None else tree, file)
    known(root, ("groups",), file)
    rules: list[Rule] = []
    names: set[str] = set()
    for number, item in enumerate(sequence(root.get("groups", []), f"{file}: groups"), 1):
        group = mapping(item, f"{file}: group {number}")
        name = text_of(group.get("name"), f"{file}: group {number}: name")
        if name in names:
            raise ConfigError(f"there are two groups {name!r}", where=file)
        names.add(name)
        rules += _group(group, name, file, problems)
    _distinct(rules)
    return rules


def _group(group: dict[str, Any], name: str, file: str, problems: list[ConfigError] | None) -> list[Rule]:
    where = f"{file}: group {name!r}"
    known(group, _GROUP_KEYS, where)
    interval_s = duration_of(group, "interval", where)
    shared = texts(group, "labels", where)
    rules = []
    for number, item in enumerate(sequence(group.get("rules") or [], f"{where}: rules"), 1):
        try:
            tree = mapping(item, f"{where}: rule {number}")
            rules.append(replace(_rule(tree, number, shared, name, file), interval_s=interval_s))
        except ConfigError as error:
            if problems is None:
                raise
            problems.append(error)
    return rules


def _rule(tree: dict[str, Any], number: int, shared: dict[str, str], group: str, file: str) -> Rule:
    where = f"{file}: group {group!r}: rule {number}"
    if ("alert" in tree) == ("record" in tree):
        known(tree, (*_ALERT_KEYS, "record"), where)
        raise ConfigError("needs alert or record, and not both", where=where)
    kind: Kind = "alert" if "alert" in tree else "record"
    name = text_of(tree[kind], f"{where}: {kind}")
    where = f"{file}: group {group!r}: rule {name!r}"
    for key in tree:
        if kind == "record" and key in _ALERT_KEYS and key not in _RECORD_KEYS:
            hint = "it is an alert's; a rule that records never fires"
            raise ConfigError(f"unknown key {key!r}", where=where, hint=hint)
    known(tree, _ALERT_KEYS if kind == "alert" else _RECORD_KEYS, where)
    text = text_of(tree.get("expr"), f"{where}: expr")
    action: Action = choice(tree, "x_action", get_args(Action), "notify", where)
    no_data: NoData = choice(tree, "x_no_data", get_args(NoData), "keep" if action == "rollback" else "resolve", where)
    resolve = text_of(tree["x_resolve_expr"], f"{where}: x_resolve_expr") if "x_resolve_expr" in tree else None
    dry_run = tree.get("x_dry_run", False)
    if not isinstance(dry_run, bool):
        raise ConfigError(f"{short(dry_run)} is not true or false", where=f"{where}: x_dry_run")
    return Rule(
        name=name,
        kind=kind,
        text=text,
        expression=parse(text, where=where),
        for_s=duration_of(tree, "for", where),
        keep_firing_for_s=duration_of(tree, "keep_firing_for", where),
        labels={**shared, **texts(tree, "labels", where)},
        annotations=texts(tree, "annotations", where),
        action=action,
        dry_run=dry_run,
        no_data=no_data,
        resolve=None if resolve is None else parse(resolve, where=f"{where}: x_resolve_expr"),
        resolve_text=resolve or "",
        group=group,
        file=file,
    )


def _distinct(rules: list[Rule]) -> None:
    """Two alerts of one name and the same labels couldn't be told apart when one of them resolves."""
    seen: set[tuple[str, str, tuple[tuple[str, str], ...]]] = set()
    for rule in rules:
        key = (rule.kind, rule.name, tuple(sorted(rule.labels.items())))
        if key in seen:
            raise ConfigError(
                "there is already a rule with this name and these labels", where=rule.where, hint="give it another name"
            )
        seen.add(key)
