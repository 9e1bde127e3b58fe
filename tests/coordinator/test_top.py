"""`interlock top`: what it makes of telemetry, how that looks, and the verb over the bus in memory."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import trio
import trio.testing

from interlock.broker import cadence
from interlock.broker.memory import MemoryBroker
from interlock.broker.samples import Batch, Labels, SeriesTable, labels
from interlock.coordinator import options, overview
from interlock.coordinator.cli import main, parser
from interlock.coordinator.overview import Overview, View
from interlock.coordinator.top import follow
from interlock.coordinator.top_screen import TopScreen

GIB = 1024**3
ECHO = {"host": "alpha", "agent": "echo", "revision": "v1", "role": "permanent"}
CARD = {"host": "alpha", "gpu": "0", "uuid": "GPU-0"}
MONITOR: dict[Labels, float] = {
    labels("host_cpu_ratio", host="alpha"): 0.5,
    labels("host_cpus", host="alpha"): 4,
    labels("host_load1", host="alpha"): 6,
    labels("host_memory_total_bytes", host="alpha"): 8 * GIB,
    labels("host_memory_available_bytes", host="alpha"): 2 * GIB,
    labels("host_pressure_ratio", host="alpha", resource="cpu", share="some"): 0.9,
    labels("host_pressure_ratio", host="alpha", resource="io", share="some"): 0.1,
    labels("agent_process_cpu_ratio", **ECHO): 1.5,
    labels("agent_process_memory_rss_bytes", **ECHO): GIB,
    labels("gpu_up", **CARD): 1,
    labels("gpu_memory_used_bytes", **CARD): 12 * GIB,
    labels("gpu_memory_total_bytes", **CARD): 24 * GIB,
    labels("gpu_memory_used_ratio", **CARD): 0.5,
    labels("gpu_unattributed_memory_bytes", **CARD, holder="stranger"): GIB,
    labels("gpu_unattributed_memory_bytes", **CARD, holder="unlisted"): 2 * GIB,
    labels("gpu_process_memory_bytes", **CARD, **{k: v for k, v in ECHO.items() if k != "host"}): 9 * GIB,
}


def requests(total: float) -> dict[Labels, float]:
    return {
        labels("agent_up", **ECHO): 1,
        labels("agent_requests_total", **ECHO): total,
        labels("agent_errors_total", **ECHO): 0,
        labels("agent_response_seconds", **ECHO, quantile="0.5"): 0.01,
        labels("agent_response_seconds", **ECHO, quantile="0.95"): 0.025,
    }


class Bench:
    """Publishers and an overview that hears them; `now` is by the listener's clock and by theirs."""

    def __init__(self, *hosts: str) -> None:
        self.overview = Overview(hosts or ("alpha",))
        self.now = 100.0
        self._tables: dict[str, SeriesTable] = {}

    def say(self, source: str, samples: dict[Labels, float], ended: list[Labels] | None = None) -> None:
        table = self._tables.setdefault(source, SeriesTable(source, 1))
        self.overview.take(table.batch(samples, time=self.now, ended=ended), self.now)

    def view(self, **rest: Any) -> View:
        return self.overview.view(self.now, **rest)


def test_hosts_gpus_and_agents_are_told_from_what_monitors_and_hosts_say() -> None:
    bench = Bench()
    bench.say("alpha/monitor", MONITOR)
    bench.say("alpha/host", requests(100))
    bench.now += 1.0
    bench.say("alpha/host", requests(130))
    view = bench.view()
    [host], [gpu], [agent] = view.hosts, view.gpus, view.agents
    assert (host.state, host.cpu_ratio, host.load_per_core, host.memory_used_ratio) == ("ok", 0.5, 1.5, 0.75)
    assert host.pressure_ratio == 0.1, "of memory and disks"
    assert (host.agents, host.gpus, host.fast) == (1, 1, False)
    assert (gpu.state, gpu.memory_used_ratio, gpu.unattributed_bytes) == ("ok", 0.5, 3 * GIB)
    assert gpu.temperature_celsius is None, "what a card does not say is not 0"
    assert (agent.cpu, agent.memory_bytes, agent.gpu_memory_bytes) == (1.5, GIB, 9 * GIB)
    assert (agent.requests_per_s, agent.errors_per_s, agent.p95_s) == (30.0, 0.0, 0.025)


def test_a_host_that_nobody_tells_of_is_silent_from_the_beginning() -> None:
    [host] = Bench("beta").view().hosts
    assert (host.host, host.state, host.age_s, host.cpu_ratio) == ("beta", "silent", None, None)


def test_what_was_heard_too_long_ago_is_silent_and_says_since_when() -> None:
    bench = Bench()
    bench.say("alpha/monitor", MONITOR)
    bench.say("alpha/host", requests(1))
    bench.now += 60
    bench.say("alpha/host", requests(2))
    view = bench.view()
    assert (view.hosts[0].state, view.hosts[0].age_s) == ("silent", 60.0)
    assert view.gpus[0].state == "silent"
    assert view.agents[0].state == "ok", "its host speaks"


