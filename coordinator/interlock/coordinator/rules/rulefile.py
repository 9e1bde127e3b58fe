"""Prometheus rule files -> rules. The only module that imports yaml.

Read unchanged, with a few keys of ours beside Prometheus' own: x_action, x_dry_run, x_no_data, x_resolve_expr. A key
that nobody knows is an error that names the file, the group, the rule, the key, and the nearest known one.
"""

from __future__ import annotations

import difflib
import importlib.resources
import reprlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml

from interlock.broker.errors import ConfigError
from interlock.coordinator.rules.durations import duration
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.rule import Action, Kind, NoData, Rule

MAX_FILE = 4 << 20  # characters of a rule file: the largest of the public ones have 0.2 million
MAX_KEYS = 200_000  # in all mappings of a file, those that are merged in from others counted each time
DEFAULT_RULES = "default_rules.yaml"  # beside this module
DEFAULT = "default"  # in a list of files: the default rules, so that rules of one's own need not replace them

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
_LATER = ("limit", "query_offset", "partial_response_strategy")  # known, and not supported


def load_rules(files: Sequence[str], folder: Path) -> list[Rule]:
    """The rules of these files (relative to `folder`), in their order; of none, the default rules that ship.

    Among the files, "default" stands for those.
    """
    if not files:
        return default_rules()
    rules: list[Rule] = []
    for name in files:
        if name == DEFAULT:
            rules += default_rules()
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


class RuleFiles:
    """The rule files of a fleet file, and whether they changed since they were looked at."""

    def __init__(self, files: Sequence[str], folder: Path) -> None:
        self._files = files
        self._folder = folder
        self._seen = self._look()

    def changed(self) -> bool:
        """Since the last time this was asked. A file that is gone for now, as an editor leaves it, is no change."""
        found = self._look()
        if None in found or found == self._seen:
            return False
        self._seen = found
        return True

    def load(self) -> list[Rule]:
        return load_rules(self._files, self._folder)

    def _look(self) -> list[tuple[int, int, int] | None]:
        seen: list[tuple[int, int, int] | None] = []
        for name in self._files:
            if name == DEFAULT:
                continue
            try:
                stat = (self._folder / name).stat()
            except OSError:
                seen.append(None)
            else:
                seen.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return seen


def default_rules() -> list[Rule]:
    source = importlib.resources.files("interlock.coordinator.rules").joinpath(DEFAULT_RULES)
    return parse_rules(source.read_text("utf-8"), file=DEFAULT_RULES)


