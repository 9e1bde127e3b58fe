"""The crash matrix: SIGKILL of every role and instance at every stage boundary and at random moments, under requests.

    python tests/benchmarks/bench_crash.py --kills 300 --seed 1
    python tests/benchmarks/bench_crash.py --kills 300 --seed 1 --first 101 --minutes 20    # a piece of the same
    python tests/benchmarks/bench_crash.py --kills 20 --roles host                          # of one role only

A real fleet (`interlock up`, which starts again what is killed), plain REQ clients, one migration per kill. Afterwards
exactly one revision serves, and status, log and the host's journal name the same one; a rollback that was due was done
within 5 s, the restart of who was killed included; no request was lost but those that were in flight inside what was
killed; no process is left over. Prints one JSON object; exits 1 if any of it did not hold.
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
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from crash_parts import HEAD, MOMENTS, PROMISE_S, ROLES, Case, Crash, LogFold, Result, cases, possible, processes
from fleet.conftest import TestFleet

SUPERVISED = ("host", "coordinator", "rules", "broker", "telemetry", "monitor")
LOG_CHARS = 20_000  # of the roles, shown if something did not hold
STEADY_S = 31.0  # whoever is killed again before has to wait longer for his restart: that is not measured here


def until_steady(fleet: TestFleet, case: Case) -> None:
    """Wait until who is to be killed has run for so long that his restart does not wait for the one before."""
    if case.role in SUPERVISED:
        age = time.time() - psutil.Process(processes(fleet)[case.role]).create_time()
        time.sleep(max(0.0, STEADY_S - age))


def chosen(kills: int, seed: int, first: int, roles: list[str]) -> list[tuple[int, Case]]:
    """The kills with their numbers; of some roles only: as many of those."""
    if not roles:
        return list(enumerate(cases(kills, seed), 1))[first - 1 :]
    found = [case for case in cases(kills * len(ROLES), seed) if case.role in roles]
    return list(enumerate(found[:kills], 1))[first - 1 :]


def run(todo: list[tuple[int, Case]], seed: int, *, steady: bool, minutes: float) -> dict[str, Any]:
    results: list[Result] = []
    began = time.monotonic()
    fleet = TestFleet(Path(tempfile.mkdtemp(prefix="il-crash-")), {"calc": "alpha", "rep": "alpha"}, head=HEAD)
    try:
        fleet.start()
        fold = LogFold(fleet)
        for number, case in todo:
            if time.monotonic() - began > 60 * minutes:
                print(f"the time is over: go on with --first {number}", file=sys.stderr)
                break
            fleet.calm()
            if steady:
                until_steady(fleet, case)
            result = Crash(fleet, fold, case).run()
            results.append(result)
            took = "" if result.rollback_s is None else f", rolled back in {result.rollback_s:.2f} s"
            said = f"{result.outcome}{took} {result.why} {result.violations or ''}"
            print(f"{number}/{todo[-1][0]} {case}: {said}", file=sys.stderr)
        ended = fleet.stop()
    finally:
        fleet.close()
        defects = fleet.defects()
        if any(result.violations for result in results) or defects:
            print((fleet.folder / "up.log").read_text("utf-8", "replace")[-LOG_CHARS:], file=sys.stderr)
        shutil.rmtree(fleet.folder, ignore_errors=True)
    return {
        "benchmark": "crash matrix",
        "seed": seed,
        "numbers": [todo[0][0], todo[0][0] + len(results) - 1] if results else [],
        "seconds": round(time.monotonic() - began),
        "cpus": os.cpu_count(),
        "load1": os.getloadavg()[0],
        "kills": sum(result.killed for result in results),
        "kills_by_role_and_moment": table(results),
        "outcomes": Counter(result.outcome for result in results),
        "rollback_s": spread([result.rollback_s for result in results if result.rollback_s is not None]),
        "rollback_s_by_role": {
            role: spread([r.rollback_s for r in results if r.rollback_s is not None and r.case.role == role])
            for role in ROLES
        },
        "promise_s": PROMISE_S,
        "requests_answered": sum(result.answers for result in results),
        "requests_answered_with_an_error_in_flight_in_the_killed_and_not_idempotent": sum(r.errors for r in results),
        "requests_in_flight_in_a_killed_host": sum(result.lost for result in results),
        "defects_logged": defects,
        "exit_code_of_up": ended,
        "violations": [f"{result.case}: {text}" for result in results for text in result.violations],
    }


def table(results: list[Result]) -> dict[str, dict[str, int | None]]:
    """None: there is no candidate yet at that moment."""
    found = Counter((result.case.role, result.case.moment) for result in results if result.killed)
    return {
        role: {moment: found[role, moment] if possible(role, moment) else None for moment in MOMENTS} for role in ROLES
    }


def spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {"count": 0}
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50": round(statistics.median(ordered), 3),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 3),
        "max": round(ordered[-1], 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, metavar="N", help="begin with the Nth kill of the seed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further kill after so long")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=[], help="kill only these")
    parser.add_argument("--hasty", action="store_true", help="kill a role again before it has run for 30 s")
    options = parser.parse_args()
    todo = chosen(options.kills, options.seed, max(1, options.first), options.roles)
    if not todo:
        parser.error("--first is after the last kill")
    report = run(todo, options.seed, steady=not options.hasty, minutes=options.minutes)
    print(json.dumps(report, indent=2))
    return 1 if report["violations"] or report["defects_logged"] or report["exit_code_of_up"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its folder goes, and its fleet
    sys.exit(main())
