"""What the files of /proc say, from lines of real ones, and this process's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interlock.monitors import procfs
from interlock.monitors.procfs import KeptFile

LINE = (
    b"14948 (a) R (b) S 14944 14940 11712 0 -1 4194304 99 0 7 0 150 50 0 0 20 0 3 0 3850419 3133440 394 18446744 "
    b"94449872687104 0 0 0 0\n"
)


def test_a_line_of_stat_whose_name_holds_brackets_is_read_from_behind_them() -> None:
    found = procfs.parse_stat(LINE)
    assert (found.state, found.parent, found.group, found.threads, found.major_faults) == ("S", 14944, 14940, 3, 7)
    assert found.cpu == 200 * procfs.TICK_S
    assert found.started == 3850419 * procfs.TICK_S
    assert found.rss == 394 * procfs.PAGE_BYTES
    assert found.alive


def test_a_zombie_is_not_alive() -> None:
    assert not procfs.parse_stat(LINE.replace(b") S ", b") Z ")).alive


@pytest.mark.parametrize("text", [b"", b"1 (x", b"1 (x) S 1", b"1 (x) S " + b"y " * 30])
def test_what_is_no_such_line_is_an_error_that_callers_expect(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (of whatever words)
        procfs.parse_stat(text)


def test_pids_in_all_namespaces_ours_first() -> None:
    assert procfs.parse_namespaced(b"Name:\tx\nNSpid:\t4711\t17\t1\nThreads:\t1\n") == [4711, 17, 1]
    assert procfs.parse_namespaced(b"Name:\tx\n") == []


def test_a_kept_file_stays_with_the_process_it_was_opened_of() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    kept = KeptFile(f"/proc/{child.pid}/stat")
    assert procfs.parse_stat(kept.read()).alive
    child.communicate(b"\n")
    with pytest.raises(ProcessLookupError):
        kept.read()
    kept.close()
    kept.close()


def test_a_file_that_is_not_kept_leaves_nothing_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "file").write_bytes(b"x" * 200_000)
    file = KeptFile(str(tmp_path / "file"), keep=False)
    assert len(file.read_all()) == 200_000
    assert len(os.listdir("/proc/self/fd")) == before


def test_our_own_process_has_switches_descriptors_and_proportional_memory() -> None:
    found = procfs.switches(os.getpid(), most=512)
    assert found is not None
    assert sum(found) > 0
    assert procfs.switches(os.getpid(), most=0) is None, "too many threads to ask each"
    assert procfs.open_descriptors(os.getpid()) == len(os.listdir("/proc/self/fd")) - 1  # that of the listing itself
    shared = procfs.proportional(os.getpid())
    assert shared is None or shared > 1 << 20, "None where the kernel does not tell"


def test_a_process_that_is_gone_has_nothing() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert procfs.read_stat(gone.pid) is None
    assert procfs.switches(gone.pid, most=9) is None
    assert procfs.open_descriptors(gone.pid) is None
    assert procfs.proportional(gone.pid) is None
