"""The process that measures for `selftest.py`: each reading of each card some times over, one line of JSON each."""

from __future__ import annotations

import os
import sys
import time

import msgspec

from interlock.monitors import gpu_metrics as gm
from interlock.monitors import nvml
from interlock.monitors.call_notes import CallNotes, Seat
from interlock.monitors.nvml_frames import CALM, HOT, SLOW

PAUSE_S = 0.02  # between rounds: back to back, the driver would answer from what it has just read


class Order(msgspec.Struct, frozen=True):
    notes: int
    rounds: int
    without: list[int] = []


def say(**result: object) -> None:
    os.write(1, msgspec.json.encode(result) + b"\n")


def main() -> int:
    order = msgspec.json.decode(sys.argv[1], type=Order)
    notes = CallNotes(order.notes)
    try:
        session = nvml.Session(nvml.load(), notes)
    except ImportError as error:
        say(kind="failed", reason=f"the NVML binding can't be imported: {error}; install nvidia-ml-py")
        return 0
    began = time.perf_counter()
    try:
        driver = session.start()
        cards = session.cards([], order.without)
        notes.rest(Seat.POLL)
        say(kind="driver", driver=driver, open_seconds=round(time.perf_counter() - began, 6))
        for card in cards:
            measure(session, card, order.rounds)
    except nvml.DriverError as error:
        say(kind="failed", reason=error.text)
    return 0


def measure(session: nvml.Session, card: nvml.Card, rounds: int) -> None:
    found, whole = card.found, {"hot": list[float](), "all": list[float]()}
    values: nvml.Values = {}
    session.spent = spent = {}
    error = ""
    try:
        for _ in range(rounds):
            for label, scope in (("hot", HOT), ("all", HOT | CALM | SLOW)):
                began = time.perf_counter()
                values |= session.read(card, scope)[0]
                whole[label].append(time.perf_counter() - began)
                time.sleep(PAUSE_S)
        began = time.perf_counter()
        processes = session.processes(card)
        spent[gm.PROCESS_MEMORY,] = [time.perf_counter() - began]
        values[gm.PROCESS_MEMORY] = float(sum(max(held, 0) for held, _ in processes.values()))
    except nvml.CardError as failed:
        error = failed.text
    timed = {label: spread(seconds) for label, seconds in whole.items() if seconds}
    identity = {"index": found.index, "uuid": found.uuid, "name": found.name, "bus": found.bus}
    say(kind="card", error=error, sample_seconds=timed, **identity)
    for readings, seconds in spent.items():
        name = gm.split(readings[0])[0]
        for reading in [key for key in values if key in readings or gm.split(key)[0] == name]:
            tell(found.index, reading, "ok", values[reading], seconds)
        for reading in [key for key in card.lacking if key in readings]:
            tell(found.index, reading, card.lacking.pop(reading), None, seconds)
    for reading, reason in card.lacking.items():
        tell(found.index, reading, reason, None, [])


def tell(index: int, reading: str, verdict: str, value: float | None, seconds: list[float]) -> None:
    cost = spread(seconds) if seconds else {"median": None, "largest": None}
    say(kind="reading", index=index, reading=reading, verdict=verdict, value=value, **cost)


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": round(sorted(seconds)[len(seconds) // 2], 7), "largest": round(max(seconds), 7)}


if __name__ == "__main__":
    sys.exit(main())
