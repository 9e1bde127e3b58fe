"""A thousand migrations and rollbacks in a row of warm agents under continuous requests: what fails, and what grows.

    python tests/benchmarks/bench_load.py --migrations 1000 --agents 4

A real fleet; half of the migrations are committed, half are rolled back with all requests on the candidate. Every
`--every` migrations all wait, and it is looked at what the roles hold. Prints one JSON object; exits 1 if a request
failed, a migration ended otherwise than asked, or memory, descriptors, processes or files still grew in the second half
of the run. The log is kept at 2 MiB, so that its bound is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).parents[1]))

from crash_parts import Askers
from fleet.conftest import TestFleet
from load_parts import HEAD, Held, load, slope

MEMORY_GROWTH = 16 << 20  # bytes per 1,000 migrations of one role: the coordinator and the host remember some of each
DESCRIPTOR_GROWTH = 4.0  # per 1,000 migrations of one role
FILE_GROWTH = 20.0  # files per 1,000 migrations
FOLDER_GROWTH = 8 << 20  # bytes per 1,000 migrations of one folder: the journal keeps 10,000 results, 50,000 lines


def run(migrations: int, count: int, every: int, minutes: float) -> dict[str, Any]:
    agents = [f"{'calc' if number % 2 else 'rep'}-{number}" for number in range(count)]
    fleet = TestFleet(Path(tempfile.mkdtemp(prefix="il-load-")), dict.fromkeys(agents, "alpha"), head=HEAD)
    began = time.monotonic()
    try:
        fleet.start(watch=False)
        with ExitStack() as stack:
            askers = [
                stack.enter_context(Askers(fleet.endpoint(agent), count=1, once=agent.startswith("rep")))
                for agent in agents
            ]

            def tell(look: Held) -> None:
                print(f"{look.migrations} of {migrations}, {time.monotonic() - began:.0f} s: {look}", file=sys.stderr)

            async def go() -> Any:
                return await load(fleet, agents, migrations, every=every, tell=tell, seconds=60 * minutes)

            done, looks = trio.run(go)
        ended = fleet.stop()
    finally:
        fleet.close()
        defects = fleet.defects()
        shutil.rmtree(fleet.folder, ignore_errors=True)
    failed = [text for asker in askers for text in asker.wrong]
    errors = sum(asker.errors + asker.lost for asker in askers)
    growth = grown(looks[len(looks) // 2 :])
    return {
        "benchmark": "load",
        "migrations": done.ended,
        "committed": done.committed,
        "rolled_back": done.rolled_back,
        "seconds": round(time.monotonic() - began),
        "cpus": os.cpu_count(),
        "load1": os.getloadavg()[0],
        "requests": sum(asker.answers.total() for asker in askers),
        "requests_failed": len(failed) + errors,
        "order_to_old_revision_answering_ms": {
            "p50": round(statistics.median(done.restored_s) * 1000, 2),
            "p99": round(sorted(done.restored_s)[int(len(done.restored_s) * 0.99)] * 1000, 2),
        },
        "per_1000_migrations_in_the_second_half": growth,
        "first": vars(looks[0]),
        "last": vars(looks[-1]),
        "violations": [*done.odd, *failed[:10], *defects, *too_much(growth), *([f"up: {ended}"] if ended else [])],
    }


def grown(looks: list[Held]) -> dict[str, Any]:
    def line(value: Any) -> float:
        return round(slope([(look.migrations / 1000, value(look)) for look in looks]), 1)

    return {
        "memory_bytes": {role: line(lambda look, r=role: look.memory[r]) for role in looks[-1].memory},
        "descriptors": {role: line(lambda look, r=role: look.descriptors[r]) for role in looks[-1].descriptors},
        "folder_bytes": {name: line(lambda look, n=name: look.folders.get(n, 0)) for name in looks[-1].folders},
        "processes": line(lambda look: look.processes),
        "files": line(lambda look: look.files),
        "sockets": line(lambda look: look.sockets),
    }


def too_much(growth: dict[str, Any]) -> list[str]:
    bounds = {"memory_bytes": MEMORY_GROWTH, "descriptors": DESCRIPTOR_GROWTH, "folder_bytes": FOLDER_GROWTH}
    found = [
        f"{what} of {name} grow by {value:g} per 1,000 migrations"
        for what, bound in bounds.items()
        for name, value in growth[what].items()
        if value > bound
    ]
    found += ["processes grow"] if growth["processes"] > 1 else []
    return found + [f"{what} grow" for what in ("files", "sockets") if growth[what] > FILE_GROWTH]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--migrations", type=int, default=1000)
    parser.add_argument("--agents", type=int, default=4, help="that are moved side by side")
    parser.add_argument("--every", type=int, default=50, help="migrations between looks")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end with the first look after so long")
    options = parser.parse_args()
    report = run(options.migrations, options.agents, options.every, options.minutes)
    print(json.dumps(report, indent=2))
    return 1 if report["violations"] or report["requests_failed"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its folder goes, and its fleet
    sys.exit(main())
