"""Prometheus' test scripts (promqltest): the text -> its commands. Pure.

`load` blocks give series, `eval` blocks a query and what it should give. Also the notation of series and their values
that promtool's unit tests share. Times in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from interlock.broker.errors import ConfigError
from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.durations import duration

Point = float | Literal["stale", "histogram"] | None
Points = list[Point]

MAX_POINTS = 10_000_000  # of one series: a repetition count is a number in a text
_NUMBER = r"(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[iI][nN][fF]|[nN][aA][nN])"
_VALUE = re.compile(rf"([-+]?{_NUMBER})([-+]{_NUMBER})?(?:x(\d+))?")
_HISTOGRAM = re.compile(r"\{\{.*?\}\}(?:[-+]\{\{.*?\}\})?(?:x(\d+))?")
_EXPECT = re.compile(r"expect\s+(fail|warn|no_warn|info|no_info|ordered|string|range vector)\b\s*(.*)")
_COMMAND = re.compile(r"(?:clear|load(?:_with_nhcb)?|eval\w*)\b")
_STARTS = re.compile(r"(.*?)@st\s+(.*)")  # a line before a series, with the times at which its counter began
_SIGNED = r"[-+]?\d+[a-wyz]*"  # a duration in such a line: an x begins the count
_START = re.compile(rf"(?:_(?:x(\d+))?|({_SIGNED})(?:([-+]{_SIGNED})?x(\d+))?)")
_NAME = re.compile(r"[a-zA-Z_:][\w:]*")
_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"|' + r"'((?:[^'\\\n]|\\.)*)'|`([^`]*)`")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))")
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


@dataclass(frozen=True)
class Expect:
    """One `expect` line. `match`: "", "msg" or "regex"."""

    kind: str
    match: str = ""
    text: str = ""


@dataclass
class Load:
    """`starts`: beside some series, how long before each sample its counter began (seconds, not above 0)."""

    line: int
    step: float
    series: list[tuple[Labels, Points]]
    starts: dict[Labels, Points] = field(default_factory=dict)


@dataclass
class Eval:
    """A query at one moment, or at several (`step`). `rows`: labels (None: a number), and what it should give."""

    line: int
    query: str
    times: list[float]
    instant: bool
    step: float = 0.0
    expects: list[Expect] = field(default_factory=list)
    rows: list[tuple[Labels | None, Points]] = field(default_factory=list)

    def of(self, kind: str) -> list[Expect]:
        return [expect for expect in self.expects if expect.kind == kind]


@dataclass(frozen=True)
class Clear:
    line: int


@dataclass(frozen=True)
class Strange:
    """A command that isn't understood: what is in it is unknown, and so is what follows from a `load`."""

    line: int
    text: str
    why: str
    loads: bool = False


def commands(script: str) -> Iterator[Load | Eval | Clear | Strange]:
    """The script's commands in their order."""
    for line, block in _blocks(script):
        word = block[0].split()[0].lower()
        try:
            if word == "clear":
                yield Clear(line)
            elif word.startswith("load"):
                yield _load(line, word, block)
            elif word.startswith("eval"):
                yield _eval(line, block)
            else:
                yield Strange(line, block[0], f"{word!r} is no command")
        except ConfigError as error:
            yield Strange(line, block[0], error.what, loads=word.startswith("load"))


def _blocks(script: str) -> Iterator[tuple[int, list[str]]]:
    """(line, lines) of each command: it ends before an empty line, a comment, or another command at a line's start."""
    block: list[str] = []
    start = 0
    for number, raw in enumerate(script.splitlines(), 1):
        text = raw.strip()
        blank = not text or text.startswith("#")
        if block and (blank or _COMMAND.match(raw)):
            yield start, block
            block = []
        if blank:
            continue
        if not block:
            start = number
        block.append(text)
    if block:
        yield start, block


def _load(line: int, word: str, block: Sequence[str]) -> Load:
    head = block[0].split()
    if word not in ("load", "load_with_nhcb") or len(head) != 2:
        raise ConfigError(f"is no load: {block[0]!r}")
    made = Load(line, duration(head[1]), [])
    for row in block[1:]:
        found = _STARTS.match(row)
        if found is not None:
            labels, rest = series(found[1])
            if rest:
                raise ConfigError(f"{row!r} is no series")
            made.starts[labels] = start_offsets(found[2])
        else:
            made.series.append(series_row(row))
    if word == "load_with_nhcb":
        made.series += [native for labels, _ in list(made.series) for native in _native(labels)]
    return made


def _eval(line: int, block: Sequence[str]) -> Eval:
    found = re.fullmatch(r"eval(_\w+)?\s+instant\s+(?:at\s+(\S+)\s+)?(.+)", block[0])
    if found is not None:
        made = Eval(line, found[3], [moment(found[2]) if found[2] else 0.0], instant=True)
    else:
        found = re.fullmatch(r"eval(_\w+)?\s+range\s+from\s+(\S+)\s+to\s+(\S+)\s+step\s+(\S+)\s+(.+)", block[0])
        if found is None:
            raise ConfigError(f"is no eval: {block[0]!r}")
        first, last, step = (moment(found[at]) for at in (2, 3, 4))
        if step <= 0 or last < first:
            raise ConfigError(f"no range: {block[0]!r}")
        times = [round(first + step * at, 3) for at in range(int((last - first) / step + 1e-9) + 1)]
        made = Eval(line, found[5], times, instant=False, step=step)
    if found[1]:
        made.expects.append(Expect(found[1].removeprefix("_")))
    for row in block[1:]:
        expect = _expect(row)
        if expect is not None:
            made.expects.append(expect)
        elif found[1] == "_fail" and re.match(r"expected_fail_(message|regexp)\b", row):
            kind, text = row.split(None, 1)
            made.expects.append(Expect("fail", "msg" if kind.endswith("message") else "regex", text))
        else:
            made.rows.append(_row(row))
    return made


