"""Kills (SIGKILL) of source, target, both, guest, old instance, coordinator and broker at every moment of a move
between two hosts, under requests. One JSON object; exit code 1 if something did not hold.

    python tests/benchmarks/bench_moves.py [--cases N] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from crash_parts import HEAD, LogFold
from fleet.conftest import TestFleet
from move_parts import Move, Result, matrix


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="so many, drawn by the seed (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    cases = matrix()
    random.Random(chosen.seed).shuffle(cases)
    results: list[Result] = []
    fleet = TestFleet(
        Path(tempfile.mkdtemp(prefix="il-moves-")), {"keep": "alpha", "rep": "alpha", "calc": "beta"}, head=HEAD
    )
    try:
        fleet.start()
        fold = LogFold(fleet)
        for case in cases[: chosen.cases or None]:
            fleet.calm()
            results.append(Move(fleet, fold, case).run())
            print(f"{case}: {results[-1].outcome} {results[-1].violations or ''}", file=sys.stderr, flush=True)
        fleet.stop()
    finally:
        fleet.close()
        shutil.rmtree(fleet.folder, ignore_errors=True)
    bad = [asdict(result) for result in results if result.violations]
    report = {
        "bench": "moves", "cases": len(results), "seed": chosen.seed,
        "outcomes": dict(Counter(result.outcome for result in results)),
        "killed": sum(result.killed for result in results), "answers": sum(result.answers for result in results),
        "lost": sum(result.lost for result in results), "violations": bad, "defects": fleet.defects(),
    }  # fmt: skip
    print(json.dumps(report))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
