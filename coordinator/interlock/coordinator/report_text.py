"""A record in words, for a terminal: all of it (`report`), or why it ended as it did (`explain`). Pure."""

from __future__ import annotations

import time
from collections.abc import Iterator

from interlock.broker.facts import Check, Track
from interlock.broker.samples import NAME
from interlock.coordinator.record import Fired, Led, Measured, Record, Span, role_of
from interlock.coordinator.wording import Tone

SAMPLES = 4  # of a series that decided, up to the decision: enough to see where it went
TRACKS = 4  # series that are told by their samples; the page draws them all
LATE_S = 60.0  # with no decision to look back from, the samples of a series' end are told

Line = tuple[str, Tone]
TONES: dict[str, Tone] = {"committed": "good", "failed": "bad", "": "plain"}


def report(record: Record) -> Iterator[Line]:
    """Everything but the timeline and the samples, which are in the page and in the JSON."""
    yield headline(record), TONES.get(record.outcome, "warn")
    for what, said in _about(record):
        yield f"  {what}: {said}", "plain"
    for gap in record.gaps:
        yield f"  missing: {gap}", "warn"
    begin = record.started or 0.0
    yield from _part("Stages", (_stage(span, begin) for span in record.stages))
    yield from _part("Rules", (f"event {fired.seq}: {_fired(fired)}" for fired in record.rules))
    yield from _part("Checks", (line for measured in record.checks for line in _measured(measured)))
    yield from _part("Deviations", map(_led, record.deviations), "warn")
    yield from _part("Steered", map(_led, record.led))
    yield from _part("Rollback", _rollback(record))
    yield from _part("Requests", _requests(record))
    if record.series:
        decided = f"; what decided: {', '.join(record.deciding)}" if record.deciding else ""
        yield f"{len(record.series)} series were recorded{decided} (see them with --html FILE)", "dim"


def headline(record: Record) -> str:
    outcome = record.outcome.upper() or "IN FLIGHT"
    took = f" after {record.seconds:.1f} s" if record.seconds is not None else ""
    route = f"{record.previous or '?'} -> {record.to or '?'}"
    return f"{record.migration}: {record.agent} {record.place}, {route}, {record.strategy}: {outcome}{took}"


def explain(record: Record) -> list[str]:
    """Sentences, with the numbers of events where there are any: who asked, how far it got, what decided, what then."""
    told = [_beginning(record)]
    told += [f"Deviation (event {one.seq}): {one.what}; {one.by} said why: {one.because}." for one in record.deviations]
    told += _middle(record)
    told += [_steering(one) for one in record.led]
    told += [_rule(fired) for fired in record.rules]
    final = [measured for measured in record.checks if measured.final]
    told += [_verdict(measured) for measured in final[-1:]]
    told += _samples(record)
    told += _ending(record)
    told += [f"Missing: {gap}." for gap in record.gaps]
    return told


# --- parts of a report


def _part(title: str, lines: Iterator[str], tone: Tone = "plain") -> Iterator[Line]:
    for number, line in enumerate(lines):
        if not number:
            yield title, "plain"
        yield f"  {line}", tone


def _about(record: Record) -> Iterator[tuple[str, str]]:
    if record.asked_by:
        yield "asked by", record.asked_by + (f", because: {record.because}" if record.because else "")
    if record.wave:
        yield "wave", record.wave
    if record.started is not None:
        yield "began", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started))
    if record.decided_by:
        yield "decided by", f"{record.decided_by}: {record.reason}"


def _stage(span: Span, begin: float) -> str:
    took = f"{span.end - span.begin:.2f} s" if span.end is not None else "goes on"
    steps = f"  {'; '.join(span.steps)}" if span.steps else ""
    return f"{span.stage:<15} +{span.begin - begin:.2f} s, {took}{steps}"


def _fired(fired: Fired) -> str:
    dry = ", a dry run" if fired.dry_run else ""
    decided = ", DECIDED" if fired.decided else ""
    fault = f"; the fault of the {fired.blame}" if fired.blame else ""
    expr = f" ({fired.expr})" if fired.expr else ""
    return f"rule {fired.rule}{expr}: {fired.value:g} [{fired.action}{dry}{decided}] {fired.summary}{fault}"


def _measured(measured: Measured) -> Iterator[str]:
    when = "at the end" if measured.final else f"at {measured.checkpoint:.0%} of the time"
    yield f"event {measured.seq}, {when}: {measured.verdict}"
    for check in measured.checks:
        yield f"  {_check(check)}"


def _check(check: Check) -> str:
    value = "-" if check.value is None else f"{check.value:.4g}"
    return f"{check.check}: {check.verdict}, {value} (limit {check.limit:.4g}): {check.reason}"


def _led(led: Led) -> str:
    return f"event {led.seq}: {led.what}, by {led.by}" + (f", because: {led.because}" if led.because else "")


