"""How many connections a broker may have, and what it says if they are too few."""

from __future__ import annotations

import subprocess
import sys

from interlock.broker.descriptors import shortage
from interlock.broker.streams import NO_LIMIT


def test_enough_descriptors_need_no_word() -> None:
    assert shortage(20_100, 10_000) == ""
    assert shortage(NO_LIMIT, 1_000_000) == ""


def test_too_few_are_told_with_how_many_can_connect_and_what_to_do() -> None:
    said = shortage(20_000, 10_000)
    assert "at most 9950 of the fleet's 10000 keys" in said
    assert "20000 descriptors, not 20100" in said
    assert "LimitNOFILE" in said


def test_the_soft_limit_is_raised_to_the_hard_one_and_a_shortage_is_logged() -> None:
    program = """
import logging, resource
from interlock.broker import descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 300))
logging.basicConfig(format="%(levelname)s %(message)s")
descriptors.provide("event plane", 100)
descriptors.provide("event plane", 101)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "(300, 300)\n"
    assert done.stderr.count("\n") == 1
    assert "WARNING event plane: at most 100 of the fleet's 101 keys" in done.stderr
