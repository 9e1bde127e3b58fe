"""YAML, and values read from its trees, each with its place for the error. The only module that imports yaml."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection
from typing import Any

import yaml

from interlock.broker.errors import ConfigError
from interlock.coordinator.rules.durations import duration

MAX_FILE = 4 << 20  # characters of a rule file: the largest of the public ones have 0.2 million
MAX_KEYS = 200_000  # in all mappings of a file, those that are merged in from others counted each time

_LATER = ("limit", "query_offset", "partial_response_strategy")  # known, and not supported


def load_yaml(text: str, *, file: str) -> Any:
    """The tree of a file's text; None of an empty one. ConfigError says what is wrong and where."""
    if len(text) > MAX_FILE:
        raise ConfigError(f"has {len(text)} characters", where=file, hint=f"at most {MAX_FILE}")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}", where=file) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=file) from None
    except (ValueError, OverflowError, TypeError) as error:  # a date that is none, a number that Python won't read
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}", where=file) from None


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


def short(value: Any) -> str:
    """So much of a value as an error needs: aliases can make a small file's value endless."""
    return reprlib.repr(value)


def known(tree: dict[str, Any], known: Collection[str], where: str) -> None:
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


def mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"a mapping belongs here, not {type(value).__name__}", where=where)
    return value


def sequence(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"a list belongs here, not {type(value).__name__}", where=where)
    return value


def text_of(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError("a text belongs here" if value is not None else "is missing", where=where)
    try:
        text = str(value)
    except ValueError:  # a number of more digits than Python writes
        raise ConfigError("the number is too long", where=where) from None
    if not text.strip():
        raise ConfigError("a text belongs here", where=where)
    return text


def texts(tree: dict[str, Any], key: str, where: str) -> dict[str, str]:
    value = tree.get(key)
    if value is None:
        return {}
    place = f"{where}: {key}"
    return {str(name): _text_or_empty(text, f"{place}: {name}") for name, text in mapping(value, place).items()}


def _text_or_empty(value: Any, where: str) -> str:
    return "" if value in (None, "") else text_of(value, where)


def duration_of(tree: dict[str, Any], key: str, where: str) -> float:
    value = tree.get(key)
    return 0.0 if value is None else duration(text_of(value, f"{where}: {key}"), where=f"{where}: {key}")


def choice(tree: dict[str, Any], key: str, choices: tuple[Any, ...], default: Any, where: str) -> Any:
    value = tree.get(key, default)
    if value not in choices:
        raise ConfigError(f"{short(value)} is none of {', '.join(choices)}", where=f"{where}: {key}")
    return value
