"""The demo and the benchmarks around their measuring: what is known to fail in the end, and what is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from interlock.broker import facts
from interlock.broker.commands import Breach
from interlock.coordinator import cli
from interlock.coordinator.demo import play
from interlock.coordinator.demo.clients import Seen
from interlock.coordinator.demo.scenarios import SCENARIOS, Move

PATIENCE_S = 90  # for a benchmark to begin, and for its fleet to end, on a busy machine
ENTRY = (
    "name", "agent", "from", "to", "outcome", "decided_by", "breach_to_event_ms", "breach_to_restored_ms", "requests",
    "failed_requests", "longest_gap_ms",
)  # fmt: skip


def test_every_entry_of_the_report_has_the_same_keys() -> None:
    committed, back = Move(SCENARIOS[0], began=1.0), Move(SCENARIOS[1], began=1.0)
    back.rolled_back = facts.RolledBack(
        host="alpha", agent="tutor", migration="tutor-1", epoch=1, revision="r2", level=1,
        breach=Breach(by="rule x", reason="y", sample_time=10.0), received=10.1, routed=10.2, restored=10.3,
        verified=True,
    )  # fmt: skip
    for move in (committed, back):
        assert tuple(move.result(Seen(), 20.0).entry) == ENTRY
    assert committed.result(Seen(), 20.0).rollback == {}
    assert back.result(Seen(), 20.0).rollback["level"] == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demo", "--report", "{}/nope/r.json"], "there is no folder"),
        (["demo", "--report", "{}"], "is a folder"),
        (["up", "--ready-file", "{}/nope/ready"], "there is no folder"),
    ],
)
def test_a_file_that_can_not_be_written_is_refused_before_the_start(
    argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(play, "lay_out", lambda folder: pytest.fail("the demo began"))
    assert cli.main([word.format(tmp_path) for word in argv]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert argv[1] in told


def test_a_benchmark_that_is_terminated_leaves_nothing_behind(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "bench_rollback.py"
    few = ["--rollbacks", "1", "--cold", "0", "--rivals", "0"]
    bench = subprocess.Popen([sys.executable, str(script), *few], env={"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not list(tmp_path.glob("interlock-bench-*/log")):
            assert bench.poll() is None, bench.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(PATIENCE_S) == 130
    finally:
        bench.kill()
        bench.communicate()
    assert list(tmp_path.iterdir()) == []
