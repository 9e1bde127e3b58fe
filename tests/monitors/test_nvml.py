"""The NVIDIA back-end against a stand-in for pynvml: there is no GPU where the tests run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from interlock.monitors import gpu
from interlock.monitors.gpu import NoGpu
from interlock.monitors.nvml import open_nvidia_backend
from interlock.monitors.sampler import Group
from interlock.monitors.selftest import survey

GIB = 1024**3
ALL = frozenset(Group)
HOT = frozenset({Group.HOT})


class FakeNvml:
    """Behaves as pynvml does, so far as the back-end uses it. `on[function]` replaces what a function does."""

    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    class NVMLError_NoPermission(NVMLError):
        pass

    class NVMLError_FunctionNotFound(NVMLError):
        pass

    class NVMLError_InsufficientSize(NVMLError):
        pass

    class NVMLError_Uninitialized(NVMLError):
        pass

    class NVMLError_GpuIsLost(NVMLError):
        pass

    class NVMLError_DriverNotLoaded(NVMLError):
        pass

    def __init__(self, cards: int = 2) -> None:
        self.count = cards
        self.on: dict[str, Callable[..., Any]] = {}
        self.started = 0
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return self.on[name](*arguments) if name in self.on else getattr(self, f"_{name}")(*arguments)

        return call

    def _nvmlInit(self) -> None:
        self.started += 1

    def _nvmlShutdown(self) -> None:
        self.started -= 1

    def _nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.1"

    def _nvmlDeviceGetCount(self) -> int:
        return self.count

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"handle {index}"

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return f"handle {uuid.removeprefix('GPU-')}"

    def _nvmlDeviceGetUUID(self, handle: str) -> str:
        return f"GPU-{handle.removeprefix('handle ')}"

    def _nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA Fake 4090"

    def _nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=24 * GIB, used=6 * GIB, free=18 * GIB)

    def _nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=40, memory=10)

    def _nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def _nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 123_400

    def _nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 450_000

    def _nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:
        raise self.NVMLError_NotSupported("Not Supported")

    def _nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=100, usedGpuMemory=5 * GIB), SimpleNamespace(pid=101, usedGpuMemory=None)]

    def _nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=100, usedGpuMemory=5 * GIB), SimpleNamespace(pid=200, usedGpuMemory=GIB)]


@pytest.fixture
def nvml() -> FakeNvml:
    return FakeNvml()


@pytest.fixture
def hang() -> Iterator[Callable[..., Any]]:
    """A call that does not come back before the test is over."""
    released = threading.Event()

    def call(*arguments: Any) -> Any:
        released.wait(60)
        return SimpleNamespace(total=1, used=0, free=1)

    call.release = released.set  # type: ignore[attr-defined]
    yield call
    released.set()


def raises(error: Exception) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        raise error

    return call


async def test_a_healthy_card_gives_every_reading_it_supports(nvml: FakeNvml) -> None:
    backend = await open_nvidia_backend(nvml)
    assert [(card.index, card.uuid, card.name) for card in backend.cards] == [
        (0, "GPU-0", "NVIDIA Fake 4090"),
        (1, "GPU-1", "NVIDIA Fake 4090"),
    ]
    reading = await backend.sample(0, ALL)
    assert reading.error == ""
    assert reading.values == pytest.approx(
        {
            gpu.MEMORY_USED: 6 * GIB,
            gpu.MEMORY_FREE: 18 * GIB,
            gpu.MEMORY_TOTAL: 24 * GIB,
            gpu.MEMORY_RATIO: 0.25,
            gpu.UTILIZATION: 0.4,
            gpu.TEMPERATURE: 61,
            gpu.POWER: 123.4,
            gpu.POWER_LIMIT: 450,
        }
    )
    assert reading.processes == {100: 5 * GIB, 200: GIB}, "one in both lists counts once, an unknown size not at all"
    await backend.close()
    assert nvml.started == 0


async def test_a_reading_that_is_not_supported_is_absent_and_never_0(nvml: FakeNvml) -> None:
    nvml.on["nvmlDeviceGetPowerUsage"] = raises(nvml.NVMLError_NotSupported("Not Supported"))
    nvml.on["nvmlDeviceGetMemoryInfo"] = raises(nvml.NVMLError_NoPermission("Insufficient Permissions"))
    for function in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        nvml.on[function] = raises(nvml.NVMLError_FunctionNotFound("Function Not Found"))
    backend = await open_nvidia_backend(nvml)
    reading = await backend.sample(0, ALL)
    assert reading.error == ""
    assert set(reading.values) == {gpu.UTILIZATION, gpu.TEMPERATURE, gpu.POWER_LIMIT}
    assert set(reading.unsupported) == {
        gpu.MEMORY_USED,
        gpu.MEMORY_FREE,
        gpu.MEMORY_TOTAL,
        gpu.MEMORY_RATIO,
        gpu.POWER,
        gpu.ECC_ERRORS,
        gpu.PROCESS_MEMORY,
    }


async def test_only_the_group_that_is_due_is_asked_for(nvml: FakeNvml) -> None:
    backend = await open_nvidia_backend(nvml)
    nvml.calls.clear()
    await backend.sample(0, HOT)
    assert "nvmlDeviceGetMemoryInfo" in nvml.calls
    assert "nvmlDeviceGetTemperature" not in nvml.calls


async def test_a_lost_card_says_so_and_the_other_goes_on(nvml: FakeNvml) -> None:
    healthy = nvml._nvmlDeviceGetMemoryInfo
    nvml.on["nvmlDeviceGetMemoryInfo"] = lambda handle: (
        raises(nvml.NVMLError_GpuIsLost("GPU is lost"))() if handle == "handle 0" else healthy(handle)
    )
    backend = await open_nvidia_backend(nvml)
    lost, well = await backend.sample(0, ALL), await backend.sample(1, ALL)
    assert (lost.error, dict(lost.values), dict(lost.processes)) == ("GPU is lost", {}, {})
    assert lost.card.uuid == "GPU-0", "it keeps its identity"
    assert well.error == ""
    assert well.values[gpu.MEMORY_RATIO] == 0.25


async def test_a_card_that_comes_back_is_looked_up_anew_also_after_a_reload_of_the_driver(nvml: FakeNvml) -> None:
    backend = await open_nvidia_backend(nvml)
    nvml.on["nvmlDeviceGetMemoryInfo"] = raises(nvml.NVMLError_Uninitialized("Uninitialized"))
    assert (await backend.sample(0, HOT)).error == "Uninitialized"
    del nvml.on["nvmlDeviceGetMemoryInfo"]
    refusals = iter([True])

    def by_uuid(uuid: str) -> str:
        if next(refusals, False):
            raise nvml.NVMLError_Uninitialized("Uninitialized")
        return "handle 0"

    nvml.on["nvmlDeviceGetHandleByUUID"] = by_uuid
    assert (await backend.sample(0, HOT)).error == ""
    assert nvml.started == 2, "the library was started again"


async def test_a_card_that_is_lost_from_the_start_is_still_on_the_list(nvml: FakeNvml) -> None:
    nvml.on["nvmlDeviceGetHandleByIndex"] = lambda index: (
        raises(nvml.NVMLError_GpuIsLost("GPU is lost"))() if index == 1 else f"handle {index}"
    )
    backend = await open_nvidia_backend(nvml)
    assert [card.uuid for card in backend.cards] == ["GPU-0", ""]
    assert (await backend.sample(1, ALL)).error == "GPU is lost"
    del nvml.on["nvmlDeviceGetHandleByIndex"]
    assert (await backend.sample(1, ALL)).card.uuid == "GPU-1"


async def test_a_driver_that_hangs_costs_the_deadline_once_and_no_other_card(
    nvml: FakeNvml, hang: Callable[..., Any]
) -> None:
    healthy = nvml._nvmlDeviceGetMemoryInfo
    nvml.on["nvmlDeviceGetMemoryInfo"] = lambda handle: hang() if handle == "handle 0" else healthy(handle)
    backend = await open_nvidia_backend(nvml, deadline_s=0.2)
    with trio.fail_after(20):
        assert "no answer within 0.2 s" in (await backend.sample(0, HOT)).error
        nvml.calls.clear()
        assert "an earlier call has still not come back" in (await backend.sample(0, HOT)).error
        assert nvml.calls == [], "no second thread is lost in the driver"
        assert (await backend.sample(1, HOT)).error == ""
        hang.release()  # type: ignore[attr-defined]
        del nvml.on["nvmlDeviceGetMemoryInfo"]
        while (await backend.sample(0, HOT)).error:  # noqa: ASYNC110 - the thread that comes back tells nobody
            await trio.sleep(0.02)


async def test_a_driver_that_hangs_at_the_start_is_no_gpu(nvml: FakeNvml, hang: Callable[..., Any]) -> None:
    nvml.on["nvmlInit"] = hang
    with trio.fail_after(20), pytest.raises(NoGpu, match="the NVIDIA driver does not answer"):
        await open_nvidia_backend(nvml, start_deadline_s=0.1)


async def test_a_driver_that_hangs_at_the_end_delays_nothing(nvml: FakeNvml, hang: Callable[..., Any]) -> None:
    backend = await open_nvidia_backend(nvml, deadline_s=0.1)
    nvml.on["nvmlShutdown"] = hang
    with trio.fail_after(20):
        await backend.close()


async def test_a_driver_that_is_not_loaded_is_no_gpu(nvml: FakeNvml) -> None:
    nvml.on["nvmlInit"] = raises(nvml.NVMLError_DriverNotLoaded("Driver Not Loaded"))
    with pytest.raises(NoGpu, match="no NVIDIA GPU: Driver Not Loaded"):
        await open_nvidia_backend(nvml)


async def test_a_driver_without_cards_is_no_gpu_and_is_closed_again() -> None:
    nvml = FakeNvml(cards=0)
    with pytest.raises(NoGpu, match=r"driver 570\.1 knows no card"):
        await open_nvidia_backend(nvml)
    assert nvml.started == 0


async def test_the_self_test_shows_readings_what_is_unsupported_and_durations(nvml: FakeNvml) -> None:
    report = await survey(nvml, rounds=2)
    assert (report["gpu"], report["driver"], len(report["cards"])) == (True, "570.1", 2)
    card = report["cards"][0]
    assert card["up"]
    assert card["readings"][gpu.MEMORY_RATIO] == 0.25
    assert card["unsupported"] == [gpu.ECC_ERRORS]
    assert card["processes"] == {"100": 5 * GIB, "200": GIB}
    assert set(card["sample_seconds"]) == {"hot", "all"}
    assert 0 <= card["call_seconds"][gpu.MEMORY_USED]["median"] <= card["call_seconds"][gpu.MEMORY_USED]["largest"]


async def test_the_self_test_says_why_there_is_no_gpu(nvml: FakeNvml) -> None:
    nvml.on["nvmlInit"] = raises(nvml.NVMLError_DriverNotLoaded("Driver Not Loaded"))
    report = await survey(nvml)
    assert report["gpu"] is False
    assert "Driver Not Loaded" in report["reason"]


def test_the_stand_in_uses_only_names_that_the_real_library_has(nvml: FakeNvml) -> None:
    pynvml = pytest.importorskip("pynvml")
    names = [name.removeprefix("_") for name in vars(FakeNvml) if name.startswith(("_nvml", "NVML"))]
    assert names
    assert [name for name in names if not hasattr(pynvml, name)] == []
