"""PromQL that the parser can't read, written so that it can. Pure.

The parser (promql-parser) lags behind Prometheus' grammar: it has no arithmetic in durations (`[2 * 5m]`,
`offset (1h / 2)`, `step()`, `range()`), no `anchored` and `smoothed`, no `_` inside numbers, no times before 1970
behind `@`, and no braces in info() that say only what isn't meant. All of these are in the text alone, so that they
can be computed, or marked, before it is read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from interlock.broker.errors import ConfigError
from interlock.coordinator.rules.durations import duration

EDGES = "__edges__"  # the label of a matcher that says what stood behind a selector: anchored, smoothed, or none
BEFORE_1970 = 2e11  # the parser's times are not negative: -1 is written as this plus 1, some day in the year 8307
MAX_DURATION_S = 2.0**63 / 1e9  # Prometheus keeps nanoseconds in 64 bits
MAX_PARTS = 50  # of a duration: its reader recurses, and must end somewhere

_TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+)
      | (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)
      | (?P<number>0[xX][0-9a-fA-F_]+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?(?:[a-zA-Z][a-zA-Z0-9]*)?)
      | (?P<name>[a-zA-Z_:][\w:]*)
      | (?P<sign>.)""",
    re.VERBOSE | re.DOTALL,
)
_SIMPLE = re.compile(r"\s*\d[\da-z.]*\s*")  # a duration that the parser reads itself
_DURATIONS = ("step", "range", "min", "max", "min_of", "max_of")  # functions in durations
_KEYWORDS = frozenset(
    ("and", "or", "unless", "atan2", "bool", "by", "without", "on", "ignoring", "group_left", "group_right")
)
_LABEL_LISTS = frozenset(("by", "without", "on", "ignoring", "group_left", "group_right"))


@dataclass(frozen=True)
class Span:
    """Of the range that is evaluated, seconds: what `step()` and `range()` are in a duration. 0: one moment."""

    step: float = 0.0
    range: float = 0.0


ONE_MOMENT = Span()


def respelled(text: str, span: Span = ONE_MOMENT, *, where: str = "expression") -> str:
    """The text for the parser. ConfigError for a duration that is none; what isn't understood stays as it is."""
    return "".join(_Speller(text, span, where).run())


