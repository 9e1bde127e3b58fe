"""The simulated GPU's ledger, with real processes that die."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from interlock.broker import simgpu
from interlock.broker.config import SimulatedGpu as CardConfig
from interlock.broker.simgpu import GpuOutOfMemory, NoSimulatedGpu, SimulatedGpu, create_cards, open_simulated

GIB = 1024**3
OWNER = """
import sys
from pathlib import Path
from interlock.broker.simgpu import SimulatedGpu
held = SimulatedGpu(Path(sys.argv[1])).reserve(int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""
RACER = """
import sys
from pathlib import Path
from interlock.broker.simgpu import GpuOutOfMemory, SimulatedGpu
gpu = SimulatedGpu(Path(sys.argv[1]))
kept = []
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    try:
        kept.append(gpu.reserve(1))
    except GpuOutOfMemory:
        pass
print(len(kept), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def card(tmp_path: Path) -> SimulatedGpu:
    return create_cards(tmp_path / "simgpu", [CardConfig(name="test card", memory_bytes=24 * GIB)])[0]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a Python program with arguments; it is killed at the end of the test."""
    running: list[subprocess.Popen[str]] = []

    def begin(program: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_reservation_counts_until_it_is_freed(card: SimulatedGpu) -> None:
    with card.reserve(3 * GIB) as held:
        assert card.used() == 3 * GIB
        assert card.by_pid() == {os.getpid(): 3 * GIB}
        held.resize(5 * GIB)
        assert held.bytes == card.used() == 5 * GIB
    assert card.used() == 0
    held.free()
    assert held.bytes == 0


def test_several_reservations_of_one_process_are_added_up(card: SimulatedGpu) -> None:
    with card.reserve(GIB), card.reserve(2 * GIB):
        assert card.by_pid() == {os.getpid(): 3 * GIB}


def test_more_than_is_free_is_refused_as_cuda_refuses_it_and_changes_nothing(card: SimulatedGpu) -> None:
    with card.reserve(20 * GIB) as held:
        with pytest.raises(GpuOutOfMemory, match=r"tried to allocate 5\.00 GiB.*24\.00 GiB of which 4\.00 GiB is free"):
            card.reserve(5 * GIB)
        with pytest.raises(GpuOutOfMemory):
            held.resize(25 * GIB)
        held.resize(24 * GIB)
        assert card.used() == 24 * GIB
        with pytest.raises(GpuOutOfMemory):
            card.reserve(1)


def test_a_negative_size_and_a_freed_reservation_are_errors_of_the_caller(card: SimulatedGpu) -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        card.reserve(-1)
    held = card.reserve(1)
    held.free()
    with pytest.raises(ValueError, match="freed already"):
        held.resize(2)


def test_a_reservation_that_nobody_refers_to_is_gone(card: SimulatedGpu) -> None:
    card.reserve(GIB)  # dropped at once
    assert card.used() == 0


def test_kill_9_frees_what_the_process_held(card: SimulatedGpu, start: Callable[..., subprocess.Popen[str]]) -> None:
    owner = start(OWNER, card.folder, 7 * GIB)
    assert line(owner) == "held"
    assert card.by_pid() == {owner.pid: 7 * GIB}
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert card.by_pid() == {}
    assert not list(card.folder.glob("*.ledger")), "the reader tidies up after the dead"
    card.reserve(24 * GIB).free()


def test_processes_that_race_for_the_last_bytes_never_get_more_than_there_are(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    card = create_cards(tmp_path, [CardConfig(memory_bytes=100)])[0]
    racers = [start(RACER, card.folder) for _ in range(4)]
    for racer in racers:
        assert line(racer) == "ready"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert sum(int(line(racer)) for racer in racers) == 100
    assert card.used() == 100


def test_a_forked_child_does_not_keep_its_parents_reservation(
    card: SimulatedGpu, start: Callable[..., subprocess.Popen[str]]
) -> None:
    program = OWNER.replace(
        'print("held"',
        "import os, time\nchild = os.fork()\nif not child:\n    time.sleep(60)\n    os._exit(0)\nprint(child",
    )
    parent = start(program, card.folder, GIB)
    child = int(line(parent))
    try:
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20  # the child closes its copy in its first moment
        while card.used() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert card.used() == 0
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_half_made_ledger_of_a_dead_process_is_removed_and_never_counted(card: SimulatedGpu) -> None:
    left = card.folder / "999999-abc.ledger.new"
    left.touch()
    os.truncate(left, 20 * GIB)
    assert card.used() == 0
    with card.reserve(24 * GIB):
        assert not left.exists()


def test_a_reader_is_not_taken_for_an_owner(card: SimulatedGpu) -> None:
    left = card.folder / "999999-abc.ledger"
    left.write_bytes(b"x" * 10)
    with left.open("rb") as other_reader:
        fcntl.flock(other_reader, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert card.used() == 0


def test_cards_can_be_made_again_by_anybody_and_keep_their_identity_and_reservations(tmp_path: Path) -> None:
    first = create_cards(tmp_path, [CardConfig(memory_bytes=100), CardConfig(memory_bytes=200)])
    with first[1].reserve(150):
        again = create_cards(tmp_path, [CardConfig(memory_bytes=100), CardConfig(memory_bytes=300, name="larger")])
        assert [card.uuid for card in again] == [card.uuid for card in first]
        assert again[0].uuid != again[1].uuid
        assert (again[1].total, again[1].name, again[1].used()) == (300, "larger", 150)


def test_an_agent_finds_its_card_by_the_environment(
    card: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(simgpu.ENVIRONMENT, str(tmp_path / "simgpu"))
    assert open_simulated().total == 24 * GIB
    with pytest.raises(NoSimulatedGpu, match="there is no simulated card"):
        open_simulated(1)
    monkeypatch.delenv(simgpu.ENVIRONMENT)
    with pytest.raises(NoSimulatedGpu, match="INTERLOCK_SIMGPU is not set"):
        open_simulated()


def test_a_damaged_card_says_where_it_is(card: SimulatedGpu) -> None:
    (card.folder / simgpu.CARD).write_text("{}")
    with pytest.raises(NoSimulatedGpu, match=r"card\.json"):
        SimulatedGpu(card.folder)


def test_nothing_but_the_standard_library_is_needed() -> None:
    program = (
        "import sys; import interlock.broker.simgpu; "
        "print([m for m in ('trio', 'zmq', 'msgspec', 'psutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