def _expect(row: str) -> Expect | None:
    found = _EXPECT.fullmatch(row)
    if found is None:
        return None
    kind, rest = found[1], found[2].strip()
    match = re.match(r"(msg|regex)\s*:\s*", rest)
    if match is None:
        return Expect(kind, "", rest)
    text = rest[match.end() :]
    quoted = _STRING.fullmatch(text)
    return Expect(kind, match[1], _unquoted(quoted) if quoted else text)


def moment(text: str) -> float:
    """Seconds, or a duration; negative too."""
    if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)", text):
        return float(text)
    return -duration(text[1:]) if text.startswith("-") else duration(text.removeprefix("+"))


def _row(row: str) -> tuple[Labels | None, Points]:
    name = _NAME.match(row)
    if not row.startswith("{{") and (row.startswith("{") or (name and not _VALUE.match(row) and name[0] != "stale")):
        return series_row(row)
    return None, points(row)


def series_row(row: str) -> tuple[Labels, Points]:
    """A series and its values, in one line."""
    labels, rest = series(row)
    return labels, points(rest)


def series(row: str) -> tuple[Labels, str]:
    """(the label set at the start of the text, what follows)."""
    pairs: dict[str, str] = {}
    name = _NAME.match(row)
    at = 0
    if name is not None:
        pairs[NAME] = name[0]
        at = name.end()
    while at < len(row) and row[at].isspace():
        at += 1
    if row[at : at + 1] == "{" and row[at : at + 2] != "{{":
        at = _braces(row, at + 1, pairs)
    elif name is None:
        raise ConfigError(f"{row!r} is no series")
    return tuple(sorted((key, value) for key, value in pairs.items() if value)), row[at:].strip()


def _braces(row: str, at: int, pairs: dict[str, str]) -> int:
    """Read labels up to the closing brace; where the rest begins."""
    while True:
        at = _skipped(row, at, ", \t")
        if row[at : at + 1] == "}":
            return at + 1
        quoted = _STRING.match(row, at)
        plain = re.compile(r"[a-zA-Z_][\w.:]*").match(row, at)
        if quoted is None and plain is None:
            raise ConfigError(f"{row!r} is no series")
        label = _unquoted(quoted) if quoted else plain[0] if plain else ""
        at = _skipped(row, (quoted or plain).end(), " \t")  # type: ignore[union-attr]
        if quoted and row[at : at + 1] in (",", "}"):
            pairs[NAME] = label
            continue
        value = _STRING.match(row, _skipped(row, at + 1, " \t"))
        if row[at : at + 1] != "=" or value is None:
            raise ConfigError(f"{row!r} is no series")
        pairs[label] = _unquoted(value)
        at = value.end()


def _skipped(row: str, at: int, what: str) -> int:
    while at < len(row) and row[at] in what:
        at += 1
    return at


def _unquoted(found: re.Match[str]) -> str:
    if found[3] is not None:
        return found[3]
    text = found[1] if found[1] is not None else found[2]
    return _ESCAPE.sub(_unescaped, text)


def _unescaped(found: re.Match[str]) -> str:
    for group, base in ((1, 16), (2, 16), (3, 16), (4, 8)):
        if found[group]:
            return chr(int(found[group], base))
    return _SIMPLE.get(found[5], found[5])


def points(text: str) -> Points:
    """Values one after another: 1 2+3x4 _ _x2 stale NaN. ConfigError for anything else."""
    made: Points = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        histogram = _HISTOGRAM.match(text, at)
        if histogram is not None:
            made += ["histogram"] * (int(histogram[1] or 0) + 1)
            at = histogram.end()
            continue
        word = re.compile(r"\S+").match(text, at)
        assert word is not None
        made += _repeated(word[0])
        at = word.end()
        if len(made) > MAX_POINTS:
            raise ConfigError(f"more than {MAX_POINTS} values")
    return made


def _repeated(word: str) -> Points:
    if word == "stale":
        return ["stale"]
    gap = re.fullmatch(r"_(?:x(\d+))?", word)
    if gap is not None:
        return [None] * min(int(gap[1] or 1), MAX_POINTS + 1)
    found = _VALUE.fullmatch(word)
    if found is None:
        raise ConfigError(f"{word!r} is no value")
    first, step = float(found[1]), float(found[2] or 0)
    count = min(int(found[3] or 0), MAX_POINTS)
    if not count:
        return [first]
    values: Points = [first]
    value = first
    for _ in range(count):  # added up, as Prometheus does it
        value += step
        values.append(value)
    return values


def start_offsets(text: str) -> Points:
    """Durations one after another, in the notation of values: _x2 -30s -1m-1mx3."""
    made: Points = []
    for word in text.split():
        found = _START.fullmatch(word)
        if found is None:
            raise ConfigError(f"{word!r} is no start time")
        if word.startswith("_"):
            made += [None] * min(int(found[1] or 1), MAX_POINTS + 1)
        else:
            first, step = moment(found[2]), moment(found[3] or "0")
            made += [first + step * at for at in range(min(int(found[4] or 0), MAX_POINTS) + 1)]
        if len(made) > MAX_POINTS:
            raise ConfigError(f"more than {MAX_POINTS} values")
    return made


def _native(labels: Labels) -> list[tuple[Labels, Points]]:
    """The native histogram that `load_with_nhcb` makes of a classic one's bucket."""
    pairs = dict(labels)
    if not pairs.get(NAME, "").endswith("_bucket"):
        return []
    pairs[NAME] = pairs[NAME].removesuffix("_bucket")
    return [(tuple(sorted((name, value) for name, value in pairs.items() if name != "le")), ["histogram"])]
