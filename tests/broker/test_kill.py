"""The kill bench in small: nothing acknowledged is lost, doubled or reordered, whoever is killed and when."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench_kill.py"
KILLS, OTHERS = 15, 4  # of the broker; of a publisher and of a subscriber, each. `bench_kill.py` alone does 200 of each


@pytest.mark.serial
@pytest.mark.timeout(300)
def test_killed_at_random_moments_nothing_acknowledged_is_lost_doubled_or_reordered() -> None:
    ended = subprocess.run(
        [sys.executable, str(BENCH), "--kills", str(KILLS), "--others", str(OTHERS)],
        capture_output=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, (ended.stdout, ended.stderr)
    result = json.loads(ended.stdout)
    assert result["kills"] == {"broker": KILLS, "publisher": OTHERS, "subscriber": OTHERS}
    assert result["power_cuts"] > 0
    assert (result["lost"], result["duplicates"], result["order_kept"], result["chain"]) == (0, 0, True, "whole")
    assert min(result["acknowledged"], result["taken"]) > 0
