"""What the NVIDIA back-end sees on this machine, for people and bug reports (`--self-test` of this package)."""

from __future__ import annotations

import time
from typing import Any

import trio

from interlock.monitors.gpu import NoGpu
from interlock.monitors.nvml import NvidiaBackend, open_nvidia_backend
from interlock.monitors.sampler import Group
from interlock.monitors.series import ALL_GROUPS

ROUNDS = 10  # a first call may be slow; the median of these is what a sample costs
PAUSE_S = 0.1  # between rounds, as while migrating


async def survey(library: Any = None, *, rounds: int = ROUNDS) -> dict[str, Any]:
    """Cards, readings, what is unsupported, and how long each call took (seconds; median and largest)."""
    began = time.perf_counter()
    try:
        backend = await open_nvidia_backend(library)
    except NoGpu as absent:
        return {"gpu": False, "reason": str(absent), "cards": []}
    opened = time.perf_counter() - began
    try:
        cards = [await _survey_card(backend, index, rounds) for index in range(len(backend.cards))]
    finally:
        await backend.close()
    return {"gpu": True, "driver": backend.driver, "open_seconds": round(opened, 6), "cards": cards}


async def _survey_card(backend: NvidiaBackend, index: int, rounds: int) -> dict[str, Any]:
    reading, spent = await backend.timed(index, ALL_GROUPS)
    calls = {name: [seconds] for name, seconds in spent.items()}
    whole: dict[str, list[float]] = {"hot": [], "all": []}
    for _ in range(rounds):
        await trio.sleep(PAUSE_S)
        for label, groups in (("hot", frozenset({Group.HOT})), ("all", ALL_GROUPS)):
            began = time.perf_counter()
            _, spent = await backend.timed(index, groups)
            whole[label].append(time.perf_counter() - began)
            for name, seconds in spent.items():
                calls.setdefault(name, []).append(seconds)
    card = reading.card
    return {
        "index": card.index,
        "uuid": card.uuid,
        "name": card.name,
        "up": not reading.error,
        "error": reading.error,
        "readings": dict(reading.values),
        "unsupported": list(reading.unsupported),
        "processes": {str(pid): held for pid, held in reading.processes.items()},
        "sample_seconds": {label: _spread(seconds) for label, seconds in whole.items()},
        "call_seconds": {name: _spread(seconds) for name, seconds in calls.items()},
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median": round(sorted(seconds)[len(seconds) // 2], 6), "largest": round(max(seconds), 6)}
