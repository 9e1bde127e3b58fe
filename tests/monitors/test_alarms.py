"""What the kernel tells by itself, from real processes, cgroups and pressure files."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from interlock.broker import cgroups
from interlock.broker.samples import Labels, labels
from interlock.monitors.alarms import Alarms, _Poller
from interlock.monitors.events import EXITS, PERMITTED, POPULATED, Events
from interlock.monitors.roster import Instance

Start = Callable[..., tuple[subprocess.Popen[str], Instance]]
SLEEPER = "import sys; print('ready', flush=True); sys.stdin.read()"


class Heard:
    def __init__(self) -> None:
        self.said: list[tuple[str, object]] = []
        self._news = trio.lowlevel.ParkingLot()

    def take(self, what: str, about: object) -> None:
        self.said.append((what, about))
        self._news.unpark_all()

    async def until(self, *wanted: tuple[str, object]) -> None:
        with trio.fail_after(30):
            while not set(wanted) <= set(self.said):
                await self._news.park()


@asynccontextmanager
async def alarms(proc: str = "/proc") -> AsyncIterator[tuple[Alarms, Heard]]:
    heard = Heard()
    made = Alarms(
        ended=lambda id: heard.take("ended", id),
        stalled=lambda resource: heard.take("stalled", resource),
        populated=lambda id, yes: heard.take("populated", (id, yes)),
        proc=proc,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await trio.testing.wait_all_tasks_blocked()
        yield made, heard
        nursery.cancel_scope.cancel()


async def test_the_end_of_a_process_is_told_once_and_of_one_that_is_let_go_not_at_all(start: Start) -> None:
    first, one = start(SLEEPER)
    second, other = start(SLEEPER)
    before = len(os.listdir("/proc/self/fd"))
    async with alarms() as (made, heard):
        made.follow({"one": one.pid, "other": other.pid}, {})
        made.follow({"one": one.pid}, {})
        second.send_signal(signal.SIGKILL)
        second.wait()
        first.send_signal(signal.SIGKILL)
        await heard.until(("ended", "one"))
        assert ("ended", "other") not in heard.said
        assert made.permitted["pidfd"]
    assert len(os.listdir("/proc/self/fd")) <= before, "no descriptor is left, that of the kick included"


async def test_a_process_that_is_gone_already_is_no_error(start: Start) -> None:
    gone, instance = start(SLEEPER)
    gone.kill()
    gone.wait()
    async with alarms() as (made, heard):
        made.follow({"gone": instance.pid}, {})
        assert heard.said == []


async def test_a_machine_without_pressure_files_says_so_once_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with alarms(str(tmp_path)) as (made, _):
        with trio.fail_after(10):
            while "pressure" not in made.permitted:
                await trio.testing.wait_all_tasks_blocked(0.02)
        assert made.permitted["pressure"] is False
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "no events by pressure" in said[0]
    assert "this kernel has none" in said[0]


async def test_more_work_than_cores_is_told_as_a_stall_of_the_processor(start: Start) -> None:
    async with alarms() as (made, heard):
        with trio.fail_after(10):
            while "pressure" not in made.permitted:
                await trio.testing.wait_all_tasks_blocked(0.02)
        if not made.permitted["pressure"]:
            pytest.skip("this machine permits no pressure triggers")
        for _ in range(2 * (os.cpu_count() or 1) + 1):
            start("print('ready', flush=True)\nwhile True: pass")
        await heard.until(("stalled", "cpu"))


def unified() -> Path:
    here = cgroups.places(Path("/proc/self/cgroup").read_text())
    return cgroups.folders(here, cgroups.read_hierarchies())[cgroups.V2]


@pytest.fixture
def folder() -> AsyncIterator[Path]:  # type: ignore[misc]
    try:
        made = unified() / "interlock-alarms" / "echo-1"
        made.mkdir(parents=True)
    except (OSError, KeyError) as error:
        pytest.skip(f"this process may make no cgroups: {error}")
    yield made
    made.rmdir()
    made.parent.rmdir()


async def test_a_cgroup_that_runs_empty_is_told_and_one_that_fills_again_too(folder: Path, start: Start) -> None:
    async with alarms() as (made, heard):
        made.follow({}, {"echo-1": folder / "cgroup.events"})
        await heard.until(("populated", ("echo-1", False)))
        process, instance = start(SLEEPER)
        (folder / "cgroup.procs").write_text(str(instance.pid))
        await heard.until(("populated", ("echo-1", True)))
        heard.said.clear()
        process.kill()
        process.wait()
        await heard.until(("populated", ("echo-1", False)))
        assert made.permitted["cgroup"]
        made.follow({}, {})


async def test_news_of_a_cgroup_that_was_let_go_of_in_the_same_breath_are_passed_over(folder: Path) -> None:
    async with alarms() as (made, heard):
        made.follow({}, {"echo-1": folder / "cgroup.events"})
        await heard.until(("populated", ("echo-1", False)))
        poller = _Poller(made, lambda call: call())
        poller._take(99_999, select.POLLPRI)
        made.follow({}, {"echo-2": folder / "cgroup.events"})
        await heard.until(("populated", ("echo-2", False)))


class Told:
    def __init__(self) -> None:
        self.now: dict[Labels, float] = {}
        self.sent = 0

    def send(self, samples: dict[Labels, float], *, time: float, ended: list[Labels] | None = None) -> None:
        self.sent += 1
        self.now |= samples
        for key in ended or ():
            self.now.pop(key)


ECHO = Instance("echo-1", "echo", "v1", "permanent", 11, 0.0)
OF = {"host": "alpha", "agent": "echo", "revision": "v1", "role": "permanent"}


def test_events_are_counted_sent_at_once_and_repeated() -> None:
    told = Told()
    events = Events("alpha", told)
    events.exited("echo")
    events.exited("echo")
    assert told.now == {labels(EXITS, host="alpha", agent="echo"): 2}
    repeated = events.repeated({"pressure": False})
    assert repeated == told.now | {labels(PERMITTED, host="alpha", source="pressure"): 0}
    assert set(events.live()) == set(repeated)


def test_a_cgroup_has_both_edges_and_its_series_ends_with_the_instance() -> None:
    told = Told()
    events = Events("alpha", told)
    events.populated("echo-1", True)
    assert told.now == {}, "nobody has said that it is there"
    events.follow([ECHO], ["echo-1"])
    assert told.now == {labels(POPULATED, **OF): 1}
    events.populated("echo-1", False)
    assert told.now == {labels(POPULATED, **OF): 0}
    sent = told.sent
    events.populated("echo-1", False)
    assert told.sent == sent
    events.follow([], [])
    assert told.now == {}
