"""What NVML says on this machine, reading by reading, and what each costs: `interlock monitor selftest`.

The driver is asked by a process of its own (`nvml_measure.py`), which says each result as soon as it has it. A call
that does not come back is a verdict too: its card is left out, and the others are measured by another process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import trio

from interlock.monitors.call_notes import NO_CARD, START_DEADLINE_S, CallNotes, Note, Seat, deadline
from interlock.monitors.kernel_log import KMSG

ROUNDS = 10  # a first call may be slow; the median of these is what a sample costs
CALL_DEADLINE_S = 2.0  # more than the monitor allows: here a slow call is a figure, not yet a fault
COLUMNS = ("reading", "verdict", "value", "median", "largest")

Result = dict[str, Any]


async def survey(rounds: int = ROUNDS) -> dict[str, Any]:
    """Driver, cards, and of each card every reading with its verdict, its value and the seconds that it took."""
    report: dict[str, Any] = {"gpu": False, "reason": "", "kernel_log": _kernel_log(), "cards": {}}
    without: list[int] = []
    while True:
        stuck = await _measure(report, rounds, without)
        if stuck is None:
            break
        call = f"{stuck.function or 'the start'} has not come back"
        if stuck.card == NO_CARD or stuck.card in without:
            report["reason"] = call
            break
        without.append(stuck.card)
        card = report["cards"].setdefault(stuck.card, {"index": stuck.card, "readings": []})
        card["error"] = call
    report["cards"] = [report["cards"][index] for index in sorted(report["cards"])]
    return report


async def _measure(report: dict[str, Any], rounds: int, without: list[int]) -> Note | None:
    """Take in what one process measures; the call that it is stuck in."""
    notes = CallNotes()
    order = {"notes": notes.descriptor, "rounds": rounds, "without": without}
    command = [sys.executable, "-P", "-m", "interlock.monitors.nvml_measure", msgspec.json.encode(order).decode()]
    process = await trio.lowlevel.open_process(command, stdout=-1, pass_fds=[notes.descriptor])
    stuck: Note | None = None
    try:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal stuck
                while (stuck := _overdue(notes)) is None:  # noqa: ASYNC110 - who is stuck tells nobody
                    await trio.sleep(0.1)
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            async for result in _results(process):
                _take(report, result)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(1.0):
            process.kill()
            await process.wait()
        assert process.stdout is not None
        await process.stdout.aclose()
        notes.close()
    return stuck


def _overdue(notes: CallNotes) -> Note | None:
    now = time.monotonic()
    note = notes.read(Seat.POLL)
    if note is None:
        return Note("", NO_CARD, now) if now - notes.since(Seat.POLL) > 2 * START_DEADLINE_S else None
    return note if deadline(note, CALL_DEADLINE_S) < now else None


async def _results(process: trio.Process) -> AsyncIterator[Result]:
    assert process.stdout is not None
    rest = b""
    async for piece in process.stdout:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line)


def _take(report: dict[str, Any], result: Result) -> None:
    kind = result.pop("kind")
    if kind == "driver":
        report |= {"gpu": True} | result
    elif kind == "failed":
        report["reason"] = result["reason"]
    elif kind == "card":
        report["cards"][result["index"]] = result | {"readings": []}
    else:
        report["cards"][result.pop("index")]["readings"].append(result)


def _kernel_log() -> str:
    try:
        os.close(os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return "is readable"


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"kernel log: {report['kernel_log']}"]
    if not report["gpu"]:
        return "\n".join([f"no NVIDIA GPU: {report['reason']}", *lines])
    lines.insert(0, f"driver {report['driver']}, opened in {report['open_seconds'] * 1e3:.1f} ms")
    for card in report["cards"]:
        lines += ["", f"GPU {card['index']} {card.get('name', '')} {card.get('uuid', '')}".rstrip()]
        if card.get("error"):
            lines.append(f"  FAILED: {card['error']}")
        rows = [COLUMNS, *(_row(reading) for reading in card["readings"])]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append(f"  {'  '.join(cells)}".rstrip())
        if "sample_seconds" in card:
            cost = {name: _time(seconds["median"]) for name, seconds in card["sample_seconds"].items()}
            lines.append(f"  a whole sample: hot {cost['hot']}, hot and calm {cost['all']}")
    return "\n".join(lines)


def _row(reading: Result) -> tuple[str, ...]:
    value = reading.get("value")
    shown = "" if value is None else f"{value:.10g}"
    return (reading["reading"], reading["verdict"], shown, _time(reading["median"]), _time(reading["largest"]))


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
