"""The partition matrix: a host cut off from each other role and host, in each stage, one way and both.

    python tests/benchmarks/bench_partitions.py [--only coordinator] [--sample N]

Needs root and iproute2: each role is in a network namespace of its own. Clients on the host's own machine ask all the
time. The lease runs out and the host rolls back by itself, or the migration goes on after healing; afterwards exactly
one revision serves, host and log agree which, and no request of those clients failed. Prints one JSON object; exits 1
if any of it did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from crash_parts import LogFold
from net_parts import Net, why_not
from partition_parts import CUT_S, LEASE_S, MACHINES, PEERS, Cell, NetFleet, Result, cut, matrix


def run(cells: list[Cell]) -> dict[str, Any]:
    results: list[Result] = []
    began = time.monotonic()
    with Net(MACHINES) as net:
        fleet = NetFleet(Path(tempfile.mkdtemp(prefix="il-cut-")), net, {"calc": "alpha", "rep": "beta"})
        try:
            fleet.start_roles()
            fold = LogFold(fleet)
            for number, cell in enumerate(cells, 1):
                fleet.calm()
                result = cut(fleet, fold, cell)
                results.append(result)
                said = f"{result.outcome} by {result.decided_by} {result.violations or ''}"
                print(f"{number}/{len(cells)} {cell}: {said}", file=sys.stderr)
            codes = fleet.stop_roles()
        finally:
            fleet.close()
            defects = fleet.defects()
            shutil.rmtree(fleet.folder, ignore_errors=True)
    return {
        "benchmark": "partition matrix",
        "machines": MACHINES,
        "lease_s": LEASE_S,
        "cut_s": CUT_S,
        "seconds": round(time.monotonic() - began),
        "cpus": os.cpu_count(),
        "load1": os.getloadavg()[0],
        "cuts": {
            peer: Counter(f"{r.cell.stage} {r.cell.way}" for r in results if r.cell.peer == peer) for peer in PEERS
        },
        "outcomes": {
            peer: Counter(f"{r.outcome} by {r.decided_by}" for r in results if r.cell.peer == peer) for peer in PEERS
        },
        "longest_rollback_s": max((r.rollback_s for r in results if r.rollback_s is not None), default=None),
        "requests_answered": sum(result.answers for result in results),
        "defects_logged": defects,
        "exit_codes_of_roles": codes,
        "violations": [f"{result.cell}: {text}" for result in results for text in result.violations],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", choices=PEERS, help="cut off from this one only")
    parser.add_argument("--sample", type=int, help="so many cells, drawn by --seed, instead of all")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if reason := why_not():
        print(json.dumps({"benchmark": "partition matrix", "skipped": reason}))
        return 0
    cells = [cell for cell in matrix() if options.only in (None, cell.peer)]
    if options.sample is not None:
        cells = random.Random(options.seed).sample(cells, min(options.sample, len(cells)))
    report = run(cells)
    print(json.dumps(report, indent=2))
    return 1 if report["violations"] or report["defects_logged"] or any(report["exit_codes_of_roles"]) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its folder goes, and its fleet
    sys.exit(main())
