"""The supervisor and its sampler against the stand-in for NVIDIA's library: real processes, unmodified nvidia-ml-py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

import nvml_parts
from interlock.monitors import gpu_metrics as gm
from interlock.monitors.call_notes import CALL_DEADLINE_S, CallNotes, Seat, deadline
from interlock.monitors.gpu import CardEvent, DriverState, Heard, NoGpu, Part, Reading
from interlock.monitors.nvidia import NvidiaBackend, Patience
from interlock.monitors.nvml_frames import Poll, pack
from interlock.monitors.sampler import Group
from interlock.monitors.selftest import survey, table
from nvml_parts import GIB, MIB, NOT_AVAILABLE, FakeNvml

ALL = frozenset(Group)
HOT = frozenset({Group.HOT})
SOON = Patience(call_s=CALL_DEADLINE_S, retry_s=0.1, probe_s=0.1, probe_most_s=0.2)


class Listener:
    """What a back-end said: the newest reading of each card, and all else in order."""

    def __init__(self, backend: NvidiaBackend) -> None:
        self.backend = backend
        self.newest: dict[int, Reading] = {}
        self.parts: list[list[int]] = []
        self.said: list[DriverState | CardEvent] = []

    async def hear(self, heard: Heard) -> None:
        await trio.lowlevel.checkpoint()
        if isinstance(heard, Part):
            self.parts.append([reading.card.index for reading in heard.readings])
            self.newest |= {reading.card.index: reading for reading in heard.readings}
        else:
            self.said.append(heard)

    async def sample(self, groups: frozenset[Group] = ALL) -> dict[int, Reading]:
        self.newest = {}
        await self.backend.sample(groups)
        return self.newest

    async def until(self, condition: Callable[[], Any], groups: frozenset[Group] = HOT) -> None:
        """Go on sampling until it holds."""
        with trio.fail_after(30):
            while not condition():
                await self.backend.sample(groups)
                await trio.sleep(0.01)

    def kind(self, index: int) -> str | None:
        return self.newest[index].kind if index in self.newest else None


@asynccontextmanager
async def listening(fake: FakeNvml, patience: Patience = SOON, *, expected: bool = True) -> AsyncIterator[Listener]:
    backend = NvidiaBackend(expected=expected, patience=patience)
    listener = Listener(backend)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fake.environment.items():
            patch.setenv(name, value)
        async with trio.open_nursery() as nursery:
            with trio.fail_after(30):
                await nursery.start(backend.run, listener.hear)
            yield listener
            nursery.cancel_scope.cancel()


async def test_a_healthy_card_gives_every_reading_and_the_hot_path_makes_two_calls_a_card(fake: FakeNvml) -> None:
    fake.hold(0, (100, 5 * GIB), (101, GIB), sm=40)
    async with listening(fake) as told:
        assert [(card.index, card.name, card.bus) for card in told.backend.cards] == [
            (0, "Stand-in 24 GB", "00000000:41:00.0"),
            (1, "Stand-in 24 GB", "00000000:42:00.0"),
        ]
        reading = (await told.sample())[0]
        assert (reading.kind, reading.missing) == ("", 0)
        assert reading.lacking == {gm.MIG_USED: "not-supported"}
        assert reading.processes == {100: 5 * GIB, 101: GIB}
        assert reading.shares == {100: 0.4, 101: 0.4}
        assert reading.values == pytest.approx(EVERYTHING)
        assert told.parts == [[0, 1]], "all cards in one piece"

        await told.until(lambda: fake.call("nvmlEventSetWait_v2").count, ALL)  # whose thread has asked what it has to
        fake.clear_counts()
        for _ in range(5):
            await told.sample(HOT)
        assert fake.counts(0) == fake.counts(1)
        assert fake.counts(0) == {"nvmlDeviceGetMemoryInfo_v2": 5, "nvmlDeviceGetUtilizationRates": 5}
        hot = told.newest[0].values
        assert set(hot) == {gm.split(key)[0] for key in EVERYTHING} & gm.HOT
        assert hot[gm.MEMORY_RATIO] == 1 - (18 * GIB - 512 * MIB) / (24 * GIB)

        fake.clear_counts()
        await told.sample()
        asked = fake.counts(0)
        assert "nvmlDeviceGetEnforcedPowerLimit" not in asked, "what hardly ever changes is not asked for each second"
        assert "nvmlDeviceGetMigMode" not in asked
        assert asked["nvmlDeviceGetFieldValues"] == 1, "thirteen readings in one call"


EVERYTHING = {
    gm.MEMORY_USED: 6 * GIB,
    gm.MEMORY_FREE: 17 * GIB + 512 * MIB,
    gm.MEMORY_TOTAL: 24 * GIB,
    gm.MEMORY_RESERVED: 512 * MIB,
    gm.MEMORY_RATIO: 6.5 / 24,
    gm.UTILIZATION: 0.4,
    gm.MEMORY_UTILIZATION: 0.12,
    gm.TEMPERATURE: 61,
    gm.POWER: 123.4,
    gm.POWER_AVERAGE: 120,
    gm.POWER_INSTANT: 131,
    gm.POWER_LIMIT: 450,
    gm.ENERGY: 7500,
    gm.MEMORY_TEMPERATURE: 70,
    gm.RECOVERY_ACTION: 0,
    f"{gm.CLOCK} clock=graphics": 1980e6,
    f"{gm.CLOCK} clock=sm": 1980e6,
    f"{gm.CLOCK} clock=memory": 10_501e6,
    f"{gm.CLOCK} clock=video": 1755e6,
    gm.CLOCK_REASONS: 1,
    f"{gm.THROTTLED} cause=power": 0,
    f"{gm.THROTTLED} cause=thermal": 0,
    f"{gm.THROTTLED} cause=hardware": 0,
    gm.ECC_ERRORS: 0,
    gm.ECC_CORRECTED: 3,
    f"{gm.ECC_LIFETIME} kind=corrected": 5,
    f"{gm.ECC_LIFETIME} kind=uncorrected": 1,
    f"{gm.REMAPPED_ROWS} cause=correctable": 2,
    f"{gm.REMAPPED_ROWS} cause=uncorrectable": 0,
    gm.REMAP_PENDING: 0,
    gm.REMAP_FAILED: 0,
    gm.PCIE_SENT: 10_000,
    gm.PCIE_RECEIVED: 20_000,
    gm.PCIE_REPLAYS: 4,
    gm.PCIE_GENERATION: 4,
    gm.PCIE_WIDTH: 16,
    gm.NVLINK_SENT: 100 * 1024,
    gm.NVLINK_RECEIVED: 200 * 1024,
    f"{gm.NVLINK_ERRORS} kind=crc": 0,
    f"{gm.NVLINK_ERRORS} kind=replay": 1,
    f"{gm.NVLINK_ERRORS} kind=recovery": 2,
    f"{gm.FAN} fan=0": 0.3,
    f"{gm.FAN} fan=1": 0.45,
}


async def test_throttling_is_told_by_its_cause(fake: FakeNvml) -> None:
    fake.gpu(0).reasons = 0x4 | 0x40  # a power cap by software, heat by hardware
    async with listening(fake) as told:
        values = (await told.sample())[0].values
        causes = {cause: values[f"{gm.THROTTLED} cause={cause}"] for cause in ("power", "thermal", "hardware")}
        assert causes == {"power": 1, "thermal": 1, "hardware": 0}


async def test_what_a_card_lacks_is_absent_with_its_reason_and_never_0(fake: FakeNvml) -> None:
    fake.call("nvmlDeviceGetPowerUsage", 0).error = nvml_parts.NOT_SUPPORTED
    fake.call("nvmlDeviceGetTotalEccErrors", 0).error = nvml_parts.NO_PERMISSION
    fake.call("nvmlDeviceGetMemoryInfo_v2", 0).error = 25  # an old library: version 1 is asked for instead
    fake.gpu(0).fields[0] = nvml_parts.FieldError(82, nvml_parts.NOT_SUPPORTED)
    fake.hold(0, (100, NOT_AVAILABLE))
    async with listening(fake) as told:
        reading = (await told.sample())[0]
        assert (reading.kind, reading.missing, reading.processes) == ("", 0, {})
        assert reading.lacking == {
            gm.POWER: "not-supported",
            gm.ECC_ERRORS: "no-permission",
            gm.ECC_CORRECTED: "no-permission",
            f"{gm.ECC_LIFETIME} kind=corrected": "no-permission",
            f"{gm.ECC_LIFETIME} kind=uncorrected": "no-permission",
            gm.MEMORY_RESERVED: "library-too-old",
            gm.MEMORY_TEMPERATURE: "not-supported",
            gm.MIG_USED: "not-supported",
            gm.PROCESS_MEMORY: "not-available",
        }
        assert not reading.lacking.keys() & reading.values.keys()
        assert reading.values[gm.MEMORY_RATIO] == pytest.approx(0.5 / 24), "also by version 1: 1 - free / total"
        assert (await told.sample())[1].values.keys() == EVERYTHING.keys() - SLOW
        fake.clear_counts()
        await told.sample()
        assert "nvmlDeviceGetPowerUsage" not in fake.counts(0), "it is not asked again at every sample"
        assert told.newest[0].values[gm.POWER_AVERAGE] == 120, "the other fields of the same call go on"


SLOW = {key for key in EVERYTHING if gm.METRICS[gm.split(key)[0]].tier == "slow"}


async def test_a_reading_that_fails_for_once_is_a_hole_that_is_counted(fake: FakeNvml) -> None:
    fake.call("nvmlDeviceGetTemperature", 0).error = 10  # a time-out
    async with listening(fake) as told:
        reading = (await told.sample())[0]
        assert (reading.kind, reading.missing) == ("", 1)
        assert gm.TEMPERATURE not in reading.values
        fake.call("nvmlDeviceGetTemperature", 0).error = 0
        assert (await told.sample())[0].values[gm.TEMPERATURE] == 61


async def test_mig_instances_have_memory_of_their_own(fake: FakeNvml) -> None:
    card = fake.gpu(0)
    card.mig_supported = card.mig_mode = 1
    card.migs = 1
    card.mig[0] = nvml_parts.Mig(uuid=b"MIG-1", total=10 * GIB, used=4 * GIB, instance=3, compute=0)
    async with listening(fake) as told:
        values = (await told.sample())[0].values
        of = "mig=MIG-1 instance=3/0"
        assert values[f"{gm.MIG_USED} {of}"] == 4 * GIB
        assert values[f"{gm.MIG_RATIO} {of}"] == pytest.approx(0.4)
        assert f"{gm.MIG_FREE} {of}" in (await told.sample(HOT))[0].values


async def test_a_slow_card_holds_up_no_other(fake: FakeNvml) -> None:
    async with listening(fake) as told:
        fake.call("nvmlDeviceGetMemoryInfo_v2", 0).delay_us = 60_000
        await told.sample(HOT)
        told.parts.clear()
        await told.sample(HOT)
        assert told.parts == [[1], [0]], "the slow one comes last, and the others do not wait for it"


async def test_a_hang_is_told_at_the_deadline_and_the_others_go_on(fake: FakeNvml) -> None:
    async with listening(fake) as told:
        await told.sample()
        fake.call("nvmlDeviceGetUtilizationRates", 0).hang = 1
        began = time.monotonic()
        reading = (await told.sample(HOT))[0]
        took = time.monotonic() - began
        assert (reading.kind, dict(reading.values)) == ("hang", {})
        assert "nvmlDeviceGetUtilizationRates has not come back" in reading.error
        assert CALL_DEADLINE_S <= took < 10
        await told.until(lambda: told.kind(1) == "" and told.parts[-1] == [0, 1])
        assert told.kind(0) == "hang", "that it is left out is told at every sample"


async def test_a_card_that_hung_comes_back_by_itself_and_the_others_miss_nothing(fake: FakeNvml) -> None:
    async with listening(fake) as told:
        fake.call("nvmlDeviceGetMemoryInfo_v2", 1).hang = 1
        await told.until(lambda: told.kind(0) == "" and told.kind(1) == "hang")
        fake.clear_counts()
        await told.until(lambda: fake.call("nvmlDeviceGetMemoryInfo_v2", 1).count)  # it is tried, and hangs again
        assert told.kind(1) == "hang"
        fake.call("nvmlDeviceGetMemoryInfo_v2", 1).hang = 0
        await told.until(lambda: told.kind(1) == "")
        assert told.newest[0].values[gm.MEMORY_USED] == 5 * GIB + 512 * MIB


async def test_nobody_waits_for_a_sampler_that_can_not_be_killed(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one in the D state: SIGKILL does nothing until the driver lets go."""
    killed: list[trio.Process] = []

    def kill(process: trio.Process) -> None:
        killed.append(process)

    monkeypatch.setattr(trio.Process, "kill", kill)
    async with listening(fake) as told:
        fake.call("nvmlDeviceGetMemoryInfo_v2", 0).hang = 1
        await told.until(lambda: told.kind(0) == "hang" and told.kind(1) == "")
        [stuck] = killed
        assert stuck.poll() is None
        fake.clear_counts()
        with trio.move_on_after(0.6):  # several times what it takes until a card is tried again
            await told.until(lambda: False)
        assert "attach" not in fake.counts(0), "as long as one is stuck in the card, no other one is sent after it"
        monkeypatch.undo()
        fake.close()
        stuck.kill()
        await told.until(lambda: told.kind(0) == "")


