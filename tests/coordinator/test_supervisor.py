"""The supervisor with stand-in roles: real processes that report readiness, log, and end as they are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from interlock.broker.errors import ConfigError
from interlock.coordinator import supervisor
from interlock.coordinator.supervisor import Backoff, RoleSpec, Supervisor

PATIENCE_S = 30.0

# A role in a few lines: says it started and when it is ready, then waits for SIGTERM.
ROLE = """
import os, signal, sys
name, book = sys.argv[1:3]
def note(what):
    with open(book, "a") as file: file.write(what + " " + name + chr(10))
def stop(*_):
    note("stopped"); os._exit(0)
signal.signal(signal.SIGTERM, stop)
note("started")
os.write(int(os.environ["INTERLOCK_READY_FD"]), b"ready" + bytes([10]))
print("hello from", name, flush=True)
while True: signal.pause()
"""


def role(name: str, book: Path, phase: int = 0, code: str = ROLE, stop_s: float = 10.0) -> RoleSpec:
    return RoleSpec(name, [sys.executable, "-I", "-S", "-c", code, name, str(book)], phase, stop_s)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool], what: str) -> None:
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  (of other processes)
            await trio.sleep(0.02)
    assert condition(), what


class Said(list[tuple[str, str]]):
    def __call__(self, name: str, line: str) -> None:
        self.append((name, line))

    def mentions(self, text: str) -> bool:
        return any(text in line for _, line in self)


async def test_roles_start_phase_by_phase_and_stop_in_reverse(tmp_path: Path) -> None:
    book, said = tmp_path / "book", Said()
    running = Supervisor([role("a", book), role("b", book, 1), role("c", book, 2)], said)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE_S):
            await nursery.start(running.run)
        pids = running.pids
        assert list(pids) == ["a", "b", "c"]
        nursery.cancel_scope.cancel()
    assert not any(alive(pid) for pid in pids.values())
    words = ["started a", "started b", "started c", "stopped c", "stopped b", "stopped a"]
    assert book.read_text().splitlines() == words


async def test_log_lines_carry_the_name_of_the_role(tmp_path: Path) -> None:
    said = Said()
    async with trio.open_nursery() as nursery:
        await nursery.start(Supervisor([role("a", tmp_path / "book")], said).run)
        await until(lambda: ("a", "hello from a") in said, "the line")
        nursery.cancel_scope.cancel()


async def test_a_killed_role_is_started_again_and_the_others_are_left_alone(tmp_path: Path) -> None:
    book, said = tmp_path / "book", Said()
    running = Supervisor([role("a", book), role("b", book)], said)
    async with trio.open_nursery() as nursery:
        await nursery.start(running.run)
        before = running.pids
        os.kill(before["a"], signal.SIGKILL)
        await until(lambda: book.read_text().count("started a") == 2, "the second start")
        assert running.pids["a"] != before["a"]
        assert running.pids["b"] == before["b"]
        assert said.mentions("a ended (killed by SIGKILL); starting it again")
        nursery.cancel_scope.cancel()


async def test_a_role_whose_configuration_is_wrong_ends_it_all_with_its_error(tmp_path: Path) -> None:
    book, said = tmp_path / "book", Said()
    wrong = role("b", book, 1, code="import sys; print('no such key', file=sys.stderr); sys.exit(2)")
    with pytest.raises(ConfigError, match="b: did not start: exit code 2"), trio.fail_after(PATIENCE_S):
        await Supervisor([role("a", book), wrong, role("c", book, 2)], said).run()
    assert ("b", "no such key") in said
    assert book.read_text().splitlines() == ["started a", "stopped a"]


async def test_a_role_that_crashes_at_start_is_tried_a_few_times(tmp_path: Path) -> None:
    crash = role("a", tmp_path / "book", code="import sys; open(sys.argv[2], 'a').write('x'); sys.exit(1)")
    with pytest.raises(ConfigError, match="exit code 1"), trio.fail_after(PATIENCE_S):
        await Supervisor([crash], Said()).run()
    assert (tmp_path / "book").read_text() == "x" * supervisor.FIRST_STARTS


async def test_a_failure_is_not_hidden_by_another_role_that_is_slow(tmp_path: Path) -> None:
    slow = role("a", tmp_path / "book", code="import signal; signal.pause()")
    wrong = role("b", tmp_path / "book", code="import sys; sys.exit(2)")
    with pytest.raises(ConfigError, match="b: did not start"), trio.fail_after(PATIENCE_S):
        await Supervisor([slow, wrong], Said()).run()


async def test_a_program_that_is_not_there_is_an_error_of_its_role() -> None:
    with pytest.raises(ConfigError, match="a: can't be started"), trio.fail_after(PATIENCE_S):
        await Supervisor([RoleSpec("a", ["/no/such/program"])], Said()).run()


async def test_a_role_that_ignores_sigterm_is_killed_after_its_deadline(tmp_path: Path) -> None:
    stubborn = ROLE.replace("signal.signal(signal.SIGTERM, stop)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    said = Said()
    running = Supervisor([role("a", tmp_path / "book", code=stubborn, stop_s=0.2)], said)
    async with trio.open_nursery() as nursery:
        await nursery.start(running.run)
        pid = running.pids["a"]
        nursery.cancel_scope.cancel()
    assert not alive(pid)
    assert said.mentions("a did not stop within 0.2 s: killed")


@pytest.mark.parametrize("delay_ms", [0, 5, 20, 60, 120])
async def test_a_stop_at_any_moment_of_the_start_leaves_no_process(tmp_path: Path, delay_ms: int) -> None:
    book = tmp_path / "book"
    running = Supervisor([role(name, book, phase) for phase, name in enumerate("abc")], Said())
    seen: set[int] = set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.run)
        with trio.move_on_after(delay_ms / 1000):
            while True:
                seen.update(running.pids.values())
                await trio.sleep(0.001)
        seen.update(running.pids.values())
        nursery.cancel_scope.cancel()
    assert running.pids == {}
    assert not any(alive(pid) for pid in seen)


async def test_roles_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    book, pids = tmp_path / "book", tmp_path / "pids"
    program = f"""
import trio
from interlock.coordinator.supervisor import RoleSpec, Supervisor
async def main():
    running = Supervisor([RoleSpec("a", {list(role("a", book).argv)!r})], lambda name, line: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(running.run)
        # a worker thread that comes and goes must not take the roles with it
        await trio.to_thread.run_sync(lambda: None)
        open({str(pids)!r}, "w").write(str(running.pids["a"]) + "\\n")
        await trio.sleep_forever()
trio.run(main)
"""
    parent = subprocess.Popen([sys.executable, "-c", program])  # noqa: ASYNC220
    try:
        await until(lambda: pids.exists() and pids.read_text().endswith("\n"), "ready")
        pid = int(pids.read_text())
        assert alive(pid)
    finally:
        parent.kill()
        parent.wait()
    await until(lambda: not alive(pid), "the role is gone")
    assert book.read_text().splitlines() == ["started a", "stopped a"]


def test_restarts_wait_longer_each_time_up_to_a_bound_and_anew_after_a_steady_run() -> None:
    backoff = Backoff()
    waits = [backoff.after(0.0) for _ in range(10)]
    assert waits[:4] == [0.0, 0.2, 0.4, 0.8]
    assert waits[-1] == supervisor.RESTART_MAX_S
    assert [backoff.after(supervisor.STEADY_S), backoff.after(0.0)] == [0.0, supervisor.RESTART_S]
