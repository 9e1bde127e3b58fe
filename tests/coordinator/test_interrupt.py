"""Ctrl-C while a program of ours still begins: quiet, 130, whatever it was just importing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PATIENCE_S = 60  # for a process of ours to begin and end on a busy machine

# Interrupts itself at the first import of the module that is named first.
INTERRUPTED = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == at and self in sys.meta_path:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

at, module = sys.argv[1:3]
del sys.argv[1:3]
sys.meta_path.insert(0, Interrupt())
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""

OURS = "interlock.coordinator"


@pytest.mark.parametrize(
    ("at", "command"),
    [
        ("trio", ["interlock.broker"]),
        ("trio", ["interlock.agents", "--name", "alpha"]),
        ("trio", ["interlock.monitors", "--host", "alpha"]),
        ("trio", [OURS, "watch"]),
        (f"{OURS}.watch", [OURS, "watch"]),
        (f"{OURS}.log_verb", [OURS, "log"]),
        (f"{OURS}.up", [OURS, "up"]),
        (f"{OURS}.service", [OURS, "coordinator"]),
    ],
)
def test_ctrl_c_while_a_program_is_imported_is_quiet(at: str, command: list[str], tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text('security.mode = "insecure"\n[hosts.alpha]\ncontrol = "ipc://control"\n')
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, at, *command], check=False, cwd=tmp_path, capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (130, "")