def test_what_the_broker_remembered_is_as_old_as_it_says() -> None:
    bench = Bench()
    told = SeriesTable("alpha/monitor", 1).batch(MONITOR, time=1.0)
    old = Batch(
        source=told.source, epoch=1, seq=1, time=1.0, series=told.series, ids=told.ids, values=told.values,
        cached=True, delay=20.0,
    )  # fmt: skip
    bench.overview.take(old, bench.now)
    assert (bench.view().hosts[0].state, bench.view().hosts[0].age_s) == ("silent", 20.0)


def test_a_card_that_fails_and_an_agent_that_is_not_up_are_down() -> None:
    bench = Bench()
    bench.say("alpha/monitor", {labels("gpu_up", **CARD): 0})
    bench.say("alpha/host", {labels("agent_up", **ECHO): 0})
    view = bench.view()
    assert (view.gpus[0].state, view.agents[0].state) == ("down", "down")


def test_series_that_ended_are_gone() -> None:
    bench = Bench()
    bench.say("alpha/monitor", MONITOR)
    bench.say("alpha/monitor", {}, ended=list(MONITOR))
    view = bench.view()
    assert view.gpus == view.agents == []
    assert view.hosts[0].cpu_ratio is None


def test_a_host_that_a_migration_touches_is_fast() -> None:
    bench = Bench("alpha", "beta")
    bench.say("fleet/cadence", {cadence.lease("beta", "m1"): 10.0})
    assert [(host.host, host.fast) for host in bench.view().hosts] == [("alpha", False), ("beta", True)]


def test_agents_are_sorted_by_what_was_asked_for_the_largest_first() -> None:
    bench = Bench()
    for name, rss in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        bench.say("alpha/monitor", {labels("agent_process_memory_rss_bytes", **{**ECHO, "agent": name}): rss})
    assert [row.agent for row in bench.view().agents] == ["a", "b", "c"]
    assert [row.agent for row in bench.view(sort="memory").agents] == ["b", "c", "a"]
    assert ("name", *overview._KEYS) == options.SORTS


def test_beyond_what_is_looked_at_it_says_how_much_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "MAX_SERIES", 3)
    bench = Bench()
    bench.say("alpha/monitor", MONITOR)
    assert bench.view().left_out == len(MONITOR) - 3


def picture(view: View) -> str:
    stream = io.StringIO()
    with TopScreen(stream, live=False) as screen:
        screen.show(view)
    return stream.getvalue()


def test_the_picture_names_everything_and_shows_a_dash_for_what_is_not_known() -> None:
    bench = Bench("alpha", "beta")
    bench.say("alpha/monitor", MONITOR)
    bench.say("alpha/host", requests(1))
    text = picture(bench.view())
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert {"Hosts", "GPUs", "Agents", "alpha", "beta", "alpha/0", "echo"} <= rows.keys()
    assert "never heard" in rows["beta"]
    assert "######...... " in rows["alpha/0"]
    assert "12.0 GiB" in rows["alpha/0"]
    assert "25.0 ms" in rows["echo"]
    assert " - " in rows["echo"], "no rate from one sample"


def test_series_about_an_agent_that_are_of_no_instance_make_no_row_of_their_own() -> None:
    bench = Bench()
    bench.say("alpha/host", requests(1))
    bench.say(
        "alpha/host", {labels("agent_gpu_reserved_bytes", host="alpha", agent="echo", revision="v1", uuid="u"): 1}
    )
    bench.say("alpha/monitor", {labels("agent_process_exits_total", host="alpha", agent="echo"): 1})
    assert [row.role for row in bench.view().agents] == ["permanent"]


def test_markup_in_names_stays_text() -> None:
    bench = Bench()
    bench.say("alpha/host", {labels("agent_up", **{**ECHO, "agent": "[red]x[/red]"}): 1})
    assert "[red]x[/red]" in picture(bench.view())


async def test_the_verb_shows_once_or_again_and_again(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker()
    shown: list[View] = []

    async def publish() -> None:
        monitor, host = broker.bus("monitor/alpha").telemetry("alpha", "monitor"), broker.bus("host/alpha")
        other = host.telemetry("alpha", "host")
        for total in range(10_000):
            monitor.send(MONITOR, time=trio.current_time())
            other.send(requests(total * 10.0), time=trio.current_time())
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        bus = broker.bus("operator/o")
        await follow(bus, ["alpha"], shown.append, sort="name", once=True)
        assert len(shown) == 1
        assert shown[0].agents[0].requests_per_s == pytest.approx(10.0)
        with trio.move_on_after(10):
            await follow(bus, ["alpha"], shown.append, sort="name", once=False)
        assert len(shown) == 1 + 19
        nursery.cancel_scope.cancel()


def test_an_unknown_host_is_refused_before_anything_is_asked(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('security = { mode = "insecure" }\n[hosts.alpha]\ncontrol = "tcp://127.0.0.1:1"\n')
    assert main(["top", "--once", "--json", "--host", "beta", "--fleet", str(fleet)]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["reason"] == "unknown host 'beta'"
    assert said["hint"] == "known: alpha"


def test_the_options_of_the_verb() -> None:
    chosen = parser().parse_args(["top", "--once", "--sort", "gpu", "--host", "a", "--host", "b"])
    assert (chosen.once, chosen.sort, chosen.host) == (True, "gpu", ["a", "b"])
