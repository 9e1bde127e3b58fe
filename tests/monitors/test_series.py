"""From readings to series."""

from __future__ import annotations

from interlock.broker.samples import labels
from interlock.monitors import gpu_metrics as gpu
from interlock.monitors import series
from interlock.monitors.gpu import Card, Reading
from interlock.monitors.processes import TreeReading
from interlock.monitors.roster import Instance
from interlock.monitors.sampler import Group
from interlock.monitors.series import ALL_GROUPS, Live

ECHO = Instance("echo-1", "echo", "v1", "permanent", 11, 0.0)
CARD = Card(0, "GPU-0", "card")
HOT = frozenset({Group.HOT})
CALM = frozenset({Group.CALM})
USED = labels(gpu.MEMORY_USED, host="alpha", gpu="0", uuid="GPU-0")
WARM = labels(gpu.TEMPERATURE, host="alpha", gpu="0", uuid="GPU-0")


def test_a_tree_becomes_series_of_its_agent_and_what_is_unknown_is_absent() -> None:
    samples = series.of_trees("alpha", [TreeReading(ECHO, 1.0, None, 5, 1, 2, None)])
    of = {"host": "alpha", "agent": "echo", "revision": "v1", "role": "permanent"}
    assert samples == {
        labels("agent_process_memory_rss_bytes", **of): 5,
        labels("agent_process_count", **of): 1,
        labels("agent_process_threads", **of): 2,
    }


def test_two_processes_of_one_agent_revision_and_role_report_their_sum() -> None:
    samples = series.of_trees("alpha", [TreeReading(ECHO, 1.0, 0.5, 5, 1, 2, 3)] * 2)
    assert sorted(samples.values()) == [1.0, 2, 4, 6, 10]


def test_memory_on_a_card_is_attributed_to_agents_and_that_of_strangers_to_nobody() -> None:
    reading = Reading(CARD, 1.0, {gpu.MEMORY_USED: 9}, {11: 4, 12: 3, 99: 2})
    samples = series.of_card("alpha", reading, {11: ECHO, 12: ECHO})
    of = {"agent": "echo", "revision": "v1", "role": "permanent"}
    assert samples == {
        labels(gpu.UP, host="alpha", gpu="0", uuid="GPU-0"): 1,
        USED: 9,
        labels(gpu.PROCESS_MEMORY, host="alpha", gpu="0", uuid="GPU-0", **of): 7,
    }


def test_a_card_that_failed_says_only_that() -> None:
    assert series.of_card("alpha", Reading(CARD, 1.0, error="lost"), {}) == {
        labels(gpu.UP, host="alpha", gpu="0", uuid="GPU-0"): 0
    }


def test_a_series_that_was_not_read_this_time_has_not_ended() -> None:
    live = Live()
    assert live.update({USED: 1, WARM: 60}, due=ALL_GROUPS, complete=ALL_GROUPS) == []
    assert live.update({USED: 1}, due=HOT, complete=HOT) == []
    assert live.keys == {USED, WARM}


def test_a_series_that_was_read_and_is_not_there_has_ended_once() -> None:
    live = Live()
    live.update({USED: 1, WARM: 60}, due=ALL_GROUPS, complete=ALL_GROUPS)
    assert live.update({WARM: 60}, due=ALL_GROUPS, complete=ALL_GROUPS) == [USED]
    assert live.update({WARM: 60}, due=ALL_GROUPS, complete=ALL_GROUPS) == []


def test_what_is_not_due_is_left_out_and_has_not_begun() -> None:
    live = Live()
    samples = {USED: 1.0, WARM: 60.0}
    assert live.update(samples, due=CALM, complete=ALL_GROUPS) == []
    assert samples == {WARM: 60}
    assert live.keys == {WARM}