class _Speller:
    """One walk over the tokens. Selectors are told from the rest by what may stand before them."""

    def __init__(self, text: str, span: Span, where: str) -> None:
        self.tokens = _tokens(text)
        self.at = 0
        self.out: list[str] = []
        self.calls: list[str] = []
        self.span = span
        self.where = where

    def run(self) -> list[str]:
        while self.at < len(self.tokens):
            kind, text = self.tokens[self.at]
            if kind == "number":
                self.number()
            elif kind == "name" and text.lower() in _LABEL_LISTS and self.ahead(1)[1] == "(":
                self.copy_through(")")
            elif kind == "name" and text.lower() not in _KEYWORDS and self.ahead(1)[1] != "(":
                self.take()
                self.selector(len(self.out) - 1)
            elif text == "{":
                self.selector(None, labels_only=self.calls[-1:] == ["info"])
            elif text in "()":
                self.parenthesis(text)
            elif text == "[":  # of a subquery of something in parentheses
                self.modifiers()
            else:
                self.take()
        return self.out

    def parenthesis(self, sign: str) -> None:
        """Keep count of the calls that we are inside of."""
        if sign == "(":
            before = next((text for text in reversed(self.out) if text.strip()), "")
            self.calls.append(before.lower())
        elif self.calls:
            self.calls.pop()
        self.take()

    # --- tokens

    def take(self) -> str:
        text = self.tokens[self.at][1]
        self.out.append(text)
        self.at += 1
        return text

    def ahead(self, count: int = 0) -> tuple[str, str]:
        """(kind, text) of a token that isn't space; empty at the end. 0: the next one."""
        found = [token for token in self.tokens[self.at : self.at + 2 * count + 2] if token[0] != "space"]
        return found[count] if len(found) > count else ("", "")

    def spaces(self) -> None:
        while self.at < len(self.tokens) and self.tokens[self.at][0] == "space":
            self.take()

    def copy_through(self, end: str) -> None:
        while self.at < len(self.tokens) and self.take() != end:
            pass

    def number(self) -> None:
        """Without the `_` between its digits."""
        text = self.take()
        if not text.endswith("_"):
            self.out[-1] = text.replace("_", "")

    # --- what is written differently

    def selector(self, name: int | None, *, labels_only: bool = False) -> None:
        """Behind a name (its place in `out`), or at a brace: the selector's labels, and what modifies it.

        `labels_only`: they stand in info(), which may say only what a label is not; the parser would refuse that.
        """
        closing: int | None = None
        if self.ahead()[1] == "{":
            self.spaces()
            self.copy_through("}")
            closing = len(self.out) - 1
        edges = self.modifiers() or ("none" if labels_only else "")
        if not edges:
            return
        matcher = f'{EDGES}="{edges}"'
        if closing is None:
            assert name is not None
            self.out[name] += "{" + matcher + "}"
        else:
            before = next(text for text in reversed(self.out[:closing]) if text.strip())
            self.out[closing] = ("" if before in "{," else ",") + matcher + "}"

    def modifiers(self) -> str:
        """Ranges, offsets, moments; which of `anchored` and `smoothed` is among them."""
        subquery, edges = False, ""
        while True:
            word = self.ahead()[1].lower()
            if word == "[":
                self.spaces()
                subquery |= self.brackets()
            elif word == "offset":
                self.spaces()
                self.offset()
            elif word == "@":
                self.spaces()
                self.moment()
            elif word in ("anchored", "smoothed"):
                if subquery:
                    raise ConfigError(f"{word} modifier is not supported for subqueries", where=self.where)
                if edges and edges != word:
                    raise ConfigError("anchored and smoothed modifiers cannot be used together", where=self.where)
                edges = word
                self.spaces()
                self.at += 1
            else:
                return edges

    def brackets(self) -> bool:
        """A range, or a subquery's; whether it is the latter."""
        end = next((at for at in range(self.at, len(self.tokens)) if self.tokens[at][1] == "]"), None)
        if end is None:  # the parser will say so
            self.take()
            return False
        text = "".join(part for _, part in self.tokens[self.at + 1 : end])
        self.at = end + 1
        first, colon, second = text.partition(":")
        if not (_SIMPLE.fullmatch(first) and (_SIMPLE.fullmatch(second) or not second.strip())):
            text = self.length(first) + colon + (self.length(second) if second.strip() else "")
        self.out.append(f"[{text}]")
        return bool(colon)

    def length(self, text: str) -> str:
        reader = _Duration(_tokens(text), self.span, self.where)
        seconds = reader.bounded(reader.sum())
        if reader.peek():
            raise ConfigError(f"unexpected {reader.peek()!r} in a duration", where=self.where)
        if seconds <= 0:
            raise ConfigError("duration must be greater than 0", where=self.where)
        return _literal(seconds)

    def offset(self) -> None:
        self.take()
        signed = self.ahead()[1] in ("-", "+")
        kind, text = self.ahead(1 if signed else 0)
        if kind == "number":
            for _ in range(2 if signed else 1):
                self.spaces()
                self.take()
        elif text == "(" or text in _DURATIONS:
            reader = _Duration(self.tokens[self.at :], self.span, self.where)
            seconds = reader.bounded(reader.one())
            self.at += reader.at
            self.out.append(" " + ("-" if seconds < 0 else "") + _literal(abs(seconds)))

    def moment(self) -> None:
        self.take()
        kind, text = self.ahead()
        if text in ("start", "end"):
            self.copy_through(")")
        elif kind == "number" or (text in ("-", "+") and self.ahead(1)[0] == "number"):
            while self.out[-1] != text:
                self.take()
            if text in ("-", "+"):
                self.spaces()
                self.number()
                if text == "-":
                    self.before_1970()

    def before_1970(self) -> None:
        """The sign and the number that were written last, as a time that the parser can say."""
        try:
            seconds = float(self.out[-1])
        except ValueError:
            return
        while self.out.pop() != "-":
            pass
        self.out.append(repr(BEFORE_1970 + seconds))


