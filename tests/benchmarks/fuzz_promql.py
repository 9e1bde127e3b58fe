"""Random series and expressions through Prometheus' own promtool and through our evaluation: where do they differ?

    python tests/benchmarks/fuzz_promql.py [--rounds 20] [--cases 200] [--seed 1]

Prints JSON. Exit code 1 if something differs. Needs promtool (Debian: prometheus). docs/rules.md names what is known to
differ from version 2.42; the generator leaves it out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from promql_parts import Dice, cases, differ, ours, promtools

SHOWN = 20  # differences that are printed


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20, help="sets of series")
    options.add_argument("--cases", type=int, default=200, help="expressions over each")
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    if shutil.which("promtool") is None:
        print(json.dumps({"skipped": "not installed: promtool"}))
        return 0
    total = errors = nothing = 0
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(chosen.seed, chosen.seed + chosen.rounds):
            dice = Dice(seed)
            rows = dice.rows()
            asked = cases(dice, chosen.cases)
            for case, a, b in zip(asked, ours(rows, asked), promtools(rows, asked, Path(folder)), strict=True):
                total += 1
                errors += isinstance(b, str)
                nothing += not b
                if differ(a, b):
                    found.append(
                        {"seed": seed, "expr": case.expression, "at": case.at, "ours": str(a), "theirs": str(b)}
                    )
    version = subprocess.run(["promtool", "--version"], capture_output=True, text=True, check=False)
    told = (version.stdout + version.stderr).splitlines()[0]
    report = {"with": told, "cases": total, "errors": errors, "empty": nothing, "differ": len(found)}
    print(json.dumps({**report, "differences": found[:SHOWN]}, indent=2))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
