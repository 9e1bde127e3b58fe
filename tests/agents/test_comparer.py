"""A revision's own comparison functions: real processes that judge, raise, hang, die, flood, and lie."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from interlock.agents.comparer import Bench, Comparer, check_functions, functions_of
from interlock.agents.judging import MAX_OUTPUT
from interlock.agents.revisions import Revision
from interlock.broker.config import CompareConfig, HandlerCompare, RevisionConfig, parse_fleet
from interlock.broker.errors import ConfigError

SOURCE = """
import os, time

def compare(request, old, new):
    what = request.get("do")
    if what == "raise":
        raise KeyError("no such thing")
    if what == "leave":
        raise SystemExit(0)
    if what == "hang":
        time.sleep(1000)
    if what == "die":
        os._exit(7)
    if what == "flood":
        line = "x" * 100_000
        while True:
            print(line)
    if what == "none":
        return None
    if what == "echo":
        return repr((request, old, new))
    if what == "boolean":
        return old["a"] == new["a"]
    return "" if old["a"] == new["a"] else f"{old['a']} became {new['a']}"

async def unusable(request, old, new):
    return True
"""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    source = tmp_path / "source"
    source.mkdir()
    (source / "check.py").write_text(SOURCE)
    recorded = Revision("tutor", "r2", "digest", source, RevisionConfig(source=str(source), command=["x"]))
    run_dir = Path(tempfile.mkdtemp(prefix="il-", dir="/tmp"))
    yield Bench(recorded, tmp_path, "0" * 32, run_dir, tmp_path / "log", {})
    shutil.rmtree(run_dir)


@asynccontextmanager
async def comparing(bench: Bench, *, timeout_s: float = 20.0, function: str = "check:compare") -> AsyncIterator[Ask]:
    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            comparer = Comparer(bench, [function], timeout_s=timeout_s, number=1)
            nursery.start_soon(comparer.run)
            yield Ask(comparer, function)
            comparer.close()


class Ask:
    def __init__(self, comparer: Comparer, function: str) -> None:
        self.comparer, self.function = comparer, function

    async def __call__(self, do: str = "", old: object = 1, new: object = 1) -> tuple[str, str]:
        frames = [[msgspec.json.encode(value)] for value in ({"do": do}, {"a": old}, {"a": new})]
        verdict = await self.comparer.judge(self.function, *frames, None)
        return verdict.difference, verdict.error


async def test_a_function_says_equal_or_what_differs(bench: Bench) -> None:
    async with comparing(bench) as ask:
        assert await ask() == ("", "")
        assert await ask(new=2) == ("1 became 2", "")
        assert await ask("boolean") == ("", "")
        assert await ask("boolean", new=2) == ("check:compare says that they differ", "")
        assert (await ask("echo"))[0] == "({'do': 'echo'}, {'a': 1}, {'a': 1})"
        assert ask.comparer.starts == 1


async def test_a_function_of_an_http_agent_gets_method_path_and_body(bench: Bench) -> None:
    async with comparing(bench) as ask:
        http = {"method": "GET", "path": "/x?y", "do": "echo"}
        verdict = await ask.comparer.judge("check:compare", [b""], [b"\xff\xfe"], [b"2"], http)
        assert verdict.difference == repr(({**http, "body": b""}, b"\xff\xfe", 2))


@pytest.mark.parametrize(
    ("do", "error"),
    [
        ("raise", "check.py:7: KeyError: 'no such thing'"),
        ("leave", "check.py:9: SystemExit: 0"),
        ("none", "check:compare returned NoneType, not True, False or a text"),
        ("flood", "OSError: [Errno 27] File too large"),
        ("die", "ended with code 7"),
    ],
)
async def test_one_that_fails_at_a_pair_makes_it_an_error_and_judges_the_next(
    do: str, error: str, bench: Bench
) -> None:
    async with comparing(bench) as ask:
        found = await ask(do)
        assert found[0] == ""
        assert error in found[1]
        assert await ask(new=2) == ("1 became 2", "")
    logs = list((bench.log_dir).iterdir())
    assert sum(log.stat().st_size for log in logs) <= MAX_OUTPUT


async def test_one_that_hangs_is_ended_at_its_deadline_and_started_anew(bench: Bench) -> None:
    async with comparing(bench, timeout_s=0.3) as ask:
        with trio.move_on_after(30):
            while await ask() != ("", ""):  # a busy machine may miss so short a deadline
                pass
        starts = ask.comparer.starts
        assert await ask("hang") == ("", "check:compare did not answer within 0.3 s, and was ended")
        with trio.move_on_after(30):
            while await ask() != ("", ""):
                pass
        assert ask.comparer.starts > starts


async def test_one_that_is_killed_is_started_anew_and_nothing_is_left_at_the_end(bench: Bench) -> None:
    async with comparing(bench) as ask:
        assert await ask() == ("", "")
        process = ask.comparer._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        await process.gone()
        assert "ended with code -9" in (await ask())[1]
        assert await ask() == ("", "")
        last = ask.comparer._process
        assert last is not None
    with pytest.raises(ProcessLookupError):
        os.kill(last.pid, 0)
    assert list(bench.run_dir.iterdir()) == []


async def test_whoever_waits_for_a_verdict_gets_an_error_when_the_run_ends(bench: Bench) -> None:
    async with comparing(bench, timeout_s=1000.0) as ask:
        assert await ask() == ("", "")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "hang")
            await trio.testing.wait_all_tasks_blocked()
            ask.comparer.close()
        assert "run is over" in (await ask())[1]


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("check:nothing", "there is no nothing in module check"),
        ("nothing:compare", "ModuleNotFoundError: No module named 'nothing'"),
        ("check:unusable", "is no plain function; write def unusable(request, old, new)"),
        ("bad:compare", "bad.py:2: invalid syntax"),
    ],
)
async def test_a_function_that_can_t_be_had_is_found_before_anything_starts_and_is_never_a_pass(
    function: str, error: str, bench: Bench
) -> None:
    (bench.recorded.folder / "bad.py").write_text("\ndef = 1\n")
    finding = await check_functions(bench, [function])
    assert not finding.ok
    assert error in finding.reason
    async with comparing(bench, function=function) as ask:
        for _ in range(3):
            found = await ask()
            assert found[0] == ""
            assert error in found[1]
        assert ask.comparer.starts == 1  # it would not help to try again


async def test_a_function_that_can_be_had_is_said_to_be_there(bench: Bench) -> None:
    finding = await check_functions(bench, ["check:compare"])
    assert (finding.check, finding.ok, finding.reason) == ("comparison", True, "check:compare can be imported")


async def test_an_interpreter_without_our_light_distribution_is_said_so(bench: Bench) -> None:
    isolated = bench.base / "python"
    isolated.write_text(f'#!/bin/sh\nexec {sys._base_executable} -I -S "$@"\n')  # type: ignore[attr-defined]
    isolated.chmod(0o755)
    config = msgspec.structs.replace(bench.recorded.config, python=str(isolated))
    bench.recorded = Revision("tutor", "r2", "digest", bench.recorded.folder, config)
    finding = await check_functions(bench, ["check:compare"])
    assert not finding.ok
    assert "install interlock-agent there" in finding.reason


def test_each_function_is_loaded_once() -> None:
    two = {name: HandlerCompare(function="a:b") for name in ("x", "y")}
    assert functions_of(CompareConfig(handlers={**two, "z": HandlerCompare()})) == ["a:b"]


@pytest.mark.parametrize(
    ("handlers", "message"),
    [
        ({"ask": {"function": "nonsense"}}, "is not module:function"),
        ({"ask": {"mode": "exact", "tolerance": 0.1}}, "exact compares bytes"),
        ({"ask": {"function": "a:b", "ignore": ["x"]}}, "a function decides alone"),
        ({"ask": {"mode": "nearly"}}, "Invalid enum value|invalid enum value"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(handlers: dict[str, object], message: str) -> None:
    tree = {
        "hosts": {"alpha": {"control": "tcp://127.0.0.1:7180"}},
        "agents": {
            "tutor": {
                "host": "alpha", "endpoint": "tcp://127.0.0.1:7201", "serve": "r1",
                "revisions": {"r1": {"entry": "a:B"}}, "compare": {"handlers": handlers},
            }
        },
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        parse_fleet(tree)
