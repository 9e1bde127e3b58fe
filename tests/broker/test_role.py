"""Locks, readiness, signals and exit codes, in processes where they need one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from interlock.broker.errors import ConfigError, InUse
from interlock.broker.role import READY_FD, held, ready


def test_a_lock_says_who_holds_it_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "host-a" / "lock"
    with held(path, "host a"):
        with pytest.raises(InUse, match=f"held by host a, process {os.getpid()}"), held(path, "host a"):
            pass
    assert not path.exists()
    with held(path, "host a"):
        pass


def test_a_lock_file_left_by_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = "import os, sys; from pathlib import Path; from interlock.broker.role import held\n"
    code += "with held(Path(sys.argv[1]), 'x'): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)
    assert path.exists()
    with held(path, "y"):
        assert str(os.getpid()) in path.read_text()


@pytest.mark.parametrize("content", ["", "rubbish", "[]", '{"pid": 1}'])
def test_a_holder_that_has_not_written_its_name_is_still_a_holder(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lock"
    with held(path, "x"):
        path.write_text(content)
        with pytest.raises(InUse, match="has not written its name"), held(path, "y"):
            pass


def test_never_two_hold_a_lock_while_many_take_and_leave_it(tmp_path: Path) -> None:
    path, inside, most, taken = tmp_path / "lock", [0], [0], [0]

    def contend() -> None:
        while taken[0] < 200:
            try:
                with held(path, "x"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    taken[0] += 1
                    inside[0] -= 1
            except InUse:
                continue

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_lock_that_can_not_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(ConfigError, match="can't be opened"), held(tmp_path / "lock", "x"):
        pass


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)


def test_ready_is_said_once_on_the_given_descriptor(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(READY_FD, str(pipe[1]))
    ready()
    ready()
    assert os.read(pipe[0], 100) == b"ready\n"
    assert os.read(pipe[0], 100) == b""


def test_ready_without_a_descriptor_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(READY_FD, raising=False)
    ready()
    assert READY_FD not in os.environ
    monkeypatch.setenv(READY_FD, "rubbish")
    ready()
    assert READY_FD not in os.environ  # it is not handed on to what this process starts


ROLE = """
import sys, trio
from interlock.broker.errors import ConfigError, InUse
from interlock.broker.role import run_role
async def main(ready):
    {body}
sys.exit(run_role("thing", main))
"""


async def run(body: str, *, expect: int, **env: str) -> str:
    with trio.fail_after(60):
        ended = await trio.run_process(
            [sys.executable, "-c", ROLE.format(body=body)],
            env={**os.environ, **env},
            capture_stderr=True,
            check=False,
        )
    assert ended.returncode == expect, ended.stderr
    return ended.stderr.decode()


async def test_a_role_that_ends_by_itself_exits_0() -> None:
    assert await run("pass", expect=0) == ""


async def test_an_error_of_ours_is_one_line_and_exit_code_2() -> None:
    text = await run("raise ConfigError('is wrong', where='fleet.toml', hint='mend it')", expect=2)
    assert text == "interlock thing: fleet.toml: is wrong (mend it)\n"


async def test_errors_from_nurseries_are_told_one_by_one() -> None:
    body = "raise ExceptionGroup('', [InUse('a'), ExceptionGroup('', [ConfigError('b')])])"
    assert await run(body, expect=2) == "interlock thing: a\ninterlock thing: b\n"


async def test_a_defect_is_one_log_line_with_its_traceback_and_exit_code_1() -> None:
    text = await run("1 / 0", expect=1)
    assert len(text.splitlines()) == 1
    assert "ZeroDivisionError" in text


async def test_an_unknown_log_level_is_told() -> None:
    assert "unknown level 'LOUD'" in await run("pass", expect=2, INTERLOCK_LOG="loud")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
async def test_a_signal_cancels_the_role_which_may_finish_its_work(name: str) -> None:
    body = f"""
    import os, signal
    try:
        os.kill(os.getpid(), signal.{name})
        await trio.sleep_forever()
    finally:
        print("farewell", file=sys.stderr)
    """
    assert "farewell" in await run(body.strip(), expect=0)