def parse_rules(text: str, *, file: str) -> list[Rule]:
    """The rules of one file's text; ConfigError for the first thing that is wrong."""
    if len(text) > MAX_FILE:
        raise ConfigError(f"has {len(text)} characters", where=file, hint=f"at most {MAX_FILE}")
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}", where=file) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=file) from None
    except (ValueError, OverflowError, TypeError) as error:  # a date that is none, a number that Python won't read
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}", where=file) from None
    root = _mapping({} if tree is None else tree, file)
    _known(root, ("groups",), file)
    rules: list[Rule] = []
    names: set[str] = set()
    for number, item in enumerate(_sequence(root.get("groups", []), f"{file}: groups"), 1):
        group = _mapping(item, f"{file}: group {number}")
        name = _text(group.get("name"), f"{file}: group {number}: name")
        if name in names:
            raise ConfigError(f"there are two groups {name!r}", where=file)
        names.add(name)
        rules += _group(group, name, file)
    _distinct(rules)
    return rules


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: YAML would silently take the last. And merges that multiply."""

    merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        self.merged += len(node.value)
        if self.merged > MAX_KEYS:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_KEYS} keys", node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands here twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _group(group: dict[str, Any], name: str, file: str) -> list[Rule]:
    where = f"{file}: group {name!r}"
    _known(group, _GROUP_KEYS, where)
    interval_s = _duration(group, "interval", where)
    shared = _texts(group, "labels", where)
    rules = []
    for number, item in enumerate(_sequence(group.get("rules") or [], f"{where}: rules"), 1):
        tree = _mapping(item, f"{where}: rule {number}")
        rules.append(replace(_rule(tree, number, shared, name, file), interval_s=interval_s))
    return rules


def _rule(tree: dict[str, Any], number: int, shared: dict[str, str], group: str, file: str) -> Rule:
    where = f"{file}: group {group!r}: rule {number}"
    if ("alert" in tree) == ("record" in tree):
        _known(tree, (*_ALERT_KEYS, "record"), where)
        raise ConfigError("needs alert or record, and not both", where=where)
    kind: Kind = "alert" if "alert" in tree else "record"
    name = _text(tree[kind], f"{where}: {kind}")
    where = f"{file}: group {group!r}: rule {name!r}"
    _known(tree, _ALERT_KEYS if kind == "alert" else _RECORD_KEYS, where)
    text = _text(tree.get("expr"), f"{where}: expr")
    action: Action = _choice(tree, "x_action", get_args(Action), "notify", where)
    no_data: NoData = _choice(tree, "x_no_data", get_args(NoData), "keep" if action == "rollback" else "resolve", where)
    resolve = _text(tree["x_resolve_expr"], f"{where}: x_resolve_expr") if "x_resolve_expr" in tree else None
    dry_run = tree.get("x_dry_run", False)
    if not isinstance(dry_run, bool):
        raise ConfigError(f"{_short(dry_run)} is not true or false", where=f"{where}: x_dry_run")
    return Rule(
        name=name,
        kind=kind,
        text=text,
        expression=parse(text, where=where),
        for_s=_duration(tree, "for", where),
        keep_firing_for_s=_duration(tree, "keep_firing_for", where),
        labels={**shared, **_texts(tree, "labels", where)},
        annotations=_texts(tree, "annotations", where),
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


def _short(value: Any) -> str:
    """So much of a value as an error needs: aliases can make a small file's value endless."""
    return reprlib.repr(value)


# --- reading values, each with its place for the error


def _known(tree: dict[str, Any], known: Collection[str], where: str) -> None:
    for key in tree:
        if key in known:
            continue
        if key in _LATER:
            raise ConfigError(f"the key {key!r} is not supported yet", where=where, hint="leave it out")
        near = difflib.get_close_matches(str(key), known, n=1)
        raise ConfigError(
            f"unknown key {key!r}",
            where=where,
            hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}",
        )


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"a mapping belongs here, not {type(value).__name__}", where=where)
    return value


def _sequence(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"a list belongs here, not {type(value).__name__}", where=where)
    return value


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError("a text belongs here" if value is not None else "is missing", where=where)
    try:
        text = str(value)
    except ValueError:  # a number of more digits than Python writes
        raise ConfigError("the number is too long", where=where) from None
    if not text.strip():
        raise ConfigError("a text belongs here", where=where)
    return text


def _texts(tree: dict[str, Any], key: str, where: str) -> dict[str, str]:
    value = tree.get(key)
    if value is None:
        return {}
    place = f"{where}: {key}"
    return {str(name): _text_or_empty(text, f"{place}: {name}") for name, text in _mapping(value, place).items()}


def _text_or_empty(value: Any, where: str) -> str:
    return "" if value in (None, "") else _text(value, where)


def _duration(tree: dict[str, Any], key: str, where: str) -> float:
    value = tree.get(key)
    return 0.0 if value is None else duration(_text(value, f"{where}: {key}"), where=f"{where}: {key}")


def _choice(tree: dict[str, Any], key: str, choices: tuple[Any, ...], default: Any, where: str) -> Any:
    value = tree.get(key, default)
    if value not in choices:
        raise ConfigError(f"{_short(value)} is none of {', '.join(choices)}", where=f"{where}: {key}")
    return value