async def test_a_card_that_hangs_when_it_is_looked_up_is_left_alone_by_the_next_sampler(fake: FakeNvml) -> None:
    fake.call("attach", 1).hang = 1
    async with listening(fake, Patience(start_s=0.5, probe_s=0.1)) as told:
        await told.until(lambda: told.kind(0) == "")
        assert told.kind(1) == "hang"
        assert fake.call("nvmlDeviceGetHandleByUUID", 0).count == 0, "a look-up by UUID would wake the others up"


async def test_a_driver_that_hangs_is_a_fault_of_the_driver(fake: FakeNvml) -> None:
    fake.call("nvmlInitWithFlags").hang = 1
    async with listening(fake, Patience(start_s=0.4, retry_s=0.1)) as told:
        assert isinstance(told.said[-1], DriverState)
        assert (told.said[-1].kind, told.backend.cards) == ("driver-hang", [])
        fake.close()
        await told.until(lambda: told.kind(0) == "")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (nvml_parts.VERSION_MISMATCH, "driver-mismatch"),
        (nvml_parts.DRIVER_NOT_LOADED, "driver-not-loaded"),
        (nvml_parts.UNKNOWN, "device-revoked"),
    ],
)
async def test_a_reload_of_the_driver_is_survived_by_a_new_process(fake: FakeNvml, error: int, kind: str) -> None:
    async with listening(fake) as told:
        fake.fail(error)
        fake.call("nvmlDeviceGetMemoryInfo_v2").error = nvml_parts.UNINITIALIZED
        await told.until(lambda: isinstance(told.said[-1], DriverState) and told.said[-1].kind == kind)
        fake.fail(0)
        told.newest.clear()
        await told.until(lambda: told.kind(0) == "")
        last = told.said[-1]
        assert isinstance(last, DriverState)
        assert (last.kind, last.restarts > 0) == ("", True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(nvml_parts.LOST, "lost"), (nvml_parts.RESET_REQUIRED, "reset-required"), (nvml_parts.UNKNOWN, "card-error")],
)
async def test_a_card_that_fails_says_how_and_the_other_goes_on(fake: FakeNvml, error: int, kind: str) -> None:
    async with listening(fake) as told:
        fake.gpu(0).error = error
        found = await told.sample()
        assert (found[0].kind, found[1].kind) == (kind, "")
        fake.gpu(0).error = 0
        assert (await told.sample())[0].kind == ""