def _tokens(text: str) -> list[tuple[str, str]]:
    return [(str(found.lastgroup), found[0]) for found in _TOKEN.finditer(text)]


class _Duration:
    """A duration as an expression: + - * / % ^, parentheses, step(), range(), min_of() and max_of()."""

    def __init__(self, tokens: list[tuple[str, str]], span: Span, where: str) -> None:
        self.tokens = tokens
        self.at = 0
        self.span = span
        self.where = where
        self.parts = 0

    def peek(self) -> str:
        while self.at < len(self.tokens) and self.tokens[self.at][0] == "space":
            self.at += 1
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise ConfigError(
                f"{self.peek() or 'the end'!r} in a duration, where {expected!r} is due", where=self.where
            )
        self.at += 1

    def bounded(self, seconds: float) -> float:
        if not math.isfinite(seconds):
            raise ConfigError("duration is NaN or infinite", where=self.where)
        if abs(seconds) > MAX_DURATION_S:
            raise ConfigError("duration is out of range", where=self.where)
        return seconds

    def sum(self) -> float:
        total = self.product()
        while self.peek() in ("+", "-"):
            sign = self.peek()
            self.at += 1
            other = self.product()
            total = total + other if sign == "+" else total - other
        return total

    def product(self) -> float:
        total = self.signed()
        while self.peek() in ("*", "/", "%"):
            sign = self.peek()
            self.at += 1
            other = self.signed()
            if sign == "*":
                total *= other
            elif other == 0:
                raise ConfigError("division by zero" if sign == "/" else "modulo by zero", where=self.where)
            else:
                total = total / other if sign == "/" else math.fmod(total, other)
        return total

    def signed(self) -> float:
        sign = 1.0
        while self.peek() in ("-", "+"):
            sign = -sign if self.peek() == "-" else sign
            self.at += 1
        return sign * self.power()

    def power(self) -> float:
        base = self.one()
        if self.peek() != "^":
            return base
        self.at += 1
        try:
            return math.pow(base, self.signed())
        except (OverflowError, ValueError):
            raise ConfigError("duration is NaN or infinite", where=self.where) from None

    def one(self) -> float:
        """A number, something in parentheses, or a call; with signs before it."""
        self.parts += 1
        if self.parts > MAX_PARTS:
            raise ConfigError(f"a duration of more than {MAX_PARTS} parts", where=self.where)
        if self.peek() in ("-", "+"):
            sign = -1.0 if self.peek() == "-" else 1.0
            self.at += 1
            return sign * self.one()
        word = self.peek()
        kind = self.tokens[self.at][0] if word else ""
        self.at += 1
        if kind == "number":
            return _seconds(word, self.where)
        if word == "(":
            inside = self.sum()
            self.take(")")
            return inside
        if word in ("step", "range"):
            self.take("(")
            self.take(")")
            return self.span.step if word == "step" else self.span.range
        if word in ("min", "max", "min_of", "max_of"):
            self.take("(")
            first = self.sum()
            self.take(",")
            second = self.sum()
            self.take(")")
            return min(first, second) if word.startswith("min") else max(first, second)
        raise ConfigError(f"{word or 'the end'!r} in a duration", where=self.where)


def _seconds(word: str, where: str) -> float:
    plain = word.replace("_", "")
    try:
        return float(int(plain, 16)) if plain[:2] in ("0x", "0X") else float(plain)
    except ValueError:
        return duration(word, where=where)


def _literal(seconds: float) -> str:
    """As the parser reads it: whole milliseconds, cut off as Prometheus does it."""
    return f"{int(seconds * 1000)}ms"
