"""`{{ ... }}` in labels and annotations: $value, $labels.NAME, and the few functions that alert texts use.

What isn't known stays as it is written: a text that reads oddly is better than an alert that doesn't come.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

_PLACE = re.compile(r"\{\{-?\s*(.+?)\s*-?\}\}")
_LABEL = re.compile(r"(?:\$labels|\.Labels)\.([a-zA-Z_]\w*)")
_PRINTF = re.compile(r'printf\s+"([^"]*?)%(\.\d{1,2})?([fgev])([^"]*)"(?:\s+(.+))?')


def expand(text: str, labels: Mapping[str, str], value: float) -> str:
    """The text with its places filled in. A label that isn't there is empty, as in Prometheus."""
    if "{{" not in text:
        return text
    return _PLACE.sub(lambda found: _expanded(found, labels, value), text)


def number(value: float) -> str:
    """As Go prints it: the shortest digits that say the number."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value).removesuffix(".0")


def _expanded(found: re.Match[str], labels: Mapping[str, str], value: float) -> str:
    current: float | str | None = None
    for part in (part.strip() for part in found[1].split("|")):
        if part in ("$value", ".Value"):
            current = value
        elif label := _LABEL.fullmatch(part):
            current = labels.get(label[1], "")
        elif printf := _PRINTF.fullmatch(part):
            argument = value if printf[5] in ("$value", ".Value") else current
            if not isinstance(argument, float):
                return found[0]
            kind = printf[3] if printf[3] != "v" else "g"
            current = f"{printf[1]}{argument:{printf[2] or ''}{kind}}{printf[4]}".replace("%%", "%")
        elif (function := part.split()[0] if part else "") in _FUNCTIONS:
            argument = value if part.split()[1:] in (["$value"], [".Value"]) else current
            if not isinstance(argument, float):
                return found[0]
            current = _FUNCTIONS[function](argument)
        else:
            return found[0]
    return number(current) if isinstance(current, float) else current or ""


def _humanize(value: float) -> str:
    return _scaled(value, 1000.0, "kMGTPEZY")


def _humanize1024(value: float) -> str:
    return _scaled(value, 1024.0, ("ki", "Mi", "Gi", "Ti", "Pi", "Ei", "Zi", "Yi"))


def _scaled(value: float, base: float, prefixes: str | tuple[str, ...]) -> str:
    if not math.isfinite(value) or abs(value) < base:
        return f"{value:.4g}"
    chosen = ""
    for prefix in prefixes:
        if abs(value) < base:
            break
        value /= base
        chosen = prefix
    return f"{value:.4g}{chosen}"


def _percentage(value: float) -> str:
    return f"{value * 100:.4g}%"


def _duration(value: float) -> str:
    if not math.isfinite(value):
        return f"{value:.4g}"
    if abs(value) < 60:
        return f"{value:.4g}s" if abs(value) >= 1 or value == 0 else f"{value * 1000:.4g}ms"
    sign, rest = ("-" if value < 0 else ""), int(abs(value))
    days, rest = divmod(rest, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    words = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    while words[0][0] == 0:
        words.pop(0)
    return sign + " ".join(f"{count}{unit}" for count, unit in words)


_FUNCTIONS: dict[str, Callable[[float], str]] = {
    "humanize": _humanize,
    "humanize1024": _humanize1024,
    "humanizePercentage": _percentage,
    "humanizeDuration": _duration,
}
