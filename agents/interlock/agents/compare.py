"""Shadow comparison: the answer of a candidate held against that of the serving revision. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from interlock.agents.values import decode_answer
from interlock.broker.config import CompareConfig, HandlerCompare

MAX_VALUE_TEXT = 80  # characters of each value in a difference: it stands in one line of a report
NO_ANSWER = "no answer"


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One mirrored request and what became of it. `new` None: the candidate did not answer. Latencies in seconds.

    error: why the two could not be judged; such a pair is neither equal nor different.
    """

    request: bytes
    old: bytes
    new: bytes | None
    old_latency: float
    new_latency: float | None
    equal: bool
    difference: str = ""
    error: str = ""
    handler: str = ""  # the action, or the request line


class Verdict(msgspec.Struct, frozen=True):
    """What a comparison says: the difference, or why there is no saying; equal if both are empty."""

    difference: str = ""
    error: str = ""


def handler_of(name: str, handlers: Mapping[str, HandlerCompare]) -> HandlerCompare | None:
    """The entry for an action, or for a request line "METHOD /path?query": the longest path that it is at or below."""
    if not handlers:
        return None
    found = handlers.get(name)
    if found is None and " /" in name:
        name = name.partition("?")[0]
        below = [key for key in handlers if covers(key, name)]
        found = handlers[max(below, key=len)] if below else None
    return found


def covers(prefix: str, line: str) -> bool:
    """Whether "METHOD /path" is this request line (without its query), or a path above it."""
    return line == prefix or line.startswith(prefix if prefix.endswith("/") else f"{prefix}/")


def action_in(request: Sequence[bytes], field: str) -> str:
    """The action that a request names; empty if it names none."""
    decoded = decode_answer(request[0]) if request else None
    value = decoded[1].get(field) if decoded is not None and isinstance(decoded[1], dict) else None
    return value if isinstance(value, str) else ""


def merged(config: CompareConfig, handler: HandlerCompare | None) -> CompareConfig:
    """The agent's settings, with the handler's where it has its own."""
    if handler is None:
        return config
    ignore = config.ignore if handler.ignore is None else handler.ignore
    tolerance = config.tolerance if handler.tolerance is None else handler.tolerance
    return CompareConfig(ignore=ignore, tolerance=tolerance)


def difference(old: Sequence[bytes], new: Sequence[bytes] | None, config: CompareConfig, *, exact: bool = False) -> str:
    """What differs between two answers (frames), as "path: old, not new"; empty if nothing that matters does.

    exact: the bytes count, not what they mean.
    """
    if new is None:
        return NO_ANSWER
    if len(old) != len(new):
        return f"{len(old)} frames, not {len(new)}"
    if exact:
        return _byte_difference(old, new)
    for number, (left, right) in enumerate(zip(old, new, strict=True)):
        found = _body_difference(left, right, config)
        if found:
            return f"frame {number}: {found}" if len(old) > 1 else found
    return ""


def _byte_difference(old: Sequence[bytes], new: Sequence[bytes]) -> str:
    for number, (left, right) in enumerate(zip(old, new, strict=True)):
        if left != right:
            place = f"frame {number}: " if len(old) > 1 else ""
            at = next((n for n, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
            if at is None:
                return f"{place}{len(left)} bytes, not {len(right)}"
            return f"{place}byte {at}: {_shorten(left[at : at + 20])}, not {_shorten(right[at : at + 20])}"
    return ""


def _body_difference(old: bytes, new: bytes, config: CompareConfig) -> str:
    if old == new:
        return ""
    left, right = decode_answer(old), decode_answer(new)
    if left is None or right is None:
        return f"{_shorten(old)}, not {_shorten(new)}"
    if left[0] != right[0]:
        return f"answered in {left[0]}, not {right[0]}"
    return value_difference(left[1], right[1], ignore=set(config.ignore), tolerance=config.tolerance)


def value_difference(old: Any, new: Any, *, ignore: Collection[str], tolerance: float) -> str:
    """The first difference of two decoded values, depth first; keys in `ignore` may differ or lack at any depth."""
    stack: list[tuple[str, Any, Any]] = [("$", old, new)]  # not recursive: depth is the sender's choice
    while stack:
        path, left, right = stack.pop()
        if isinstance(left, dict) and isinstance(right, dict):
            keys = [key for key in left if key not in ignore]
            for key in keys:
                if key not in right:
                    return f"{path}.{_key(key)}: lacks {_shorten(left[key])}"
            for key in right:
                if key not in ignore and key not in left:
                    return f"{path}.{_key(key)}: has {_shorten(right[key])}, not expected"
            stack.extend((f"{path}.{_key(key)}", left[key], right[key]) for key in reversed(keys))
        elif isinstance(left, list) and isinstance(right, list):
            if len(left) != len(right):
                return f"{path}: {len(left)} elements, not {len(right)}"
            # reversed: the stack then gives the first element first
            for number in reversed(range(len(left))):
                stack.append((f"{path}[{number}]", left[number], right[number]))
        elif not _same(left, right, tolerance):
            return f"{path}: {_shorten(left)}, not {_shorten(right)}"
    return ""


def _same(left: Any, right: Any, tolerance: float) -> bool:
    if _is_number(left) and _is_number(right):
        try:
            if left == right or (math.isnan(left) and math.isnan(right)):
                return True
            return tolerance > 0 and math.isclose(left, right, rel_tol=tolerance, abs_tol=0.0)
        except OverflowError:  # an integer beyond the range of a float
            return False
    return type(left) is type(right) and bool(left == right)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shorten(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'a map' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(_head(value))
    return text if len(text) <= MAX_VALUE_TEXT else text[: MAX_VALUE_TEXT - 3] + "..."


def _key(key: Any) -> str:
    return key if isinstance(key, str) and key.isidentifier() and len(key) <= MAX_VALUE_TEXT else _shorten(key)


def _head(value: Any) -> Any:
    """So much of a long text that its repr costs nothing."""
    return value[: MAX_VALUE_TEXT + 1] if isinstance(value, str | bytes) else value
