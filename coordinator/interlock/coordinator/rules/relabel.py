"""Functions that make other label sets: label_replace, label_join; and how a value is written as a label. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from interlock.broker.samples import Labels
from interlock.coordinator.rules.expression import Text, python_pattern
from interlock.coordinator.rules.labelsets import replaced
from interlock.coordinator.rules.values import EvaluationError

_PLACE = re.compile(r"\$(?:(\$)|\{(\w+)\}|(\w+))")


def label_name(text: Text, what: str) -> str:
    """EvaluationError for what can't be a label's name."""
    if not text.value or not text.valid:
        raise EvaluationError(f"invalid {what}: {text.value}")
    return text.value


def replacer(dst: Text, replacement: Text, src: Text, pattern: Text) -> Callable[[Labels], Labels]:
    """label_replace: what the pattern finds in one label makes another."""
    try:
        found = re.compile(python_pattern(pattern.value), re.DOTALL)
    except (re.error, ValueError):
        raise EvaluationError(f"invalid regular expression in label_replace(): {pattern.value}") from None
    name = label_name(dst, "destination label name in label_replace()")

    def replace(labels: Labels) -> Labels:
        matched = found.fullmatch(dict(labels).get(src.value, ""))
        return labels if matched is None else replaced(labels, name, expanded(replacement.value, matched))

    return replace


def matching(src: Text, pattern: Text) -> Callable[[Labels], bool]:
    """Which label sets label_replace changes. The pattern is one that `replacer` took."""
    found = re.compile(python_pattern(pattern.value), re.DOTALL)
    return lambda labels: found.fullmatch(dict(labels).get(src.value, "")) is not None


def expanded(template: str, matched: re.Match[str]) -> str:
    """The template with $1, ${1} and ${name} filled in; a group that isn't there is empty, as in Go."""

    def fill(place: re.Match[str]) -> str:
        if place[1]:
            return "$"
        name = place[2] or place[3]
        try:
            return matched[int(name) if name.isdigit() else name] or ""
        except IndexError:
            return ""

    return _PLACE.sub(fill, template)


def joiner(dst: Text, separator: Text, sources: Sequence[Text]) -> Callable[[Labels], Labels]:
    """label_join: several labels' values make another."""
    names = [label_name(source, "source label name in label_join()") for source in sources]
    name = label_name(dst, "destination label name in label_join()")

    def join(labels: Labels) -> Labels:
        found = dict(labels)
        return replaced(labels, name, separator.value.join(found.get(source, "") for source in names))

    return join


def written(value: float) -> str:
    """A value as a label: all its digits, and no exponent."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return format(Decimal(repr(value)), "f").removesuffix(".0")


def open_metrics(value: float) -> str:
    """A value as OpenMetrics writes it: 0.5, 1.0, +Inf."""
    if math.isnan(value) or math.isinf(value):
        return written(value)
    text = repr(value)
    return text if "." in text or "e" in text else text + ".0"


def natural_key(labels: Labels, names: Sequence[str]) -> list[list[_Chunk]]:
    """By what label sets are ordered, label by label: runs of digits count as numbers."""
    found = dict(labels)
    return [[_Chunk(part) for part in re.findall(r"\d+|\D+", found.get(name, ""))] for name in names]


class _Chunk(str):
    """A part of a label's value. Two numbers compare as such; a number and something else compare as texts."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        numbers = self.isdecimal() and isinstance(other, str) and other.isdecimal()
        return int(self) == int(other) if numbers else str.__eq__(self, other)  # type: ignore[call-overload]

    def __lt__(self, other: str) -> bool:
        return int(self) < int(other) if self.isdecimal() and other.isdecimal() else str.__lt__(self, other)
