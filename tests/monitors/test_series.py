"""From readings to series."""

from __future__ import annotations

from interlock.broker.samples import Labels, labels
from interlock.monitors import gpu_metrics as gpu
from interlock.monitors import series, templates
from interlock.monitors.attribution import Holding, share
from interlock.monitors.gpu import Card, Reading
from interlock.monitors.gpu_series import CardSeries
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
    samples = series.of_trees(series.TreeKeys("alpha"), [TreeReading(ECHO, 1.0, None, 5, 1, 2, None)])
    of = {"host": "alpha", "agent": "echo", "revision": "v1", "role": "permanent"}
    assert samples == {
        labels("agent_process_memory_rss_bytes", **of): 5,
        labels("agent_process_count", **of): 1,
        labels("agent_process_threads", **of): 2,
    }


def test_two_processes_of_one_agent_revision_and_role_report_their_sum() -> None:
    samples = series.of_trees(series.TreeKeys("alpha"), [TreeReading(ECHO, 1.0, 0.5, 5, 1, 2, 3)] * 2)
    assert sorted(samples.values()) == [1.0, 2, 4, 6, 10]


def test_memory_on_a_card_is_attributed_to_agents_and_the_rest_is_told_as_nobodys() -> None:
    reading = Reading(CARD, 1.0, {gpu.MEMORY_USED: 19}, {11: 4, 12: 3, 99: 2})
    samples = series.of_processes("alpha", reading, {11: ECHO, 12: ECHO})
    of = {"agent": "echo", "revision": "v1", "role": "permanent"}
    assert samples == {
        labels(gpu.PROCESS_MEMORY, host="alpha", gpu="0", uuid="GPU-0", **of): 7,
        labels(gpu.UNATTRIBUTED, host="alpha", gpu="0", uuid="GPU-0", holder="stranger"): 2,
        labels(gpu.UNATTRIBUTED, host="alpha", gpu="0", uuid="GPU-0", holder="unlisted"): 10,
    }


def test_where_the_driver_names_no_process_nobody_says_whose_memory_it_is() -> None:
    lacking = {gpu.PROCESS_MEMORY: "the driver does not tell it"}
    reading = Reading(CARD, 1.0, {gpu.MEMORY_USED: 19}, {}, lacking=lacking)
    samples: dict[Labels, float] = {}
    CardSeries("alpha", CARD).take(reading, {}, samples)
    assert samples[USED] == 19
    assert not [key for key in samples if gpu.UNATTRIBUTED in dict(key).values()]


def test_memory_of_the_instances_of_a_divided_card_is_kept_apart() -> None:
    held = [Holding("GPU-0", 11, 4, "gi1"), Holding("GPU-0", 11, 3, "gi2"), Holding("GPU-0", 99, 2, "gi2")]
    shares = share(held, {11: ECHO}, used=9)
    assert shares.agents == {("gi1", ECHO): 4, ("gi2", ECHO): 3}
    assert shares.strangers == {"gi2": 2}
    assert shares.unlisted == 0


def test_less_in_use_than_processes_hold_is_no_negative_memory() -> None:
    assert share([Holding("GPU-0", 11, 4)], {}, used=1).unlisted == 0, "the two were not read at the same moment"
    assert share([Holding("GPU-0", 11, 4)], {}).unlisted is None


def test_readings_by_resource_have_a_label_for_it() -> None:
    reading = TreeReading(ECHO, 1.0, None, 5, 1, 2, None, {f"{templates.STALLED}|io": 0.5, templates.READ: 7})
    samples = series.of_trees(series.TreeKeys("alpha"), [reading])
    of = {"host": "alpha", "agent": "echo", "revision": "v1", "role": "permanent"}
    assert samples[labels(templates.STALLED, **of, resource="io")] == 0.5
    assert samples[labels(templates.READ, **of)] == 7


def test_only_the_series_of_an_instance_that_is_gone_end_whatever_was_read() -> None:
    live = Live()
    of = {"host": "alpha", "agent": "echo", "revision": "v1"}
    old = labels(templates.FDS, **of, role="permanent")
    new = labels(templates.FDS, **of, role="candidate")
    live.update({old: 1, new: 2}, due=ALL_GROUPS, complete=ALL_GROUPS)
    assert live.end(lambda key: series.instance_of(key) == ("echo", "v1", "candidate")) == [new]
    assert live.keys == {old}


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
