"""A record as one HTML page that needs nothing else: no script, no other file. Pure.

Names and reasons come from outside: everything is escaped, in text and in attributes alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from interlock.broker.facts import Track
from interlock.broker.samples import NAME
from interlock.coordinator.record import Led, Measured, Record, charted, role_of

WIDTH, HEIGHT = 720, 170  # of a chart, in units of its own
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 24  # its margins: room for the figures at its axes
LINES = 12  # in a chart: more can't be told apart; the table has them all
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # tell lines of the same colour apart
COLOURS = {"old": "#1f6fb4", "new": "#c4520c", "shared": "#5b6470"}
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1d2329;background:#fff;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.1rem;margin:2rem 0 .5rem;border-bottom:1px solid #d8dde3}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th{text-align:left;color:#5b6470;font-weight:600}th,td{padding:.2rem .6rem .2rem 0;vertical-align:top}
td{border-top:1px solid #eceff2;overflow-wrap:anywhere}td.n{white-space:nowrap;font-variant-numeric:tabular-nums}
.outcome{display:inline-block;padding:.1rem .6rem;border-radius:.3rem;color:#fff;background:#5b6470}
.committed{background:#1a7f4b}.rolled-back,.held,.refused{background:#a05a00}.failed{background:#b3261e}
.good{color:#1a7f4b}.warn{color:#a05a00}.bad{color:#b3261e;font-weight:600}.dim{color:#6b747e}
code{background:#f3f5f7;padding:.1rem .3rem;border-radius:.2rem;overflow-wrap:anywhere}
figure{margin:1rem 0}figcaption{font-weight:600}svg{width:100%;height:auto;display:block}
.key span{margin-right:1rem;font-size:.85rem}.scroll{overflow-x:auto}
@media(prefers-color-scheme:dark){body{color:#dfe4e9;background:#14181c}h2{border-color:#333b43}
td{border-color:#262d34}code{background:#232a31}th,.dim{color:#98a2ac}.good{color:#5cc98d}.warn{color:#e0a050}
.bad{color:#ff8a80}}
"""


