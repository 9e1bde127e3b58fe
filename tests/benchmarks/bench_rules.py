"""The rule engine alone on one core: samples a second, memory, pauses while new series are bound; prints JSON.

10,000 entities of ten series each, six rules over each entity, every sample touches a rule. Batches have 100 samples:
ten entities whole (`co-located`, as monitors send them) or any series (`scattered`). `queued` applies several batches
in one call, as the service does where several publishers' batches wait. On a machine that does other work, the figures
per second of the processor are those of one core.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import resource
import statistics
import time

import numpy as np

from interlock.broker.samples import labels
from interlock.coordinator.rules.engine import Columns, Engine
from interlock.coordinator.rules.rulefile import parse_rules

SERIES = 100_000
METRICS = 10
BATCH = 100
QUEUED = (4, 16)
WARM = 4  # rounds of all series before the measurement
SECONDS = 3.0  # of each measurement
RULES = """
groups:
- name: bench
  rules:
  - {alert: r0, expr: m0 > 0.95, for: 10s}
  - {alert: r1, expr: m1 / m2 > 3}
  - {alert: r2, expr: m3 > 0.97 and m4 > 0.97}
  - {alert: r3, expr: m5 - m6 > 0.6}
  - {alert: r4, expr: "increase(m7[10s]) > 1000"}
  - {alert: r5, expr: m8 > on(host) group_left() m9 * 3}
"""


def batches(shape: str, random_: random.Random, ids: list[int]) -> list[Columns]:
    """A second of each series, in columns."""
    order = list(range(len(ids)))
    if shape == "scattered":
        random_.shuffle(order)
    made: list[Columns] = []
    for number, at in enumerate(range(0, len(order), BATCH)):
        chosen = np.array([ids[place] for place in order[at : at + BATCH]])
        values = np.array([random_.uniform(0.4, 0.94) for _ in chosen])
        made.append((chosen, values, 0.0, f"p{number}"))
    return made


def measure(engine: Engine, made: list[Columns], seconds: float, together: int, now: float) -> dict[str, float]:
    took: list[float] = []
    count = 0
    began, busy = time.perf_counter(), time.process_time()
    scans = began
    while time.perf_counter() - began < seconds:
        now += 1.0
        for at in range(0, len(made), together):
            group = [(ids, values, now, publisher) for ids, values, _, publisher in made[at : at + together]]
            before = time.perf_counter()
            engine.apply(group, now)
            after = time.perf_counter()
            took.append(after - before)
            count += sum(len(each[0]) for each in group)
            if after - scans >= 0.05:
                scans = after
                engine.tick(now)
            if after - began >= seconds:
                break
    elapsed, used = time.perf_counter() - began, time.process_time() - busy
    ordered = sorted(took)
    return {
        "samples_per_second": round(count / elapsed),
        "samples_per_cpu_second": round(count / used),
        "call_ms_p50": round(statistics.median(ordered) * 1e3, 3),
        "call_ms_p99": round(ordered[int(len(ordered) * 0.99)] * 1e3, 3),
    }


def bind(engine: Engine) -> tuple[list[int], dict[str, float]]:
    """Announce all series, and match them against the rules in slices."""
    began = time.perf_counter()
    ids = [
        engine.admit(labels(f"m{metric}", host=f"h{entity}", agent=f"a{entity}"), f"p{entity % 100}")
        for entity in range(SERIES // METRICS)
        for metric in range(METRICS)
    ]
    announced = time.perf_counter()
    pauses = []
    while engine.backlog:
        before = time.process_time()
        engine.bind()
        pauses.append(time.process_time() - before)
    return ids, {
        "announce_s": round(announced - began, 2),
        "bind_s": round(sum(pauses), 2),
        "longest_pause_ms": round(max(pauses) * 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    seconds = parser.parse_args().seconds
    random_ = random.Random(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine = Engine(parse_rules(RULES, file="bench"))
    ids, binding = bind(engine)
    gc.collect()
    gc.freeze()
    report: dict[str, object] = {
        "benchmark": "rules",
        "series": SERIES,
        "rules_per_ten_series": 6,
        "tiers": [running.tier for running in engine.running],
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "binding": binding,
    }
    now = 1000.0
    for shape in ("co-located", "scattered"):
        made = batches(shape, random_, ids)
        for _ in range(WARM):  # windows fill, and each publisher's batch is planned
            now += 1.0
            for each, values, _, publisher in made:
                engine.apply([(each, values, now, publisher)], now)
            engine.tick(now)
        report[shape] = measure(engine, made, seconds, 1, now)
        now += 1000.0
        for queued in QUEUED:
            report[f"{shape}, {queued} queued"] = measure(engine, made, seconds, queued, now)
            now += 1000.0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    report["memory_bytes_per_series"] = round(used * 1024 / SERIES)
    report["alerts"] = len(engine.current("firing")) + len(engine.current("pending"))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
