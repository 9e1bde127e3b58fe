"""An hour of the rule engine in simulated time, while series come and go; prints JSON, and exits 1 if it doesn't hold.

    python tests/benchmarks/bench_rules_soak.py [--minutes 60]

1,000 series that stay, once a second, with values between 1e-3 and 1e12 and counters that are reset; 200 more that live
for ten seconds each. In the end running sums must be what the samples in the window add up to, and from the tenth
minute on neither the process nor the engine's tables may have grown.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np

from interlock.broker.samples import Labels, labels
from interlock.coordinator.rules.engine import Engine
from interlock.coordinator.rules.evaluate import Evaluation
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.rulefile import parse_rules

STAYING, PASSING = 1000, 200
LIFE_S = 10  # of a series that passes
SETTLED_S = 600  # tables and the allocator have their size by then
DRIFT = 1e-9  # relative: what a running sum may differ by from the samples themselves
GROWN = 0.05  # of the process' memory: the allocator's own unrest
WATCHED = ("sum_over_time(x[20s])", "increase(c_total[30s])", "avg_over_time(x[1m])")
RULES = """
groups:
- name: soak
  rules:
  - {alert: r0, expr: "sum_over_time(x[20s]) > 1e18"}
  - {alert: r1, expr: "increase(c_total[30s]) > 1e9"}
  - {alert: r2, expr: "avg_over_time(x[1m]) > 1e15"}
  - {alert: r3, expr: "sum by (host) (x) > 1e18"}
  - {alert: r4, expr: "x > on(n) group_left() 1e9 * c_total"}
"""


def rss() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def passing(second: int) -> list[Labels]:
    """The series that pass at this moment: a tenth of them new each second."""
    return [labels("x", n=f"p{number}-{(second + number) // LIFE_S}", host="h") for number in range(PASSING)]


def drift(engine: Engine, now: float) -> tuple[float, int]:
    """(the largest relative difference between what is kept up to date and what is computed anew, of how many)."""
    worst, compared = 0.0, 0
    for text in WATCHED:
        node = engine._graph.build(parse(text))
        slots = node.slots()
        kept, codes = node.at(slots)
        found = {
            node.labels(slot): value for slot, value, code in zip(slots.tolist(), kept, codes, strict=True) if not code
        }
        for key, value in Evaluation(engine.store, now).elements(parse(text)).items():
            compared += 1
            worst = max(worst, abs(found.get(key, math.inf) - value) / max(1e-300, abs(value)))
    return worst, compared


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=int, default=60)
    seconds = parser.parse_args().minutes * 60
    random = np.random.default_rng(1)
    engine = Engine(parse_rules(RULES, file="soak"))
    keys = [labels("x", n=str(number), host=f"h{number % 50}") for number in range(STAYING)]
    counters = [labels("c_total", n=str(number), host=f"h{number % 50}") for number in range(STAYING)]
    ids = np.array([engine.admit(key, "staying") for key in (*keys, *counters)])
    count, before, sizes, began = np.zeros(STAYING), 0, (0, 0, 0), time.process_time()
    gone: list[Labels] = []
    for second in range(seconds):
        # in the last two minutes all values are small: what large ones left behind in a sum would show
        values = 10.0 ** random.uniform(-3, 12 if second < seconds - 120 else -2, STAYING)
        count = np.where(random.random(STAYING) < 0.01, 0.0, count + random.integers(0, 10, STAYING))
        engine.apply([(ids, np.concatenate([values, count]), float(second), "staying")], float(second))
        fresh = passing(second)
        engine.ingest(
            ((key, 1.0) for key in fresh), set(gone) - set(fresh), float(second), float(second), publisher="p"
        )
        gone = fresh
        engine.tick(float(second))
        if second == min(SETTLED_S, seconds // 2):
            gc.collect()
            before, sizes = rss(), (engine.store.rows, len(engine.store.labels), engine.store.rings.used)
    gc.collect()
    after = (engine.store.rows, len(engine.store.labels), engine.store.rings.used)
    worst, compared = drift(engine, seconds - 1.0)
    report = {
        "benchmark": "rules soak",
        "simulated_minutes": seconds // 60,
        "samples": engine.samples,
        "series_that_came_and_went": PASSING * seconds // LIFE_S,
        "compared": compared,
        "largest_drift": worst,
        "memory_mb": [round(before / 1e6, 1), round(rss() / 1e6, 1)],
        "tables": [sizes, after],
        "cpu_s": round(time.process_time() - began, 1),
        "python": platform.python_version(),
    }
    print(json.dumps(report, indent=2))
    flat = rss() <= before * (1 + GROWN) and sizes == after
    return 0 if compared >= 3 * STAYING and worst <= DRIFT and flat else 1


if __name__ == "__main__":
    sys.exit(main())
