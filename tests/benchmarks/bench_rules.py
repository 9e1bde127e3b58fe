"""Samples a second through the rule engine's `ingest` on one core, and what one batch takes; prints JSON.

100 hosts of 10 series each, 20 rules: every sample touches a rule. Batches come host by host (`host`: 10 samples, as
monitors send them) or scattered over all series (`scattered`: 100 samples).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable

from interlock.broker.samples import Labels, labels
from interlock.coordinator.rules.engine import Engine
from interlock.coordinator.rules.rulefile import default_rules, parse_rules

HOSTS = 100
METRICS = 10
RULES = 20
SECONDS = 3.0  # of each measurement


def rules() -> str:
    """Half simple thresholds, a quarter ratios of two series, a quarter aggregations by host."""
    rows = []
    for number in range(RULES):
        metric, other = f"m{number % METRICS}", f"m{(number + 1) % METRICS}"
        kinds = [f"{metric} > 0.95", f"{metric} / {other} > 3", f"{metric} > 0.99", f"sum by (host) ({metric}) > 0.97"]
        rows.append(f"{{alert: r{number}, expr: '{kinds[number % 4]}', for: 10s}}")
    return f"groups: [{{name: bench, rules: [{', '.join(rows)}]}}]"


def host_batches(random_: random.Random) -> list[list[tuple[Labels, float]]]:
    return [
        [(labels(f"m{m}", host=f"h{h}", agent=f"a{h}"), random_.uniform(0.4, 0.96)) for m in range(METRICS)]
        for h in range(HOSTS)
    ]


def scattered_batches(random_: random.Random) -> list[list[tuple[Labels, float]]]:
    everything = [pair for batch in host_batches(random_) for pair in batch]
    random_.shuffle(everything)
    return [everything[at : at + 100] for at in range(0, len(everything), 100)]


def measure(engine: Engine, batches: list[list[tuple[Labels, float]]], seconds: float) -> dict[str, float]:
    now, count = 0.0, 0
    for batch in batches:  # binding the series is not what is measured
        engine.ingest(batch, [], now, now)
    engine.tick(now)
    took: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        now += 0.1
        for batch in batches:
            before = time.perf_counter()
            engine.ingest(batch, [], now, now)
            took.append(time.perf_counter() - before)
            count += len(batch)
        engine.tick(now)
    elapsed = time.perf_counter() - began
    ordered = sorted(took)
    return {
        "samples_per_second": round(count / elapsed),
        "batch_ms_p50": round(statistics.median(ordered) * 1e3, 4),
        "batch_ms_p99": round(ordered[int(len(ordered) * 0.99)] * 1e3, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    seconds = parser.parse_args().seconds
    shapes: dict[str, Callable[[random.Random], list[list[tuple[Labels, float]]]]] = {
        "host": host_batches,
        "scattered": scattered_batches,
    }
    report: dict[str, object] = {
        "benchmark": "rules",
        "series": HOSTS * METRICS,
        "rules": RULES,
        "default_rules": len(default_rules()),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    for name, make in shapes.items():
        engine = Engine(parse_rules(rules(), file="bench"))
        report[name] = measure(engine, make(random.Random(1)), seconds)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
