"""What is published of GPUs: each metric's unit, meaning, source and tier. docs/metrics.md has this table.

A reading is called by the metric's name, with a label behind it where there is one: "gpu_clock_hertz clock=sm".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# hot: at every sample. calm: at most every monitor.idle_s. slow: at most every 10 s, what hardly ever changes.
Tier = Literal["hot", "calm", "slow"]
SLOW_S = 10.0  # a link that trains down, or a limit that somebody sets, is seen within this time

MEMORY_USED = "gpu_memory_used_bytes"
MEMORY_FREE = "gpu_memory_free_bytes"
MEMORY_TOTAL = "gpu_memory_total_bytes"
MEMORY_RESERVED = "gpu_memory_reserved_bytes"
MEMORY_RATIO = "gpu_memory_used_ratio"
UTILIZATION = "gpu_utilization_ratio"
MEMORY_UTILIZATION = "gpu_memory_utilization_ratio"
TEMPERATURE = "gpu_temperature_celsius"
MEMORY_TEMPERATURE = "gpu_memory_temperature_celsius"
POWER = "gpu_power_watts"
POWER_AVERAGE = "gpu_power_average_watts"
POWER_INSTANT = "gpu_power_instant_watts"
POWER_LIMIT = "gpu_power_limit_watts"
ENERGY = "gpu_energy_joules_total"
CLOCK = "gpu_clock_hertz"
CLOCK_REASONS = "gpu_clock_event_reasons"
THROTTLED = "gpu_throttled"
ECC_ERRORS = "gpu_ecc_uncorrected_errors_total"
ECC_CORRECTED = "gpu_ecc_corrected_errors_total"
ECC_LIFETIME = "gpu_ecc_lifetime_errors_total"
REMAPPED_ROWS = "gpu_remapped_rows"
REMAP_PENDING = "gpu_row_remap_pending"
REMAP_FAILED = "gpu_row_remap_failed"
RECOVERY_ACTION = "gpu_recovery_action"
PCIE_SENT = "gpu_pcie_sent_bytes_total"
PCIE_RECEIVED = "gpu_pcie_received_bytes_total"
PCIE_REPLAYS = "gpu_pcie_replays_total"
PCIE_GENERATION = "gpu_pcie_link_generation"
PCIE_WIDTH = "gpu_pcie_link_lanes"
NVLINK_SENT = "gpu_nvlink_sent_bytes_total"
NVLINK_RECEIVED = "gpu_nvlink_received_bytes_total"
NVLINK_ERRORS = "gpu_nvlink_errors_total"
FAN = "gpu_fan_speed_ratio"
MIG_USED = "gpu_mig_memory_used_bytes"
MIG_FREE = "gpu_mig_memory_free_bytes"
MIG_TOTAL = "gpu_mig_memory_total_bytes"
MIG_RATIO = "gpu_mig_memory_used_ratio"
PROCESS_MEMORY = "gpu_process_memory_bytes"
UNATTRIBUTED = "gpu_unattributed_memory_bytes"
PROCESS_UTILIZATION = "gpu_process_utilization_ratio"
EVENTS = "gpu_events"  # what a card tells by itself; no metric, but it may be lacking like one
UP = "gpu_up"
QUALITY = "gpu_sample_quality_ratio"
SAMPLES = "gpu_samples_total"
SAMPLE_SECONDS = "gpu_sample_seconds"
FAULT = "gpu_fault"
XIDS = "gpu_xid_errors_total"
LACKING = "gpu_reading_lacking"
DRIVER_UP = "gpu_driver_up"
RELEASED = "gpu_driver_released"
RESTARTS = "gpu_sampler_restarts_total"
KERNEL_LOG = "gpu_kernel_log_readable"


@dataclass(frozen=True)
class Metric:
    """`labels`: beside host, gpu and uuid. `of_host`: it has the label host only."""

    unit: str
    help: str
    source: str
    tier: Tier
    labels: tuple[str, ...] = ()
    of_host: bool = False


_FIELD = "nvmlDeviceGetFieldValues"
_OWN = "the monitor"

METRICS: dict[str, Metric] = {
    UP: Metric("0, 1", "the card answers; at 0 its readings have ended", _OWN, "hot"),
    QUALITY: Metric(
        "ratio", "of the readings that the card supports, those that this sample has; 0 in a fault", _OWN, "hot"
    ),
    SAMPLES: Metric("samples", "taken of this card since the monitor began: its sequence", _OWN, "hot"),
    SAMPLE_SECONDS: Metric("s", "how long the card's last sample took in the driver", _OWN, "calm"),
    MEMORY_USED: Metric("bytes", "in use by processes", "nvmlDeviceGetMemoryInfo (version 2)", "hot"),
    MEMORY_FREE: Metric("bytes", "to be had", "the same", "hot"),
    MEMORY_TOTAL: Metric("bytes", "of the card", "the same", "hot"),
    MEMORY_RESERVED: Metric(
        "bytes", "kept by the driver and firmware; older drivers count it as used", "the same", "hot"
    ),
    MEMORY_RATIO: Metric("ratio", "1 - free / total", "the same", "hot"),
    UTILIZATION: Metric(
        "ratio", "share of the last sample period in which a kernel ran", "nvmlDeviceGetUtilizationRates", "hot"
    ),
    MEMORY_UTILIZATION: Metric("ratio", "share of it in which memory was read or written", "the same", "hot"),
    TEMPERATURE: Metric("degrees C", "of the chip", "nvmlDeviceGetTemperature", "calm"),
    MEMORY_TEMPERATURE: Metric("degrees C", "of the memory", f"{_FIELD}: MEMORY_TEMP", "calm"),
    POWER: Metric("W", "drawn, as the card counts: over a second on newer ones", "nvmlDeviceGetPowerUsage", "calm"),
    POWER_AVERAGE: Metric("W", "drawn over the last second", f"{_FIELD}: POWER_AVERAGE", "calm"),
    POWER_INSTANT: Metric("W", "drawn now", f"{_FIELD}: POWER_INSTANT", "calm"),
    POWER_LIMIT: Metric("W", "enforced limit", "nvmlDeviceGetEnforcedPowerLimit", "slow"),
    ENERGY: Metric("J", "since the driver was loaded", f"{_FIELD}: TOTAL_ENERGY_CONSUMPTION", "calm"),
    CLOCK: Metric("Hz", "graphics, sm, memory, video", "nvmlDeviceGetClockInfo", "calm", ("clock",)),
    CLOCK_REASONS: Metric(
        "bits", "why the clocks are as they are: NVML's bit mask", "nvmlDeviceGetCurrentClocksEventReasons", "calm"
    ),
    THROTTLED: Metric(
        "0, 1", "the clocks are held down: power, thermal, hardware", "bits of the same", "calm", ("cause",)
    ),
    ECC_ERRORS: Metric(
        "errors", "of memory, not corrected, since the driver was loaded", "nvmlDeviceGetTotalEccErrors", "calm"
    ),
    ECC_CORRECTED: Metric("errors", "corrected, since the driver was loaded", "the same", "calm"),
    ECC_LIFETIME: Metric("errors", "of the card's life: corrected, uncorrected", "the same", "slow", ("kind",)),
    REMAPPED_ROWS: Metric(
        "rows", "replaced after errors: correctable, uncorrectable", "nvmlDeviceGetRemappedRows", "slow", ("cause",)
    ),
    REMAP_PENDING: Metric("0, 1", "a row is replaced at the next reset", "the same", "slow"),
    REMAP_FAILED: Metric("0, 1", "there was no spare row left: the card has to be replaced", "the same", "slow"),
    RECOVERY_ACTION: Metric(
        "code",
        "what the driver asks for: 0 nothing, 1 reset, 2 reboot, 3 drain peer-to-peer, 4 drain and reset, "
        "5 recover the IMEX domain, 6 reset the bus, 7 reboot the system",
        f"{_FIELD}: GET_GPU_RECOVERY_ACTION",
        "calm",
    ),
    PCIE_SENT: Metric("bytes", "by the card", f"{_FIELD}: PCIE_COUNT_TX_BYTES", "calm"),
    PCIE_RECEIVED: Metric("bytes", "by the card", f"{_FIELD}: PCIE_COUNT_RX_BYTES", "calm"),
    PCIE_REPLAYS: Metric("packets", "sent again after an error", f"{_FIELD}: PCIE_REPLAY_COUNTER", "calm"),
    PCIE_GENERATION: Metric("generation", "that the link runs at now", "nvmlDeviceGetCurrPcieLinkGeneration", "slow"),
    PCIE_WIDTH: Metric("lanes", "that the link has now", "nvmlDeviceGetCurrPcieLinkWidth", "slow"),
    NVLINK_SENT: Metric("bytes", "over all links", f"{_FIELD}: NVLINK_THROUGHPUT_DATA_TX", "calm"),
    NVLINK_RECEIVED: Metric("bytes", "over all links", f"{_FIELD}: NVLINK_THROUGHPUT_DATA_RX", "calm"),
    NVLINK_ERRORS: Metric(
        "errors", "of all links: crc, replay, recovery", f"{_FIELD}: NVLINK_*_ERROR_COUNT_TOTAL", "calm", ("kind",)
    ),
    FAN: Metric("ratio", "of the fan's full speed, as asked for", "nvmlDeviceGetFanSpeed_v2", "slow", ("fan",)),
    MIG_USED: Metric(
        "bytes", "in use in a MIG instance", "nvmlDeviceGetMemoryInfo (version 2)", "hot", ("mig", "instance")
    ),
    MIG_FREE: Metric("bytes", "to be had", "the same", "hot", ("mig", "instance")),
    MIG_TOTAL: Metric("bytes", "of the instance", "the same", "hot", ("mig", "instance")),
    MIG_RATIO: Metric("ratio", "1 - free / total", "the same", "hot", ("mig", "instance")),
    PROCESS_MEMORY: Metric(
        "bytes",
        "of an agent's process tree on this card",
        "nvmlDeviceGet{Compute,Graphics}RunningProcesses, attributed by process",
        "calm",
        ("agent", "revision", "role"),
    ),
    UNATTRIBUTED: Metric(
        "bytes",
        "memory that belongs to no agent: of a process of no agent of this host (stranger), or in use and of no "
        "process that the driver names (unlisted); absent where it names none at all",
        "the same, and what is in use",
        "calm",
        ("holder",),
    ),
    PROCESS_UTILIZATION: Metric(
        "ratio",
        "share of the time since the last sample in which kernels of an agent's processes ran; absent while none did",
        "nvmlDeviceGetProcessUtilization",
        "calm",
        ("agent", "revision", "role"),
    ),
    XIDS: Metric(
        "errors",
        "told by NVML, the kernel log or both, since the monitor began; cause: device, agent (13, 31, 43, 45, 68, 109)",
        "event set, /dev/kmsg",
        "calm",
        ("cause",),
    ),
    FAULT: Metric(
        "0, 1", "a fault of this kind stands; once 0 when it has cleared, then it ends", _OWN, "hot", ("kind",)
    ),
    LACKING: Metric(
        "1", "a reading that this card does not give, and why", "the call's own answer", "slow", ("reading", "reason")
    ),
    DRIVER_UP: Metric(
        "0, 1",
        'the driver answers; absent where no GPU is configured or, with `gpu = "auto"`, found',
        "the start of the library",
        "calm",
        of_host=True,
    ),
    RELEASED: Metric("0, 1", "the driver was let go of (`interlock monitor release`)", _OWN, "calm", of_host=True),
    RESTARTS: Metric("processes", "that ask the driver, begun after the first one", _OWN, "calm", of_host=True),
    KERNEL_LOG: Metric("0, 1", "XIDs are read from the kernel log, too", "/dev/kmsg", "calm", of_host=True),
}
HOT = frozenset(name for name, metric in METRICS.items() if metric.tier == "hot")


def split(reading: str) -> tuple[str, dict[str, str]]:
    """The metric and the labels of a reading's key."""
    name, *labels = reading.split(" ")
    return name, dict(label.split("=", 1) for label in labels)