async def test_a_card_that_is_lost_from_the_start_is_still_on_the_list(fake: FakeNvml) -> None:
    fake.gpu(1).error = nvml_parts.LOST
    async with listening(fake) as told:
        assert [card.index for card in told.backend.cards] == [0, 1]
        assert (await told.sample())[1].kind == "lost"
        fake.gpu(1).error = 0
        await told.until(lambda: told.kind(1) == "")
        assert told.newest[1].card.uuid


async def test_a_sampler_that_is_killed_is_replaced(fake: FakeNvml) -> None:
    async with listening(fake) as told:
        worker = told.backend._worker
        assert worker is not None
        os.kill(worker.process.pid, 9)
        await told.until(lambda: told.backend._worker not in (worker, None))
        await told.until(lambda: told.kind(0) == "" and told.kind(1) == "")


def test_a_sampler_ends_with_its_supervisor_though_it_hangs_in_the_driver(fake: FakeNvml) -> None:
    fake.call("nvmlDeviceGetMemoryInfo_v2", 0).hang = 1
    notes = CallNotes()
    process = subprocess.Popen(
        [sys.executable, "-m", "interlock.monitors.nvml_sampler", json.dumps({"notes": notes.descriptor})],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[notes.descriptor],
        env={**os.environ, **fake.environment},
    )
    assert process.stdin is not None
    process.stdin.write(pack(Poll(1, 1)))
    process.stdin.flush()
    while not fake.call("nvmlDeviceGetMemoryInfo_v2", 0).count:
        time.sleep(0.005)
    note = notes.read(Seat.POLL)
    assert note is not None
    assert (note.function, note.card) == ("nvmlDeviceGetMemoryInfo", 0), "this process sees where that one is"
    process.stdin.close()  # as when the supervisor is killed
    assert process.wait(30) == 0
    notes.close()