def page(record: Record) -> str:
    """The whole page."""
    title = f"{record.agent}: {record.previous or '?'} to {record.to or '?'}, {record.outcome or 'in flight'}"
    parts = [
        _head(record),
        _stages(record),
        _decided(record),
        _charts(record),
        _checks(record),
        _led("Deviations", record.deviations),
        _led("Who steered it", record.led),
        _rollback(record),
        _requests(record),
        _timeline(record),
        _series(record),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


# --- parts


def _head(record: Record) -> str:
    outcome = record.outcome or "in flight"
    rows = [
        ("migration", record.migration),
        ("agent", f"{record.agent} {record.place}"),
        ("revisions", f"{record.previous or '?'} to {record.to or '?'}"),
        ("strategy", record.strategy),
        ("asked by", record.asked_by + (f", because: {record.because}" if record.because else "")),
        ("wave", record.wave),
        ("began", _moment(record.started)),
        ("ended", _moment(record.ended) + (f", after {_seconds(record.seconds)}" if record.seconds else "")),
        ("decided by", record.decided_by),
        ("reason", record.reason),
        *(("missing", gap) for gap in record.gaps),
    ]
    table = _table((), [(what, said) for what, said in rows if said])
    mark = f'<span class="outcome {escape(record.outcome)}">{escape(outcome)}</span>'
    return f"<h1>{escape(record.agent)}: {escape(record.previous or '?')} to {escape(record.to)} {mark}</h1>{table}"


def _stages(record: Record) -> str:
    begin = record.started or (record.stages[0].begin if record.stages else 0.0)
    rows = [
        (
            span.stage,
            f"+{_seconds(span.begin - begin)}",
            _seconds(span.end - span.begin) if span.end is not None else "-",
            "; ".join(span.steps),
        )
        for span in record.stages
    ]
    return _section("Stages", _table(("stage", "began", "took", "what the host did"), rows)) if rows else ""


def _decided(record: Record) -> str:
    parts = []
    if record.decision is not None:
        by = f"{record.decision.by}: {record.decision.reason}"
        parts.append(f"<p>{escape(by)} (event {record.decision.seq})</p>")
    rows = [
        (
            str(fired.seq),
            fired.rule + (" (decided)" if fired.decided else "") + (" (dry run)" if fired.dry_run else ""),
            f"{fired.value:g}",
            _moment(fired.sample_time),
            fired.summary + (f"; the fault of the {fired.blame}" if fired.blame else ""),
        )
        for fired in record.rules
    ]
    if rows:
        parts.append(_table(("event", "rule", "value", "first sample", "its words"), rows))
    for name, expr in dict.fromkeys((fired.rule, fired.expr) for fired in record.rules if fired.expr):
        parts.append(f"<p>{escape(name)}: <code>{escape(expr)}</code></p>")
    return _section("What decided", "".join(parts)) if parts else ""


def _checks(record: Record) -> str:
    rows = [row for measured in record.checks for row in _check_rows(measured)]
    head = ("event", "when", "check", "verdict", "value", "limit", "what was seen")
    return _section("Checks", _table(head, rows)) if rows else ""


def _check_rows(measured: Measured) -> Iterable[Sequence[str]]:
    when = "at the end" if measured.final else f"at {measured.checkpoint:.0%}"
    for check in measured.checks:
        value = "-" if check.value is None else f"{check.value:.4g}"
        yield str(measured.seq), when, check.check, check.verdict, value, f"{check.limit:.4g}", check.reason


def _led(title: str, led: Sequence[Led]) -> str:
    rows = [(str(one.seq), _clock(one.time), one.what, one.by, one.because) for one in led]
    return _section(title, _table(("event", "time", "what", "who", "because"), rows)) if rows else ""


def _rollback(record: Record) -> str:
    back = record.rollback
    if back is None:
        return ""
    first = back.first_sample
    rows = [
        (what, _clock(at), "" if first is None else f"{(at - first) * 1000:+.0f} ms")
        for what, at in (
            ("first sample that showed it", back.first_sample),
            ("decided", back.asked),
            ("the host knew", back.received),
            (f"requests went to {back.revision}", back.routed),
            (f"{back.revision} answered", back.restored),
        )
        if at is not None
    ]
    how = "it was still running" if back.level == 1 else "it had to be started again"
    checked = "" if back.verified else "; no probe of it was answered"
    table = _table(("", "time", "since the first sample"), rows)
    return _section("Rollback", f"<p>Level {back.level}: {escape(how + checked)}.</p>{table}")


def _requests(record: Record) -> str:
    rows = [
        (revision, ", ".join(f"{name}: {value:.0f}" for name, value in sorted(figures.items())))
        for revision, figures in record.requests.items()
    ]
    return _section("Requests", _table(("revision", "while it was recorded"), rows)) if rows else ""


def _timeline(record: Record) -> str:
    rows = "".join(
        f'<tr class="{moment.tone}"><td class="n">{moment.seq}</td><td class="n">{_clock(moment.time)}</td>'
        f"<td>{escape(moment.source)}</td><td>{escape(moment.text)}</td></tr>"
        for moment in record.timeline
    )
    head = "<tr><th>event</th><th>time</th><th>who</th><th>what</th></tr>"
    return _section("Timeline", f'<div class="scroll"><table>{head}{rows}</table></div>') if rows else ""


def _series(record: Record) -> str:
    rows = [
        (
            _labels(track.labels, ()), track.labels.get(NAME, ""), str(len(track.values)),
            f"{min(track.values):.6g}", f"{max(track.values):.6g}", f"{track.values[-1]:.6g}",
        )
        for track in sorted(record.series, key=lambda track: track.labels.get(NAME, ""))
        if track.values
    ]  # fmt: skip
    head = ("labels", "series", "points", "least", "most", "last")
    return _section("Series", _table(head, rows)) if rows else ""


# --- charts


def _charts(record: Record) -> str:
    figures = []
    for name in charted(record):
        tracks = [track for track in record.series if track.labels.get(NAME) == name and track.values]
        if tracks:
            figures.append(_figure(record, name, tracks[:LINES]))
    return _section("Series that decided" if record.deciding else "Series", "".join(figures)) if figures else ""


@dataclass(frozen=True)
class _Plot:
    """From moments and values to coordinates."""

    begin: float
    end: float
    low: float
    high: float

    def x(self, at: float) -> float:
        return LEFT + (max(at, self.begin) - self.begin) / (self.end - self.begin) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def _figure(record: Record, name: str, tracks: Sequence[Track]) -> str:
    common = {key for key, value in tracks[0].labels.items() if all(t.labels.get(key) == value for t in tracks)}
    counts: dict[str, int] = {}
    lines, key = [], []
    plot = _plot(record, tracks)
    for track in tracks:
        role = role_of(record, track)
        dash = DASHES[counts.get(role, 0) % len(DASHES)]
        counts[role] = counts.get(role, 0) + 1
        points = " ".join(
            f"{plot.x(at):.1f},{plot.y(value):.1f}" for at, value in zip(track.times, track.values, strict=False)
        )
        colour = COLOURS[role]
        style = f'fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash or "none"}"'
        lines.append(f'<polyline points="{points}" {style}/>')
        words = {"old": "old", "new": "new", "shared": "host"}[role]
        key.append(
            f'<span><svg viewBox="0 0 24 8" style="width:24px;display:inline" aria-hidden="true">'
            f'<line x1="0" y1="4" x2="24" y2="4" {style}/></svg> {words} {escape(_labels(track.labels, common))}</span>'
        )
    lines += _marks(record, plot)
    body = "".join([*_axes(plot), *lines])
    label = escape(f"{name} over time", quote=True)
    return (
        f"<figure><figcaption>{escape(name)}</figcaption>"
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'{body}</svg><div class="key">{"".join(key)}</div></figure>'
    )


def _plot(record: Record, tracks: Sequence[Track]) -> _Plot:
    times = [at for track in tracks for at in track.times]
    values = [value for track in tracks for value in track.values]
    begin = record.started or min(times)
    end = max([record.ended or times[-1], *times])
    low, high = min([0.0, *values]), max(values)
    return _Plot(begin, end if end > begin else begin + 1.0, low, high if high > low else low + 1.0)


def _axes(plot: _Plot) -> list[str]:
    text = 'font-size="11" fill="#7a848e"'
    found = []
    for value in (plot.low, (plot.low + plot.high) / 2, plot.high):
        at = plot.y(value)
        found.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="#d8dde3"/>')
        found.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end" {text}>{_figure_of(value)}</text>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        moment = plot.begin + share * (plot.end - plot.begin)
        label = f"+{_seconds(moment - plot.begin)}"
        found.append(f'<text x="{plot.x(moment):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}" {text}>{label}</text>')
    return found


def _marks(record: Record, plot: _Plot) -> list[str]:
    """Where stages began, and the sample that showed the breach."""
    marks = [(span.begin, span.stage, "#98a2ac") for span in record.stages]
    first = record.decision.sample_time if record.decision is not None else None
    if first is not None and record.rollback is not None:
        marks.append((first, "breach", "#b3261e"))
    return [
        f'<line x1="{plot.x(at):.1f}" y1="{TOP}" x2="{plot.x(at):.1f}" y2="{HEIGHT - BOTTOM}" stroke="{colour}" '
        f'stroke-dasharray="2 3"><title>{escape(what)}</title></line>'
        for at, what, colour in marks
        if LEFT <= plot.x(at) <= WIDTH - RIGHT
    ]


# --- words


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def _labels(labels: dict[str, str], but: Iterable[str]) -> str:
    """Such as `revision=v2, role=candidate`."""
    left_out = {*but, NAME}
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()) if name not in left_out)


def _figure_of(value: float) -> str:
    """Such as 1.5M, 20, 0.003."""
    size = abs(value)
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def _seconds(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if abs(seconds) < 120:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.1f} min" if abs(seconds) < 7200 else f"{seconds / 3600:.1f} h"


def _moment(at: float | None) -> str:
    return "" if not at else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d} UTC"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}"