def _rollback(record: Record) -> Iterator[str]:
    back = record.rollback
    if back is None:
        return
    how = "was still running" if back.level == 1 else "had to be started again"
    yield f"level {back.level}: {back.revision} {how}" + ("" if back.verified else "; no probe of it was answered")
    if back.routed_ms is not None and back.restored_ms is not None:
        yield (
            f"after the first sample that showed it: {back.routed_ms:.0f} ms until requests went to it, "
            f"{back.restored_ms:.0f} ms until it answered"
        )
    if back.state:
        yield back.state


def _requests(record: Record) -> Iterator[str]:
    for revision, figures in record.requests.items():
        yield f"{revision}: " + ", ".join(f"{value:.0f} {name}" for name, value in sorted(figures.items()))


# --- sentences


def _beginning(record: Record) -> str:
    asked = next((moment for moment in record.timeline if moment.type == "migrate"), None)
    who = f" {record.asked_by} asked for it (event {asked.seq})." if asked is not None else ""
    why = f" The reason given: {record.because}." if record.because else ""
    part = f" It was part of wave {record.wave}." if record.wave else ""
    return (
        f"{record.migration} was to move {record.agent} {record.place}{',' * bool(record.target)} from "
        f"{record.previous or '?'} to "
        f"{record.to or '?'} by the strategy {record.strategy or '?'}.{who}{why}{part}"
    )


def _middle(record: Record) -> list[str]:
    if not record.stages or record.started is None:
        return []
    last = record.stages[-1]
    moment = next((m for m in record.timeline if m.type == "stage-entered" and m.time == last.begin), None)
    number = f" (event {moment.seq})" if moment is not None else ""
    told = [f"It reached the stage {last.stage} {last.begin - record.started:.1f} s after it had begun{number}."]
    moved = [step for span in record.stages for step in span.steps if step.startswith("hand-over done")]
    return told + [f"The state in memory went to the candidate: {step}." for step in moved[-1:]]


def _steering(one: Led) -> str:
    why = f": {one.because}" if one.because else ""
    return f"{one.by} asked for {one.what} (event {one.seq}){why}."


def _rule(fired: Fired) -> str:
    labels = ", ".join(f"{name}={value}" for name, value in sorted(fired.labels.items()))
    expr = f" Its expression {fired.expr!r} was true of {labels}" if fired.expr else f" It was true of {labels}"
    then = f"; the rule says {fired.action}" + (", but is only a dry run" if fired.dry_run else "")
    fault = f" This was not held against the candidate; the fault of the {fired.blame}." if fired.blame else ""
    shown = time.strftime("%H:%M:%S", time.localtime(fired.sample_time)) + f".{int(fired.sample_time % 1 * 1000):03d}"
    return (
        f"Rule {fired.rule} fired (event {fired.seq}).{expr}, with {fired.value:g}, first in the sample of "
        f"{shown}{then}.{fault}"
    )


def _verdict(measured: Measured) -> str:
    checks = "; ".join(_check(check) for check in measured.checks)
    return (
        f"The last measurement (event {measured.seq}) said {measured.verdict}: {measured.reason}. Its checks: {checks}."
    )


def _samples(record: Record) -> list[str]:
    """Of each series that decided, the last samples up to the decision."""
    until = record.decision.time if record.decision is not None else (record.ended or 0.0)
    told = []
    tracks = [track for track in record.series if track.labels.get(NAME) in record.deciding]
    tracks.sort(key=lambda track: (role_of(record, track) != "new", record.deciding.index(track.labels[NAME])))
    for track in tracks:
        seen = [(at, value) for at, value in zip(track.times, track.values, strict=False) if at <= until][-SAMPLES:]
        if seen and until - seen[-1][0] < LATE_S:
            points = ", ".join(f"{value:.4g}" for _, value in seen)
            told.append(f"{_named(track)} went {points}; the last of these {until - seen[-1][0]:.2f} s before.")
    return told[:TRACKS]


def _named(track: Track) -> str:
    wanted = ("revision", "quantile", "gpu", "dependency")
    labels = ", ".join(f"{name} {track.labels[name]}" for name in wanted if name in track.labels)
    return f"{track.labels.get(NAME, '?')}" + (f" ({labels})" if labels else "")


def _ending(record: Record) -> list[str]:
    told = []
    decision, back = record.decision, record.rollback
    if decision is not None and record.outcome != "committed":
        told.append(f"{decision.by} decided (event {decision.seq}): {decision.reason}.")
    if back is not None:
        how = "which was still running" if back.level == 1 else "which had to be started again"
        after = f" {back.routed_ms:.0f} ms after the first sample that showed it" if back.routed_ms is not None else ""
        told.append(f"The host gave the requests back to {back.revision}, {how},{after or ' at once'}.")
        told += [f"{back.state[0].upper()}{back.state[1:]}."] if back.state else []
    end = next((moment for moment in reversed(record.timeline) if moment.type == "migration-ended"), None)
    if record.outcome and end is not None:
        told.append(f"It ended as {record.outcome} (event {end.seq}), decided by {record.decided_by}: {record.reason}.")
    elif not record.outcome:
        told.append("It is in flight: see interlock status.")
    return told