async def test_an_xid_comes_as_an_event_of_its_card(fake: FakeNvml) -> None:
    async with listening(fake) as told:
        await told.until(lambda: fake.call("nvmlEventSetWait_v2").count)
        fake.xid(1, 79)
        await told.until(lambda: any(isinstance(said, CardEvent) for said in told.said))
        [event] = [said for said in told.said if isinstance(said, CardEvent)]
        assert (event.index, event.type, event.data) == (1, nvml_parts.XID_EVENT, 79)


async def test_released_means_that_no_process_has_the_driver_open(fake: FakeNvml) -> None:
    async with listening(fake) as told:
        worker = told.backend._worker
        assert worker is not None
        assert await told.backend.release()
        assert worker.process.poll() is not None
        fake.clear_counts()
        assert await told.sample() == {}
        assert fake.counts() == {}
        told.backend.resume()
        await told.until(lambda: told.kind(0) == "")


async def test_where_no_gpu_is_expected_a_driver_that_is_not_there_is_no_fault(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.fail(nvml_parts.DRIVER_NOT_LOADED)
    backend = NvidiaBackend(expected=False)
    listener = Listener(backend)
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    with trio.fail_after(30), pytest.raises(NoGpu, match="Driver Not Loaded"):
        await backend.run(listener.hear)
    fake.fail(0)
    fake.state.gpus = 0
    with trio.fail_after(30), pytest.raises(NoGpu, match="knows no card"):
        await backend.run(listener.hear)
    assert listener.said == [], "it is no fault, and nothing is told"


def test_a_note_is_overdue_by_what_is_called() -> None:
    notes = CallNotes()
    assert notes.read(Seat.POLL) is None
    began = time.monotonic()
    notes.call(Seat.POLL, "nvmlDeviceGetTemperature", 3)
    note = notes.read(Seat.POLL)
    assert note is not None
    assert (note.function, note.card) == ("nvmlDeviceGetTemperature", 3)
    assert began <= note.since <= time.monotonic()
    assert deadline(note) == note.since + CALL_DEADLINE_S
    notes.call(Seat.EVENTS, "nvmlEventSetWait_v2")
    waiting = notes.read(Seat.EVENTS)
    assert waiting is not None
    assert deadline(waiting) - waiting.since > 2, "a wait may take as long as it was told to"
    assert notes.read(Seat.POLL) == note, "each thread has a seat of its own"
    notes.rest(Seat.POLL)
    assert notes.read(Seat.POLL) is None
    notes.close()


async def test_the_self_test_gives_a_verdict_and_a_cost_per_reading(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.call("nvmlDeviceGetPowerUsage", 0).error = nvml_parts.NO_PERMISSION
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    report = await survey(rounds=2)
    assert (report["gpu"], report["driver"], len(report["cards"])) == (True, "570.00.00", 2)
    found = {reading["reading"]: reading for reading in report["cards"][0]["readings"]}
    assert EVERYTHING.keys() | {gm.PROCESS_MEMORY} <= found.keys()
    assert (found[gm.TEMPERATURE]["verdict"], found[gm.TEMPERATURE]["value"]) == ("ok", 61)
    assert 0 <= found[gm.TEMPERATURE]["median"] <= found[gm.TEMPERATURE]["largest"]
    assert (found[gm.POWER]["verdict"], found[gm.POWER]["value"]) == ("no-permission", None)
    assert found[gm.MIG_USED]["verdict"] == "not-supported"
    shown = table(report)
    assert "gpu_power_watts" in shown
    assert "a whole sample" in shown


async def test_the_self_test_names_the_call_that_hangs_and_measures_the_other_cards(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.monitors.selftest.CALL_DEADLINE_S", 0.3)
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    fake.call("nvmlDeviceGetTemperature", 0).hang = 1
    report = await survey(rounds=1)
    assert report["cards"][0]["error"] == "nvmlDeviceGetTemperature has not come back"
    assert report["cards"][1]["error"] == ""
    assert "FAILED: nvmlDeviceGetTemperature" in table(report)
